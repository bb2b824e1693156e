"""What the cells of `benchmarks.gpu` time: networks that train on random images, through the engines of scaleprog."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scaleprog.growth.operators import fresh, grow
from scaleprog.growth.phase import Phase
from scaleprog.growth.schedule import rungs
from scaleprog.growth.space import GrowthSpace, Subnet
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Active, ElasticModel, Structure, draw_patches
from scaleprog.planning.devices import PEAKS
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings, ShardingSettings
from scaleprog.sharding import engine

Row = dict[str, Any]
"""A row of a table, by column."""
RECIPE = Path(__file__).parents[1] / "configs/imagenet/deit_small_prog_100.yaml"
PRECISIONS = get_args(ShardingSettings.model_fields["precision"].annotation)
LR = 1e-4
FEW = 8
"""Images of a step so short that the host, not the device, sets its time."""


@dataclass(frozen=True)
class Model:
    """A model to measure. Its title, how it differs from RECIPE, and the images of a step."""

    title: str
    overrides: tuple[str, ...]
    batch: int

    def recipe(self, **sharding: Any) -> Recipe:
        """The recipe that trains it, sharded as given."""
        settings = [f"sharding.{key}={str(value).lower()}" for key, value in sharding.items()]
        return Recipe.load(RECIPE, [*self.overrides, f"train.batch={self.batch}", *settings])


DEIT_S = Model("DeiT-S", ("data.lanes=32",), 256)
VIT_B = Model("ViT-B", ("model.name=vit_base_patch16_224", "data.lanes=16"), 128)
TINY = Model(
    "tiny ViT",
    ("model.name=vit_tiny_patch16_224", "model.resolution=32", "model.patch=8", "model.width=32", "model.depth=4",
     "model.heads=2", "model.classes=4", "growth.stages=3", "growth.resolution_multiple=8", "data.lanes=1"),
    FEW,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where and how long the cells measure."""

    coordinator: Coordinator
    device: torch.device
    tiny: bool = False

    @property
    def warm_up(self) -> int:
        """Steps before anything is timed."""
        return 1 if self.tiny else 3

    @property
    def window(self) -> int:
        """Steps that are timed together."""
        return 2 if self.tiny else 10

    @property
    def windows(self) -> int:
        """Windows whose median counts."""
        return 1 if self.tiny else 3

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def seconds(self, action: Callable[[], object]) -> float:
        """Seconds from the start of `action` on an idle device until the device has finished it."""
        if not self.cuda:
            began = time.perf_counter()
            action()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        action()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000

    def memory(self, peak: bool = False) -> str:
        """GiB that torch's allocator has given out / has reserved, now or at most since `forget_peak`."""
        if not self.cuda:
            return "–"
        statistic = "peak" if peak else "current"
        found = torch.cuda.memory_stats()
        return " / ".join(f"{found[f'{kind}_bytes.all.{statistic}'] / 2**30:.2f}" for kind in ("allocated", "reserved"))

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def free(self) -> None:
        """Frees what the last measurement left."""
        gc.collect()
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Work:
    """What a step trains: all or some layers, on images of one size."""

    subnet: Subnet
    images: Tensor
    active: Active | None = None
    kept: Tensor | None = None


