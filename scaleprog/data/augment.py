"""Augmentation of training images and cropping of evaluation images.

What happens to an image is drawn from (seed, epoch, step, lane) alone: uniform numbers, a row per image, decide crop,
flip, operations and erasing. The host decodes, crops, changes and flips bytes; the device normalizes them and erases
(`on_device.py`). The operations, too, may be left to the device (`tensor_operations.py`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby, islice

import cv2
import numpy as np
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from scaleprog.data.decode import Box, Encoded, decode
from scaleprog.data.operations import Operation, apply
from scaleprog.data.origin import FLIP, MOVES, Origin, after, of_crop
from scaleprog.data.policies import Policy, policy_of
from scaleprog.errors import DataError
from scaleprog.recipe.keys import AugmentSettings

_CROP_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the center
_CROP = 2 * _CROP_ATTEMPTS + 2  # uniform numbers that choose a crop
_SIMPLE_MARGIN = 4  # pixels of the resized image by which a simple crop may reach beyond it
_ERASE_ATTEMPTS = 10
_ERASE = 2 * _ERASE_ATTEMPTS + 4  # uniform numbers that choose what to erase
_NOISE_SEEDS = 2**48
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's
_LANE = 0  # the purpose of a draw: keeps its seeds apart from those of `mixing.py`


def normalization(settings: AugmentSettings, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of pixels in 0-1, one number per channel. Raises DataError if the recipe's numbers do not fit."""
    imagenet = channels == 3
    mean = settings.mean or (IMAGENET_DEFAULT_MEAN if imagenet else (0.5,) * channels)
    std = settings.std or (IMAGENET_DEFAULT_STD if imagenet else (0.5,) * channels)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise DataError(
            f"augment.mean {mean} and augment.std {std} must have {channels} numbers each, every std above 0"
        )
    return mean, std


def fill_of(settings: AugmentSettings, channels: int) -> tuple[int, ...]:
    """Gray level of each channel for places that lie outside an image. Raises DataError like `normalization`."""
    mean, _ = normalization(settings, channels)
    return tuple(min(255, round(255 * value)) for value in mean)


@dataclass(frozen=True)
class BatchRequest:
    """The batch that one step needs."""

    epoch: int
    step: int
    """Step within the epoch's order."""
    resolution: int
    """Pixels per side."""
    magnitude: float = 1.0
    """Factor on RandAugment's magnitude (AdaReg)."""
    erase: float = 1.0
    """Factor on the probability of random erasing (AdaReg)."""


Erasing = tuple[int, int, int, int, int]
"""top, left, height, width in pixels of a box, and the seed of the noise in it; all 0: nothing is erased."""


@dataclass(frozen=True)
class Draw:
    """What was drawn for one training image."""

    crop: tuple[float, ...]
    """Uniform numbers for `random_box`, which needs the size of the image."""
    flipped: bool
    operations: tuple[Operation, ...]
    erasing: Erasing


