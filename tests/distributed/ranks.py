"""What the ranks of the distributed tests run; results go to files that the tests read."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor.debug import CommDebugMode

from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.growth.supernet import active_layers
from scaleprog.models import family
from scaleprog.models.elastic import ModelSettings, drop_scales
from scaleprog.optim import OptimizerSettings
from scaleprog.sharding import Backend, engine
from scaleprog.sharding.coordinator import Coordinator, process_group
from scaleprog.sharding.ema import EmaSettings
from scaleprog.sharding.settings import ShardingSettings

MODEL = ModelSettings(name="vit_tiny_patch16_224", classes=10, channels=1, resolution=28, patch=4, width=32, depth=8,
                      heads=2, drop_path=0.1)  # fmt: skip
BATCH = 8


def make(sharding: dict[str, Any], device: torch.device) -> Backend:
    settings = ShardingSettings.model_validate(sharding)
    optimizer, ema = OptimizerSettings(clip=1.0), EmaSettings(momenta=(0.9, 0.5))
    return engine(settings.engine)(family(MODEL)[0], MODEL, optimizer, ema, settings, device, seed=0)


class Trainer:
    """Trains a backend on fixed random images, each rank on its rows, and keeps losses and gradient norms."""

    def __init__(self, backend: Backend, coordinator: Coordinator) -> None:
        self.backend, self.coordinator = backend, coordinator
        self.record: list[float] = []
        self.step = 0
        self.generator = torch.Generator().manual_seed(1)

    def train(self, steps: int, actives: list, resolution: int) -> None:
        rows = BATCH // self.coordinator.world
        mine = slice(self.coordinator.rank * rows, (self.coordinator.rank + 1) * rows)
        depth = sum(self.backend.structure.depths)
        for i in range(steps):
            images = torch.randn(BATCH, 1, resolution, resolution, generator=self.generator)
            labels = torch.randint(0, 10, (BATCH,), generator=self.generator)
            drop = drop_scales(0.1, depth, BATCH, 0, self.step)[:, :, mine]
            loss = F.cross_entropy(self.backend.forward(images[mine], actives[i % len(actives)], drop), labels[mine])
            self.backend.backward(loss)
            norm = self.backend.step(1e-3)
            self.record += [self.coordinator.mean([loss.item()])[0], float(norm)]
            self.step += 1

    def infer(self, active: tuple, resolution: int) -> None:
        """The logits' sum on each EMA and on the online weights."""
        images = torch.randn(BATCH, 1, resolution, resolution, generator=self.generator)
        for ema in (0, 1, None):
            with self.backend.weights(ema):
                self.record.append(float(self.backend.forward(images, active).square().mean()))


def whole_lives(shardings: list[dict[str, Any]], out: Path) -> None:
    """A network's life under one engine after the other; what they recorded, in that order."""
    with process_group() as (coordinator, device):
        lives = [whole_life(make(sharding, device), coordinator) for sharding in shardings]
        if coordinator.rank == 0:
            out.write_text(json.dumps(lives))


def whole_life(backend: Backend, coordinator: Coordinator) -> dict[str, Any]:
    """Every operator in turn, supernets with skipped layers, inference on EMAs in between, recycling at the end."""
    trainer = Trainer(backend, coordinator)
    backend.regrow(fresh((3,)), inherit=False, elastic=False)
    trainer.train(3, [None], 16)
    for operator, depth in (
        ("mogrow", 4),
        ("interpolation", 5),
        ("identity", 6),
        ("stacking", 7),
        ("rand_init", 8),
    ):
        base = backend.structure.depths[0]
        backend.regrow(grow(operator, (base,), (depth,)), inherit=operator != "stacking", elastic=True)
        actives = [(active_layers(operator, base, depth, d),) for d in range(base, depth + 1)]
        trainer.train(3, actives, 20)
        trainer.infer(actives[0], 24)
        trainer.train(2, actives, 20)
    backend.regrow(keep(actives[0]), inherit=True, elastic=False)
    trainer.train(2, [None], 28)
    sums = {name: float(w.double().abs().sum()) for name, w in backend.gather(1).items()}
    return {"record": trainer.record, "ema": sums}


def regrow_traffic(out: Path) -> None:
    """Collectives that a training step and a growth issue, counted where torch dispatches them."""
    with process_group() as (coordinator, device):
        backend = make({"engine": "fsdp"}, device)
        backend.regrow(fresh((4,)), inherit=False, elastic=False)
        trainer = Trainer(backend, coordinator)
        with CommDebugMode() as step:
            trainer.train(1, [None], 28)
        growths = {}
        for operator, depth in (("mogrow", 5), ("identity", 6), ("stacking", 7), ("rand_init", 8)):
            old = backend.structure.depths
            with CommDebugMode() as growth:
                backend.regrow(grow(operator, old, (depth,)), inherit=True, elastic=True)
            growths[operator] = growth.get_total_counts()
        if coordinator.rank == 0:
            out.write_text(json.dumps({"step": step.get_total_counts(), "growths": growths}))


def disagree(out: Path) -> None:
    """Ranks that hold different values."""
    with process_group() as (coordinator, _):
        coordinator.verify("agreed", [1, "a"])
        coordinator.verify("choice of stage 2", coordinator.rank + 7)


def decide(out: Path) -> None:
    """A decision and reductions."""
    with process_group() as (coordinator, _):
        values = [coordinator.decide("where", lambda: {"on": coordinator.rank, "value": 0.1}),
                  coordinator.mean([coordinator.rank, 2.0]), coordinator.total([1.0]),
                  coordinator.maximum([-coordinator.rank, coordinator.rank])]  # fmt: skip
        (out / f"{coordinator.rank}.json").write_text(json.dumps(values))
