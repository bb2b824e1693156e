"""Accuracy and loss on a split: every image counts once, on any number of ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleprog.data.evaluation import EvaluationReader
from scaleprog.data.on_device import sent
from scaleprog.models.elastic import Active
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.accuracies import better, is_percentage
from scaleprog.sharding.backend import Backend
from scaleprog.training.metrics import METRICS

DIGITS = 6
"""Decimals of a loss, because its sum depends on the order of the images."""
Network = int | None
"""The index of an EMA; None: the online weights."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Args:
        images: (classes,), how many images each class has.
        sums: for each network, (metrics, classes), the sums over the images of each class.
    """

    images: Tensor
    sums: Mapping[Network, Tensor]

    def mean(self, metric: str, network: Network) -> float:
        """A metric over all images: in percent, or rounded."""
        total, images = self._row(metric, network).sum().item(), self.images.sum().item()
        return 100 * total / images if is_percentage(metric) else round(total / images, DIGITS)

    def accuracies(self, network: Network) -> list[float | None]:
        """Top-1 (percent) in each class; None in a class without images."""
        rows = zip(self._row("top1", network).tolist(), self.images.tolist(), strict=True)
        return [100 * right / images if images else None for right, images in rows]

    def by_name(self) -> dict[str, float]:
        """All metrics by the names that `Accuracies` describes. A loss that is not finite is left out."""
        found: dict[str, float] = {}
        for metric in METRICS:
            online, *emas = (self.mean(metric, network) for network in self.sums)
            found |= {metric: online, f"{metric}_ema": better(metric, emas)}
            if len(emas) > 1:
                found |= {f"{metric}_ema_{i}": mean for i, mean in enumerate(emas)}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _row(self, metric: str, network: Network) -> Tensor:
        return self.sums[network][list(METRICS).index(metric)]


def evaluate(
    backend: Backend,
    coordinator: Coordinator,
    reader: EvaluationReader,
    resolution: int,
    active: Active | None = None,
    between: Callable[[], object] = lambda: None,
) -> Measured:
    """Measures the online weights and every EMA on a split.

    Args:
        backend: holds the network.
        coordinator: the ranks that share the work.
        reader: reads this rank's share of the split.
        resolution: pixels a side.
        active: the layers that run (None: all).
        between: called between two forward passes; it may raise to end the evaluation.

    Raises:
        DataError: a shard or sample is missing, damaged, or does not fit the recipe.
    """
    classes = len(reader.data.manifest.classes)
    networks: list[Network] = [None, *range(len(backend.network.emas))]
    sums = torch.zeros(len(networks), len(METRICS), classes, dtype=torch.float64)
    seen = torch.zeros(classes, dtype=torch.float64)
    passes = 0
    for group in reader.groups(resolution):
        for network, total in zip(networks, sums):
            own, found = list[Tensor](), list[Tensor]()
            with backend.weights(network):
                for batch in group:
                    if passes:
                        between()
                    passes += 1
                    images, labels = reader.data.images(batch, backend.device), sent(batch.labels, backend.device)
                    logits = backend.forward(images, active).float()
                    own.append(batch.labels.clone())
                    found.append(torch.stack([metric(logits, labels).float() for metric in METRICS.values()]))
            classified, values = torch.cat(own), torch.cat(found, 1).cpu()  # waits for the device once a group
            real = classified >= 0
            total.index_add_(1, classified[real], values[:, real].double())
            seen += classified[real].bincount(minlength=classes) if network is None else 0
    rows = coordinator.total([*sums.flatten().tolist(), *seen.tolist()])
    *totals, counts = torch.tensor(rows, dtype=torch.float64).view(-1, classes)
    return Measured(counts, dict(zip(networks, torch.stack(totals).view_as(sums))))
