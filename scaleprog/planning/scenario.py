"""From a recipe and a cluster to a scenario: every input of a simulation, with its value and its origin."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scaleprog.files.display import counted
from scaleprog.models.cost import parameters
from scaleprog.planning.cost_model import FP32, predict
from scaleprog.planning.devices import Device
from scaleprog.planning.faults import CAUSES, FaultRates
from scaleprog.planning.interval import DAY
from scaleprog.planning.plan import outline
from scaleprog.planning.simulation import Scenario
from scaleprog.recipe import Recipe
from scaleprog.recipe.worlds import Worlds

SECONDS = (
    "crash_detection",
    "hang_detection",
    "node_detection",
    "leaving",
    "queue_least",
    "queue_mean",
    "start_up",
    "reading",
    "pause",
    "save",
    "repair",
)
"""The inputs that a user may set by name."""
ENDING = 2.0
"""Seconds from the end of the patience with a hung rank until all ranks have ended."""
GPU = "docs/results/gpu.md, one H100"
SCALE = "docs/results/scale.md"


@dataclass(frozen=True)
class Cluster:
    """What a run is simulated on.

    Args:
        nodes: that train.
        gpus: of each node, one for each rank.
        device: of each rank.
        spare_nodes: that the job holds besides.
        in_job: whether a run starts again without leaving its nodes, where that is possible.
    """

    nodes: int
    gpus: int
    device: Device
    spare_nodes: int = 0
    in_job: bool = True

    @property
    def world(self) -> int:
        """How many ranks train."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Length:
    """How much training is simulated: `steps` optimizer steps, or without them `days`; a step takes `step_seconds`
    (None: as modeled)."""

    days: float
    steps: int | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class Input:
    """One input of a simulation; `unit` and `origin` are for people."""

    name: str
    value: float
    unit: str
    origin: str


def inputs(
    recipe: Recipe, cluster: Cluster, length: Length, faults: FaultRates, given: Mapping[str, float]
) -> list[Input]:
    """Every input of the simulation of a recipe on a cluster; `given` replaces some of `SECONDS`.

    Raises RecipeError or DataError.
    """
    step = _step(recipe, cluster, length)
    found = [
        Input("nodes", cluster.nodes, "", f"asked; {cluster.gpus} ranks each"),
        Input("spare_nodes", cluster.spare_nodes, "", "asked"),
        step,
        _training(length, step),
        *(Input(cause, faults.rates[cause], "/ 1,000 node-days", faults.origin) for cause in CAUSES),
    ]
    for each in (*_reactions(recipe, cluster), *_checkpoints(recipe, cluster)):
        asked = given.get(each.name)
        found.append(each if asked is None else Input(each.name, asked, each.unit, "asked, by --assume"))
    return [*found, _interval(recipe, step.value, scenario_of([*found, Input("interval", DAY, "s", "")], cluster))]


def scenario_of(found: list[Input], cluster: Cluster) -> Scenario:
    """The scenario of these inputs."""
    values: dict[str, Any] = {e.name: e.value for e in found if e.name not in ("step", "nodes", "spare_nodes")}
    return Scenario(nodes=cluster.nodes, spare_nodes=cluster.spare_nodes, in_job=cluster.in_job, **values)


def alternatives(scenario: Scenario) -> dict[str, Scenario]:
    """What else could be done in the same place, by what it is."""
    requeued = replace(scenario, in_job=False)
    blocking = replace(scenario, asynchronous=False)
    return {
        "as asked": scenario,
        "plain requeueing after every fault": requeued,
        **{
            f"in-job restart, {counted(spares, 'spare node')}": replace(scenario, in_job=True, spare_nodes=spares)
            for spares in (0, 1, 2, 4, 8)
        },
        "half the interval": replace(scenario, interval=scenario.interval / 2),
        "twice the interval": replace(scenario, interval=scenario.interval * 2),
        "checkpoint.every: auto": scenario.with_best_interval(),
        "in-job restart, 8 spare nodes, checkpoint.every: auto": replace(
            scenario, in_job=True, spare_nodes=8
        ).with_best_interval(),
        "no asynchronous save": blocking,
        "no asynchronous save, its best interval": blocking.with_best_interval(),
        "plain requeueing, no asynchronous save": replace(requeued, asynchronous=False),
    }


# ---- the inputs


