"""What torch's own engines have in common: parameters are tensors or DTensors, and torch's AdamW steps them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scaleprog.models.elastic import ElasticModel
from scaleprog.sharding.backend import Backend, Network
from scaleprog.sharding.ema import Place
from scaleprog.sharding.optimizer import adamw, alike, moments
from scaleprog.sharding.placement import Placement

ALIGNED = 16
"""Where the elements of a parameter begin in its bundle: at a multiple of 64 bytes, as torch allocates tensors."""


class Bundle:
    """Parameters that AdamW and the EMAs treat as one tensor, because each tensor costs them time of its own."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Moves several parameters, which must be whole, into one new tensor; leaves a single one where it is."""
        self._parameters = parameters
        locals_ = [_local_elements(parameter.detach()) for parameter in parameters]
        self.parts: list[slice] = []
        """Where the elements of each parameter lie in `weight`."""
        self._gaps: list[Tensor] = []
        end = 0
        for elements in locals_:
            gap = -end % ALIGNED
            self._gaps.append(elements.new_zeros(gap))
            self.parts.append(slice(end + gap, end + gap + len(elements)))
            end = self.parts[-1].stop
        self.weight = locals_[0] if len(locals_) == 1 else locals_[0].new_zeros(end)
        """1-D: the elements that this rank holds."""
        if len(parameters) > 1:
            for parameter, part in zip(parameters, self.parts, strict=True):
                parameter.data = self.weight[part].view(parameter.shape)

    def take_gradient(self) -> Tensor:
        """Takes the gradients from the parameters: those of `weight`'s elements, 0 where there is none."""
        found: list[Tensor] = []
        for parameter, gap, part in zip(self._parameters, self._gaps, self.parts, strict=True):
            gradient, parameter.grad = parameter.grad, None
            own = torch.zeros_like(self.weight[part]) if gradient is None else _local_elements(gradient)
            found += (gap, own)
        return found[1] if len(found) == 2 else torch.cat(found)


class NativeBackend(Backend):
    """Keeps the model's own parameters: this rank holds all or part of each, with its gradient and moments."""

    @abstractmethod
    def wrap(self, model: ElasticModel, may_skip_layers: bool) -> Callable[..., Tensor]:
        """Gives the meta-device `model` storage on this rank, and returns the callable that runs its forward."""

    @abstractmethod
    def placement(self, parameter: nn.Parameter) -> Placement:
        """How a parameter of a wrapped model is sharded over `group`."""

    def bundles(self, shapes: Mapping[str, torch.Size]) -> Iterable[Sequence[str]]:
        """Which parameters of one AdamW group are stepped together; the others alone."""
        return ((name,) for name in shapes)

    def build(self, model: ElasticModel, steps: Mapping[str, float], may_skip_layers: bool) -> Network:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        forward = self.wrap(model, may_skip_layers)
        parameters = dict(model.named_parameters())
        # AdamW steps plain tensors of this rank's elements: with DTensors, most of a step would be dispatch
        self._bundles: dict[str, Bundle] = {}
        groups, state = [], {}
        places: dict[str, Place] = {}
        for group in alike(shapes, model.no_weight_decay(), self.optimizer, steps):
            together = list(self.bundles({name: shapes[name] for name in group.names}))
            groups.append(replace(group, names=tuple(first for first, *_ in together)))
            for names in together:
                self._bundles[names[0]] = bundle = Bundle([parameters[name] for name in names])
                places |= {name: (names[0], part) for name, part in zip(names, bundle.parts, strict=True)}
                state[names[0]] = moments(bundle.weight, group.steps)
        wholes = {first: bundle.weight for first, bundle in self._bundles.items()}
        self._adamw = adamw(groups, wholes, self.optimizer)
        self._adamw.state.update({wholes[first]: tensors for first, tensors in state.items()})
        return Network(
            model,
            forward,
            shapes,
            placements={name: self.placement(parameter) for name, parameter in parameters.items()},
            wholes=wholes,
            places={name: places[name] for name in parameters},
            whole_moments=state,
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def average(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        """The gradients of this rank's elements, averaged over ranks; most engines have done that in the backward."""
        return gradients

    @torch.no_grad()  # else autograd records that each gradient leaves its DTensor
    def update(self, lr: float) -> Tensor:
        optimizer, weights = self._adamw, [bundle.weight for bundle in self._bundles.values()]
        gradients = [bundle.take_gradient() for bundle in self._bundles.values()]
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
