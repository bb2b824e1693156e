"""Evaluation metrics, and which weights their results say are better."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.rundir.accuracies import Accuracies, better, is_percentage
from scaleprog.training.metrics import METRICS, names, top1, top5, val_loss


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