class Augmentation:
    """Turns encoded images into bytes of one size, for training and for evaluation.

    Args:
        settings: the recipe's augmentation settings.
        channels: 1 or 3.
        seed: seeds all draws, together with epoch, step and lane.
        sound: whether all images are known to have no error (`Manifest.sound`).
        tracked: whether to tell where the pixels of an image come from.

    Raises:
        DataError: `channels` is another number, or `settings` do not fit it.
    """

    def __init__(
        self, settings: AugmentSettings, channels: int, seed: int = 0, sound: bool = False, tracked: bool = True
    ) -> None:
        if channels not in (1, 3):
            raise DataError(f"images have 1 or 3 channels, not {channels}")
        self.settings = settings
        self.channels = channels
        self.seed = seed
        self._sound, self._tracked = sound, tracked
        self.fill = fill_of(settings, channels)
        self.deferred = policy_of(settings).most if settings.device == "accelerator" else 0
        """The most operations of an image that are left to the device."""

    def draws(self, request: BatchRequest, lane: int, count: int) -> list[Draw]:
        """What happens to the images of one lane in one step."""
        policy = policy_of(self.settings, request.magnitude)
        entropy = (self.seed, _LANE, request.epoch, request.step, lane)
        uniform = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        rows = uniform.random((count, _CROP + 1 + _ERASE + policy.numbers)).tolist()
        return [self._draw(iter(row), request, policy) for row in rows]

    def lane(
        self, images: Sequence[Encoded], request: BatchRequest, lane: int, out: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[Operation, ...]], list[Erasing]]:
        """Decodes, crops, changes and flips the training images of one lane for one step.

        If the operations are left to the device, it only decodes, crops and flips them.

        Neighbors that are the same image (repeated augmentation) are decoded once.

        Args:
            images: n encoded images.
            request: epoch, step, and resolution r.
            lane: its number.
            out: (n, r, r, C) uint8; receives the images.

        Returns:
            The images' origins (n, 2, 3) when everything is done, see `data/origin.py`, or undefined numbers unless
            they are `tracked`; the operations that are left to the device; and what is still to be erased of the
            images.

        Raises:
            DamagedSample: an image cannot be decoded; `out` is then undefined.
        """
        draws, origins = self.draws(request, lane, len(images)), np.empty((len(images), 2, 3))
        side, reflect, first = request.resolution, self.settings.crop == "simple", 0
        for where, same in groupby(images, key=lambda image: image[1]):
            views = list(same)
            rows = range(first, first := first + len(views))
            crops = [partial(self._crop, draws[row], origins[row], side) for row in rows]
            target = out[rows.start : rows.stop]
            how = {"reflect": reflect, "fast": True, "sound": self._sound}
            decode(views[0][0], where, self.channels, side, crops, **how, out=target)
            for row in rows:
                self._change(out[row], draws[row], origins[row])
        return origins, [draw.operations if self.deferred else () for draw in draws], [draw.erasing for draw in draws]

    def evaluation(self, images: Sequence[Encoded], out: np.ndarray) -> None:
        """Evaluation images: the central square whose side is `eval_crop` of the shorter side, resized.

        `out`: (n, r, r, C) uint8; receives the images.

        Raises:
            DataError: an image cannot be decoded.
        """
        box = partial(central_box, part=self.settings.eval_crop)
        for row, (data, where) in enumerate(images):
            decode(data, where, self.channels, out.shape[1], [box], out=out[row : row + 1])

    def _draw(self, uniform: Iterator[float], request: BatchRequest, policy: Policy) -> Draw:
        crop = tuple(islice(uniform, _CROP))
        flipped = next(uniform) < self.settings.flip
        erasing = random_erasing(self.settings.erase * request.erase, request.resolution, list(islice(uniform, _ERASE)))
        return Draw(crop, flipped, policy.draw(uniform), erasing)

    def _crop(self, draw: Draw, origin: Origin, resolution: int, height: int, width: int) -> Box:
        """The box of an image's crop; writes its origin into `origin`."""
        box = random_box(self.settings, resolution, height, width, draw.crop)
        if self._tracked:
            origin[:] = of_crop(box, height, width, self.settings.token_label_crop == "transposed")
        return box

    def _change(self, pixels: np.ndarray, draw: Draw, origin: Origin) -> None:
        """Changes and flips one cropped image (r, r, C), and composes its origin, both in place."""
        changed = pixels if self.deferred else reduce(partial(apply, fill=self.fill), draw.operations, pixels)
        if self._tracked:
            moves = [MOVES[name](amount) for name, amount in draw.operations if name in MOVES]
            flips = [FLIP] if draw.flipped else []
            origin[:] = reduce(after, flips + moves if self.deferred else moves + flips, origin)
        if draw.flipped:
            cv2.flip(changed, 1, dst=pixels)
        elif changed is not pixels:
            pixels[:] = changed


def random_box(settings: AugmentSettings, resolution: int, height: int, width: int, draws: Sequence[float]) -> Box:
    """The box of a random crop from an image of `height` x `width` pixels. `draws`: uniform numbers in [0, 1).

    "resized" follows torchvision's RandomResizedCrop: ten attempts, then the center at the nearest allowed ratio.
    "simple" follows DeiT III: RandomCrop from the image, resized to the network's resolution and mirrored at its edges.
    """
    *shapes, across, down = draws
    if settings.crop == "none":
        return 0, 0, width, height
    if settings.crop == "padded":
        span = 2 * settings.padding + 1
        left, top = int(across * span) - settings.padding, int(down * span) - settings.padding
        return left, top, left + width, top + height
    if settings.crop == "simple":
        side = min(height, width)
        unit = side / resolution  # pixels of the image in one of the resized image

        def offset(length: int, uniform: float) -> int:
            places = int((length - side) / unit) + 2 * _SIMPLE_MARGIN + 1
            return round((int(uniform * places) - _SIMPLE_MARGIN) * unit)

        left, top = offset(width, across), offset(height, down)
        return left, top, left + side, top + side
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    for area, ratio in zip(shapes[::2], shapes[1::2]):
        target = height * width * (settings.scale[0] + area * (settings.scale[1] - settings.scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * settings.ratio[1])))
    h = min(height, max(1, round(width / settings.ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_box(height: int, width: int, part: float) -> Box:
    """The central square whose side is `part` of the shorter side."""
    side = max(1, round(min(height, width) * part))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_erasing(probability: float, side: int, draws: Sequence[float]) -> Erasing:
    """A box that is erased of an image of `side` x `side` pixels, as timm's RandomErasing draws it.

    `draws`: uniform numbers in [0, 1).
    """
    whether, *shapes, down, across, noise = draws
    if whether >= probability:
        return 0, 0, 0, 0, 0
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    for area, ratio in zip(shapes[::2], shapes[1::2]):
        target = side * side * (_ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0]))
        aspect = math.exp(low + ratio * (high - low))
        height, width = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if height < side and width < side:
            top, left = int(down * (side - height + 1)), int(across * (side - width + 1))
            return top, left, height, width, int(noise * _NOISE_SEEDS)
    return 0, 0, 0, 0, 0
