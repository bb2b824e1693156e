"""Every rank holds the whole model: one process alone, or several that average their gradients."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.placement import Placement


class ReplicatedBackend(NativeBackend):
    """The unsharded reference for every other engine.

    Ranks average their gradients once a step, in one flat buffer. DistributedDataParallel would overlap that with the
    backward; but it lays its buckets out anew after the first step, and on more than two ranks another layout adds in
    another order, so that a resumed run would differ from a straight one.
    """

    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:  # noqa: ARG002
        model.to_empty(device=self.device)
        return model

    def placement(self, parameter: nn.Parameter) -> Placement:
        return Placement.whole(parameter.numel())

    def forward(
        self, images: Tensor, active: Active | None = None, drop: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.sharding.precision == "bf16"):
            return super().forward(images, active, drop, kept)

    def average(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        world = dist.get_world_size()
        if world == 1:
            return gradients
        flat = torch.cat(gradients).div_(world)
        dist.all_reduce(flat)
        return flat.split([gradient.numel() for gradient in gradients])

    def refresh_compute_weights(self, changed: bool = True) -> None:
        pass
