"""What engines of torch itself have in common: parameters are tensors or DTensors, stepped by torch's AdamW."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.models.elastic import ElasticModel
from scaleprog.optim import MOMENTS, adamw, alike, moments
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
        self._parameters = list(parameters.values())
        groups = alike(shapes, model.no_weight_decay(), self.optimizer, steps)
        self._adamw = adamw(groups, parameters, self.optimizer)
        state = {name: moments(parameters[name], group.steps) for group in groups for name in group.names}
        self._adamw.state.update({parameters[name]: tensors for name, tensors in state.items()})
        return Network(
            model,
            forward,
            shapes,
            spreads={name: self.spread(parameter) for name, parameter in parameters.items()},
            weights={name: _elements(parameter) for name, parameter in parameters.items()},
            moments={
                name: {key: _elements(state[name][key]) for key in MOMENTS} | {"step": state[name]["step"]}
                for name in parameters
            },
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> Tensor:
        optimizer, parameters = self._adamw, self._parameters
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.optimizer.clip is not None:
            clip_grads_with_norm_(parameters, self.optimizer.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return norm


def _elements(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, 1-D; writing into them writes into it."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
