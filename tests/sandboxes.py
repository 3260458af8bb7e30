"""A skip for tests that run programs: with its reason where bubblewrap can't work, and not at all where CI forgot it."""

import os
import shutil
from functools import cache

import pytest

from batchgen.errors import SpecError
from batchgen.evaluate.sandbox import Sandbox


@cache
def why_no_sandbox() -> str | None:
    if shutil.which("bwrap") is None and "CI" in os.environ:
        return None
    try:
        Sandbox()
    except SpecError as error:
        return str(error)
    return None


needs_sandbox = pytest.mark.skipif(why_no_sandbox() is not None, reason=f"no sandbox here: {why_no_sandbox()}")
