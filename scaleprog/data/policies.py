"""Which operations change an image: RandAugment (timm's), 3-Augment (DeiT III), color jitter (torchvision's).

A policy turns uniform numbers into operations and touches no image. So the draws are the same wherever the operations
run, and a test can compare them with the distributions of timm and torchvision.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from scaleprog.data.operations import Operation
from scaleprog.recipe.keys import AugmentSettings

_TOP = 10.0  # the magnitude at which timm's operations are as strong as they get by default
_NORMAL = NormalDist()
_TINY = 2.0**-53
_BLUR = (0.1, 2.0)  # standard deviation in pixels


class Policy(Protocol):
    """Draws operations."""

    numbers: int
    """The most uniform numbers that one draw takes."""
    most: int
    """The most operations in one draw."""

    def draw(self, uniform: Iterator[float]) -> tuple[Operation, ...]:
        """The operations on one image, in order, from numbers in [0, 1)."""


class Unchanged:
    """No operation."""

    numbers, most = 0, 0

    def draw(self, uniform: Iterator[float]) -> tuple[Operation, ...]:
        """None."""
        return ()


class RandAugment:
    """RandAugment (arXiv 1909.13719) with timm's operations, magnitudes and probabilities.

    Args:
        config: timm's configuration string.
        factor: multiplies the magnitude (AdaReg).
        rounded: whether the product is rounded to a whole number.
    """

    def __init__(self, config: str, factor: float = 1.0, rounded: bool = False) -> None:
        timms = rand_augment_transform(config)
        self.operations: list[AugmentOp] = timms.ops
        self.most: int = timms.num_layers
        self.numbers = 4 * self.most
        self._weights = timms.choice_weights
        magnitude = timms.ops[0].magnitude * factor
        self.magnitude = round(magnitude) if rounded else magnitude

    def draw(self, uniform: Iterator[float]) -> tuple[Operation, ...]:
        drawn = []
        for operation in self._chosen(uniform):
            skip, level, sign = (next(uniform) for _ in range(3))
            if skip <= operation.prob:
                name, amount = KINDS[operation.name]
                drawn.append(Operation(name, amount(self._level(operation, level), 1 if sign <= 0.5 else -1)))
        return tuple(drawn)

    def _chosen(self, uniform: Iterator[float]) -> Iterator[AugmentOp]:
        """Draws with equal probability; if operations have weights, by them and without repetition."""
        if self._weights is None:
            yield from (self.operations[int(next(uniform) * len(self.operations))] for _ in range(self.most))
            return
        weights = np.array(self._weights)
        for _ in range(min(self.most, len(weights))):
            place = np.searchsorted(np.cumsum(weights), next(uniform) * weights.sum(), side="right")
            yield self.operations[place]
            weights[place] = 0

    def _level(self, operation: AugmentOp, uniform: float) -> float:
        """The magnitude of one operation as a part of its scale."""
        std, magnitude = operation.magnitude_std, self.magnitude
        if std == float("inf"):
            magnitude *= uniform
        elif std > 0:
            magnitude += std * _NORMAL.inv_cdf(max(uniform, _TINY))
        return max(0.0, min(magnitude, operation.magnitude_max or _TOP)) / _TOP


class ColorJitter:
    """torchvision's ColorJitter without hue: brightness, contrast and saturation, in random order.

    Args:
        strength: each factor is uniform within 1 +- `strength`, but never negative.
    """

    numbers, most = 6, 3

    def __init__(self, strength: float) -> None:
        self._range = max(0.0, 1 - strength), 1 + strength

    def draw(self, uniform: Iterator[float]) -> tuple[Operation, ...]:
        names = sorted(("brightness", "contrast", "color"), key=lambda _: next(uniform))
        return tuple(Operation(name, _between(*self._range, next(uniform))) for name in names)


class ThreeAugment:
    """DeiT III's 3-Augment (arXiv 2204.07118): gray, solarized, or blurred, with equal probability; then color jitter.

    Args:
        strength: of the color jitter; 0 is off.
    """

    numbers = 2 + ColorJitter.numbers

    def __init__(self, strength: float) -> None:
        self._jitter: Policy = ColorJitter(strength) if strength else Unchanged()
        self.most = 1 + self._jitter.most

    def draw(self, uniform: Iterator[float]) -> tuple[Operation, ...]:
        kind, sigma = int(next(uniform) * 3), _between(*_BLUR, next(uniform))
        first = (Operation("color", 0.0), Operation("solarize", 128.0), Operation("blur", sigma))[kind]
        return first, *self._jitter.draw(uniform)


@lru_cache(maxsize=64)
def _rand_augment(config: str, factor: float, rounded: bool) -> RandAugment:
    return RandAugment(config, factor, rounded)


def policy_of(settings: AugmentSettings, factor: float = 1.0) -> Policy:
    """The policy of a recipe; `factor` multiplies RandAugment's magnitude (AdaReg)."""
    if settings.randaugment is not None:
        return _rand_augment(settings.randaugment, factor, settings.round_magnitude)
    if settings.three_augment:
        return ThreeAugment(settings.color_jitter)
    return ColorJitter(settings.color_jitter) if settings.color_jitter else Unchanged()


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


def _enhanced(level: float, _: int) -> float:
    return 0.1 + 1.8 * level


def _enhanced_more(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


KINDS: dict[str, tuple[str, Callable[[float, int], float]]] = {
    "AutoContrast": ("auto_contrast", lambda level, sign: 0.0),
    "Equalize": ("equalize", lambda level, sign: 0.0),
    "Invert": ("invert", lambda level, sign: 0.0),
    "Rotate": ("rotate", lambda level, sign: sign * 30 * level),
    "Posterize": ("posterize", lambda level, sign: max(1, int(4 * level))),
    "PosterizeIncreasing": ("posterize", lambda level, sign: max(1, 4 - int(4 * level))),
    "Solarize": ("solarize", lambda level, sign: min(256, int(256 * level))),
    "SolarizeIncreasing": ("solarize", lambda level, sign: 256 - min(256, int(256 * level))),
    "SolarizeAdd": ("solarize_add", lambda level, sign: min(128, int(110 * level))),
    "Color": ("color", _enhanced),
    "ColorIncreasing": ("color", _enhanced_more),
    "Contrast": ("contrast", _enhanced),
    "ContrastIncreasing": ("contrast", _enhanced_more),
    "Brightness": ("brightness", _enhanced),
    "BrightnessIncreasing": ("brightness", _enhanced_more),
    "Sharpness": ("sharpness", _enhanced),
    "SharpnessIncreasing": ("sharpness", _enhanced_more),
    "ShearX": ("shear_x", lambda level, sign: sign * 0.3 * level),
    "ShearY": ("shear_y", lambda level, sign: sign * 0.3 * level),
    "TranslateXRel": ("translate_x", lambda level, sign: sign * 0.45 * level),
    "TranslateYRel": ("translate_y", lambda level, sign: sign * 0.45 * level),
    "Desaturate": ("color", lambda level, sign: 1 - min(1.0, 0.5 + 0.5 * level)),
    "GaussianBlur": ("blur", lambda level, sign: _between(*_BLUR, min(1.0, level))),
}
"""timm's name of an operation -> ours, and its amount at a level (1 at magnitude 10) with a random sign. At the end of
its scale timm asks for a posterization to 0 bits, which Pillow 13 refuses: it gets 1."""
