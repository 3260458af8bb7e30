"""Whether a version has it is found out by importing it."""

import os

if os.environ.get("STAND_IN_OLD") == "1":
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)


class HangDetector:
    """There, and idle."""