def _step(recipe: Recipe, cluster: Cluster, length: Length) -> Input:
    """Seconds of a step of the complete model."""
    if length.step_seconds is not None:
        return Input("step", length.step_seconds, "s", "asked")
    world, worlds = cluster.world, Worlds.of(recipe)
    changed = ""
    if worlds.obstacle(world, cluster.gpus):
        lanes, batch = worlds.fitted(world)
        changed = f", with data.lanes={lanes} train.batch={batch}, because the recipe's do not fit so many ranks"
        data, train = (
            recipe.data.model_copy(update={"lanes": lanes}),
            recipe.train.model_copy(update={"batch": batch}),
        )
        recipe = recipe.model_copy(update={"data": data, "train": train})
    family, schedule = outline(recipe, None)
    device = replace(cluster.device, ranks_per_node=cluster.gpus)
    seconds = predict(recipe, family, schedule.full, world, device).step
    return Input("step", seconds, "s", f"modeled as by `plan`: the complete model on {device.name}{changed}")


def _training(length: Length, step: Input) -> Input:
    if length.steps is not None:
        return Input("training", length.steps * step.value, "s", f"asked: {length.steps} steps")
    return Input("training", length.days * DAY, "s", f"asked: {length.days:g} days of steps that count")


def _reactions(recipe: Recipe, cluster: Cluster) -> Iterator[Input]:
    """From a fault until the first step of the next start."""
    start_up = 13.0 + 0.005 * cluster.world
    hang = 60 * recipe.train.patience + ENDING
    for name, value, origin in (
        ("crash_detection", 30.0, "assumed: ranks that do not end after another's crash are killed by then"),
        (
            "hang_detection",
            hang,
            f"train.patience of the recipe, and {ENDING:g} s measured here until all ranks have ended",
        ),
        ("node_detection", 43.0, "measured here: Slurm noticed lost nodes in 19 to 43 s (with SlurmdTimeout 5 s)"),
        ("leaving", 3.2, "measured here, docs/results/checkpoint.md: from the signal to the exit"),
        ("queue_least", 121.0, "Slurm's default: it holds a requeued job for cred_expire, docs/slurm.md"),
        ("queue_mean", 600.0, "assumed: the rest of the queue, exponentially distributed"),
        ("start_up", start_up, "13 s measured here, docs/results/checkpoint.md; 5 ms a rank assumed"),
        ("repair", DAY, "assumed: until a lost node is a spare node again"),
    ):
        yield Input(name, value, "s", origin)


def _checkpoints(recipe: Recipe, cluster: Cluster) -> Iterator[Input]:
    """What a save and a resume take: the bytes of a rank by measured rates, and measured work for every rank."""
    family, schedule = outline(recipe, None)
    state = FP32 * (3 + len(recipe.ema.momenta)) * parameters(family, recipe.model, schedule.full.depth)
    world = cluster.world
    copied, own = state / recipe.sharding.shard_ranks(world, cluster.gpus), state / world
    for name, value, origin in (
        ("pause", 0.01 + copied / 50e9, f"measured, {GPU}: 10 ms and {copied / 1e6:.3g} MB of a rank at 50 GB/s"),
        (
            "save",
            0.1 + own / 450e6 + 0.0001 * world,
            f"measured, {GPU}: {own / 1e6:.3g} MB of a rank at 450 MB/s; {SCALE}: 0.1 ms a rank; 0.1 s assumed",
        ),
        (
            "reading",
            state / 1.2e9 + 0.0015 * world,
            f"measured, {SCALE}: rank 0 verifies {state / 1e9:.3g} GB at 1.2 GB/s, and 1.5 ms a rank",
        ),
    ):
        yield Input(name, value, "s", origin)


def _interval(recipe: Recipe, step: float, scenario: Scenario) -> Input:
    """Seconds of training between two saves, as the recipe has it."""
    settings = recipe.checkpoint
    if settings.every == "auto":
        return Input("interval", scenario.best_interval, "s", "checkpoint.every: auto, by Young and Daly")
    limits = {
        "checkpoint.every_minutes": 60 * settings.minutes if settings.minutes else None,
        "checkpoint.every_steps": settings.steps * step if settings.steps else None,
    }
    known = {key: value for key, value in limits.items() if value is not None}
    if not known:
        return Input("interval", scenario.training, "s", "the recipe never saves by steps or by the clock")
    key = min(known, key=known.__getitem__)
    return Input("interval", known[key], "s", f"{key} of the recipe")
