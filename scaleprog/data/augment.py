"""How training images are varied, and how evaluation images are cut.

RandAugment, colour jitter, random erasing, Mixup and CutMix are timm's and torchvision's. They draw from the global
generators of `random`, numpy and torch; here those are seeded from (seed, epoch, step, lane) around each use and put
back afterwards, so that a batch depends on nothing else and the training process's own draws are left alone.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from scaleprog.data.decode import Box, decode
from scaleprog.errors import DataError
from scaleprog.settings import (
    Aspect,
    Deviation,
    Few,
    Margin,
    Momentum,
    NoOrMore,
    Number,
    Part,
    Settings,
    Share,
    Strength,
    Text,
)

_CROP_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to the centre
_CROP, _FLIP = 2 * _CROP_ATTEMPTS + 2, 1  # uniform numbers that a sample's crop and flip draw
_RANDAUGMENT = (  # timm ignores a section that it does not know, and runs as many operations as n says
    r"m([0-9]|[12][0-9]|30)|mmax([1-9]|[12][0-9]|30)|mstd[0-9]{1,4}(\.[0-9]{1,6})?|n([1-9]|1[0-6])|"
    r"p(0(\.[0-9]{1,6})?|1(\.0{1,6})?)|inc[01]|t(weights|3a|3aw)"
)
_LANE, _MIX = 0, 1  # what is drawn for: keeps the two kinds of seeds apart


class AugmentSettings(Settings):
    """Augmentation of the training images, and the cut of the evaluation images; the defaults are those of DeiT's
    cropping without anything on top."""

    crop: Literal["resized", "padded", "none"] = "resized"
    """resized: RandomResizedCrop; padded: zeros around a small image, then a random window of its size; none: all."""
    scale: tuple[Number, Number] = (0.08, 1.0)
    """Area of a resized crop, as a part of the image's."""
    ratio: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Aspect ratio of a resized crop."""
    padding: Margin = 2
    """Zeros on every side of a padded crop, in pixels of the stored image."""
    flip: Share = 0.5
    color_jitter: Strength = 0.0
    """Brightness, contrast and saturation, unless RandAugment is on, which replaces it as in timm."""
    randaugment: Text | None = None
    """timm's configuration string, e.g. rand-m9-mstd0.5-inc1."""
    erase: Share = 0.0
    """Probability of random erasing, with noise per pixel."""
    mixup: NoOrMore = 0.0
    """Parameter of Mixup's beta distribution; 0 is off."""
    cutmix: NoOrMore = 0.0
    """Parameter of CutMix's beta distribution; 0 is off."""
    mix_probability: Share = 1.0
    mix_switch: Share = 0.5
    """Probability of CutMix where both are on."""
    smoothing: Momentum = 0.1
    """Label smoothing."""
    repeats: Few = 1
    """Repeated augmentation: how often a sample comes in an epoch that uses 1 / repeats of the samples."""
    eval_crop: Part = 0.875
    """Side of the central square that evaluation sees, as a part of the image's shorter side."""
    mean: Annotated[tuple[Share, ...], Field(max_length=16)] | None = None
    """Per channel; ImageNet's for colour and 0.5 for grey where not given; so for std."""
    std: Annotated[tuple[Deviation, ...], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "AugmentSettings":
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers, the lower first, not {(low, high)}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a part of the image's area: at most 1, not {self.scale[1]}")
        if self.randaugment is not None:
            if not re.fullmatch(r"rand(-((m|mmax|mstd|n|p|inc)[0-9.]+|t(weights|3a|3aw)))*", self.randaugment):
                raise ValueError(
                    f"randaugment: {self.randaugment!r} is not understood by timm, e.g. rand-m9-mstd0.5-inc1"
                )
            if not re.fullmatch(rf"rand(-({_RANDAUGMENT}))*", self.randaugment):
                raise ValueError(
                    f"randaugment: {self.randaugment!r}: needed are m and mmax up to 30, n from 1 to 16, p up to 1, "
                    "mstd up to 9999 and inc0 or inc1"
                )
        return self

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), one number per channel of pixels in 0-1.

        Raises:
            DataError: other numbers of channels were given.
        """
        if channels == 3:
            mean, std = self.mean or IMAGENET_DEFAULT_MEAN, self.std or IMAGENET_DEFAULT_STD
        else:
            mean, std = self.mean or (0.5,) * channels, self.std or (0.5,) * channels
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise DataError(f"augment.mean {mean} and augment.std {std} must be {channels} numbers each, std above 0")
        return mean, std


@dataclass(frozen=True)
class Request:
    """What one step wants decoded."""

    epoch: int
    step: int
    """Step within the epoch's order."""
    resolution: int
    """Pixels of a side."""
    magnitude: float = 1.0
    """Factor on RandAugment's magnitude (AdaReg)."""
    erase: float = 1.0
    """Factor on the probability of random erasing (AdaReg)."""


Encoded = tuple[memoryview, str]
"""An encoded image, and where it stands (shard and key)."""


