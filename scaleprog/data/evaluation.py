"""Reads a split for evaluation, again and again: each image once, and as many batches on every rank."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice

import torch

from scaleprog.data.augment import Augmentation
from scaleprog.data.reader import DataSet
from scaleprog.data.shard import Cursor, ShardReader, StoredSample
from scaleprog.data.stream import Batch, Fill, Layout, Stream
from scaleprog.recipe.numbers import ceil_div

VALIDATION = "val"
PADDING = -1
"""Label and ID of a row that only pads a batch."""


class Group:
    """Some consecutive batches, to go through several times: the first time as they are decoded, then from memory."""

    def __init__(self, decoded: Iterator[Batch]) -> None:
        self._decoded, self.kept = decoded, list[Batch]()

    def __iter__(self) -> Iterator[Batch]:
        if self.kept:
            yield from self.kept
            return
        for batch in self._decoded:
            self.kept.append(batch.clone())
            yield batch


class EvaluationReader:
    """One rank's share of a split. All ranks together get every sample exactly once, and equally many batches each.

    Rows of zeros with label and ID -1 pad the batches; mask them. Ranks and workers read contiguous parts of the split.
    The order of the rows depends on the number of ranks and workers; the set of IDs over all ranks does not.

    What is costly stays from one evaluation to the next: the decoded images, if all of them fit into `data.cache`, or
    else the workers, which decode the first batches of the next evaluation while the network trains.

    Args:
        data: the data set.
        split: name of the split.
        batch_local: rows of every batch.
        rank, world: this process's rank, and the number of ranks that share the split.
    """

    def __init__(self, data: DataSet, split: str, batch_local: int, rank: int, world: int) -> None:
        self.data = data
        held = 2 * max(1, data.workers)  # a batch may end in another shard
        self._shards = ShardReader(data.manifest, split, on_disk=data.exceeds_memory(split, held))
        self._augmentation = Augmentation(data.augment, data.channels)
        self._rows = batch_local
        total = data.manifest.samples(split)
        share = ceil_div(total, world)
        self._start, self._stop = rank * share, min((rank + 1) * share, total)
        self.count = ceil_div(share, batch_local)
        self._resolution = 0
        self._stream: Stream | None = None
        self._between_passes = True
        self._kept: list[Batch] = []

    def batches(self, resolution: int) -> Iterator[Batch]:
        """The `count` batches at a resolution. Raises as `groups` does."""
        return chain.from_iterable(self.groups(resolution))

    def groups(self, resolution: int) -> Iterator[Iterable[Batch]]:
        """The `count` batches at a resolution, in groups; ask for the next group when you have gone through one.

        A split that fits into `data.cache` is one group. Otherwise, a group takes half of that memory, and the next
        one, which the workers decode meanwhile, the other half.

        Raises:
            DataError: a shard or sample is missing, damaged or does not fit.
            Unavailable: a worker died.
        """
        if resolution != self._resolution or not self._between_passes:
            self.close()
        self._resolution = resolution
        if self._kept:
            yield self._kept
            return
        layout, settings = Layout(self._rows, resolution, self.data.channels), self.data.settings
        room = settings.cache * 2**20 // layout.bytes
        keeps = self.count <= room
        size = self.count if keeps else max(1, room // 2)
        ahead = settings.prefetch if keeps else max(size, settings.prefetch)
        if self._stream is None:
            workers, produce = min(self.data.workers, self._rows), partial(self._produce, resolution)
            self._stream = Stream(produce, self._rows, workers, ahead, layout)
        self._between_passes = False
        for first in range(0, self.count, size):
            group = Group(islice(self._stream, min(size, self.count - first)))
            yield group
        self._between_passes = True
        if keeps:
            self.close()
            self._resolution, self._kept = resolution, group.kept

    def close(self) -> None:
        """Stops the workers, and frees the images."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._kept, self._resolution, self._between_passes = None, [], 0, True

    def _produce(self, resolution: int, rows: range) -> Iterator[Fill]:
        """Some rows of every batch, pass after pass."""
        while True:
            cursor = Cursor(self._shards)
            for number in range(self.count):
                first = self._start + rows.start * self.count + len(rows) * number  # earlier parts read those before
                positions = range(first, min(first + len(rows), self._stop))
                yield resolution, partial(self._fill, [cursor.at(position) for position in positions])

    def _fill(self, samples: list[StoredSample], batch: Batch) -> None:
        count = len(samples)
        batch.labels[count:] = batch.ids[count:] = PADDING
        batch.images[count:] = 0
        if samples:
            batch.labels[:count] = torch.tensor([sample.label for sample in samples])
            batch.ids[:count] = torch.tensor([sample.id for sample in samples])
            self._augmentation.evaluation([sample.image for sample in samples], batch.images[:count].numpy())
