"""FSDP2: parameters, gradients, moments and EMA sharded over all ranks, one unit a layer."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from scaleprog.models.elastic import ElasticModel
from scaleprog.sharding.backend import Backend


class FsdpBackend(Backend):
    """fully_shard around every layer and the root. A regrowth rebuilds and copies local shards: 0 bytes on the wire."""

    _mesh: torch.distributed.device_mesh.DeviceMesh | None = None

    def wrap(self, model: ElasticModel, elastic: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if self.sharding.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for group in model.groups():
            for layer in group:
                fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(model, mesh=self._mesh, mp_policy=policy)
        model.to_empty(device=self.device)
        return model, dict(model.named_parameters())

    def settle(self) -> None:
        # after a forward without backward, FSDP keeps the root's parameters gathered
        for module in self.network.elastic.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
