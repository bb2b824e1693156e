"""Reduces photographs to the size that training needs, so that shards take less room and decode faster."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import simplejpeg

from scaleprog.data.decode import decode_whole
from scaleprog.errors import DataError

QUALITY = 92
_RESOLUTION, _PASSES = 224, 3  # of the measurement


@dataclass(frozen=True)
class Reduction:
    """How a builder reduces images.

    Args:
        shorter_side: in pixels; images with a longer one are reduced to it, others keep their bytes.
        quality: of the JPEGs as which reduced images are stored, 1 to 100.
    """

    shorter_side: int
    quality: int = QUALITY

    @classmethod
    def of(cls, shorter_side: int | None, quality: int | None) -> "Reduction | None":
        """From the options of a command; None without `--shorter-side`. Raises DataError if that alone is missing."""
        if shorter_side is None:
            if quality is not None:
                raise DataError("--quality is that of reduced images; add --shorter-side, or leave --quality out")
            return None
        return cls(shorter_side, QUALITY if quality is None else quality)

    def apply(self, content: bytes) -> bytes:
        """An encoded image, reduced; raises ValueError if it cannot be decoded.

        The JPEG halves the resolution of colors (4:2:0), as most photographs from cameras and the web do: a fifth fewer
        bytes than 4:4:4, and decoded in a quarter less time.
        """
        image = decode_whole(content, self.shorter_side)
        if not image.reduced:
            return content
        return simplejpeg.encode_jpeg(
            image.pixels,
            quality=self.quality,
            colorspace="GRAY" if image.pixels.shape[-1] == 1 else "RGB",
            colorsubsampling="Gray" if image.pixels.shape[-1] == 1 else "420",
            fastdct=False,
        )


def images_per_core_second(contents: Sequence[bytes]) -> float:
    """How many encoded images a core decodes and crops in a second; measured now, with the crops of training."""
    from scaleprog.data.augment import Augmentation, BatchRequest  # imports timm: seconds in every worker
    from scaleprog.recipe.keys import AugmentSettings

    images = [(memoryview(content), str(place)) for place, content in enumerate(contents)]
    out = np.empty((len(images), _RESOLUTION, _RESOLUTION, 3), np.uint8)
    augmentation = Augmentation(AugmentSettings(), 3)

    def seconds() -> float:
        start = time.process_time()
        augmentation.lane(images, BatchRequest(0, 0, _RESOLUTION), 0, out)
        return time.process_time() - start

    return len(images) / median(seconds() for _ in range(_PASSES))
