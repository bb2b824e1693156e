"""Any tree of class folders as shards, an extracted ImageNet among them; the images' bytes stay as they are.

SRC/train/CLASS/*.JPEG      SRC/val/CLASS/*.JPEG      as ImageNet is laid out, or
SRC/CLASS/*.jpg                                       and a part drawn by seed becomes the validation split
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from scaleprog.data.manifest import Manifest
from scaleprog.display import as_text
from scaleprog.errors import DataError
from scaleprog.files import open_regular
from shards.build import SPLITS, finished
from shards.build import build as build_shards
from shards.pool import MAX_LISTED, listed
from shards.samples import IMAGE_EXTENSIONS, Sample, sniff


def build(
    src: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    val_fraction: float = 0.1,
    workers: int | None = None,
) -> Manifest:
    """Build `out` from the images in `src`, each split shuffled once by `seed`; classes are the sorted folder names.

    The key of a sample is its place in the shuffled split and its file's name, `00000042-n01440764_10026`.

    Args:
        samples_per_shard: at most so many; 1,000 photographs of ImageNet are about 100 MB.
        val_fraction: part of the images to split off for validation (at least one) where `src` has no val/ folder.
        workers: processes; default one for each CPU.

    Raises:
        DataError: `src` is not such a tree or a file is not an image; `out` holds something else or cannot be written.
    """
    if samples_per_shard < 1 or not 0 < val_fraction < 1:
        raise DataError(
            f"needed: samples per shard >= 1, 0 < val fraction < 1; got {samples_per_shard}, {val_fraction}"
        )
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"{out}: lies inside {src} and would be taken for a class folder; choose a folder outside it")
    classes, images = _images_by_split(src, seed, val_fraction)
    description = {
        "builder": "image-folder",
        "files": _fingerprint(src, images),
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "val_fraction": val_fraction,
    }
    if manifest := finished(out, description):
        return manifest
    splits = {split: _cut(images[split], samples_per_shard) for split in SPLITS}
    return build_shards(out, classes=classes, splits=splits, source=description, workers=workers)


MOST_BYTES = 2**28
"""Of an image's file."""


@dataclass(frozen=True)
class Image:
    """One image file and its class index."""

    path: Path
    label: int


@dataclass(frozen=True)
class Files:
    """The samples of one shard, read from their files as they are written."""

    first: int
    """Place of the first image in the split."""
    images: Sequence[Image]

    def __iter__(self) -> Iterator[Sample]:
        """DataError at the end if some files were no images, so that all of them are known at once."""
        problems = []
        for place, image in enumerate(self.images, start=self.first):
            try:
                with open_regular(image.path) as file:
                    content = file.read(MOST_BYTES + 1)
            except OSError as error:
                problems.append(f"{image.path}: cannot be read: {error.strerror}")
                continue
            if len(content) > MOST_BYTES:
                problems.append(f"{image.path}: more than {MOST_BYTES} bytes; remove or replace it")
                continue
            kind = sniff(content)
            if kind is None:
                problems.append(
                    f"{image.path}: no JPEG, PNG or WebP image ({len(content)} bytes); remove or replace it"
                )
                continue
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", image.path.stem)[:80]
            yield Sample(f"{place:08d}-{stem}", _content_extension(image.path, kind), content, image.label)
        if problems:
            raise DataError(listed(problems))


def _images_by_split(src: Path, seed: int, val_fraction: float) -> tuple[list[str], dict[str, list[Image]]]:
    """Class names, and the images of each split in the order of the shards."""
    train_folder, val_folder = src / "train", src / "val"
    if not train_folder.is_dir():
        if val_folder.is_dir():
            raise DataError(f"{src}: has val/ but no train/; add it, or give the folder that holds the class folders")
        train_folder = src
    classes, train = _scan(train_folder)
    labels = {name: label for label, name in enumerate(classes)}
    images = {"train": _shuffled(train, labels, [seed, 0])}
    if val_folder.is_dir():
        val_classes, val = _scan(val_folder)
        if unknown := sorted(set(val_classes) - set(classes)):
            raise DataError(
                f"{val_folder}: classes that train/ does not have: {_some(unknown)}. Remove or rename them."
            )
        if missing := sorted(set(classes) - set(val_classes)):
            print(as_text(f"note: {val_folder} has no images of {len(missing)} classes: {_some(missing)}"))
        images["val"] = _shuffled(val, labels, [seed, 1])
        return classes, images
    count = max(1, round(val_fraction * len(train)))
    if count >= len(train):
        raise DataError(f"{src}: {len(train)} images are too few to split off {count} for validation; add images")
    images["train"], images["val"] = images["train"][count:], images["train"][:count]
    print(f"note: {src} has no train/ and val/ folders, {count} of {len(train)} images are split off for validation")
    return classes, images


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, Path]]]:
    """Class names and (class name, file) of a folder of class folders, sorted; sub-folders belong to their class."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder of class folders: {error.strerror}") from error
    files: list[tuple[str, Path]] = []
    ignored = [str(entry) for entry in entries if entry.is_file()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    empty = []
    for name in classes:
        found = [path for path in _walk(folder / name) if not path.name.startswith(".")]
        images = [(name, path) for path in found if _extension(path) in IMAGE_EXTENSIONS]
        ignored += [str(path) for path in found if _extension(path) not in IMAGE_EXTENSIONS]
        files += images
        if not images:
            empty.append(name)
    if not classes:
        loose = " Its images lie loose: move each into a folder named after its class." if ignored else ""
        raise DataError(f"{folder}: no class folders, expected {folder}/CLASS/IMAGE.jpg.{loose}")
    if empty:
        kinds = f".{', .'.join(IMAGE_EXTENSIONS)}"
        raise DataError(f"{folder}: class folders without an image ({kinds}): {_some(empty)}. Remove or fill them.")
    if ignored:
        note = f"note: {len(ignored)} files that are not images of class folders are left out: {_some(ignored)}"
        print(as_text(note))
    return classes, files


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(parent, name).resolve())]  # a circle
        found += [Path(parent, name) for name in names]
    return sorted(found)


def _shuffled(files: Sequence[tuple[str, Path]], labels: dict[str, int], seed: list[int]) -> list[Image]:
    order = np.random.default_rng(seed).permutation(len(files))
    return [Image(path, labels[name]) for name, path in (files[index] for index in order)]


def _cut(images: Sequence[Image], samples_per_shard: int) -> list[Files]:
    """The shards of one split: as few as `samples_per_shard` allows, of sizes as even as can be."""
    shards = math.ceil(len(images) / samples_per_shard)
    edges = [len(images) * index // shards for index in range(shards + 1)]
    return [Files(begin, images[begin:end]) for begin, end in pairwise(edges)]


def _fingerprint(src: Path, images: dict[str, list[Image]]) -> str:
    """A digest of what the files are called, how large they are and where they go, independent of where `src` lies."""
    digest = hashlib.sha256()
    for split, content in images.items():
        for image in content:
            try:
                size = image.path.stat().st_size
            except OSError as error:
                raise DataError(f"{image.path}: cannot be read: {error.strerror}; remove or replace it") from error
            digest.update(os.fsencode(f"{split}\0{image.path.relative_to(src)}\0{size}\0"))
    return digest.hexdigest()


def _extension(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _content_extension(path: Path, kind: str) -> str:
    """The file's own extension unless its content is of another kind: ImageNet has a PNG that is named .JPEG."""
    named = _extension(path)
    return named if named.replace("jpeg", "jpg") == kind else kind


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
