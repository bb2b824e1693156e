"""Streams shards along lanes: steps in, decoded batches out, from any step on, for any number of ranks and workers.

Worker processes own contiguous parts of the rank's lanes and decode their part of every batch; the rank joins
the parts. What a batch holds is arithmetic (`order.py`, `augment.py`); who decodes it, and when, changes nothing.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import cv2
import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scaleprog.data.augment import Augmentation, AugmentSettings, Request
from scaleprog.data.manifest import Manifest
from scaleprog.data.order import Order
from scaleprog.data.shard import Cursor, Sample, ShardReader
from scaleprog.errors import DataError
from scaleprog.settings import Settings

TRAIN = "train"
PADDING_LABEL = -1
"""Label of a row that only fills an evaluation batch up; its id is -1 too."""


class DataSettings(Settings):
    """Where the samples come from, and how they are read."""

    path: str
    """Folder of the shards and their manifest."""
    lanes: int = Field(64, ge=1)
    """V, into how many lanes an epoch is cut: a divisor of the batch, and a multiple of every world size to be used."""
    workers: int = Field(4, ge=0)
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = Field(2, ge=1)
    """Steps that each worker decodes ahead."""
    cache: int = Field(256, ge=0)
    """MiB: a split no larger than this is read once and kept in memory."""
    shards: int | None = Field(None, ge=1)
    """Train on the first so many shards only: a fixed random part of the images, which were shuffled when stored."""
    trace: bool = False
    """Write the ids of the samples of every step down."""


@dataclass
class Batch:
    """One rank's part of a batch; in training its rows are lane-major: (lane, sample of the lane)."""

    images: Tensor
    """(B_local, C, r, r) float32, normalised."""
    labels: Tensor
    """(B_local,) int64; -1 where an evaluation batch is filled up."""
    ids: Tensor
    """(B_local,) int64: which sample of the split (samples of earlier shards + index in its shard); or -1."""


class Stream:
    """Batches, decoded ahead by worker processes; an iterator, and a context manager whose end stops the workers.

    Args:
        produce: (part, parts) -> that part of every batch, in order; every part yields as many.
        workers: processes, one per part; 0 produces the whole in this process.
        prefetch: batches decoded ahead.
    """

    def __init__(self, produce: Callable[[int, int], Iterator[Batch]], workers: int, prefetch: int) -> None:
        self._workers = workers
        self._pin = torch.cuda.is_available()
        self._parts: Any = iter(_Parts(produce))
        self._stop: Callable[[], None] = lambda: None
        if workers:
            loader = DataLoader(
                _Parts(produce),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch,
                worker_init_fn=_become_worker,
                multiprocessing_context="fork",  # shares the cached shards
                generator=torch.Generator(),  # else a seed is drawn from the training process's generator
            )
            self._parts = iter(loader)
            self._stop = self._parts._shutdown_workers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            parts = [next(self._parts)]  # the parts come in order, and end together
            parts += [next(self._parts) for _ in range(self._workers - 1)]
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            self.close()
            raise DataError(
                f"a decoding worker died ({error}); if memory ran out, lower data.workers or data.prefetch"
            ) from error
        for part in parts:
            if isinstance(part, DataError):
                self.close()
                raise part
        return self._join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers; there are no batches afterwards."""
        self._parts = iter(())
        self._stop()

    def _join(self, parts: list[Batch]) -> Batch:
        """One batch of its parts, in page-locked memory where there is a GPU."""
        if len(parts) == 1 and not self._pin:
            return parts[0]
        tensors = []
        for pieces in zip(*((part.images, part.labels, part.ids) for part in parts)):
            shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
            whole = torch.empty(shape, dtype=pieces[0].dtype, pin_memory=self._pin)
            tensors.append(torch.cat(pieces, out=whole))
        return Batch(*tensors)


class _Parts(IterableDataset[Any]):
    """One worker's part of every batch; a DataError is handed over as a value, so that it arrives as it was raised."""

    def __init__(self, produce: Callable[[int, int], Iterator[Batch]]) -> None:
        self.produce = produce

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        try:
            yield from self.produce(info.id, info.num_workers) if info else self.produce(0, 1)
        except DataError as error:
            yield error


