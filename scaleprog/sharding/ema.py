"""The EMA, the paper's momentum network (eq. 3). It is sharded like its model, so ranks update it on their own."""

from collections.abc import Mapping

import torch
from torch import Tensor


def momentum_of(momentum: float, step: int, warmup: bool) -> float:
    """The momentum m of the run's optimizer step `step` >= 0; with `warmup`, at most (1 + step) / (10 + step).

    With warmup, the average spans about a ninth of the steps so far, and at most 1 / (1 - `momentum`) steps. Without
    warmup, the average is still close to its random initial weights after 1 / (1 - `momentum`) steps, and so is any
    network that grows from it.
    """
    return min(momentum, (1 + step) / (10 + step)) if warmup else momentum


class Ema:
    """One exponential moving average of a network's weights: w_ema <- m * w_ema + (1 - m) * w."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Starts as a copy of `weights`, which may hold only this rank's elements."""
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: list[Tensor], momentum: float, finite: Tensor) -> None:
        """Updates the average after an optimizer step; `weights` come in the same order as at construction.

        `finite`: whether the step was taken, a 0-D bool on the weights' device; if not, the average stays as it is.
        """
        share = torch.where(finite, 1 - momentum, 0.0)
        for average, weight in zip(self.weights.values(), weights, strict=True):
            average.lerp_(weight, share)
