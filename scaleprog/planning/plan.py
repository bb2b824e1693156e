"""Turns a recipe, its model, and its shards into a plan."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from scaleprog.data.manifest import NAME as MANIFEST
from scaleprog.data.manifest import Manifest
from scaleprog.data.order import Order
from scaleprog.data.reader import DataSet
from scaleprog.data.store import Store
from scaleprog.data.token_labels import LabelShards
from scaleprog.errors import DataError, RecipeError
from scaleprog.files.location import local_path
from scaleprog.growth.begun import begun_by
from scaleprog.growth.phase import Regularization, Window
from scaleprog.growth.policy import Budget, EqualStages
from scaleprog.growth.schedule import Compute, Schedule, ScheduleKind, rungs
from scaleprog.growth.space import Subnet
from scaleprog.models import resolve_family
from scaleprog.models.cost import gmacs, parameters, units
from scaleprog.models.elastic import ElasticModel
from scaleprog.planning.budget import budgeted
from scaleprog.planning.checks import check_decoded, check_groups, check_growth, check_lanes_of, check_model
from scaleprog.planning.cost_model import Prediction, check_offload, engines, predict, state_memory
from scaleprog.planning.devices import Device
from scaleprog.recipe import Recipe
from scaleprog.recipe.extras import check_extras
from scaleprog.recipe.worlds import Worlds

SCALE = 1000
"""Positions per epoch when there are no shards to count."""
FORWARDS_PER_STEP = 3
"""The cost of a training step in forward passes: a backward counts as two, the optimizer as none."""
MOST_STEPS = 10**9
"""A recipe of a longer run is a mistake."""
SEARCH_PARTS, SCORING_PARTS = 80, 25
"""Unless the recipe says otherwise, a search takes 1/80 of the run's epochs, and scores on 1/25 of the images."""


@dataclass(frozen=True)
class Plan:
    """A recipe with its numbers filled in. A step is an optimizer step on one global batch."""

    recipe: Recipe
    family: type[ElasticModel]
    data: DataSet
    order: Order
    schedule: Schedule

    @classmethod
    def of(cls, recipe: Recipe) -> "Plan":
        """Checks a recipe against its model and its shards. Raises RecipeError or DataError."""
        whole = whole_manifest(recipe)
        manifest = whole.first("train", recipe.data.shards)
        for split in ("train", "val"):
            manifest.verify_sizes(split)
            manifest.verify_counts(split)
        if not manifest.samples("val"):
            raise DataError(f"{manifest.root}: the split 'val' has no samples to evaluate with; add shards to it")
        if len(manifest.classes) != recipe.model.classes:
            raise RecipeError(
                f"model.classes: {recipe.model.classes}, but {manifest.root} has {len(manifest.classes)} classes"
            )
        order = _order(recipe, manifest)
        family, schedule = outline(recipe, order.steps_per_epoch)
        folder = recipe.data.token_labels
        labels = LabelShards.of(folder, manifest, whole) if folder else None
        data = DataSet(manifest, recipe.data, recipe.augment, recipe.model.channels, labels)
        return cls(recipe, family, data, order, schedule)

    @property
    def manifest(self) -> Manifest:
        """The shards."""
        return self.data.manifest

    def resumed(self, search: tuple[int, int]) -> "Plan":
        """The plan of a run that has begun a search, from one step until another: its searches stay as long as that.

        Under `search.most_cost`, their length depends on `search.budget`, which may have changed since.
        """
        start, stop = search
        settings, begun, policy = self.recipe.search, self.schedule.begun, self.schedule.budget
        if policy is None or settings.most_cost is None or settings.epochs is not None or start == stop:
            return self
        if begun and start < begun[-1].stop:
            return self  # it was the search of a parent with another schedule
        policy = replace(policy, search_steps=stop - start)
        return replace(self, schedule=replace(self.schedule, search_steps=stop - start, policy=policy))

    @property
    def search_batches(self) -> int:
        """Global batches in the search subset."""
        return _search_batches(self.recipe, self.order.steps_per_epoch)

    def gmacs(self, subnet: Subnet) -> float:
        """Billions of multiply-accumulates in one image's forward pass through `subnet`."""
        return gmacs_of(self.recipe, self.family, self.schedule, subnet)