class Trainer:
    """A network that trains on the same random images again and again, as training/loop.py would."""

    def __init__(
        self, bench: Bench, model: Model, batch: int | None = None, layers: str = "eager", **sharding: Any
    ) -> None:
        """`layers`: eager, dynamic (`sharding.compile`), or static (compiled for one shape)."""
        self.bench, self.layers, self.batch = bench, layers, batch or model.batch
        self.recipe = recipe = model.recipe(compile=layers == "dynamic", **sharding)
        self.family, full, stride = resolve_family(recipe.model)
        self.ladder = rungs(recipe.growth, full, stride)[1]
        backend = engine(recipe.sharding.engine)
        self.backend = backend(
            self.family, recipe.model, recipe.optimizer, recipe.ema, recipe.sharding, bench.device, recipe.seed
        )
        self.labels = torch.randint(recipe.model.classes, (self.batch,), device=bench.device)
        self.depth, self.taken = 0, 0
        self.works: list[Work] = []

    def grow(self, subnet: Subnet, may_skip_layers: bool = False) -> None:
        """Builds the network of `subnet`, or grows the present one into it; it then trains as a whole."""
        split = self.family.split
        layer_map = grow("mogrow", split(self.depth), split(subnet.depth)) if self.depth else fresh(split(subnet.depth))
        self.backend.regrow(layer_map, inherit=False, may_skip_layers=may_skip_layers)
        self.depth = subnet.depth
        if self.layers == "static":
            for layer in chain.from_iterable(self.backend.network.model.groups()):
                layer.forward = torch.compile(layer.forward, dynamic=False)
        self.works = [Work(subnet, self.images(subnet.resolution))]

    def supernet(self) -> Work:
        """Builds the complete network; each step trains a candidate that the paper's first search may draw.

        Returns the work of the smallest candidate.
        """
        candidates = GrowthSpace.of(self.ladder).candidates(None, "window")
        phase = Phase(1, "supernet", 0, 1, 0, candidates, candidates[0].depth)
        self.grow(phase.network, may_skip_layers=True)
        images = {size: self.images(size) for size in sorted({s.resolution for s in candidates})}
        operator, split = self.recipe.growth.operator, self.family.split
        works = {s: Work(s, images[s.resolution], phase.active(s, operator, split)) for s in candidates}
        self.works = [works[phase.subnet(self.recipe.seed, step)] for step in range(2 * len(candidates))]
        return works[candidates[0]]

    def subset(self, subnet: Subnet) -> None:
        """Builds the network of `subnet`, which sees as many patches as in its images, but of the largest images."""
        self.grow(subnet)
        largest, patch = self.ladder[-1].resolution, resolve_family(self.recipe.model)[2]
        count, total = (subnet.resolution // patch) ** 2, (largest // patch) ** 2
        kept = draw_patches(count, total, range(self.batch), 1, 0).to(self.bench.device)
        self.works = [Work(subnet, self.images(largest), kept=kept)]

    def images(self, side: int) -> Tensor:
        return torch.randn(self.batch, self.recipe.model.channels, side, side, device=self.bench.device)

    def step(self, rows: int | None = None, ema: bool = True, images: Tensor | None = None) -> None:
        """One optimizer step on the first `rows` images (None: all of them); `images` replace the random ones."""
        work, backend = self.works[self.taken % len(self.works)], self.backend
        images = work.images if images is None else images
        kept = None if work.kept is None else work.kept[:rows]
        logits = backend.forward(images[:rows], work.active, None, kept)
        backend.backward(F.cross_entropy(logits.float(), self.labels[:rows], label_smoothing=0.1))
        if ema:
            backend.step(LR, self.taken)
        else:
            backend.update(LR)
        self.taken += 1

    def flops(self) -> float:
        """Model FLOPs of an image, forward and backward, in the mean over the steps."""
        counts = [model_flops(self.family, self.recipe.model, work.subnet) for work in self.works]
        return statistics.mean(counts)

    @property
    def arithmetic(self) -> str:
        precision = self.recipe.sharding.precision
        if precision == "bf16" and self.recipe.sharding.engine == "replicated" and "autocast" not in PRECISIONS:
            return "autocast"
        return precision


@cache
def model_flops(family: type[ElasticModel], model: ModelSettings, subnet: Subnet) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = family(model, Structure.plain(family.split(subnet.depth)))
        network(torch.empty(1, model.channels, subnet.resolution, subnet.resolution)).sum().backward()
    return counter.get_total_flops()


def repeat(action: Callable[[], object], times: int) -> None:
    for _ in range(times):
        action()


# ---- speed


def speed(
    bench: Bench,
    step: Callable[..., None],
    batch: int,
    flops: float,
    rounds: int = 1,
    precision: str = "autocast",
    compiled: bool = False,
) -> Row:
    """Times steps of `batch` images, in windows of whole rounds of `rounds` different steps."""
    graphs, window = graphs_built(), rounds * max(1, bench.window // rounds)

    def times(steps: int, ema: bool) -> float:
        return bench.seconds(lambda: repeat(partial(step, ema=ema), steps))

    warm_up = times(max(bench.warm_up, rounds), ema=True)
    bench.forget_peak()
    seconds = statistics.median(times(window, ema=True) for _ in range(bench.windows)) / window
    memory = bench.memory(peak=True)
    plain = statistics.median(times(window, ema=False) for _ in range(bench.windows)) / window
    row: Row = {"batch": batch, "images/s": batch / seconds, "without EMA": batch / plain}
    if bench.name in PEAKS and precision != "fp32":
        row["MFU"] = f"{batch * flops / seconds / PEAKS[bench.name]:.1%}"
    row |= {
        "step ms": 1e3 * seconds,
        "host ms": 1e3 * host_seconds(bench, step, batch if compiled else FEW),
        "GiB": memory,
    }
    if compiled:
        row |= {
            "compile s": max(0.0, warm_up - max(bench.warm_up, rounds) * seconds),
            "graphs": graphs_built() - graphs,
        }
    return row


def host_seconds(bench: Bench, step: Callable[..., None], rows: int) -> float:
    """Seconds in which the host issues a step, on an idle device."""
    found = []
    for _ in range(bench.warm_up + bench.window // 2):
        if bench.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(rows=rows)
        found.append(time.perf_counter() - began)
    return statistics.median(found[bench.warm_up :])


def graphs_built() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
