"""What an engine takes of a rank's memory, in a step and while it grows, against its theory.

    python -m benchmarks.memory [--out docs/results/memory.md]

Each rank trains a DeiT-S of 6 layers, grows it by MoGrow to 12 and trains on, with two EMAs, in fp32, on the CPU. What
an engine holds is what the C library has given out (mallinfo2) beyond what it had before the engine was made: tensors,
whoever refers to them, and whatever else there is; a rehearsal on a tiny model has loaded what is loaded once. It is
read after a collection of garbage, between backward and step, when activations are gone and gradients are there. The
second count, live tensors, is of the storages of all tensors that Python's garbage collector can see.

The peak of a growth adds up, allocation by allocation, what torch's allocator reports to its profiler; what is let go
of the old network meanwhile, whose sizes it does not know, is not taken off.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from scaleprog.growth.operators import fresh, grow
from scaleprog.launchers.local import launch
from scaleprog.models import resolve_family
from scaleprog.models.cost import units
from scaleprog.planning.cost_model import FP32, lasting_buffers, state_memory
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe.keys import ModelSettings, ShardingSettings
from scaleprog.sharding import Backend
from tests.distributed import ranks

MODEL = ModelSettings(name="deit_small_patch16_224", resolution=224)
BEFORE, AFTER = 6, 12
EMAS = 2
ENGINES: dict[str, dict[str, Any]] = {
    "replicated": {"engine": "replicated"},
    "fsdp": {"engine": "fsdp"},
    "hsdp, shard 2": {"engine": "hsdp", "shard": 2},
    **{f"zero {stage}": {"engine": "zero", "stage": stage} for stage in (1, 2, 3)},
}
THEORY = {
    "replicated": "weights, gradients, two moments, EMAs; while ranks average them, the gradients again",
    "fsdp": "all of them spread over the ranks, first dimensions rounded up",
    "hsdp, shard 2": "all of them spread over two ranks",
    "zero 1": "weights and gradients whole; fp32 weights of its own, two moments and EMAs spread; one reduction bucket",
    "zero 2": "weights whole; gradients, fp32 weights of its own, two moments and EMAs spread",
    "zero 3": "weights, gradients, fp32 weights of its own, two moments and EMAs spread; one reduction bucket",
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [row for world in options.worlds for row in measured(world)]
    method = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
    text = "\n".join(["Written by `python -m benchmarks.memory`.", "", method, "", *tables(rows)]) + "\n"
    options.out.write_text(text)
    print(text)


def measured(world: int) -> list[dict[str, Any]]:
    """Rank 0's figures for every engine that runs on so many ranks, in bytes, with the theory beside them."""
    names = [name for name, sharding in ENGINES.items() if sharding.get("shard", 0) < world]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        launch(world, measure, names, out)
        rows = json.loads(out.read_text())
    network = units(resolve_family(MODEL)[0], MODEL, AFTER)
    for row in rows:
        settings = ShardingSettings.model_validate(ENGINES[row["engine"]])
        row["world"], row["buffers"] = world, lasting_buffers(network, settings, world)
        row["theory"] = state_memory(network, settings, EMAS, world, world).state
        row["layer"] = FP32 * sum(math.prod(shape) for shape in network[-1])
    return rows


def measure(names: list[str], out: Path) -> None:
    warnings.simplefilter("ignore")
    gc.disable()  # as in training
    with process_group() as (coordinator, device):
        rows = []
        for name in names:
            figures = {}
            for model, before, after in ((ranks.MODEL, 3, 4), (MODEL, BEFORE, AFTER)):
                figures = live(ENGINES[name], model, before, after, device, coordinator)
            rows.append({"engine": name, **figures})
        if coordinator.rank == 0:
            out.write_text(json.dumps(rows))


def live(
    sharding: dict[str, Any], model: ModelSettings, before: int, after: int, device: torch.device, of: Coordinator
) -> dict[str, int]:
    """Bytes that one engine holds in its life, and at most while it grows."""
    gc.collect()
    nothing, no_tensors = given_out(), ranks.live_tensors()
    backend = ranks.make(sharding, device, model)
    backend.regrow(fresh((before,)), inherit=False, may_skip_layers=False)
    backpropagate(backend, model, device)
    backend.step(1e-3, step=0)
    gc.collect()
    old = given_out() - nothing
    of.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        backend.regrow(grow("mogrow", (before,), (after,)), inherit=False, may_skip_layers=False)
    growth = ranks.most_held(profiler)
    del profiler
    gc.collect()
    new = given_out() - nothing
    for repeat in range(2):
        backpropagate(backend, model, device)
        if repeat:
            gc.collect()
            held, tensors = given_out() - nothing, ranks.live_tensors() - no_tensors
        backend.step(1e-3, step=0)
    backend.release()
    return {"old": old, "new": new, "growth": growth, "held": held, "tensors": tensors}


def backpropagate(backend: Backend, model: ModelSettings, device: torch.device) -> None:
    pixels = resolve_family(model)[1].resolution
    logits = backend.forward(torch.randn(2, model.channels, pixels, pixels, device=device))
    backend.backward(F.cross_entropy(logits.float(), torch.zeros(2, dtype=torch.long, device=device)))


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def given_out() -> int:
    """Bytes that malloc has given out to this process, in all arenas and by mmap."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the two tables."""
    lines = [
        f"A step of {AFTER} layers, rank 0, MiB. Theory: `scaleprog plan --world`'s arithmetic (`cost_model.py`).",
        "",
        "| engine | ranks | theory: state | its lasting buffers | held | held / theory | live tensors |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theory = row["theory"] + row["buffers"]
        lines.append(
            f"| {row['engine']} | {row['world']} | {row['theory'] / MIB:.1f} | {row['buffers'] / MIB:.1f} "
            f"| {row['held'] / MIB:.1f} | {row['held'] / theory:.3f} | {row['tensors'] / MIB:.1f} |"
        )
    lines += ["", *(f"- {name}: {text}." for name, text in THEORY.items())]
    lines += [
        "",
        f"A growth from {BEFORE} to {AFTER} layers, rank 0, MiB. Peak: what was held before, and the most that was "
        "allocated on top at any moment of it.",
        "",
        "| engine | ranks | held before | held after | peak | peak / (before + after) | above, in layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        both, peak = row["old"] + row["new"], row["old"] + row["growth"]
        lines.append(
            f"| {row['engine']} | {row['world']} | {row['old'] / MIB:.1f} | {row['new'] / MIB:.1f} "
            f"| {peak / MIB:.1f} | {peak / both:.3f} | {max(0, peak - both) / row['layer']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
