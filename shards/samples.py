"""Samples in shards. A sample is `KEY.{png|jpg|jpeg|webp}`, the image's bytes, and `KEY.cls`, the class index.

In packed shards, the image is `KEY.npy` (`data/packed.py`).

This is the WebDataset format, so other WebDataset tools can read these shards, and scaleprog can read theirs.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from webdataset.writer import TarWriter

from scaleprog.data import tar
from scaleprog.data.shard import IMAGE_EXTENSIONS
from scaleprog.data.source import MOST_BYTES, Shard
from scaleprog.errors import DataError
from scaleprog.files.atomic import open_regular


@dataclass(frozen=True)
class SourceSample:
    """One labeled image, still encoded."""

    key: str
    extension: str
    """One of ENCODED_EXTENSIONS."""
    image: bytes
    label: int

    def members(self) -> Mapping[str, bytes]:
        """The files of the sample by extension."""
        extension = self.extension.replace("jpeg", "jpg")  # others look for jpg, png, and webp
        return {extension: self.image, "cls": b"%d" % self.label}


@dataclass(frozen=True)
class Pixels:
    """The samples of one shard as images in memory. Iterating encodes them as PNG."""

    split: str
    indices: np.ndarray
    """Places in the original data set, (N,)."""
    images: np.ndarray
    """(N, H, W) uint8, gray, or (N, H, W, 3), RGB."""
    labels: np.ndarray
    """(N,) uint8."""

    @classmethod
    def shards(
        cls, split: str, order: np.ndarray, images: np.ndarray, labels: np.ndarray, count: int
    ) -> "list[Pixels]":
        """A split in the order of the places `order` (M,), cut into at most `count` shards as evenly as possible."""
        return [cls(split, part, images[part], labels[part]) for part in np.array_split(order, min(count, len(order)))]

    def __iter__(self) -> Iterator[SourceSample]:
        for index, image, label in zip(self.indices, self.images, self.labels):
            _, png = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])  # OpenCV takes BGR
            yield SourceSample(f"{self.split}-{index:05d}", "png", png.tobytes(), int(label))


class Sample(Protocol):
    """What a shard can hold."""

    @property
    def key(self) -> str: ...

    def members(self) -> Mapping[str, bytes]:
        """The files of the sample by extension."""
        ...


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Writes `samples` to a new tar at `path`. When this returns, the tar is on disk. Equal samples give equal bytes.

    Returns:
        The manifest entry of the shard.

    Raises:
        OSError: the file exists or cannot be written (for example, a full disk). A partly written file stays behind.
        DataError: the samples are more than a shard may hold.
    """
    count = 0
    with open(path, "xb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, **sample.members()})
                count += 1
                if file.tell() > MOST_BYTES:
                    raise DataError(
                        f"{path}: more than {MOST_BYTES} bytes after {count} samples, the limit of a shard; build with "
                        "fewer samples per shard"
                    )
        file.flush()
        os.fsync(file.fileno())
    return Shard.measure(path, count)


def read_members(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the samples of a shard in order, as (key, {extension: bytes}). Does not check them; see `read_label`.

    Raises:
        DataError: the tar is missing, damaged, or ends before its end marker. The message names the last readable key.
    """
    try:
        with open_regular(path) as file:
            yield from members_of(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read this tar: {error.strerror or error}. Copy or build it again.") from error


def members_of(file: tar.Seekable, size: int, where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Like `read_members`, from an open file of `size` bytes; `where`: its path or URL."""
    key = None
    try:
        if size > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, but the limit is {MOST_BYTES}, because a shard is read whole")
        for found, files in tar.samples(file, size):
            key = found
            yield key, {extension: tar.read(file, member) for extension, member in files.items()}
    except (OSError, ValueError) as error:
        at = f"after key {key!r}" if key else "at its first sample"
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"{where}: cannot read this tar {at}: {what}. Copy or build it again.") from error


def image_extension(members: Mapping[str, bytes]) -> str:
    """The extension of a sample's image. Raises ValueError unless the sample has exactly one image."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} images ({', '.join(members)}), expected exactly one of .{', .'.join(IMAGE_EXTENSIONS)}"
        )
    return found[0]


def read_label(members: Mapping[str, bytes]) -> int:
    """The class index in a sample's `cls` member, in ASCII decimal. Raises ValueError if there is none."""
    if "cls" not in members:
        raise ValueError(f"no .cls member ({', '.join(members)})")
    text = members["cls"].strip()
    label = tar.label(text)
    if label is None or label < 0 or text.startswith(b"-"):
        raise ValueError(f".cls is {text[:20]!r}, expected a class index such as b'7'")
    return label


def sniff(image: bytes) -> str | None:
    """The format of an encoded image, from its first bytes: jpg, png, or webp; None for anything else."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return None
