"""Say how the person at this terminal calls agentray."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["program"]


def program() -> str:
    """Return what to type for this installation's ``agentray``, from the current folder."""
    own = Path(sys.executable).parent / "agentray"
    found = shutil.which("agentray")
    if not own.exists() or (found is not None and Path(found).resolve() == own.resolve()):
        return "agentray"
    try:
        return str(own.relative_to(Path.cwd()))
    except ValueError:
        return str(own)
