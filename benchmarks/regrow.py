"""What a growth costs under FSDP2 at DeiT-S size: seconds, in training steps, and bytes between ranks.

    python benchmarks/regrow.py [--ranks 2] [--batch 16] [--out docs/results/regrow.md]

Each rank trains a few steps at the size before every growth of the 0.5 Omega ladder (128 px x 6 ... 224 px x 12),
grows by MoGrow, and trains on; a growth is compared with the median step *before* it, the cheaper one.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.tensor.debug import CommDebugMode

from launchers.local import launch
from scaleprog.growth.operators import fresh, grow
from scaleprog.models import family
from scaleprog.plan import outline
from scaleprog.recipe import Recipe
from scaleprog.sharding.coordinator import process_group
from scaleprog.train import make_backend

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="images a rank")
    parser.add_argument("--out", type=Path, default=Path("docs/results/regrow.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        launch(options.ranks, measure, options.batch, out)
        rows = json.loads(out.read_text())
    lines = [
        f"DeiT-S, {options.ranks} FSDP2 ranks, {options.batch} images a rank.", "",
        "| growth | step before, s | growth, s | in steps | collectives |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r['growth']} | {r['step']:.2f} | {r['seconds']:.2f} | {r['seconds'] / r['step']:.2f} "
              f"| {r['collectives']} |" for r in rows]  # fmt: skip
    text = "\n".join(lines) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


def measure(batch: int, out: Path) -> None:
    recipe = Recipe.load("configs/imagenet/deit_small_prog_100.yaml", ["sharding.precision=fp32"])
    with process_group() as (coordinator, device):
        backend = make_backend("fsdp", recipe, family(recipe.model)[0], device)
        ladder = outline(recipe, 1000)[1].ladder
        backend.regrow(fresh((ladder[0].depth,)), inherit=False, elastic=False)
        rows = []
        for before, after in itertools.pairwise(ladder):
            seconds = []
            for _ in range(STEPS):
                images = torch.randn(batch, 3, before.resolution, before.resolution, device=device)
                coordinator.barrier()
                began = time.perf_counter()
                F.cross_entropy(backend.forward(images), torch.zeros(batch, dtype=torch.long, device=device)).backward()
                backend.step(1e-4)
                seconds.append(time.perf_counter() - began)
            coordinator.barrier()
            began = time.perf_counter()
            with CommDebugMode() as traffic:
                backend.regrow(grow("mogrow", (before.depth,), (after.depth,)), inherit=False, elastic=False)
            grown = time.perf_counter() - began
            step, grown = coordinator.maximum([statistics.median(seconds), grown])
            rows.append({"growth": f"{before} -> {after}", "step": step, "seconds": grown,
                         "collectives": traffic.get_total_counts()})  # fmt: skip
        if coordinator.rank == 0:
            out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
