"""The cells of `benchmarks.gpu`: each measures one thing on this process's device and returns rows of a table."""

import importlib.util
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import scaleprog
from benchmarks.gpu_trainer import (
    DEIT_S,
    FEW,
    LR,
    PRECISIONS,
    TINY,
    VIT_B,
    Bench,
    Model,
    Row,
    Trainer,
    Work,
    model_flops,
    repeat,
    speed,
)
from scaleprog.growth.operators import grow
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import Subnet
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Active
from scaleprog.ranks.coordinator import pin_algorithms
from scaleprog.rundir.checkpoint import Checkpoints, Commit

KERNELS = 12
"""How many kernels a profile names."""


# ---- training


def fitting(bench: Bench, batch: int, measure: Callable[[int], list[Row]]) -> list[Row]:
    """The rows of the largest batch that fits: `batch`, halved as often as the device runs out of memory."""
    while True:
        try:
            return measure(batch)
        except torch.OutOfMemoryError:
            if batch <= FEW:
                raise
        batch //= 2
        bench.free()


def training(bench: Bench, model: Model, what: str = "full", layers: str = "eager", **sharding: Any) -> list[Row]:
    """Rows for the complete network, for every rung of the `ladder`, or for the `supernet`."""

    def measure(batch: int) -> list[Row]:
        trainer, rows = Trainer(bench, model, batch, layers, **sharding), []

        def row() -> Row:
            compiled, precision = layers != "eager", trainer.arithmetic
            return {"precision": precision} | speed(
                bench, trainer.step, batch, trainer.flops(), len(trainer.works), precision, compiled
            )

        if what == "supernet":
            least = trainer.supernet()
            rows = [{"px": "mixed", "layers": "mixed", **row()}]
            trainer.works = [least]
            rows.append({"px": least.subnet.resolution, "layers": f"{least.subnet.depth} of {trainer.depth}", **row()})
            trainer.backend.release()
            return rows
        sizes = trainer.ladder if what == "ladder" else trainer.ladder[:1] if what == "subset" else trainer.ladder[-1:]
        for subnet in sizes:
            (trainer.subset if what == "subset" else trainer.grow)(subnet)
            rows.append({"px": subnet.resolution, "layers": subnet.depth, **row()})
        trainer.backend.release()
        return rows

    return fitting(bench, model.batch, measure)


