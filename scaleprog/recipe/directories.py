"""The directories in which a run was started: where the relative paths of its recipe lead, wherever it is read."""

import json
import os
from contextlib import suppress
from pathlib import Path

from scaleprog.files.atomic import read_text, write_whole

DIRECTORIES = "directories.json"
MOST = 20
MOST_BYTES = 2**17


def to_train(run: Path) -> list[Path]:
    """Where the relative paths of a recipe may lead that is typed to train in a run directory: from the current
    directory or, if the run has begun, from those in which it was started."""
    return [*_current(), *_noted(run)[1]]


def to_read(run: Path) -> list[Path]:
    """Where the relative paths of the recipe in a run directory may lead; see `to_train`.

    They lead from the directories in which the run was started first, unless its own directory has been moved or
    copied since, perhaps together with its shards.
    """
    home, noted = _noted(run)
    return [*noted, *_current()] if home == str(run.resolve()) else [*_current(), *noted]


def note(run: Path) -> None:
    """Notes the current directory in a run directory, as that in which the run was started last. Raises OSError."""
    home, noted = _noted(run)
    newest = list(dict.fromkeys([*_current(), *noted]))[:MOST]
    if (str(run.resolve()), newest) != (home, noted):
        values = {"run": str(run.resolve()), "directories": list(map(str, newest))}
        write_whole(run / DIRECTORIES, json.dumps(values))


def _noted(run: Path) -> tuple[str, list[Path]]:
    """Where a run directory was when it was started last, and the directories that it notes, the last one first.

    Nothing if there is no such file, as in runs of earlier versions, or it is damaged.
    """
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(read_text(run / DIRECTORIES, MOST_BYTES))
        if isinstance(values, dict) and isinstance(noted := values.get("directories"), list):
            paths = [Path(each) for each in noted[:MOST] if isinstance(each, str) and os.path.isabs(each)]
            return str(values.get("run")), paths
    return "", []


def _current() -> list[Path]:
    """The current directory; none if someone has removed it."""
    with suppress(OSError):
        return [Path.cwd()]
    return []
