"""batchgen: prompt Parquet in, generation Parquet out, on Ray, every row exactly once.

    import batchgen
    batchgen.run("spec.yaml")
    batchgen.generate(["7 + 5 ="])

Names are loaded when they are first used: `import batchgen` alone takes a millisecond.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchgen.library import Answer as Answer
    from batchgen.library import RunResult as RunResult
    from batchgen.library import generate as generate
    from batchgen.library import run as run
    from batchgen.spec import JobSpec as JobSpec

__version__ = "0.1.0"
__all__ = ["Answer", "JobSpec", "RunResult", "__version__", "generate", "run"]

_HOMES = {"JobSpec": "spec", "Answer": "library", "RunResult": "library", "generate": "library", "run": "library"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchgen' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"batchgen.{_HOMES[name]}"), name)
