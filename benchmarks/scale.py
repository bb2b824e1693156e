"""What the control path of a run costs rank 0 as the number of ranks grows, on one machine.

    python -m benchmarks.scale [--worlds 8,64,512,4096] [--threads 64] [--out docs/results/scale.md]

For each number of ranks, one process pretends to be rank 0 of a DeiT-S under fsdp: its process group is torch's fake
one, whose collectives return at once and nothing true, except that a gather returns what every rank would say. So this
is the time and memory of rank 0 itself, without the network. The agreement is also timed on threads that do exchange
values.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.fake_pg import FakeStore

from scaleprog.growth.operators import fresh, grow
from scaleprog.planning.devices import Device
from scaleprog.planning.plan import forecast, outline
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.ranks.stop import Agreement, Watch
from scaleprog.recipe import Recipe
from scaleprog.recipe.worlds import Worlds
from scaleprog.rundir.recorder import Recorder, StepTimer
from scaleprog.rundir.storage import MANIFEST, Manifest, Stored, load_tensors, publish, verify, write_tensors
from scaleprog.rundir.tensorfile import NAMES
from scaleprog.sharding import Backend
from scaleprog.sharding.placement import LocalSlice, held_by, share_out
from scaleprog.training.process import make_backend

RECIPE = "configs/imagenet/deit_small_autoprog_100.yaml"
STEPS = 200
DEPTHS = 6, 12
BOUND = (
    "A growth on 4,096 ranks took 5.7 s while torch's FSDP2 made an empty tensor of every parameter for each rank that "
    "gets none of its rows; now it makes one for all of them (`sharding/fsdp.py`). Who writes what is exchanged in the "
    "first save of a start and after a growth; it took 9.8 s on 4,096 ranks while they exchanged the names with the "
    "numbers."
)


class Clock:
    """CPU seconds by what took them, which other programs do not lengthen, and the most memory so far in MiB."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.found[what] = time.process_time() - began
        self.found["memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Crowd:
    """Stands in for the other ranks in a gather, which then returns `said` of them."""

    def __init__(self) -> None:
        self.said: Sequence[bytes] = ()

    def all_gather(self, outputs: list[Tensor], own: Tensor, group: object = None) -> None:
        for output, text in zip(outputs, self.said, strict=True):
            if own.dtype == torch.int64:
                output.fill_(len(text))
            else:
                output.copy_(torch.frombuffer(bytearray(text.ljust(len(output))), dtype=torch.uint8))

    def say(self, values: Sequence[Any]) -> None:
        """What each rank will say in the next gathers."""
        self.said = [json.dumps(value).encode() for value in values]


def measure(world: int, folder: Path) -> dict[str, float]:
    """Seconds of rank 0 of `world` ranks, by what takes them, and MiB."""
    clock, crowd, recipe = Clock(), Crowd(), recipe_for(world)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    dist.all_gather = crowd.all_gather
    coordinator = Coordinator()
    with clock("plan"):
        family, _ = outline(recipe, 1000)
        forecast(recipe, world, Device.named("h100"))
    crowd.say([f"node-{rank // 8:05d}" for rank in range(world)])
    with clock("start"):
        coordinator.verify("recipe", recipe.dump())
        coordinator.decide("lease", lambda: {"generation": 1})
        coordinator.gather("node-00000")
        recorder = Recorder(folder, coordinator, 1, 0, 20)
    with Watch(coordinator, print, lambda: None, every_minutes=10) as watch, clock("agreement, a step"):
        for _ in range(STEPS):
            watch.agree()
    for step in range(20):
        timer = StepTimer(torch.device("cpu"))
        timer.stop()
        row = {"step": step + 1, "images": 1, "data_wait_seconds": 0.0, "lr": 0.1}
        recorder.step(row, torch.tensor(1.0), torch.tensor(1.0), timer, torch.tensor([0]))
    with clock("metrics of 20 steps"):
        recorder.flush()
    recorder.close()
    backend = make_backend("fsdp", recipe, family, torch.device("cpu"))
    with clock("first network"):
        backend.regrow(fresh(family.split(DEPTHS[0])), inherit=False, may_skip_layers=False)
    with clock("growth"):
        backend.regrow(grow("mogrow", *map(family.split, DEPTHS)), inherit=True, may_skip_layers=False)
    checkpoint(world, folder, backend, coordinator, crowd, clock)
    clock.found["agreement, a step"] /= STEPS
    return clock.found


def checkpoint(
    world: int, folder: Path, backend: Backend, coordinator: Coordinator, crowd: Crowd, clock: Clock
) -> None:
    """A save, and a resume on half as many ranks. The parts of other ranks' files are written, but not timed."""
    temporary, final = folder / ".step-00000001.1.writing", folder / "step-00000001"
    temporary.mkdir()
    parts = backend.state()
    crowd.say([held(backend, parts, rank) for rank in range(world)])
    with clock("first save: who writes what"):
        sizes = {name: part.numel for name, part in parts.items()}
        chunks = share_out(sizes, coordinator.gather(held_by(parts)))
    files = [write_tensors(temporary, rank, tensors) for rank, tensors in enumerate(tensors_of(parts, chunks, world))]
    crowd.say(files)
    with clock("save: manifest"):
        written = {name: tuple(file) for each in coordinator.gather(files[0]) for name, file in each.items()}
        tensors = {name: Stored(NAMES[part.tensor.dtype], part.numel, chunks[name]) for name, part in parts.items()}
        publish(temporary, final, Manifest("0" * 32, 1, False, {}, {}, written, tensors))
    clock.found["manifest, MiB"] = (final / MANIFEST).stat().st_size / 2**20
    with clock("resume: verify"):
        verify(final)
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world // 2)
    fewer = make_backend("fsdp", recipe_for(world), type(backend.network.model), torch.device("cpu"))
    fewer.regrow(fresh(type(backend.network.model).split(DEPTHS[1])), inherit=False, may_skip_layers=False)
    with clock("resume: read"):
        load_tensors(final, fewer.state())
    dist.destroy_process_group()


def held(backend: Backend, parts: dict[str, LocalSlice], rank: int) -> list[int]:
    """What a rank holds, as `held_by` would say there."""
    found: list[int] = []
    for name, part in parts.items():
        placement = backend.network.placements.get(name.partition("/")[2])
        own = range(part.numel) if name.startswith("step/") or placement is None else placement.local(rank)
        found += own.start, len(own)
    return found


def tensors_of(
    parts: dict[str, LocalSlice], chunks: dict[str, tuple[tuple[int, int], ...]], world: int
) -> list[dict[str, Tensor]]:
    """For every rank, zeros in the form of what it saves."""
    found: list[dict[str, Tensor]] = [{} for _ in range(world)]
    for name, stretches in chunks.items():
        for rank, length in stretches:
            found[rank][name] = torch.zeros(length, dtype=parts[name].tensor.dtype)
    return found


def recipe_for(world: int) -> Recipe:
    """A recipe that `world` ranks can train."""
    lanes, batch = Worlds.of(Recipe.load(RECIPE)).fitted(world)
    return Recipe.load(RECIPE, [f"data.lanes={lanes}", f"train.batch={batch}", "data.path=nowhere"])


# ---- the agreement on threads


def agree_on_threads(threads: int) -> dict[str, float]:
    """Seconds of a step's agreement on so many ranks that exchange values, one of which is asked to stop."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store, stopped, seconds = dist.HashStore(), [0] * threads, [0.0] * threads

    def rank_of(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=threads, store=store)
        watch, steps = Watch(Coordinator(), print, lambda: None), 0
        began = time.perf_counter()
        while True:
            steps += 1
            if rank == threads - 1 and steps == 20:
                watch._signal = 15  # as if the signal had come
            if watch.agree() != Agreement():
                break
        stopped[rank], seconds[rank] = steps, (time.perf_counter() - began) / steps
        dist.destroy_process_group()

    workers = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    if len(set(stopped)) != 1:
        raise AssertionError(f"the ranks stopped after different steps: {sorted(set(stopped))}")
    return {"steps until all stopped": stopped[0], "seconds a step": max(seconds)}


# ---- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="8,64,512,4096")
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale.md"))
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory() as folder:
            found = (
                agree_on_threads(options.threads)
                if options.child == "threads"
                else measure(int(options.child), Path(folder))
            )
        print(json.dumps(found))
        return
    worlds = [int(world) for world in options.worlds.split(",")]
    columns = [child(str(world), options.threads) for world in worlds]
    threads = child("threads", options.threads)
    lines = [
        "Written by `python -m benchmarks.scale`.",
        "",
        " ".join((__doc__ or "").split("\n\n")[-1].split()),
        "",
        f"CPU seconds of rank 0, on one of {os.cpu_count()} cores, unless a row says otherwise.",
        "",
        "| ranks | " + " | ".join(f"{world:,}" for world in worlds) + " |",
        "|---" * (len(worlds) + 1) + "|",
    ]
    lines += [f"| {what} | " + " | ".join(f"{column[what]:.3g}" for column in columns) + " |" for what in columns[0]]
    lines += [
        "",
        f"The agreement on {options.threads} threads, each a rank, of torch's threaded process group: "
        f"{1000 * threads['seconds a step']:.3g} ms a step; one rank was asked to stop in step 20, and all ranks "
        f"stopped after step {threads['steps until all stopped']}.",
    ]
    lines += ["", BOUND]
    text = "\n".join(lines) + "\n"
    options.out.write_text(text)
    print(text)


def child(what: str, threads: int) -> dict[str, float]:
    """What a process of its own measures, so that each has a peak of memory of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--child", what, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
