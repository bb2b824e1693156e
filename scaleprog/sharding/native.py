"""What engines of torch itself have in common: parameters are tensors or DTensors, stepped by torch's AdamW."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.models.elastic import ElasticModel
from scaleprog.optim import adamw, alike, moments
from scaleprog.sharding.backend import Backend, Network
from scaleprog.sharding.spread import Spread


class NativeBackend(Backend):
    """Parameters stay those of the model, each wholly or in part on this rank, with its gradient and moments beside."""

    @abstractmethod
    def wrap(self, model: ElasticModel, elastic: bool) -> Callable[..., Tensor]:
        """Gives the meta-device `model` storage on this rank and returns what is to be called."""

    @abstractmethod
    def spread(self, parameter: nn.Parameter) -> Spread:
        """How a parameter of a wrapped model is spread over `group`."""

    def build(self, model: ElasticModel, steps: Mapping[str, float], elastic: bool) -> Network:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        forward = self.wrap(model, elastic)
        parameters = dict(model.named_parameters())
        weights = {name: _elements(parameter) for name, parameter in parameters.items()}
        # AdamW sees this rank's elements: a step on DTensors spends most of its time on dispatching them
        self._pairs = [(parameters[name], weights[name]) for name in parameters]
        groups = alike(shapes, model.no_weight_decay(), self.optimizer, steps)
        self._adamw = adamw(groups, weights, self.optimizer)
        state = {name: moments(weights[name], group.steps) for group in groups for name in group.names}
        self._adamw.state.update({weights[name]: tensors for name, tensors in state.items()})
        return Network(
            model,
            forward,
            shapes,
            spreads={name: self.spread(parameter) for name, parameter in parameters.items()},
            weights=weights,
            moments={name: state[name] for name in parameters},
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> Tensor:
        optimizer, weights = self._adamw, [weight for _, weight in self._pairs]
        for parameter, weight in self._pairs:
            weight.grad = torch.zeros_like(weight) if parameter.grad is None else _elements(parameter.grad)
            parameter.grad = None
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.group is not None:  # of this rank's elements only
            squared = norm**2
            dist.all_reduce(squared, group=self.group)
            norm = squared.sqrt()
        if self.optimizer.clip is not None:
            clip_grads_with_norm_(weights, self.optimizer.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return norm


def _elements(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, 1-D; writing into them writes into it."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
