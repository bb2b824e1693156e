"""One rank decides, all ranks agree: rank 0's values broadcast and verified; small reductions on the host."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from scaleprog.errors import Disagreement


@contextmanager
def process_group() -> Iterator[tuple["Coordinator", torch.device]]:
    """Joins the ranks that the launcher's environment describes and gives the device of this one.

    The variables are torch.distributed's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; without them this
    process is alone.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Coordinator(), device
    except BaseException:
        if dist.get_world_size() == 1:  # elsewhere the other ranks must not see us go before the launcher knows why
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class Coordinator:
    """The ranks of a run as one party. Everything that passes through it is small: decisions, counts, losses."""

    def __init__(self) -> None:
        """Needs an initialised default process group that can carry CPU tensors."""
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def decide(self, what: str, value: Callable[[], Any]) -> Any:
        """Evaluates `value` on rank 0 alone and returns it on every rank, verified. It must survive JSON."""
        text = json.dumps(value()).encode() if self.rank == 0 else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0)
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.rank == 0 else None
        payload = payload if payload is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, 0)
        decided = json.loads(bytes(payload.tolist()))
        self.verify(what, decided)
        return decided

    def verify(self, what: str, value: Any) -> None:
        """Raises Disagreement on every rank, naming each rank's value, unless all ranks hold the same `value`."""
        text = json.dumps(value, sort_keys=True)
        digest = _digest(text)
        bounds = torch.tensor([digest, -digest])
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        if int(bounds[0]) == -int(bounds[1]):
            return
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, text)
        raise Disagreement(f"{what}: " + "; ".join(f"rank {r} has {v}" for r, v in enumerate(values)))

    def mean(self, values: list[float]) -> list[float]:
        """Element-wise mean over ranks."""
        return [v / self.world for v in self.total(values)]

    def total(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        dist.barrier()

    def _reduce(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def _digest(text: str) -> int:
    """62 bits of a cryptographic hash, so that it and its negative fit an int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2
