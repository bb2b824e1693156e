"""Finds the images in ImageNet's tars without reading them.

It imports no torch, because the processes that read the headers of 1,000 class tars should not wait for it.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from scaleprog.data import tar
from scaleprog.errors import DataError
from scaleprog.files.atomic import open_regular
from scaleprog.shards.pool import run_all, some

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
WNID = re.compile("n[0-9]{8}")
"""A WordNet ID, the name of a class."""


def training_members(path: Path, workers: int | None) -> list[tuple[str, tar.Member]]:
    """The images in the tar of class tars, with their WordNet IDs. `workers` processes read headers; default: all CPUs.

    The name of an image begins with that of its class tar: `n01440764.tar/n01440764_10026.JPEG`.

    Raises:
        DataError: as in `validation_members`, for the tar or for class tars.
    """
    class_tars = _members(path, rf"{WNID.pattern}\.tar")
    wnids = [class_tar.name.removesuffix(".tar") for class_tar in class_tars]
    jobs = [(path, rf"{wnid}_[0-9]+\.JPEG", class_tar) for wnid, class_tar in zip(wnids, class_tars)]
    images = run_all(_class_members, jobs, label=f"{path}: class tars indexed", workers=workers)
    return [(wnid, image) for wnid, members in zip(wnids, images) for image in members]


def validation_members(path: Path) -> list[tar.Member]:
    """The images in the tar of validation images.

    Raises:
        DataError: the tar is damaged or empty, or holds a file twice or one with a foreign name.
    """
    return _members(path, r"ILSVRC2012_val_[0-9]{8}\.JPEG")


def _class_members(job: tuple[Path, str, tar.Member]) -> list[tar.Member]:
    path, pattern, class_tar = job
    return [replace(image, name=f"{class_tar.name}/{image.name}") for image in _members(path, pattern, class_tar)]


def _members(path: Path, pattern: str, inside: tar.Member | None = None) -> list[tar.Member]:
    """The files in a tar, or in a tar that is a member `inside` it; their names must match the pattern."""
    where = f"{path}: {inside.name}" if inside else str(path)
    try:
        with open_regular(path) as file:
            begin, size = (inside.start, inside.size) if inside else (0, os.fstat(file.fileno()).st_size)
            found = list(tar.members(file, begin + size, begin))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read as a tar: {error}. Download the tar again.") from error
    if foreign := [member.name for member in found if not re.fullmatch(pattern, member.name)]:
        raise DataError(f"{where}: holds {some(foreign)}, but only {pattern} belongs here. Download the tar again.")
    if twice := [name for name, times in Counter(member.name for member in found).items() if times > 1]:
        raise DataError(f"{where}: holds {some(twice)} twice. Download the tar again.")
    if not found:
        raise DataError(f"{where}: is empty. Download the tar again.")
    return found
