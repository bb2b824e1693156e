"""Accuracy and loss on the validation split: every image counts once, on any number of ranks."""

import math
from collections.abc import Callable
from itertools import product

import torch

from scaleprog.data.evaluation import EvaluationReader
from scaleprog.models.elastic import Active
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.accuracies import better, is_percentage
from scaleprog.sharding.backend import Backend
from scaleprog.training.metrics import METRICS

DIGITS = 6
"""Decimals of a loss."""


def evaluate(
    backend: Backend,
    coordinator: Coordinator,
    reader: EvaluationReader,
    resolution: int,
    active: Active | None = None,
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Measures the accuracies of the online weights and of every EMA on the validation split.

    Args:
        backend: holds the network.
        coordinator: the ranks that share the work.
        reader: reads this rank's share of the validation split.
        resolution: pixels a side.
        active: the layers that run (None: all).
        between: called between two batches; it may raise to end the evaluation.

    Returns:
        Percent of the images that each metric counts as right, and the mean of each loss, by the names that
        `Accuracies` describes. A loss that is not finite is left out.

    Raises:
        DataError: a shard or sample is missing, damaged, or does not fit the recipe.
    """
    networks: list[int | None] = [None, *range(len(backend.network.emas))]
    found, seen = dict.fromkeys(product(METRICS, networks), 0.0), 0
    for number, batch in enumerate(reader.batches(resolution)):
        if number:
            between()
        images, labels = reader.data.images(batch, backend.device), batch.labels.to(backend.device)
        seen += int((labels >= 0).sum())
        for ema in networks:
            with backend.weights(ema):
                logits = backend.forward(images, active).float()
            for name, metric in METRICS.items():
                found[name, ema] += float(metric(logits, labels).sum(dtype=torch.float64))
    *sums, total = coordinator.total([*found.values(), seen])
    means = {key: _mean(key[0], value, total) for key, value in zip(found, sums)}
    result: dict[str, float] = {}
    for name in METRICS:
        emas = [means[name, ema] for ema in networks[1:]]
        result |= {name: means[name, None], f"{name}_ema": better(name, emas)}
        if len(emas) > 1:
            result |= {f"{name}_ema_{i}": mean for i, mean in enumerate(emas)}
    return {name: value for name, value in result.items() if math.isfinite(value)}


def _mean(metric: str, total: float, images: float) -> float:
    """The mean of a metric, in percent or rounded, because sums of losses depend on the order of the images."""
    return 100 * total / images if is_percentage(metric) else round(total / images, DIGITS)
