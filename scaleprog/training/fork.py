"""Forks: a new run that continues another one from a kept checkpoint, under a recipe that may differ."""

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.files.atomic import new_folder
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.growth.begun import networks, to_settings, trained
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import run_of
from scaleprog.rundir.forked import write_fork
from scaleprog.rundir.reading import reason
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import Manifest, committed, read_manifest, step_of
from scaleprog.training.resume import check_data, misplaced, state_of

KEPT = ("name", "classes", "channels", "resolution", "patch", "width", "depth", "heads")
"""The keys of `model` that say which tensors there are."""
PLACES = ("path", "manifest", "store", "memory", "token_labels")
"""The keys of `data` that say where the samples are."""


def parse_source(text: str) -> tuple[Path, int | None]:
    """The run directory and the step in RUN or RUN@STEP; the step is None for the newest checkpoint."""
    found = re.fullmatch(r"(.+)@([0-9]{1,15})", text)
    return (Path(text), None) if found is None or Path(text).is_dir() else (Path(found[1]), int(found[2]))


def fork(recipe: Recipe, source: str, folder: Path, dry_run: bool = False) -> Recipe:
    """Makes `folder` the run directory of a fork, unless it already is: a run that has stopped at the parent's step.

    Args:
        recipe: what the fork trains; a parent that it names is replaced.
        source: RUN or RUN@STEP.
        folder: the run directory of the fork.
        dry_run: whether to write nothing.

    Returns:
        `recipe` with the parent.

    Raises:
        RecipeError: the parent's state cannot continue with the recipe.
        CheckpointError: there is no such checkpoint, it is damaged, or `folder` is something else.
        DataError: the shards are missing or damaged.
        ScaleprogError: `folder` cannot be written.
    """
    run, step = parse_source(source)
    run, folder = run.absolute(), folder.resolve()
    if (folder / RECIPE).exists():
        return _again(recipe, run, step, folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: neither empty nor a run directory; use another --run-dir")
    failed = None
    while True:
        then = Recipe.of_run(run)
        checkpoint = _checkpoint(run, step)
        try:
            manifest = read_manifest(checkpoint)
            continued = _continued(recipe, then, run, checkpoint, manifest)
            if not dry_run:
                with new_folder(folder, may_replace=lambda _: False) as new:
                    write_fork(new, run, checkpoint, manifest, continued, uuid.uuid4().hex)
            return continued
        except OSError as error:
            where = error.filename or folder
            raise ScaleprogError(f"{where}: cannot write a run directory: {reason(error)}") from error
        except CheckpointError as error:  # if the run trains, it may have replaced or deleted the checkpoint
            if checkpoint == failed:
                raise CheckpointError(f"{error}\nkept checkpoints of {run}: {_kept(run)}") from None
            failed = checkpoint


def _again(recipe: Recipe, run: Path, step: int | None, folder: Path) -> Recipe:
    """`recipe` with the parent of the run in `folder`. Raises CheckpointError if that does not continue `run`."""
    parent = Recipe.of_run(folder).parent
    if parent is None:
        raise CheckpointError(f"{folder} is a run that continues no other; use another --run-dir, or leave out --from")
    known = run_of(run)
    if known not in (None, parent.id) or (known is None and str(run) != parent.run) or step not in (None, parent.step):
        asked = f"{run}" + ("" if step is None else f"@{step}")
        raise CheckpointError(
            f"{folder} continues {parent.run}@{parent.step} (run {parent.id[:8]}), not {asked}"
            f"{'' if known is None else f' (run {known[:8]})'}; use another --run-dir"
        )
    return recipe.model_copy(update={"parent": parent})


def _checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest one. Raises CheckpointError if it is not kept."""
    kept = committed(run / "checkpoints")
    if not kept:
        raise CheckpointError(f"{run}: no checkpoint yet; has the run trained?")
    found = [path for path in kept if step in (None, step_of(path))]
    if not found:
        raise CheckpointError(f"{run}: the checkpoint of step {step} is not kept; kept are {_kept(run)}")
    return found[-1]


def _kept(run: Path) -> str:
    """The steps of the checkpoints that a run keeps, in words."""
    best, told = 0, []
    for path in reversed(committed(run / "checkpoints")):
        try:
            manifest = read_manifest(path)
        except ScaleprogError:
            marks = ["unreadable"]
        else:
            best = best or manifest.state.get("best_step", 0)
            known = {"permanent": manifest.permanent, "best": manifest.step == best}
            marks = [mark for mark, holds in known.items() if holds]
        told.append(f"{step_of(path)}" + (f" ({', '.join(marks)})" if marks else ""))
    return ", ".join(reversed(told)) or "none"


# ---- what may differ


def _continued(recipe: Recipe, then: Recipe, run: Path, checkpoint: Path, manifest: Manifest) -> Recipe:
    """`recipe` with the parent. Raises RecipeError or CheckpointError if it cannot continue from the checkpoint.

    `then`: the parent's recipe.
    """
    recipe = recipe.model_copy(update={"parent": None})
    if unlike := list(_unlike(recipe, then)):
        listing = "\n".join(f"  {line}" for line in unlike)
        raise RecipeError(
            f"--from {run}: a fork has the same network and as many EMAs:\n{listing}\nkeep them, or begin a new run "
            f"with init.from={run}, which takes only weights"
        )
    now, before = Plan.of(recipe), Plan.of(_found_again(then, recipe))
    state = state_of(checkpoint, before)
    before = before.resumed(state.last_search)
    if _searches_alike(now, before):
        now = now.resumed(state.last_search)
    try:
        check_data(checkpoint, state, now.data)
    except CheckpointError as error:
        raise RecipeError(f"{error}; `scaleprog finetune` trains the weights on other data") from None
    phases = before.schedule.phases(state.choices)
    if not before.schedule.recycle and (search := phases[state.phase]).searched and state.step > search.start:
        raise RecipeError(
            f"--from {run}@{state.step}: with growth.recycle: false, the network after this search grows from the "
            f"checkpoint of step {search.start}, which a fork would not have; take that step, or one after the search; "
            f"kept are {_kept(run)}"
        )
    position = phases[state.phase].position_of(state.step)
    known = run_of(run)
    if known not in (None, manifest.run):
        raise CheckpointError(f"{checkpoint}: a checkpoint of another run; move it to its own run directory")
    parent: dict[str, Any] = {"run": str(run), "id": manifest.run, "step": state.step, "position": position}
    if (begun := then.parent) is not None and begun.phases:  # a fork whose own parent had another schedule
        as_then = Plan.of(recipe.model_copy(update={"parent": begun}))
        if _searches_alike(as_then, before):
            as_then = as_then.resumed(state.last_search)
        if same_so_far(state, before, as_then):
            parent |= begun.model_dump(mode="json", include={"began", "phases"})
            parent["position"] = begun.position - begun.step + state.step  # counted as in these phases
    if "phases" not in parent and not same_so_far(state, before, now):
        parent |= _rescheduled(run, state, before, now)
    values = recipe.model_dump(mode="json") | {"parent": parent}
    continued = Plan.of(Recipe.of(values, f"--from {run}@{state.step}"))
    if why := next(misplaced(state, continued), None):
        raise RecipeError(f"--from {run}@{state.step}: the recipe cannot continue from there: {why}")
    end = continued.schedule.phases(state.choices)[-1]
    if not end.searched and end.stop <= state.step:
        raise RecipeError(
            f"--from {run}@{state.step}: nothing is left to train: the recipe has {continued.schedule.steps} steps, "
            f"and the parent is at step {parent['position']} of them; raise train.epochs"
        )
    return continued.recipe


def _unlike(recipe: Recipe, then: Recipe) -> Iterator[str]:
    """What differs between two recipes so that a state of one does not fit the other."""
    for key in KEPT:
        here, there = getattr(recipe.model, key), getattr(then.model, key)
        if here != there:
            yield f"model.{key}: {here} here, {there} there"
    here, there = list(recipe.ema.momenta), list(then.ema.momenta)
    if len(here) != len(there):
        yield f"ema.momenta: {here} here, {there} there"


def _found_again(then: Recipe, recipe: Recipe) -> Recipe:
    """The parent's recipe with the samples where `recipe` has them: they may have moved since."""
    places = {key: getattr(recipe.data, key) for key in PLACES}
    return then.model_copy(update={"data": then.data.model_copy(update=places)})


def _searches_alike(now: Plan, then: Plan) -> bool:
    """Whether the recipes of two plans have the same settings for searches, but perhaps other budgets."""
    return len({plan.recipe.search.model_copy(update={"budget": None}) for plan in (now, then)}) == 1


def same_so_far(state: RunState, then: Plan, now: Plan) -> bool:
    """Whether a run of `now` would have trained the same networks at the same steps as one of `then`, up to `state`."""
    if (then.recipe.train.batch, then.order.steps_per_epoch) != (now.recipe.train.batch, now.order.steps_per_epoch):
        return False
    if next(misplaced(state, now), None) is not None:
        return False
    mine, theirs = (plan.schedule.phases(state.choices) for plan in (now, then))
    if state.phase >= len(mine):
        return False
    here, there = mine[state.phase], theirs[state.phase]
    if there.kind == "supernet":
        layers = [[p.schedule.active(at, s) for s in there.candidates] for p, at in ((now, here), (then, there))]
        if here.candidates != there.candidates or layers[0] != layers[1]:  # of another growth.operator
            return False
    if there.searched:
        if here.stop != there.stop or not _searches_alike(now, then):
            return False
        if state.step > there.start and now.schedule.recycle != then.schedule.recycle:
            return False
    return networks(trained(mine, state.step)) == networks(trained(theirs, state.step))


def _rescheduled(run: Path, state: RunState, then: Plan, now: Plan) -> dict[str, Any]:
    """What a recipe also says of a parent whose schedule was another one: its phases, and where the fork continues.

    The fork takes its place in the new schedule at the same epoch.
    """
    phases = trained(then.schedule.phases(state.choices), state.step)
    last = phases[-1]
    if last.kind == "supernet":
        raise RecipeError(
            f"--from {run}@{state.step}: the recipe would have trained other networks up to this step, where the run "
            "trains a supernet of several; take the checkpoint of a step with one network, or change nothing that "
            f"moves the stages or the search; kept are {_kept(run)}"
        )
    if now.schedule.budget and last.network != now.schedule.full and then.recipe.train.batch != now.recipe.train.batch:
        raise RecipeError(
            f"train.batch: {now.recipe.train.batch} here, {then.recipe.train.batch} in {run}, but a budget counts "
            "steps of one size; keep it, or use search.method=published or another growth.schedule"
        )
    scale = now.order.steps_per_epoch / then.order.steps_per_epoch
    return {
        "position": round(last.position_of(state.step) * scale),
        "began": round(last.began * scale),
        "phases": [phase.model_dump(mode="json") for phase in to_settings(phases)],
    }
