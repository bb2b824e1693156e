"""Top-1 accuracy on the validation split, every image counted once on any number of ranks."""

from collections.abc import Callable

from scaleprog.data.augment import AugmentSettings
from scaleprog.data.manifest import Manifest
from scaleprog.data.reader import DataSettings, evaluation_batches
from scaleprog.models.elastic import Active
from scaleprog.settings import Epochs, Images, Settings
from scaleprog.sharding.backend import Backend
from scaleprog.sharding.coordinator import Coordinator


class EvaluateSettings(Settings):
    """Every `every` epochs and at the end, in batches of `batch` images a rank."""

    every: Epochs = 1
    batch: Images = 256


def evaluate(
    backend: Backend,
    coordinator: Coordinator,
    manifest: Manifest,
    data: DataSettings,
    augment: AugmentSettings,
    settings: EvaluateSettings,
    resolution: int,
    active: Active | None = None,
    split: str = "val",
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Percent correct at `resolution` pixels: `top1` of the online weights, `top1_ema` of the best momentum network,
    and `top1_ema_0`, ... of each where there are several. `between` is called between two batches, and may raise."""
    networks: list[int | None] = [None, *range(len(backend.network.emas))]
    correct, seen = [0.0] * len(networks), 0
    batches = evaluation_batches(
        manifest, split, data, augment, backend.model.channels, resolution, settings.batch,
        coordinator.rank, coordinator.world,
    )  # fmt: skip
    for number, batch in enumerate(batches):
        if number:
            between()
        images, labels = batch.images.to(backend.device), batch.labels.to(backend.device)
        seen += int((labels >= 0).sum())
        for i, ema in enumerate(networks):
            with backend.weights(ema):
                hits = backend.forward(images, active).argmax(-1) == labels  # padding has a label of its own: no class
                correct[i] += float(hits.sum())
    *correct, total = coordinator.total([*correct, seen])
    percent = [100 * c / total for c in correct]
    result = {"top1": percent[0], "top1_ema": max(percent[1:])}
    if len(percent) > 2:
        result |= {f"top1_ema_{i}": p for i, p in enumerate(percent[1:])}
    return result
