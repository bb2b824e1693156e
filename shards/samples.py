"""What a sample is inside a shard: `KEY.{png|jpg|jpeg|webp}` with the image's bytes, and `KEY.cls`, the class index.

This is the WebDataset format, so other WebDataset tools read our shards and we read theirs.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from scaleprog.data import tar
from scaleprog.data.manifest import MOST_BYTES, Shard
from scaleprog.data.shard import IMAGE_EXTENSIONS
from scaleprog.errors import DataError
from scaleprog.files import open_regular


@dataclass(frozen=True)
class Sample:
    """One labelled image, still encoded."""

    key: str
    extension: str
    """One of IMAGE_EXTENSIONS."""
    image: bytes
    label: int


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write `samples` to a new tar at `path`, on disk when this returns; the same samples give the same bytes.

    Raises:
        OSError: the file exists or cannot be written (a full disk); what was written so far is left behind.
    """
    count = 0
    with open(path, "xb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, sample.extension: sample.image, "cls": b"%d" % sample.label})
                count += 1
        file.flush()
        os.fsync(file.fileno())
    return Shard.measure(path, count)


def read_members(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard as they lie in it, as (key, {extension: bytes}); unchecked, see `read_label`.

    Raises:
        DataError: the tar is missing, damaged, or ends before its end marker; names the last key that could be read.
    """
    key = None
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise ValueError(f"{size} bytes, and a shard is read whole: at most {MOST_BYTES}")
            for found, files in tar.samples(file, size):
                key = found
                yield key, {extension: tar.read(file, member) for extension, member in files.items()}
    except (OSError, ValueError) as error:
        where = f"after key {key!r}" if key else "at its first sample"
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"{path}: not a readable tar {where}: {what}. Copy or build it again.") from error


def image_extension(members: Mapping[str, bytes]) -> str:
    """Which of a sample's members is its image; ValueError unless there is exactly one."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(found) != 1:
        raise ValueError(f"{len(found)} images ({', '.join(members)}), expected one of .{', .'.join(IMAGE_EXTENSIONS)}")
    return found[0]


def read_label(members: Mapping[str, bytes]) -> int:
    """The class index in a sample's `cls` member, ASCII decimal; ValueError where there is none."""
    if "cls" not in members:
        raise ValueError(f"no .cls member ({', '.join(members)})")
    text = members["cls"].strip()
    label = tar.label(text)
    if label is None or label < 0 or text.startswith(b"-"):
        raise ValueError(f".cls is {text[:20]!r}, expected a class index such as b'7'")
    return label


def sniff(image: bytes) -> str | None:
    """The format that encoded bytes begin like: jpg, png, webp; None for anything else."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return "webp"
    return None
