"""`--sweep` of train and submit: a run for every combination of some keys' values."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from scaleprog.errors import CRASH_CODE, CheckpointError, InUse, Preempted, ScaleprogError
from scaleprog.files.display import say
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.recipe.recipe import KEY

if TYPE_CHECKING:
    from scaleprog.recipe import Recipe

OPTION = "--sweep"
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        OPTION,
        metavar="KEY=V1,V2 [KEY=A:B]...",
        help="Train a run for every combination of these values (A:B stands for the whole numbers from A to B - 1), "
        "each in a directory of its own under --run-dir, by default runs/RECIPE-sweep.",
    ),
]


Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, max=10**6, help="Runs of a sweep that train at the same time; default: 1 here, all under Slurm."
    ),
]


class SweepCommand(TyperCommand):
    """A command whose `--sweep` takes several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeated(args))


def repeated(words: Sequence[str]) -> list[str]:
    """Repeats `--sweep` before every `KEY=...` that follows its value, because an option of typer takes one value."""
    told: list[str] = []
    sweeping = False  # whether the words before this one are values of --sweep
    for i, word in enumerate(words):
        if word == "--":
            return [*told, *words[i:]]
        value = told[-1:] == [OPTION]
        if sweeping and not value and re.match(f"(?!-){KEY}=", word):
            told.append(OPTION)
        elif not value:
            sweeping = word == OPTION or word.startswith(f"{OPTION}=")
        told.append(word)
    return told


def check_no_sweep(jobs: int | None) -> None:
    """Raises ScaleprogError if `--jobs` is given without a sweep."""
    if jobs is not None:
        raise ScaleprogError(f"--jobs {jobs}: only a sweep has several runs; add --sweep, or leave --jobs out")


def sweep_runs(
    recipe: Path, overrides: Sequence[str], swept: Sequence[str], run_dir: Path | None, source: str | None
) -> tuple[Path, dict[Path, "Recipe"]]:
    """The folder of a sweep, and its runs. Raises ScaleprogError, also for a `source`: its runs are no forks."""
    from scaleprog.recipe import Recipe
    from scaleprog.recipe.sweep import members

    if source is not None:
        raise ScaleprogError(f"--from {source}: the runs of a sweep cannot be forks; fork one run at a time")
    folder = run_dir or Path("runs") / f"{recipe.stem}-sweep"
    if os.path.lexists(folder / RECIPE):
        raise CheckpointError(f"{folder} is the directory of one run; a sweep needs a folder: use another --run-dir")
    return folder, {folder / each.name: each.recipe for each in members(swept, overrides, partial(Recipe.load, recipe))}


def unfinished(runs: Mapping[Path, "Recipe"]) -> dict[Path, "Recipe"]:
    """The runs of a sweep that neither have finished nor are queued or in training; prints which are left out.

    Raises ScaleprogError: a run directory belongs to another recipe, or is damaged.
    """
    from scaleprog.launchers.slurm import finished
    from scaleprog.launchers.snapshot import check_free

    left: dict[Path, Recipe] = {}
    left_out: dict[str, list[str]] = {"finished": [], "queued or in training": []}
    for run, recipe in runs.items():
        if finished(recipe, run) is not None:
            left_out["finished"].append(run.name)
            continue
        try:
            check_free(recipe, run)
        except InUse:
            left_out["queued or in training"].append(run.name)
        else:
            left[run] = recipe
    for why, names in left_out.items():
        if names:
            say(f"{why}, so left out: {', '.join(names)}")
    return left


def train_sweep(
    runs: Mapping[Path, "Recipe"], nproc: str, jobs: int, train_one: Callable[["Recipe", Path], None]
) -> None:
    """Trains the runs of a sweep on this machine, `jobs` at a time, and prints their status.

    Raises:
        Preempted: it was asked to stop.
        typer.Exit: a run failed; the others have ended.
        ScaleprogError: a run cannot be trained; none has started.
    """
    from scaleprog.launchers.exits import FINISHED, STOPPED
    from scaleprog.launchers.local import threads_shared
    from scaleprog.launchers.several import statuses, table
    from scaleprog.launchers.snapshot import write_recipe
    from scaleprog.launchers.sweep import Task, slots, train_all
    from scaleprog.launchers.world import Count
    from scaleprog.planning.plan import plan_start
    from scaleprog.recipe import directories

    ranks = Count.parse(nproc, "--nproc")
    left = unfinished(runs)
    places = slots(min(jobs, max(1, len(left))), ranks)
    if ranks.fixed:
        for run, recipe in left.items():
            plan_start(recipe.located(directories.to_train(run)), ranks.most, ranks.most)  # before any process
    tasks = [Task(run, partial(train_one, recipe, run)) for run, recipe in left.items()]
    for run, recipe in left.items():
        if not (run / RECIPE).exists():
            write_recipe(recipe, run)  # so that `scaleprog status` knows those that have to wait
    with threads_shared(len(places) * ranks.most):
        ended = train_all(tasks, places)
    print(table(statuses(list(runs))[0]))
    failed = {run: end for run, end in ended.items() if end.code not in (FINISHED, STOPPED)}
    for run, end in failed.items():
        say(f"{run.name} failed: {end.why}")
    if stopped := sum(end.code == STOPPED for end in ended.values()) + len(left) - len(ended):
        raise Preempted(f"{stopped} of {len(runs)} runs are not finished")
    if failed:
        raise typer.Exit(CRASH_CODE)
