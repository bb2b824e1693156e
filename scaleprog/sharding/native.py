"""What torch's own engines have in common: parameters are tensors or DTensors, and torch's AdamW steps them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.models.elastic import ElasticModel
from scaleprog.sharding.backend import Backend, Network
from scaleprog.sharding.optimizer import adamw, alike, moments
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
        weights = {name: _local_elements(parameter.detach()) for name, parameter in parameters.items()}
        # AdamW steps plain tensors of this rank's elements: with DTensors, most of a step would be dispatch
        self._pairs = [(parameters[name], weights[name]) for name in parameters]
        groups = alike(shapes, model.no_weight_decay(), self.optimizer, steps)
        self._adamw = adamw(groups, weights, self.optimizer)
        state = {name: moments(weights[name], group.steps) for group in groups for name in group.names}
        self._adamw.state.update({weights[name]: tensors for name, tensors in state.items()})
        return Network(
            model,
            forward,
            shapes,
            placements={name: self.placement(parameter) for name, parameter in parameters.items()},
            weights=weights,
            moments={name: state[name] for name in parameters},
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def average(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        """The gradients of this rank's elements, averaged over ranks; most engines have done that in the backward."""
        return gradients

    @torch.no_grad()  # else autograd records that each gradient leaves its DTensor
    def update(self, lr: float) -> Tensor:
        optimizer, weights = self._adamw, [weight for _, weight in self._pairs]
        gradients = []
        for parameter, weight in self._pairs:
            gradients.append(torch.zeros_like(weight) if parameter.grad is None else _local_elements(parameter.grad))
            parameter.grad = None
        for weight, gradient in zip(weights, self.average(gradients), strict=True):
            weight.grad = gradient
        del gradients
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
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


def _local_elements(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, 1-D; they share its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
