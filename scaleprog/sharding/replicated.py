"""Every rank holds the whole model: one process alone, or DistributedDataParallel."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.placement import Placement


class ReplicatedBackend(NativeBackend):
    """The unsharded reference for every other engine."""

    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:
        model.to_empty(device=self.device)
        if dist.get_world_size() == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=may_skip_layers,
            init_sync=False,  # the backend then writes the same weights on every rank
        )

    def placement(self, parameter: nn.Parameter) -> Placement:
        return Placement.whole(parameter.numel())

    def forward(
        self, images: Tensor, active: Active | None = None, drop: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.sharding.precision == "bf16"):
            return super().forward(images, active, drop, kept)

    def refresh_compute_weights(self, changed: bool = True) -> None:
        pass
