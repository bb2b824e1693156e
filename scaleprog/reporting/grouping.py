"""Runs to compare: read, named, and grouped by recipe."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from scaleprog.errors import CheckpointError
from scaleprog.reporting.figures import Curve
from scaleprog.reporting.history import RunRecord, read_run
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.folders import runs_at, short_names
from scaleprog.rundir.records import EVENTS, METRICS


@dataclass(frozen=True)
class Group:
    """Runs whose recipes differ only in the seed, which is another in each."""

    name: str
    runs: Sequence[RunRecord]

    def values(self, key: str) -> list[float]:
        """The values of one result in all finished runs."""
        return [run.results[key] for run in self.runs if run.finished]

    def mean(self, key: str) -> float:
        """The mean of `values`."""
        return mean(self.values(key))

    @property
    def timed(self) -> bool:
        """Whether any run has finished, and all times are positive, so that they can be compared."""
        return all(values and min(values) > 0 for values in map(self.values, ("train_seconds", "wall_seconds")))


def read_groups(runs: Sequence[Path]) -> tuple[list[RunRecord], list[Group]]:
    """Reads run directories, and those in folders of several, and groups the runs by recipe.

    Runs in a folder of several that have not begun, such as those of a sweep that wait, are left out.

    Raises CheckpointError: no directory is given, one of them holds no run, or no run has begun.
    """
    named = [Path(path) for path in runs]
    found = [run for path in named for run in runs_at(path) or [path]]
    folders = list(dict.fromkeys(run.resolve() for run in found if run in named or has_begun(run)))
    if not found:
        raise CheckpointError("no run directory given; name at least one")
    if not folders:
        raise CheckpointError(f"{named[0]}: none of its {len(found)} runs has begun")
    told = [read_run(folder, name) for folder, name in zip(folders, short_names(folders))]
    return told, _groups(told)


def has_begun(run: Path) -> bool:
    """Whether anything has been recorded in a run directory."""
    return any((run / name).exists() for name in (METRICS, EVENTS))


def curve(name: str, run: RunRecord) -> Curve:
    """A run's accuracy over its training time; `name` stands for its recipe."""
    begins = tuple(after.seconds for before, after in pairwise(run.segments) if after.stage != before.stage)
    return _curve(name, run, "train_seconds", begins)


def cpu_curve(name: str, run: RunRecord) -> Curve:
    """A run's accuracy over the CPU time of its training, without the beginnings of its stages."""
    return _curve(name, run, "train_cpu_seconds", ())


def _curve(name: str, run: RunRecord, spent: str, begins: tuple[float, ...]) -> Curve:
    timed = [row for row in run.evaluations if spent in row]
    seconds = tuple(row[spent] for row in timed)
    top1 = tuple(Accuracies(row).best for row in timed)
    return Curve(name, seconds, top1, begins, run.finished)


def _groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups runs by recipe; a second run with a seed begins a second group.

    A group's name is its first run's, without the seed unless another group or its first run has that name.
    """
    twins: dict[tuple[str, int], list[RunRecord]] = {}
    seeds = Counter[tuple[str, int]]()
    for run in runs:
        own = run.twins, run.recipe["seed"]
        twins.setdefault((run.twins, seeds[own]), []).append(run)
        seeds[own] += 1
    groups: dict[str, Group] = {}
    full_names = {members[0].name for members in twins.values()}
    for members in twins.values():
        short = re.sub(r"[-_/]seed\d+$", "", members[0].name)
        name = members[0].name if short in groups.keys() | full_names else short
        groups[name] = Group(name, members)
    return list(groups.values())
