"""The samples of lanes, in the order of the requested batches; a thread reads the shards ahead."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from scaleprog.data.ahead import ReadAhead
from scaleprog.data.augment import BatchRequest
from scaleprog.data.order import Order
from scaleprog.data.shard import Cursor, LoadShard, ShardReader, StoredSample


def lane_samples(
    order: Order, requests: Iterable[BatchRequest], lanes: Sequence[int], shards: ShardReader
) -> Generator[list[StoredSample]]:
    """For each request, the samples that each of `lanes` contributes to the batch.

    Args:
        order: of the samples.
        requests: one per batch; iterated over twice, because the thread is ahead.
        lanes: those of one worker.
        shards: reads the split.

    Raises:
        ValueError: a request is for a step that no epoch has.
        DataError: a shard is missing, damaged, or does not fit; with the first sample of that shard.
        Unavailable: a shard cannot be read now.
    """
    with _loading(order, requests, lanes, shards) as load:
        readers = [(_Rows(lane, order), Cursor(shards, load)) for lane in lanes]
        for request in requests:
            for rows, cursor in readers:
                yield [cursor.sample(shard, index) for shard, index in rows.at(request).tolist()]


class _Rows:
    """The rows of one lane; holds those of the current epoch."""

    def __init__(self, lane: int, order: Order) -> None:
        self._lane, self._order = lane, order
        self._epoch: int | None = None
        self._rows = np.empty((0, 2), np.int64)

    def at(self, request: BatchRequest) -> np.ndarray:
        """The rows (per_lane, 2) of a batch: shard, index in shard. Raises ValueError for an unknown step."""
        if not 0 <= request.step < self._order.steps_per_epoch:
            raise ValueError(f"step {request.step} is not in an epoch of {self._order.steps_per_epoch} steps")
        if request.epoch != self._epoch:
            self._rows, self._epoch = self._order.lane(request.epoch, self._lane), request.epoch
        count = self._order.per_lane
        return self._rows[request.step * count : (request.step + 1) * count]


@contextmanager
def _loading(
    order: Order, requests: Iterable[BatchRequest], lanes: Sequence[int], shards: ShardReader
) -> Iterator[LoadShard]:
    """What gives the lanes their shards: a thread that reads ahead, unless all shards are in memory."""
    if shards.fits:
        yield shards.load
        return
    with ReadAhead(shards.load, _edges(order, requests, lanes)) as ahead:
        yield ahead.take


def _edges(order: Order, requests: Iterable[BatchRequest], lanes: Sequence[int]) -> Iterator[int]:
    """The shards that the lanes come to, one after the other."""
    current: list[tuple[_Rows, int]] = [(_Rows(lane, order), -1) for lane in lanes]
    for request in requests:
        for place, (rows, before) in enumerate(current):
            for shard in rows.at(request)[:, 0].tolist():
                if shard != before:
                    yield shard
                before = shard
            current[place] = rows, before
