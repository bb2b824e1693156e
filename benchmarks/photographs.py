"""Shards of photographs as large as ImageNet's usual ones: 500 x 375 pixels, JPEG of quality 92.

They are random parts of the photographs that come with scikit-learn and scikit-image, some mirrored, all a little
brighter or darker.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from skimage import data
from sklearn.datasets import load_sample_images

from scaleprog.data.manifest import Manifest
from scaleprog.shards.build import build, finished
from scaleprog.shards.samples import SourceSample

WIDTH, HEIGHT, QUALITY = 500, 375, 92
CLASSES = 10


@cache
def _originals() -> list[np.ndarray]:
    """RGB; none is smaller than 451 x 300 pixels."""
    ours = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [np.asarray(image) for image in (*load_sample_images().images, *ours)]


@dataclass(frozen=True)
class Photographs:
    """The samples of one shard, numbered from `first` to before `stop`."""

    split: str
    first: int
    stop: int

    def __iter__(self) -> Iterator[SourceSample]:
        for number in range(self.first, self.stop):
            rng = np.random.default_rng((self.split == "val", number))
            original = _originals()[number % len(_originals())]
            height, width = original.shape[:2]
            part = rng.uniform(0.8, 1.0) * min(width / WIDTH, height / HEIGHT)
            w, h = int(part * WIDTH), int(part * HEIGHT)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            pixels = cv2.resize(
                original[top : top + h, left : left + w], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
            )
            if rng.random() < 0.5:
                pixels = pixels[:, ::-1]
            pixels = cv2.convertScaleAbs(pixels, alpha=rng.uniform(0.85, 1.15), beta=rng.uniform(0, 10))
            image = simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420")
            yield SourceSample(f"{self.split}{number:07d}", "jpg", image, number % CLASSES)


def build_shards(out: Path, count: int, per_shard: int) -> Manifest:
    """Shards in `out` of `count` training photographs, and 100 for validation."""
    source = {"builder": "photographs", "count": count, "per_shard": per_shard}
    if manifest := finished(out, source):
        return manifest
    bounds = [*range(0, count, per_shard), count]
    train = [Photographs("train", first, stop) for first, stop in pairwise(bounds)]
    splits = {"train": train, "val": [Photographs("val", 0, 100)]}
    return build(out, classes=[str(label) for label in range(CLASSES)], splits=splits, source=source, workers=1)
