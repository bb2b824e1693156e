"""What a command of the command line told."""

import re
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


def rows_of(out: str) -> list[list[str]]:
    """The cells of the tables in what a command printed, row by row, without the heads."""
    found: list[list[str]] = []
    below_a_rule = False
    for line in out.splitlines():
        cells = re.split(" {2,}", line.strip())
        below_a_rule = set(line.strip()) == {"─"} or (below_a_rule and len(cells) > 1)
        if below_a_rule and len(cells) > 1:
            found.append(cells)
    return found


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
