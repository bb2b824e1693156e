"""What an evaluation measured, and which weights are better."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Weights = Literal["online", "ema"]
LOSSES = ("val_loss",)
"""The metrics of which less is better: means over the images, from 0 up. All others are percentages."""


def is_percentage(name: str) -> bool:
    """Whether what an evaluation found under `name` is a percentage."""
    return name.partition("_ema")[0] not in LOSSES


def better(metric: str, found: Iterable[float]) -> float:
    """The best of several values of a metric."""
    return max(found) if is_percentage(metric) else min(found)


@dataclass(frozen=True)
class Accuracies:
    """Accuracies in percent and the loss, by the names that an evaluation uses.

    `top1` belongs to the online weights and `top1_ema` to the best EMA. With several EMAs,
    `top1_ema_0`, `top1_ema_1`, ... belong to each of them. Other metrics follow the same pattern. Top-1 decides which
    weights are better.
    """

    by_name: Mapping[str, Any]

    @property
    def best(self) -> float:
        """Top-1 of the better weights."""
        return max(self.by_name["top1"], self.by_name["top1_ema"])

    @property
    def weights(self) -> Weights:
        """The better weights; on a tie, those of the EMA."""
        return "online" if self.by_name["top1"] > self.by_name["top1_ema"] else "ema"

    def best_ema(self, count: int) -> int:
        """The index of the best of `count` EMAs."""
        return 0 if count == 1 else max(range(count), key=lambda i: self.by_name[f"top1_ema_{i}"])
