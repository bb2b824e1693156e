"""Decodes images to pixels at the wanted resolution, reading no more than needed.

simplejpeg decodes JPEGs: the header gives the size, the size gives the crop, and the decoder scales down in the
frequency domain (1/2 to 1/8) while the crop stays well above the wanted resolution. OpenCV decodes PNG and WebP.
Pillow decodes what the two cannot read (CMYK JPEGs, rare kinds). The content selects the decoder, never the file's
name: ImageNet holds a PNG named .JPEG. Other formats are refused, because some make Pillow start programs.
"""

import io
import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from scaleprog.data.packed import PackedImage
from scaleprog.errors import DataError

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the full image; pixels beyond the image are 0."""

ScaledBox = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the decoded image, which may be scaled down."""

Crop = Callable[[int, int], Box]
"""(height, width) of the full image -> the box to resize."""

MOST_PIXELS = 2**26
"""The most pixels in an image; the largest image of ImageNet has fewer."""
_CHECKED = 32  # side, in pixels, to which an image is reduced that is only checked
_JPEG_MAGIC = b"\xff\xd8"
_ANIMATION = 2  # the flag in a WebP header
_JPEG_SCAN, _MOST_SCANNED = b"\xff\xda", 16 * MOST_PIXELS  # each scan of a progressive JPEG goes over all pixels
_MIN_FACTOR = 2.0  # libjpeg-turbo has no fast path for smaller factors: slower than decoding everything
_EIGHTHS = 8  # libjpeg scales by n / 8
_MARGIN = 2.0  # at twice the wanted size, the result looks like a bicubic resize; at exactly that size it does not


Stored = bytes | memoryview | PackedImage
"""An image in a shard: encoded, or pixels."""


def decode(data: Stored, where: str, channels: int, resolution: int, crop: Crop) -> np.ndarray:
    """Decodes an image, crops it to the box that `crop` chooses for its size, and resizes the box to a square.

    torch resizes with antialiased bicubic interpolation in integers, which is within 1 or 2 of 255 of Pillow and six
    times as fast. EXIF orientation is ignored, as in timm.

    Args:
        data: the image.
        where: shard and key, for error messages.
        channels: 1 or 3; converts between gray and color if the image has the other kind.
        resolution: r, side of the result in pixels.
        crop: chooses the box; called again with the same size if a decoder gives up.

    Returns:
        (r, r, channels) uint8.

    Raises:
        DataError: the bytes are not a readable image.
        Unavailable: a packed image cannot be read now.
    """
    try:
        image, box = _pixels(data, channels, resolution, crop)
    except ValueError as error:
        raise DataError(f"{where}: {error}; remove or replace it and rebuild the shard") from error
    return _resize(image, box, resolution, resolution).reshape(resolution, resolution, channels)


def problem_of(data: bytes) -> str:
    """Why training would refuse an encoded image; empty if it would not. Decodes all of it, as training does."""
    try:
        decode(data, "", 3, _CHECKED, lambda height, width: (0, 0, width, height))
    except DataError as error:
        return str(error).removeprefix(": ").partition(";")[0]
    return ""


class Whole(NamedTuple):
    """A whole image, perhaps reduced."""

    pixels: np.ndarray
    """(H, W, 3) uint8, or (H, W, 1) if all three channels are equal."""
    reduced: bool


def whole(data: Stored, shorter_side: int) -> Whole:
    """Decodes a whole image. If its shorter side has more than `shorter_side` pixels, reduces it to them like `decode`.

    Raises ValueError if encoded bytes are not a readable image, and like `PackedImage.rows`.
    """
    height, width = 0, 0

    def crop(*size: int) -> Box:
        nonlocal height, width
        height, width = size
        return 0, 0, width, height

    pixels, box = _pixels(data, 3, shorter_side, crop)
    factor = shorter_side / min(height, width)
    if reduced := factor < 1:
        pixels = _resize(pixels, box, round(height * factor), round(width * factor))
    gray = (pixels == pixels[..., :1]).all()
    return Whole(np.ascontiguousarray(pixels[..., :1] if gray else pixels), reduced)


def _pixels(data: Stored, channels: int, resolution: int, crop: Crop) -> tuple[np.ndarray, ScaledBox]:
    """(H, W[, channels]) uint8, of which the crop is the box. Raises ValueError like `whole`."""
    if isinstance(data, PackedImage):
        return _read_packed(data, channels, crop)
    try:
        return _decode_jpeg(data, channels, resolution, crop) or _decode_other(data, channels, crop)
    except Exception as error:  # decoders raise exceptions of any kind on damaged data
        raise ValueError(f"cannot decode the image ({error or type(error).__name__})") from error


