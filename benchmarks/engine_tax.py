"""What `scaleprog train` costs over a bare loop: images/s of both, side by side, in turns.

    python benchmarks/engine_tax.py [--repeats 30] [--steps 40] [--out docs/results/engine_tax.md]

Both train the same timm model of the Fashion-MNIST recipe on the same batch size in one process of one thread, a few
steps of one and then a few steps of the other, so that a machine whose speed drifts slows both. The bare loop has its
decoded data in memory; `train` reads its shards (cached in memory) with one worker process. What is timed is everything
between the starts of two steps: waiting for data, logging and all. The median ratio of a pair of turns counts.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import scaleprog.training.loop
from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("docs/results/engine_tax.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = 2 * options.steps * (options.repeats + 1)
    overrides = ["sharding.engine=replicated", f"train.max_steps={total}", f"checkpoint.every_steps={10**9}"]
    recipe = Recipe.load("configs/fashion_mnist/original.yaml", overrides)
    images, labels = in_memory(recipe)
    bare, ours = turns(recipe, bare_loop(recipe, images, labels), options.steps)
    taxes = [mine / theirs - 1 for theirs, mine in zip(bare, ours, strict=True)][1:]  # the first warms up
    low, median, high = statistics.quantiles(taxes, n=4)
    rate = options.steps * recipe.train.batch
    text = (
        f"Engine tax: **{median:+.1%}** of a bare loop's time per step, the median of {len(taxes)} pairs of turns of "
        f"{options.steps} steps (quartiles {low:+.1%} and {high:+.1%}).\n\n"
        "| | images/s, median of the turns |\n|---|---|\n"
        f"| bare loop | {rate / statistics.median(bare[1:]):.0f} |\n"
        f"| `scaleprog train` | {rate / statistics.median(ours[1:]):.0f} |\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def in_memory(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    plan = Plan.of(recipe)
    size = plan.schedule.full.resolution
    images, labels = [], []
    for batch in EvaluationReader(plan.data, VALIDATION, 500, 0, 1).batches(size):
        images.append(plan.data.images(batch, torch.device("cpu")))
        labels.append(batch.labels.clone())
    return torch.cat(images), torch.cat(labels)


def bare_loop(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> Iterator[None]:
    """The loop that one would write by hand, a step each time it is asked."""
    m = recipe.model
    model = timm.create_model(
        m.name,
        img_size=m.resolution,
        patch_size=m.patch,
        in_chans=m.channels,
        num_classes=m.classes,
        embed_dim=m.width,
        depth=m.depth,
        num_heads=m.heads,
        dynamic_img_size=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)
    batch = recipe.train.batch
    first = 0
    while True:
        logits = model(images[first : first + batch])
        loss = F.cross_entropy(logits, labels[first : first + batch], label_smoothing=recipe.augment.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = (first + batch) % (len(images) - batch)
        yield


def turns(recipe: Recipe, bare: Iterator[None], steps: int) -> tuple[list[float], list[float]]:
    """Seconds of `steps` steps of the bare loop and of `train`, in turns.

    While the bare loop runs, the worker decodes ahead; so `train` first takes as many untimed steps as eat that lead.
    """
    theirs: list[float] = []
    mine: list[float] = []
    taken = 0
    began = 0.0
    train_step = scaleprog.training.loop.train_step

    def timed(*arguments: object) -> None:
        nonlocal taken, began
        if taken and taken % (2 * steps) == 0:
            mine.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in range(steps):
                next(bare)
            theirs.append(time.perf_counter() - began)
        if taken % (2 * steps) == steps:
            began = time.perf_counter()
        train_step(*arguments)  # type: ignore[arg-type]
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
