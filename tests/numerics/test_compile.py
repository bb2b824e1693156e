"""Compiled layers: as many graphs as there are variants of a layer's code, however deep, large or often regrown."""

from functools import partial

import pytest
import torch

from scaleprog.ranks.coordinator import Coordinator
from tests.distributed import ranks

VARIANTS = 5  # with and without gradients, stochastic depth, gates; and a batch of another size is none


@pytest.mark.parametrize("engine", ["fsdp", "replicated"])
def test_a_life_takes_a_bounded_number_of_compilations(
    engine: str, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # graphs are captured as for the real back end, but run as they are: what is counted does not depend on it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device = torch.device("cpu")
    plain = ranks.whole_timeline(ranks.make({"engine": engine}, device), Coordinator())
    backend = ranks.make({"engine": engine, "compile": True}, device)
    compiled = ranks.whole_timeline(backend, Coordinator())
    assert compiled["record"] == pytest.approx(plain["record"], rel=1e-6)
    assert 1 <= backend.compilations <= VARIANTS
    before = backend.compilations
    ranks.whole_timeline(ranks.make({"engine": engine, "compile": True}, device), Coordinator())
    assert backend.compilations == before
