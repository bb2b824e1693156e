"""Where the pixels of an augmented image come from.

An origin is a (2, 3) affine matrix that maps a point (x, y, 1) of the augmented image to the point (x, y) of the
stored image, both as unit squares with (0, 0) at the top left corner. Crops, flips, and RandAugment's geometric
operations have one; all other augmentation leaves pixels in their places.
"""

import math
from collections.abc import Callable

import numpy as np

from scaleprog.data.decode import Box

Origin = np.ndarray

IDENTITY: Origin = np.eye(2, 3)
FLIP: Origin = np.array([[-1.0, 0, 1], [0, 1, 0]])


def of_crop(box: Box, height: int, width: int, transposed: bool = False) -> Origin:
    """The origin of a crop to `box` from an image of `height` x `width` pixels.

    `transposed`: whether x and y of the box are exchanged, as they are in TokenLabeling's code.
    """
    left, top, right, bottom = box[0] / width, box[1] / height, box[2] / width, box[3] / height
    if transposed:
        left, top, right, bottom = top, left, bottom, right
    return np.array([[right - left, 0, left], [0, bottom - top, top]])


def after(first: Origin, second: Origin) -> Origin:
    """The origin of an image to which the operation of `first`, and then that of `second`, was applied."""
    whole = first[:, :2] @ second
    whole[:, 2] += first[:, 2]
    return whole


def _rotation(degrees: float) -> Origin:
    """Counterclockwise around the center, as in Pillow."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin, (1 - cos + sin) / 2], [sin, cos, (1 - sin - cos) / 2]])


MOVES: dict[str, Callable[[float], Origin]] = {
    "rotate": _rotation,
    "shear_x": lambda factor: np.array([[1, factor, 0], [0, 1, 0]]),
    "shear_y": lambda factor: np.array([[1, 0, 0], [factor, 1, 0]]),
    "translate_x": lambda part: np.array([[1, 0, part], [0, 1, 0]]),
    "translate_y": lambda part: np.array([[1, 0, 0], [0, 1, part]]),
}
"""Operations that move pixels: the amount (degrees, or parts of a side) -> the origin of the moved image."""


def pixels_of(origin: Origin, side: int) -> np.ndarray:
    """The same map between the centers of pixels, numbered from 0, of images with `side` pixels on each side."""
    matrix = origin.astype(np.float64)
    matrix[:, 2] = matrix[:, 2] * side + (matrix[:, :2].sum(1) - 1) / 2
    return matrix