def plan_start(recipe: Recipe, world: int, per_node: int) -> Plan:
    """Like `Plan.of`, but also checks the number of ranks, the engine, the offload, and the size of the decoded images.

    `per_node`: how many of the `world` ranks are on each node. Raises RecipeError or DataError.
    """
    Worlds.of(recipe).check(world, per_node)
    plan = Plan.of(recipe)
    check_extras(recipe)
    check_offload(recipe, world, per_node)
    check_decoded(recipe, plan.schedule.full.resolution, world)
    return plan


def outline(recipe: Recipe, steps_per_epoch: int | None) -> tuple[type[ElasticModel], Schedule]:
    """The model family and the schedule of a recipe, whose shards need not exist. Raises RecipeError.

    `steps_per_epoch`: as the shards have it; None: SCALE positions stand for the steps of an epoch.
    """
    Worlds.of(recipe).check_lanes()
    family, full, stride = resolve_family(recipe.model)
    check_model(recipe, family, full, stride)
    check_growth(recipe, family, full, stride)
    check_lanes_of(recipe, family)
    epoch = SCALE if steps_per_epoch is None else steps_per_epoch
    growth, search = recipe.growth, recipe.search
    kind, ladder = rungs(growth, full, stride)
    begun = begun_by(recipe.parent)
    present = [phase.network for phase in begun[-1:]]
    check_groups(recipe, family, [*present, *(s.at_least(p) for s in ladder for p in present or [s])])
    cooldown = recipe.optimizer.cooldown_steps(epoch)
    steps, search_steps = _lengths(recipe, kind, 1 if kind == "supernet" else len(ladder), epoch)
    window = None
    if growth.window is not None:
        window = Window(ladder, growth.window.spread, growth.window.mix, steps - cooldown, cooldown)
    scoring = search.measurements * _search_batches(recipe, epoch) / FORWARDS_PER_STEP
    patch = stride if growth.patches == "subset" else None
    make = partial(
        Schedule,
        kind,
        ladder,
        steps,
        search_steps,
        scoring,
        recycle=growth.recycle,
        operator=growth.operator,
        adaptive_regularization=growth.adaptive_regularization,
        whole=full if full != ladder[-1] else None,
        window=window,
        first=Regularization(**growth.regularization_from.model_dump()),
        patch=patch,
        curriculum=growth.curriculum,
        split=family.split,
        begun=begun,
    )
    if kind != "automatic" or search.method != "budget":
        rule = search.candidates if kind == "automatic" else None
        return family, _counted(recipe, family, make(policy=EqualStages(ladder, steps, rule, cooldown)))
    if search.candidates == "window":
        raise RecipeError(
            "search.candidates: window excludes the present network, which a budget may choose to keep; use corners "
            "or all, or search.method: published"
        )
    frugal = Budget(
        ladder,
        steps,
        search.candidates,
        search_steps,
        scoring,
        limit=0.0,
        subset=patch is not None,
        cooldown=cooldown,
        # with a budget of all of Original's cost, searches may exceed it
        promised=search.budget is not None and search.budget < 1,
        recycle=growth.recycle,
        # a setting in steps means nothing if SCALE positions stand for the steps
        complete_steps=search.complete_steps if steps_per_epoch is not None else 0,
        most=search.most_searches,
    )
    least = make(policy=frugal)
    return family, _counted(recipe, family, budgeted(search, least, partial(gmacs_of, recipe, family, least)))


