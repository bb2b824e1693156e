"""The momentum network (paper eq. 3), sharded like the model it follows: every operation is local to a shard."""

from collections.abc import Iterable, Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaleprog.settings import Settings


class EmaSettings(Settings):
    """`momenta`: one momentum network each; `grow_from`: index of the one that MoGrow and the search read."""

    momenta: tuple[float, ...] = Field(default=(0.998,), min_length=1)
    grow_from: int = -1

    @model_validator(mode="after")
    def _check(self) -> "EmaSettings":
        if not all(0 <= m < 1 for m in self.momenta):
            raise ValueError(f"momenta must lie in [0, 1), got {list(self.momenta)}")
        if not -len(self.momenta) <= self.grow_from < len(self.momenta):
            raise ValueError(f"grow_from must name one of the {len(self.momenta)} momenta, got {self.grow_from}")
        return self


class Ema:
    """One exponential moving average of a network's parameters: w_ema <- m * w_ema + (1 - m) * w."""

    def __init__(self, momentum: float, parameters: Mapping[str, Tensor]) -> None:
        """Starts as a copy of `parameters`."""
        self.momentum = momentum
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}
        self._shards = shards(self.weights.values())

    @torch.no_grad()
    def update(self, parameter_shards: list[Tensor]) -> None:
        """Follows the parameters after an optimizer step; `parameter_shards` in the order of construction."""
        torch._foreach_lerp_(self._shards, parameter_shards, 1 - self.momentum)


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, without its gradient history; writing into it writes into the tensor."""
    with torch.no_grad():
        return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]
