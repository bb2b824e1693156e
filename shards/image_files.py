"""Image files as samples of shards: shuffled once, cut into shards, and read when the shards are written.

An image is a file of its own, or a part of a tar.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scaleprog.data import tar
from scaleprog.data.decode import problem_of
from scaleprog.data.manifest import Manifest
from scaleprog.data.source import MOST_BYTES as SHARD_BYTES
from scaleprog.data.source import NO_FILE
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.atomic import open_regular
from scaleprog.shards.build import SPLITS, build, finished
from scaleprog.shards.pool import listed, some
from scaleprog.shards.reduction import Reduction, images_per_core_second
from scaleprog.shards.samples import SourceSample, sniff

MOST_BYTES = 2**28
"""The largest image file that is read, in bytes."""
SAMPLE_BYTES = 5 * tar.BLOCK
"""What a sample takes in a shard besides its image, at most: two headers, the label, and padding."""
MEASURED = 64
"""The most images whose decoding is timed."""
REFUSED = (errno.EACCES, errno.EPERM, *NO_FILE)
"""Errors of reading an image that the same command would meet again."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image file and its class index."""

    path: Path
    label: int
    member: tar.Member | None = None
    """The image's place in the tar at `path`; None if the file itself is the image."""

    def __str__(self) -> str:
        return f"{self.path}: {self.member.name}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        """The name of the file, without its folder and its extension."""
        return Path(self.member.name if self.member else self.path).stem

    def size(self) -> int:
        """Bytes of the file. Raises OSError."""
        return self.member.size if self.member else self.path.stat().st_size

    def read(self) -> bytes:
        """The bytes of the file. Raises OSError, or ValueError if it is too large or its tar has become shorter."""
        with open_regular(self.path) as file:
            member = self.member or tar.Member(self.path.name, 0, os.fstat(file.fileno()).st_size)
            if member.size > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
            return tar.read(file, member)


@dataclass(frozen=True)
class Files:
    """The samples of one shard. Iterating reads each image file as its sample is written."""

    first: int
    """Place of the first image in the split."""
    images: Sequence[Image]
    reduction: Reduction | None = None

    def __iter__(self) -> Iterator[SourceSample]:
        """Raises DataError at the end if any files are not images, so that the error lists them all.

        Raises Unavailable at once if a file cannot be read now.
        """
        problems = []
        for place, image in enumerate(self.images, start=self.first):
            remedy = "download the tar again" if image.member else "remove or replace it"
            try:
                kind, content = _stored(image.read(), self.reduction)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise Unavailable(
                        f"{image}: cannot be read now: {error.strerror}; run the command again"
                    ) from error
                problems.append(f"{image}: cannot be read: {error.strerror}; {remedy}")
            except ValueError as error:
                problems.append(f"{image}: {error}; {remedy}")
            else:
                stem = re.sub(r"[^A-Za-z0-9_-]", "_", image.name)[:80]
                yield SourceSample(f"{place:08d}-{stem}", kind, content, image.label)
        if problems:
            raise DataError(listed(problems))


def build_shards(
    out: Path,
    images: Mapping[str, Sequence[Image]],
    *,
    classes: Sequence[str],
    source: Mapping[str, Any],
    samples_per_shard: int,
    reduction: Reduction | None,
    workers: int | None,
) -> Manifest:
    """Builds the shards in `out`, unless the same build is already there. Prints what a reduction of the images saves.

    `images` lists the images of each split, in the order of the shards; `source` describes what the shards are built
    from, and every other option that changes them.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples per shard must be at least 1; got {samples_per_shard}")
    description = {**source, "samples_per_shard": samples_per_shard, **(asdict(reduction) if reduction else {})}
    if manifest := finished(out, description):
        return manifest
    if reduction is None:
        _check_size(images, samples_per_shard)
    splits = {split: cut(images[split], samples_per_shard, reduction) for split in SPLITS}
    manifest = build(out, classes=classes, splits=splits, source=description, workers=workers)
    if reduction:
        with suppress(OSError, ValueError):  # the build is finished, whatever becomes of the originals
            _print_savings(manifest, list(chain(*images.values())), reduction)
    return manifest


def _check_size(images: Mapping[str, Sequence[Image]], samples_per_shard: int) -> None:
    """Raises DataError if a shard of images that keep their bytes would be larger than one may be."""
    for files in (files for split in SPLITS for files in cut(images[split], samples_per_shard)):
        size = sum(image.size() + SAMPLE_BYTES for image in files.images)
        if size > SHARD_BYTES:
            fits = max(1, int(samples_per_shard * SHARD_BYTES / size))
            raise DataError(
                f"a shard of {len(files.images)} images, from {files.images[0]} on, would have {size} bytes, and may "
                f"have at most {SHARD_BYTES}; use --samples-per-shard {fits}, or less, or reduce large images with "
                "--shorter-side"
            )


def shuffled(images: Sequence[Image], seed: Sequence[int]) -> list[Image]:
    """The images in the order that `seed` draws."""
    order = np.random.default_rng(seed).permutation(len(images))
    return [images[index] for index in order]


