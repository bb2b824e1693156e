"""Evaluation: its metrics, how often it changes weights, and which weights its results say are better."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.data.manifest import Manifest
from scaleprog.data.reader import DataSet
from scaleprog.recipe.keys import AugmentSettings, DataSettings
from scaleprog.rundir.accuracies import Accuracies, better, is_percentage
from scaleprog.training.evaluate import evaluate
from scaleprog.training.metrics import METRICS, names, top1, top5, val_loss
from tests.conftest import CLASSES


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 20))
def test_metrics_follow_the_order_of_the_logits(seed: int, classes: int, images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    labels = torch.randint(-1, classes, (images,), generator=generator)
    ranks = [logits[i].argsort(descending=True).tolist().index(label) if label >= 0 else classes + 9
             for i, label in enumerate(labels.tolist())]  # fmt: skip
    assert top1(logits, labels).tolist() == [rank == 0 for rank in ranks]
    assert top5(logits, labels).tolist() == [rank < 5 for rank in ranks]
    shares = logits.double().softmax(1)
    expected = [0.0 if label < 0 else -shares[i, label].log().item() for i, label in enumerate(labels.tolist())]
    assert val_loss(logits, labels).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_padding_counts_as_nothing(metric: str) -> None:
    assert not METRICS[metric](torch.randn(7, 3), torch.full((7,), -1)).any()


def test_names_of_what_an_evaluation_finds() -> None:
    assert names(1) == {"top1", "top1_ema", "top5", "top5_ema", "val_loss", "val_loss_ema"}
    assert names(2) - names(1) == {f"{metric}_ema_{i}" for metric in METRICS for i in range(2)}


def test_the_better_weights() -> None:
    assert Accuracies({"top1": 3.0, "top1_ema": 2.0}).weights == "online"
    assert Accuracies({"top1": 2.0, "top1_ema": 2.0}).weights == "ema"
    several = Accuracies({"top1": 1.0, "top1_ema": 4.0, "top1_ema_0": 3.0, "top1_ema_1": 4.0})
    assert (several.best, several.weights, several.best_ema(2)) == (4.0, "ema", 1)
    assert Accuracies({"top1": 1.0, "top1_ema": 4.0}).best_ema(1) == 0


def test_less_is_better_of_a_loss_which_is_no_percentage() -> None:
    assert (better("top1", [3.0, 4.0]), better("val_loss", [3.0, 4.0])) == (4.0, 3.0)
    assert [is_percentage(name) for name in ("top1_ema", "val_loss", "val_loss_ema", "val_loss_ema_3")] == [True] + [
        False
    ] * 3


class Networks:
    """Online weights and two EMAs that know the classes of 12, 18, and 24 of the 24 images."""

    def __init__(self) -> None:
        self.device, self.network = torch.device("cpu"), SimpleNamespace(emas=[None, None])
        self.entered: list[int | None] = []
        self.passes = self.left = 0

    @contextmanager
    def weights(self, ema: int | None) -> Iterator[None]:
        self.entered.append(ema)
        try:
            yield
        finally:
            self.left += 1

    def forward(self, images: Tensor, active: Any) -> Tensor:
        self.passes += 1
        known = 12 + 6 * (1 + self.entered[-1] if self.entered[-1] is not None else 0)
        position = images[:, 0, 0, 0]  # `numbered` has written it there
        classes = torch.where(position < known, position % CLASSES, CLASSES)
        return torch.nn.functional.one_hot(classes, CLASSES + 1).float()


def numbered(batch: Any, device: torch.device) -> Tensor:
    """ "Images" whose pixels are their positions in the split."""
    return batch.ids.clone().view(-1, 1, 1, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("rows", "pixels", "cache", "groups"), [(8, 8, 1, 1), (5, 130, 1, 3), (8, 8, 0, 3)])
def test_weights_change_once_for_each_network_and_as_many_images_as_memory_holds(
    workers: int, rows: int, pixels: int, cache: int, groups: int, patterns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSettings(path=str(patterns), workers=workers, cache=cache)
    augment = AugmentSettings(crop="none", eval_crop=1.0)
    dataset = DataSet(Manifest.load(patterns), data, augment, 3)
    monkeypatch.setattr(DataSet, "images", lambda self, batch, device: numbered(batch, device))
    networks, coordinator = Networks(), SimpleNamespace(total=lambda values: values)
    between: list[None] = []
    with closing(EvaluationReader(dataset, VALIDATION, rows, 0, 1)) as reader:
        for _ in range(2):
            found = evaluate(networks, coordinator, reader, pixels, between=lambda: between.append(None))
            assert [found.mean("top1", network) for network in (None, 0, 1)] == [50, 75, 100]
            assert found.images.sum() == 24
    assert networks.entered == [None, 0, 1] * groups * 2
    assert networks.passes == 2 * 3 * reader.count
    assert len(between) == networks.passes - 2


def test_shards_of_which_memory_cannot_hold_one_for_each_worker_stay_on_disk(patterns: Path) -> None:
    found = []
    for memory in (None, 1):
        data = DataSettings(path=str(patterns), workers=8, cache=0, memory=memory)
        dataset = DataSet(Manifest.load(patterns), data, AugmentSettings(crop="none", eval_crop=1.0), 3)
        with closing(EvaluationReader(dataset, VALIDATION, 8, 0, 1)) as reader:
            assert reader._shards.on_disk == (memory is not None)
            found.append([batch.clone() for batch in reader.batches(8)])
    assert all(torch.equal(mine.images, theirs.images) for mine, theirs in zip(*found, strict=True))


def test_an_evaluation_that_ends_early_takes_its_weights_back(patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DataSet(Manifest.load(patterns), DataSettings(path=str(patterns), workers=0), AugmentSettings(), 3)
    monkeypatch.setattr(DataSet, "images", lambda self, batch, device: numbered(batch, device))
    networks, coordinator = Networks(), SimpleNamespace(total=lambda values: values)

    def stop() -> None:
        if networks.passes == 4:
            raise InterruptedError

    with closing(EvaluationReader(dataset, VALIDATION, 8, 0, 1)) as reader:
        with pytest.raises(InterruptedError):
            evaluate(networks, coordinator, reader, 8, between=stop)
        assert (networks.entered, networks.left) == ([None, 0], 2)
        networks.passes = 5
        assert evaluate(networks, coordinator, reader, 8).mean("top1", 0) == 75
