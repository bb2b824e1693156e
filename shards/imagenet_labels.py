"""The classes of ImageNet's validation images. The tar of the images does not say them.

They are in the development kit, or in a list that has one of these forms:

n01751748                                    a line for each image, in the order of their numbers
ILSVRC2012_val_00000001.JPEG n01751748       a line for each image with its name, in any order
ILSVRC2012_val_00000001,n01751748 1 2 3 4    the same with boxes, which do not matter (Kaggle's LOC_val_solution.csv)

A list that numbers the classes is not read, because lists number them in two orders: that of the development kit
(ILSVRC2012_ID, from 1), and that of the sorted WordNet IDs (from 0), which is the order of the labels in shards.
"""

import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np

from scaleprog.data import tar
from scaleprog.errors import DataError
from scaleprog.files.atomic import open_regular, read_text
from scaleprog.shards.imagenet_tars import WNID

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
"""Files in the development kit: the WordNet ID of each ILSVRC2012_ID; the ILSVRC2012_ID of each validation image."""
KAGGLE_HEADER = "ImageId,PredictionString"
MOST_BYTES = 2**28
"""The most bytes in the unpacked development kit."""


def from_list(path: Path) -> dict[str, str]:
    """The WordNet ID of each validation image, by its name without extension, from a list.

    Raises:
        DataError: the file cannot be read or does not have one of the forms above.
    """
    try:
        lines = read_text(path).strip().removeprefix(KAGGLE_HEADER).strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    wnids: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = re.split(r"[\s,]+", line.strip())
        named = not WNID.fullmatch(words[0])
        found = {word for word in words if WNID.fullmatch(word)}
        if len(found) != 1 or (not named and len(words) > 1):
            raise DataError(
                f"{path}: image {number}: {line[:60]!r} is not a WordNet ID such as n01440764, alone or after the name "
                "of the image. Numbers of classes are not read, because lists number the classes in different orders."
            )
        name = Path(words[0]).stem if named else _name(number)
        if name in wnids:
            raise DataError(f"{path}: image {number}: {name} occurs twice; remove one of the lines")
        wnids[name] = found.pop()
    return wnids


def from_devkit(path: Path) -> dict[str, str]:
    """The WordNet ID of each validation image, by its name without extension, from the development kit.

    Raises:
        DataError: SciPy is missing, or `path` is not the development kit.
    """
    try:
        with open_regular(path) as packed, gzip.open(packed) as unpacked:
            content = unpacked.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        meta, truth = (_member(content, name) for name in (META, TRUTH))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as {DEVKIT}: {error}. Download it again.") from error
    classes = _classes(path, meta)
    numbers = truth.decode("ascii", "replace").split()
    if foreign := [number for number in numbers if number not in classes]:
        raise DataError(f"{path}: {TRUTH} has {foreign[0][:20]!r}, but {META} has no such class. Download it again.")
    return {_name(place): classes[number] for place, number in enumerate(numbers, start=1)}


def _name(number: int) -> str:
    """The name of the validation image with this number, from 1."""
    return f"ILSVRC2012_val_{number:08d}"


def _member(content: bytes, name: str) -> bytes:
    """The file in the tar `content` whose path ends with `name`. Raises ValueError."""
    file = io.BytesIO(content)
    for member in tar.members(file, len(content)):
        if member.name.endswith(name):
            return tar.read(file, member)
    raise ValueError(f"it has no {name}")


def _classes(path: Path, meta: bytes) -> dict[str, str]:
    """The WordNet ID of each ILSVRC2012_ID, in decimal, from the contents of meta.mat. Raises DataError."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"{path}: SciPy is needed to read it; run pip install scipy, or give a list of WordNet IDs with "
            f"--val-labels ({error})"
        ) from error
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), variable_names=["synsets"], squeeze_me=True)["synsets"])
        classes = {str(int(number)): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
    except Exception as error:  # SciPy raises exceptions of any kind on damaged data
        raise DataError(f"{path}: {META} is damaged ({error or type(error).__name__}). Download it again.") from error
    if foreign := [wnid for wnid in classes.values() if not WNID.fullmatch(wnid)]:
        raise DataError(f"{path}: {META} has {foreign[0][:20]!r} instead of a WordNet ID. Download it again.")
    return classes
