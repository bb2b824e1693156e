"""What the ranks of the distributed tests run; results go to files that the tests read."""

import errno
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C._profiler import _ExtraFields_Allocation
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scaleprog.rundir.checkpoint
from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.growth.phase import active_layers
from scaleprog.models import resolve_family
from scaleprog.models.cost import units
from scaleprog.models.elastic import drop_scales
from scaleprog.planning.cost_model import state_memory, traffic
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe.keys import EmaSettings, ModelSettings, OptimizerSettings, ShardingSettings
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.storage import load_tensors
from scaleprog.sharding import Backend, engine
from scaleprog.sharding.placement import LocalSlice

MODEL = ModelSettings(name="vit_tiny_patch16_224", classes=10, channels=1, resolution=28, patch=4, width=32, depth=8,
                      heads=2, drop_path=0.1)  # fmt: skip
BATCH = 8


def make(sharding: dict[str, Any], device: torch.device, model: ModelSettings = MODEL) -> Backend:
    settings = ShardingSettings.model_validate(sharding)
    optimizer, ema = OptimizerSettings(clip=1.0), EmaSettings(momenta=(0.9, 0.5))
    return engine(settings.engine)(resolve_family(model)[0], model, optimizer, ema, settings, device, seed=0)


class Trainer:
    """Trains a backend on fixed random images, each rank on its rows in micro-batches; keeps losses and norms."""

    def __init__(self, backend: Backend, coordinator: Coordinator, micro_batches: int = 1) -> None:
        self.backend, self.coordinator, self.micro_batches = backend, coordinator, micro_batches
        self.record: list[float] = []
        self.step = 0
        self.generator = torch.Generator().manual_seed(1)

    def train(self, steps: int, actives: list, resolution: int) -> None:
        mine = torch.arange(BATCH).chunk(self.coordinator.world)[self.coordinator.rank].chunk(self.micro_batches)
        depth = sum(self.backend.structure.depths)
        for i in range(steps):
            images = torch.randn(BATCH, 1, resolution, resolution, generator=self.generator)
            labels = torch.randint(0, 10, (BATCH,), generator=self.generator)
            drop = drop_scales(torch.linspace(0, 0.1, depth), BATCH, 0, self.step)
            total = 0.0
            for rows in mine:
                logits = self.backend.forward(images[rows], actives[i % len(actives)], drop[:, :, rows])
                loss = F.cross_entropy(logits, labels[rows]) / self.micro_batches
                self.backend.backward(loss)
                total += loss.item()
            norm = self.backend.step(1e-3, self.step)
            self.record += [self.coordinator.mean([total])[0], float(norm)]
            self.step += 1

    def infer(self, active: tuple, resolution: int) -> None:
        """The logits' sum on each EMA and on the online weights."""
        images = torch.randn(BATCH, 1, resolution, resolution, generator=self.generator)
        for ema in (0, 1, None):
            with self.backend.weights(ema):
                self.record.append(float(self.backend.forward(images, active).square().mean()))


@contextmanager
def nothing_pickled() -> Iterator[None]:
    """Inside, a collective of torch's that would unpickle what other ranks send is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an object is pickled for other ranks")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_object_to_tensor", "_tensor_to_object"):
            patch.setattr(dist.distributed_c10d, name, refuse)
        yield


def whole_lives(shardings: list[dict[str, Any]], out: Path) -> None:
    """A network's life under one engine after the other; what they recorded, in that order."""
    with nothing_pickled(), process_group() as (coordinator, device):
        lives = [whole_timeline(make(sharding, device), coordinator) for sharding in shardings]
        if coordinator.rank == 0:
            out.write_text(json.dumps(lives))


