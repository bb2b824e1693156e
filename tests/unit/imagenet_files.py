"""A small ImageNet in the form of the official files: tars, a development kit, and what they become when extracted."""

import gzip
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from scaleprog.shards.imagenet_labels import DEVKIT
from scaleprog.shards.imagenet_tars import TRAIN, VAL

KITS_FOLDER = "ILSVRC2012_devkit_t12/data"


@dataclass(frozen=True)
class SmallImageNet:
    """What the files hold. Names are names of files, such as n01440764_10.JPEG."""

    folder: Path
    train: Mapping[str, bytes]
    """The training images in the order of their tars."""
    val: Mapping[str, bytes]
    """The validation images in the order of their numbers."""
    val_wnids: Mapping[str, str]
    """The class of each validation image."""

    @property
    def wnids(self) -> list[str]:
        """The classes in sorted order."""
        return sorted({wnid_of(name) for name in self.train})


def wnid_of(name: str) -> str:
    """The class of a training image."""
    return name.partition("_")[0]


def write_imagenet(
    folder: Path,
    *,
    classes: int = 3,
    per_class: int = 6,
    val_per_class: int = 2,
    val_images: int | None = None,
    size: tuple[int, int] = (40, 48),
) -> SmallImageNet:
    """Writes the two tars and the development kit into `folder`.

    As in the real ones, ILSVRC2012_ID and the order of the tars differ from the order of the WordNet IDs, one file
    named .JPEG is a PNG, one is a CMYK JPEG, and one is gray. `val_images`: the most in all; `size`: (height, width) in
    pixels.
    """
    rng = np.random.default_rng(0)
    wnids = [f"n{1440764 + 977 * index:08d}" for index in reversed(range(classes))]
    pixels = {
        f"{wnid}_{7 * number + 3}.JPEG": _picture(label, size, rng)
        for label, wnid in enumerate(wnids)
        for number in range(per_class)
    }
    odd = dict(zip(pixels, (("RGB", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"))))
    train = {name: _encoded(image, *odd.get(name, ("RGB", "JPEG"))) for name, image in pixels.items()}
    shown = rng.permutation(np.repeat(np.arange(classes), val_per_class))[:val_images]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(shown) + 1)]
    val = {name: _encoded(_picture(label, size, rng), "RGB", "JPEG") for name, label in zip(names, shown)}
    files = SmallImageNet(folder, train, val, {name: wnids[label] for name, label in zip(names, shown)})
    folder.mkdir(parents=True, exist_ok=True)
    write_train(folder / TRAIN, class_tars(train))
    (folder / VAL).write_bytes(packed(val))
    write_devkit(folder / DEVKIT, wnids, [label + 1 for label in shown])
    return files


def class_tars(train: Mapping[str, bytes]) -> dict[str, bytes]:
    """The contents of each class tar, by its name."""
    wnids = dict.fromkeys(wnid_of(name) for name in train)
    return {
        f"{wnid}.tar": packed({name: image for name, image in train.items() if wnid_of(name) == wnid}) for wnid in wnids
    }


def write_train(path: Path, tars: Mapping[str, bytes]) -> None:
    path.write_bytes(packed(tars))


def packed(files: Mapping[str, bytes]) -> bytes:
    """A tar of these files, by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_devkit(path: Path, wnids: Sequence[str], truth: Sequence[int]) -> None:
    """A development kit in which ILSVRC2012_ID counts `wnids` from 1; `truth` has the ID of each validation image.

    As in the real one, there are also classes of classes, whose IDs are larger.
    """
    fields = [
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images",
    ]  # fmt: skip
    synsets = [(number, wnid, "a", "b", 0, [], 0, 6) for number, wnid in enumerate(wnids, start=1)]
    synsets.append((len(wnids) + 1, "n00001740", "entity", "all", len(wnids), list(range(1, len(wnids) + 1)), 1, 0))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, [(field, object) for field in fields])}, do_compression=True)
    content = packed({
        "ILSVRC2012_devkit_t12/readme.txt": b"small",
        f"{KITS_FOLDER}/meta.mat": meta.getvalue(),
        f"{KITS_FOLDER}/ILSVRC2012_validation_ground_truth.txt": b"".join(b"%d\n" % number for number in truth),
    })  # fmt: skip
    path.write_bytes(gzip.compress(content))


def extract(files: SmallImageNet, folder: Path, *, val_in_classes: bool) -> None:
    """The images as files: train/WNID/NAME, and val/WNID/NAME or val/NAME."""
    paths = {f"train/{wnid_of(name)}/{name}": image for name, image in files.train.items()}
    for name, image in files.val.items():
        paths[f"val/{files.val_wnids[name]}/{name}" if val_in_classes else f"val/{name}"] = image
    for path, image in paths.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image)


def _picture(label: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(*size, 3) uint8: noise around a color of the class."""
    color = np.random.default_rng(label).integers(40, 215, 3)
    return np.clip(color + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8)


def _encoded(pixels: np.ndarray, mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()
