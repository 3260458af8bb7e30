"""Local paths as people write them."""

import os
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """`~` and `~user` as a shell expands them: a user that nobody knows is left as it is, a name like any other."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises there
