#!/usr/bin/env bash
# Serve a tiny model with vLLM on the CPU by `agentray up`, and run tests/vllm against it.
# Arguments go on to pytest. PYTHON names the interpreter that makes the environment.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
env=.venv-vllm
model=$env/tiny-llama
SECONDS=0

tests/vllm/install.sh "$python"
echo "==> environment ready after $SECONDS s"

stamp=$(sha256sum < tests/vllm/tiny_llama.py)
if [ "$(cat "$model/.stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$model"
    log=$env/tiny-llama.log
    "$env/bin/python" tests/vllm/tiny_llama.py "$model" 2> "$log" || { cat "$log" >&2; exit 1; }
    echo "$stamp" > "$model/.stamp"
fi

# One thread for each engine: the model is far too small for more to help.
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1
export AGENTRAY_TEST_VLLM_MODEL=$PWD/$model
# The systems' folders, their logs in them, are where they can be found after a failure.
code=0
"$env/bin/python" -m pytest tests/vllm --basetemp="$env/run" "$@" || code=$?
if [ "$code" -ne 0 ]; then
    echo "==> logs: $env/run/*/data/logs, with Ray's and vLLM's in ray/" >&2
fi
exit "$code"
