"""Looks into runs with other tools: profile · track."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleprog.cli.arguments import RunPath
from scaleprog.errors import RecipeError, ScaleprogError
from scaleprog.files.display import as_text, counted, say

if TYPE_CHECKING:
    from scaleprog.rundir.profiles import Request

ASK_SECONDS = 10.0  # between two questions whether the run still runs: Slurm's controller is not to be asked often
LOOK_SECONDS = 0.5


def profile(
    run: RunPath,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps to profile.")] = 3,
    ranks: Annotated[str, typer.Option(metavar="R[,R]...", help="Ranks that write a trace, from 0.")] = "0",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also keep the history of each rank's device memory (CUDA).")
    ] = False,
) -> None:
    """Profiles steps of a running run, from the next agreed one on, and says where the traces are."""
    from scaleprog.rundir import profiles

    chosen = _ranks(ranks)
    _check_running(run, "a profile is of a run that trains; to profile steps of the next start, set train.profile")
    _check_fits(run, chosen, memory)
    request = profiles.ask(run, steps, chosen, memory)
    say(f"waiting for {counted(steps, 'step')} of {run}; Ctrl-C withdraws the request if no step has begun")
    try:
        found = _awaited(run, request)
    finally:
        profiles.withdraw(run, request)
    for path in found.values():
        print(as_text(path))
    say("open the traces at https://ui.perfetto.dev or in chrome://tracing")
    if memory:
        say("https://pytorch.org/memory_viz shows the memory_rank_*.pickle beside them")


def _awaited(run: Path, request: "Request") -> dict[int, Path]:
    """The traces of all ranks, once they are there.

    Raises ScaleprogError if that start of the run ends before, or could not take the request.
    """
    from scaleprog.rundir import profiles
    from scaleprog.rundir.lease import read_owner

    asked, profiled, missed = time.monotonic(), None, 0
    while True:
        owner, found = read_owner(run), profiles.answer(run, request)
        if found is not None and len(found) == len(request["ranks"]):
            return found
        missed = 0 if found is not None or profiles.waits(run, request) else missed + 1
        if missed == 2:  # once may be while the run takes it
            raise ScaleprogError(f"{run}: the run could not take the request: see its log")
        if found is not None and owner is not None:
            profiled = profiled or owner.generation
            if profiled != owner.generation:
                raise ScaleprogError(f"{run} has started again before its profile was written; ask again")
        if time.monotonic() - asked > ASK_SECONDS:
            _check_running(run, "it ended before its profile was written")
            asked = time.monotonic()
        time.sleep(LOOK_SECONDS)


def _check_running(run: Path, advice: str) -> None:
    """Raises ScaleprogError unless the run trains now."""
    from scaleprog.launchers.status import standing
    from scaleprog.recipe import Recipe

    Recipe.of_run(run)  # refuses what is no run directory
    state, detail, _ = standing(run)
    if state != "running":
        raise ScaleprogError(f"{run} is {state}{f' ({detail})' if detail else ''}, not running: {advice}")


def _check_fits(run: Path, ranks: list[int], memory: bool) -> None:
    """Raises ScaleprogError if the run's latest start has no such ranks, or no device memory to follow."""
    latest = _latest_start(run)
    world, device = latest.get("world"), latest.get("device", "")
    if world is not None and (beyond := [rank for rank in ranks if rank >= world]):
        raise ScaleprogError(f"--ranks {beyond[0]}: {run} has the ranks 0 to {world - 1}")
    if memory and device.startswith("cpu"):
        raise ScaleprogError(
            f"--memory: {run} trains on the CPU, and only CUDA's allocator keeps a history; leave out --memory"
        )


def _latest_start(run: Path) -> Mapping[str, Any]:
    """The event of a run's latest start; empty if it has none."""
    from scaleprog.rundir.reading import read
    from scaleprog.rundir.records import EVENT, EVENTS

    starts = [event for event in read(run / EVENTS, EVENT).rows if event["event"] == "start"]
    return starts[-1] if starts else {}


def _ranks(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) <= 5 and int(part) < 2**16 for part in parts):
        raise ScaleprogError(f"--ranks {text[:100]!r} is not a list of ranks, such as 0,7")
    return sorted(set(map(int, parts)))


def track(
    run: RunPath,
    trackers: Annotated[
        list[str] | None, typer.Argument(metavar="TRACKER", help="mlflow, wandb; default: those of the recipe.")
    ] = None,
) -> None:
    """Sends what a tracker does not have yet of a run, running or ended, for nodes that cannot reach the tracker."""
    from scaleprog.recipe import Recipe
    from scaleprog.recipe.extras import check_trackers
    from scaleprog.rundir.sending import send_now
    from scaleprog.rundir.trackers import TRACKERS

    recipe, latest = Recipe.of_run(run), _latest_start(run)  # the recipe is that of the first start
    names = list(dict.fromkeys(trackers or latest.get("tracking", recipe.tracking)))
    if not names:
        raise RecipeError(f"{run}: its recipe names no tracker; name one: {', '.join(TRACKERS)}")
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"{name[:100]!r} is not a tracker; scaleprog knows {', '.join(TRACKERS)}")
    check_trackers(names)
    for name in names:
        step = send_now(run, name, latest.get("log_every", recipe.train.log_every))
        print(f"{as_text(run)}: {name} has everything up to step {max(step, 0)}")
