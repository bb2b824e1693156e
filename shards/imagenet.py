"""Builds shards of ImageNet (ILSVRC2012) from its official tars, or from their extracted files.

SRC/ILSVRC2012_img_train.tar        a tar of 1,000 tars, each with the images of a class: WNID.tar, WNID_*.JPEG
SRC/ILSVRC2012_img_val.tar          the validation images, whose classes are in
SRC/ILSVRC2012_devkit_t12.tar.gz    the development kit, or in a list (`imagenet_labels.py`)

In place of a tar, there may be a folder: SRC/train/WNID/*.JPEG and SRC/val/WNID/*.JPEG, or SRC/val/*.JPEG and a list.
Nothing is extracted: a pass over the headers finds all images, and each shard then reads its own images where they are.
Tars and folders of the same images give the same shards. Images keep their bytes, unless they are to be reduced.
"""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from scaleprog.data import tar
from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.files.display import as_text
from scaleprog.shards.image_files import Image, build_shards, check_apart, digest_of_labels, fingerprint, shuffled
from scaleprog.shards.image_folder import compare_classes, scan
from scaleprog.shards.imagenet_labels import DEVKIT, from_devkit, from_list
from scaleprog.shards.imagenet_tars import TRAIN, VAL, WNID, training_members, validation_members
from scaleprog.shards.pool import some
from scaleprog.shards.reduction import Reduction

CLASSES, TRAIN_IMAGES, VAL_IMAGES = 1000, 1_281_167, 50_000


class Found(NamedTuple):
    """An image and its class."""

    wnid: str
    path: Path
    """The image file, or the tar that holds it."""
    member: tar.Member | None = None
    """Its place in the tar."""


def build(
    src: Path,
    out: Path,
    *,
    val_labels: Path | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    reduction: Reduction | None = None,
    workers: int | None = None,
) -> Manifest:
    """Builds the shards in `out` from the tars or folders in `src`. Shuffles each split once.

    Classes are the sorted WordNet IDs of the training images. The key of a sample is its place in the shuffled split
    and its file's name, for example `00000042-n01440764_10026`.

    Args:
        src: the folder of the tars, or of train/ and val/.
        out: the folder of the shards.
        val_labels: the list of the classes of the validation images; default: the development kit in `src`.
        samples_per_shard: the most samples in one shard; 1,000 images are about 110 MB.
        seed: seed of the order of the samples.
        reduction: how to reduce large images; None: all images keep their bytes.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: a tar or folder is missing, damaged, or holds something else; the labels do not fit the validation
            images; an image cannot be decoded; `out` holds something else or cannot be written.
        Unavailable: an image cannot be read now. The same call resumes.
    """
    train_source, val_source = _tar_or_folder(src, TRAIN, "train"), _tar_or_folder(src, VAL, "val")
    val = _validation_images(src, val_source, val_labels)
    train = _training_images(train_source, workers)
    classes = sorted({found.wnid for found in train})
    compare_classes(train_source, classes, val_source, {found.wnid for found in val})
    check_apart(*([(found.wnid, found.path) for found in side if found.member is None] for side in (train, val)))
    if len(classes) != CLASSES:
        print(as_text(f"note: {train_source} holds {len(classes)} of the {CLASSES} classes of ImageNet"))
    for side, whole, where in ((train, TRAIN_IMAGES, train_source), (val, VAL_IMAGES, val_source)):
        if len(classes) == CLASSES and len(side) != whole:
            print(as_text(f"note: {where} holds {len(side)} of the {whole} images of ImageNet"))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    images = {
        "train": shuffled(_labeled(train, labels), [seed, 0]),
        "val": shuffled(_labeled(val, labels), [seed, 1]),
    }
    source = {
        "builder": "imagenet",
        "files": fingerprint(src, images),
        "labels": digest_of_labels(classes, images),
        "seed": seed,
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


def _tar_or_folder(src: Path, archive: str, folder: str) -> Path:
    """The tar in `src` if there is one, otherwise the folder. Raises DataError if there is neither."""
    if (src / archive).exists():
        if (src / folder).exists():
            print(as_text(f"note: {src} has {archive}, so {folder}/ is left out"))
        return src / archive
    if (src / folder).is_dir():
        return src / folder
    raise DataError(f"{src}: has neither {archive} nor {folder}/; download the tar from image-net.org into this folder")


def _labeled(found: Iterable[Found], labels: Mapping[str, int]) -> list[Image]:
    """The images in the order of their names, which is the same for tars and folders."""
    images = [Image(path, labels[wnid], member) for wnid, path, member in found]
    return sorted(images, key=lambda image: image.name)


def _training_images(source: Path, workers: int | None) -> list[Found]:
    """The images in the tar of class tars, or in a folder of class folders."""
    if source.is_dir():
        return _in_class_folders(source)
    return [Found(wnid, source, member) for wnid, member in training_members(source, workers)]


def _validation_images(src: Path, source: Path, val_labels: Path | None) -> list[Found]:
    """The images in the tar, in a folder of class folders, or in one folder."""
    places: dict[str, tuple[Path, tar.Member | None]]
    if not source.is_dir():
        places = {Path(member.name).stem: (source, member) for member in validation_members(source)}
    elif not any(path.is_dir() for path in source.glob("[!.]*")):
        places = {path.stem: (path, None) for path in source.glob("[!.]*.JPEG")}
    elif val_labels is None:
        return _in_class_folders(source)
    else:
        raise DataError(f"{source}: has class folders, so --val-labels has no meaning; leave it out")
    if not places:
        raise DataError(f"{source}: holds no images (*.JPEG)")
    wnids = _validation_labels(src, source, val_labels, places.keys())
    return [Found(wnids[name], *place) for name, place in places.items()]


def _validation_labels(src: Path, source: Path, val_labels: Path | None, names: Set[str]) -> Mapping[str, str]:
    """The class of each validation image by its name. Raises DataError unless exactly these images have one."""
    labels = val_labels or src / DEVKIT
    if val_labels is None and not labels.exists():
        raise DataError(f"{src}: has no {DEVKIT}, which says the classes of {source.name}; add it, or use --val-labels")
    wnids = from_list(labels) if val_labels else from_devkit(labels)
    if wnids.keys() != names:
        without, absent = sorted(names - wnids.keys()), sorted(wnids.keys() - names)
        which = f"no label of {some(without)}" if without else f"no image {some(absent)}"
        raise DataError(
            f"{source}: {len(names)} images, but {labels} has {len(wnids)} labels: {which}. Use the list of these "
            "images, or download the images again."
        )
    return wnids


def _in_class_folders(folder: Path) -> list[Found]:
    """The images in a folder of class folders. Raises DataError if a name is not a WordNet ID."""
    classes, files = scan(folder)
    if foreign := [name for name in classes if not WNID.fullmatch(name)]:
        raise DataError(
            f"{folder}: class folders whose names are not WordNet IDs such as n01440764: {some(foreign)}. Remove or "
            "rename them, or use `scaleprog shards image-folder`."
        )
    return [Found(wnid, path) for wnid, path in files]
