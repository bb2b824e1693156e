"""How fast the host prepares images, beside other libraries in the same run.

    python -m benchmarks.loader [--parts transforms steps reader workers startup] [--out docs/results/loader.md]

Photographs of 500 x 375 pixels, JPEGs of quality 92 (`benchmarks/photographs.py`), in DeiT's augmentation: random
resized crop, flip, RandAugment m9-mstd0.5-inc1, erasing of 0.25. Every figure of a table comes from one run: all rows
take turns on one thread, in CPU seconds of the process, and the median of nine turns of each counts; a ratio is the
median of the ratios within a turn, because other machines on the same host make all rows of a turn slower. `ours` is
what a worker does: it reads a shard in memory and fills a batch with bytes, which the device normalizes and erases.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import simplejpeg
import torch

import scaleprog.data.augment
import scaleprog.data.decode
from benchmarks import loader_reader
from benchmarks.loader_rivals import Prepare, rivals, timm_evaluation
from benchmarks.photographs import build_shards
from scaleprog.data.augment import Augmentation, BatchRequest
from scaleprog.data.manifest import Manifest
from scaleprog.data.reader import DataSet, TrainReader
from scaleprog.data.shard import Cursor, ShardReader
from scaleprog.recipe import Recipe
from scaleprog.shards.pack import build as pack
from scaleprog.shards.speed import ceiling, one_thread, rate, sample

SIZES = (224, 160, 128)
RECIPE = "configs/imagenet/deit_small_prog_100.yaml"
TURNS = 9
BATCH = 16
"""Images of a lane in a step of the recipe; a measurement has one more batch, which warms up."""
CEILING = "ceiling: decode, crop, resize, copy"
Turn = Callable[[], float]
"""Measures images per CPU second once."""


def main() -> None:
    parts = {"transforms": transforms, "steps": steps, **loader_reader.PARTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--images", type=int, default=240, help="in one turn")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/photographs"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/loader.md"))
    options = parser.parse_args()
    build_shards(options.folder / "few", 2 * options.images, options.images)
    method = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
    text = ["Written by `python -m benchmarks.loader`.", method, machine()]
    with one_thread():
        for part in options.parts:
            load = os.getloadavg()[0]
            text += [*parts[part](options.folder, options.images), f"(Load average when this began: {load:.1f}.)"]
            options.out.write_text("\n\n".join(text) + "\n")
            print(f"{options.out}: {part} written", flush=True)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {versions}."


def recipe(folder: Path, repeats: int = 1, **augment: Any) -> Recipe:
    """DeiT-S's recipe on the shards in `folder`."""
    settings = {"repeats": repeats, **augment}
    overrides = [f"augment.{key}={json.dumps(value)}" for key, value in settings.items()]
    return Recipe.load(RECIPE, [f"data.path={json.dumps(str(folder))}", *overrides])


def in_turns(rows: Mapping[str, Turn]) -> list[dict[str, float]]:
    """TURNS results of each row; the rows take turns, after one that warms up."""
    return [{name: run() for name, run in rows.items()} for _ in range(TURNS + 1)][1:]


