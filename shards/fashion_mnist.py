"""Builds shards of lossless PNGs from Fashion-MNIST (Xiao et al., 2017).

60,000 + 10,000 images of 28 x 28 pixels with one channel.
"""

import gzip
import hashlib
import math
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.files.atomic import open_regular
from scaleprog.shards.build import build as build_shards
from scaleprog.shards.build import finished
from scaleprog.shards.samples import Pixels

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package `dataset-fashion-mnist` puts the files."""

PREFIX = {"train": "train", "val": "t10k"}
KINDS = "images-idx3-ubyte", "labels-idx1-ubyte"
ORIGINAL = "eee656c63c1c7a3b7c885d28c97fd74dc039264ce75eae7cb8d991df379ef736"
"""`_digest` of Fashion-MNIST."""
SHARDS = {"train": 8, "val": 4}
MOST_BYTES = 2**30  # of a file when inflated; EMNIST's largest has 547 MB
UNSIGNED_BYTES = 0x08
"""The data type of unsigned bytes in an idx file."""


def build(out: Path, source: Path | None = None, *, limit: int | None = None, seed: int = 0) -> Manifest:
    """Builds 8 shards for training and 4 for validation in `out`. Shuffles each split once.

    The key of a sample is its split and its place in the original file, for example `train-01234`.

    Args:
        out: the folder of the shards.
        source: folder of the four original idx.gz files; default: the Debian package's folder. If that does not exist,
            torchvision downloads the files.
        limit: the most samples in each split, for smoke runs.
        seed: seed of the order of the samples.

    Raises:
        DataError: the files are missing or damaged, or `out` holds something else or cannot be written.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}: must be at least 1 sample in each split")
    description: dict[str, Any] = {"builder": "fashion-mnist", "limit": limit, "seed": seed}
    if source is not None and (files := _digest(source)) != ORIGINAL:
        description["files"] = files  # others of the same form, such as MNIST
    if manifest := finished(out, description):
        return manifest
    with _originals(source) as folder:
        splits = {split: _shuffled(folder, split, limit, seed) for split in PREFIX}
    classes: tuple[str, ...] = CLASSES
    if "files" in description:  # whose names are not known
        most = max(int(shard.labels.max()) for shards in splits.values() for shard in shards)
        classes = tuple(map(str, range(max(most + 1, len(CLASSES)))))
    return build_shards(out, classes=classes, splits=splits, source=description, workers=1)


def _shuffled(folder: Path, split: str, limit: int | None, seed: int) -> list[Pixels]:
    """The shards of one split: its samples in an order drawn from `seed`, cut as evenly as possible."""
    images, labels = (read_idx(folder / f"{PREFIX[split]}-{kind}.gz") for kind in KINDS)
    if (images.ndim, labels.ndim) != (3, 1):
        raise DataError(
            f"{folder}: images of {images.ndim} and labels of {labels.ndim} dimensions for {split}, not 3 and 1; has "
            "one file the name of another?"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{folder}: {len(images)} images but {len(labels)} labels for {split}; download the files again"
        )
    order = np.random.default_rng([seed, list(PREFIX).index(split)]).permutation(len(images))[:limit]
    return Pixels.shards(split, order, images, labels, SHARDS[split])


def _digest(folder: Path) -> str:
    """The SHA-256 of the values in the four files. Raises DataError."""
    found = hashlib.sha256()
    for prefix, kind in product(PREFIX.values(), KINDS):
        values = read_idx(folder / f"{prefix}-{kind}.gz")
        found.update(f"{values.shape}".encode() + values.tobytes())
    return found.hexdigest()


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped idx file of unsigned bytes into an array of its shape.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with open_regular(path) as packed, gzip.open(packed) as unpacked:
            content = unpacked.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. {_where_from()}") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"{path}: inflates to more than {MOST_BYTES} bytes. {_where_from()}")
    # Format: two zero bytes, the data type, the number of dimensions, each dimension as a big-endian integer, values.
    start = 4 + 4 * (content[3] if len(content) > 3 else 0)
    shape = [int.from_bytes(content[at : at + 4]) for at in range(4, start, 4)]
    if content[:3] != bytes([0, 0, UNSIGNED_BYTES]) or len(content) != start + math.prod(shape):
        raise DataError(f"{path}: not a complete idx file of unsigned bytes. {_where_from()}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@contextmanager
def _originals(source: Path | None) -> Iterator[Path]:
    """The folder of the original files. Without one, downloads them into a temporary folder."""
    if source is not None or DEBIAN_FOLDER.is_dir():
        yield source or DEBIAN_FOLDER
        return
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as folder:
        try:
            FashionMNIST(folder, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot download Fashion-MNIST: {error}. {_where_from()}") from error
        yield Path(folder, "FashionMNIST", "raw")


def _where_from() -> str:
    return (
        "Install the Debian package dataset-fashion-mnist, or give the folder of the four idx.gz files with --source."
    )
