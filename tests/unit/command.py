"""What a command of the command line told."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Told(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Command = Callable[..., Told]
WriteRecipe = Callable[..., Path]


def is_mistake(told: Told, *parts: str) -> bool:
    """Whether a mistake of the user was told as it should be, each of `parts` in the message."""
    start = told.err.rfind("scaleprog: ")
    message = told.err[start:]
    assert told.code == 2, told
    assert start >= 0, told
    assert start == 0 or told.err[start - 1] == "\n"
    assert "Traceback" not in told.err + told.out
    assert [part for part in parts if part not in message] == [], message
    return True
