"""The contract between training and the engines that shard a model over ranks: build, step, regrow, EMA, and state."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scaleprog.growth.operators import LayerMap, Weights
from scaleprog.models.elastic import Active, ElasticModel, Structure, TokenMix
from scaleprog.ranks.heap import return_freed_memory
from scaleprog.ranks.waits import Waits
from scaleprog.recipe.keys import EmaSettings, ModelSettings, OptimizerSettings, ShardingSettings
from scaleprog.sharding.ema import Ema, momentum_of
from scaleprog.sharding.optimizer import MOMENTS
from scaleprog.sharding.placement import LocalSlice, Placement, move

Moments = dict[str, Tensor]
"""AdamW's state of one parameter: `exp_avg` and `exp_avg_sq` (this rank's elements, 1-D), and `step` (0-D)."""


@dataclass
class Network:
    """A model that an engine has sharded over the ranks, with its AdamW moments and EMAs, by full parameter name.

    Tensors are fp32 and 1-D and hold the elements that `placements` gives to this rank. Writing into them changes the
    network.
    """

    model: ElasticModel
    forward: Callable[..., Tensor]  # the model, or the engine's wrapper around it
    shapes: dict[str, torch.Size]
    placements: dict[str, Placement]
    weights: dict[str, Tensor]
    moments: dict[str, Moments]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Running statistics of batch norms, (2, C) fp32 each: means, variances. Every rank holds all of them."""
    emas: list[Ema] = field(default_factory=list)


class Load(Protocol):
    """Writes saved tensors into `parts`, which must name all of them or, with `subset`, may name some."""

    def __call__(self, parts: Mapping[str, LocalSlice], subset: bool = False) -> None: ...


