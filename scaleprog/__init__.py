"""scaleprog: progressive training of Vision Transformers that decides on the fly when and where to grow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scaleprog.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from scaleprog.api import Plan, Recipe, RunRecord, describe, evaluate, export, grow_model, load_run, train

__all__ = ["Plan", "Recipe", "RunRecord", "describe", "evaluate", "export", "grow_model", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """The names of `scaleprog.api`, imported when they are first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'scaleprog' has no attribute {name!r}")
    return getattr(import_module("scaleprog.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
