"""Every rank holds the whole model: one process alone, or DistributedDataParallel."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.sharding.backend import Backend


class ReplicatedBackend(Backend):
    """The unsharded reference that every other engine is held against."""

    def wrap(self, model: ElasticModel, elastic: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        model.to_empty(device=self.device)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        if dist.get_world_size() == 1:
            return model, parameters
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=elastic,
            init_sync=False,  # weights are copied afterwards, the same on every rank
        )
        return wrapped, parameters

    def forward(self, images: Tensor, active: Active | None = None, drop: Tensor | None = None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.sharding.precision == "bf16"):
            return super().forward(images, active, drop)

    def settle(self) -> None:
        pass