def describe(recipe: Recipe, world: int = 1) -> dict[str, Any]:
    """The phases of a recipe with parameters, GMACs, memory per rank, and epochs, and the speedup that they predict.

    `Schedule.expected` stands in for what searches will choose. The shards need not exist; if they do, the recipe must
    fit them.

    Args:
        recipe: what would be trained.
        world: how many ranks would train it, all on one machine.

    Returns:
        `stages` (one row for each phase), `speedup` (Original's cost / this cost - 1, by GMACs), `counted` (whether
        there are shards), `kind` (of the schedule), `budget` (of its searches, or None), and `short` (see
        `Budget.short`).

    Raises:
        RecipeError: the recipe cannot be run.
        DataError: its shards are damaged.
    """
    known = steps_per_epoch(recipe)
    if known is not None:
        Plan.of(recipe)
    family, schedule = outline(recipe, known)
    epoch = known or SCALE
    model, cost_of = recipe.model, partial(gmacs_of, recipe, family, schedule)
    rows, phases = [], schedule.expected((), cost_of)
    for phase in phases:
        epochs = (phase.stop - phase.start) / epoch
        rows.append(
            {
                "stage": phase.stage,
                "phase": phase.kind,
                "candidates": [str(s) for s in phase.candidates],
                "resolution": phase.network.resolution,
                "depth": phase.network.depth,
                "parameters": parameters(family, model, phase.network.depth),
                "gmacs": phase.mean(cost_of),
                "epochs": epochs,
                "bytes_per_rank": state_memory(
                    units(family, model, phase.network.depth), recipe.sharding, len(recipe.ema.momenta), world, world
                ).state,
            }
        )
    budget = schedule.budget
    return {
        "stages": rows,
        "speedup": cost_of(schedule.full) * schedule.steps / schedule.cost(phases, cost_of) - 1,
        "counted": known is not None,
        "kind": schedule.kind,
        "budget": budget.limit if budget else None,
        "short": budget.short if budget else "",
    }


def forecast(recipe: Recipe, world: int, device: Device) -> dict[str, tuple[Prediction, int]]:
    """Predicts a step and the peak memory of a recipe under every engine.

    Returns:
        For each engine (the recipe's own has a star), a step on the complete model, and the peak of the run in bytes
        on the device of the fullest rank. Memory peaks in a step on the complete model, or in a growth, when a rank
        holds the old and the new network.

    Raises:
        RecipeError: `world` ranks cannot run the recipe.
    """
    Worlds.of(recipe).check(world, math.gcd(world, device.ranks_per_node))
    family, schedule = outline(recipe, steps_per_epoch(recipe))
    phases = schedule.expected((), partial(gmacs_of, recipe, family, schedule))
    found, per_node = {}, math.gcd(world, device.ranks_per_node)
    for name, variant in engines(recipe, world, device).items():
        held = []
        for phase in phases:
            network = units(family, recipe.model, phase.network.depth)
            memory = state_memory(network, variant.sharding, len(recipe.ema.momenta), world, per_node)
            held.append(memory.parameters + memory.optimizer + memory.ema)
        growths = [held[i - 1] + held[i] for i in range(1, len(phases)) if schedule.entry(phases, i) is not None]
        prediction = predict(variant, family, schedule.full, world, device)
        found[name] = prediction, max(prediction.memory.device, *growths, 0)
    return found


def longest_step(recipe: Recipe, worlds: Sequence[int], device: Device) -> float:
    """Predicted seconds of a step on the complete model, on those numbers of ranks that can run it; 0 if none can."""
    family, schedule = outline(recipe, steps_per_epoch(recipe))
    found = 0.0
    for world in worlds:
        with suppress(RecipeError):
            found = max(found, predict(recipe, family, schedule.full, world, device).step)
    return found


def gmacs_of(recipe: Recipe, family: type[ElasticModel], schedule: Schedule, subnet: Subnet) -> float:
    """Billions of multiply-accumulates in one image's forward pass through `subnet`."""
    return gmacs(family, recipe.model, schedule.view(subnet), subnet.depth)


def steps_per_epoch(recipe: Recipe) -> int | None:
    """Steps in an epoch of the recipe's shards; None if there are no shards yet. Raises DataError."""
    folder = local_path(recipe.data.path)
    file = recipe.data.manifest or (folder is not None and Path(folder, MANIFEST))
    if file and not os.path.lexists(file):
        return None
    return _order(recipe, manifest_of(recipe)).steps_per_epoch


def manifest_of(recipe: Recipe) -> Manifest:
    """The manifest of the shards that a recipe trains on. Raises RecipeError, DataError, or Unavailable."""
    return whole_manifest(recipe).first("train", recipe.data.shards)