class Backend(ABC):
    """One elastic model, its AdamW, and its EMAs, sharded over the ranks of the default process group.

    A subclass decides where parameters lie and how to take a step; layer maps, EMAs, and state are the same for all
    engines. There is no network until the first `regrow` or `restore`.
    """

    group: dist.ProcessGroup | None = None
    """The ranks that share one copy of the network; None: each rank holds a whole copy."""

    def __init__(
        self,
        family: type[ElasticModel],
        model: ModelSettings,
        optimizer: OptimizerSettings,
        ema: EmaSettings,
        sharding: ShardingSettings,
        device: torch.device,
        seed: int,
        lane: int = 0,
    ) -> None:
        """`lane`: images of a lane in a training step, see `LaneNorm`; 0: a rank's micro-batch is one lane."""
        self.family, self.model, self.optimizer, self.ema, self.sharding = family, model, optimizer, ema, sharding
        self.device = device
        self.seed, self.lane = seed, lane
        self.waits = Waits(device)
        """Measures the collectives of a training step."""
        self.growths = 0  # networks built so far; fresh layers are drawn from (seed, growths)
        self._network: Network | None = None

    # ---- what an engine is

    @abstractmethod
    def build(self, model: ElasticModel, steps: Mapping[str, float], may_skip_layers: bool) -> Network:
        """Gives `model` storage and shards it over the ranks. Its values are undefined, and it has no EMAs yet.

        Args:
            model: on the meta device.
            steps: by parameter, the AdamW steps behind its moments; 0 for parameters without an entry.
            may_skip_layers: whether training steps may skip layers, the same ones on all ranks.
        """

    @abstractmethod
    def refresh_compute_weights(self, changed: bool = True) -> None:
        """Makes the model compute with the current weights; all ranks call it.

        `changed`: whether the weights changed outside a step; if not, a forward without a backward came before.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` (0-D, this rank's), averaged over ranks, to those since the last step."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """Takes one AdamW step on the clipped gradients and drops them. Returns their norm before clipping, 0-D.

        If the norm is not finite, weights, moments, and step counts stay as they are. In every engine, skipped layers
        have zero gradients: their moments decay, and weight decay applies.
        """

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Frees whatever would outlive the current network, which is about to be replaced."""

    # ---- growth

    @property
    def network(self) -> Network:
        """The current network."""
        assert self._network is not None, "no network yet: regrow or restore first"
        return self._network

    @property
    def compilations(self) -> int:
        """How many graphs torch.compile has built in this process; constant once it has seen all variants."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.sharding.compile else 0

    @property
    def structure(self) -> Structure:
        """The current network's structure."""
        return self.network.model.structure

    def regrow(
        self, layer_map: LayerMap, *, inherit: bool, may_skip_layers: bool, given: Mapping[str, Tensor] | None = None
    ) -> None:
        """Replaces the network with the one that `layer_map` describes, and frees the memory of the old one.

        The new online weights come from the layers and weights that the map names; every EMA grows from itself by the
        same map. Elements change ranks only where the placements of the two networks differ.

        Args:
            layer_map: of the growth; must be entirely fresh if there is no network yet.
            inherit: whether AdamW takes over the moments of each layer's source; if not, it starts from scratch.
            may_skip_layers: whether training steps may skip layers, the same ones on all ranks.
            given: values in place of fresh ones: whole tensors on the host, by the full names of parameters and the
                names of running statistics; the same on all ranks.
        """
        self._grow(layer_map, inherit, may_skip_layers, given or {})
        gc.collect()  # engines form reference cycles, and training has disabled garbage collection
        return_freed_memory()  # the old network's blocks do not fit the new one's sizes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _grow(self, layer_map: LayerMap, inherit: bool, may_skip_layers: bool, given: Mapping[str, Tensor]) -> None:
        old = self._network
        structure = old.model.structure.after(layer_map) if old else Structure.plain(layer_map.depths)
        self.growths += 1
        model = self._on_meta(structure)
        origins = {name: _origin(model, name, layer_map) for name, _ in model.named_parameters()}
        steps = {}
        if old and inherit:
            steps = {n: float(old.moments[o.source]["step"]) for n, o in origins.items() if o.source is not None}
        new = self._replace(model, steps, may_skip_layers)
        fresh = self._fresh(structure) if any(o.source is None and not o.closed for o in origins.values()) else {}
        fresh |= given
        for name, origin in origins.items():
            targets = [new.weights[name], *(ema.weights[name] for ema in new.emas)]
            if origin.closed:
                _fill(targets, 0.0)
            elif origin.source is None:
                _fill_from(targets, fresh[name], new.placements[name].local(self._rank))
            else:
                assert old is not None, "the first network must be fresh"
                source = origin.source
                online = old.emas[self.ema.grow_from].weights if origin.weights == "ema" else old.weights
                sources = [online[source], *(ema.weights[source] for ema in old.emas)]
                if inherit:
                    sources += [old.moments[source][key] for key in MOMENTS]
                    targets += [new.moments[name][key] for key in MOMENTS]
                move(sources, old.placements[source], targets, new.placements[name], self.group)
        for name in given.keys() & new.statistics.keys():
            for statistics in (new.statistics, *(ema.statistics for ema in new.emas)):
                statistics[name].copy_(given[name])
        if old and layer_map.rest != "fresh":
            rest = old.emas[self.ema.grow_from].statistics if layer_map.rest == "ema" else old.statistics
            grown = zip(
                (new.statistics, *(ema.statistics for ema in new.emas)), (rest, *(e.statistics for e in old.emas))
            )
            for targets_of, sources_of in grown:
                for name, target in targets_of.items():
                    target.copy_(sources_of[name])
        self.refresh_compute_weights()

    def restore(self, structure: Structure, may_skip_layers: bool, load: Load) -> None:
        """Replaces the network with one of `structure`; calls `load` for AdamW's step counts, then for all of `state`.

        `may_skip_layers`: whether training steps may skip layers, the same ones on all ranks.
        """
        model = self._on_meta(structure)
        steps = {name: torch.zeros(1) for name, _ in model.named_parameters()}
        # an engine may group parameters by their counts, so `build` needs them first
        load({f"step/{name}": LocalSlice.whole(step) for name, step in steps.items()}, subset=True)
        if self._network is not None:  # nothing of it is needed, and it would lie beside the next two in a growth
            self.release()
            self._network = None
            gc.collect()
        self._replace(model, {name: float(step) for name, step in steps.items()}, may_skip_layers)
        load(self.state())
        self.refresh_compute_weights()

    def _on_meta(self, structure: Structure) -> ElasticModel:
        with torch.device("meta"), _Unwritten():
            model = self.family(self.model, structure)
        model.recompute, model.autocast = self.sharding.recompute, self.sharding.precision == "autocast"
        if self.sharding.compile:
            for layer in chain.from_iterable(model.groups()):  # layers share their code, so torch compiles it once
                layer.forward = torch.compile(layer.forward, dynamic=True)
        return model

    def _replace(self, model: ElasticModel, steps: Mapping[str, float], may_skip_layers: bool) -> Network:
        """Builds the new network with weights of NaN, so that a parameter left unfilled fails loudly."""
        if self._network is not None:
            self.release()
        self._network = network = self.build(model, steps, may_skip_layers)
        _fill(network.weights.values(), float("nan"))
        for name, norm in model.norms.items():
            norm.rows, norm.running = self.lane, norm.untaught(self.device)
            network.statistics[name] = norm.running
        network.emas = [Ema(network.weights, network.statistics) for _ in self.ema.momenta]
        return network

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def _fresh(self, structure: Structure) -> dict[str, Tensor]:
        """timm's own initialization of a whole network on the host, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + self.growths)
            return dict[str, Tensor](self.family(self.model, structure).named_parameters())

    # ---- one step

    def forward(
        self,
        images: Tensor,
        active: Active | None = None,
        drop: Tensor | None = None,
        kept: Tensor | None = None,
        mixed: TokenMix | None = None,
    ) -> Any:
        """(B, C, H, W) images of this rank -> (B, classes) logits, or in training what the family's `loss` takes; see
        `ElasticModel.forward`."""
        active = active or self.network.model.all_active()
        return self.network.forward(self.prepare_forward(images, active), active, drop, kept, mixed)

    def prepare_forward(self, images: Tensor, active: Active) -> Tensor:
        """Readies the engine for a forward pass through the layers `active`; returns the images that it takes."""
        return images

    def step(self, lr: float, step: int) -> Tensor:
        """Takes one AdamW step on the gradients since the last step, then updates every EMA.

        If the gradients' norm is not finite, nothing changes. The device decides that, so nothing waits for it.

        Args:
            lr: the learning rate.
            step: how many optimizer steps the weights have been trained for before this one.

        Returns:
            The norm of the gradients before clipping, 0-D.
        """
        norm = self.update(lr)
        weights = list(self.network.weights.values())
        statistics = list(self.network.statistics.values())
        skipped = (~norm.isfinite()).float().to(weights[0].device)  # offloaded weights: the host reads it at once
        self._follow_batches(skipped)
        for momentum, ema in zip(self.ema.momenta, self.network.emas, strict=True):
            ema.update(weights, statistics, momentum_of(momentum, step, self.ema.warmup), skipped)
        return norm

    def _follow_batches(self, skipped: Tensor) -> None:
        """Moves the running statistics toward those of all lanes of the step, unless it was skipped."""
        norms = self.network.model.norms.values()
        if not norms:
            return
        seen = torch.cat([norm.take_mean().flatten() for norm in norms])
        with self.waits:
            dist.all_reduce(seen)
        parts = seen.div_(dist.get_world_size()).split([2 * norm.num_features for norm in norms])
        for norm, part in zip(norms, parts):
            moved = norm.running.lerp(part.view(2, -1), norm.momentum or 0.0)
            norm.running.copy_(torch.where(skipped.to(moved.device) > 0, norm.running, moved))

    # ---- weights and state

    @contextmanager
    def weights(self, ema: int | None) -> Iterator[None]:
        """Inside the block, the model is in inference mode with the weights of EMA number `ema` (None: online)."""
        network = self.network
        network.model.eval()
        try:
            with self._exchanged(ema), torch.no_grad():
                yield
        finally:
            network.model.train()
            self.refresh_compute_weights(changed=ema is not None)

    @contextmanager
    def _exchanged(self, ema: int | None) -> Iterator[None]:
        if ema is None:
            yield
            return
        network = self.network
        pair = (
            [*network.weights.values(), *network.statistics.values()],
            [*network.emas[ema].weights.values(), *network.emas[ema].statistics.values()],
        )
        self._await_gathers()
        _exchange(*pair)
        self.refresh_compute_weights()
        try:
            yield
        finally:
            self._await_gathers()
            _exchange(*pair)

    def _await_gathers(self) -> None:
        """Waits for the device if it may still be copying offloaded weights, which the host is about to change."""
        if self.sharding.offload and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> dict[str, LocalSlice]:
        """This rank's part of everything that a checkpoint must hold, by name; writing into it restores the network.

        Names and whole tensors are the same on any number of ranks.
        """
        network = self.network

        def part(name: str, tensor: Tensor) -> LocalSlice:
            placement = network.placements[name]
            return LocalSlice(tensor, placement.local(self._rank).start, placement.numel)

        state = {f"online/{name}": part(name, tensor) for name, tensor in network.weights.items()}
        for i, ema in enumerate(network.emas):
            state |= {f"ema.{i}/{name}": part(name, tensor) for name, tensor in ema.weights.items()}
        every = {"online": network.statistics} | {f"ema.{i}": ema.statistics for i, ema in enumerate(network.emas)}
        for of, statistics in every.items():
            state |= {f"{of}.statistics/{name}": LocalSlice.whole(tensor) for name, tensor in statistics.items()}
        for name, moments in network.moments.items():
            state |= {f"{key}/{name}": part(name, moments[key]) for key in MOMENTS}
            state[f"step/{name}"] = LocalSlice.whole(moments["step"])
        return state


class _Unwritten(TorchFunctionMode):
    """Skips the writes of an initialization: they take time, even though tensors on the meta device have no values."""

    WRITES = frozenset(
        getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "erfinv", "mul", "add", "clamp", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.WRITES else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Origin:
    """Where one parameter's value comes from: the online or EMA weights of an old parameter, or none (`source` None).

    A `closed` gate starts at 0; every other parameter without a source is fresh.
    """

    source: str | None
    weights: Weights
    closed: bool


def _origin(model: ElasticModel, name: str, layer_map: LayerMap) -> _Origin:
    place = model.locate(name)
    if place is None:
        return _Origin(None if layer_map.rest == "fresh" else name, layer_map.rest, closed=False)
    group, position, inner = place
    origin = layer_map.groups[group][position]
    closed = origin.gate == 0 and inner.endswith(".gate")
    source = None if origin.source is None else f"net.{model.layer_groups[group]}.{origin.source}.{inner}"
    return _Origin(None if closed else source, origin.weights, closed)


@torch.no_grad()
def _fill(tensors: Iterable[Tensor], value: float) -> None:
    for tensor in tensors:
        tensor.fill_(value)


@torch.no_grad()
def _fill_from(targets: Iterable[Tensor], whole: Tensor, part: range) -> None:
    for target in targets:
        target.copy_(whole.flatten()[part.start : part.stop])


@torch.no_grad()
def _exchange(left: Iterable[Tensor], right: Iterable[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