def split_off(images: Sequence[Image], fraction: float, where: Path) -> dict[str, list[Image]]:
    """Splits off the first `fraction` of the images, at least one, for validation; a class keeps an image to train.

    `where` names the source of the images in error messages.

    Raises:
        DataError: `fraction` is out of range, or no images are left for training.
    """
    if not 0 < fraction < 1:
        raise DataError(f"val fraction must be above 0 and below 1; got {fraction}")
    count = max(1, round(fraction * len(images)))
    if count >= len(images):
        raise DataError(f"{where}: {len(images)} images are too few to split off {count} for validation; add images")
    split: dict[str, list[Image]] = {"train": [], "val": []}
    left = Counter(image.label for image in images)
    for image in images:
        spare = len(split["val"]) < count and left[image.label] > 1
        left[image.label] -= spare
        split["val" if spare else "train"].append(image)
    if not split["val"]:
        print(f"note: {where}: each class has one image, so those of validation are of classes that nothing trains")
        return {"train": list(images[count:]), "val": list(images[:count])}
    return split


def cut(images: Sequence[Image], samples_per_shard: int, reduction: Reduction | None = None) -> list[Files]:
    """The shards of one split: as few as `samples_per_shard` allows, as even in size as possible."""
    shards = math.ceil(len(images) / samples_per_shard)
    edges = [len(images) * index // shards for index in range(shards + 1)]
    return [Files(begin, images[begin:end], reduction) for begin, end in pairwise(edges)]


def fingerprint(src: Path, images: Mapping[str, Sequence[Image]]) -> str:
    """A SHA-256 digest of the files' paths relative to `src`, their sizes, and their splits, in hexadecimal.

    It does not cover labels: a builder whose labels do not follow from the paths adds `digest_of_labels`.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for split, content in images.items():
        for image in content:
            try:
                size = image.size()
            except OSError as error:
                raise DataError(f"{image}: cannot be read: {error.strerror}; remove or replace it") from error
            digest.update(os.fsencode(f"{split}\0{os.path.relpath(str(image), src)}\0{size}\0"))
    return digest.hexdigest()


def digest_of_labels(classes: Sequence[str], images: Mapping[str, Sequence[Image]]) -> str:
    """A SHA-256 digest of the names of the classes and of the labels of all images, in hexadecimal."""
    labels = {split: [image.label for image in content] for split, content in images.items()}
    return hashlib.sha256(json.dumps([classes, labels]).encode()).hexdigest()


def _stored(content: bytes, reduction: Reduction | None) -> tuple[str, bytes]:
    """The format and the bytes in which a file is stored. Raises ValueError unless training can use it."""
    if sniff(content) is None:
        raise ValueError(f"not a JPEG, PNG, or WebP image ({len(content)} bytes)")
    if reduction:
        content = reduction.apply(content)
    elif wrong := problem_of(content):
        raise ValueError(wrong)
    kind = sniff(content)
    assert kind is not None, "a reduced image is a JPEG"
    return kind, content


def _print_savings(manifest: Manifest, images: Sequence[Image], reduction: Reduction) -> None:
    """Compares bytes, and the speed of decoding on some of the images, evenly chosen."""
    original, stored = sum(image.size() for image in images), sum(s.bytes for s in chain(*manifest.splits.values()))
    read = [image.read() for image in images[:: math.ceil(len(images) / MEASURED)]]
    before, after = (images_per_core_second(each) for each in (read, [reduction.apply(content) for content in read]))
    print(
        f"{manifest.root}: {original / 1e6:.1f} MB of images became {stored / 1e6:.1f} MB of shards. Measured here "
        f"and now, on {len(read)} of the images: a core decodes and crops {after:.0f} images/s, and {before:.0f} before"
    )


def extension_of(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def check_apart(train: Sequence[tuple[str, Path]], val: Sequence[tuple[str, Path]]) -> None:
    """Raises DataError if links lead from both splits to the same file."""
    trained = {_file_of(path): path for _, path in train}
    if shared := [f"{path} is {trained[file]}" for _, path in val if (file := _file_of(path)) in trained]:
        raise DataError(f"validation images that are training images, too: {some(shared)}. Remove one of each.")


def labeled(files: Sequence[tuple[str, Path]], labels: Mapping[str, int]) -> list[Image]:
    """Images with the index of their class; `files`: the class and the file of each."""
    return [Image(path, labels[name]) for name, path in files]


def once(files: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files without those that a link leads to again. Raises DataError if one is in two classes."""
    first: dict[object, tuple[str, Path]] = {}
    for name, path in files:
        other, known = first.setdefault(_file_of(path), (name, path))
        if other != name:
            raise DataError(f"{path}: the same file as {known}, so it is in two classes; remove one of them")
    return list(first.values())


def _file_of(path: Path) -> object:
    """What is equal for paths that lead to the same file, by symbolic or by hard links."""
    with suppress(OSError):
        found = os.stat(path)
        if found.st_nlink > 1:
            return found.st_dev, found.st_ino
    return os.path.realpath(path)
