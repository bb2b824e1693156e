"""What a step costs a rank under each engine: memory, bytes between ranks, and seconds (modeled, never timed).

Memory and traffic follow from the shapes of the parameters. tests/distributed/test_cost_model.py compares them with
counted bytes: they match to the byte, except under `zero`, where DeepSpeed aligns, prefetches, and releases.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from scaleprog.data.tensor_operations import WORKING
from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet, View
from scaleprog.models import resolve_family
from scaleprog.models.cost import Unit, activations, gmacs, units
from scaleprog.models.elastic import ElasticModel
from scaleprog.planning.devices import Collective, Device, Kind
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ShardingSettings
from scaleprog.recipe.numbers import ceil_div
from scaleprog.recipe.worlds import Worlds

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of rank 0, which is the fullest rank.

    `optimizer`: AdamW's moments and zero's separate fp32 weights; `buffers`: gathered parameters, and gradients that
    are being reduced; `host`: bytes that an offload keeps in the host's memory instead; `in_turn`: whether a backward
    frees activations while gradients come about, so that they are never all there together.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int = 0
    activations: int = 0
    host: int = 0
    in_turn: bool = False

    @property
    def state(self) -> int:
        """Bytes that last from step to step, including gradients, on the device and on the host."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.host

    @property
    def device(self) -> int:
        """The most bytes on the device in a step."""
        passing = (self.activations, self.gradients)
        lasting = self.state - self.host - self.gradients + self.buffers
        return lasting + (max(passing) if self.in_turn else sum(passing))


@dataclass(frozen=True)
class Traffic:
    """The collectives of one rank in one step."""

    collectives: tuple[Collective, ...]

    def count(self, *kinds: Kind) -> int:
        """How many collectives of these kinds there are (without arguments: of all kinds)."""
        return sum(c.count for c in self._of(kinds))

    def sent(self, *kinds: Kind) -> float:
        """Bytes that a rank sends in collectives of these kinds (without arguments: of all kinds)."""
        return sum(c.sent for c in self._of(kinds))

    def between_nodes(self, device: Device) -> float:
        """Bytes that a rank sends to other nodes."""
        return sum(c.between_nodes(device) for c in self.collectives)

    def _of(self, kinds: Sequence[Kind]) -> Iterable[Collective]:
        return (c for c in self.collectives if not kinds or c.kind in kinds)


@dataclass(frozen=True)
class Prediction:
    """One optimizer step of one network under one engine; times in seconds.

    `images`: of one rank; `compute`: forward and backward; `update`: AdamW and the EMAs; `communication`: all of it;
    `exposed`: the part of it that overlaps with nothing.
    """

    images: int
    memory: Memory
    traffic: Traffic
    compute: float
    update: float
    communication: float
    exposed: float

    @property
    def step(self) -> float:
        """Seconds of the step: the longer of compute and overlapping communication, plus `exposed` and `update`."""
        return max(self.compute, self.communication - self.exposed) + self.exposed + self.update

    @property
    def efficiency(self) -> float:
        """The fraction of the step that forward and backward take."""
        return self.compute / self.step


# ---- memory


