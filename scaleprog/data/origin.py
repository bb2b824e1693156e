"""Where the pixels of an augmented image come from.

An origin is a (2, 3) affine matrix that maps a point (x, y, 1) of the augmented image to the point (x, y) of the
stored image, both as unit squares with (0, 0) at the top left corner. Crops, flips, and RandAugment's geometric
operations have one; all other augmentation leaves pixels in their places.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment

from scaleprog.data.decode import Box

Origin = np.ndarray

IDENTITY: Origin = np.eye(2, 3)


def of_crop(box: Box, height: int, width: int, flipped: bool, transposed: bool = False) -> Origin:
    """The origin of a crop to `box` from an image of `height` x `width` pixels, then flipped horizontally or not.

    `transposed`: whether x and y of the box are exchanged, as they are in TokenLabeling's code.
    """
    left, top, right, bottom = box[0] / width, box[1] / height, box[2] / width, box[3] / height
    if transposed:
        left, top, right, bottom = top, left, bottom, right
    if flipped:
        left, right = right, left
    return np.array([[right - left, 0, left], [0, bottom - top, top]])


def after(first: Origin, second: Origin) -> Origin:
    """The origin of an image to which the operation of `first`, and then that of `second`, was applied."""
    whole = first @ np.vstack((second, (0, 0, 1)))
    return np.asarray(whole)


def _shear_x(factor: float, side: int) -> Origin:
    return np.array([[1, factor, 0], [0, 1, 0]])


def _shear_y(factor: float, side: int) -> Origin:
    return np.array([[1, 0, 0], [factor, 1, 0]])


def _move_x(part: float, side: int) -> Origin:
    return np.array([[1, 0, part], [0, 1, 0]])


def _move_y(part: float, side: int) -> Origin:
    return np.array([[1, 0, 0], [0, 1, part]])


def _rotate(degrees: float, side: int) -> Origin:
    """Counterclockwise around the center, as in Pillow."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin, (1 - cos + sin) / 2], [sin, cos, (1 - sin - cos) / 2]])


_GEOMETRIC: dict[Callable[..., Any], Callable[[float, int], Origin]] = {
    auto_augment.shear_x: _shear_x,
    auto_augment.shear_y: _shear_y,
    auto_augment.translate_x_rel: _move_x,
    auto_augment.translate_y_rel: _move_y,
    auto_augment.translate_x_abs: lambda pixels, side: _move_x(pixels / side, side),
    auto_augment.translate_y_abs: lambda pixels, side: _move_y(pixels / side, side),
    auto_augment.rotate: _rotate,
}
"""timm's geometric operations: (amount, pixels on a side of the square image) -> origin."""


class Located:
    """timm's RandAugment, which also tells the origin of its result."""

    def __init__(self, policy: RandAugment) -> None:
        self._policy = policy
        self._origin = IDENTITY
        for op in policy.ops:
            if op.aug_fn in _GEOMETRIC:
                op.aug_fn = self._noting(op.aug_fn)

    def __call__(self, image: Image.Image) -> tuple[Image.Image, Origin]:
        """The augmented image (r x r), and its origin in `image`."""
        self._origin = IDENTITY
        return self._policy(image), self._origin

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(image: Image.Image, amount: float, **options: Any) -> Any:
            self._origin = after(self._origin, _GEOMETRIC[function](amount, image.width))
            return function(image, amount, **options)

        return moved
