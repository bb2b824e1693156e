"""Decodes images to pixels at the wanted resolution, reading no more than needed.

simplejpeg decodes JPEGs: the header gives the size, the size gives the crop, and the decoder scales down in the
frequency domain (1/2 to 1/8) while the crop stays well above the wanted resolution. OpenCV decodes PNG and WebP.
Pillow decodes what the two cannot read (CMYK JPEGs, rare kinds). The content selects the decoder, never the file's
name: ImageNet holds a PNG named .JPEG. Other formats are refused, because some make Pillow start programs.
"""

import io
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from scaleprog.data.packed import PackedImage
from scaleprog.errors import DamagedSample, DataError, Unavailable

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the full image; pixels beyond the image are 0."""

ScaledBox = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the decoded image, which may be scaled down."""

Crop = Callable[[int, int], Box]
"""(height, width) of the full image -> the box to resize."""

Stored = bytes | memoryview | PackedImage
"""An image in a shard: encoded, or pixels."""

Encoded = tuple[memoryview | PackedImage, str]
"""An encoded or packed image and its location (shard and key)."""

MOST_PIXELS = 2**26
"""The most pixels in an image; the largest image of ImageNet has fewer."""
_CHECKED = 32  # side, in pixels, to which an image is reduced that is only checked
_JPEG_MAGIC = b"\xff\xd8"
_ANIMATION = 2  # the flag in a WebP header
_JPEG_SCAN, _MOST_SCANNED = b"\xff\xda", 16 * MOST_PIXELS  # each scan goes over all pixels
_JPEG_SEQUENTIAL = (0xC0, 0xC1)  # markers of frames without progressive scans
_WORTH_CUTTING = 16  # rows whose decoding takes longer than a copy of the encoded image
_MIN_FACTOR = 2.0  # libjpeg-turbo has no fast path for smaller factors: slower than decoding everything
_EIGHTHS = 8  # libjpeg scales by n / 8
_MARGIN = 2.0  # at twice the wanted size, the result looks like a bicubic resize; at exactly that size it does not