def bare(bench: Bench, model: Model, compiled: bool = False) -> list[Row]:
    """timm's own model in the loop that one would write by hand."""
    recipe = model.recipe()
    family, full, _ = resolve_family(recipe.model)
    arguments = family.arguments(recipe.model, None) | {"dynamic_img_size": False}

    def measure(batch: int) -> list[Row]:
        network = timm.create_model(**arguments).to(bench.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05, fused=True)
        images = torch.randn(batch, recipe.model.channels, full.resolution, full.resolution, device=bench.device)
        labels = torch.randint(recipe.model.classes, (batch,), device=bench.device)
        forward = torch.compile(network) if compiled else network

        def step(rows: int | None = None, ema: bool = False) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                logits = forward(images[:rows])
            F.cross_entropy(logits.float(), labels[:rows], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()

        row = speed(bench, step, batch, model_flops(family, recipe.model, full), compiled=compiled)
        row["without EMA"] = row["images/s"]
        return [{"px": full.resolution, "layers": full.depth, "precision": "autocast", **row}]

    return fitting(bench, model.batch, measure)


def inputs(bench: Bench, model: Model, **sharding: Any) -> list[Row]:
    """The smallest and the complete network on images from different places, copied as training/loop.py does."""
    trainer, rows = Trainer(bench, model, **sharding), []
    mean, std = (
        torch.tensor(x, device=bench.device).view(-1, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )

    def copied(images: Tensor) -> Tensor:
        there = images.to(bench.device, non_blocking=True)
        return there if there.is_floating_point() else there.float().div_(255).sub_(mean).div_(std)

    for subnet in (trainer.ladder[0], trainer.ladder[-1]):
        trainer.grow(subnet)
        there = trainer.works[0].images
        here = there.cpu()
        floats, bytes_ = here, torch.randint(256, here.shape, dtype=torch.uint8)
        if bench.cuda:
            floats, bytes_ = floats.pin_memory(), bytes_.pin_memory()
        sources = {
            "float32 on the device": there,
            "float32 in pinned memory": floats,
            "uint8 in pinned memory, normalized on the device": bytes_,
            "float32 in pageable memory": here,
        }
        for name, images in sources.items():

            def take(steps: int, images: Tensor = images) -> None:
                for _ in range(steps):
                    trainer.step(images=copied(images))

            take(bench.warm_up)
            times = [bench.seconds(partial(take, bench.window)) / bench.window for _ in range(bench.windows)]
            seconds = statistics.median(times)
            row = {"px": subnet.resolution, "layers": subnet.depth, "input": name, "images/s": trainer.batch / seconds}
            row["step ms"] = 1e3 * seconds
            if images is not there or not bench.cuda:
                alone = [bench.seconds(partial(copied, images)) for _ in range(bench.windows)]
                row |= {"input alone, ms": 1e3 * min(alone), "MB": images.nbytes / 1e6}
            rows.append(row)
    return rows


def operations(bench: Bench, model: Model) -> list[Row]:
    """What `augment.device: accelerator` leaves to the device, on bytes that are there: `tensor_operations.operate`."""
    from scaleprog.data.augment import Augmentation, BatchRequest
    from scaleprog.data.tensor_operations import operate, packed

    recipe, rows = model.recipe(), list[Row]()
    side, channels = resolve_family(recipe.model)[1].resolution, recipe.model.channels
    policies = {
        "RandAugment": {"randaugment": "rand-m9-mstd0.5-inc1"},
        "3-Augment": {"three_augment": True, "color_jitter": 0.3, "randaugment": None},
    }
    for name, policy in policies.items():
        augmentation = Augmentation(recipe.augment.model_copy(update={**policy, "device": "accelerator"}), channels)
        drawn = [draw.operations for draw in augmentation.draws(BatchRequest(0, 0, side), 0, model.batch)]
        images = torch.randint(256, (model.batch, side, side, channels), dtype=torch.uint8, device=bench.device)
        change = partial(operate, images, packed(drawn, augmentation.deferred), augmentation.fill)
        repeat(change, bench.warm_up)
        bench.forget_peak()
        seconds, issued = [], []
        for _ in range(bench.windows):
            seconds.append(bench.seconds(partial(repeat, change, bench.window)) / bench.window)
            began = time.perf_counter()
            change()
            issued.append(time.perf_counter() - began)
        places = Counter[str]()
        with counted_synchronizations(bench, places):
            change()
        row = {
            "px": side,
            "operations": name,
            "images": model.batch,
            "images/s": model.batch / statistics.median(seconds),
        }
        row |= {"ms": 1e3 * statistics.median(seconds), "host ms": 1e3 * statistics.median(issued)}
        waits = places.total() if bench.cuda else "–"
        rows.append({**row, "GiB": bench.memory(peak=True), "synchronizations": waits})
    return rows


# ---- growth and checkpoints


def growth(bench: Bench, model: Model, **sharding: Any) -> list[Row]:
    """`Backend.regrow` from the first rung's depth to the complete model's."""
    rows = []
    for _ in range(bench.windows):
        rows.append(one_growth(bench, Trainer(bench, model, **sharding)))
        bench.free()
    middle = {
        column: statistics.median(row[column] for row in rows) for column in ("s", "next step s", "later steps s")
    }
    return [rows[-1] | {"first s": rows[0]["s"]} | middle]


def one_growth(bench: Bench, trainer: Trainer) -> Row:
    small, full, split = trainer.ladder[0], trainer.ladder[-1], trainer.family.split
    trainer.grow(small)
    repeat(trainer.step, bench.warm_up)
    layer_map = grow("mogrow", split(small.depth), split(full.depth))
    row: Row = {"layers": f"{small.depth} to {full.depth}", "batch": trainer.batch, "before": bench.memory()}
    bench.forget_peak()
    row["s"] = bench.seconds(lambda: trainer.backend.regrow(layer_map, inherit=False, may_skip_layers=False))
    row |= {"peak": bench.memory(peak=True), "after": bench.memory()}
    trainer.works = [Work(full, trainer.images(full.resolution))]
    row["next step s"] = bench.seconds(trainer.step)
    row["later steps s"] = min(bench.seconds(trainer.step) for _ in range(bench.warm_up))
    trainer.backend.release()
    return row


def checkpoint(bench: Bench, model: Model, **sharding: Any) -> list[Row]:
    """Saves of the complete network, with training beside the writing."""
    trainer = Trainer(bench, model, **sharding)
    trainer.grow(trainer.ladder[-1])
    repeat(trainer.step, bench.warm_up)
    alone = statistics.median(bench.seconds(trainer.step) for _ in range(bench.window))
    state = trainer.backend.state()
    size = sum(part.tensor.nbytes for part in state.values())
    stalls, writing, beside = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", bench.coordinator, keep=1)
        for number in range(3):
            if bench.cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            checkpoints.save(number + 1, {}, trainer.backend.state())
            stalls.append(time.perf_counter() - began)
            commits: list[Commit] = []
            while not commits:
                beside.append(bench.seconds(trainer.step))
                commits = checkpoints.finished()
            if commits[0].error:
                raise OSError(commits[0].error)
            writing.append(commits[0].seconds)
    later = statistics.median(stalls[1:])
    row = {
        "tensors": len(state),
        "MB": size / 1e6,
        "first stall s": stalls[0],
        "stall s": later,
        "GB/s": size / later / 1e9,
    }
    steps = {"step ms alone": 1e3 * alone, "beside writing": 1e3 * statistics.median(beside)}
    return [{"engine": trainer.recipe.sharding.engine, **row, "writing s": statistics.median(writing), **steps}]


# ---- synchronizations and kernels


def synchronizations(bench: Bench, model: Model, steps: int = 50, **sharding: Any) -> list[Row]:
    """`train_step` of training/loop.py in the first stage, with Mixup, stochastic depth, and the recorder."""
    from scaleprog.planning.plan import outline

    trainer = Trainer(bench, model, **sharding)
    recipe = trainer.recipe
    phase = outline(recipe, 1000)[1].phases(())[0]
    subnet = phase.candidates[0]
    trainer.grow(subnet)
    with tempfile.TemporaryDirectory() as folder:
        run, take_step = in_a_run(trainer, phase, subnet, Path(folder))

        def take(count: int) -> None:
            for _ in range(count):
                take_step(None)
                if run.state.step % recipe.train.log_every == 0:
                    run.recorder.flush()

        take(recipe.train.log_every)
        places = Counter[str]()

        def watched() -> None:
            with counted_synchronizations(bench, places):
                take(steps)

        seconds = bench.seconds(watched) / steps
        run.recorder.close()
    flushing = sum(count for place, count in places.items() if "recorder.py" in place)
    return [
        {
            "px": subnet.resolution,
            "layers": subnet.depth,
            "engine": recipe.sharding.engine,
            "precision": trainer.arithmetic,
            "images/s": trainer.batch / seconds,
            "step ms": 1e3 * seconds,
            "steps": steps,
            "in the flush": flushing if bench.cuda else "–",
            "elsewhere": places.total() - flushing if bench.cuda else "–",
            "text": "\n".join(f"{count:5} {place}" for place, count in places.most_common()),
        }
    ]


def in_a_run(
    trainer: Trainer, phase: Phase, subnet: Subnet, folder: Path
) -> tuple[Any, Callable[[Active | None], None]]:
    """A stand-in for a run that trains `trainer`'s network on random bytes, and `train_step` of it.

    `train_step` takes the layers that run; None: those of `subnet`.
    """
    # decoders and TensorBoard, which nothing else here needs
    from scaleprog.data.manifest import Manifest
    from scaleprog.data.reader import DataSet
    from scaleprog.data.stream import Layout
    from scaleprog.planning.plan import outline
    from scaleprog.rundir.recorder import Recorder
    from scaleprog.training.loop import train_step

    recipe, coordinator = trainer.recipe, trainer.bench.coordinator
    schedule, lanes = outline(recipe, 1000)[1], recipe.data.lanes // coordinator.world
    layout = Layout(trainer.batch // coordinator.world, subnet.resolution, recipe.model.channels)
    memory = torch.zeros(layout.bytes, dtype=torch.uint8, pin_memory=trainer.bench.cuda)
    batch = layout.batch(memory, subnet.resolution)
    batch.images.random_()
    batch.labels.random_(recipe.model.classes)
    run: Any = SimpleNamespace(  # what train_step reads of a Run
        recipe=recipe,
        plan=SimpleNamespace(
            family=trainer.family,
            schedule=schedule,
            order=SimpleNamespace(steps_per_epoch=1000),
            data=DataSet(Manifest("", (), {}), recipe.data, recipe.augment, recipe.model.channels),
        ),
        backend=trainer.backend,
        coordinator=coordinator,
        reader=SimpleNamespace(lanes=range(coordinator.rank * lanes, (coordinator.rank + 1) * lanes)),
        recorder=Recorder(folder, coordinator, 1, 0, recipe.train.log_every),
        state=SimpleNamespace(step=0, images=0),
        damaged=set(),
    )
    every = schedule.active(phase, subnet)
    return run, lambda active: train_step(run, phase, subnet, active or every, batch, 0.0)


@contextmanager
def counted_synchronizations(bench: Bench, places: Counter[str]) -> Iterator[None]:
    """Counts waits for the device by the line of scaleprog, and the last line of all, that caused them."""
    package = f"{Path(scaleprog.__file__).parent}/"

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if Path(f.filename).name != "warnings.py"]
        ours = next((f for f in reversed(frames) if f.filename.startswith(package)), frames[-1])
        named = [ours] if ours is frames[-1] else [ours, frames[-1]]
        places[" < ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.line}" for f in named)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")


def kernels(bench: Bench, model: Model, what: str, **sharding: Any) -> list[Row]:
    """The kernels of ten steps of the `smallest` or the `full` network, by the device's time."""
    trainer = Trainer(bench, model, **sharding)
    subnet = trainer.ladder[0 if what == "smallest" else -1]
    trainer.grow(subnet)
    repeat(trainer.step, bench.warm_up)
    seconds = bench.seconds(lambda: repeat(trainer.step, bench.window)) / bench.window
    with profile(activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]) as profiler:
        bench.seconds(lambda: repeat(trainer.step, bench.window))
    found = []
    for event in profiler.key_averages():
        if event.is_user_annotation or (bench.cuda and event.device_type == DeviceType.CPU):
            continue
        microseconds = event.self_device_time_total if bench.cuda else event.self_cpu_time_total
        found.append((microseconds / 1e3 / bench.window, event.count / bench.window, event.key))
    busy = sum(ms for ms, _, _ in found)
    lines = [f"{ms:8.3f} ms {ms / busy:6.1%} {count:7.1f} x  {name[:100]}" for ms, count, name in sorted(found)[::-1]]
    row: Row = {"px": subnet.resolution, "layers": subnet.depth, "precision": trainer.arithmetic}
    row |= {"step ms": 1e3 * seconds, "busy ms": busy, "busy": f"{busy / 1e3 / seconds:.0%}"}
    return [{**row, "kernels a step": sum(count for _, count, _ in found), "text": "\n".join(lines[:KERNELS])}]


# ---- which cells there are


@dataclass(frozen=True)
class Cell:
    """One measurement: the table it belongs to, its name, about how many seconds it takes, and what measures it."""

    table: str
    name: str
    estimate: float
    measure: Callable[[Bench], Sequence[Row]]


TRAIN, GROW, SAVE, SYNC, PROFILE, INPUT, OPERATE = (
    "Training steps",
    "A growth",
    "A checkpoint",
    "Synchronizations",
    "Kernels",
    "Input",
    "Operations of the augmentation",
)


def cells(tiny: bool) -> list[Cell]:
    """Every cell, the most telling first."""
    small, base = (TINY, TINY) if tiny else (DEIT_S, VIT_B)
    reference = {"engine": "replicated", "precision": "autocast" if "autocast" in PRECISIONS else "bf16"}
    fsdp = {"engine": "fsdp", "precision": "bf16"}

    def train(model: Model, estimate: float, what: str = "full", layers: str = "eager", **sharding: Any) -> Cell:
        sharding = sharding or reference
        stage = f" {sharding['stage']}" if "stage" in sharding else ""
        form = {"eager": "", "dynamic": ", compiled", "static": ", compiled for each shape"}[layers]
        name = f"{model.title}, {what}, {sharding['engine']}{stage} {sharding['precision']}{form}"
        return Cell(TRAIN, name, estimate, lambda bench: training(bench, model, what, layers, **sharding))

    def cell(
        table: str, model: Model, estimate: float, measure: Callable[..., list[Row]], *rest: Any, **named: Any
    ) -> Cell:
        name = ", ".join([model.title, *rest, named["engine"], named["precision"]])
        return Cell(table, name, estimate, lambda bench: measure(bench, model, *rest, **named))

    def by_hand(model: Model, estimate: float, compiled: bool = False) -> Cell:
        name = f"{model.title}, full, bare timm{', compiled' if compiled else ''}"
        return Cell(TRAIN, name, estimate, lambda bench: bare(bench, model, compiled))

    def pinned(model: Model, estimate: float) -> Cell:
        def measure(bench: Bench) -> list[Row]:
            pin_algorithms()  # for good, so this is the last cell
            return training(bench, model, "full", "eager", **reference)

        return Cell(TRAIN, f"{model.title}, full, replicated autocast, train.deterministic", estimate, measure)

    found = [train(small, 20), by_hand(small, 8), train(small, 45, layers="dynamic"), train(small, 10, **fsdp)]
    if "autocast" in PRECISIONS:
        found += [
            train(small, 10, engine="fsdp", precision="autocast"),
            train(small, 10, engine="replicated", precision="bf16"),
        ]
    found += [
        train(small, 20, "ladder"),
        train(small, 70, "ladder", "dynamic"),
        cell(GROW, small, 15, growth, **reference),
        cell(GROW, small, 15, growth, **fsdp),
        cell(SAVE, small, 15, checkpoint, **reference),
        train(small, 12, "supernet"),
    ]
    if not tiny:
        found += [
            cell(GROW, base, 25, growth, **reference),
            cell(SAVE, base, 35, checkpoint, **reference),
            train(base, 12),
            by_hand(base, 10),
            train(base, 12, **fsdp),
            train(base, 25, "ladder"),
        ]
    found += [
        cell(SYNC, small, 15, synchronizations, **reference),
        cell(SYNC, small, 12, synchronizations, **fsdp),
        cell(PROFILE, small, 12, kernels, "smallest", **reference),
        cell(PROFILE, small, 12, kernels, "full", **reference),
        cell(INPUT, small, 22, inputs, **reference),
        Cell(OPERATE, small.title, 5, lambda bench: operations(bench, small)),
        train(small, 10, "subset"),
        train(small, 18, layers="dynamic", **fsdp),
        train(small, 20, "supernet", "dynamic"),
        train(small, 45, "ladder", "static"),
    ]
    if not tiny:
        found += [train(base, 15, layers="dynamic"), train(base, 25, "ladder", "dynamic")]
    if importlib.util.find_spec("deepspeed") is not None:
        found += [train(small, 12, engine="zero", precision="bf16", stage=stage) for stage in (3, 1)]
    return [
        *found,
        train(small, 20, engine="replicated", precision="fp32"),
        by_hand(small, 30, compiled=True),
        pinned(small, 8),
    ]
