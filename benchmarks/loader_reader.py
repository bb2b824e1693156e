"""The rest of `benchmarks/loader.py`: the whole reader, its waits, threads against processes, and the start-up."""

import json
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.photographs import build_shards
from scaleprog.data.augment import BatchRequest
from scaleprog.data.manifest import Manifest, Shard
from scaleprog.data.order import Order
from scaleprog.data.reader import TRAIN, DataSet, TrainReader
from scaleprog.data.stream import FORK
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe

RECIPE = "configs/imagenet/deit_small_prog_100.yaml"
SIZE = 224
MIB = 2**20
TURNS = 5


def data_set(folder: Path, workers: int) -> DataSet:
    """The photographs in `folder`, not kept in memory."""
    overrides = [f"data.path={json.dumps(str(folder))}", f"data.workers={workers}", "data.cache=0"]
    recipe = Recipe.load(RECIPE, [*overrides, "augment.repeats=1"])
    return DataSet(Manifest.load(folder), recipe.data, recipe.augment, 3)


def order_of(data: DataSet, lanes: int, batch: int) -> Order:
    return Order(tuple(shard.samples for shard in data.manifest.split(TRAIN)), 0, lanes, batch)


def requests_of(order: Order, epochs: int) -> list[BatchRequest]:
    return [BatchRequest(*divmod(step, order.steps_per_epoch), SIZE) for step in range(epochs * order.steps_per_epoch)]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


# ---- the whole reader

SHARDS, PER_SHARD = 5, 1900
"""Shards of about 100 MB."""
LANES, BATCH = 4, 64
WARM, PACED = 3, 10
"""Steps that are not counted, and those that set the pace of the others."""
EDGE_STEPS = 2
"""Steps from the one whose lane begins a shard that count as at its edge."""


def reader(folder: Path, images: int) -> list[str]:
    """CPU seconds per image with 0, 1 and 2 workers, and how long steps wait where a lane begins another shard."""
    build_shards(folder / "large", SHARDS * PER_SHARD, PER_SHARD)
    lines = ["| workers | images/s by the clock | of one | CPU ms per image | of no workers |", "|---|---|---|---|---|"]
    turns = [{workers: epoch_of(folder, workers) for workers in (0, 1, 2)} for _ in range(TURNS)]
    for workers in (0, 1, 2):
        found = [(rate, rate / turn[1][0], cpu, cpu / turn[0][1]) for turn in turns for rate, cpu in [turn[workers]]]
        rate, of_one, cpu, of_none = map(statistics.median, zip(*found))
        lines.append(f"| {workers} | {rate:.0f} | {of_one:.2f} | {cpu:.2f} | {of_none:.0%} |")
    about = (
        f"## The whole reader, {SIZE} px\n\nOne epoch of {SHARDS} shards of about 100 MB in {LANES} lanes, read from "
        f"disk, verified, and decoded; CPU seconds of all processes. Medians of {TURNS} turns and of ratios within one."
    )
    return [about, "\n".join(lines), *waits(folder)]


def epoch_of(folder: Path, workers: int) -> tuple[float, float]:
    """Images per second by the clock, and CPU milliseconds per image, of an epoch."""
    data = data_set(folder / "large", workers)
    order = order_of(data, LANES, BATCH)
    used, began = cpu_seconds(), time.perf_counter()
    with TrainReader(data, order, 0, 0, 1).stream(requests_of(order, 1), SIZE) as batches:
        count = sum(len(batch.labels) for batch in batches)
    return count / (time.perf_counter() - began), 1e3 * (cpu_seconds() - used) / count


