"""A run trained longer in place: allowed if the longer recipe would have trained exactly the same so far."""

import os
import time
from pathlib import Path

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.growth.begun import trained
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe, directories
from scaleprog.rundir.board import About, reintroduce
from scaleprog.rundir.checkpoint import run_of
from scaleprog.rundir.lease import held_idle
from scaleprog.rundir.reading import append_row, reason
from scaleprog.rundir.records import EVENTS, RESULTS
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import committed, read_manifest, rename_recipe, step_of
from scaleprog.sharding.optimizer import learning_rate
from scaleprog.training.fork import fork, same_so_far
from scaleprog.training.resume import state_of


def begin(recipe: Recipe, folder: Path, source: str | None = None, dry_run: bool = False) -> Recipe:
    """Prepares a run directory for a start: as a fork if there is a `source`, and longer if `recipe` asks for that.

    The recipe of a fork makes the same fork in another directory.

    Args:
        recipe: what shall be trained.
        folder: the run directory.
        source: RUN or RUN@STEP, see `fork`.
        dry_run: whether to write nothing.

    Returns:
        The recipe with which the run can start.

    Raises:
        ScaleprogError: as `fork` and `lengthen` do.
    """
    there = (folder / RECIPE).exists()
    if source is None and recipe.parent is None and there:
        recipe = recipe.model_copy(update={"parent": Recipe.of_run(folder).parent})  # a fork knows its parent
    elif source is None and recipe.parent is not None and not there:
        parent = recipe.parent
        if run_of(Path(parent.run)) != parent.id:
            raise CheckpointError(
                f"{parent.run}: not there, or not the run {parent.id[:8]} from which the recipe continues; say where "
                f"it is with --from RUN@{parent.step}"
            )
        source = f"{parent.run}@{parent.step}"
    if source is not None:
        recipe = fork(recipe, source, folder, dry_run)
    return lengthen(recipe, folder, dry_run)


def lengthen(recipe: Recipe, folder: Path, dry_run: bool = False) -> Recipe:
    """Makes the run in a directory longer, if `recipe` is the run's own with more epochs; does nothing otherwise.

    The results of the shorter run become `results-STEP.json`, and TensorBoard shows the longer recipe.

    Args:
        recipe: what shall be trained.
        folder: the run directory, which need not exist.
        dry_run: whether to write nothing.

    Returns:
        The recipe with which the run can start: `recipe`, but the run's own in a dry run.

    Raises:
        CheckpointError: the longer recipe would have trained something else so far, or the run is in use.
        ScaleprogError: the run directory cannot be written.
    """
    if not (folder / RECIPE).exists():
        return recipe
    before = Recipe.of_run(folder)
    shorter = recipe.train.model_copy(update={"epochs": before.train.epochs})
    if recipe.train.epochs <= shorter.epochs or before.differences(recipe.model_copy(update={"train": shorter})):
        return recipe  # a start says what else differs
    with held_idle(folder):
        kept = [path for path in committed(folder / "checkpoints") if _is_legible(path)]
        found = recipe.located(directories.to_train(folder))
        then, now = Plan.of(before.model_copy(update={"data": found.data})), Plan.of(found)
        if kept and (why := _difference(state_of(kept[-1], then), then, now)):
            raise CheckpointError(
                f"{folder} cannot train to {recipe.train.epochs:g} epochs in place of {before.train.epochs:g}: {why}. "
                f"{_way(folder, kept, then, now)}"
            )
        if dry_run:
            return before
        step = step_of(kept[-1]) if kept else 0
        try:
            reintroduce(folder, About.of(recipe), step)
            for path in kept:
                rename_recipe(path, recipe.model_dump(mode="json"))
            write_whole(folder / RECIPE, recipe.dump())
            if (folder / RESULTS).exists():
                os.rename(folder / RESULTS, folder / f"results-{step}.json")
            event = {"event": "lengthened", "generation": 0, "step": step}  # of no start
            event |= {"before": before.train.epochs, "epochs": recipe.train.epochs}
            append_row(folder / EVENTS, {"time": time.time(), **event})
        except OSError as error:
            raise ScaleprogError(f"{error.filename or folder}: cannot be written: {reason(error)}") from error
    return recipe


def _is_legible(checkpoint: Path) -> bool:
    """Whether the manifest can be read; a resume skips a checkpoint whose manifest is damaged."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def _difference(state: RunState, then: Plan, now: Plan) -> str:
    """What a run of `now` would have done otherwise up to `state` than one of `then`; empty if nothing."""
    mine, theirs = (trained(plan.schedule.phases(state.choices), state.step) for plan in (now, then))
    if state.decisions and now.schedule.budget != then.schedule.budget:
        return "its searches would have had another budget"
    if not same_so_far(state, then, now) or mine != theirs:
        return f"its stages depend on the length, and by step {state.step} they would have been others"
    for phase in reversed(theirs):
        for step in reversed(range(phase.start, phase.stop)):
            was, would = (
                learning_rate(
                    plan.recipe.optimizer,
                    phase.progress_of(step),
                    plan.schedule.steps,
                    plan.order.steps_per_epoch,
                    phase.progress_began,
                    plan.schedule.takeover(state.choices),
                )
                for plan in (then, now)
            )
            if was != would:
                return f"at step {step + 1} the learning rate was {was:.3g} and would have been {would:.3g}"
    return ""


def _way(folder: Path, kept: list[Path], then: Plan, now: Plan) -> str:
    """What the user can do instead of training longer in place."""
    for path in reversed(kept):
        if not _difference(state_of(path, then), then, now):
            return f"--from {folder}@{step_of(path)} trains on from a checkpoint up to which both are the same"
    if now.schedule.compute is not None or now.schedule.window is not None:
        return f"init.from={folder} begins a new run with its weights; this schedule cannot continue another one"
    return f"--from {folder} trains on in a new run, under the new schedule"
