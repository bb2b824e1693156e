"""Chooses how many ranks a start gets if the user gave a range: as many as fit and the recipe can use.

`python -m scaleprog.launchers.world RUN MIN_NODES TASKS [SPARE]` prints the number of nodes on which the batch script
should start TASKS ranks each; SPARE of the job's nodes do not train. This module does not import torch, because every
start would have to wait for it.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError, Unavailable
from scaleprog.files.display import as_text, say
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.launchers.exits import exit_by
from scaleprog.recipe import Recipe
from scaleprog.recipe.numbers import MOST_RANKS
from scaleprog.recipe.worlds import Worlds
from scaleprog.rundir.slurm_queue import hosts


@dataclass(frozen=True)
class Count:
    """How many nodes or ranks each start of a run may have: from `least` to `most`."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str, option: str) -> "Count":
        """Parses the value of an option: N, or LEAST:MOST. `option` is its name, for the message of ScaleprogError."""
        found = re.fullmatch(r"0*([0-9]{1,12})(?::0*([0-9]{1,12}))?", text)
        if found is not None:
            least, most = int(found[1]), int(found[2] or found[1])
            if 1 <= least <= most and least <= MOST_RANKS:
                return cls(least, most)
        raise ScaleprogError(
            f"{option} {as_text(text, most=100)}: must be a number such as 4 or a range LEAST:MOST such as 2:8, with "
            f"1 <= LEAST <= MOST and LEAST <= {MOST_RANKS}"
        )

    def __str__(self) -> str:
        return str(self.most) if self.fixed else f"{self.least}:{self.most}"

    @property
    def fixed(self) -> bool:
        """Whether this is a single number, not a range."""
        return self.least == self.most


def worlds_of(run: Path) -> Worlds:
    """The worlds that can train the recipe in a run directory.

    Raises:
        Unavailable: the recipe is not (yet) there.
        CheckpointError: the recipe is damaged.
    """
    if not (run / RECIPE).exists():
        raise Unavailable(f"{run / RECIPE}: missing, or not yet visible on this node")
    try:
        return Worlds.of(Recipe.of_run(run))
    except RecipeError as error:
        raise CheckpointError(f"{run / RECIPE}: damaged: {error}; submit the run again") from error


def usable(count: Count, worlds: Worlds, each: int = 1) -> list[int]:
    """The numbers in the range `count` that can train, ascending; `count` counts nodes with `each` ranks."""
    # more ranks than lanes can never train, and the range may end at any number
    most = min(count.most, worlds.lanes // each)
    return [number for number in range(count.least, most + 1) if not worlds.obstacle(number * each, each)]


def largest(option: str, count: Count, worlds: Worlds, each: int = 1) -> int:
    """The largest number in a range that can train.

    Args:
        option: the name of the range in error messages.
        count: the range.
        worlds: the numbers of ranks that can train.
        each: ranks per unit of `count`: 1 if it counts ranks, the ranks per node if it counts nodes.

    Raises:
        ScaleprogError: no number in the range can train.
    """
    if not (numbers := usable(count, worlds, each)):
        divisors = ", ".join(str(number) for number in range(1, worlds.lanes + 1) if worlds.lanes % number == 0)
        nodes = f" x {each} ranks" if each > 1 else ""
        multiple = f", and be a multiple of sharding.shard, {worlds.shard}" if (worlds.shard or 1) > 1 else ""
        raise ScaleprogError(
            f"{option} {count}{nodes}: cannot train; the number of ranks must divide "
            f"data.lanes, {worlds.lanes} ({divisors}){multiple}"
        )
    return numbers[-1]


def nodes_of_job() -> int:
    """How many nodes this job has, or trains on, according to the batch script. Raises ScaleprogError outside a job."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if not re.fullmatch("[0-9]{1,9}", nodes):
        raise ScaleprogError(f"SLURM_JOB_NUM_NODES is {as_text(nodes, most=60)!r}: this is not a Slurm job")
    return int(nodes)


def nodes_to_use(run: Path, there: Sequence[str], least: int, most: int, each: int) -> int:
    """How many of a job's nodes train; these are the first ones. If nodes stay idle, prints which ones and why.

    Args:
        run: the run directory.
        there: the names of the nodes.
        least: the smallest number of nodes that may train.
        most: the largest; the others are spare.
        each: ranks per node.

    Raises:
        ScaleprogError: there are fewer nodes than `least`, or no number of them can train.
    """
    most = min(most, len(there))
    if most < least:
        raise ScaleprogError(f"the job has {most} nodes, fewer than MIN_NODES, {least}; request more from Slurm")
    worlds = worlds_of(run)
    used = largest("nodes", Count(least, most), worlds, each)
    if used < len(there):
        why = worlds.obstacle(most * each, each) if used < most else "spare"
        idle = as_text(", ".join(there[used:]))
        say(f"{used} of {len(there)} nodes train, idle: {idle}; {why}")
    return used


def _main(folder: str, fewest: str, tasks: str, spare: str = "0") -> int:
    each = Count.parse(tasks, "TASKS").least
    least = Count.parse(fewest, "MIN_NODES").least
    if not re.fullmatch("[0-9]{1,6}", spare):
        raise ScaleprogError(f"SPARE_NODES {as_text(spare, most=60)}: must be a number")
    most = nodes_of_job() - int(spare)
    return nodes_to_use(Path(folder), hosts(os.environ.get("SLURM_JOB_NODELIST", "")), least, most, each)


if __name__ == "__main__":
    try:
        print(_main(*sys.argv[1:]))
    except Exception as error:
        end = exit_by(error)
        say(f"cannot choose the number of nodes: {end.text}")
        sys.exit(end.code)
