"""Streams: a worker that hangs in its fork is forked again."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

import scaleprog.data.stream
from scaleprog.data.stream import Batch, Stream

pytestmark = pytest.mark.process

SHAPE = (2, 1, 4, 4)


def produce(part: int, parts: int) -> Iterator[Batch]:
    for number in range(5):
        rows = torch.arange(2) + 10 * number + 100 * part
        yield Batch(torch.full(SHAPE, float(number)), rows, rows)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """How often a worker was forked; the first hangs."""
    reset, forks = scaleprog.data.stream._reset_signals, scaleprog.data.stream._shared((1,), torch.int64)

    def hang_at_first(rank_process: int) -> None:
        forks[0] += 1
        while forks[0] == 1:
            time.sleep(0.1)
        reset(rank_process)

    monkeypatch.setattr("scaleprog.data.stream._reset_signals", hang_at_first)
    monkeypatch.setattr("scaleprog.data.stream.START_SECONDS", 2.0)
    return forks


def test_a_worker_that_hangs_in_its_fork_is_forked_again(forks: torch.Tensor) -> None:
    with Stream(produce, 1, 2, SHAPE) as batches:
        ids = [batch.ids.tolist() for batch in batches]
    assert ids == [[10 * number, 10 * number + 1] for number in range(5)]
    assert forks.tolist() == [2]


def test_a_stream_ends_while_its_worker_hangs(forks: torch.Tensor) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(os.getpid()))
    try:
        Stream(produce, 1, 2, SHAPE).close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not told
