"""One shard: a file that is checked against the manifest and split into samples, and read whole unless it is packed."""

import errno
import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import BinaryIO, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from scaleprog.data import packed, tar
from scaleprog.data.augment import Encoded
from scaleprog.data.manifest import MOST_BYTES, Manifest, Shard
from scaleprog.data.packed import PackedShard
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.atomic import open_regular

ENCODED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_EXTENSIONS = (*ENCODED_EXTENSIONS, packed.EXTENSION)
EXTENSIONS = (*ENCODED_EXTENSIONS, "cls")
MapsOf = Callable[[int, Sequence[str], bool], np.ndarray]
"""(index of a shard, its keys, whether to verify the checksum) -> the samples' label maps, (samples, h, w, K)."""
NO_FILE = (errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Errors for a path that is not a regular file; another attempt would fail, too."""


@dataclass(frozen=True)
class LoadedShard:
    """A shard in memory. It consists of few large objects, so that forked workers share its pages: the reference counts
    of one object per image would make them copy every page."""

    path: str
    keys: tuple[str, ...]
    data: memoryview
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
    """Reads the shards of a split whole and checks them against the manifest.

    A shard is not read again while any caller holds it, and never again if the split fits into the cache. A process
    verifies size and checksum of a shard the first time that it reads the shard.
    """

    def __init__(self, manifest: Manifest, split: str, cache: int = 0, maps_of: MapsOf | None = None) -> None:
        """`cache`: a split of at most so many bytes stays in memory; `maps_of`: reads label maps."""
        self.manifest = manifest
        self.shards = manifest.split(split)
        self.fits = sum(shard.bytes for shard in self.shards) <= cache and not self.packed
        self._kept: list[LoadedShard | PackedShard] = []
        self._maps_of = maps_of
        self._held: WeakValueDictionary[int, LoadedShard | PackedShard] = WeakValueDictionary()
        self._verified: set[int] = set()
        self._checked: dict[int, np.ndarray] = {}

    @cached_property
    def packed(self) -> bool:
        """Whether the first shard is packed, and so probably all. The file system caches these."""
        file = packed.opened(self.manifest.path(self.shards[0])) if self.shards else None
        if file:
            file.close()
        return file is not None

    def resident_bytes(self, shard: Shard) -> int:
        """Memory that a process takes to hold a shard."""
        return shard.samples * packed.INDEX_BYTES if self.packed else shard.bytes

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
            shard = self.shards[index]
            path = self.manifest.path(shard)
            verify = index not in self._verified
            classes = len(self.manifest.classes)
            loaded = _open_packed(shard, path, classes)
            if loaded is None:
                content = read_shard(path, shard, verify)
                loaded = _parse(io.BytesIO(content), len(content), memoryview(content), shard, path, classes)
            if isinstance(loaded, PackedShard):
                loaded = replace(loaded, checked=self._checked.setdefault(index, loaded.checked))
            if self._maps_of is not None:
                loaded = replace(loaded, maps=self._maps_of(index, loaded.keys, verify))
            self._verified.add(index)
            self._held[index] = loaded
        return loaded


class StoredSample(NamedTuple):
    """One encoded sample."""

    image: Encoded
    label: int
    id: int
    """Position in the split: samples of earlier shards + index in its shard."""
    map: np.ndarray | None = None
    """(h, w, K), its label map, if there are token labels."""


class Cursor:
    """Reads samples and holds the current shard, so that a pass over the shards reads each of them once."""

    def __init__(self, shards: ShardReader) -> None:
        self._shards = shards
        self._offsets = np.cumsum([0] + [shard.samples for shard in shards.shards])
        self._shard: LoadedShard | PackedShard | None = None
        self._index = -1

    def sample(self, shard: int, index: int) -> StoredSample:
        """The sample with this index in this shard of the split. Raises like `ShardReader.load`."""
        if self._shard is None or shard != self._index:
            self._shard = None  # frees the memory of the last shard before reading the next one
            self._shard, self._index = self._shards.load(shard), shard
        label, position = int(self._shard.labels[index]), int(self._offsets[shard]) + index
        found = None if self._shard.maps is None else self._shard.maps[index]
        return StoredSample(self._shard.image(index), label, position, found)

    def at(self, position: int) -> StoredSample:
        """The sample at this position in the split. Raises like `ShardReader.load`."""
        shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.sample(shard, position - int(self._offsets[shard]))


def read_shard(path: str, shard: Shard, verify: bool) -> bytes:
    """The bytes of a shard; `verify`: whether to compare size and checksum. Raises DataError, or Unavailable."""
    content = _read(path, shard.bytes)
    if verify:
        _verify(content, shard, path)
    return content


def _read(path: str, size: int) -> bytes:
    """Reads a whole shard, up to `size` + 1 bytes, to detect one that is too long. Refuses all but regular files."""
    if size > MOST_BYTES:
        raise DataError(f"{path}: {size} bytes, but a shard may have at most {MOST_BYTES}; build smaller shards")
    try:
        with open_regular(path) as stream:
            return stream.read(size + 1)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path}: cannot read the shard ({error}); is data.path right and reachable?") from error
    except OSError as error:
        if error.errno in NO_FILE:
            raise DataError(f"{path}: the shard is not a regular file; copy it again or rebuild it") from error
        raise Unavailable(f"{path}: cannot read the shard now: {error}") from error


def _open_packed(shard: Shard, path: str, classes: int) -> LoadedShard | PackedShard | None:
    """The index of the shard at `path`, which stays open; None if it is not packed."""
    file = packed.opened(path)
    if file is None:
        return None
    data, size = packed.OpenFile(file), os.fstat(file.fileno()).st_size
    _verify_size(size, shard, path)
    try:
        return _parse(file, size, data, shard, path, classes)
    except OSError as error:
        raise Unavailable(f"{path}: cannot read the shard now: {error}") from error


def _verify(content: bytes, shard: Shard, path: str) -> None:
    _verify_size(len(content) if len(content) <= shard.bytes else os.stat(path).st_size, shard, path)
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(f"{path}: the checksum differs from the manifest's; {packed.HINT}")


def _verify_size(size: int, shard: Shard, path: str) -> None:
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise DataError(f"{path}: {what}: {size} of {shard.bytes} bytes; {packed.HINT}")


def _parse(
    file: BinaryIO, size: int, data: memoryview | packed.OpenFile, shard: Shard, path: str, classes: int
) -> LoadedShard | PackedShard:
    """The samples of the tar in `file`, of `size` bytes; `data` holds the same bytes. Raises like `_samples`."""
    samples = _samples(file, size, shard, path, classes)
    if packed.is_packed(file, size):
        return PackedShard.index(path, file, data, samples)
    assert isinstance(data, memoryview), "only packed shards stay in their files"
    keys, starts, ends, labels = list[str](), list[int](), list[int](), list[int]()
    for key, files, label in samples:
        if packed.EXTENSION in files:
            raise DataError(f"{path}: sample {key!r} is packed, but others are not; rebuild the shard")
        [image] = [files[extension] for extension in ENCODED_EXTENSIONS if extension in files]
        keys.append(key)
        starts.append(image.start)
        ends.append(image.start + image.size)
        labels.append(label)
    begins, stops, classes_of = (np.array(values, dtype=np.int64) for values in (starts, ends, labels))
    return LoadedShard(path, tuple(keys), data, begins, stops, classes_of)


def _samples(
    file: BinaryIO, size: int, shard: Shard, path: str, classes: int
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
            if "cls" not in files:
                raise DataError(f"{where}: its label (.cls) is b'', because there is no such file; {explained(files)}")
            if key in keys:
                raise DataError(f"{where} occurs twice; rebuild the shard")
            keys.add(key)
            yield key, files, _label(tar.read(file, files["cls"]), classes, where)
    except ValueError as error:
        raise DataError(f"{path}: not a tar of samples ({error}); rebuild the shard") from error
    if len(keys) != shard.samples:
        raise DataError(
            f"{path}: holds {len(keys)} samples, but the manifest says {shard.samples}; "
            "rewrite the manifest with `scaleprog shards check --write-manifest`"
        )


def _label(text: bytes, classes: int, where: str) -> int:
    label = tar.label(text)
    if label is None:
        raise DataError(f"{where}: its label (.cls) is {text[:20]!r}, not a number; rebuild the shard")
    if not 0 <= label < classes:
        raise DataError(
            f"{where}: label {label} is outside 0-{classes - 1}, the manifest's {classes} classes; "
            "add the missing classes to the manifest or rebuild the shard"
        )
    return label
