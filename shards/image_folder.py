"""Builds shards from a tree of class folders, such as an extracted ImageNet.

SRC/train/CLASS/*.JPEG      SRC/val/CLASS/*.JPEG      the layout of ImageNet, or
SRC/CLASS/*.jpg                                       a part drawn by seed becomes the validation split

`training` may stand for `train`, and `validation`, `valid`, or `test` for `val`. Hidden files and folders are left out
at any depth, and so is what other programs leave behind. Every image counts once, whatever links lead to it. Images
keep their bytes, unless they are to be reduced.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from scaleprog.data.manifest import Manifest
from scaleprog.data.shard import ENCODED_EXTENSIONS
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.display import as_text
from scaleprog.shards.image_files import (
    REFUSED,
    Image,
    build_shards,
    check_apart,
    extension_of,
    fingerprint,
    labeled,
    once,
    shuffled,
    split_off,
)
from scaleprog.shards.pool import some
from scaleprog.shards.reduction import Reduction


def build(
    src: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    val_fraction: float = 0.1,
    reduction: Reduction | None = None,
    workers: int | None = None,
) -> Manifest:
    """Builds the shards in `out` from the images in `src`. Shuffles each split once.

    Classes are the sorted folder names. The key of a sample is its place in the shuffled split and its file's name, for
    example `00000042-n01440764_10026`.

    Args:
        src: the tree of class folders.
        out: the folder of the shards; must be outside `src`.
        samples_per_shard: the most samples in one shard; 1,000 photographs of ImageNet are about 100 MB.
        seed: seed of the order of the samples.
        val_fraction: fraction of the images to split off for validation (at least one) if `src` has no val/ folder.
        reduction: how to reduce large images; None: all images keep their bytes.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: `src` is not such a tree, or a file is not an image; `out` holds something else or cannot be written.
        Unavailable: an image cannot be read now. The same call resumes.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val fraction must be above 0 and below 1; got {val_fraction}")
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"{out}: lies inside {src} and would look like a class folder; choose a folder outside it")
    classes, images = _images_by_split(src, seed, val_fraction)
    source = {
        "builder": "image-folder",
        "files": fingerprint(src, images),
        "seed": seed,
        "val_fraction": val_fraction,
    }
    return build_shards(
        out,
        images,
        classes=classes,
        source=source,
        samples_per_shard=samples_per_shard,
        reduction=reduction,
        workers=workers,
    )


