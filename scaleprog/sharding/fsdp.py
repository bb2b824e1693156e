"""FSDP2 and HSDP: parameters, gradients, moments and EMA sharded over ranks, one unit a layer."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.sharding.coordinator import ranks_per_node
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.spread import Spread


class FsdpBackend(NativeBackend):
    """fully_shard around every layer and the root. A regrowth rebuilds and copies local shards: 0 bytes on the wire.

    A step gathers each active layer twice (once with `reshard_after_forward: false`) and reduces its gradient once;
    inactive layers communicate nothing. Under HSDP the reduced shards are then averaged across the copies.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        world = dist.get_world_size()
        ranks = self.sharding.shard_ranks(world, ranks_per_node())
        if self.sharding.engine == "hsdp":
            mesh = init_device_mesh(self.device.type, (world // ranks, ranks), mesh_dim_names=("replicate", "shard"))
            self.group = mesh["shard"].get_group()
        else:
            mesh = init_device_mesh(self.device.type, (world,))
            self.group = mesh.get_group()
        policy, offload = MixedPrecisionPolicy(), OffloadPolicy()
        if self.sharding.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.sharding.offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        self._shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
        self._prefetched: Active | None = None

    def wrap(self, model: ElasticModel, elastic: bool) -> Callable[..., Tensor]:
        for group in model.groups():
            for layer in group:
                self._shard(layer, reshard_after_forward=self.sharding.reshard_after_forward)
        self._shard(model)
        model.to_empty(device="cpu" if self.sharding.offload else self.device)
        self._prefetched = None
        return model

    def spread(self, parameter: nn.Parameter) -> Spread:
        rows = -(-parameter.shape[0] // dist.get_world_size(self.group))
        return Spread(parameter.numel(), max(1, rows * (parameter.numel() // parameter.shape[0])))

    def forward(
        self, images: Tensor, active: Active | None = None, drop: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        elastic = self.network.elastic
        active = active or elastic.all_active()
        if active != self._prefetched:
            _prefetch(elastic, active)
            self._prefetched = active
        return super().forward(images, active, drop, kept)

    def settle(self, changed: bool = True) -> None:
        # after a forward without backward, FSDP keeps the root's parameters gathered
        for module in self.network.elastic.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _prefetch(model: ElasticModel, active: Active) -> None:
    """Has each active layer gathered while the one before it computes, in forward and in backward."""
    groups = zip(model.groups(), active, strict=True)
    layers = [cast(FSDPModule, group[position]) for group, positions in groups for position in positions]
    cast(FSDPModule, model).set_modules_to_forward_prefetch(layers[:1])
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    if layers:
        layers[-1].set_modules_to_forward_prefetch([])
        layers[0].set_modules_to_backward_prefetch([])