def cells(found: list[dict[str, float]], name: str, *others: str) -> str:
    """A row of a table: images per second, and the ratios to other rows."""
    rate = statistics.median(turn[name] for turn in found)
    ratios = (statistics.median(turn[name] / turn[other] for turn in found) for other in others)
    return " | ".join([f"| {name}", f"{rate:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]) + " |"


def timed(prepare: Prepare, images: int) -> Turn:
    """Images per CPU second of this process."""

    def run() -> float:
        began = time.process_time()
        prepare()
        return images / (time.process_time() - began)

    return run


def ours(recipe: Recipe, images: int, size: int, change: Callable[[DataSet], DataSet] = lambda data: data) -> Turn:
    """Images per CPU second of a worker; `change`: of what it does to an image."""
    data, order = sample(recipe, images)
    data = change(data)
    reader = TrainReader(data, order, recipe.seed, 0, 1)
    return lambda: rate(reader, size, images // order.batch)


def finished(recipe: Recipe, images: int, size: int) -> Turn:
    """Images per CPU second if this thread also does what the device does: it normalizes and erases."""
    data, order = sample(recipe, images)
    reader, cpu = TrainReader(data, order, recipe.seed, 0, 1), torch.device("cpu")
    steps = range(images // order.batch + 1)
    requests = [BatchRequest(*divmod(step, order.steps_per_epoch), size) for step in steps]

    def run() -> float:
        with reader.stream(requests, size) as batches:
            next(batches)
            began = time.process_time()
            count = sum(len(data.images(batch, cpu)) for batch in batches)
            return count / (time.process_time() - began)

    return run


# ---- ours beside others


def transforms(folder: Path, images: int) -> list[str]:
    """Tables of ours and of other libraries; `host part`: the device does the augmentation."""
    packed, folder = folder / "packed", folder / "few"
    pack(folder, packed, shorter_side=256, workers=1)
    manifest = Manifest.load(folder)
    tar = Path(manifest.path(manifest.split("train")[0]))
    cursor = Cursor(ShardReader(manifest, "train"))
    encoded = [bytes(cursor.at(position).image[0]) for position in range(images)]
    tables = ["## Whole transforms, images per CPU second"]
    for size in SIZES:
        others = rivals(size, encoded, tar)
        rows = {
            "ours": ours(recipe(folder), images, size),
            "ours, normalized and erased by the same thread": finished(recipe(folder), images, size),
            "ours, 3 repeats of each image": ours(recipe(folder, repeats=3), images, size),
            "ours, host part": ours(recipe(folder, device="accelerator"), images, size),
            "ours, packed at 256 px": ours(recipe(packed), images, size),
            "ours, packed at 256 px, host part": ours(recipe(packed, device="accelerator"), images, size),
            CEILING: ours(recipe(folder), images, size, ceiling),
            **{name: timed(prepare, images) for name, prepare in others.items() if prepare},
        }
        found = in_turns(rows)
        lines = [cells(found, name, "timm", CEILING) for name in rows]
        lines += [f"| {name} | not installed | | |" for name, prepare in others.items() if not prepare]
        header = f"| {size} px | images/s | of timm | of the ceiling |\n|---|---|---|---|"
        tables.append("\n".join([header, *lines]))
    return [*tables, evaluation(folder, encoded)]


def evaluation(folder: Path, encoded: list[bytes]) -> str:
    """The central crop at 224 px."""
    augmentation = Augmentation(recipe(folder).augment, 3)
    stored = [(memoryview(image), "photograph") for image in encoded]
    batch = np.empty((len(encoded), 224, 224, 3), np.uint8)
    rows = {
        "ours": timed(lambda: augmentation.evaluation(stored, batch), len(encoded)),
        "timm": timed(timm_evaluation(224, encoded), len(encoded)),
    }
    found = in_turns(rows)
    lines = [cells(found, name, "timm") for name in rows]
    return "\n".join(["| evaluation, 224 px | images/s | of timm |\n|---|---|---|", *lines])


# ---- where the time goes

STEPS: dict[str, tuple[tuple[Any, str], ...]] = {
    "draws": ((Augmentation, "draws"),),
    "JPEG": ((simplejpeg, "decode_jpeg_header"), (simplejpeg, "decode_jpeg")),
    "crop, resize": ((scaleprog.data.decode, "_resize"),),
    "RandAugment": ((scaleprog.data.augment, "apply"),),
    "flip": ((cv2, "flip"),),
}
"""The functions that do each step; none of them calls another."""
REST = "rest: labels, shard, loops"


def steps(folder: Path, images: int) -> list[str]:
    """How long the functions of each step run, and what is left."""
    columns = [shares(recipe(folder / "few"), images, size) for size in SIZES]
    header = "| step |" + "".join(f" {size} px | share |" for size in SIZES)
    lines = [header, "|---|" + "---|---|" * len(SIZES)]
    for name in (*STEPS, REST):
        cells = (f" {1e6 * column[name]:.0f} | {column[name] / sum(column.values()):.0%} |" for column in columns)
        lines.append(f"| {name} |{''.join(cells)}")
    return ["## Where the time goes\n\nMicroseconds per image of `ours`, timed step by step.", "\n".join(lines)]


def shares(recipe: Recipe, images: int, size: int) -> dict[str, float]:
    """CPU seconds per image by step, the medians of TURNS turns."""
    spent = dict.fromkeys(STEPS, 0.0)

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.thread_time() - began

        return timed

    run, turns = ours(recipe, images, size), []
    with ExitStack() as patched:
        for name, functions in STEPS.items():
            for owner, function in functions:
                patched.enter_context(patch.object(owner, function, timing(name, getattr(owner, function))))
        for _ in range(TURNS + 1):
            spent.update(dict.fromkeys(STEPS, 0.0))
            whole = 1 / run()
            part = {name: seconds / (images + BATCH) for name, seconds in spent.items()}
            turns.append({**part, REST: whole - sum(part.values())})
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in turns[0]}


if __name__ == "__main__":
    main()