def waits(folder: Path) -> list[str]:
    """Waits over three epochs of a consumer that takes 1.5 times as long for a step as one worker."""
    data = data_set(folder / "large", 1)
    order = order_of(data, LANES, BATCH)
    edges = set[int]()
    for epoch in range(3):
        for lane in range(LANES):
            shards = order.lane(epoch, lane)[:: order.per_lane, 0]
            begins = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist()]
            edges |= {epoch * order.steps_per_epoch + step + late for step in begins for late in range(EDGE_STEPS)}
    found: list[float] = []
    with TrainReader(data, order, 0, 0, 1).stream(requests_of(order, 3), SIZE) as batches:
        for _ in range(WARM):
            next(batches)
        began = time.perf_counter()
        for _ in range(PACED):
            next(batches)
        pace = 1.5 * (time.perf_counter() - began) / PACED
        for _ in range(WARM + PACED, 3 * order.steps_per_epoch):
            time.sleep(pace)
            began = time.perf_counter()
            next(batches)
            found.append(1e3 * (time.perf_counter() - began))
    at = [wait for step, wait in enumerate(found, WARM + PACED) if step in edges]
    elsewhere = [wait for step, wait in enumerate(found, WARM + PACED) if step not in edges]
    limits = (1, 5, 20, 100, 500)
    header = "| steps | count | mean ms | median | largest |" + "".join(f" < {limit} ms |" for limit in limits)
    lines = [header, "|---|---|---|---|---|" + "---|" * len(limits)]
    for name, each in ((f"at an edge of a shard, {EDGE_STEPS} steps", at), ("elsewhere", elsewhere)):
        shares = "".join(f" {sum(wait < limit for wait in each) / len(each):.1%} |" for limit in limits)
        summary = f"{statistics.mean(each):.2f} | {statistics.median(each):.2f} | {max(each):.1f}"
        lines.append(f"| {name} | {len(each)} | {summary} |{shares}")
    about = (
        f"Waits for a batch over three epochs with one worker, where a step takes {1e3 * pace:.0f} ms, 1.5 times as "
        "long as the worker needs for its batch:"
    )
    return [about, "\n".join(lines)]


# ---- threads or processes


def workers(folder: Path, images: int) -> list[str]:
    """The same producers in threads of one subprocess and in processes of their own."""
    kinds = [(count, kind) for count in (1, 2) for kind in STARTS]
    turns = [
        {(count, kind): STARTS[kind](folder / "few", count, images) for count, kind in kinds} for _ in range(TURNS)
    ]
    lines = ["| producers | images/s by the clock | CPU ms per image | PSS MiB | first batch after ms |"]
    lines += ["|---|---|---|---|---|"]
    for count, kind in kinds:
        found = Produced(*(statistics.median(column) for column in zip(*(turn[count, kind] for turn in turns))))
        lines.append(
            f"| {count} {kind} | {found.rate:.0f} | {1e3 * found.cpu:.2f} | {found.memory / MIB:.0f} "
            f"| {1e3 * found.begun:.0f} |"
        )
    about = (
        f"## Threads or processes, {SIZE} px\n\nEach producer prepares its own lane. Threads run in one forked "
        f"process; processes are each forked from this one. Medians of {TURNS} turns."
    )
    return [about, "\n".join(lines)]


class Produced(NamedTuple):
    """Images per second by the clock, CPU seconds per image, bytes (PSS), and seconds until all have a first batch."""

    rate: float
    cpu: float
    memory: float
    begun: float


Job = Callable[[Callable[[], object]], None]
"""Produces images; calls its argument when the first batch is there."""


