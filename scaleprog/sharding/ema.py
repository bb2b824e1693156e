"""The EMA, the paper's momentum network (eq. 3). It is sharded like its model, so ranks update it on their own."""

from collections.abc import Mapping

from torch import Tensor

from scaleprog.sharding.optimizer import SGD


def momentum_of(momentum: float, step: int, warmup: bool) -> float:
    """The momentum m of the run's optimizer step `step` >= 0; with `warmup`, at most (1 + step) / (10 + step).

    With warmup, the average spans about a ninth of the steps so far, and at most 1 / (1 - `momentum`) steps. Without
    warmup, the average is still close to its random initial weights after 1 / (1 - `momentum`) steps, and so is any
    network that grows from it.
    """
    return min(momentum, (1 + step) / (10 + step)) if warmup else momentum


class Ema:
    """One exponential moving average of a network's weights: w_ema <- m * w_ema + (1 - m) * w.

    That is a step of SGD with the learning rate 1 - m, the gradient -w, and weight decay 1. torch's fused SGD takes it
    in one kernel that the device itself can skip.
    """

    def __init__(self, weights: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None = None) -> None:
        """Starts as a copy of `weights`, which may hold only this rank's elements, and of batch norms' `statistics`."""
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.statistics = {name: tensor.clone() for name, tensor in (statistics or {}).items()}
        self._averages = [*self.weights.values(), *self.statistics.values()]
        self._sgd = SGD(self._averages, lr=1.0, weight_decay=1.0, maximize=True, fused=True)

    def update(self, weights: list[Tensor], statistics: list[Tensor], momentum: float, skipped: Tensor) -> None:
        """Updates the average after an optimizer step; the lists are in the same order as at construction.

        `skipped`: 0-D fp32, 1 if the step was skipped, and the average stays as it is, else 0.
        """
        for average, current in zip(self._averages, (*weights, *statistics), strict=True):
            if average.grad is not current:
                average.grad = current
        self._sgd.found_inf = skipped
        self._sgd.param_groups[0]["lr"] = 1 - momentum
        self._sgd.step()