def state_memory(network: Sequence[Unit], sharding: ShardingSettings, emas: int, world: int, per_node: int) -> Memory:
    """Memory of a network with its gradients, AdamW, and EMAs, but without activations.

    Args:
        network: parameter shapes by unit, see `models.cost.units`.
        sharding: of the recipe.
        emas: how many EMAs there are.
        world: how many ranks there are.
        per_node: how many of them are on each node.

    Raises:
        RecipeError: hsdp's groups do not divide `world`.
    """
    network = _gathered_units(network, sharding)
    ranks, whole = sharding.shard_ranks(world, per_node), sum(map(_numel, network))
    compute = BF16 if sharding.precision == "bf16" else FP32
    if sharding.engine == "replicated":
        buffers = lasting_buffers(network, sharding, world) + (BF16 * whole if compute == BF16 else 0)
        memory = Memory(FP32 * whole, FP32 * whole, 2 * FP32 * whole, FP32 * emas * whole, buffers)
    elif sharding.engine == "zero":
        own = sum(_zero_shard(unit, ranks) for unit in network) if sharding.stage == 3 else ceil_div(whole, ranks)
        memory = Memory(
            parameters=compute * (own if sharding.stage == 3 else whole),
            gradients=FP32 * own + (compute * whole if sharding.stage == 1 else 0),
            optimizer=3 * FP32 * own,
            ema=FP32 * emas * own,
            buffers=lasting_buffers(network, sharding, world)
            + (_gathered(network, sharding, ranks, compute) if sharding.stage == 3 else 0),
        )
    else:
        own = sum(_fsdp_shard(unit, ranks) for unit in network)
        buffers = _gathered(network, sharding, ranks, compute)
        memory = Memory(FP32 * own, FP32 * own, 2 * FP32 * own, FP32 * emas * own, buffers)
    if sharding.offload == "all":
        return Memory(0, 0, 0, 0, memory.buffers, host=memory.state)
    if sharding.offload == "optimizer":
        held = memory.optimizer + memory.ema
        return Memory(memory.parameters, memory.gradients, 0, 0, memory.buffers, host=held)
    return memory


def lasting_buffers(network: Sequence[Unit], sharding: ShardingSettings, world: int) -> int:
    """Bytes of the gradient buffers that an engine keeps, at least from a backward to the step."""
    if sharding.engine == "replicated":
        return FP32 * sum(map(_numel, network)) if world > 1 else 0
    return FP32 * max(map(_numel, network)) if sharding.engine == "zero" else 0


def _gathered_units(network: Sequence[Unit], sharding: ShardingSettings) -> Sequence[Unit]:
    """The units that the engine gathers: all of `network` as one, or each by itself."""
    together = sharding.engine in ("fsdp", "hsdp") and sharding.gather == "model"
    return (tuple(chain.from_iterable(network)),) if together else network


def _numel(unit: Unit) -> int:
    return sum(math.prod(shape) for shape in unit)


def _fsdp_shard(unit: Unit, ranks: int) -> int:
    """Elements on rank 0: FSDP2 cuts the first dimension of each parameter into equal parts, rounded up."""
    return sum(ceil_div(shape[0], ranks) * math.prod(shape[1:]) for shape in unit)


def _zero_shard(unit: Unit, ranks: int) -> int:
    return sum(ceil_div(math.prod(shape), ranks) for shape in unit)


def _padded(unit: Unit, sharding: ShardingSettings, ranks: int) -> int:
    """Elements of a unit as collectives move it: every rank's part is padded to the size of the largest part."""
    return ranks * (_zero_shard if sharding.engine == "zero" else _fsdp_shard)(unit, ranks)


def _gathered(network: Sequence[Unit], sharding: ShardingSettings, ranks: int, compute: int) -> int:
    """Bytes of gathered parameters, and of the largest unit's gradients with their fp32 copy.

    Gathered are the root, the running layer, and the prefetched layer; all layers without `reshard_after_forward`.
    """
    sizes = [_padded(unit, sharding, ranks) for unit in network]
    layers = sorted(sizes[1:], reverse=True)
    return compute * (sizes[0] + sum(layers[:2] if sharding.reshard_after_forward else layers)) + (
        (compute + FP32) * max(sizes)
    )


# ---- traffic


