"""Augmentation of training images and cropping of evaluation images.

timm and torchvision provide RandAugment, color jitter, random erasing, Mixup and CutMix. They draw from the global
generators of `random`, numpy and torch. This module seeds those from (seed, epoch, step, lane) around each use and
restores them afterwards, so that a batch depends on nothing else and the training process's own draws do not change.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from scaleprog.data.decode import Box, decode
from scaleprog.data.origin import IDENTITY, Located, Origin, after, of_crop
from scaleprog.data.packed import PackedImage
from scaleprog.errors import DataError
from scaleprog.recipe.keys import AugmentSettings

_CROP_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the center
_CROP, _FLIP = 2 * _CROP_ATTEMPTS + 2, 1  # uniform numbers that a sample's crop and flip draw
_LANE, _MIX = 0, 1  # the purpose of a draw: keeps the two kinds of seeds apart


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


Policy = Callable[[Image.Image], tuple[Image.Image, Origin]]
Encoded = tuple[memoryview | PackedImage, str]
"""An encoded or packed image and its location (shard and key)."""


class Augmentation:
    """Turns encoded images into normalized tensors, for training and for evaluation.

    Args:
        settings: the recipe's augmentation settings.
        channels: 1 or 3.
        seed: seeds all draws, together with epoch, step and lane.

    Raises:
        DataError: `channels` is another number, or `settings` do not fit it.
    """

    def __init__(self, settings: AugmentSettings, channels: int, seed: int = 0) -> None:
        if channels not in (1, 3):
            raise DataError(f"images have 1 or 3 channels, not {channels}")
        self.settings = settings
        self.channels = channels
        self.seed = seed
        mean, std = normalization(settings, channels)
        self._mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self._std = torch.tensor(std).view(-1, 1, 1) * 255

    def lane(self, images: Iterable[Encoded], request: BatchRequest, lane: int) -> Tensor:
        """The training images of one lane for one step, (n, C, r, r) float32; see `lane_with_origins`."""
        return self.lane_with_origins(images, request, lane)[0]

    def lane_with_origins(self, images: Iterable[Encoded], request: BatchRequest, lane: int) -> tuple[Tensor, Tensor]:
        """The training images of one lane for one step, in DeiT's order: crop, flip, color jitter or RandAugment,
        normalize, erase.

        Returns:
            images (n, C, r, r) and their origins (n, 2, 3), see `data/origin.py`; float32.

        Raises:
            DataError: an image cannot be decoded.
        """
        entropy = (self.seed, _LANE, request.epoch, request.step, lane)
        erase = self.settings.erase * request.erase
        images = list(images)
        uniform = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        draws = uniform.random((len(images), _CROP + _FLIP)).tolist()
        cropped = [self._crop_and_flip(image, request.resolution, row) for image, row in zip(images, draws)]
        pixels, origins = [image for image, _ in cropped], [origin for _, origin in cropped]
        policy = self._policy(request)
        with _seeded(*entropy) if policy or erase else nullcontext():
            if policy:
                for i, image in enumerate(pixels):
                    pixels[i], moved = self._vary(image, policy)
                    origins[i] = after(origins[i], moved)
            batch = self._normalize(pixels)
            if erase:
                batch = RandomErasing(erase, mode="pixel", device="cpu")(batch)
        return batch, torch.from_numpy(np.stack(origins)).float()

    def evaluation(self, images: Iterable[Encoded], resolution: int) -> Tensor:
        """Evaluation images: the central square whose side is `eval_crop` of the shorter side, resized.

        Returns:
            (n, C, r, r) float32.

        Raises:
            DataError: an image cannot be decoded.
        """
        box = partial(central_box, part=self.settings.eval_crop)
        return self._normalize([decode(data, where, self.channels, resolution, box) for data, where in images])

    def _crop_and_flip(self, image: Encoded, resolution: int, draws: list[float]) -> tuple[np.ndarray, Origin]:
        """(r, r, C) uint8, and its origin."""
        data, where = image
        flipped, origin = draws[_CROP] < self.settings.flip, IDENTITY

        def crop(height: int, width: int) -> Box:
            nonlocal origin
            box = random_box(self.settings, height, width, draws[:_CROP])
            origin = of_crop(box, height, width, flipped, self.settings.token_label_crop == "transposed")
            return box

        pixels = decode(data, where, self.channels, resolution, crop)
        return pixels[:, ::-1] if flipped else pixels, origin

    def _vary(self, pixels: np.ndarray, policy: Policy) -> tuple[np.ndarray, Origin]:
        """RandAugment or color jitter on (r, r, C) uint8, and the origin of the result in `pixels`."""
        image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if self.channels == 1 else pixels))
        varied, origin = policy(image)
        return np.asarray(varied).reshape(pixels.shape), origin

    def _policy(self, request: BatchRequest) -> Policy | None:
        if self.settings.randaugment is not None:
            mean, _ = normalization(self.settings, self.channels)
            rounded = self.settings.round_magnitude
            return _located(
                _rand_augment(self.settings.randaugment, request.resolution, request.magnitude, mean, rounded)
            )
        if self.settings.color_jitter:
            jitter = ColorJitter(*(self.settings.color_jitter,) * 3)
            return lambda image: (jitter(image), IDENTITY)
        return None

    def _normalize(self, pixels: list[np.ndarray]) -> Tensor:
        """[(r, r, C) uint8] -> (n, C, r, r) float32, contiguous."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return batch.float().sub_(self._mean).div_(self._std)


