"""Packed shards hold decoded pixels, of which a crop reads only its rows.

A sample is `KEY.npy`, (H, W, 1 or 3) uint8; `KEY.cls`; and `KEY.crc`, the CRC-32 of the label's file followed by that
of the pixels, in hexadecimal. A process keeps an index of an open shard. The pixels stay in the file system's cache,
which all processes of a node share. A process verifies an image when it first reads it, not whole shards when it opens
them: in a first epoch, every rank would read and hash most of the data set for a few images of each shard.

Rows are read, not mapped into memory: a mapped file that is cut off, or whose server fails, ends the process by SIGBUS.
"""

import io
import math
import os
import re
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from scaleprog.data import tar
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.atomic import open_regular

EXTENSION, CHECKSUM = "npy", "crc"
HEADER_BYTES = 128
"""What numpy writes before the pixels of an image."""
INDEX_BYTES = 256
"""Memory that the index of a packed shard takes for a sample, about."""
HINT = "copy the shard again or rebuild it; `scaleprog shards check` finds every damaged one"
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \(([1-9][0-9]{0,5}), ([1-9][0-9]{0,5}), ([13])\), \} *\n"
)
_CRC = re.compile(rb"[0-9a-f]{8}")
Shape = tuple[int, int, int]
"""Height, width, channels."""


@dataclass(frozen=True)
class PackedShard:
    """The index of an open packed shard."""

    path: str
    keys: tuple[str, ...]
    data: "memoryview | OpenFile"
    """The whole tar."""
    checked: np.ndarray
    """(samples,) bool: the samples that this process has compared with their checksums; `PackedImage.rows` sets it."""
    labels: np.ndarray
    """(samples,) int64."""
    starts: np.ndarray
    """(samples,) int64: where each `KEY.npy` begins."""
    shapes: np.ndarray
    """(samples, 3) int64."""
    checksums: np.ndarray
    """(samples, 2) int64: the CRC-32 of the label alone, and of label and pixels."""
    maps: np.ndarray | None = None
    """As in `LoadedShard`."""

    @classmethod
    def index(
        cls,
        path: str,
        file: tar.Seekable,
        data: "memoryview | OpenFile",
        samples: Iterable[tuple[str, Mapping[str, tar.Member], int]],
    ) -> "PackedShard":
        """The index of the shard in `file`, from the keys, files, and labels of its samples; `data` has the same bytes.

        Raises:
            DataError: a sample has no pixels or no checksum.
        """
        keys, labels, starts, shapes, checksums = [], [], [], [], []
        for key, files, label in samples:
            try:
                if EXTENSION not in files or CHECKSUM not in files:
                    raise ValueError(f"it has .{', .'.join(files)}, but not both .{EXTENSION} and .{CHECKSUM}")
                if "cls" not in files:
                    raise ValueError("its label is not in a .cls file")
                pixels = files[EXTENSION]
                file.seek(pixels.start)
                shapes.append(shape_of(file.read(HEADER_BYTES), pixels.size))
                stored = _checksum(tar.read(file, files[CHECKSUM]))
                checksums.append((zlib.crc32(tar.read(file, files["cls"])), stored))
            except ValueError as error:
                raise DataError(f"{path}: sample {key!r}: not a packed image: {error}; {HINT}") from error
            keys.append(key)
            labels.append(label)
            starts.append(pixels.start)
        columns = [np.array(values, dtype=np.int64) for values in (labels, starts, shapes, checksums)]
        return cls(path, tuple(keys), data, np.zeros(len(keys), bool), *columns)

    def image(self, index: int) -> tuple["PackedImage", str]:
        """The image with this index, none of which has been read yet, and its location."""
        height, width, channels = self.shapes[index].tolist()
        where = f"{self.path}: sample {self.keys[index]!r}"
        return PackedImage(self, index, (height, width, channels), where), where


