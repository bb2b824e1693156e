"""The contract between training and what spreads a model over ranks: build, step, regrow, EMA, state in and out."""

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
from scaleprog.models.elastic import Active, ElasticModel, ModelSettings, Structure
from scaleprog.optim import MOMENTS, OptimizerSettings
from scaleprog.sharding.ema import Ema, EmaSettings
from scaleprog.sharding.settings import ShardingSettings
from scaleprog.sharding.spread import Part, Spread, move

Moments = dict[str, Tensor]
"""AdamW's state of one parameter: `exp_avg` and `exp_avg_sq`, this rank's elements, 1-D; `step`, 0-d."""


@dataclass
class Network:
    """A model that an engine has spread over the ranks, and everything that follows it, by full parameter name.

    Tensors are fp32, 1-D, and hold this rank's elements, as `spreads` says; writing into them changes the network.
    """

    elastic: ElasticModel  # the model itself
    forward: Callable[..., Tensor]  # the model, or what an engine put around it
    shapes: dict[str, torch.Size]
    spreads: dict[str, Spread]
    weights: dict[str, Tensor]
    moments: dict[str, Moments]
    emas: list[Ema] = field(default_factory=list)


class Load(Protocol):
    """Writes what was saved into `parts`: everything, or with `subset` some of it."""

    def __call__(self, parts: Mapping[str, Part], subset: bool = False) -> None: ...


