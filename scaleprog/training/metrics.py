"""Evaluation metrics: whether the network is right about each image. docs/extending.md says how to add one."""

from collections.abc import Callable

from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]
"""(B, classes) logits and (B,) labels -> (B,) bool. A label of -1 marks padding, which never counts as right."""


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label has the highest logit."""
    return logits.argmax(-1) == labels


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label has one of the five highest logits (with fewer classes: any)."""
    highest = logits.topk(min(5, logits.shape[-1])).indices
    return (highest == labels[:, None]).any(-1)


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5}
"""The metrics by their names in results, curves, and reports; top-1 decides which weights are better."""


def names(emas: int) -> set[str]:
    """The names of the accuracies that an evaluation with `emas` EMAs returns; see `rundir.accuracies.Accuracies`."""
    endings = ["", "_ema", *(f"_ema_{i}" for i in range(emas) if emas > 1)]
    return {f"{metric}{ending}" for metric in METRICS for ending in endings}
