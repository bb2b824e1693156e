"""Every rank holds the whole model: one process alone, or DistributedDataParallel."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.spread import Spread


class ReplicatedBackend(NativeBackend):
    """The unsharded reference that every other engine is held against."""

    def wrap(self, model: ElasticModel, elastic: bool) -> Callable[..., Tensor]:
        model.to_empty(device=self.device)
        if dist.get_world_size() == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=elastic,
            init_sync=False,  # weights are copied afterwards, the same on every rank
        )

    def spread(self, parameter: nn.Parameter) -> Spread:
        return Spread.whole(parameter.numel())

    def forward(
        self, images: Tensor, active: Active | None = None, drop: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.sharding.precision == "bf16"):
            return super().forward(images, active, drop, kept)

    def settle(self, changed: bool = True) -> None:
        pass