def whole_manifest(recipe: Recipe) -> Manifest:
    """The manifest of all shards in a recipe's `data.path`. Raises RecipeError, DataError, or Unavailable."""
    data = recipe.data
    if data.memory is not None and data.store is None and local_path(data.path) is None:
        raise RecipeError("data.memory: images are read one by one from a local disk only; add data.store: FOLDER")
    return replace(Manifest.load(data.path, data.manifest), store=Store.of(data))


def _order(recipe: Recipe, manifest: Manifest) -> Order:
    Worlds.of(recipe).check_lanes()
    counts = tuple(shard.samples for shard in manifest.split("train"))
    return Order(counts, recipe.seed, recipe.data.lanes, recipe.train.batch, recipe.augment.repeats)


def _search_batches(recipe: Recipe, steps_per_epoch: int) -> int:
    """Global batches in the search subset."""
    subset = recipe.search.subset
    wanted = steps_per_epoch // SCORING_PARTS if subset is None else subset // recipe.train.batch
    return max(1, min(wanted, steps_per_epoch))


def _lengths(recipe: Recipe, kind: ScheduleKind, stages: int, epoch: int) -> tuple[int, int]:
    """The steps of a run, and those of a search in it. Raises RecipeError if they do not fit."""
    steps = round(recipe.train.epochs * epoch) + recipe.optimizer.cooldown_steps(epoch)
    if steps > MOST_STEPS:
        raise RecipeError(f"train.epochs: {recipe.train.epochs:g} epochs are {steps} steps; the limit is {MOST_STEPS}")
    searched = recipe.search.epochs or recipe.train.epochs / SEARCH_PARTS
    search_steps = max(1, round(searched * epoch))
    if recipe.optimizer.schedule == "timm" and recipe.train.epochs < 1:
        raise RecipeError(
            f"optimizer.schedule: timm changes the learning rate once an epoch, but train.epochs is "
            f"{recipe.train.epochs:g}; use smooth"
        )
    before_cooldown = steps - recipe.optimizer.cooldown_steps(epoch)
    if before_cooldown < stages:
        raise RecipeError(f"train.epochs: {before_cooldown} steps are fewer than the {stages} stages")
    if kind == "automatic" and stages > 1 and search_steps >= before_cooldown // stages:
        if recipe.search.epochs is None:
            raise RecipeError(
                f"train.epochs: a stage of {before_cooldown // stages} steps has no room for {search_steps} of a "
                "search and one more; train longer, or use growth.schedule: linear or original"
            )
        raise RecipeError(
            f"search.epochs: {searched:g} epochs do not fit into a stage of {recipe.train.epochs / stages:g} epochs"
        )
    return steps, search_steps


def _counted(recipe: Recipe, family: type[ElasticModel], schedule: Schedule) -> Schedule:
    """`schedule`, which counts compute if the recipe says so. Raises RecipeError if it cannot."""
    if recipe.growth.steps == "epochs":
        return schedule
    if schedule.window is not None:
        raise RecipeError(
            "growth.steps: compute needs stages that follow each other, and growth.window draws from all; use epochs"
        )
    if schedule.kind == "supernet":
        raise RecipeError("growth.steps: compute needs stages, which growth.schedule: supernet has not; use epochs")
    if not recipe.growth.recycle:
        raise RecipeError(
            "growth.steps: compute counts every step, so no search may be repeated; use growth.recycle: true"
        )
    if schedule.begun:
        raise RecipeError(
            "growth.steps: compute cannot continue a run whose stages were others; use growth.steps: epochs, or take "
            "only the weights, with init.from"
        )
    compute = Compute.of(schedule, partial(gmacs_of, recipe, family, schedule))
    stage = (schedule.steps - schedule.policy.cooldown) // schedule.stages
    published = schedule.kind == "automatic" and schedule.budget is None
    if published and compute.pace((schedule.full,)) * schedule.search_steps >= stage:
        raise RecipeError(
            f"search.epochs: a search of {schedule.search_steps} steps may cost more than a stage; with growth.steps: "
            "compute, use shorter searches or fewer growth.stages"
        )
    return replace(schedule, compute=compute)