def decode(
    data: Stored,
    where: str,
    channels: int,
    resolution: int,
    crops: Sequence[Crop],
    *,
    reflect: bool = False,
    fast: bool = False,
    sound: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes an image once, crops it to the box that each of `crops` chooses, and resizes each box to a square.

    torch resizes with antialiased bicubic interpolation in integers, which is within 1 or 2 of 255 of Pillow and six
    times as fast. EXIF orientation is ignored, as in timm.

    Args:
        data: the image.
        where: shard and key, for error messages.
        channels: 1 or 3; converts between gray and color if the image has the other kind.
        resolution: r, side of the result in pixels.
        crops: each chooses a box; called again with the same size if a decoder gives up.
        reflect: whether pixels beyond the image mirror those inside; otherwise they are 0.
        fast: whether a JPEG may be decoded with a simpler transform and coarser upsampling of colors: 10 % faster, and
            more than 40 decibels above the difference.
        sound: whether the image is known to have no error, so that a `fast` decoder need not look at what lies below
            the crops.
        out: where to write the result; default: new memory.

    Returns:
        (crops, r, r, channels) uint8.

    Raises:
        DamagedSample: the image cannot be decoded.
        Unavailable: memory ran out, or a packed image cannot be read now.
    """
    out = np.empty((len(crops), resolution, resolution, channels), np.uint8) if out is None else out
    try:
        image, boxes = _pixels(data, channels, resolution, crops, fast, sound)
    except MemoryError as error:  # says nothing about the image: another worker could have decoded it
        raise Unavailable(f"{where}: memory ran out while decoding; use fewer workers") from error
    except ValueError as error:
        raise DamagedSample(f"{where}: {error}; remove or replace it and rebuild the shard", where) from error
    for box, target in zip(boxes, out, strict=True):
        _resize(image, box, reflect, target)
    return out


def problem_of(data: bytes) -> str:
    """Why training would refuse an encoded image; empty if it would not. Decodes all of it, as training does."""
    try:
        decode(data, "", 3, _CHECKED, [whole])
    except DataError as error:
        return str(error).removeprefix(": ").partition(";")[0]
    return ""


class Whole(NamedTuple):
    """A whole image, perhaps reduced."""

    pixels: np.ndarray
    """(H, W, 3) uint8, or (H, W, 1) if all three channels are equal."""
    reduced: bool


def decode_whole(data: Stored, shorter_side: int) -> Whole:
    """Decodes a whole image. If its shorter side has more than `shorter_side` pixels, reduces it to them like `decode`.

    Raises ValueError if it cannot be decoded, and like `PackedImage.rows`.
    """
    height, width = 0, 0

    def crop(*size: int) -> Box:
        nonlocal height, width
        height, width = size
        return whole(height, width)

    pixels, [box] = _pixels(data, 3, shorter_side, [crop])
    factor = shorter_side / min(height, width)
    if factor < 1:
        full, pixels = pixels, np.empty((round(height * factor), round(width * factor), 3), np.uint8)
        _resize(full, box, False, pixels)
    gray = (pixels == pixels[..., :1]).all()
    return Whole(np.ascontiguousarray(pixels[..., :1] if gray else pixels), factor < 1)


def whole(height: int, width: int) -> Box:
    """The box that leaves nothing out."""
    return 0, 0, width, height


def _pixels(
    data: Stored, channels: int, resolution: int, crops: Sequence[Crop], fast: bool = False, sound: bool = False
) -> tuple[np.ndarray, Sequence[ScaledBox]]:
    """(H, W, channels) uint8, and the boxes in it.

    Raises MemoryError; ValueError if encoded bytes are not a readable image; and like `PackedImage.rows`.
    """
    if isinstance(data, PackedImage):
        return _read_packed(data, channels, crops)
    try:
        return _decode_jpeg(data, channels, resolution, crops, fast, sound) or _decode_other(data, channels, crops)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise exceptions of any kind on damaged data
        raise ValueError(f"cannot decode the image ({error or type(error).__name__})") from error


def _decode_jpeg(
    data: bytes | memoryview, channels: int, resolution: int, crops: Sequence[Crop], fast: bool, sound: bool = False
) -> tuple[np.ndarray, Sequence[ScaledBox]] | None:
    """A JPEG, scaled down as far as the crops allow, and the boxes in its pixels; None if simplejpeg gives up.

    The rows below the crops are left out if that changes no pixel of the others, and hides no error.
    """
    if data[:2] != _JPEG_MAGIC:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        frame = _only_frame(data)
        scans = 1 if frame else bytes(data).count(_JPEG_SCAN)
        if scans * width * height > _MOST_SCANNED:
            raise DataError(f"a JPEG with too many scans: {scans} of {width} x {height} pixels")
        if colorspace in ("CMYK", "YCCK"):
            return None
        boxes = [crop(height, width) for crop in crops]
        scale = max(_needed(box, height, width, resolution) for box in boxes)
        least = [math.ceil(side * min(scale, 1.0)) for side in (height, width)]
        at_full_scale = any(2 * few > side + 1 for few, side in zip(least, (height, width)))
        rows = max(bottom for _, _, _, bottom in boxes)
        cut = fast and sound and at_full_scale and frame > 0 and rows + _WORTH_CUTTING <= height
        if cut:
            data, height, least = _cut(data, frame, rows), rows, [rows, width]
        image = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if channels == 1 else "RGB",
            fastdct=fast,
            fastupsample=fast,
            min_height=least[0],
            min_width=least[1],
            min_factor=_MIN_FACTOR,
            strict=not cut,  # to libjpeg, coded rows that nobody reads are an error
        )
    except ValueError:
        return None
    if image.shape[:2] == (height, width):
        return image, boxes
    scale = _scale(max(height, width), max(image.shape[:2]))
    return image, [(left * scale, top * scale, right * scale, bottom * scale) for left, top, right, bottom in boxes]


def _only_frame(data: bytes | memoryview) -> int:
    """Where the frame header of a JPEG begins whose first scan holds all of its components completely, as in most, so
    that no other is read; otherwise 0."""
    at, frame, components = 2, 0, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _JPEG_SEQUENTIAL:
            frame, components = at, data[at + 9]
        if marker == _JPEG_SCAN[1]:
            return frame if data[at + 4] == components else 0
        at += 2 + length
    return 0


def _cut(data: bytes | memoryview, frame: int, height: int) -> memoryview:
    """A JPEG that ends below its first rows: its header says so, and the decoder reads no further.

    `frame`: where its frame header begins.
    """
    cut = bytearray(data)
    cut[frame + 5 : frame + 7] = height.to_bytes(2)
    return memoryview(cut)


def _needed(box: Box, height: int, width: int, resolution: int) -> float:
    """The smallest factor by which the image may be scaled before `box` is cut out."""
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > width or bottom > height:
        return 1.0
    return _MARGIN * resolution / min(right - left, bottom - top)


def _scale(full: int, scaled: int) -> float:
    """The factor n / 8 by which libjpeg has scaled a side. It rounds the side up, so `scaled` / `full` is too large."""
    return _EIGHTHS * scaled // full / _EIGHTHS


def _decode_other(
    data: bytes | memoryview, channels: int, crops: Sequence[Crop]
) -> tuple[np.ndarray, Sequence[ScaledBox]]:
    """Decodes a whole image with OpenCV, or with Pillow if it is a JPEG or OpenCV fails. Returns pixels and boxes."""
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
    return np.atleast_3d(image), [crop(*image.shape[:2]) for crop in crops]


def _read_packed(image: PackedImage, channels: int, crops: Sequence[Crop]) -> tuple[np.ndarray, Sequence[Box]]:
    """The rows that the crops need, and the boxes in them; all rows if a crop may mirror them beyond the image."""
    height, width, stored = image.shape
    boxes = [crop(height, width) for crop in crops]
    first, last = min(top for _, top, _, _ in boxes), max(bottom for _, _, _, bottom in boxes)
    if first < 0 or last > height:
        first, last = 0, height
    pixels = image.rows(first, last)
    if stored != channels:
        pixels = np.atleast_3d(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if channels == 3 else cv2.COLOR_RGB2GRAY))
    return pixels, [(left, top - first, right, bottom - first) for left, top, right, bottom in boxes]


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


def _resize(image: np.ndarray, box: ScaledBox, reflect: bool, out: np.ndarray) -> None:
    """Crops (H, W, C) to the box and resizes it into `out`, (h, w, C). The box may begin and end between pixels."""
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    height, width = image.shape[:2]
    margins = max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0)
    if any(margins):
        border = cv2.BORDER_REFLECT_101 if reflect else cv2.BORDER_CONSTANT
        image = np.atleast_3d(cv2.copyMakeBorder(image, *margins, border))
    inside = image[margins[0] + top :, margins[2] + left :][: bottom - top, : right - left]
    across, down = box[0] - left, box[1] - top
    if across:
        inside = np.atleast_3d(cv2.addWeighted(inside[:, :-1], 1 - across, inside[:, 1:], across, 0))
    if down:
        inside = np.atleast_3d(cv2.addWeighted(inside[:-1], 1 - down, inside[1:], down, 0))
    if inside.shape == out.shape and box == (left, top, right, bottom):
        out[:] = inside
        return
    source, target = (torch.from_numpy(part).permute(2, 0, 1)[None] for part in (inside, out))
    scales = out.shape[0] / (box[3] - box[1]), out.shape[1] / (box[2] - box[0])  # interpolate() would take the window's
    torch.ops.aten._upsample_bicubic2d_aa.out(source, out.shape[:2], False, *scales, out=target)