class Augmentation:
    """Turns encoded images into normalised tensors, for training and for evaluation.

    Args:
        settings: what to do.
        channels: 1 or 3.
        seed: what all draws derive from, with epoch, step and lane.
    """

    def __init__(self, settings: AugmentSettings, channels: int, seed: int = 0) -> None:
        if channels not in (1, 3):
            raise DataError(f"images have 1 or 3 channels, not {channels}")
        self.settings = settings
        self.channels = channels
        self.seed = seed
        mean, std = settings.normalisation(channels)
        self._mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self._std = torch.tensor(std).view(-1, 1, 1) * 255

    def lane(self, images: Iterable[Encoded], request: Request, lane: int) -> Tensor:
        """The training images that one lane gives to one step, in DeiT's order: crop, flip, colour jitter or
        RandAugment, normalise, erase.

        Returns:
            (n, C, r, r) float32.

        Raises:
            DataError: an image cannot be decoded.
        """
        entropy = (self.seed, _LANE, request.epoch, request.step, lane)
        erase = self.settings.erase * request.erase
        images = list(images)
        uniform = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        draws = uniform.random((len(images), _CROP + _FLIP)).tolist()
        pixels = [self._crop_and_flip(image, request.resolution, row) for image, row in zip(images, draws)]
        policy = self._policy(request)
        if policy is None and erase == 0:
            return self._normalise(pixels)
        with _seeded(*entropy):
            if policy is not None:
                pixels = [self._recolour(image, policy) for image in pixels]
            batch = self._normalise(pixels)
            return RandomErasing(erase, mode="pixel", device="cpu")(batch) if erase else batch

    def evaluation(self, images: Iterable[Encoded], resolution: int) -> Tensor:
        """Evaluation images: the central square of `eval_crop` of the shorter side, resized.

        Returns:
            (n, C, r, r) float32.

        Raises:
            DataError: an image cannot be decoded.
        """
        box = partial(central_box, part=self.settings.eval_crop)
        return self._normalise([decode(data, where, self.channels, resolution, box) for data, where in images])

    def _crop_and_flip(self, image: Encoded, resolution: int, draws: list[float]) -> np.ndarray:
        """(r, r, C) uint8."""
        data, where = image
        box = partial(random_box, self.settings, draws=draws[:_CROP])
        pixels = decode(data, where, self.channels, resolution, box)
        return pixels[:, ::-1] if draws[_CROP] < self.settings.flip else pixels

    def _recolour(self, pixels: np.ndarray, policy: Callable[[Image.Image], Image.Image]) -> np.ndarray:
        """RandAugment or colour jitter on (r, r, C) uint8."""
        image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if self.channels == 1 else pixels))
        return np.asarray(policy(image)).reshape(pixels.shape)

    def _policy(self, request: Request) -> Callable[[Image.Image], Image.Image] | None:
        if self.settings.randaugment is not None:
            mean, _ = self.settings.normalisation(self.channels)
            return _rand_augment(self.settings.randaugment, request.resolution, request.magnitude, mean)
        if self.settings.color_jitter:
            return ColorJitter(*(self.settings.color_jitter,) * 3)
        return None

    def _normalise(self, pixels: list[np.ndarray]) -> Tensor:
        """[(r, r, C) uint8] -> (n, C, r, r) float32, contiguous."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return batch.float().sub_(self._mean).div_(self._std)


def random_box(settings: AugmentSettings, height: int, width: int, draws: list[float]) -> Box:
    """The box of a random crop of an image of this size, from uniform numbers in [0, 1).

    "resized" follows torchvision's RandomResizedCrop: ten attempts, then the centre at the nearest allowed ratio.
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
    images: Tensor, labels: Tensor, *, lanes: int, seed: int, step: int, classes: int, settings: AugmentSettings
) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix, one draw per step, with partners inside a lane, so that no world size changes the result.

    timm's Mixup pairs row i with row B - 1 - i. So the rows are brought into an order in which these two are sample j
    and sample n - 1 - j of the same lane, mixed, and brought back. `images` is left as it was; without Mixup and
    CutMix the very same tensor is returned.

    Args:
        images: (B_local, C, r, r), lane-major.
        labels: (B_local,) int64.
        lanes: how many lanes the batch holds; each must give an even number of samples.
        seed, step: what the draw derives from; step counts over the whole run.
        classes: width of the targets.
        settings: mixup, cutmix, mix_probability, mix_switch and smoothing.

    Returns:
        images (B_local, C, r, r), and smoothed and mixed one-hot targets (B_local, classes) float32.

    Raises:
        DataError: a lane gives an odd number of samples.
    """
    if not settings.mixup and not settings.cutmix:
        return images, mixup_target(labels, classes, smoothing=settings.smoothing)
    per_lane, rest = divmod(len(images), lanes)
    if rest or per_lane % 2:
        raise DataError(
            f"Mixup and CutMix pair the samples of a lane: {len(images)} samples in {lanes} lanes are not an even "
            "number each; set data.lanes so that batch / lanes is even"
        )
    rows = torch.arange(len(images), device=images.device).view(lanes, per_lane)
    firsts = rows[:, : per_lane // 2].reshape(-1)
    partners = rows.flip(1)[:, : per_lane // 2].reshape(-1)
    paired = torch.cat((firsts, partners.flip(0)))
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.mix_switch,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    with _seeded(seed, _MIX, step):
        mixed, targets = mixup(images[paired], labels[paired])
    back = torch.argsort(paired)
    return mixed[back], targets[back]


def low_pass(images: Tensor, band: int) -> Tensor:
    """(B, C, H, W) images without the frequencies that `band` x `band` pixels could not hold (arXiv 2405.08768, 3.2).

    They keep their size: what EfficientTrain++ crops from the spectrum is here all that is left of it.
    """
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device).abs()
    columns = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = (rows < band / 2)[:, None] & (columns < band / 2)
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * kept, (height, width)).to(images.dtype)


@contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seeds the global generators of `random`, numpy and torch (CPU) from `entropy`, and puts their states back."""
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


@lru_cache(maxsize=64)
def _rand_augment(
    config: str, resolution: int, magnitude: float, mean: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as its training transform sets it up, its magnitude scaled."""
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
        op.magnitude *= magnitude
        if op.aug_fn is posterize:
            op.level_fn = partial(_posterize_bits, op.level_fn)
    return policy


def _posterize_bits(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    """At the end of the scale timm asks for 0 bits, at which Pillow 13 raises; 1 is the least."""
    return (max(1, level_fn(level, hparams)[0]),)
