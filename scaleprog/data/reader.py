"""Streams decoded batches along lanes, beginning at any step, for any number of ranks and workers.

Worker processes own contiguous parts of the rank's lanes and decode their part of every batch; the rank joins the
parts. `order.py` and `augment.py` determine the content of a batch, no matter which process decodes it, or when.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from scaleprog.data.ahead import AHEAD
from scaleprog.data.augment import Augmentation, BatchRequest, Erasing, fill_of, normalization
from scaleprog.data.damaged import too_many, write_names
from scaleprog.data.lanes import Lane, lanes_ahead
from scaleprog.data.manifest import Manifest
from scaleprog.data.on_device import erase, normalize
from scaleprog.data.operations import Operation
from scaleprog.data.order import Order
from scaleprog.data.shard import ShardReader, StoredSample
from scaleprog.data.stream import Batch, Fill, Layout, Stream, slots_of
from scaleprog.data.tensor_operations import operate, packed
from scaleprog.data.token_labels import LabelShards, pack
from scaleprog.data.transfer import BUFFERED
from scaleprog.errors import DamagedSample, DataError
from scaleprog.files.location import local_path
from scaleprog.recipe.keys import AugmentSettings, DataSettings

TRAIN = "train"


def decoded_bytes(layout: Layout, data: DataSettings) -> int:
    """Bytes on the host for decoded batches: the current one and those decoded ahead."""
    return layout.bytes * (slots_of(data.prefetch) if data.workers else 1)


@dataclass(frozen=True)
class DataSet:
    """Shards, and how a recipe reads their images.

    Args:
        manifest: lists the shards.
        settings: workers, prefetch and cache.
        augment: the recipe's augmentation settings.
        channels: 1 or 3.
        token_labels: of the training shards, if the recipe has them.
        cores: that this rank may use; default: all that this process may use.
    """

    manifest: Manifest
    settings: DataSettings
    augment: AugmentSettings
    channels: int
    token_labels: LabelShards | None = None
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))

    @property
    def workers(self) -> int:
        """Decoding processes of this rank, unless there is less to share out."""
        return self.settings.processes(self.cores)

    def exceeds_memory(self, split: str, held: int) -> bool:
        """Whether `held` whole shards of a split would take more than `data.memory`."""
        most, memory = max((shard.bytes for shard in self.manifest.split(split)), default=0), self.settings.memory
        return memory is not None and held * most > memory * 2**20

    def identity(self) -> dict[str, str]:
        """What tells this data set's contents from another's, wherever they lie: a line per part."""
        labels = {"token_labels": self.token_labels.identity()} if self.token_labels else {}
        return self.manifest.identity() | labels

    def images(self, batch: Batch, device: torch.device) -> Tensor:
        """The images of a batch on a device, changed, normalized, and erased: (B_local, C, r, r) float32."""
        mean, std = normalization(self.augment, self.channels)
        pixels = batch.images.to(device, non_blocking=True)
        changed = operate(pixels, batch.operations, fill_of(self.augment, self.channels))
        images = normalize(changed, mean, std)
        erase(images, batch.erasing)
        return images


class TrainReader:
    """Streams the training batches of one rank.

    Args:
        data: the data set; its split "train" is read.
        order: order of the samples, made from this split's counts.
        seed: of the augmentation.
        rank, world: this process's rank, and the number of ranks that share each batch.

    Raises:
        DataError: the order was made from other shards, or the world size does not divide the lanes.
    """

    def __init__(self, data: DataSet, order: Order, seed: int, rank: int, world: int) -> None:
        self.order = order
        self.data = data.settings
        self.lanes = order.lanes_of(rank, world)
        self.workers = min(data.workers, len(self.lanes))
        self._augmentation = Augmentation(
            data.augment, data.channels, seed, data.manifest.sound, tracked=data.token_labels is not None
        )
        self._labels = data.token_labels
        maps_of = self._labels.load if self._labels else None
        self._root = os.path.join(data.manifest.root, "")
        on_disk = data.exceeds_memory(TRAIN, self._held)
        self._shards = ShardReader(data.manifest, TRAIN, self.data.cache * 2**20, maps_of, on_disk)
        if order.counts != tuple(shard.samples for shard in self._shards.shards):
            raise DataError(f"{data.manifest.root}: the shards of {TRAIN!r} do not match the order")

    def stream(self, requests: Iterable[BatchRequest], resolution: int) -> Stream:
        """Streams the requested batches, decoded ahead. Close the stream, or leave its `with`, to stop the workers.

        Args:
            requests: one per batch, beginning at any step. Every worker iterates over them, so an iterator, which can
                be used only once, is not allowed.
            resolution: the largest one requested, in pixels per side.

        Raises:
            TypeError: `requests` is an iterator.
            DataError: a shard or sample is missing, damaged or does not fit; also raised while iterating.
        """
        if isinstance(requests, Iterator):
            raise TypeError("every worker iterates over the requests: pass a list or another re-iterable value")
        self._shards.preload()
        produce, layout = partial(self._produce, requests), self._layout(resolution)
        return Stream(produce, len(self.lanes), self.workers, self.data.prefetch, layout)

    def memory(self, resolution: int) -> int:
        """The most memory that reading takes on the host, in bytes.

        That is the cached split, or else what the lanes hold and each worker reads ahead (whole shards, or the indices
        of those that stay in their files), plus the batches decoded ahead and the current one; from a URL, also what
        each worker is downloading.
        """
        per_map = self._labels.sample_bytes if self._labels else 0
        sizes = [self._shards.resident_bytes(shard) + shard.samples * per_map for shard in self._shards.shards]
        encoded = sum(sizes) + AHEAD * max(sizes) if self._shards.fits else self._held * max(sizes)
        if local_path(self._shards.manifest.root) is None:
            largest = max(shard.bytes for shard in self._shards.shards)
            encoded += max(self.workers, 1) * (BUFFERED + (largest if self._shards.on_disk else 0))
        return encoded + decoded_bytes(self._layout(resolution), self.data)

    @property
    def _held(self) -> int:
        """The most shards that are in memory at a time: one per lane, and those that each worker reads ahead."""
        return len(self.lanes) + AHEAD * max(self.workers, 1)

    def _layout(self, resolution: int) -> Layout:
        numbers = self._labels.numbers if self._labels else 0
        rows, augmentation = len(self.lanes) * self.order.per_lane, self._augmentation
        return Layout(rows, resolution, augmentation.channels, numbers, augmentation.deferred)

    def _produce(self, requests: Iterable[BatchRequest], owned: range) -> Iterator[Fill]:
        """Some of the rank's lanes in every batch, by their places among them."""
        lanes = self.lanes[owned.start : owned.stop]
        with lanes_ahead(self.order, requests, lanes, self._shards) as reading:
            for request in requests:
                yield request.resolution, partial(self._fill, reading, request)

    def _fill(self, lanes: Sequence[Lane], request: BatchRequest, batch: Batch) -> None:
        """Writes the rows of some lanes into a batch that has only those."""
        count = self.order.per_lane
        for place, lane in enumerate(lanes):
            rows = batch.rows(slice(place * count, (place + 1) * count))
            samples, origins, deferred, erasing = self._fill_images(lane, request, rows)
            rows.operations[:] = packed(deferred, self._augmentation.deferred)
            rows.erasing[:] = torch.tensor(erasing)
            rows.labels[:] = torch.tensor([sample.label for sample in samples])
            rows.ids[:] = torch.tensor([sample.id for sample in samples])
            if maps := [sample.map for sample in samples if sample.map is not None]:
                rows.token_labels[:] = pack(maps, torch.from_numpy(origins).float())

    def _fill_images(
        self, lane: Lane, request: BatchRequest, rows: Batch
    ) -> tuple[list[StoredSample], np.ndarray, list[tuple[Operation, ...]], list[Erasing]]:
        """Writes the images of one lane and the names of the damaged samples that they replace.

        Returns:
            The samples, and what `Augmentation.lane` returns about them.
        """
        wanted = samples = lane.take(request)
        names: dict[str, str] = {}  # of damaged samples, by location; those of earlier steps do not count
        while True:
            try:
                images = [sample.image for sample in samples]
                changes = self._augmentation.lane(images, request, lane.lane, rows.images.numpy())
                break
            except DamagedSample as error:
                if self.data.damaged == "stop":
                    raise DataError(f"{error}; or let the next sample take its place: data.damaged=replace") from error
                names[error.where] = error.where.removeprefix(self._root)
                if len(names) > self.data.most_damaged:
                    raise too_many(names.values(), self.data.most_damaged) from error
                samples = [
                    lane.instead(request.step, row, names) if sample.image[1] in names else sample
                    for row, sample in enumerate(samples)
                ]
        located = enumerate(sample.image[1] for sample in wanted)
        write_names({row: names[where] for row, where in located if where in names}, rows.replaced)
        return samples, *changes
