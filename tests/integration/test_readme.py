"""Every command of the README runs, on the suite's system in the place of the reader's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system import System

ROOT = Path(__file__).parents[2]
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
# These would start another system, or the tests in the tests: only that make knows them is tried.
MAKE = re.compile(r"^make +([a-z-]+)", re.MULTILINE)


def _name(block: tuple[str, str]) -> str:
    language, text = block
    return f"{language}: {text.splitlines()[0][:40]}"


@pytest.fixture(scope="module")
def folder(system: System, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's clone and home: the commands are in .venv, the system is in ~/.agentray."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / ".venv" / "bin").mkdir(parents=True)
    command = folder / ".venv" / "bin" / "agentray"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m agentray "$@"\n')
    command.chmod(0o755)
    (folder / ".agentray").symlink_to(system.data_dir)
    (folder / ".ray").symlink_to(Path.home() / ".ray")
    return folder


def run(folder: Path, system: System, program: list[str], text: str) -> str:
    done = subprocess.run(
        program,
        input=text.replace("http://127.0.0.1:8000", system.url),
        capture_output=True,
        text=True,
        timeout=90,
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert '"error":{' not in done.stdout
    return done.stdout


def test_the_readme_has_the_blocks_that_are_run_here() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) >= 6
    assert {"up", "test"} <= {target for _, text in BLOCKS for target in MAKE.findall(text)}


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_a_block_of_the_readme_runs(system: System, folder: Path, block: tuple[str, str]) -> None:
    language, text = block
    if language == "python":
        said = run(folder, system, [sys.executable, "-"], text)
    else:
        for target in MAKE.findall(text):
            dry = ["make", "--dry-run", target]
            subprocess.run(dry, cwd=ROOT, check=True, capture_output=True)
        text = re.sub(r"^make .*$", "", text, flags=re.MULTILINE)
        said = run(folder, system, ["bash", "-euo", "pipefail"], text)
        if not text.strip():
            return
    assert said.strip()
    if "What is my name?" in text:
        assert "Your name is Ada." in said
