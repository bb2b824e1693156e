"""Streams: whole batches in shared slots, errors in their place, and workers that hang in their fork."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import scaleprog.data.stream
from scaleprog.data.stream import Batch, Fill, Layout, Stream
from scaleprog.errors import DataError

pytestmark = pytest.mark.process

LAYOUT = Layout(rows=4, resolution=6, channels=1, numbers=3)


def produce(units: range) -> Iterator[Fill]:
    """Five batches of 4 units, each a row that says its unit and the batch, at changing resolutions."""
    for number in range(5):

        def fill(batch: Batch, number: int = number) -> None:
            for name, tensor in vars(batch).items():
                rows = torch.tensor([10 * number + unit for unit in units])
                tensor[:] = (rows + len(name)).view(-1, *(1,) * (tensor.ndim - 1))

        yield 6 - number, fill


@pytest.mark.parametrize("workers", [0, 1, 3, 4])
def test_batches_are_whole_for_any_number_of_workers(workers: int) -> None:
    with Stream(produce, 4, workers, 2, LAYOUT) as batches:
        found = [batch.clone() for batch in batches]
    assert len(found) == 5
    for number, batch in enumerate(found):
        assert batch.images.shape == (4, 6 - number, 6 - number, 1)
        assert batch.token_labels.shape == (4, 3)
        for name, tensor in vars(batch).items():
            rows = (torch.arange(4) + 10 * number + len(name)).view(-1, *(1,) * (tensor.ndim - 1))
            assert torch.equal(tensor, rows.to(tensor.dtype).expand_as(tensor))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("at_fill", [False, True])
def test_an_error_comes_after_the_batches_before_it(workers: int, at_fill: bool) -> None:
    def failing(units: range) -> Iterator[Fill]:
        for number, (resolution, fill) in enumerate(produce(units)):
            if number == 4 and not at_fill:
                raise DataError("no more")

            def fail(batch: Batch) -> None:
                raise DataError("no more")

            yield resolution, fail if number == 4 else fill

    with Stream(failing, 4, workers, 2, LAYOUT) as batches:
        time.sleep(0.5 if workers else 0)  # the workers are at the error while no batch is taken
        found = [next(batches).ids[0].item() for _ in range(4)]
        with pytest.raises(DataError, match="no more"):
            next(batches)
    assert found == [3, 13, 23, 33]


def test_a_batch_stays_until_the_next_one_is_asked_for() -> None:
    with Stream(produce, 4, 1, 1, LAYOUT) as batches:
        batch = next(batches)
        before = batch.clone()
        time.sleep(0.5)
        assert torch.equal(batch.images, before.images)


class Deadly:
    """Garbage that may be destroyed only in the process that made it, like a process group of torch."""

    def __init__(self) -> None:
        self.itself, self.maker = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.maker:
            os._exit(1)


def test_a_worker_does_not_collect_the_garbage_that_it_inherits() -> None:
    def collecting(units: range) -> Iterator[Fill]:
        gc.collect()
        yield from produce(units)

    gc.collect()
    gc.disable()
    try:
        Deadly()
        with Stream(collecting, 4, 2, 2, LAYOUT) as batches:
            assert len(list(batches)) == 5
    finally:
        gc.enable()
        gc.collect()


def test_with_a_gpu_a_batch_stays_until_its_copies_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch longer than without; the workers' memory is page-locked meanwhile. It is no wait for data."""
    told: list[str] = []
    clock = [0.0]

    class Event:
        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("synchronize")
            clock[0] += 100.0

    monkeypatch.setattr("scaleprog.data.stream.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: told.append("synchronize all"))
    runtime = SimpleNamespace(
        cudaHostRegister=lambda start, size, flags: told.append("lock") or 0,
        cudaHostUnregister=lambda start: told.append("unlock"),
    )
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    with Stream(produce, 4, 1, 1, LAYOUT) as batches:
        first = next(batches)
        before = first.clone()
        next(batches)
        time.sleep(0.5)
        assert torch.equal(first.images, before.images)
        assert told == ["lock", "record"]
        found = [(batch.ids[0].item(), batches.waited) for batch in batches]
    assert found == [(23, 0.0), (33, 0.0), (43, 0.0)]
    assert told[2:6] == ["record", "synchronize", "record", "synchronize"]
    assert told[-2:] == ["synchronize all", "unlock"]


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
    with Stream(produce, 4, 1, 2, LAYOUT) as batches:
        first = [batch.ids[0].item() for batch in batches]
    assert first == [10 * number + 3 for number in range(5)]
    assert forks.tolist() == [2]


def test_a_stream_ends_while_its_worker_hangs(forks: torch.Tensor) -> None:
    told, rank = scaleprog.data.stream._shared((1,), torch.int64), os.getpid()

    def heard(*_: object) -> None:
        told[0] += 1
        if os.getpid() != rank:
            os._exit(0)  # or `close` would wait for it

    before = signal.signal(signal.SIGTERM, heard)
    try:
        Stream(produce, 4, 1, 2, LAYOUT).close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not told[0]
