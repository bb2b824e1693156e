"""FSDP2 and HSDP: parameters, gradients, moments, and EMAs sharded over ranks, with each layer as one unit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.ranks.coordinator import ranks_per_node
from scaleprog.ranks.rendezvous import limit_as_world
from scaleprog.ranks.waits import Waits
from scaleprog.recipe.numbers import ceil_div
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.placement import Placement


class FsdpBackend(NativeBackend):
    """Applies fully_shard to every layer and to the root. A growth copies only within a rank: ranks send 0 bytes.

    A step gathers each active layer twice (once with `reshard_after_forward: false`) and reduces its gradient once;
    skipped layers cause no communication. Under HSDP, the copies then average their reduced shards.

    With `gather: model`, the network is one unit, because FSDP2 takes the host milliseconds for each unit of a step. It
    is gathered once a step, with its skipped layers, and the gradients of active layers are reduced together.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        world = dist.get_world_size()
        ranks = self.sharding.shard_ranks(world, ranks_per_node())
        if self.sharding.engine == "hsdp":
            mesh = init_device_mesh(self.device.type, (world // ranks, ranks), mesh_dim_names=("replicate", "shard"))
            self.group = mesh["shard"].get_group()
            for group in mesh.get_all_groups():
                limit_as_world(group)
        else:
            mesh = init_device_mesh(self.device.type, (world,))
            self.group = mesh.get_group()
        policy, offload = MixedPrecisionPolicy(), OffloadPolicy()
        if self.sharding.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.sharding.offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        self._shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
        copies = self.sharding.engine == "hsdp"
        if self.device.type == "cuda":  # there, computation overlaps most of the time in collectives
            self.waits = Waits(self.device, known=False)
        self._gather, self._reduce = _Gather(self.waits), _Reduce(self.waits, ends=not copies)
        self._prefetched: Active | None = None

    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:
        self._by_layer = self.sharding.gather == "layer"
        with _one_empty_chunk():
            for layer in chain.from_iterable(model.groups()) if self._by_layer else ():
                self._shard(layer, reshard_after_forward=self.sharding.reshard_after_forward)
            self._shard(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._measure(module)
        model.to_empty(device="cpu" if self.sharding.offload else self.device)
        self._prefetched = None
        return model

    def _measure(self, module: FSDPModule) -> None:
        """Has `waits` measure the collectives of one unit."""
        module.set_custom_all_gather(self._gather)
        module.set_custom_reduce_scatter(self._reduce)
        if self.sharding.engine == "hsdp":
            module.set_all_reduce_hook(lambda gradient: self.waits.end())  # FSDP2 calls it after its own all-reduce

    def placement(self, parameter: nn.Parameter) -> Placement:
        rows = ceil_div(parameter.shape[0], dist.get_world_size(self.group))
        return Placement(parameter.numel(), max(1, rows * (parameter.numel() // parameter.shape[0])))

    def prepare_forward(self, images: Tensor, active: Active) -> Tensor:
        if self._by_layer and active != self._prefetched:
            _prefetch(self.network.model, active)
            self._prefetched = active
        return images

    def refresh_compute_weights(self, changed: bool = True) -> None:
        # after a forward without backward, FSDP keeps the root's parameters gathered
        for module in self.network.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def _one_empty_chunk() -> Iterator[None]:
    """Has FSDP2 make one empty chunk of a parameter for all ranks that get none of its rows, not one for each of them.

    FSDP2 looks at the chunks of two ranks only. On 4,096 ranks, the others took most of the seconds of a growth.
    """

    def chunks(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
        full = list(tensor.chunk(num_chunks, dim))
        return full + [full[0].new_empty(0)] * (num_chunks - len(full))

    replaced, _fsdp_param._chunk_with_empty = _fsdp_param._chunk_with_empty, chunks
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = replaced


class _Gather(DefaultAllGather):
    """FSDP2's own all-gather, measured."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def __call__(self, *arguments: Any, **named: Any) -> dist.Work | None:
        with self._waits:
            return super().__call__(*arguments, **named)


class _Reduce(DefaultReduceScatter):
    """FSDP2's own reduce-scatter, measured; `ends`: whether nothing follows it that has to be measured, too."""

    def __init__(self, waits: Waits, ends: bool) -> None:
        self._waits, self._ends = waits, ends

    def __call__(self, *arguments: Any, **named: Any) -> dist.Work | None:
        self._waits.begin()
        work = super().__call__(*arguments, **named)
        if self._ends:
            self._waits.end()
        return work


def _prefetch(model: ElasticModel, active: Active) -> None:
    """Makes FSDP gather each active layer while the previous one computes, in forward and in backward."""
    groups = zip(model.groups(), active, strict=True)
    layers = [cast(FSDPModule, group[position]) for group, positions in groups for position in positions]
    cast(FSDPModule, model).set_modules_to_forward_prefetch(layers[:1])
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    if layers:
        layers[-1].set_modules_to_forward_prefetch([])
        layers[0].set_modules_to_backward_prefetch([])
