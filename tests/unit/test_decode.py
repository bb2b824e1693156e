"""Decoding against Pillow, which is what timm uses: same sizes, same boxes, nearly the same pixels."""

import io
import math

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from scaleprog.data import decode as decode_module
from scaleprog.data.decode import Box, Crop, decode, whole
from scaleprog.errors import DataError

WIDTH, HEIGHT = 500, 375


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes, channels: int, resolution: int, box: Box) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB").crop(box)
    pixels = np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    return pixels.reshape(resolution, resolution, channels)


def at(box: Box) -> Crop:
    return lambda height, width: box


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Mean and largest difference in levels of 255."""
    absolute = np.abs(a.astype(int) - b.astype(int))
    return float(absolute.mean()), int(absolute.max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize(("resolution", "box"), [(224, (0, 0, WIDTH, HEIGHT)), (96, (31, 17, 240, 300))])
def test_png_is_as_pillow_has_it(photo: Image.Image, channels: int, mode: str, resolution: int, box: Box) -> None:
    content = encode(photo.convert(mode), "PNG")
    pixels = decode(content, "here", channels, resolution, [at(box)])[0]
    assert pixels.shape == (resolution, resolution, channels)
    assert pixels.dtype == np.uint8
    mean, largest = difference(pixels, pillow(content, channels, resolution, box))
    assert mean < 0.7
    assert largest <= 3


def test_webp_is_as_pillow_has_it(photo: Image.Image) -> None:
    content = encode(photo, "WEBP", lossless=True)
    assert (
        difference(decode(content, "here", 3, 128, [whole])[0], pillow(content, 3, 128, (0, 0, WIDTH, HEIGHT)))[1] <= 2
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("resolution", "box", "tolerance"),
    [
        (224, (0, 0, WIDTH, HEIGHT), 0.7),  # nothing to scale: the decoder gives every pixel
        (224, (200, 100, 300, 200), 0.7),  # enlarged
        (112, (0, 0, WIDTH, HEIGHT), 0.7),
        (64, (100, 50, 440, 370), 1.5),  # scaled in the frequency domain: another low-pass filter, the same picture
        (32, (0, 0, WIDTH, HEIGHT), 1.5),
    ],
)
def test_jpeg_is_close_to_pillow(
    photo: Image.Image, channels: int, mode: str, resolution: int, box: Box, tolerance: float
) -> None:
    content = encode(photo.convert(mode), "JPEG", quality=92)
    pixels = decode(content, "here", channels, resolution, [at(box)])[0]
    assert pixels.shape == (resolution, resolution, channels)
    assert difference(pixels, pillow(content, channels, resolution, box))[0] < tolerance


def test_a_scaled_crop_is_where_it_should_be(photo: Image.Image) -> None:
    """Off by a pixel of the scaled image would pass a loose tolerance; a shifted reference must be clearly worse."""
    content = encode(photo, "JPEG", quality=95)
    box = (60, 40, 460, 360)
    pixels = decode(content, "here", 3, 64, [at(box)])[0]
    right = difference(pixels, pillow(content, 3, 64, box))[0]
    for shift in ((6, 0), (-6, 0), (0, 6), (0, -6)):
        moved = (box[0] + shift[0], box[1] + shift[1], box[2] + shift[0], box[3] + shift[1])
        assert difference(pixels, pillow(content, 3, 64, moved))[0] > 1.5 * right


def center_of_mass(pixels: np.ndarray) -> np.ndarray:
    """(x, y) in pixels of a gray (r, r, 1) image on black. The darkest levels hold noise of the JPEG."""
    mass = np.maximum(pixels[..., 0].astype(float) - 16, 0)
    place = np.arange(len(mass)) + 0.5
    return np.array([(mass.sum(0) * place).sum(), (mass.sum(1) * place).sum()]) / mass.sum()


@pytest.mark.parametrize("eighths", [1, 2, 3, 4])
def test_a_scaled_crop_keeps_the_fractions_of_its_box(eighths: int) -> None:
    """The center of a blob lies within 0.02 pixels of where Pillow has it, which decodes at full size. A box that is
    rounded to pixels of the scaled image puts it up to a quarter of a pixel away."""
    width, height, resolution, side = 701, 603, 32, 8 * 65 // eighths  # 65 scaled pixels, just above 2 * resolution
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    for step in range(8):
        box = (61 + step, 23 + 3 * step, 61 + step + side, 23 + 3 * step + side - step % 2)
        middle = (box[0] + 0.45 * side, box[1] + 0.53 * side)
        blob = 220 * np.exp(-((x - middle[0]) ** 2 + (y - middle[1]) ** 2) / (2 * (side / 9) ** 2))
        content = encode(Image.fromarray(blob.round().astype(np.uint8)), "JPEG", quality=98)
        decoded, _ = decode_module._decode_jpeg(content, 1, resolution, [at(box)], False)
        assert decoded.shape[:2] == (math.ceil(height * eighths / 8), math.ceil(width * eighths / 8))
        pixels = decode(content, "here", 1, resolution, [at(box)])[0]
        shift = center_of_mass(pixels) - center_of_mass(pillow(content, 1, resolution, box))
        assert np.abs(shift).max() < 0.02


def test_a_scaled_crop_of_a_photo_is_close_to_pillow(photo: Image.Image) -> None:
    """A box that is rounded to pixels of the scaled image reaches 32 decibels, this one 43."""
    content = encode(photo.crop((0, 0, 499, 373)), "JPEG", quality=95)
    errors = []
    for step in range(16):
        box = (20 + step, 9 + 3 * step, 20 + step + 290 - 5 * step, 9 + 3 * step + 270 + step)
        pixels = decode(content, "here", 3, 48, [at(box)])[0]
        errors.append(np.square(pixels.astype(float) - pillow(content, 3, 48, box)).mean())
    assert 10 * math.log10(255**2 / np.mean(errors)) > 42


def test_the_factor_of_the_decoder_is_exact() -> None:
    for full in range(8, 3000):
        for eighths in range(1, 9):
            assert decode_module._scale(full, math.ceil(full * eighths / 8)) == eighths / 8


@given(data=st.data(), width=st.integers(1, 90), height=st.integers(1, 90), resolution=st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_every_box_of_every_size_gives_a_square(data: st.DataObject, width: int, height: int, resolution: int) -> None:
    """All white stays all white: no pixel from beyond the image gets in."""
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    content = encode(Image.new("L", (width, height), 255), "JPEG")
    pixels = decode(content, "here", 1, resolution, [at(box)])[0]
    assert pixels.shape == (resolution, resolution, 1)
    assert pixels.min() == 255


def test_the_crop_sees_the_full_size_even_where_the_decoder_scales(photo: Image.Image) -> None:
    seen = []
    decode(encode(photo, "JPEG"), "here", 3, 16, [lambda *size: seen.append(size) or (0, 0, WIDTH, HEIGHT)])
    assert seen == [(HEIGHT, WIDTH)]


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_jpeg(photo: Image.Image, channels: int) -> None:
    content = encode(photo.convert("CMYK"), "JPEG", quality=92)
    box = (0, 0, WIDTH, HEIGHT)
    assert difference(decode(content, "here", channels, 128, [whole])[0], pillow(content, channels, 128, box))[1] <= 2


def test_what_lies_beyond_the_image_is_zero() -> None:
    image = np.arange(1, 29, dtype=np.uint8).reshape(4, 7)
    content = encode(Image.fromarray(image[:, :4]), "PNG")
    pixels = decode(content, "here", 1, 4, [at((-1, 2, 3, 6))])[0][..., 0]
    assert pixels.tolist() == [[0, 15, 16, 17], [0, 22, 23, 24], [0, 0, 0, 0], [0, 0, 0, 0]]
    pixels = decode(content, "here", 1, 4, [at((2, -1, 6, 3))])[0][..., 0]
    assert pixels.tolist() == [[0, 0, 0, 0], [3, 4, 0, 0], [10, 11, 0, 0], [17, 18, 0, 0]]


def test_what_lies_beyond_the_image_may_mirror_it(photo: Image.Image) -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    content, box = encode(Image.fromarray(image), "PNG"), (-2, 1, 2, 5)
    pixels = decode(content, "here", 1, 4, [at(box)], reflect=True)[0][..., 0]
    assert pixels.tolist() == np.pad(image, 4, "reflect")[5:9, 2:6].tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views_of_an_image_are_decoded_once_and_are_what_each_is_alone(photo: Image.Image, kind: str) -> None:
    """JPEGs, too, as long as the largest view needs the full size."""
    content, boxes = encode(photo, kind), [(10, 20, 110, 120), (0, 0, WIDTH, HEIGHT), (300, 200, 480, 370)]
    views = decode(content, "here", 3, 96, [at(box) for box in boxes])
    alone = [decode(content, "here", 3, 96, [at(box), at((0, 0, 90, 90))])[0] for box in boxes]
    assert np.array_equal(views, np.stack(alone))
    out = np.zeros((5, 96, 96, 3), np.uint8)
    decode(content, "here", 3, 96, [at(box) for box in boxes], out=out[1:4])
    assert np.array_equal(out[1:4], views)
    assert not out[[0, 4]].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
def test_what_lies_below_a_crop_is_left_out_without_a_trace(photo: Image.Image, sampling: str, channels: int) -> None:
    """A sound JPEG of any sampling, for crops that end at, above, and below the edges of its blocks."""
    kind = "GRAY" if sampling == "Gray" else "RGB"
    pixels = np.ascontiguousarray(np.atleast_3d(np.asarray(photo.convert("L") if kind == "GRAY" else photo)))
    content = simplejpeg.encode_jpeg(pixels, 92, kind, sampling)
    for bottom in (17, 64, 171, 352, HEIGHT - decode_module._WORTH_CUTTING, HEIGHT):
        for resolution in (16, 96):
            boxes = [at((3, 5, 203, bottom)), at((40, 0, 140, bottom - 2))]
            cut, whole = (decode(content, "", channels, resolution, boxes, fast=True, sound=s) for s in (True, False))
            assert np.array_equal(cut, whole), (bottom, resolution)


def test_only_of_a_sound_image_rows_are_left_out(photo: Image.Image) -> None:
    content = encode(photo, "JPEG", quality=92)[:-1000]
    above = at((0, 0, 100, 100))
    decode(content, "here", 3, 64, [above], fast=True, sound=True)
    for how in ({"fast": True}, {"sound": True}):
        with pytest.raises(DataError, match="here: cannot decode"):
            decode(content, "here", 3, 64, [above], **how)
    progressive = encode(photo, "JPEG", progressive=True)
    read = [decode(progressive, "here", 3, 64, [above], fast=True, sound=sound) for sound in (True, False)]
    assert np.array_equal(*read)


def test_a_jpeg_box_beyond_the_image(photo: Image.Image) -> None:
    content = encode(photo, "JPEG", quality=92)
    pixels = decode(content, "here", 3, 64, [at((-100, -100, WIDTH - 100, HEIGHT - 100))])[0]
    assert pixels[:10, :10].max() == 0
    reference = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    reference[100:, 100:] = np.asarray(Image.open(io.BytesIO(content)))[:-100, :-100]
    assert difference(pixels, np.asarray(Image.fromarray(reference).resize((64, 64), Image.Resampling.BICUBIC)))[0] < 1


def test_the_content_decides_not_the_name_and_rotation_tags_are_ignored(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        plain, tagged = encode(photo, kind), encode(photo, kind, exif=exif)
        assert np.array_equal(decode(plain, "here", 3, 64, [whole]), decode(tagged, "here", 3, 64, [whole]))


def test_memoryviews_are_read_without_a_copy(photo: Image.Image) -> None:
    for kind in ("PNG", "JPEG"):
        content = encode(photo, kind)
        view = memoryview(b"before" + content + b"after")[6:-5]
        assert np.array_equal(decode(view, "here", 3, 32, [whole]), decode(content, "here", 3, 32, [whole]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_what_cannot_be_decoded_is_named(photo: Image.Image, kind: str, damage: str) -> None:
    content = encode(photo, kind)
    content = {"half": content[: len(content) // 2], "empty": b"", "text": b"no image at all"}[damage]
    with pytest.raises(DataError, match=r"a\.tar: sample '7': cannot decode.*rebuild the shard"):
        decode(content, "a.tar: sample '7'", 3, 64, [whole])
