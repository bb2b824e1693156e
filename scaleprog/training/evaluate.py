"""Accuracy on the validation split: every image counts once, on any number of ranks."""

from collections.abc import Callable
from itertools import product

import torch

from scaleprog.data.evaluation import EvaluationReader
from scaleprog.models.elastic import Active
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.sharding.backend import Backend
from scaleprog.training.metrics import METRICS


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
        between: called between two forward passes; it may raise to end the evaluation.

    Returns:
        Percent of the images that each metric counts as right, by the names that `Accuracies` describes.

    Raises:
        DataError: a shard or sample is missing, damaged, or does not fit the recipe.
    """
    networks: list[int | None] = [None, *range(len(backend.network.emas))]
    right = {key: torch.zeros((), dtype=torch.int64, device=backend.device) for key in product(METRICS, networks)}
    images = passes = 0
    for group in reader.groups(resolution):
        for ema in networks:
            with backend.weights(ema):
                for batch in group:
                    if passes:
                        between()
                    passes += 1
                    images += int((batch.labels >= 0).sum()) if ema is None else 0
                    labels = batch.labels.to(backend.device, non_blocking=True)
                    logits = backend.forward(reader.data.images(batch, backend.device), active)
                    for name, metric in METRICS.items():
                        right[name, ema] += metric(logits, labels).sum()
    *counts, total = coordinator.total([*torch.stack([*right.values()]).tolist(), images])
    percent = {key: 100 * count / total for key, count in zip(right, counts)}
    result: dict[str, float] = {}
    for name in METRICS:
        emas = [percent[name, ema] for ema in networks[1:]]
        result |= {name: percent[name, None], f"{name}_ema": max(emas)}
        if len(emas) > 1:
            result |= {f"{name}_ema_{i}": found for i, found in enumerate(emas)}
    return result
