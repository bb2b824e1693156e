"""Checks that a checkpoint belongs to a run, and that a run of the recipe can reach the checkpoint's state.

Anyone may have written the checkpoint, so these checks trust only the recipe and what follows from it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scaleprog.data.reader import DataSet
from scaleprog.errors import CheckpointError, RecipeError
from scaleprog.models import resolve_family
from scaleprog.models.cost import parameters
from scaleprog.models.elastic import ElasticModel
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import Owner
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import read_manifest
from scaleprog.training.metrics import names
from scaleprog.version import ARITHMETIC

HEADERS = 2**26  # most bytes of a checkpoint beyond its tensors
LONGEST_RECIPE = 2**20


def owner_of(recipe: Recipe) -> Owner:
    """The owner of the checkpoints of a run of `recipe`."""
    family, full, _ = resolve_family(recipe.model)
    tensors = 3 + len(recipe.ema.momenta)  # the weights, two moments, and the EMAs
    largest = 4 * tensors * parameters(family, recipe.model, full.depth)
    return Owner(recipe.model_dump(mode="json"), partial(_differences, recipe), 2 * largest + HEADERS)


def _differences(recipe: Recipe, kept: Mapping[str, Any]) -> list[str]:
    """Why `recipe` cannot resume a run of the recipe `kept` in a checkpoint, in a few short lines; empty if it can."""
    if len(json.dumps(kept)) > LONGEST_RECIPE:
        return ["its recipe is too large"]
    try:
        lines = recipe.differences(Recipe.of(kept, "its recipe"))
    except RecipeError as error:
        lines = str(error).splitlines()
    return ["".join(c if c.isprintable() else "?" for c in line[:200]) for line in lines[:8]]


# ---- does the run continue as it began?


@dataclass(frozen=True)
class Change:
    """A change of what a recipe computes.

    Args:
        version: the first version of the arithmetic with this change.
        what: what has changed.
        last: the last commit without it.
        affects: whether it changes what a recipe computes.
    """

    version: int
    what: str
    last: str
    affects: Callable[[Recipe], bool]


CHANGES = (
    Change(
        2,
        "Mixup and CutMix pair image j of a lane with j + n/2, and each group of lanes draws its own",
        "d1df4c6",
        lambda recipe: recipe.augment.mixes,
    ),
    Change(
        2,
        "crops of JPEGs that are scaled down while decoded keep the fractions of their boxes",
        "d1df4c6",
        lambda recipe: recipe.augment.crop != "padded" or not recipe.augment.padding,
    ),
    Change(
        2,
        "a DeiT that starts over after a probe draws its class token as DeiT does",
        "d1df4c6",
        lambda recipe: recipe.model.name.startswith("deit") and recipe.search.method == "budget",
    ),
    Change(
        2,
        "under engine replicated, precision bf16 casts all parameters, as in every engine; it was what autocast is now",
        "d1df4c6",
        lambda recipe: (recipe.sharding.engine, recipe.sharding.precision) == ("replicated", "bf16"),
    ),
    Change(
        3,
        "crops, flips, color jitter, RandAugment, and erasing draw other numbers, and OpenCV applies them",
        "1e66f85",
        lambda recipe: True,
    ),
    Change(
        4,
        "RandAugment's rotations and shears interpolate in another way",
        "f2bf154",
        lambda recipe: recipe.augment.randaugment is not None and recipe.augment.device == "cpu",
    ),
)


def check_arithmetic(checkpoint: Path, state: RunState, recipe: Recipe) -> None:
    """Raises CheckpointError if this scaleprog would not compute what the run has computed so far."""
    changes = [c for c in CHANGES if c.version > state.arithmetic and c.affects(recipe)]
    if changes and recipe.train.accept_arithmetic != ARITHMETIC:
        raise CheckpointError(
            f"{checkpoint}: this run began with arithmetic {state.arithmetic}, and this scaleprog has {ARITHMETIC}: "
            f"{'; '.join(change.what for change in changes)}. Resume it with commit {changes[0].last}, or accept the "
            f"change with train.accept_arithmetic={ARITHMETIC}"
        )
    if state.arithmetic > ARITHMETIC:
        raise CheckpointError(
            f"{checkpoint}: a newer scaleprog wrote it, with arithmetic {state.arithmetic}; this one has {ARITHMETIC}; "
            "resume it with the newer one"
        )


def check_data(checkpoint: Path, state: RunState, data: DataSet) -> None:
    """Raises CheckpointError if the data are not those that the run began with."""
    now = data.identity()
    names = {**state.data, **now} if state.data else {}
    if unlike := [name for name in names if now.get(name) != state.data.get(name)]:
        told = "; ".join(f"{name}: {state.data.get(name, 'none')} then, {now.get(name, 'none')} now" for name in unlike)
        raise CheckpointError(
            f"{checkpoint}: the run began with other data than there are in {data.manifest.root}: {told}. Paths may "
            "change, the contents may not; point data.path and data.token_labels at the old data, or start a new run"
        )


# ---- does a state belong to a plan?


def state_of(checkpoint: Path, plan: Plan) -> RunState:
    """The state that a checkpoint holds. Raises CheckpointError if no run of `plan` can reach it."""
    state = read_run_state(checkpoint, plan.recipe, plan.family, plan.schedule.full.depth)
    if why := next(misplaced(state, plan), None):
        raise CheckpointError(f"{checkpoint}: state: it does not fit this recipe: {why}")
    return state


def read_run_state(checkpoint: Path, recipe: Recipe, family: type[ElasticModel], depth: int) -> RunState:
    """The state that a checkpoint holds, checked as far as possible without a schedule. Raises CheckpointError.

    `depth`: layers of the complete model.
    """
    manifest = read_manifest(checkpoint)
    try:
        state = RunState.from_json(manifest.state)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    if why := next(_impossible(state, manifest.step, recipe, family, depth), None):
        raise CheckpointError(f"{checkpoint}: state: it does not fit this recipe: {why}")
    return state


def _impossible(state: RunState, step: int, recipe: Recipe, family: type[ElasticModel], depth: int) -> Iterator[str]:
    """Yields what no run of the recipe can have in its state, whatever the schedule."""
    if state.step != step:
        yield f"it is at step {state.step}, but its checkpoint is of step {step}"
    if state.phase < 0:
        yield f"its phase is {state.phase}"
    most = (state.phase + 1) * (2 if state.weights else 1)  # given weights may have to grow at once
    if not 1 <= state.growths <= most:
        yield f"it built {state.growths} networks by phase {state.phase}"
    layers = tuple(map(len, state.gated))
    if not (1 <= sum(layers) <= depth and layers == tuple(family.split(sum(layers)))):
        yield f"its layer groups have {layers} layers"
    known = names(len(recipe.ema.momenta))
    needed = {name for name in known if name.startswith("top1")}  # earlier versions had no other metric
    if state.accuracies and not needed <= state.accuracies.keys() <= known:
        yield f"its accuracies are {sorted(state.accuracies)}"
    if state.skipped != sorted(set(state.skipped)) or max(state.skipped, default=0) > state.step:
        yield f"it skipped the updates of steps {state.skipped[:8]}"
    if state.damaged != sorted(set(state.damaged)):
        yield f"its damaged samples are {state.damaged[:8]}"
    if state.best_step > state.step:
        yield f"its best step is {state.best_step}, after step {state.step}"


def misplaced(state: RunState, plan: Plan) -> Iterator[str]:
    """Yields what no run of `plan` can have in its state.

    Later checks rely on earlier ones, so only the first item counts.
    """
    schedule = plan.resumed(state.last_search).schedule
    settled = schedule.settled
    choices = state.choices[: len(settled)]
    if [choice.subnet for choice in choices] != [choice.subnet for choice in settled]:
        yield "its choices are not those of the run that it continues"
    for number, decision in enumerate(state.decisions[len(settled) :], len(settled)):
        search, until = schedule.phases(choices)[-1], decision.complete_from
        position = schedule.position_after(search)
        if not search.searched or state.step < search.stop:
            yield f"it made {number + 1} choices by step {state.step}"
        if (decision.stage, set(decision.candidates)) != (search.stage, set(search.candidates)):
            yield f"it searched {', '.join(map(str, decision.candidates))} for stage {decision.stage}"
        if decision.chosen not in decision.candidates:
            yield f"it chose {decision.chosen}, which is not a candidate"
        if (until is None) != (schedule.budget is None) or not (until is None or position <= until <= schedule.steps):
            yield f"a choice has the complete model take over at step {until}"
        choices.append(decision.choice)
    phases = schedule.phases(choices)
    if state.phase >= len(phases):
        yield f"it is in phase {state.phase}, but there are {len(phases)} phases"
    begun = schedule.begun[-1].stop if schedule.begun else 0  # a fork may cut its parent's last search short
    own = {(p.start, p.stop) for p in phases if p.searched and p.start <= state.step}
    if state.last_search not in {(0, 0), *own} and state.last_search[0] >= begun:
        yield "its last search lasts from step {} until step {}".format(*state.last_search)
    phase, measured = phases[state.phase], state.measured
    if not phase.start <= state.step <= phase.stop:
        yield f"step {state.step} is outside phase {state.phase}"
    if sum(map(len, state.gated)) != phase.network.depth:
        yield f"{sum(map(len, state.gated))} layers in phase {state.phase}, which has {phase.network.depth}"
    times = plan.recipe.search.measurements if phase.searched else 0
    if len(measured) > times or any(losses.keys() != set(phase.candidates) for losses in measured):
        yield f"its measurements do not fit phase {state.phase}"
    if state.errors.keys() != (set(phase.candidates) if measured else set()):
        yield f"its errors of measurements do not fit phase {state.phase}"
    if not state.step_seconds.keys() <= set(phase.candidates):
        yield f"it has step times of Subnets outside phase {state.phase}"
    undecided = phases[-1].searched and phases[-1].stop <= state.step
    possible = ["measurement", "choice"] if phase.searched else ["evaluation"]
    if state.pending != [task for task in possible if task in state.pending]:
        yield f"{', '.join(state.pending)[:100]!r} cannot be pending in phase {state.phase}"
    if undecided != ("choice" in state.pending) or (undecided and not measured and "measurement" not in state.pending):
        yield f"its search of stage {phases[-1].stage} cannot be in this state"
    if state.step == phases[-1].stop and not undecided and not state.pending and not state.accuracies:
        yield "it reached its end without an evaluation"
