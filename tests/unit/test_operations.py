"""RandAugment's operations on arrays against timm's, which are Pillow's: the same picture, for color and for gray."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data
from timm.data import auto_augment

from scaleprog.data.operations import OPERATIONS, Operation, apply
from scaleprog.data.origin import MOVES

FILL = (124, 116, 104)
SIDE = 96

TIMMS = {
    "auto_contrast": lambda image, _: auto_augment.auto_contrast(image),
    "equalize": lambda image, _: auto_augment.equalize(image),
    "invert": lambda image, _: auto_augment.invert(image),
    "posterize": lambda image, bits: auto_augment.posterize(image, int(bits)),
    "solarize": lambda image, least: auto_augment.solarize(image, int(least)),
    "solarize_add": lambda image, more: auto_augment.solarize_add(image, int(more)),
    "color": auto_augment.color,
    "contrast": auto_augment.contrast,
    "brightness": auto_augment.brightness,
    "sharpness": auto_augment.sharpness,
    "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    "rotate": auto_augment.rotate,
    "shear_x": auto_augment.shear_x,
    "shear_y": auto_augment.shear_y,
    "translate_x": auto_augment.translate_x_rel,
    "translate_y": auto_augment.translate_y_rel,
}
CASES = [
    *((name, 0, math.inf) for name in ("auto_contrast", "equalize", "invert")),
    *(("posterize", bits, math.inf) for bits in (1, 3, 4, 8, 9)),
    *(("solarize", least, math.inf) for least in (0, 128, 256)),
    *(("solarize_add", more, math.inf) for more in (0, 110, 128)),
    *((name, factor, math.inf) for name in ("contrast", "brightness") for factor in (0.1, 1.0, 1.9)),
    *(("color", factor, 48) for factor in (0.0, 0.1, 1.0, 1.9)),
    *(("sharpness", factor, 45) for factor in (0.1, 1.0, 1.9)),
    *(("blur", sigma, 40) for sigma in (0.1, 0.7, 2.0)),
    *(("rotate", degrees, 30) for degrees in (-30, 5, 30)),
    *((name, part, 30) for name in ("shear_x", "shear_y") for part in (-0.3, 0.3)),
    *((name, part, 50) for name in ("translate_x", "translate_y") for part in (-0.45, 0.1)),
]
"""The name, the amount, and the least PSNR in decibels; infinity: every pixel is equal."""


def photo(channels: int) -> np.ndarray:
    """(SIDE, SIDE, channels) uint8, with less than full contrast."""
    image = Image.fromarray(data.astronaut()).resize((SIDE, SIDE)).convert("RGB" if channels == 3 else "L")
    return (np.asarray(image).reshape(SIDE, SIDE, channels) * 0.8 + 20).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "amount", "least"), CASES)
def test_pictures_are_timms(name: str, amount: float, least: float, channels: int) -> None:
    pixels, fill = photo(channels), FILL[-channels:]
    before = pixels.copy()
    ours = apply(pixels, Operation(name, amount), fill)
    image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
    moving = {"fillcolor": fill if channels == 3 else fill[0], "resample": Image.Resampling.BICUBIC}
    theirs = TIMMS[name](image, amount, **(moving if name in MOVES else {}))
    assert np.array_equal(pixels, before), "the caller's image stays"
    assert ours.shape == pixels.shape
    assert ours.dtype == np.uint8
    found = psnr(ours, np.asarray(theirs).reshape(ours.shape))
    assert found >= least, found


def test_every_operation_is_compared() -> None:
    assert {name for name, *_ in CASES} == set(TIMMS) == {*OPERATIONS, *MOVES}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_in_the_other_direction_is_another_picture(name: str) -> None:
    """So that the comparisons above tell a wrong sign, or a move that is off by a pixel."""
    amount = 12.0 if name == "rotate" else 0.2
    right = apply(photo(3), Operation(name, amount), FILL)
    for wrong in (-amount, amount + (1.5 if name == "rotate" else 1 / SIDE)):
        assert psnr(apply(photo(3), Operation(name, wrong), FILL), right) < 27


def test_a_flat_image_stays_as_it_is() -> None:
    """Nothing divides by its contrast."""
    flat = np.full((8, 8, 3), 77, np.uint8)
    for name in ("auto_contrast", "equalize"):
        assert np.array_equal(apply(flat, Operation(name), FILL), flat)
