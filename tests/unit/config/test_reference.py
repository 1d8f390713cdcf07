import subprocess
import sys
from pathlib import Path

from agentray.config.fields import leaves
from agentray.config.reference import render

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_in_the_docs_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_setting_is_in_the_page_with_a_meaning():
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert len(rows) == len(list(leaves()))
    assert all(row.split(" | ")[-1].strip(" |") for row in rows)


def test_the_check_fails_for_a_page_that_is_not_current(tmp_path):
    page = tmp_path / "configuration.md"
    page.write_text("# Configuration\n")
    command = [sys.executable, "-m", "agentray.config.reference", "--check", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "run `make docs`" in done.stderr