@dataclass(frozen=True)
class PackedImage:
    """One image of a packed shard."""

    shard: PackedShard
    index: int
    shape: Shape
    where: str

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows `first` to `last`, (last - first, W, C) uint8. The first call reads and verifies the whole image.

        Raises:
            DataError: the image or its label is damaged, or the file has been cut off.
            Unavailable: it cannot be read now.
        """
        height, width, channels = self.shape
        if self.shard.checked[self.index]:
            return self._read(HEADER_BYTES + first * width * channels, (last - first, width, channels))
        content = self._read(0, (HEADER_BYTES + height * width * channels,))
        of_label, stored = self.shard.checksums[self.index].tolist()
        if zlib.crc32(content.data, of_label) != stored:
            raise DataError(f"{self.where}: damaged: its checksum differs from .{CHECKSUM}; {HINT}")
        self.shard.checked[self.index] = True
        return content[HEADER_BYTES:].reshape(self.shape)[first:last]

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes of `KEY.npy` from `offset`, as an array of this shape."""
        start = int(self.shard.starts[self.index]) + offset
        with explained(self.where):
            content = self.shard.data[start : start + math.prod(shape)]
        array = np.frombuffer(content, np.uint8).reshape(shape)
        return array if array.flags.writeable else array.copy()  # torch warns of arrays that are not writable


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns the errors of an `OpenFile` into DataError and Unavailable that say where."""
    try:
        yield
    except EOFError as error:
        raise DataError(f"{where}: truncated after it was opened; {HINT}") from error
    except OSError as error:
        raise Unavailable(f"{where}: cannot be read now: {error}") from error


class OpenFile:
    """The bytes of a file that stays open, read where they are sliced. Forked processes can share it."""

    def __init__(self, file: BinaryIO) -> None:
        """Takes over the file, and closes it in the end."""
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)

    def __getitem__(self, part: slice) -> memoryview:
        """Raises OSError, or EOFError if the file has become shorter."""
        buffer = np.empty(part.stop - part.start, np.uint8).data
        left, start = buffer, part.start
        while left:
            if not (count := os.preadv(self._descriptor, [left], start)):
                raise EOFError
            left, start = left[count:], start + count
        return buffer


def encode(pixels: np.ndarray, label: int) -> dict[str, bytes]:
    """The files of one sample by extension, from (H, W, 1 or 3) uint8."""
    file, text = io.BytesIO(), b"%d" % label
    npy.write_array(file, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    content = file.getvalue()
    return {EXTENSION: content, "cls": text, CHECKSUM: b"%08x" % zlib.crc32(content, zlib.crc32(text))}


def problem_of(files: Mapping[str, bytes]) -> str:
    """Why training would refuse the files of a packed sample; empty if it would not."""
    try:
        shape_of(files[EXTENSION], len(files[EXTENSION]))
        if CHECKSUM not in files:
            raise ValueError(f"no .{CHECKSUM} file")
        if zlib.crc32(files[EXTENSION], zlib.crc32(files.get("cls", b""))) != _checksum(files[CHECKSUM]):
            raise ValueError(f"damaged: its checksum differs from .{CHECKSUM}")
    except ValueError as error:
        return f"not a packed image: {error}"
    return ""


def shape_of(head: bytes, size: int) -> Shape:
    """The shape of an image from the beginning of its file of `size` bytes. Raises ValueError for any other array."""
    found = _HEADER.match(head)
    if found is None or found.end() != HEADER_BYTES:
        raise ValueError(f"its header is not that of (H, W, 1 or 3) uint8 in C order: {head[:HEADER_BYTES]!r}")
    height, width, channels = map(int, found.groups())
    if size != (expected := HEADER_BYTES + height * width * channels):
        raise ValueError(f"it has {size} bytes, but its header says {height} x {width} x {channels}: {expected}")
    return height, width, channels


def opened(path: str) -> BinaryIO | None:
    """The file at `path`, open, if it is a packed shard; otherwise None."""
    with suppress(OSError, ValueError):
        file = open_regular(path)
        if is_packed(file, os.fstat(file.fileno()).st_size):
            return file
        file.close()
    return None


def is_packed(file: tar.Seekable, size: int) -> bool:
    """Whether the first sample of a tar is a packed image."""
    with suppress(OSError, ValueError):
        for _, files in tar.samples(file, size):
            return EXTENSION in files
    return False


def _checksum(text: bytes) -> int:
    if not _CRC.fullmatch(text):
        raise ValueError(f".{CHECKSUM} is {text[:20]!r}, expected eight hexadecimal digits")
    return int(text, 16)
