"""Which build of batchgen this is: driver and workers must be the same one."""

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

from batchgen import __version__


@cache
def build_id() -> str:
    """Version and a digest of the package's own sources: two checkouts of one version differ too."""
    digest = hashlib.sha256()
    root = Path(str(files("batchgen")))
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def tell_other_build(build: str) -> str:
    """What is wrong with a worker that runs it."""
    mend = "install the same build on all nodes, or submit with --working-dir ."
    return f"runs batchgen {build}, the driver {build_id()}; {mend}"
