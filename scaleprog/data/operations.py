"""What RandAugment, 3-Augment and color jitter do to an image, on arrays, with OpenCV.

The operations are Pillow's, as timm calls them; where Pillow cuts off a fraction of a gray level, these do, too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from scaleprog.data.origin import IDENTITY, MOVES, Origin, pixels_of

LEVELS = np.arange(256)
_GRAY = np.array([0.299, 0.587, 0.114])  # of red, green and blue, in Pillow's conversion
_SMOOTH = np.full((3, 3), 1 / 13)
_SMOOTH[1, 1] = 5 / 13  # Pillow's ImageFilter.SMOOTH
_AXES = {"translate_x": 1, "translate_y": 0}
_CUT = -0.5  # turns OpenCV's rounding into Pillow's cutting off


class Operation(NamedTuple):
    """One change of an image."""

    name: str
    """A key of OPERATIONS, or of `origin.MOVES`."""
    amount: float = 0.0


def apply(pixels: np.ndarray, operation: Operation, fill: tuple[int, ...]) -> np.ndarray:
    """The changed image; does not modify `pixels`.

    Args:
        pixels: (r, r, C) uint8, C = 1 or 3.
        operation: what to do.
        fill: gray level of each channel for places that lie outside the image.
    """
    name, amount = operation
    if name in _AXES:
        changed = _translated(pixels, _AXES[name], amount * len(pixels), fill)
    elif name in MOVES:
        changed = _moved(pixels, MOVES[name](amount), fill)
    else:
        changed = OPERATIONS[name](pixels, amount)
    return changed.reshape(pixels.shape)


def _moved(pixels: np.ndarray, origin: Origin, fill: tuple[int, ...]) -> np.ndarray:
    """The image with this origin: cubic interpolation doubles the pixels along the axes on which it moves them, and
    linear interpolation reads between those.

    That is as close to Pillow as OpenCV's cubic warp, in less than half the time. OpenCV has no fast code for three
    channels.
    """
    side, color = len(pixels), pixels.shape[2] == 3
    finer = 1 + (origin != IDENTITY).any(1)  # along x and y
    matrix = finer[:, None] * pixels_of(origin, side)
    matrix[:, 2] += (finer - 1) / 2
    source = cv2.resize(
        cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA) if color else pixels, finer * side, interpolation=cv2.INTER_CUBIC
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(source, matrix, (side, side), flags=flags, borderValue=fill)
    return cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB) if color else moved


def _translated(pixels: np.ndarray, axis: int, by: float, fill: tuple[int, ...]) -> np.ndarray:
    """Each pixel is the one `by` pixels further along an axis (0: down, 1: right); five times as fast as a map."""
    side, whole = pixels.shape[axis], math.floor(by)
    first, last = max(0, math.ceil(-0.5 - by)), min(side, math.ceil(side - 0.5 - by))  # places that are in the image
    if first >= last:
        return np.full_like(pixels, fill)
    away = abs(np.arange(-1, 3) - (by - whole))  # distances to the four pixels nearby
    near, far = np.polyval((1, -2, 0, 1), away), np.polyval((-1, 5, -8, 4), away)  # Keys's cubic, a = -1, as in Pillow
    kernel = np.expand_dims(np.where(away <= 1, near, far), 1 - axis)
    padded = cv2.copyMakeBorder(pixels, *_margins(axis, 1, 1), cv2.BORDER_REPLICATE)
    anchor = (axis, 1 - axis)
    between = cv2.filter2D(padded, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    inside = between.swapaxes(0, axis)[first + whole + 1 : last + whole + 1].swapaxes(0, axis)
    return cv2.copyMakeBorder(inside, *_margins(axis, first, side - last), cv2.BORDER_CONSTANT, value=fill)


def _margins(axis: int, before: int, after: int) -> tuple[int, int, int, int]:
    """Margins along one axis, in OpenCV's order: above, below, left, right."""
    return (0, 0, before, after) if axis else (before, after, 0, 0)


def _blended(base: float, image: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Gray levels `base` + `factor` x (`image` - `base`), as uint8: Pillow's Image.blend."""
    return np.clip(base + factor * (image - base), 0, 255).astype(np.uint8)


def _auto_contrast(pixels: np.ndarray, _: float) -> np.ndarray:
    rows = pixels.reshape(len(pixels), -1)  # down first: six times as fast as over all pixels of a channel
    low, high = (
        extreme(extreme(rows, 0).reshape(pixels.shape[1:]), 0)[:, None].astype(np.int64) for extreme in (np.min, np.max)
    )
    stretched = _blended(0, LEVELS - low, 255 / np.maximum(high - low, 1))
    return _looked_up(pixels, np.where(high > low, stretched, LEVELS))


def _equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    channels = range(pixels.shape[2])
    counts = np.array([cv2.calcHist([pixels], [c], None, [256], [0, 256]) for c in channels], np.int64).reshape(-1, 256)
    highest = 255 - (counts[:, ::-1] > 0).argmax(1)
    step = (counts.sum(1) - counts[channels, highest])[:, None] // 255
    below = counts.cumsum(1) - counts
    return _looked_up(pixels, np.where(step, (step // 2 + below) // np.maximum(step, 1), LEVELS).clip(0, 255))


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2] == 3 else pixels
    return cv2.LUT(pixels, _blended(int(cv2.mean(gray)[0] + 0.5), LEVELS, factor))


def _color(pixels: np.ndarray, factor: float) -> np.ndarray:
    if pixels.shape[2] == 1:
        return pixels
    rows = np.tile((1 - factor) * _GRAY, (3, 1)) + factor * np.eye(3)
    return cv2.transform(pixels, np.column_stack((rows, np.full(3, _CUT))))


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor
    changed = cv2.filter2D(pixels, -1, kernel, delta=_CUT).reshape(pixels.shape)
    for edge in np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]:  # Pillow leaves them as they are
        changed[edge] = pixels[edge]
    return changed


def _looked_up(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replaces each gray level by an entry of the table of its channel; `tables`: (C, 256)."""
    return cv2.LUT(pixels, tables.T[None].astype(np.uint8, order="C"))


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda pixels, _: cv2.bitwise_not(pixels),
    "posterize": lambda pixels, bits: cv2.LUT(pixels, (LEVELS & ~(2 ** max(0, 8 - int(bits)) - 1)).astype(np.uint8)),
    "solarize": lambda pixels, least: cv2.LUT(pixels, np.where(least > LEVELS, LEVELS, 255 - LEVELS).astype(np.uint8)),
    "solarize_add": lambda pixels, more: cv2.LUT(
        pixels, np.where(LEVELS < 128, np.minimum(LEVELS + int(more), 255), LEVELS).astype(np.uint8)
    ),
    "color": _color,
    "contrast": _contrast,
    "brightness": lambda pixels, factor: cv2.LUT(pixels, _blended(0, LEVELS, factor)),
    "sharpness": _sharpness,
    "blur": lambda pixels, sigma: cv2.GaussianBlur(pixels, (0, 0), sigma),
}
"""Operations that leave pixels in their places: (image, amount) -> changed image.

The amount is: bits that are kept (posterize), the lowest level that is inverted (solarize), levels added to those below
128 (solarize_add), a factor whose 1 changes nothing (color, contrast, brightness, sharpness), or the standard deviation
in pixels (blur).
"""
