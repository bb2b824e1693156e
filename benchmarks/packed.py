"""How fast a core prepares images from JPEGs, reduced JPEGs, and packed shards, beside timm's whole transform.

    python -m benchmarks.packed SHARDS

SHARDS holds JPEGs larger than 256 pixels. All rows take turns on one thread, after one turn that warms up; the median
of five counts, in images per CPU second, and in parentheses its ratio to timm's. The file system caches the shards.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

from benchmarks.loader_rivals import timm_floats
from scaleprog.data.augment import Augmentation, BatchRequest, Encoded
from scaleprog.data.manifest import Manifest
from scaleprog.data.packed import PackedShard
from scaleprog.data.shard import LoadedShard, ShardReader
from scaleprog.recipe.keys import AugmentSettings
from scaleprog.shards import pack
from scaleprog.shards.reduction import Reduction

SIZES, SIDE, TURNS, MOST = (224, 160, 128), 256, 5, 200
DEIT = AugmentSettings(randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
CROPS = AugmentSettings(flip=0.0)
"""The host's part if the device augments: crop, resize, write into the batch."""
Turn = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    shards = parser.parse_args().shards
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        pack.build(shards, Path(folder, "packed"), shorter_side=SIDE)
        encoded, pixels = held(shards), held(Path(folder, "packed"))
        tables = [measured(size, encoded, pixels) for size in SIZES]
    print("| images/s |" + "".join(f" {size} px |" for size in SIZES) + "\n|---|" + "---|" * len(SIZES))
    for row in tables[0]:
        cells = [f"{table[row]:,.0f} ({table[row] / table['timm']:.1f}x)" for table in tables]
        print(f"| {row} | {' | '.join(cells)} |")


def held(folder: Path) -> list[LoadedShard | PackedShard]:
    """The first shards of a folder, which hold MOST images if there are so many."""
    reader, shards = ShardReader(Manifest.load(folder), "train"), []
    for index in range(len(reader.shards)):
        shards.append(reader.load(index))
        if sum(len(shard.keys) for shard in shards) >= MOST:
            break
    return shards


def measured(
    size: int, encoded: Sequence[LoadedShard | PackedShard], pixels: Sequence[LoadedShard | PackedShard]
) -> dict[str, float]:
    """Images per CPU second by row."""
    originals, packed = images_of(encoded), images_of(pixels)
    reduced = [(memoryview(Reduction(SIDE).apply(bytes(data))), where) for data, where in originals]

    def unverified() -> list[Encoded]:
        for shard in pixels:
            assert isinstance(shard, PackedShard)
            shard.checked[:] = False
        return packed

    rows: dict[str, Turn] = {"timm": timm_floats(size, [bytes(data) for data, _ in originals])}
    for name, settings in (("crops", CROPS), ("DeiT's augmentation", DEIT)):
        rows[f"{name}: JPEG"] = ours(size, settings, lambda: originals)
        rows[f"{name}: JPEG, shorter side {SIDE}"] = ours(size, settings, lambda: reduced)
        rows[f"{name}: packed"] = ours(size, settings, lambda: packed)
        rows[f"{name}: packed, verified"] = ours(size, settings, unverified)
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(1 + TURNS):
        for name, turn in rows.items():
            began = time.process_time()
            turn()
            found[name].append(len(originals) / (time.process_time() - began))
    return {name: median(values[1:]) for name, values in found.items()}


def images_of(shards: Sequence[LoadedShard | PackedShard]) -> list[Encoded]:
    return [shard.image(row) for shard in shards for row in range(len(shard.keys))][:MOST]


def ours(size: int, settings: AugmentSettings, images: Callable[[], list[Encoded]]) -> Turn:
    augmentation, out = Augmentation(settings, 3), np.empty((MOST, size, size, 3), np.uint8)

    def turn() -> None:
        stored = images()
        augmentation.lane(stored, BatchRequest(0, 0, size), 0, out[: len(stored)])

    return turn


if __name__ == "__main__":
    main()