def random_box(settings: AugmentSettings, height: int, width: int, draws: list[float]) -> Box:
    """The box of a random crop from an image of `height` x `width` pixels. `draws`: uniform numbers in [0, 1).

    "resized" follows torchvision's RandomResizedCrop: ten attempts, then the center at the nearest allowed ratio.
    """
    *shapes, across, down = draws
    if settings.crop == "none":
        return 0, 0, width, height
    if settings.crop == "padded":
        span = 2 * settings.padding + 1
        left, top = int(across * span) - settings.padding, int(down * span) - settings.padding
        return left, top, left + width, top + height
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


def mix(
    images: Tensor,
    labels: Tensor,
    *,
    lanes: range,
    of: int,
    seed: int,
    step: int,
    classes: int,
    settings: AugmentSettings,
) -> tuple[Tensor, Tensor]:
    """Applies Mixup or CutMix. The result depends neither on the number of ranks nor on who owns which lane.

    The lanes are cut into `mix_groups` contiguous groups. Each group draws once per step whether to mix, how, and how
    much, as each rank of DeiT does. The partners are samples j and j + n/2 of one lane with n samples. So, with R
    repeats of an image next to each other, no image is mixed with itself if n/2 >= R.

    Does not modify `images`; without Mixup and CutMix it returns the same tensor.

    Args:
        images: (B_local, C, r, r), lane-major.
        labels: (B_local,) int64.
        lanes: this rank's lanes, of which each contributes an even number of samples.
        of: V, the number of lanes over all ranks.
        seed, step: seed the draws; `step` counts over the whole run.
        classes: number of classes, the width of the targets.
        settings: mixup, cutmix, mix_groups, mix_probability, mix_switch and smoothing.

    Returns:
        images (B_local, C, r, r), and smoothed and mixed one-hot targets (B_local, classes) float32.

    Raises:
        ValueError: a lane contributes an odd number of samples.
    """
    if not settings.mixup and not settings.cutmix:
        return images, mixup_target(labels, classes, smoothing=settings.smoothing)
    per_lane, rest = divmod(len(images), len(lanes))
    if rest or per_lane % 2:
        raise ValueError(f"{len(images)} samples in {len(lanes)} lanes are not an even number each")
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.mix_switch,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    groups, mixed, first = settings.groups(of), [], 0
    for group, members in groupby(lanes, key=lambda lane: lane * groups // of):
        rows = torch.arange(first, first := first + per_lane * len(list(members)), device=images.device)
        halves = rows.view(-1, 2, per_lane // 2)
        paired = torch.cat((halves[:, 0].flatten(), halves[:, 1].flatten().flip(0)))  # timm mixes row i with B - 1 - i
        with _seeded(seed, _MIX, step, group):
            pixels, targets = mixup(images[paired], labels[paired])
        back = torch.argsort(paired)
        mixed.append((pixels[back], targets[back]))
    return torch.cat([pixels for pixels, _ in mixed]), torch.cat([targets for _, targets in mixed])


def token_boxes(
    rows: int, side: int, *, lanes: range, of: int, seed: int, step: int, settings: AugmentSettings
) -> tuple[Tensor, Tensor]:
    """Draws MixToken's boxes (arXiv 2104.10858), one per group of lanes; partners are those of `mix`.

    Args:
        rows: B_local, this rank's images, lane-major.
        side: tokens on a side of the grid.
        lanes, of, seed, step, settings: as in `mix`.

    Returns:
        partner (B_local,) int64, the row of each image's partner; inside (B_local, side, side) bool, the box.
    """
    per_lane, groups = rows // len(lanes), settings.groups(of)
    partner = torch.arange(rows).view(len(lanes), 2, per_lane // 2).flip(1).flatten()
    boxes = []
    for lane in lanes:
        rng = np.random.default_rng((seed, _MIX, step, lane * groups // of))
        cut = int(side * (1 - rng.beta(1.0, 1.0)) ** 0.5) if rng.random() < settings.mix_probability else 0
        top, left = (int(rng.integers(side)) for _ in range(2))
        box = torch.zeros(side, side, dtype=torch.bool)
        box[
            max(0, top - cut // 2) : max(0, top + (cut + 1) // 2),
            max(0, left - cut // 2) : max(0, left + (cut + 1) // 2),
        ] = True
        boxes.append(box.expand(per_lane, -1, -1))
    return partner, torch.cat(boxes)


def low_pass(images: Tensor, cutoff: int) -> Tensor:
    """Removes frequencies that `cutoff` x `cutoff` pixels cannot hold (arXiv 2405.08768, 3.2) from (B, C, H, W) images.

    The images keep their size: EfficientTrain++ crops the spectrum, and this function sets the rest of it to zero.
    """
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device).abs()
    columns = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = (rows < cutoff / 2)[:, None] & (columns < cutoff / 2)
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * kept, (height, width)).to(images.dtype)


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seeds the global generators of `random`, numpy and torch (CPU) from `entropy`, and restores them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    first, second, third = np.random.SeedSequence(entropy).generate_state(3).tolist()
    try:
        random.seed(first)
        np.random.seed(second)
        torch.default_generator.manual_seed(third)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


_located = lru_cache(maxsize=64)(Located)


@lru_cache(maxsize=64)
def _rand_augment(
    config: str, resolution: int, magnitude: float, mean: tuple[float, ...], rounded: bool
) -> RandAugment:
    """timm's RandAugment, set up as in timm's training transform, with its magnitude multiplied by `magnitude`, and
    rounded to a whole number if `rounded`."""
    fill = tuple(min(255, round(255 * value)) for value in mean)
    policy = rand_augment_transform(
        config,
        {
            "translate_const": int(resolution * 0.45),
            "img_mean": fill if len(fill) > 1 else fill[0],
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    for op in policy.ops:
        op.magnitude = round(op.magnitude * magnitude) if rounded else op.magnitude * magnitude
        if op.aug_fn is posterize:
            op.level_fn = partial(_posterize_bits, op.level_fn)
    return policy


def _posterize_bits(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """At least 1 bit: at the end of its scale timm asks for 0 bits, and Pillow 13 raises an error."""
    return (max(1, level_fn(level, hparams)[0]),)