def _decode_jpeg(
    data: bytes | memoryview, channels: int, resolution: int, crop: Crop
) -> tuple[np.ndarray, ScaledBox] | None:
    """A JPEG, scaled down as far as the crop allows, and the box in its pixels; None if simplejpeg cannot decode it."""
    if data[:2] != _JPEG_MAGIC:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        scans = bytes(data).count(_JPEG_SCAN)
        if scans * width * height > _MOST_SCANNED:
            raise DataError(f"a JPEG with too many scans: {scans} of {width} x {height} pixels")
        if colorspace in ("CMYK", "YCCK"):
            return None
        left, top, right, bottom = crop(height, width)
        scale = _MARGIN * resolution / min(right - left, bottom - top)
        if left < 0 or top < 0 or right > width or bottom > height:
            scale = 1.0
        image = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if channels == 1 else "RGB",
            min_height=math.ceil(height * min(scale, 1.0)),
            min_width=math.ceil(width * min(scale, 1.0)),
            min_factor=_MIN_FACTOR,
        )
    except ValueError:
        return None
    if channels == 1:
        image = image[..., 0]
    if image.shape[:2] == (height, width):
        return image, (left, top, right, bottom)
    scale = _scale(max(height, width), max(image.shape[:2]))
    return image, (left * scale, top * scale, right * scale, bottom * scale)


def _scale(full: int, scaled: int) -> float:
    """The factor n / 8 by which libjpeg has scaled a side. It rounds the side up, so `scaled` / `full` is too large."""
    return _EIGHTHS * scaled // full / _EIGHTHS


def _decode_other(data: bytes | memoryview, channels: int, crop: Crop) -> tuple[np.ndarray, Box]:
    """Decodes a whole image with OpenCV, or with Pillow if it is a JPEG or OpenCV fails. Returns pixels and box."""
    image, head = None, bytes(data[:32])
    if not head.startswith(_JPEG_MAGIC):
        _check_size(*_size(head))
        color = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
        with suppress(cv2.error):  # Pillow's error messages are better
            image = cv2.imdecode(np.frombuffer(data, np.uint8), color | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            _check_size(*opened.size)
            image = np.array(opened.convert("L" if channels == 1 else "RGB"))
    return image, crop(image.shape[0], image.shape[1])


def _read_packed(image: PackedImage, channels: int, crop: Crop) -> tuple[np.ndarray, Box]:
    """The rows that the crop needs, at least one, and the box in them."""
    height, width, stored = image.shape
    left, top, right, bottom = crop(height, width)
    first = min(max(top, 0), height - 1)
    pixels = image.rows(first, max(first + 1, min(bottom, height)))
    if stored != channels:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if channels == 3 else cv2.COLOR_RGB2GRAY)
    shape = (len(pixels), width) if channels == 1 else (len(pixels), width, channels)
    return pixels.reshape(shape), (left, top - first, right, bottom - first)


def _check_size(width: int, height: int) -> None:
    """Raises DataError for an image that would exhaust memory; to be called before decoding."""
    if width * height > MOST_PIXELS:
        raise DataError(f"{width} x {height} pixels, more than {MOST_PIXELS}")


def _size(head: bytes) -> tuple[int, int]:
    """Width and height from the header of a PNG or WebP. Raises DataError for other formats and for animations."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    if not head.startswith(b"RIFF") or head[8:12] != b"WEBP" or len(head) < 32:
        raise DataError("neither JPEG nor PNG nor WebP")
    if head[12:16] == b"VP8X":
        if head[20] & _ANIMATION:
            raise DataError("an animated WebP")
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _resize(image: np.ndarray, box: ScaledBox, rows: int, columns: int) -> np.ndarray:
    """Crops (H, W[, C]) to the box and resizes it to (rows, columns[, C]). The box may begin and end between pixels."""
    height, width = image.shape[:2]
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    inside = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if left < 0 or top < 0 or right > width or bottom > height:
        window = np.zeros((bottom - top, right - left, *image.shape[2:]), np.uint8)
        window[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        inside = window
    across, down = box[0] - left, box[1] - top
    if across:
        inside = cv2.addWeighted(inside[:, :-1], 1 - across, inside[:, 1:], across, 0)
    if down:
        inside = cv2.addWeighted(inside[:-1], 1 - down, inside[1:], down, 0)
    if inside.shape[:2] == (rows, columns) == (box[3] - box[1], box[2] - box[0]):
        return inside
    pixels = torch.from_numpy(np.atleast_3d(inside)).permute(2, 0, 1).unsqueeze(0)
    scales = rows / (box[3] - box[1]), columns / (box[2] - box[0])  # interpolate() would take the window's
    resized = torch.empty(1, pixels.shape[1], rows, columns, dtype=torch.uint8, memory_format=torch.channels_last)
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, [rows, columns], False, *scales, out=resized)
    return resized[0].permute(1, 2, 0).numpy()
