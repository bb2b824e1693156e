"""One shard: its samples found and checked once, its images in memory, or on disk where memory is short."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakValueDictionary, finalize

import numpy as np

from scaleprog.data import labels, tar
from scaleprog.data.augment import Encoded
from scaleprog.data.labels import Numbering
from scaleprog.data.manifest import Manifest
from scaleprog.data.source import Shard, source_of
from scaleprog.data.tar import Seekable
from scaleprog.errors import DataError, Unavailable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, *labels.KINDS)
LoadShard = Callable[[int], "LoadedShard"]
INDEX_BYTES = 512
"""About what a sample takes in memory whose image stays on disk."""
MapsOf = Callable[[int, Sequence[str], bool], np.ndarray]
"""(index of a shard, its keys, whether to verify the checksum) -> the samples' label maps, (samples, h, w, K)."""


class OnDisk:
    """The bytes of an open file, read where they are sliced."""

    def __init__(self, descriptor: int, path: str) -> None:
        """Takes over the descriptor, and closes it at the end."""
        self._descriptor, self._path = descriptor, path
        finalize(self, os.close, descriptor)

    def __getitem__(self, part: slice) -> memoryview:
        """Raises Unavailable if they cannot be read, or are no longer there."""
        size = part.stop - part.start
        try:
            content = os.pread(self._descriptor, size, part.start)
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot read the shard now: {error}") from error
        if len(content) != size:
            raise Unavailable(f"{self._path}: was truncated while the run read it")
        return memoryview(content)


@dataclass(frozen=True)
class LoadedShard:
    """A shard whose samples are known. It consists of few large objects, so that forked workers share its pages: the
    reference counts of one object per image would make them copy every page."""

    path: str
    keys: tuple[str, ...]
    data: memoryview | OnDisk
    """The whole tar."""
    starts: np.ndarray
    """(samples,) int64: where each image begins in `data`."""
    ends: np.ndarray
    """(samples,) int64: where it ends."""
    labels: np.ndarray
    """(samples,) int64."""
    maps: np.ndarray | None = None
    """(samples, h, w, K), the samples' label maps, if there are token labels."""

    def image(self, index: int) -> Encoded:
        """The encoded image, without a copy, and its location."""
        return self.data[int(self.starts[index]) : int(self.ends[index])], f"{self.path}: sample {self.keys[index]!r}"


