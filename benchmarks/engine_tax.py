"""What `scaleprog train` costs over a bare loop: images/s of both, side by side, in turns.

    python benchmarks/engine_tax.py [--processes 5] [--repeats 8] [--steps 40] [--out docs/results/engine_tax.md]

Both train one timm model, that of the Fashion-MNIST recipe, on the same batch size in one process of one thread, a few
steps of one and then a few steps of the other, so that a machine whose speed drifts slows both. It is one and the same
model, because where a process happens to place the weights of another changes its speed by some percent. The bare loop
has timm's EMA, because the recipe asks for one, and its decoded data in memory; `train` reads its shards (cached in
memory) with one worker process. What is timed is everything between the starts of two steps: waiting for data, logging
and all. Several processes measure, one after another; the median ratio of all pairs of turns counts.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import scaleprog.training.loop
from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.training.process import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("docs/results/engine_tax.md"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.repeats, options.steps)))
        return
    again = [sys.executable, *sys.argv, "--child"]
    found = [
        json.loads(subprocess.run(again, stdout=subprocess.PIPE, check=True).stdout) for _ in range(options.processes)
    ]
    text = page(found, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def measure(repeats: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the turns of the bare loop and of `train` in this process; a first pair warms up, and is left out."""
    torch.set_num_threads(1)
    total = 2 * steps * (repeats + 1)
    overrides = ["sharding.engine=replicated", f"train.max_steps={total}", f"checkpoint.every_steps={10**9}"]
    recipe = Recipe.load("configs/fashion_mnist/original.yaml", overrides)
    bare, ours = turns(recipe, *in_memory(recipe), steps)
    return bare[1:], ours[1:]


def page(found: list[tuple[list[float], list[float]]], steps: int) -> str:
    """What the processes measured."""
    pairs = [list(zip(*each, strict=True)) for each in found]
    taxes = [[mine / theirs - 1 for theirs, mine in each] for each in pairs]
    low, median, high = statistics.quantiles(chain.from_iterable(taxes), n=4)
    each = ", ".join(f"{statistics.median(of):+.1%}" for of in taxes)
    rate = steps * Recipe.load("configs/fashion_mnist/original.yaml").train.batch
    bare, ours = (rate / statistics.median(chain.from_iterable(turns)) for turns in zip(*found, strict=True))
    return (
        f"Engine tax: **{median:+.1%}** of a bare loop's time per step, the median of {sum(map(len, taxes))} pairs of "
        f"turns of {steps} steps in {len(found)} processes (quartiles {low:+.1%} and {high:+.1%}; medians of the "
        f"processes: {each}).\n\n"
        "| | images/s, median of the turns |\n|---|---|\n"
        f"| bare loop | {bare:.0f} |\n"
        f"| `scaleprog train` | {ours:.0f} |\n"
    )


def in_memory(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    plan = Plan.of(recipe)
    size = plan.schedule.full.resolution
    images, labels = [], []
    for batch in EvaluationReader(plan.data, VALIDATION, 500, 0, 1).batches(size):
        images.append(plan.data.images(batch, torch.device("cpu")))
        labels.append(batch.labels.clone())
    return torch.cat(images), torch.cat(labels)


def bare_loop(model: nn.Module, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> Iterator[None]:
    """The loop that one would write by hand, a step each time it is asked; between steps, there are no gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)
    ema = ModelEmaV3(model, decay=recipe.ema.momenta[0])
    batch = recipe.train.batch
    first = 0
    while True:
        logits = model(images[first : first + batch])
        loss = F.cross_entropy(logits, labels[first : first + batch], label_smoothing=recipe.augment.smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        first = (first + batch) % (len(images) - batch)
        yield


def turns(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of `steps` steps of the bare loop and of `train`, in turns.

    While the bare loop runs, the worker decodes ahead; so `train` first takes as many untimed steps as eat that lead.
    """
    theirs: list[float] = []
    mine: list[float] = []
    taken = 0
    began = 0.0
    train_step = scaleprog.training.loop.train_step

    def timed(run: Run, *arguments: Any) -> None:
        nonlocal taken, began
        if taken and taken % (2 * steps) == 0:
            mine.append(time.perf_counter() - began)
            bare = bare_loop(run.backend.network.model.net, recipe, images, labels)
            next(bare)  # makes its moments
            began = time.perf_counter()
            for _ in range(steps):
                next(bare)
            theirs.append(time.perf_counter() - began)
        if taken % (2 * steps) == steps:
            began = time.perf_counter()
        train_step(run, *arguments)
        taken += 1

    scaleprog.training.loop.train_step = timed  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            scaleprog.training.loop.train_rank(recipe, Path(folder))
    finally:
        scaleprog.training.loop.train_step = train_step
    return theirs, mine


if __name__ == "__main__":
    main()
