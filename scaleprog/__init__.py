"""scaleprog: progressive training of Vision Transformers that decides on the fly when and where to grow."""

import os
import signal
import sys
import threading
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

from scaleprog.errors import INTERRUPTED_CODE
from scaleprog.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from scaleprog.api import (
        Evaluation,
        Plan,
        Recipe,
        RunRecord,
        describe,
        evaluate,
        export,
        grow_model,
        load_run,
        train,
    )

__all__ = [
    "Evaluation",
    "Plan",
    "Recipe",
    "RunRecord",
    "describe",
    "evaluate",
    "export",
    "grow_model",
    "load_run",
    "train",
]


def __getattr__(name: str) -> Any:
    """The names of `scaleprog.api`, imported when they are first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'scaleprog' has no attribute {name!r}")
    return getattr(import_module("scaleprog.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _leave_quietly(_: int, __: FrameType | None) -> None:
    """Ends a command that Ctrl-C interrupts while it still imports; a traceback would help nobody."""
    os._exit(INTERRUPTED_CODE)


def _is_command() -> bool:
    """Whether this process is `scaleprog`, `python -m scaleprog...` or a task of submitit, and not a user's program."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # Python still looks for the module
        words = [word.removeprefix("-m") for word in sys.orig_argv[1:]]
        return any(word == "scaleprog" or word.startswith("scaleprog.") for word in words)
    return os.path.basename(program) == "scaleprog" or program.endswith("submitit/core/_submit.py")


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _leave_quietly)