class ShardReader:
    """Reads the shards of a split and checks them against the manifest.

    A shard is not read again while any caller holds it, and never again if the split fits into the cache. A process
    verifies size and checksum of a shard the first time that it reads the shard.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        cache: int = 0,
        maps_of: MapsOf | None = None,
        on_disk: bool = False,
    ) -> None:
        """
        Args:
            manifest: lists the shards.
            split: their split.
            cache: a split of at most so many bytes stays in memory.
            maps_of: reads label maps.
            on_disk: whether images stay in the files, and are read one by one.
        """
        self.manifest = manifest
        self.shards = manifest.split(split)
        self.fits = sum(shard.bytes for shard in self.shards) <= cache
        self._source = source_of(manifest.root, manifest.store)
        self.on_disk = on_disk and not self.fits
        self._numbering = Numbering(manifest.classes)
        self._kept: list[LoadedShard] = []
        self._maps_of = maps_of
        self._held: WeakValueDictionary[int, LoadedShard] = WeakValueDictionary()
        self._verified: set[int] = set()

    def preload(self) -> None:
        """Fills the cache if the split fits. Call it before forking workers, so that they share it."""
        if self.fits and not self._kept:
            self._kept = [self.load(index) for index in range(len(self.shards))]

    def load(self, index: int) -> LoadedShard:
        """The shard with this index in the split.

        Raises:
            DataError: it cannot be read, differs from the manifest, or holds samples that do not fit.
            Unavailable: it cannot be read now.
        """
        loaded = self._held.get(index)
        if loaded is None:
            shard, verify = self.shards[index], index not in self._verified
            loaded = self._on_disk_now(shard, verify) if self.on_disk else None
            if loaded is None:
                content = self._source.read(shard, verify)
                loaded = self._parsed(content, len(content), memoryview(content), shard)
            if self._maps_of is not None:
                loaded = replace(loaded, maps=self._maps_of(index, loaded.keys, verify))
            self._verified.add(index)
            self._held[index] = loaded
        return loaded

    def _on_disk_now(self, shard: Shard, verify: bool) -> LoadedShard | None:
        """A shard whose images stay in its file; None if it cannot be stored on disk."""
        file = self._source.open(shard, verify)
        if file is None:
            return None
        with file:
            size = os.fstat(file.fileno()).st_size
            data = OnDisk(os.dup(file.fileno()), self._source.path(shard.name))
            return self._parsed(file, size, data, shard)

    def _parsed(self, file: Seekable, size: int, data: memoryview | OnDisk, shard: Shard) -> LoadedShard:
        return _parse(file, size, data, shard, self._source.path(shard.name), self._numbering)


class StoredSample(NamedTuple):
    """One encoded sample."""

    image: Encoded
    label: int
    id: int
    """Position in the split: samples of earlier shards + index in its shard."""
    map: np.ndarray | None = None
    """(h, w, K), its label map, if there are token labels."""


class Cursor:
    """Reads samples and holds the current shard, so that a pass over the shards reads each of them once.

    Args:
        shards: reads the split.
        load: gives a shard, in place of `shards.load`.
    """

    def __init__(self, shards: ShardReader, load: LoadShard | None = None) -> None:
        self._load = load or shards.load
        self._offsets = np.cumsum([0] + [shard.samples for shard in shards.shards])
        self._shard: LoadedShard | None = None
        self._index = -1

    def sample(self, shard: int, index: int) -> StoredSample:
        """The sample with this index in this shard of the split. Raises like `ShardReader.load`."""
        if self._shard is None or shard != self._index:
            self._shard = None  # frees the memory of the last shard before reading the next one
            self._shard, self._index = self._load(shard), shard
        label, position = int(self._shard.labels[index]), int(self._offsets[shard]) + index
        found = None if self._shard.maps is None else self._shard.maps[index]
        return StoredSample(self._shard.image(index), label, position, found)

    def at(self, position: int) -> StoredSample:
        """The sample at this position in the split. Raises like `ShardReader.load`."""
        shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.sample(shard, position - int(self._offsets[shard]))


def _parse(
    file: Seekable, size: int, data: memoryview | OnDisk, shard: Shard, path: str, numbering: Numbering
) -> LoadedShard:
    keys, starts, ends, numbers = dict[str, None](), list[int](), list[int](), list[int]()

    def explained(files: Collection[str]) -> str:
        return tar.why_incomplete(file, size, key, files, EXTENSIONS) or "rebuild the shard"

    try:
        for key, files in tar.samples(file, size):
            where = f"{path}: sample {key!r}"
            images = [files[extension] for extension in IMAGE_EXTENSIONS if extension in files]
            if len(images) != 1:
                count = f"{len(images)} images" if images else "no image"
                raise DataError(f"{where} has {count} ({', '.join(IMAGE_EXTENSIONS)}); {explained(files)}")
            kind = labels.kind_of(files)
            if kind is None:
                raise DataError(f"{where}: its label (.cls) is b'', because there is no such file; {explained(files)}")
            if key in keys:
                raise DataError(f"{where} occurs twice; rebuild the shard")
            keys[key] = None
            starts.append(images[0].start)
            ends.append(images[0].start + images[0].size)
            numbers.append(_number(kind, tar.read(file, files[kind]), numbering, where))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a tar of samples ({error}); rebuild the shard") from error
    if len(keys) != shard.samples:
        raise DataError(
            f"{path}: holds {len(keys)} samples, but the manifest says {shard.samples}; "
            "rewrite the manifest with `scaleprog shards check --write-manifest`"
        )
    begins, stops, classes = (np.array(values, dtype=np.int64) for values in (starts, ends, numbers))
    return LoadedShard(path, tuple(keys), data, begins, stops, classes)


def _number(kind: str, content: bytes, numbering: Numbering, where: str) -> int:
    try:
        return numbering.number(labels.parse(kind, content))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
