"""Finds run directories, where a path is one or a folder of several, such as that of a sweep; and their checkpoints."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scaleprog.files.plain_yaml import RECIPE


def runs_at(path: Path) -> list[Path]:
    """The path itself if it is a run directory, else the run directories in it, numbers in their names by size."""
    if os.path.lexists(path / RECIPE):
        return [path]
    found: list[Path] = []
    with suppress(OSError):  # there is no such folder, or it is not readable
        found = [entry for entry in path.iterdir() if os.path.lexists(entry / RECIPE)]
    return sorted(found, key=lambda run: _parts(run.name))


def _parts(name: str) -> list[str | int]:
    """Texts and numbers in turn."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]{1,18})", name))]


def short_names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of absolute paths that are all different, and say more than a seed."""
    parts = 2 if any(re.fullmatch("seed[0-9]+", run.name) for run in runs) else 1
    while len({run.parts[-parts:] for run in runs}) < len(set(runs)):
        parts += 1
    return ["/".join(run.parts[-parts:]) for run in runs]


def committed_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    try:
        names = [entry.name for entry in os.scandir(run / "checkpoints")]
    except OSError:
        return 0
    return max((int(name[5:]) for name in names if re.fullmatch("step-[0-9]{1,15}", name)), default=0)