def produce(folder: Path, part: int, parts: int, images: int, ready: Callable[[], object]) -> None:
    """Prepares `images` images of one of `parts` lanes; calls `ready` after the first batch."""
    torch.set_num_threads(1)  # of this thread: a forked process cannot start OpenMP's anew
    data = data_set(folder, 0)
    data = replace(data, settings=data.settings.model_copy(update={"cache": 256}))
    order = order_of(data, parts, 16 * parts)
    requests = requests_of(order, 100)[: images // 16 + 1]
    with TrainReader(data, order, 0, part, parts).stream(requests, SIZE) as batches:
        next(batches)
        ready()
        for _ in batches:
            pass


def in_threads(folder: Path, count: int, images: int) -> Produced:
    return _run([partial(_threads, folder, count, images)], count, images)


def in_processes(folder: Path, count: int, images: int) -> Produced:
    return _run([partial(produce, folder, part, count, images) for part in range(count)], count, images)


STARTS = {"threads": in_threads, "processes": in_processes}


def _threads(folder: Path, count: int, images: int, ready: Callable[[], object]) -> None:
    barrier = threading.Barrier(count, action=lambda: ready())
    threads = [
        threading.Thread(target=produce, args=(folder, part, count, images, barrier.wait)) for part in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run(jobs: list[Job], count: int, images: int) -> Produced:
    """Runs each job in a process; they count from when all of them have a first batch."""
    began = time.perf_counter()
    pairs = [FORK.Pipe() for _ in jobs]
    processes = [FORK.Process(target=_job, args=(job, theirs)) for job, (_, theirs) in zip(jobs, pairs)]
    for process in processes:
        process.start()
    for ours, _ in pairs:
        ours.recv()
    begun = time.perf_counter() - began
    for ours, _ in pairs:
        ours.send(None)
    used = [ours.recv() for ours, _ in pairs]
    clock = time.perf_counter() - began - begun
    for process in processes:
        process.join()
    done = count * (images // 16) * 16
    return Produced(done / clock, sum(cpu for cpu, _ in used) / done, sum(memory for _, memory in used), begun)


def _job(job: Job, pipe: Connection) -> None:
    started = 0.0

    def ready() -> None:
        nonlocal started
        pipe.send(None)
        pipe.recv()
        started = time.process_time()

    job(ready)
    pipe.send((time.process_time() - started, pss()))


def pss() -> int:
    """Bytes of this process's memory, its share of pages that several processes have."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


# ---- start-up

IMAGENET, IMAGENET_SHARDS, RANKS = 1_281_167, 1300, 8


def startup(folder: Path, images: int) -> list[str]:
    """Planning and the reader of each of 8 ranks, forked at the same time, on shards that have only their sizes."""
    root = folder / "sparse"
    sparse(root)
    recipe = Recipe.load(RECIPE, [f"data.path={json.dumps(str(root))}", "model.classes=1000"])
    pairs = [FORK.Pipe(duplex=False) for _ in range(RANKS)]
    began = time.perf_counter()
    ranks = [FORK.Process(target=_rank, args=(recipe, rank, theirs)) for rank, (_, theirs) in enumerate(pairs)]
    for rank in ranks:
        rank.start()
    found = [ours.recv() for ours, _ in pairs]
    clock = time.perf_counter() - began
    for rank in ranks:
        rank.join()
    planning, lanes, memory = (statistics.mean(column) for column in zip(*found))
    return [
        f"## Start-up at {IMAGENET} images in {IMAGENET_SHARDS} shards\n\n{RANKS} ranks at the same time took "
        f"{clock:.1f} s by the clock; on average, planning took each {planning:.2f} CPU seconds, its reader and the "
        f"order of its lanes in the first epoch {lanes:.2f}, and both {memory / MIB:.0f} MiB (growth of the resident "
        "memory)."
    ]


def sparse(root: Path) -> None:
    """A manifest of ImageNet's size, and files that are as long as it says but hold nothing."""
    root.mkdir(parents=True, exist_ok=True)
    per_shard = np.diff(np.linspace(0, IMAGENET, IMAGENET_SHARDS + 1).astype(int)).tolist()
    shards = tuple(
        Shard(f"train-{index:06d}.tar", count, 110_000 * count // 512 * 512, f"{index:064x}")
        for index, count in enumerate(per_shard)
    )
    val = (Shard("val-000000.tar", 50, 5_120_000, "0" * 64),)
    manifest = Manifest(str(root), tuple(map(str, range(1000))), {TRAIN: shards, "val": val}, {})
    for shard in (*shards, *val):
        with open(manifest.path(shard), "wb") as file:
            os.truncate(file.fileno(), shard.bytes)
    manifest.save()


def _rank(recipe: Recipe, rank: int, pipe: Connection) -> None:
    before, began = resident(), time.process_time()
    plan = Plan.of(recipe)
    planned = time.process_time()
    own = TrainReader(plan.data, plan.order, recipe.seed, rank, RANKS)
    rows = [plan.order.lane(0, lane) for lane in own.lanes]
    pipe.send((planned - began, time.process_time() - planned, resident() - before))
    del rows


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS: dict[str, Callable[[Path, int], list[str]]] = {"reader": reader, "workers": workers, "startup": startup}
"""By name: what measures a part and says it in Markdown."""
