"""Evaluation metrics: what the network makes of each image. docs/extending.md says how to add one."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from scaleprog.data.evaluation import PADDING

Metric = Callable[[Tensor, Tensor], Tensor]
"""(B, classes) fp32 logits and (B,) labels -> (B,) bool, whether the network is right; of a loss, (B,) numbers. Padding
counts as False or 0."""


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label has the highest logit."""
    return logits.argmax(-1) == labels


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label has one of the five highest logits (with fewer classes: any)."""
    highest = logits.topk(min(5, logits.shape[-1])).indices
    return (highest == labels[:, None]).any(-1)


def val_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the label, not smoothed."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=PADDING)


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5, "val_loss": val_loss}
"""The metrics by their names in results, curves, and reports; top-1 decides which weights are better."""


def names(emas: int) -> set[str]:
    """The names of the values that an evaluation with `emas` EMAs returns; see `rundir.accuracies.Accuracies`."""
    endings = ["", "_ema", *(f"_ema_{i}" for i in range(emas) if emas > 1)]
    return {f"{metric}{ending}" for metric in METRICS for ending in endings}
