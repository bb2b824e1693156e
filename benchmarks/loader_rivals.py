"""Other libraries that do DeiT's augmentation: each as a function that prepares some encoded images.

Those that are not installed are left out by name. `pip install '.[benchmarks]'` installs all.
"""

import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would look for a newer version in the network
warnings.filterwarnings("ignore", module="webdataset")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAGNITUDE, BATCH = 9, 32
Images = Sequence[bytes]
Prepare = Callable[[], object]


def rivals(size: int, images: Images, tar: Path) -> dict[str, Prepare | None]:
    """By name: prepares `images` for training at `size` pixels a side; None if a library is missing.

    `tar`: a shard of the same images.
    """
    made: dict[str, tuple[str, Callable[[int, Images], Prepare]]] = {
        "timm": ("timm", timm_floats),
        "timm, bytes only (its prefetcher)": ("timm", timm_bytes),
        "torchvision v2 + torchcodec": ("torchcodec", torchvision_v2),
        "AlbumentationsX + simplejpeg": ("albumentations", albumentationsx),
        "webdataset + DataLoader + timm": ("webdataset", partial(webdataset_timm, tar=tar)),
    }
    return {name: make(size, images) if find_spec(module) else None for name, (module, make) in made.items()}


def timm_transform(size: int, prefetcher: bool) -> Any:
    """timm's training transform with DeiT's settings; `prefetcher`: leaves normalizing and erasing to the device.

    At the end of its scale timm's Posterize keeps 0 bits, which Pillow 13 refuses; here it keeps 1.
    """
    from timm.data import auto_augment, create_transform

    transform = create_transform(
        size,
        is_training=True,
        use_prefetcher=prefetcher,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        mean=MEAN,
        std=STD,
    )
    (policy,) = (each for each in transform.transforms if isinstance(each, auto_augment.RandAugment))
    for operation in policy.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.level_fn = partial(_bits, operation.level_fn)
    return transform


def _bits(level_fn: Callable[..., tuple[int]], level: float, settings: dict[str, Any]) -> tuple[int]:
    return (max(1, level_fn(level, settings)[0]),)


def timm_floats(size: int, images: Images) -> Prepare:
    """Normalized and erased, as DeiT's own loader delivers them without a prefetcher."""
    transform = timm_transform(size, prefetcher=False)
    return lambda: torch.stack([transform(_opened(image)) for image in images])


def timm_bytes(size: int, images: Images) -> Prepare:
    """Bytes, as timm's loader hands them to its prefetcher."""
    transform = timm_transform(size, prefetcher=True)
    return lambda: np.stack([transform(_opened(image)) for image in images])


def timm_evaluation(size: int, images: Images) -> Prepare:
    """timm's evaluation transform: the shorter side to size / 0.875, then the central square."""
    from timm.data import create_transform

    transform = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=0.875, mean=MEAN, std=STD)
    return lambda: torch.stack([transform(_opened(image)) for image in images])


def torchvision_v2(size: int, images: Images) -> Prepare:
    """Its RandAugment of tensors has no bicubic interpolation."""
    from torchcodec.decoders import decode_image
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, MAGNITUDE, interpolation=InterpolationMode.BILINEAR),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.25),
        ]
    )
    return lambda: torch.stack([transform(decode_image(image)) for image in images])


def albumentationsx(size: int, images: Images) -> Prepare:
    """It has no RandAugment: two of its nearest operations, at magnitude 9 of 10."""
    import albumentations as A
    import cv2
    import simplejpeg

    part = MAGNITUDE / 10
    moves: dict[str, Any] = {"interpolation": cv2.INTER_CUBIC, "fill": 124, "p": 1}
    weaker, stronger = 1 - 0.9 * part, 1 + 0.9 * part
    operations = [
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.InvertImg(p=1),
        A.Rotate(angle_range=(-30 * part, 30 * part), **moves),
        A.Posterize(num_bits=(4, 4), p=1),
        A.Solarize(threshold_range=(1 - part, 1 - part), p=1),
        *(A.ColorJitter(**{**_STILL, key: (weaker, stronger)}, p=1) for key in list(_STILL)[:3]),
        A.Sharpen(p=1),
        A.Affine(shear={"x": (-17 * part, 17 * part), "y": (0, 0)}, **moves),
        A.Affine(shear={"x": (0, 0), "y": (-17 * part, 17 * part)}, **moves),
        A.Affine(translate_percent={"x": (-0.45 * part, 0.45 * part), "y": (0, 0)}, **moves),
        A.Affine(translate_percent={"x": (0, 0), "y": (-0.45 * part, 0.45 * part)}, **moves),
    ]
    transform = A.Compose(
        [
            A.RandomResizedCrop((size, size), interpolation=cv2.INTER_CUBIC),
            A.HorizontalFlip(p=0.5),
            A.SomeOf(operations, n=2, replace=True, p=1),
            A.Normalize(MEAN, STD),
            A.Erasing(scale=(0.02, 1 / 3), fill="random", p=0.25),
            A.ToTensorV2(),
        ]
    )
    return lambda: torch.stack([transform(image=simplejpeg.decode_jpeg(image))["image"] for image in images])


_STILL = {"brightness_range": (1, 1), "contrast_range": (1, 1), "saturation_range": (1, 1), "hue_range": (0, 0)}


def webdataset_timm(size: int, images: Images, tar: Path) -> Prepare:
    """As many images of the tar, decoded with Pillow and collated into batches in this process."""
    import webdataset as wds

    transform = timm_transform(size, prefetcher=False)
    stored = wds.WebDataset(str(tar), shardshuffle=False).slice(len(images))
    loader = torch.utils.data.DataLoader(
        stored.decode("pil").to_tuple("jpg", "cls").map_tuple(transform), batch_size=BATCH, num_workers=0
    )
    return lambda: [batch for batch, _ in loader]


def _opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")
