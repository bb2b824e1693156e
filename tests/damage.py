"""Shards in which some images cannot be decoded, for tests of `data.damaged`."""

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from scaleprog.data.manifest import Manifest, Shard

CLASSES = 4


def image(number: int, kind: str) -> bytes:
    """A picture whose pixels tell its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def animation() -> bytes:
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255))
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=[second])
    return buffer.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


KINDS: dict[str, Callable[[int], bytes]] = {
    "empty": lambda number: b"",
    "a page of errors": lambda number: b"<html>404</html>",
    "zeros": lambda number: bytes(500),
    "half a JPEG": lambda number: half(image(number, "JPEG")),
    "half a PNG": lambda number: half(image(number, "PNG")),
    "half a WebP": lambda number: half(image(number, "WEBP")),
    "another format": lambda number: image(number, "GIF"),
    "an animation": lambda number: animation(),
    "too large": lambda number: image(number, "PNG")[:16] + 2 * (2**20).to_bytes(4) + image(number, "PNG")[24:],
    "without its frame": lambda number: image(number, "JPEG").replace(b"\xff\xc0", b"\xff\xfe", 1),
}
"""Ways in which the image with a number may be damaged."""


def write_shards(root: Path, sizes: Iterable[int], damaged: Iterable[int]) -> Manifest:
    """Training shards of these sizes, in which the samples at the positions `damaged` cannot be decoded: one kind of
    damage after the other. A validation shard holds one sound image. Sample 7 has the key `s00007`."""
    kinds = dict(zip(sorted(damaged), [*KINDS.values()] * 1000))
    root.mkdir(parents=True, exist_ok=True)

    def write(name: str, numbers: Sequence[int]) -> Shard:
        with webdataset.TarWriter(str(root / name)) as tar:
            for number in numbers:
                data = kinds[number](number) if number in kinds else image(number, "JPEG" if number % 3 else "PNG")
                tar.write({"__key__": f"s{number:05d}", "jpg": data, "cls": b"%d" % (number % CLASSES)})
        return Shard.measure(root / name, len(numbers))

    ends = np.cumsum([0, *sizes]).tolist()
    train = [write(f"train-{i:06d}.tar", range(*bounds)) for i, bounds in enumerate(pairwise(ends))]
    splits = {"train": tuple(train), "val": (write("val-000000.tar", [ends[-1]]),)}
    manifest = Manifest(str(root), tuple(f"class {i}" for i in range(CLASSES)), splits)
    manifest.save()
    return manifest
