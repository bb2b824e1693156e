"""Pictures for TensorBoard, as PNG."""

import io
import math

from PIL import Image
from torch import Tensor

MOST_IMAGES = 16
LEAST_SIDE = 96
"""Pixels of an image in a grid; smaller ones are magnified."""


def grid(images: Tensor) -> bytes:
    """Images (B, H, W, C) uint8, on the host, side by side in a square.

    Of other than 3 channels, the first is shown.
    """
    pixels = images[:MOST_IMAGES] if images.shape[-1] == 3 else images[:MOST_IMAGES, ..., :1].expand(-1, -1, -1, 3)
    count, height, width, _ = pixels.shape
    columns = math.ceil(math.sqrt(count))
    scale = math.ceil(LEAST_SIDE / max(height, width))
    size = width * scale, height * scale
    canvas = Image.new("RGB", (columns * (size[0] + 1) - 1, math.ceil(count / columns) * (size[1] + 1) - 1), "white")
    for number, image in enumerate(pixels.contiguous().numpy()):
        row, column = divmod(number, columns)
        place = column * (size[0] + 1), row * (size[1] + 1)
        canvas.paste(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), place)
    written = io.BytesIO()
    canvas.save(written, "PNG")
    return written.getvalue()
