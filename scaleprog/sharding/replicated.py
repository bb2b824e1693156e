"""Every rank holds the whole model: one process alone, or several that average their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from scaleprog.models.elastic import ElasticModel
from scaleprog.sharding.native import NativeBackend
from scaleprog.sharding.placement import Placement


class ReplicatedBackend(NativeBackend):
    """The unsharded reference for every other engine.

    Ranks average their gradients once a step, in one flat buffer. DistributedDataParallel would overlap that with the
    backward; but it lays its buckets out anew after the first step, and on more than two ranks another layout adds in
    another order, so that a resumed run would differ from a straight one.
    """

    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:
        model.to_empty(device=self.device)
        return partial(_in_bf16, model) if self.sharding.precision == "bf16" else model

    def placement(self, parameter: nn.Parameter) -> Placement:
        return Placement.whole(parameter.numel())

    def average(self, weights: list[Tensor]) -> None:
        world = dist.get_world_size()
        if world == 1:
            return
        flat = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).div_(world)
        with self.waits:
            dist.all_reduce(flat)
        for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.grad = part.view_as(weight)

    def refresh_compute_weights(self, changed: bool = True) -> None:
        pass


def _in_bf16(model: ElasticModel, images: Tensor, *arguments: Any) -> Tensor:
    """The model's forward with bf16 copies of its fp32 parameters, through which their gradients flow back."""
    copies = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    return functional_call(model, copies, (images.bfloat16(), *arguments))
