"""What a growth costs at DeiT-S size: seconds and bytes between ranks, against saving, loading and then growing.

    python -m benchmarks.regrow [--ranks 2] [--repeats 5] [--out docs/results/regrow.md]

Along the 0.5 Omega ladder (6, 8, 10, 12 layers; weights, AdamW's moments, one EMA, fp32) every network is grown by
MoGrow in two ways, one straight after the other. In place: `Backend.regrow`. By checkpoint: what training has is saved
and awaited (durable, checksummed), let go, verified, read into a new backend and grown there; starting new processes,
which people do on top, is left out, and what is read has just been written. Seconds are those of the slower rank,
medians of the repeats; the ratio is the median of the pairs' ratios: other programs ran on the same cores.

Bytes are counted in a round of their own, where torch dispatches collectives and messages: what all ranks together
send, in rings, with whatever the engine itself does.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaleprog.growth.operators import LayerMap, fresh, grow
from scaleprog.launchers.local import launch
from scaleprog.models import resolve_family
from scaleprog.planning.plan import outline
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.storage import load_tensors
from scaleprog.sharding import Backend
from scaleprog.training.process import make_backend

RECIPE = "configs/imagenet/deit_small_prog_100.yaml"
ENGINES = {
    "fsdp": ["sharding.engine=fsdp"],
    "hsdp, shard 1": ["sharding.engine=hsdp", "sharding.shard=1"],
    "replicated": ["sharding.engine=replicated"],
    **{f"zero {stage}": ["sharding.engine=zero", f"sharding.stage={stage}"] for stage in (1, 2, 3)},
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/regrow.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for engine in ENGINES:
        with tempfile.TemporaryDirectory() as folder:
            launch(options.ranks, measure, engine, options.repeats, Path(folder))
            rows += json.loads((Path(folder) / "rows.json").read_text())
    method = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
    lines = [
        f"Written by `python -m benchmarks.regrow --ranks {options.ranks} --repeats {options.repeats}`.",
        "",
        method,
        "",
        f"{options.ranks} ranks, {os.cpu_count()} CPU cores.",
        "",
        "| engine | layers | bytes moved, MiB | in place, s | by checkpoint, s | of which saving, s | times slower |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += map(line, rows)
    text = "\n".join(lines) + "\n"
    options.out.write_text(text)
    print(text)


def line(row: dict[str, Any]) -> str:
    place, checkpoint, save = (statistics.median(row[key]) for key in ("place", "checkpoint", "save"))
    ratio = statistics.median(slow / fast for slow, fast in zip(row["checkpoint"], row["place"], strict=True))
    sent = f"{row['sent'] / MIB:.1f}" if row["sent"] else "0"
    return (
        f"| {row['engine']} | {row['before']} -> {row['after']} | {sent} | {place:.3f} | {checkpoint:.2f} | {save:.2f} "
        f"| {ratio:.1f} |"
    )


def measure(engine: str, repeats: int, folder: Path) -> None:
    """Climbs the ladder once to count and warm up, then `repeats` times by the clock."""
    warnings.simplefilter("ignore")
    gc.disable()  # as in training, like freeze
    recipe = Recipe.load(RECIPE, ["sharding.precision=fp32", *ENGINES[engine]])
    depths = [subnet.depth for subnet in outline(recipe, 1000)[1].ladder]
    rows: list[dict[str, Any]] = [
        {"engine": engine, "before": before, "after": after, "place": [], "checkpoint": [], "save": []}
        for before, after in itertools.pairwise(depths)
    ]
    with process_group() as (coordinator, device):
        make = partial(make_backend, recipe.sharding.engine, recipe, resolve_family(recipe.model)[0], device)
        make()  # imports the engine
        gc.freeze()
        checkpoints = Checkpoints(folder / "checkpoints", coordinator, keep=1)
        for repeat in range(repeats + 1):
            backend = make()
            backend.regrow(fresh((depths[0],)), inherit=False, may_skip_layers=False)
            for row in rows:
                train(backend)
                growth = grow("mogrow", (row["before"],), (row["after"],))
                if repeat == 0:
                    with Sent() as sent:
                        backend.regrow(growth, inherit=False, may_skip_layers=False)
                    row["sent"] = round(coordinator.total([float(sent.bytes)])[0])
                    continue
                holder = [backend]
                del backend
                backend, seconds = grow_both_ways(holder, growth, make, checkpoints, row["before"])
                for key, value in seconds.items():
                    row[key].append(value)
            backend.release()
            del backend
            gc.collect()
        if coordinator.rank == 0:
            (folder / "rows.json").write_text(json.dumps(rows))


def train(backend: Backend) -> None:
    """Two small steps, in which engines make what they make late."""
    for _ in range(2):
        logits = backend.forward(torch.randn(2, 3, 64, 64, device=backend.device))
        backend.backward(F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device=backend.device)))
        backend.step(1e-4, step=0)


def grow_both_ways(
    holder: list[Backend], growth: LayerMap, make: Callable[[], Backend], checkpoints: Checkpoints, step: int
) -> tuple[Backend, dict[str, float]]:
    """Grows the network that `holder` is emptied of by checkpoint and in place; a grown backend, and the seconds."""
    backend = holder.pop()
    structure = backend.structure

    def read() -> Backend:
        path = checkpoints.at(step)
        backend = make()
        backend.restore(structure, False, partial(load_tensors, path))
        return backend

    clock = Clock(checkpoints.coordinator)
    checkpoints.save(step, {}, backend.state())
    checkpoints.wait()
    save = clock.read()
    assert not any(commit.error for commit in checkpoints.finished())
    backend.release()
    del backend  # its process would have ended
    gc.collect()
    clock = Clock(checkpoints.coordinator)
    backend = read()
    backend.regrow(growth, inherit=False, may_skip_layers=False)
    loaded = clock.read()
    backend.release()
    del backend
    gc.collect()
    backend = read()
    train(backend)
    gc.collect()
    clock = Clock(checkpoints.coordinator)
    backend.regrow(growth, inherit=False, may_skip_layers=False)
    place = clock.read()
    gc.collect()
    return backend, {"place": place, "checkpoint": save + loaded, "save": save}


class Clock:
    """Seconds since all ranks were here, on the slowest of them."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        coordinator.barrier()
        self.began = time.perf_counter()

    def read(self) -> float:
        return self.coordinator.maximum([time.perf_counter() - self.began])[0]


class Sent(TorchDispatchMode):
    """Adds up the bytes that this rank sends: messages as they are, collectives as rings do them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition(".")[0].partition("::")
        if "c10d" in space and not name.startswith(("recv", "barrier", "wait", "monitored")):
            whole = max((t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), default=0)
            group = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.ScriptObject)), None)
            ranks = dist.ProcessGroup.unbox(group).size() if group is not None else dist.get_world_size()
            rounds = {"send": ranks, "broadcast_": ranks, "allreduce_": 2 * (ranks - 1)}.get(name, ranks - 1)
            self.bytes += whole * rounds / ranks if ranks > 1 else 0
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
