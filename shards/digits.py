"""Builds shards from scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998): real images without a download.

897 + 900 images of 8 x 8 pixels with 17 shades of gray, enlarged. A small network reaches its best accuracy on them in
minutes.
"""

from pathlib import Path

import cv2
import numpy as np

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.shards.build import build as build_shards
from scaleprog.shards.build import finished
from scaleprog.shards.samples import Pixels

SIDE = 32
VALIDATION = 900
SHARDS = {"train": 4, "val": 2}
SHADES = 16
"""The value of white in the data set."""


def build(out: Path, *, seed: int = 0) -> Manifest:
    """Builds 4 shards for training and 2 for validation in `out`; `seed` draws the splits from the whole data set.

    The key of a sample is its split and its place in the data set, for example `train-00123`.

    Raises:
        DataError: scikit-learn is missing, or `out` holds something else or cannot be written.
    """
    description = {"builder": "digits", "side": SIDE, "seed": seed}
    if manifest := finished(out, description):
        return manifest
    images, labels = _enlarged()
    order = np.random.default_rng(seed).permutation(len(images))
    places = {"train": order[VALIDATION:], "val": order[:VALIDATION]}
    splits = {split: Pixels.shards(split, places[split], images, labels, count) for split, count in SHARDS.items()}
    return build_shards(out, classes=list("0123456789"), splits=splits, source=description, workers=1)


def _enlarged() -> tuple[np.ndarray, np.ndarray]:
    """All images, (N, SIDE, SIDE) uint8, and their labels, (N,) uint8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits come with scikit-learn; run pip install scikit-learn ({error})") from error
    data = load_digits()
    bright = data.images.astype(np.float32) * (255 / SHADES)
    grown = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for image in bright]
    return np.rint(np.clip(grown, 0, 255)).astype(np.uint8), data.target.astype(np.uint8)
