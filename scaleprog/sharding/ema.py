"""The momentum network (paper eq. 3), sharded like the model it follows: every operation is local to a shard."""

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor

from scaleprog.settings import Index, Number, Settings


class EmaSettings(Settings):
    """`momenta`: one momentum network each; `grow_from`: index of the one that MoGrow and the search read."""

    momenta: tuple[Number, ...] = Field(default=(0.998,), min_length=1, max_length=16)
    grow_from: Index = -1

    @model_validator(mode="after")
    def _check(self) -> "EmaSettings":
        if not all(0 <= m < 1 for m in self.momenta):
            raise ValueError(f"momenta must lie in [0, 1), got {list(self.momenta)}")
        if not -len(self.momenta) <= self.grow_from < len(self.momenta):
            raise ValueError(f"grow_from must name one of the {len(self.momenta)} momenta, got {self.grow_from}")
        return self


class Ema:
    """One exponential moving average of a network's weights: w_ema <- m * w_ema + (1 - m) * w."""

    def __init__(self, momentum: float, weights: Mapping[str, Tensor]) -> None:
        """Starts as a copy of `weights`, which may be this rank's elements only."""
        self.momentum = momentum
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: list[Tensor]) -> None:
        """Follows the weights after an optimizer step; `weights` in the order of construction."""
        torch._foreach_lerp_(list(self.weights.values()), weights, 1 - self.momentum)