def whole_timeline(backend: Backend, coordinator: Coordinator) -> dict[str, Any]:
    """Every operator in turn, supernets with skipped layers, inference on EMAs in between, recycling at the end."""
    trainer = Trainer(backend, coordinator, micro_batches=2)
    backend.regrow(fresh((3,)), inherit=False, may_skip_layers=False)
    trainer.train(3, [None], 16)
    for operator, depth in (
        ("mogrow", 4),
        ("interpolation", 5),
        ("identity", 6),
        ("stacking", 7),
        ("rand_init", 8),
    ):
        base = backend.structure.depths[0]
        backend.regrow(grow(operator, (base,), (depth,)), inherit=operator != "stacking", may_skip_layers=True)
        actives = [(active_layers(operator, base, depth, d),) for d in range(base, depth + 1)]
        trainer.train(3, actives, 20)
        trainer.infer(actives[0], 24)
        trainer.train(2, actives, 20)
    backend.regrow(keep(actives[0]), inherit=True, may_skip_layers=False)
    trainer.train(2, [None], 28)
    return {"record": trainer.record, "ema": sums_of_ema(backend, 1)}


def sums_of_ema(backend: Backend, number: int) -> dict[str, float]:
    """The sum of the absolute weights of each tensor of an EMA."""
    sums = {}
    for name, part in backend.state().items():
        if name.startswith(f"ema.{number}/"):
            total = part.tensor.double().abs().sum()
            if backend.group is not None:
                dist.all_reduce(total, group=backend.group)
            sums[name] = float(total)
    return sums


def regrow_traffic(out: Path) -> None:
    """Collectives that a training step and a growth issue, counted where torch dispatches them."""
    with process_group() as (coordinator, device):
        backend = make({"engine": "fsdp"}, device)
        backend.regrow(fresh((4,)), inherit=False, may_skip_layers=False)
        trainer = Trainer(backend, coordinator)
        with CommDebugMode() as step:
            trainer.train(1, [None], 28)
        growths = {}
        for operator, depth in (("mogrow", 5), ("identity", 6), ("stacking", 7), ("rand_init", 8)):
            old = backend.structure.depths
            with CommDebugMode() as growth:
                backend.regrow(grow(operator, old, (depth,)), inherit=True, may_skip_layers=True)
            growths[operator] = growth.get_total_counts()
        if coordinator.rank == 0:
            out.write_text(json.dumps({"step": step.get_total_counts(), "growths": growths}))


def disagree(out: Path) -> None:
    """Ranks that hold different values."""
    with nothing_pickled(), process_group() as (coordinator, _):
        coordinator.verify("agreed", [1, "a"])
        coordinator.verify("choice of stage 2", coordinator.rank + 7)


def decide(out: Path) -> None:
    """A decision and reductions."""
    with nothing_pickled(), process_group() as (coordinator, _):
        with Collectives() as collectives:
            decided = coordinator.decide("where", lambda: {"on": coordinator.rank, "value": 0.1})
        values = [decided, {kind: number for kind, (number, _) in collectives.found.items()},
                  coordinator.mean([coordinator.rank, 2.0]), coordinator.total([1.0]),
                  coordinator.maximum([-coordinator.rank, coordinator.rank])]  # fmt: skip
        (out / f"{coordinator.rank}.json").write_text(json.dumps(values))


