"""Engines: what generates. One file each, its vendor imported there and nowhere else; `table` lists them.

The table's names are loaded when they are first used: a process that is started from a module in here, as TensorRT-LLM's
is, has no need of every engine's section.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchgen.engines.table import ENGINES as ENGINES
    from batchgen.engines.table import check_patience as check_patience
    from batchgen.engines.table import check_supported as check_supported
    from batchgen.engines.table import create_engine as create_engine
    from batchgen.engines.table import create_tokenizer as create_tokenizer
    from batchgen.engines.table import get_engine_kind as get_engine_kind
    from batchgen.engines.table import list_refused as list_refused
    from batchgen.engines.table import make_facts as make_facts
    from batchgen.engines.table import wrapping_engines as wrapping_engines

__all__ = [
    "ENGINES",
    "check_patience",
    "check_supported",
    "create_engine",
    "create_tokenizer",
    "get_engine_kind",
    "list_refused",
    "make_facts",
    "wrapping_engines",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'batchgen.engines' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("batchgen.engines.table"), name)
