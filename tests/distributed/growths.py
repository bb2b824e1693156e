"""What the ranks of the tests on many growths and on counted collectives do; results go to files."""

import ctypes
import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from scaleprog.growth.operators import fresh, grow, keep
from scaleprog.models.elastic import Active, Targets
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe.keys import ModelSettings
from scaleprog.sharding import Backend
from scaleprog.sharding.backend import Network
from tests.distributed.ranks import Collectives, Trainer, make

WIDE = ModelSettings(name="vit_tiny_patch16_224", classes=10, channels=1, resolution=28, patch=4, width=192, depth=8,
                     heads=3, drop_path=0.1)  # fmt: skip
VOLO = ModelSettings(name="volo_d1_224", classes=10, resolution=32, patch=4, width=96, depth=8, heads=2)
GROWTHS = 20


def grow_often(shardings: list[dict[str, Any]], out: Path) -> None:
    """A network that grows and shrinks by turns, trained in between; what the process holds after each second turn."""
    with process_group() as (coordinator, device):
        told = []
        for sharding in shardings:
            backend = make(sharding, device, WIDE)
            gc.collect()
            gc.freeze()  # as in training
            backend.regrow(fresh((4,)), inherit=False, may_skip_layers=False)
            trainer, held = Trainer(backend, coordinator), []
            for turn in range(GROWTHS // 2):
                backend.regrow(grow("mogrow", (4,), (6,)), inherit=turn % 2 == 0, may_skip_layers=True)
                trainer.train(1, [((0, 1, 2, 3, 5),)], 16)
                trainer.infer(((0, 1, 2, 3),), 16)
                backend.regrow(keep(((0, 1, 2, 4),)), inherit=True, may_skip_layers=False)
                trainer.train(1, [None], 16)
                held.append(holds())
            told.append(held)
            del backend, trainer
        if coordinator.rank == 0:
            out.write_text(json.dumps(told))


def volo_grows_often(shardings: list[dict[str, Any]], out: Path) -> None:
    """Like `grow_often`, of a network with batch norms and two layer groups, both of which grow."""
    with process_group() as (coordinator, device):
        told = []
        for sharding in shardings:
            backend = make(sharding, device, VOLO)
            backend.lane = 4
            gc.collect()
            gc.freeze()
            backend.regrow(fresh((1, 2)), inherit=False, may_skip_layers=False)
            held = []
            for turn in range(GROWTHS // 2):
                backend.regrow(grow("mogrow", (1, 2), (2, 4)), inherit=turn % 2 == 0, may_skip_layers=True)
                train_volo(backend, ((0, 1), (0, 2, 3)))
                backend.regrow(keep(((0,), (0, 2))), inherit=True, may_skip_layers=False)
                train_volo(backend, None)
                held.append(holds())
            told.append(held)
            del backend
        if coordinator.rank == 0:
            out.write_text(json.dumps(told))


def train_volo(backend: Backend, active: Active | None) -> None:
    """A step on random images."""
    own = torch.rand(4, VOLO.classes).softmax(-1)
    output = backend.forward(torch.randn(4, 3, 32, 32), active)
    backend.backward(backend.family.loss(output, Targets(own, own)))
    backend.step(1e-3, 0)


def outlived(shardings: list[dict[str, Any]], out: Path) -> None:
    """How many storages an old network has, and how many of them outlive `regrow`; the most of a rank."""
    with process_group() as (coordinator, device):
        told = []
        gc.disable()  # as in training
        for sharding in shardings:
            backend = make(sharding, device)
            backend.regrow(fresh((3,)), inherit=False, may_skip_layers=False)
            trainer = Trainer(backend, coordinator)
            trainer.train(2, [None], 16)
            old = storages(backend.network)
            backend.regrow(grow("mogrow", (3,), (5,)), inherit=True, may_skip_layers=True)
            told.append(coordinator.maximum([len(old), sum(not storage.expired() for storage in old)]))
        if coordinator.rank == 0:
            out.write_text(json.dumps(told))


def storages(network: Network) -> list[StorageWeakRef]:
    """Weak references to what a network holds on this rank: parameters, master weights, moments, EMAs."""
    parameters = [p.to_local() if isinstance(p, DTensor) else p for p in network.model.parameters()]
    moments = [moments[key] for moments in network.moments.values() for key in ("exp_avg", "exp_avg_sq")]
    emas = [tensor for ema in network.emas for tensor in ema.weights.values()]
    held = [*parameters, *network.weights.values(), *moments, *emas]
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in held if tensor.numel()]


def holds() -> dict[str, int]:
    """What this process has at the moment; `tensors` are those that Python knows, in bytes.

    Pages that the C library keeps for later, of memory that was given back, come and go with the order of allocations:
    they are returned first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        for storage in [tensor.untyped_storage()]
        if tensor.device.type == "cpu"
    }
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "tensors": sum(storages.values()),
        "modules": sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects()),
        "groups": len(_world.pg_map),
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def count_collectives(shardings: list[dict[str, Any]], out: Path) -> None:
    """How many collectives of each kind a training step takes with all of six layers, and with three of them."""
    with process_group() as (coordinator, device):
        told = []
        for sharding in shardings:
            backend = make(sharding, device)
            backend.regrow(fresh((6,)), inherit=False, may_skip_layers=True)
            trainer, counted = Trainer(backend, coordinator), {}
            for name, active in (("warm-up", None), ("all", None), ("three", ((0, 2, 5),)), ("all again", None)):
                with Collectives() as collectives:
                    trainer.train(1, [active], 28)
                counted[name] = collectives.found
            told.append(counted)
        if coordinator.rank == 0:
            out.write_text(json.dumps(told))
