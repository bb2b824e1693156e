"""What torch's own engines have in common: parameters are tensors or DTensors, and torch's AdamW steps them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.models.elastic import ElasticModel
from scaleprog.sharding.backend import Backend, Network
from scaleprog.sharding.optimizer import MOMENTS, adamw, alike, moments
from scaleprog.sharding.placement import Placement


class NativeBackend(Backend):
    """Keeps the model's own parameters: this rank holds all or part of each, with its gradient and moments."""

    @abstractmethod
    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:
        """Gives the meta-device `model` storage on this rank, and returns the callable that runs its forward."""

    @abstractmethod
    def placement(self, parameter: nn.Parameter) -> Placement:
        """How a parameter of a wrapped model is sharded over `group`."""

    def build(self, model: ElasticModel, steps: Mapping[str, float], may_skip_layers: bool) -> Network:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        forward = self.wrap(model, may_skip_layers)
        parameters = dict(model.named_parameters())
        # AdamW steps plain tensors of this rank's elements: with DTensors, most of a step would be dispatch
        own = {name: _local(parameter) for name, parameter in parameters.items()}
        self._pairs = [(parameters[name], own[name]) for name in parameters]
        groups = alike(shapes, model.no_weight_decay(), self.optimizer, steps)
        self._adamw = adamw(groups, own, self.optimizer)
        state = {name: moments(own[name], group.steps) for group in groups for name in group.names}
        self._adamw.state.update({own[name]: tensors for name, tensors in state.items()})
        return Network(
            model,
            forward,
            shapes,
            placements={name: self.placement(parameter) for name, parameter in parameters.items()},
            weights={name: tensor.detach().view(-1) for name, tensor in own.items()},
            moments={
                name: {key: tensor.view(-1) if key in MOMENTS else tensor for key, tensor in state[name].items()}
                for name in parameters
            },
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def average(self, weights: list[Tensor]) -> None:
        """Averages the gradients of this rank's `weights` over ranks."""

    @torch.no_grad()  # else autograd records that each gradient leaves its DTensor
    def update(self, lr: float) -> Tensor:
        optimizer, weights = self._adamw, [own for _, own in self._pairs]
        for parameter, own in self._pairs:
            if own is not parameter and parameter.grad is not None:
                own.grad, parameter.grad = _local(parameter.grad), None
            if own.grad is None:
                own.grad = torch.zeros_like(own)
        self.average(weights)
        norm = get_total_norm([own.grad for own in weights if own.grad is not None])
        if self.group is not None:  # so far, the norm covers this rank's elements only
            squared = norm**2
            with self.waits:
                dist.all_reduce(squared, group=self.group)
            norm = squared.sqrt()
        if self.optimizer.clip is not None:
            clip_grads_with_norm_(weights, self.optimizer.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = (~norm.isfinite()).float()  # torch's fused AdamW then leaves everything as it is
        optimizer.step()
        optimizer.zero_grad()
        return norm


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: itself if it is no DTensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