TRAIN, VAL = ("train", "training"), ("val", "validation", "valid", "test")
"""Names of the folders of a split."""
FOREIGN = frozenset({"@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "lost+found", "__pycache__", "Thumbs.db"})
"""What other programs leave in folders, and do not hide."""


def _split_folders(src: Path) -> tuple[Path, Path | None]:
    """The folders of the training and of the validation images; the second is None if there is none.

    Raises DataError if a name could mean either, or if there are validation images alone.
    """
    train, val = ([src / name for name in names if (src / name).is_dir()] for names in (TRAIN, VAL))
    if not train and not val:
        return src, None
    if not train:
        raise DataError(
            f"{src}: has {val[0].name}/ but no train/; add train/, or give the folder that holds the class folders. If "
            f"{val[0].name} is a class, put all class folders into a folder train/ of their own."
        )
    if len(train) > 1 or len(val) > 1:
        several = ", ".join(f"{folder.name}/" for folder in (train if len(train) > 1 else val))
        raise DataError(f"{src}: has {several}, which could all be the same split; rename or move all but one")
    others = [folder for folder in sorted(src.iterdir()) if folder.is_dir() and folder not in (*train, *val)]
    if dropped := [folder.name for folder in others if _counts(folder.name) and any(map(_is_image, _walk(folder)))]:
        name = train[0].name
        note = f"note: {src} has images beside {name}/, which are left out: {some(dropped)}. "
        print(as_text(f"{note}If {name} is a class, put all class folders into a folder train/ of their own."))
    return train[0], val[0] if val else None


def _images_by_split(src: Path, seed: int, val_fraction: float) -> tuple[list[str], dict[str, list[Image]]]:
    """The class names, and the images of each split in the order of the shards."""
    train_folder, val_folder = _split_folders(src)
    classes, train = scan(train_folder)
    labels = {name: label for label, name in enumerate(classes)}
    images = {"train": shuffled(labeled(train, labels), [seed, 0])}
    if val_folder is not None:
        val_classes, val = scan(val_folder)
        check_apart(train, val)
        compare_classes(train_folder, classes, val_folder, val_classes)
        images["val"] = shuffled(labeled(val, labels), [seed, 1])
        return classes, images
    images = split_off(images["train"], val_fraction, src)
    count = len(images["val"])
    print(f"note: {src} has no val/ folder; {count} of {len(train)} images are split off for validation")
    return classes, images


def compare_classes(train: Path, classes: Iterable[str], val: Path, val_classes: Iterable[str]) -> None:
    """Raises DataError for classes of validation images without training images; notes those without validation images.

    `train` and `val` are the files or folders that hold the images.
    """
    if unknown := sorted(set(val_classes) - set(classes)):
        raise DataError(
            f"{val}: classes that are not in {train}: {some(unknown)}. Add training images of them, or leave them out."
        )
    if missing := sorted(set(classes) - set(val_classes)):
        print(as_text(f"note: {val} has no images of {len(missing)} classes: {some(missing)}"))


def _is_image(path: Path) -> bool:
    return extension_of(path) in ENCODED_EXTENSIONS


def scan(folder: Path) -> tuple[list[str], list[tuple[str, Path]]]:
    """The class names in a folder of class folders, and (class name, file) for each image; both sorted.

    Files in subfolders belong to the class of the top folder.

    Raises:
        DataError: the folder cannot be read, holds no class folders, or has a class folder without an image.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if _counts(entry.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder of class folders: {error.strerror}") from error
    if foreign := [ascii(entry.name) for entry in entries if entry.is_dir() and not _is_text(entry.name)]:
        raise DataError(f"{folder}: class folders whose names are not UTF-8: {some(foreign)}. Rename them.")
    files: list[tuple[str, Path]] = []
    ignored = [str(entry) for entry in entries if entry.is_file()]
    classes = [entry.name for entry in entries if entry.is_dir()]
    empty = []
    for name in classes:
        found = _walk(folder / name)
        images = [(name, path) for path in found if _is_image(path)]
        ignored += [str(path) for path in found if not _is_image(path)]
        files += images
        if not images:
            empty.append(name)
    if not classes:
        loose = " Move each loose image into a folder named after its class." if ignored else ""
        raise DataError(f"{folder}: no class folders; expected {folder}/CLASS/IMAGE.jpg.{loose}")
    if empty:
        kinds = f".{', .'.join(ENCODED_EXTENSIONS)}"
        raise DataError(f"{folder}: class folders without an image ({kinds}): {some(empty)}. Remove or fill them.")
    if ignored:
        note = f"note: left out {len(ignored)} files that are not images in class folders: {some(ignored)}"
        print(as_text(note))
    return classes, once(files)


def _is_text(name: str) -> bool:
    """Whether the name of a file is UTF-8, and so can be the name of a class."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _counts(name: str) -> bool:
    """Whether a file or folder can be part of the data: it is neither hidden nor left behind by another program."""
    return not name.startswith(".") and name not in FOREIGN


def _walk(folder: Path) -> list[Path]:
    """The files in a folder at any depth, sorted. Follows links, but enters no folder twice.

    Raises DataError if a folder cannot be listed, or Unavailable if it cannot be listed now.
    """
    found, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if (place := Path(parent).resolve()) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(filter(_counts, folders))
        found += [Path(parent, name) for name in names if _counts(name)]
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    """Raises the error for a folder whose images would be left out."""
    told = f"{error.filename}: cannot be listed: {error.strerror}"
    if error.errno in REFUSED:
        raise DataError(f"{told}; make it readable, or remove it") from error
    raise Unavailable(f"{told}; run the command again") from error
