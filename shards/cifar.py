"""Builds shards of lossless PNGs from CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), as their binary version has them.

50,000 + 10,000 color images of 32 x 32 pixels. The Python version consists of pickles, which scaleprog does not read.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.files.atomic import open_regular, read_text
from scaleprog.shards.build import build as build_shards
from scaleprog.shards.build import finished
from scaleprog.shards.samples import Pixels

SIDE, CHANNELS = 32, 3
SHARDS = {"train": 50, "val": 10}


@dataclass(frozen=True)
class Layout:
    """The files of one of the two data sets. Each record is its labels, one byte each, and then its pixels.

    Args:
        names: the file of the class names, one a line.
        files: by split, the files of the records.
        labels: bytes of labels in a record; the last one is the class.
    """

    names: str
    files: dict[str, tuple[str, ...]]
    labels: int


CIFAR_10 = Layout(
    "batches.meta.txt",
    {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "val": ("test_batch.bin",)},
    labels=1,
)
CIFAR_100 = Layout("fine_label_names.txt", {"train": ("train.bin",), "val": ("test.bin",)}, labels=2)


def build(src: Path, out: Path, *, seed: int = 0) -> Manifest:
    """Builds 50 shards for training and 10 for validation in `out`. Shuffles each split once.

    The key of a sample is its split and its place in the original files, for example `train-01234`.

    Args:
        src: the folder of the extracted binary version, `cifar-10-batches-bin` or `cifar-100-binary`.
        out: the folder of the shards.
        seed: seed of the order of the samples.

    Raises:
        DataError: files are missing or damaged, or `out` holds something else or cannot be written.
    """
    layout = next((each for each in (CIFAR_10, CIFAR_100) if Path(src, each.names).exists()), None)
    if layout is None:
        raise DataError(
            f"{src}: holds neither {CIFAR_10.names} (CIFAR-10) nor {CIFAR_100.names} (CIFAR-100). Extract "
            "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, and give the folder that is in it."
        )
    classes = _class_names(src / layout.names)
    content = {split: b"".join(_read(src / name, layout) for name in names) for split, names in layout.files.items()}
    digests = {split: hashlib.sha256(records).hexdigest() for split, records in content.items()}
    description = {"builder": "cifar", "classes": len(classes), "seed": seed, **digests}
    if manifest := finished(out, description):
        return manifest
    splits = {}
    for number, (split, records) in enumerate(content.items()):
        rows = np.frombuffer(records, np.uint8).reshape(-1, _record(layout))
        labels, pixels = rows[:, layout.labels - 1], rows[:, layout.labels :]
        if labels.max() >= len(classes):
            raise DataError(
                f"{src}: {split} has the label {labels.max()}, but {layout.names} names {len(classes)} classes; "
                "extract the files again."
            )
        images = pixels.reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
        order = np.random.default_rng([seed, number]).permutation(len(rows))
        splits[split] = Pixels.shards(split, order, images, labels, SHARDS[split])
    return build_shards(out, classes=classes, splits=splits, source=description, workers=1)


def _record(layout: Layout) -> int:
    """Bytes of a record."""
    return layout.labels + CHANNELS * SIDE * SIDE


def _class_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not names:
        raise DataError(f"{path}: names no classes; extract the files again.")
    return names


def _read(path: Path, layout: Layout) -> bytes:
    """The records of a file, at least one. Raises DataError."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Extract all files again.") from error
    if not content or len(content) % _record(layout):
        raise DataError(
            f"{path}: {len(content)} bytes are no whole number of records of {_record(layout)} bytes: it is cut off, "
            "or not of the binary version. Extract it again."
        )
    return content
