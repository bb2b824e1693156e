"""What a step costs the host under each engine: milliseconds of the training thread, by part.

    python -m benchmarks.host [--ranks 1 2] [--turns 12] [--out docs/results/host.md]

Each rank trains 12 layers of width 64 on 4 images (`train_step` of training/loop.py, with clipping, stochastic depth,
Mixup, and one EMA), so that the time is nearly all the host's. The half-depth steps run every second of the 12 layers.
Times are CPU time of the training thread, without the threads that exchange data. The engines take turns of 4 steps, of
which the first does not count; the median of all steps counts, and the median over the turns of the ratio to
`replicated`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import scaleprog.training.loop as loop
from benchmarks.gpu_cells import in_a_run
from benchmarks.gpu_trainer import Bench, Model, Trainer
from scaleprog.launchers.local import launch
from scaleprog.models.elastic import Active
from scaleprog.planning.plan import outline
from scaleprog.ranks.coordinator import process_group
from scaleprog.sharding import Backend

ENGINES: dict[str, dict[str, Any]] = {
    "replicated": {"engine": "replicated"},
    "fsdp": {"engine": "fsdp"},
    "fsdp, gather: model": {"engine": "fsdp", "gather": "model"},
    "hsdp": {"engine": "hsdp"},
    "hsdp, gather: model": {"engine": "hsdp", "gather": "model"},
    **{f"zero {stage}": {"engine": "zero", "stage": stage} for stage in (1, 2, 3)},
}
IMAGES = 4
STEPS = 4  # of a turn
PARTS = ("input", "forward", "backward", "norm, clip", "AdamW", "EMA", "rest")
Parts = dict[str, float]
"""CPU seconds of one step, by part."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"| ranks | engine | layers | step, ms | {' | '.join(PARTS)} | step / replicated |",
        f"|---|---|---|---|{'---|' * len(PARTS)}---|",
    ]
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            launch(ranks, measure, options.engines, options.turns, Path(folder))
            lines += json.loads((Path(folder) / "rows.json").read_text())
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def measure(engines: list[str], turns: int, folder: Path) -> None:
    """Runs on every rank; rank 0 writes the rows of its own times."""
    with process_group() as (coordinator, device), ExitStack() as patches:
        torch.set_num_threads(1)
        model = model_for(coordinator.world)
        clock, steps = Clock(patches), {}
        for name in engines:
            trainer = Trainer(Bench(coordinator, device, tiny=True), model, **ENGINES[name])
            phase = outline(trainer.recipe, 1000)[1].phases(())[0]
            trainer.grow(phase.network, may_skip_layers=True)
            clock.watch_backend(trainer.backend)
            (folder / name).mkdir(exist_ok=True)
            steps[name] = in_a_run(trainer, phase, phase.network, folder / name)[1]
        depth = trainer.depth
        actives: dict[int, Active] = {
            layers: (tuple(range(0, depth, depth // layers)),) for layers in (depth, depth // 2)
        }
        gc.freeze()
        gc.disable()
        found: dict[tuple[str, int], list[list[Parts]]] = defaultdict(list)
        for _ in range(turns):
            for layers, active in actives.items():
                for name, step in steps.items():
                    found[name, layers].append([clock.time(step, active) for _ in range(STEPS)][1:])
        if coordinator.rank == 0:
            rows = [row(coordinator.world, name, layers, found) for layers in actives for name in steps]
            (folder / "rows.json").write_text(json.dumps(rows))


def model_for(world: int) -> Model:
    overrides = (
        "model.name=vit_tiny_patch16_224", "model.resolution=32", "model.patch=8", "model.width=64", "model.depth=12",
        "model.heads=2", "model.classes=10", "growth.schedule=original", f"data.lanes={world}", "optimizer.clip=1.0",
        "augment.erase=0", "sharding.precision=fp32", "augment.repeats=1",
    )  # fmt: skip
    return Model("12 tiny layers", overrides, IMAGES * world)


class Clock:
    """Adds up the CPU time of the training thread inside the parts of a step."""

    def __init__(self, patches: ExitStack) -> None:
        self._patches, self._spent = patches, dict[str, float]()
        for name in ("mixed_batch", "drop_rows", "patches_seen"):
            self._watch(loop, name, "input")

    def watch_backend(self, backend: Backend) -> None:
        """Times the parts of a step of `backend`'s current network."""
        for name, part in (("forward", "forward"), ("backward", "backward"), ("update", "norm, clip")):
            self._watch(backend, name, part)
        self._watch(vars(backend)["_adamw"], "step", "AdamW")
        for ema in backend.network.emas:
            self._watch(ema, "update", "EMA")

    def time(self, step: Callable[[Active], None], active: Active) -> Parts:
        """Takes a step."""
        self._spent = dict.fromkeys(PARTS, 0.0)
        began = time.thread_time()
        step(active)
        spent = self._spent
        spent["norm, clip"] -= spent["AdamW"]  # which it calls
        spent["rest"] = time.thread_time() - began - sum(spent.values())
        return spent

    def _watch(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **named)
            self._spent[part] = self._spent.get(part, 0.0) + time.thread_time() - began
            return result

        self._patches.enter_context(mock.patch.object(owner, name, timed))


def row(world: int, name: str, layers: int, found: dict[tuple[str, int], list[list[Parts]]]) -> str:
    """A line of the table."""
    turns = found[name, layers]
    parts = [1e3 * statistics.median(step[part] for turn in turns for step in turn) for part in PARTS]
    seconds, reference = (
        [statistics.median(sum(step.values()) for step in turn) for turn in found.get((engine, layers), turns)]
        for engine in (name, "replicated")
    )
    ratio = statistics.median(own / other for own, other in zip(seconds, reference, strict=True))
    cells = [f"{1e3 * statistics.median(seconds):.1f}", *(f"{part:.1f}" for part in parts), f"{ratio:.2f}"]
    return f"| {world} | {name} | {layers} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
