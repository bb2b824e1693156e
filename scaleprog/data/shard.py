"""One shard: its samples found and checked once; whole in memory, or in its file if it is packed or memory is short."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import mmap
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from scaleprog.data import labels, packed, tar
from scaleprog.data.decode import Encoded
from scaleprog.data.labels import Numbering
from scaleprog.data.manifest import Manifest
from scaleprog.data.packed import OpenFile, PackedShard
from scaleprog.data.source import GZIPPED, Shard, check_size, inflated, source_of
from scaleprog.data.tar import Seekable
from scaleprog.errors import DataError, Unavailable

ENCODED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_EXTENSIONS = (*ENCODED_EXTENSIONS, packed.EXTENSION)
EXTENSIONS = (*ENCODED_EXTENSIONS, *labels.KINDS)
_INFLATED = 2  # assumed bytes in memory per byte of a gzipped shard; images hardly shrink
LoadShard = Callable[[int], "LoadedShard | PackedShard"]
MapsOf = Callable[[int, Sequence[str], bool], np.ndarray]
"""(index of a shard, its keys, whether to verify the checksum) -> the samples' label maps, (samples, h, w, K)."""


@dataclass(frozen=True)
class LoadedShard:
    """A shard whose samples are known. It consists of few large objects, so that forked workers share its pages: the
    reference counts of one object per image would make them copy every page."""

    path: str
    keys: tuple[str, ...]
    data: memoryview | OpenFile
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
        """The encoded image, without a copy if it is in memory, and its location."""
        where = f"{self.path}: sample {self.keys[index]!r}"
        place = slice(int(self.starts[index]), int(self.ends[index]))
        if isinstance(self.data, memoryview):
            return self.data[place], where
        with packed.explained(where):
            return self.data[place], where


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
            on_disk: whether images stay in the files, and are read one by one, as those of packed shards always do.
        """
        self.manifest = manifest
        self.shards = manifest.split(split)
        self._source = source_of(manifest.root, manifest.store)
        self.fits = sum(shard.bytes for shard in self.shards) <= cache and not self.packed
        self.on_disk = on_disk and not self.fits
        self._numbering = Numbering(manifest.classes)
        self._kept: list[LoadedShard | PackedShard] = []
        self._maps_of = maps_of
        self._held: WeakValueDictionary[int, LoadedShard | PackedShard] = WeakValueDictionary()
        self._verified: set[int] = set()
        self._checked: dict[int, np.ndarray] = {}

    @cached_property
    def packed(self) -> bool:
        """Whether the first shard is packed and local, and so probably all. The file system caches these."""
        file = packed.opened(self._source.path(self.shards[0].name)) if self.shards else None
        if file:
            file.close()
        return file is not None

    def resident_bytes(self, shard: Shard) -> int:
        """Memory that a process takes to hold a shard."""
        if shard.name.endswith(GZIPPED):
            return _INFLATED * shard.bytes
        return shard.samples * packed.INDEX_BYTES if self.packed or self.on_disk else shard.bytes

    def preload(self) -> None:
        """Fills the cache if the split fits. Call it before forking workers, so that they share it."""
        if self.fits and not self._kept:
            self._kept = [self.load(index) for index in range(len(self.shards))]

    def load(self, index: int) -> LoadedShard | PackedShard:
        """The shard with this index in the split.

        Raises:
            DataError: it cannot be read, differs from the manifest, or holds samples that do not fit.
            Unavailable: it cannot be read now.
        """
        loaded = self._held.get(index)
        if loaded is None:
            shard, verify = self.shards[index], index not in self._verified
            loaded = self._in_file(shard, verify)
            if loaded is None:
                path, stored = self._source.path(shard.name), self._source.read(shard, verify)
                content = inflated(shard.name, stored, path)
                loaded = self._parsed(content, len(content), memoryview(content).toreadonly(), shard)
            if isinstance(loaded, PackedShard):
                loaded = replace(loaded, checked=self._checked.setdefault(index, loaded.checked))
            if self._maps_of is not None:
                loaded = replace(loaded, maps=self._maps_of(index, loaded.keys, verify))
            self._verified.add(index)
            self._held[index] = loaded
        return loaded

    def _in_file(self, shard: Shard, verify: bool) -> LoadedShard | PackedShard | None:
        """A shard whose file stays open, because it is packed or `on_disk`; None if it is to be read whole."""
        path = self._source.path(shard.name)
        if shard.name.endswith(GZIPPED):
            return None
        found = packed.opened(path)
        file = self._source.open(shard, verify) if found is None and self.on_disk else found
        if file is None:
            return None
        if isinstance(file, mmap):
            return self._parsed(file, len(file), memoryview(file).toreadonly(), shard)
        data, size = OpenFile(file), os.fstat(file.fileno()).st_size
        check_size(path, size, shard)
        try:
            return self._parsed(file, size, data, shard)
        except OSError as error:
            raise Unavailable(f"{path}: cannot read the shard now: {error}") from error

    def _parsed(
        self, file: Seekable, size: int, data: memoryview | OpenFile, shard: Shard
    ) -> LoadedShard | PackedShard:
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
        self._shard: LoadedShard | PackedShard | None = None
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
    file: Seekable, size: int, data: memoryview | OpenFile, shard: Shard, path: str, numbering: Numbering
) -> LoadedShard | PackedShard:
    """The samples of the tar in `file`, of `size` bytes; `data` holds the same bytes. Raises like `_samples`."""
    samples = _samples(file, size, shard, path, numbering)
    if packed.is_packed(file, size):
        return PackedShard.index(path, file, data, samples)
    keys, starts, ends, numbers = list[str](), list[int](), list[int](), list[int]()
    for key, files, number in samples:
        if packed.EXTENSION in files:
            raise DataError(f"{path}: sample {key!r} is packed, but others are not; rebuild the shard")
        [image] = [files[extension] for extension in ENCODED_EXTENSIONS if extension in files]
        keys.append(key)
        starts.append(image.start)
        ends.append(image.start + image.size)
        numbers.append(number)
    begins, stops, classes_of = (np.array(values, dtype=np.int64) for values in (starts, ends, numbers))
    return LoadedShard(path, tuple(keys), data, begins, stops, classes_of)


def _samples(
    file: Seekable, size: int, shard: Shard, path: str, numbering: Numbering
) -> Iterator[tuple[str, dict[str, tar.Member], int]]:
    """The key, files, and label of each sample in a tar of `size` bytes.

    Raises:
        DataError: the samples are not sound.
        OSError: they cannot be read.
    """
    keys = set[str]()

    def explained(files: Collection[str]) -> str:
        return tar.why_incomplete(file, size, key, files, EXTENSIONS) or "rebuild the shard"

    try:
        for key, files in tar.samples(file, size):
            where = f"{path}: sample {key!r}"
            if (count := sum(extension in files for extension in IMAGE_EXTENSIONS)) != 1:
                images = f"{count} images" if count else "no image"
                raise DataError(f"{where} has {images} ({', '.join(IMAGE_EXTENSIONS)}); {explained(files)}")
            kind = labels.kind_of(files)
            if kind is None:
                raise DataError(f"{where}: its label (.cls) is b'', because there is no such file; {explained(files)}")
            if key in keys:
                raise DataError(f"{where} occurs twice; rebuild the shard")
            keys.add(key)
            yield key, files, _number(kind, tar.read(file, files[kind]), numbering, where)
    except ValueError as error:
        raise DataError(f"{path}: not a tar of samples ({error}); rebuild the shard") from error
    if len(keys) != shard.samples:
        raise DataError(
            f"{path}: holds {len(keys)} samples, but the manifest says {shard.samples}; "
            "rewrite the manifest with `scaleprog shards check --write-manifest`"
        )


def _number(kind: str, content: bytes, numbering: Numbering, where: str) -> int:
    try:
        return numbering.number(labels.parse(kind, content))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