def _become_worker(_: int) -> None:
    """Settles the signals and threads of a forked worker.

    Slurm and terminals signal every process of a job, and the rank still takes some steps after that: so INT and USR2
    are ignored, and of the TERMs only the rank's own ends the worker. A worker whose rank is gone leaves by itself.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(rank_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_process:
        pass
    os._exit(0)


class TrainReader:
    """Streams the training batches of one rank.

    Args:
        manifest: the data set; its split "train" is read.
        order: which sample comes when; made from this split's counts.
        data: workers, prefetch and cache.
        augment: what is done to the images.
        channels: 1 or 3.
        seed: of the augmentation.
        rank, world: which part of the batches this process takes.

    Raises:
        DataError: the order is of other shards, or the world size does not divide the lanes.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        data: DataSettings,
        augment: AugmentSettings,
        channels: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.order = order
        self.data = data
        self.lanes = order.lanes_of(rank, world)
        self.workers = min(data.workers, len(self.lanes))
        self._augmentation = Augmentation(augment, channels, seed)
        self._shards = ShardReader(manifest, TRAIN, cache=data.cache * 2**20)
        if order.counts != tuple(shard.samples for shard in self._shards.shards):
            raise DataError(f"{manifest.root}: the shards of {TRAIN!r} are not those that the order was made from")

    def stream(self, requests: Iterable[Request]) -> Stream:
        """The batches of these steps, decoded ahead; close it (or leave its `with`) to stop the workers.

        Args:
            requests: one per batch, from any step on; iterated anew by every worker, so no one-way iterator.

        Raises:
            DataError: while iterating: a shard or sample that is missing, damaged or does not fit.
        """
        if isinstance(requests, Iterator):
            raise TypeError("requests are iterated by every worker: pass a list or another re-iterable value")
        self._shards.preload()
        return Stream(partial(self._produce, requests), self.workers, self.data.prefetch)

    def memory(self, resolution: int) -> int:
        """Bytes that reading takes on the host at most: the cached split, or else one shard per lane (and two more per
        worker while it reads one), plus the batches decoded ahead and the one handed out."""
        shards = self._shards.shards
        largest = max(shard.bytes for shard in shards)
        held = len(self.lanes) + 2 * max(self.workers, 1)
        encoded = sum(shard.bytes for shard in shards) + 2 * largest if self._shards.fits else held * largest
        pixels = len(self.lanes) * self.order.per_lane * self._augmentation.channels * resolution**2
        return encoded + pixels * torch.float32.itemsize * (self.data.prefetch * bool(self.workers) + 2)

    def _produce(self, requests: Iterable[Request], part: int, parts: int) -> Iterator[Batch]:
        """One worker's part of every batch: a contiguous part of the rank's lanes."""
        owned = self.lanes[len(self.lanes) * part // parts : len(self.lanes) * (part + 1) // parts]
        lanes = [_Lane(lane, self.order, self._shards) for lane in owned]
        for request in requests:
            images, labels, ids = [], [], []
            for lane in lanes:
                samples = lane.take(request.epoch, request.step)
                images.append(self._augmentation.lane([sample.image for sample in samples], request, lane.lane))
                labels += [sample.label for sample in samples]
                ids += [sample.id for sample in samples]
            yield Batch(torch.cat(images), torch.tensor(labels), torch.tensor(ids))


class _Lane:
    """A lane as it is walked: the rows of the current epoch, and the one shard it is in."""

    def __init__(self, lane: int, order: Order, shards: ShardReader) -> None:
        self.lane = lane
        self._order = order
        self._cursor = Cursor(shards)
        self._epoch: int | None = None
        self._rows = np.empty((0, 2), np.int64)

    def take(self, epoch: int, step: int) -> list[Sample]:
        """The samples that the lane gives to a step of an epoch, from any step on."""
        if not 0 <= step < self._order.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self._order.steps_per_epoch}")
        if epoch != self._epoch:
            self._rows, self._epoch = self._order.lane(epoch, self.lane), epoch
        count = self._order.per_lane
        rows = self._rows[step * count : (step + 1) * count].tolist()
        return [self._cursor.sample(shard, index) for shard, index in rows]


def evaluation_batches(
    manifest: Manifest,
    split: str,
    data: DataSettings,
    augment: AugmentSettings,
    channels: int,
    resolution: int,
    batch_local: int,
    rank: int,
    world: int,
) -> Stream:
    """One rank's batches of a whole split: every sample exactly once over all ranks, as many batches on every rank.

    Batches are filled up with rows of zeros whose label and id are -1; mask them. Ranks and workers read contiguous
    parts of the split. The order of the rows depends on both; the set of ids over all ranks does not.

    Args:
        batch_local: rows of every batch.
        resolution: pixels of a side.

    Raises:
        DataError: while iterating: a shard or sample that is missing, damaged or does not fit.
    """
    shards = ShardReader(manifest, split)
    augmentation = Augmentation(augment, channels)
    total = manifest.samples(split)
    share = -(-total // world)
    start, stop = rank * share, min((rank + 1) * share, total)
    batches = -(-share // batch_local)

    def produce(part: int, parts: int) -> Iterator[Batch]:
        above = batch_local * part // parts  # rows of a batch that earlier parts fill
        rows = batch_local * (part + 1) // parts - above
        cursor = Cursor(shards)
        for batch in range(batches):
            first = start + above * batches + rows * batch
            samples = [cursor.at(position) for position in range(first, min(first + rows, stop))]
            padding = [PADDING_LABEL] * (rows - len(samples))
            images = torch.zeros(rows, channels, resolution, resolution)
            if samples:
                images[: len(samples)] = augmentation.evaluation([sample.image for sample in samples], resolution)
            labels = torch.tensor([sample.label for sample in samples] + padding)
            yield Batch(images, labels, torch.tensor([sample.id for sample in samples] + padding))

    return Stream(produce, min(data.workers, batch_local), data.prefetch)
