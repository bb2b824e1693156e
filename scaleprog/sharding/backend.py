"""The contract between training and what spreads a model over ranks: wrap, step, regrow, EMA, state in and out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.growth.operators import LayerMap, Weights
from scaleprog.models.elastic import Active, ElasticModel, ModelSettings, Structure
from scaleprog.optim import MOMENTS, OptimizerSettings, build_optimizer
from scaleprog.sharding.ema import Ema, EmaSettings, shards
from scaleprog.sharding.settings import ShardingSettings


@dataclass
class Network:
    """A wrapped model and everything that follows it, as one backend holds it: all tensors by full parameter name."""

    structure: Structure
    elastic: ElasticModel  # the model itself
    wrapped: nn.Module  # what is called: the model, or what an engine put around it
    parameters: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    emas: list[Ema]


class Backend(ABC):
    """One elastic model, its AdamW and its momentum networks, spread over the ranks of the default process group.

    A subclass says how a model is wrapped; layer maps, steps and state are the same for all engines that keep
    parameters as plain tensors or DTensors. There is no network until the first `regrow` or `rebuild`.
    """

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

    @abstractmethod
    def wrap(self, model: ElasticModel, elastic: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        """Gives the meta-device `model` storage on this rank's device and its place among the ranks.

        Returns what is to be called and the parameters by name; their values are still undefined. `elastic`: steps may
        skip layers, on all ranks alike.
        """

    @abstractmethod
    def settle(self) -> None:
        """Forgets whatever the engine cached of the parameters' values, before or after they change outside a step."""

    @property
    def network(self) -> Network:
        """The present network."""
        assert self._network is not None, "no network yet: regrow or rebuild first"
        return self._network

    # ---- growth

    def regrow(self, layer_map: LayerMap, *, inherit: bool, elastic: bool) -> None:
        """Replaces the network by the one that `layer_map` describes, without communication.

        Online weights come from where the map says; every EMA grows from itself by the same map; AdamW starts anew, or
        with `inherit` takes the moments of each layer's source. Without a network all of `layer_map` must be fresh.
        """
        old = self._network
        structure = old.structure.after(layer_map) if old else Structure.plain(layer_map.depths)
        self.growths += 1
        new = self.rebuild(structure, elastic)
        fresh = self._fresh(structure) if _has_fresh(layer_map) else {}
        for name, target in new.parameters.items():
            weights, source, closed = self._source(name, layer_map)
            followers = [ema.weights[name] for ema in new.emas]
            if closed:
                _fill([target, *followers], 0.0)
            elif source is None:
                for tensor in (target, *followers):
                    _copy_full(tensor, fresh[name])
            else:
                assert old is not None, "the first network must be fresh"
                online = old.emas[self.ema.grow_from].weights if weights == "ema" else old.parameters
                _copy([target, *followers], [online[source], *(ema.weights[source] for ema in old.emas)])
                if inherit:
                    mine, theirs = new.optimizer.state[target], old.optimizer.state[old.parameters[source]]
                    _copy([mine[key] for key in mine], [theirs[key] for key in mine])

    def rebuild(self, structure: Structure, elastic: bool) -> Network:
        """Builds a network of `structure` whose weights are NaN, so that one that nobody fills fails loudly."""
        with torch.device("meta"):
            model = self.family(self.model, structure)
        wrapped, parameters = self.wrap(model, elastic)
        _fill(parameters.values(), float("nan"))
        optimizer = build_optimizer(parameters, model.no_weight_decay(), self.optimizer)
        emas = [Ema(momentum, parameters) for momentum in self.ema.momenta]
        self._network = Network(structure, model, wrapped, parameters, optimizer, emas)
        return self._network

    def _source(self, name: str, layer_map: LayerMap) -> tuple[Weights, str | None, bool]:
        """Which weights of which old parameter a new one takes (None: fresh), and whether it is a closed gate."""
        place = self.network.elastic.locate(name)
        if place is None:
            return layer_map.rest, None if layer_map.rest == "fresh" else name, False
        group, position, inner = place
        origin = layer_map.groups[group][position]
        closed = origin.gate == 0 and inner.endswith(".gate")
        source = None if origin.source is None else f"net.{self.family.layer_groups[group]}.{origin.source}.{inner}"
        return origin.weights, source, closed

    def _fresh(self, structure: Structure) -> Mapping[str, Tensor]:
        """timm's own initialisation of a whole network on the host, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + self.growths)
            return dict(self.family(self.model, structure).named_parameters())

    # ---- one step

    def forward(self, images: Tensor, active: Active | None = None, drop: Tensor | None = None) -> Tensor:
        """(B, C, H, W) images of this rank -> (B, classes) logits; see `ElasticModel.forward`."""
        return self.network.wrapped(images, active, drop)

    def step(self, lr: float) -> Tensor:
        """One AdamW step on the gradients of the last backward, then every EMA follows. Returns the gradient norm, 0-d.

        Layers that took no part have zero gradients: their moments decay and weight decay acts, in every engine.
        """
        network = self.network
        for parameter in network.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = get_total_norm([p.grad for p in network.parameters.values() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.optimizer.clip is not None:
            clip_grads_with_norm_(network.parameters.values(), self.optimizer.clip, norm)
        for group in network.optimizer.param_groups:
            group["lr"] = lr
        network.optimizer.step()
        parameter_shards = shards(network.parameters.values())
        for ema in network.emas:
            ema.update(parameter_shards)
        network.optimizer.zero_grad()
        return norm

    # ---- weights and state

    @contextmanager
    def weights(self, ema: int | None) -> Iterator[None]:
        """For inference inside the block: the weights of momentum network `ema` in place of the online ones (None)."""
        network = self.network
        network.wrapped.eval()
        try:
            with self._exchanged(ema), torch.no_grad():
                yield
        finally:
            network.wrapped.train()
            self.settle()

    @contextmanager
    def _exchanged(self, ema: int | None) -> Iterator[None]:
        if ema is None:
            yield
            return
        pair = shards(self.network.parameters.values()), shards(self.network.emas[ema].weights.values())
        _exchange(*pair)
        self.settle()
        try:
            yield
        finally:
            _exchange(*pair)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that must survive, by name; writing into them restores it. Sharded ones are DTensors."""
        network = self.network
        state = {f"online/{name}": p.detach() for name, p in network.parameters.items()}
        for i, ema in enumerate(network.emas):
            state |= {f"ema.{i}/{name}": weight for name, weight in ema.weights.items()}
        for name, parameter in network.parameters.items():
            state |= {f"{key}/{name}": network.optimizer.state[parameter][key] for key in (*MOMENTS, "step")}
        return state

    def gather(self, ema: int | None) -> dict[str, Tensor]:
        """The whole weights (online, or of momentum network `ema`) on the host of rank 0; empty elsewhere."""
        network = self.network
        source = network.parameters if ema is None else network.emas[ema].weights
        whole = {}
        for name, tensor in source.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if torch.distributed.get_rank() == 0:
                whole[name] = full.detach().cpu().clone()
        return whole


def _has_fresh(layer_map: LayerMap) -> bool:
    return layer_map.rest == "fresh" or any(o.source is None for group in layer_map.groups for o in group)


@torch.no_grad()
def _fill(tensors: Iterable[Tensor], value: float) -> None:
    for shard in shards(tensors):
        shard.fill_(value)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(shards(targets), shards(sources), strict=True):
        target.copy_(source)


@torch.no_grad()
def _copy_full(target: Tensor, whole: Tensor) -> None:
    """Fills this rank's shard of `target` from the whole tensor that every rank holds."""
    if isinstance(target, DTensor):
        whole = torch.distributed.tensor.distribute_tensor(
            whole.detach().to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    _copy([target], [whole])


@torch.no_grad()
def _exchange(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
