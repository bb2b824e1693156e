"""The samples of lanes, in the order of the requested batches; a thread reads the shards ahead."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np

from scaleprog.data.ahead import ReadAhead
from scaleprog.data.augment import BatchRequest
from scaleprog.data.order import Order
from scaleprog.data.shard import Cursor, LoadShard, ShardReader, StoredSample
from scaleprog.errors import DataError


class Lane:
    """A reader of one lane."""

    def __init__(self, lane: int, order: Order, shards: ShardReader, load: LoadShard) -> None:
        self.lane = lane
        self._shards, self._cursor, self._rows = shards, Cursor(shards, load), _Rows(lane, order)

    def take(self, request: BatchRequest) -> list[StoredSample]:
        """The samples that the lane contributes to a batch; of one requested batch after the other.

        Raises:
            ValueError: no epoch has the step.
            DataError: a shard is missing, damaged, or does not fit; with the first sample of that shard.
            Unavailable: a shard cannot be read now.
        """
        return [self._cursor.sample(shard, index) for shard, index in self._rows.at(request).tolist()]

    def instead(self, step: int, row: int, damaged: Collection[str]) -> StoredSample:
        """The first sample after a row of a step of the current epoch that is not `damaged`; the lane is a circle.

        `damaged`: locations. Raises DataError if they are those of all samples.
        """
        rows, cursor = self._rows.of_epoch, Cursor(self._shards)  # what is read ahead stays as it is
        place = step * self._rows.per_step + row
        for shard, index in (rows[i].tolist() for i in chain(range(place + 1, len(rows)), range(place))):
            sample = cursor.sample(shard, index)
            if sample.image[1] not in damaged:
                return sample
        raise DataError(
            f"all samples of lane {self.lane} in epoch {self._rows.epoch} are damaged, such as {min(damaged)}; remove "
            "or replace them and rebuild their shards"
        )


@contextmanager
def lanes_ahead(
    order: Order, requests: Iterable[BatchRequest], lanes: Sequence[int], shards: ShardReader
) -> Iterator[list[Lane]]:
    """Readers of lanes that all take the requested batches in order, one lane after the other.

    Args:
        order: of the samples.
        requests: one per batch; iterated over here, too, because the thread is ahead.
        lanes: those of one worker.
        shards: reads the split.
    """
    with _loading(order, requests, lanes, shards) as load:
        yield [Lane(lane, order, shards, load) for lane in lanes]


class _Rows:
    """The rows of one lane; holds those of the current epoch."""

    def __init__(self, lane: int, order: Order) -> None:
        self._lane, self._order = lane, order
        self.per_step = order.per_lane
        self.epoch: int | None = None
        self.of_epoch = np.empty((0, 2), np.int64)

    def at(self, request: BatchRequest) -> np.ndarray:
        """The rows (per_step, 2) of a batch: shard, index in shard. Raises ValueError for an unknown step."""
        if not 0 <= request.step < self._order.steps_per_epoch:
            raise ValueError(f"step {request.step} is not in an epoch of {self._order.steps_per_epoch} steps")
        if request.epoch != self.epoch:
            self.of_epoch, self.epoch = self._order.lane(request.epoch, self._lane), request.epoch
        return self.of_epoch[request.step * self.per_step : (request.step + 1) * self.per_step]


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
