"""Packs shards: stores their images decoded, so that training neither decodes nor reads more than a crop's rows.

A packed shard has the samples of the shard that it was made from, in the same order and under the same keys: runs see
the same samples, and the same token labels fit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaleprog.data import packed, tar
from scaleprog.data.decode import decode_whole
from scaleprog.data.manifest import MOST_BYTES, Manifest
from scaleprog.data.shard import ShardReader
from scaleprog.errors import DataError
from scaleprog.shards.build import SPLITS, finished
from scaleprog.shards.build import build as build_shards
from scaleprog.shards.pool import listed


def build(shards: Path, out: Path, *, shorter_side: int, workers: int | None = None) -> Manifest:
    """Packs the shards of the folder `shards` into the folder `out`. Resumes an interrupted build.

    Args:
        shards: the folder of shards.
        out: the folder of the packed shards.
        shorter_side: in pixels; images with a longer one are reduced to it.
        workers: number of processes; default: one per CPU. Each holds a shard in memory.

    Raises:
        DataError: a shard is missing or damaged, or an image cannot be decoded; `out` holds something else or cannot
            be written.
        Unavailable: a shard cannot be read now. The same call resumes.
    """
    images = Manifest.load(shards)
    names = [split for split in SPLITS if split in images.splits]
    for split in names:
        images.verify_sizes(split)
    source = {"builder": "pack", "shorter_side": shorter_side, **images.identity()}
    if manifest := finished(out, source):
        return manifest
    splits = {
        split: [_Packing(images, split, index, shorter_side) for index in range(len(images.split(split)))]
        for split in names
    }
    return build_shards(out, classes=images.classes, splits=splits, source=source, workers=workers)


@dataclass(frozen=True)
class _PackedSample:
    """One sample of a packed shard."""

    key: str
    pixels: np.ndarray
    label: int

    def members(self) -> Mapping[str, bytes]:
        """The files of the sample by extension."""
        return packed.encode(self.pixels, self.label)


@dataclass(frozen=True)
class _Packing:
    """The samples of one packed shard; iterating decodes those of its source."""

    images: Manifest
    split: str
    index: int
    shorter_side: int

    def __iter__(self) -> Iterator[_PackedSample]:
        """Raises DataError at the end if any images cannot be decoded, so that the error lists them all."""
        shard = ShardReader(self.images, self.split).load(self.index)
        problems, left = [], MOST_BYTES
        for row, (key, label) in enumerate(zip(shard.keys, shard.labels.tolist(), strict=True)):
            data, where = shard.image(row)
            try:
                pixels = decode_whole(data, self.shorter_side).pixels
            except ValueError as error:
                problems.append(f"{where}: {error}; remove or replace the image and build its shard again")
                continue
            left -= pixels.nbytes + 8 * tar.BLOCK  # of which headers and padding take seven
            if left < 0:
                raise DataError(
                    f"{shard.path}: its pixels would take more than {MOST_BYTES} bytes, the limit of a shard; build "
                    "its shards with fewer --samples-per-shard, or choose a smaller --shorter-side"
                )
            yield _PackedSample(key, pixels, label)
        if problems:
            raise DataError(listed(problems))