def traffic(network: Sequence[Unit], sharding: ShardingSettings, world: int, per_node: int, passes: int = 1) -> Traffic:
    """The collectives of a step whose forward and backward run in `passes` micro-batches."""
    network = _gathered_units(network, sharding)
    ranks = sharding.shard_ranks(world, per_node)
    compute = BF16 if sharding.precision == "bf16" else FP32
    whole = sum(map(_numel, network))
    found: list[Collective] = []
    if sharding.engine == "replicated":
        found = [Collective("all_reduce", FP32 * whole, world, exposed=True)]
    elif sharding.engine == "zero" and sharding.stage < 3:
        reductions = passes if sharding.stage == 2 else 1
        found = [Collective("all_reduce", FP32 * _numel(unit), ranks, reductions, exposed=True) for unit in network]
        # one each for the weights with decay and for those without: parameters to gather, norms to add up
        found.append(Collective("all_gather", compute * whole / 2, ranks, 2, exposed=True))
        found.append(Collective("all_reduce", FP32, ranks, 2, exposed=True))
    else:
        for index, unit in enumerate(network):
            size = _padded(unit, sharding, ranks)
            again = sharding.engine == "zero" or (index > 0 and sharding.reshard_after_forward)
            found += [
                # nothing can overlap these: no layer runs before the first gathers, or after the root's reduction
                Collective("all_gather", compute * size, ranks, passes, exposed=index < 2),
                Collective("all_gather", compute * size, ranks, passes if again else 0),
                Collective("reduce_scatter", FP32 * size, ranks, passes, exposed=index == 0),
                Collective("all_reduce", FP32 * size / ranks, world // ranks, passes, ranks, exposed=index == 0),
            ]
        if sharding.engine != "zero":
            found.append(Collective("all_reduce", FP32, ranks, exposed=True))  # the gradients' norm, squared
    return Traffic(tuple(c for c in found if c.ranks > 1 and c.count))


# ---- a step


def predict(recipe: Recipe, family: type[ElasticModel], subnet: Subnet, world: int, device: Device) -> Prediction:
    """What a step on `subnet` costs each of `world` ranks under the recipe's engine.

    Raises RecipeError if `world` ranks cannot run the recipe.
    """
    Worlds.of(recipe).check(world, math.gcd(world, device.ranks_per_node))
    sharding, model, emas = recipe.sharding, recipe.model, len(recipe.ema.momenta)
    images = recipe.train.batch // world
    micro = images_at_a_time(recipe, family, world)
    passes = ceil_div(images, micro)
    network = units(family, model, subnet.depth)
    per_node = math.gcd(world, device.ranks_per_node)
    memory = state_memory(network, sharding, emas, world, per_node)
    kept = activations(family, model, subnet, micro, sharding.precision, sharding.recompute)
    moved = traffic(network, sharding, world, per_node, passes)
    # a backward costs two forwards; AdamW reads four values and writes three, an EMA reads two and writes one
    work = 2e9 * gmacs(family, model, View(subnet.resolution), subnet.depth) * images * (4 if sharding.recompute else 3)
    own = sum(map(_numel, network)) / sharding.shard_ranks(world, per_node)
    return Prediction(
        images=images,
        memory=replace(memory, activations=kept, in_turn=passes == 1 and sharding.engine in ("fsdp", "hsdp")),
        traffic=moved,
        compute=work / (device.achieved * device.flops(sharding.precision)),
        update=FP32 * own * (7 + 3 * emas) / device.memory_bandwidth,
        communication=sum(c.seconds(device) for c in moved.collectives),
        exposed=sum(c.seconds(device) for c in moved.collectives if c.exposed),
    )


def images_at_a_time(recipe: Recipe, family: type[ElasticModel], world: int) -> int:
    """The most images in one forward and backward of a rank."""
    images, lane = recipe.train.batch // world, recipe.train.batch // recipe.data.lanes
    most = min(recipe.train.micro_batch or images, images)
    return max(lane, most // lane * lane) if family.whole_lanes else most


def engines(recipe: Recipe, world: int, device: Device) -> dict[str, Recipe]:
    """The recipe under every engine that can train it, by the engine's name. Its own engine gets a star; the others do
    not offload.

    hsdp shards inside a node of `device`, unless the recipe has a `sharding.shard` that divides `world`.
    """
    own = recipe.sharding
    shared = {
        key: getattr(own, key) for key in ("precision", "gather", "reshard_after_forward", "recompute", "compile")
    }
    node = math.gcd(world, device.ranks_per_node)
    group = own.shard if own.shard and world % own.shard == 0 else node
    choices: dict[str, dict[str, str | int]] = {
        "replicated": {"engine": "replicated"},
        "fsdp": {"engine": "fsdp"},
        f"hsdp/{group}": {"engine": "hsdp", "shard": group},
        **{f"zero {stage}": {"engine": "zero", "stage": stage} for stage in (1, 2, 3)},
    }
    found = {}
    for name, choice in choices.items():
        same = all(getattr(own, key) == value for key, value in choice.items() if key != "shard")
        offload = own.offload if same else None
        try:
            sharding = ShardingSettings.model_validate({**shared, **choice, "offload": offload})
        except ValidationError:  # the engine cannot do that
            continue
        found[f"{name} *" if same else name] = recipe.model_copy(update={"sharding": sharding})
    return found


# ---- what cannot run


def host_memory_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can still allocate on this machine: Linux's MemAvailable. Raises RecipeError if unknown."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise RecipeError(f"{meminfo}: cannot tell how much memory is available: {error}") from error
    raise RecipeError(f"{meminfo}: has no line MemAvailable")


def check_offload(recipe: Recipe, world: int, per_node: int, available: int | None = None) -> None:
    """Raises RecipeError if this machine's memory cannot hold what its `per_node` of `world` ranks offload.

    `available`: bytes of memory that they may use (None: as much as the machine reports).
    """
    if recipe.sharding.offload is None:
        return
    family, full, _ = resolve_family(recipe.model)
    network = units(family, recipe.model, full.depth)
    needed = per_node * state_memory(network, recipe.sharding, len(recipe.ema.momenta), world, per_node).host
    available = host_memory_available() if available is None else available
    if needed > available:
        raise RecipeError(
            f"sharding.offload: {recipe.sharding.offload} puts {needed / 2**30:.1f} GiB of {per_node} ranks into "
            f"this machine's memory, but {available / 2**30:.1f} GiB are available; use more nodes, fewer ranks per "
            "node, "
            "fewer ema.momenta, or no offload"
        )


def assumptions(recipe: Recipe, device: Device) -> tuple[str, ...]:
    """The assumptions behind the figures, in plain sentences."""
    precision = recipe.sharding.precision
    operations = (
        f"augment.device: accelerator takes at most {WORKING / 2**30:g} GiB of the device and three times the bytes of "
        "a rank's images, before a forward, while there are no activations; neither these nor its time are counted.",
    )
    peak = device.flops(precision)
    return (
        "Nothing here was timed: ms and efficiency come from a model, to compare engines and worlds, not to promise.",
        f"{device.name}: {device.sources}.",
        f"Forward and backward are assumed to reach {device.achieved:.0%} of {peak / 1e12:.4g} TFLOP/s in {precision}, "
        "which is optimistic if a rank has few images. Efficiency is their share of the step.",
        "The global batch is fixed, so more ranks have fewer images each (strong scaling).",
        f"Collectives are rings (all-reduce: or trees) in nodes of {device.ranks_per_node} ranks, with "
        f"{device.intra_bandwidth / 1e9:g} GB/s inside and {device.inter_bandwidth / 1e9:g} GB/s per rank between "
        f"nodes, {device.intra_latency * 1e6:g} and {device.inter_latency * 1e6:g} us per hop; no congestion, no "
        "waiting for other ranks.",
        "They overlap with computing, except the first gather and last reduction of a pass, and all of zero 1 and 2.",
        "Memory is that of the fullest rank. FSDP2 cuts first dimensions into equal parts, rounded up, so it holds and "
        "sends padding.",
        "Activations: what autograd keeps of one micro-batch with fused attention, counted by torch. For autocast, "
        "torch counts with the CPU's; a GPU's keeps more in fp32. Under fsdp and hsdp, the gradients of a step's only "
        "micro-batch take their place.",
        "Buffers, never counted: the root, two layers (or all, without reshard_after_forward) and a unit's gradients "
        "twice; a network that is gathered as a whole is one unit; replicated's flat gradients. Left out: allocator, "
        "kernels' workspace, batches, DeepSpeed's buckets.",
        "zero holds separate fp32 weights, even if the parameters are fp32. In zero 1 and 2, DeepSpeed 0.19 reduces "
        "whole gradients (all-reduce), and each rank keeps its part.",
        "Gradients are reduced in fp32 after each micro-batch; in zero 1 and replicated, once per step.",
        "Peak: a step of the complete model, or a growth, when a rank holds the old and the new network together.",
        "Left out of the time: reading data, launching kernels, the engines' own work on the host, an offload's copies "
        "and AdamW, searches, evaluation, checkpoints.",
        *(operations if recipe.augment.device == "accelerator" else ()),
    )