class Backend(ABC):
    """One elastic model, its AdamW and its momentum networks, spread over the ranks of the default process group.

    A subclass says where parameters lie and how a step is taken; layer maps, EMA and state are the same for all
    engines. There is no network until the first `regrow` or `restore`.
    """

    group: dist.ProcessGroup | None = None
    """The ranks that one copy of the network is spread over; None: each rank has it whole."""

    def __init__(
        self,
        family: type[ElasticModel],
        model: ModelSettings,
        optimizer: OptimizerSettings,
        ema: EmaSettings,
        sharding: ShardingSettings,
        device: torch.device,
        seed: int,
    ) -> None:
        self.family, self.model, self.optimizer, self.ema, self.sharding = family, model, optimizer, ema, sharding
        self.device = device
        self.seed = seed
        self.growths = 0  # networks built so far; fresh layers draw from (seed, growths)
        self._network: Network | None = None

    # ---- what an engine is

    @abstractmethod
    def build(self, model: ElasticModel, steps: Mapping[str, float], elastic: bool) -> Network:
        """Gives the meta-device `model` storage and its place among the ranks; no EMAs yet, values undefined.

        `steps`: AdamW steps behind each parameter's moments, 0 where not named; `elastic`: training steps may skip
        layers, on all ranks alike.
        """

    @abstractmethod
    def settle(self, changed: bool = True) -> None:
        """Makes the model compute with the weights as they are now, after a forward without a backward or (`changed`)
        after they changed outside a step; all ranks call it."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's `loss`, 0-d, to those since the last step; ranks are averaged."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """One clipped AdamW step on the gradients, which are then gone. Returns their norm, 0-d.

        Layers that took no part have zero gradients: their moments decay and weight decay acts, in every engine.
        """

    def release(self) -> None:  # noqa: B027 - most engines hold nothing
        """Lets go of whatever would outlive the network: it is about to be replaced."""

    # ---- growth

    @property
    def network(self) -> Network:
        """The present network."""
        assert self._network is not None, "no network yet: regrow or restore first"
        return self._network

    @property
    def compilations(self) -> int:
        """Graphs that torch.compile has made so far in this process; it stops growing when all variants were seen."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.sharding.compile else 0

    @property
    def structure(self) -> Structure:
        """The present network's structure."""
        return self.network.elastic.structure

    def regrow(self, layer_map: LayerMap, *, inherit: bool, elastic: bool) -> None:
        """Replaces the network by the one that `layer_map` describes.

        Online weights come from where the map says; every EMA grows from itself by the same map; AdamW starts anew, or
        with `inherit` takes the moments of each layer's source. Without a network all of `layer_map` must be fresh.
        Elements move between ranks only where the two networks are spread differently.
        """
        old = self._network
        structure = old.elastic.structure.after(layer_map) if old else Structure.plain(layer_map.depths)
        self.growths += 1
        model = self._on_meta(structure)
        origins = {name: _origin(model, name, layer_map) for name, _ in model.named_parameters()}
        steps = {}
        if old and inherit:
            steps = {n: float(old.moments[o.source]["step"]) for n, o in origins.items() if o.source is not None}
        new = self._replace(model, steps, elastic)
        fresh = self._fresh(structure) if any(o.source is None and not o.closed for o in origins.values()) else {}
        for name, origin in origins.items():
            targets = [new.weights[name], *(ema.weights[name] for ema in new.emas)]
            if origin.closed:
                _fill(targets, 0.0)
            elif origin.source is None:
                _fill_from(targets, fresh[name], new.spreads[name].part(self._rank))
            else:
                assert old is not None, "the first network must be fresh"
                source = origin.source
                online = old.emas[self.ema.grow_from].weights if origin.weights == "ema" else old.weights
                sources = [online[source], *(ema.weights[source] for ema in old.emas)]
                if inherit:
                    sources += [old.moments[source][key] for key in MOMENTS]
                    targets += [new.moments[name][key] for key in MOMENTS]
                move(sources, old.spreads[source], targets, new.spreads[name], self.group)
        self.settle()

    def restore(self, structure: Structure, elastic: bool, load: Load) -> None:
        """Replaces the network by one of `structure`; `load` writes its `state`, which is asked for twice."""
        model = self._on_meta(structure)
        steps = {name: torch.zeros(1) for name, _ in model.named_parameters()}
        # an engine may lay out by them
        load({f"step/{name}": Part.whole(step) for name, step in steps.items()}, subset=True)
        self._replace(model, {name: float(step) for name, step in steps.items()}, elastic)
        load(self.state())
        self.settle()

    def _on_meta(self, structure: Structure) -> ElasticModel:
        with torch.device("meta"), _Unwritten():
            model = self.family(self.model, structure)
        model.recompute = self.sharding.recompute
        if self.sharding.compile:
            for layer in chain.from_iterable(model.groups()):  # the code is that of one layer: compiled once for all
                layer.forward = torch.compile(layer.forward, dynamic=True)
        return model

    def _replace(self, model: ElasticModel, steps: Mapping[str, float], elastic: bool) -> Network:
        """A network whose weights are NaN, so that one that nobody fills fails loudly."""
        if self._network is not None:
            self.release()
        self._network = network = self.build(model, steps, elastic)
        _fill(network.weights.values(), float("nan"))
        network.emas = [Ema(momentum, network.weights) for momentum in self.ema.momenta]
        return network

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def _fresh(self, structure: Structure) -> Mapping[str, Tensor]:
        """timm's own initialisation of a whole network on the host, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + self.growths)
            return dict(self.family(self.model, structure).named_parameters())

    # ---- one step

    def forward(
        self, images: Tensor, active: Active | None = None, drop: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W) images of this rank -> (B, classes) logits; see `ElasticModel.forward`."""
        return self.network.forward(images, active, drop, kept)

    def step(self, lr: float) -> Tensor:
        """One AdamW step on the gradients since the last, then every EMA follows. Returns the gradient norm, 0-d."""
        norm = self.update(lr)
        weights = list(self.network.weights.values())
        for ema in self.network.emas:
            ema.update(weights)
        return norm

    # ---- weights and state

    @contextmanager
    def weights(self, ema: int | None) -> Iterator[None]:
        """For inference inside the block: the weights of momentum network `ema` in place of the online ones (None)."""
        network = self.network
        network.elastic.eval()
        try:
            with self._exchanged(ema), torch.no_grad():
                yield
        finally:
            network.elastic.train()
            self.settle(changed=ema is not None)

    @contextmanager
    def _exchanged(self, ema: int | None) -> Iterator[None]:
        if ema is None:
            yield
            return
        pair = self.network.weights.values(), self.network.emas[ema].weights.values()
        _exchange(*pair)
        self.settle()
        try:
            yield
        finally:
            _exchange(*pair)

    def state(self) -> dict[str, Part]:
        """Everything that must survive, by name, the same on any number of ranks; writing into it restores it."""
        network = self.network

        def part(name: str, tensor: Tensor) -> Part:
            spread = network.spreads[name]
            return Part(tensor, spread.part(self._rank).start, spread.numel)

        state = {f"online/{name}": part(name, tensor) for name, tensor in network.weights.items()}
        for i, ema in enumerate(network.emas):
            state |= {f"ema.{i}/{name}": part(name, tensor) for name, tensor in ema.weights.items()}
        for name, moments in network.moments.items():
            state |= {f"{key}/{name}": part(name, moments[key]) for key in MOMENTS}
            state[f"step/{name}"] = Part.whole(moments["step"])
        return state

    def gather(self, ema: int | None) -> dict[str, Tensor]:
        """The whole weights (online, or of momentum network `ema`) on the host of rank 0; empty elsewhere.

        They come one parameter at a time.
        """
        network = self.network
        source = network.weights if ema is None else network.emas[ema].weights
        if self.group is not None and 0 not in dist.get_process_group_ranks(self.group):
            return {}  # another copy than rank 0's
        gathered = {}
        for name, shape in network.shapes.items():
            spread, first = network.spreads[name], self._rank == 0
            whole = source[name].new_empty(spread.numel if first else 0)
            move([source[name]], spread, [whole], Spread.whole(spread.numel), self.group)
            if dist.get_rank() == 0:
                gathered[name] = whole.view(shape).cpu()
        return gathered


class _Unwritten(TorchFunctionMode):
    """Skips what initialisations write: tensors on the meta device have no values, yet it takes a while."""

    WRITES = frozenset(
        getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "erfinv", "mul", "add", "clamp", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.WRITES else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Origin:
    """Where one parameter's value comes from: an old parameter (None: none), its weights, or a closed gate."""

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
