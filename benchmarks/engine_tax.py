"""What `scaleprog train` costs over a bare loop: images/s of both, side by side, in turns.

    python benchmarks/engine_tax.py [--repeats 5] [--steps 150] [--out docs/results/engine_tax.md]

Both train the same timm model of the Fashion-MNIST recipe on the same batch size, one process and one thread; the bare
loop has its decoded data in memory, `train` reads its shards (cached in memory) with one worker process. What is timed
is everything between the starts of two steps: waiting for data, logging and all. The repeats' median ratio counts.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import scaleprog.train
from scaleprog.data.reader import evaluation_batches
from scaleprog.plan import Plan
from scaleprog.recipe import Recipe

WARM = 20  # steps of each turn that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("docs/results/engine_tax.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    overrides = ["sharding.engine=replicated", f"train.max_steps={options.steps}", f"checkpoint.every_steps={10**9}"]
    recipe = Recipe.load("configs/fashion_mnist/original.yaml", overrides)
    images, labels = in_memory(recipe)
    pairs = []
    for repeat in range(options.repeats):
        order = (bare, ours) if repeat % 2 else (ours, bare)
        speed = {turn: turn(recipe, images, labels, options.steps) for turn in order}
        pairs.append((speed[bare], speed[ours]))
        print(f"bare {speed[bare]:.0f} img/s, scaleprog {speed[ours]:.0f} img/s, tax {tax(pairs[-1]):+.1%}", flush=True)
    median = statistics.median(tax(pair) for pair in pairs)
    lines = ["| repeat | bare loop, img/s | scaleprog train, img/s | tax |", "|---|---|---|---|"]
    lines += [f"| {i} | {b:.0f} | {o:.0f} | {tax((b, o)):+.1%} |" for i, (b, o) in enumerate(pairs)]
    text = f"Engine tax: median {median:+.1%} of a bare loop's images/s.\n\n" + "\n".join(lines) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def tax(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] - 1


def in_memory(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    plan = Plan.of(recipe, 1)
    size = plan.schedule.full.resolution
    batches = list(evaluation_batches(plan.manifest, "val", recipe.data, recipe.augment, 1, size, 500, 0, 1))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def bare(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """The loop that one would write by hand; images/s."""
    m = recipe.model
    model = timm.create_model(
        m.name, img_size=m.resolution, patch_size=m.patch, in_chans=m.channels, num_classes=m.classes,
        embed_dim=m.width, depth=m.depth, num_heads=m.heads, dynamic_img_size=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)
    batch = recipe.train.batch
    for step in range(steps):
        if step == WARM:
            began = time.perf_counter()
        first = step * batch % (len(images) - batch)
        logits = model(images[first : first + batch])
        loss = F.cross_entropy(logits, labels[first : first + batch], label_smoothing=recipe.augment.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (steps - WARM) * batch / (time.perf_counter() - began)


def ours(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """`train` on the recipe; images/s."""
    starts: list[float] = []
    step = scaleprog.train.train_step

    def timed(*arguments: object) -> None:
        starts.append(time.perf_counter())
        step(*arguments)  # type: ignore[arg-type]

    scaleprog.train.train_step = timed  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            scaleprog.train.train_rank(recipe, Path(folder))
    finally:
        scaleprog.train.train_step = step
    return (steps - 1 - WARM) * recipe.train.batch / (starts[-1] - starts[WARM])


if __name__ == "__main__":
    main()
