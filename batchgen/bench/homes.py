"""Environments of peers that can't live beside our pins: made once with the standard tools, kept for the next time."""

import subprocess
import sys
import venv
from pathlib import Path

INSTALL_TIMEOUT_S = 600.0


def find_python(name: str, homes: Path, scripts: Path) -> tuple[str, str | None]:
    """(the interpreter, None), or (ours, why there is none): the machine may have no way to a package index."""
    if not name:
        return sys.executable, None
    home, requirements = homes / name, scripts / f"{name}_requirements.txt"
    python, mark = home / "bin" / "python", home / "installed.txt"
    if mark.exists() and mark.read_text() == requirements.read_text():
        return str(python), None
    venv.create(home, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return sys.executable, f"{requirements.name} can't be installed ({type(error).__name__})"
    mark.write_text(requirements.read_text())
    return str(python), None