class Collectives(TorchDispatchMode):
    """Counts the collectives that torch dispatches: `found` holds [number, bytes of whole tensors] by kind."""

    KINDS: ClassVar = {
        "c10d::_allgather_base_": "all_gather",
        "c10d::_reduce_scatter_base_": "reduce_scatter",
        "c10d::allreduce_": "all_reduce",
        "_c10d_functional::all_reduce": "all_reduce",
        "c10d::broadcast_": "broadcast",
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it become collectives on plain tensors first
        if (kind := self.KINDS.get(func.name().partition(".")[0])) is not None:
            whole = max(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            number, size = self.found.get(kind, (0, 0))
            self.found[kind] = [number + 1, size + whole]
        return func(*args, **(kwargs or {}))


def live_tensors() -> int:
    """Bytes of the storages of all tensors that Python's garbage collector can see."""
    found = {}
    for tensor in [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            local = part.to_local() if isinstance(part, DTensor) else part
            if local is not None and local.device.type != "meta":
                found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def most_held(profiler: profile) -> int:
    """The most bytes that were held at any moment under the profiler, of those allocated under it."""
    events, nodes = [], profiler.profiler.kineto_results.experimental_event_tree()
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if isinstance(node.extra_fields, _ExtraFields_Allocation):
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    held, now, most = dict[int, int](), 0, 0
    for _, address, size in sorted(events):
        now -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            now += size
        most = max(most, now)
    return most


def count_step(sharding: dict[str, Any], model: ModelSettings, depth: int, device: torch.device) -> dict:
    """A step of two images: bytes of this rank's tensors by what they are, collectives as in `Collectives`."""
    backend = make(sharding, device, model)
    backend.regrow(fresh((depth,)), inherit=False, may_skip_layers=False)
    network, pixels = backend.network, resolve_family(model)[1].resolution
    for counted in (False, True):
        with Collectives() as collectives:
            logits = backend.forward(torch.randn(2, model.channels, pixels, pixels, device=device))
            backend.backward(F.cross_entropy(logits.float(), torch.zeros(2, dtype=torch.long, device=device)))
            gradients = [p.grad for p in network.model.parameters() if p.grad is not None]
            held = {"gradients": sum((g.to_local() if isinstance(g, DTensor) else g).nbytes for g in gradients)}
            if counted:
                backend.step(1e-3, step=0)
        network.model.zero_grad()
    names = {"online": "parameters", "exp_avg": "optimizer", "exp_avg_sq": "optimizer", "ema.0": "ema", "ema.1": "ema"}
    for name, part in backend.state().items():
        if (what := names.get(name.partition("/")[0])) is not None:
            held[what] = held.get(what, 0) + part.tensor.nbytes
    return {"memory": held, "collectives": collectives.found}


def count_here(shardings: list[dict[str, Any]], model: ModelSettings, depth: int, out: Path) -> None:
    """`count_step` of rank 0, the fullest, under one engine after the other."""
    with process_group() as (coordinator, device):
        counted = [count_step(sharding, model, depth, device) for sharding in shardings]
        if coordinator.rank == 0:
            out.write_text(json.dumps(counted))


def count_pretended(sharding: dict[str, Any], model: ModelSettings, depth: int, world: int) -> dict:
    """`count_step` of rank 0 in a world of which this process is all there is: its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        return count_step(sharding, model, depth, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def predicted_step(sharding: dict[str, Any], model: ModelSettings, depth: int, world: int) -> dict:
    """What `count_step` should find."""
    network, settings = units(resolve_family(model)[0], model, depth), ShardingSettings.model_validate(sharding)
    memory, moved = state_memory(network, settings, 2, world, world), traffic(network, settings, world, world)
    collectives: dict[str, list[int]] = {}
    for c in moved.collectives:
        number, size = collectives.get(c.kind, (0, 0))
        collectives[c.kind] = [number + c.count, size + round(c.count * c.size)]
    held = {key: getattr(memory, key) for key in ("parameters", "gradients", "optimizer", "ema")}
    return {"memory": held, "collectives": collectives}


def save_and_fail_on_one(folder: Path) -> None:
    """Two saves of a tensor that is spread over the ranks and of one that all have; in the second a rank's disk is
    full. Rank 0 writes down each rank's errors and what it read of the newest."""
    with process_group() as (coordinator, _):
        rank, world = coordinator.rank, coordinator.world
        checkpoints = Checkpoints(folder / "checkpoints", coordinator, keep=1)
        everywhere = LocalSlice.whole(torch.full((3,), 7.0))

        def save(step: int) -> list[str | None]:
            stretch = LocalSlice(torch.arange(4.0) + 4 * rank + step, 4 * rank, 4 * world)
            checkpoints.save(step, {}, {"stretch": stretch, "everywhere": everywhere})
            checkpoints.wait()
            return coordinator.gather([commit.error for commit in checkpoints.finished()])

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        errors = save(1)
        write, scaleprog.rundir.checkpoint.write_tensors = scaleprog.rundir.checkpoint.write_tensors, full
        if rank != world - 1:
            scaleprog.rundir.checkpoint.write_tensors = write
        errors += save(2)
        newest = checkpoints.newest(print)
        assert newest is not None
        whole = {"stretch": LocalSlice.whole(torch.zeros(4 * world)), "everywhere": LocalSlice.whole(torch.zeros(3))}
        load_tensors(newest, whole)
        if rank == 0:
            found = {name: part.tensor.tolist() for name, part in whole.items()}
            (folder / "out.json").write_text(json.dumps([errors, newest.name, found]))
