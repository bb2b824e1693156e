"""Rank 0 decides and all ranks agree: broadcasts of rank 0's values, which all ranks verify, and small reductions."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist

from scaleprog import errors
from scaleprog.errors import Disagreement, ScaleprogError, Unavailable
from scaleprog.ranks.rendezvous import JOIN_LIMIT, Place

NAMED = 8  # most different values that an error names
RECORDED = 2000  # collectives that torch's flight recorder keeps


@contextmanager
def process_group(
    deterministic: bool = False, limit: timedelta = JOIN_LIMIT
) -> Iterator[tuple["Coordinator", torch.device]]:
    """Joins the ranks of this process's launcher, or runs as the only rank; yields the ranks and this rank's device.

    `deterministic`: whether CUDA computes the same bits in every process. `limit`: how long a collective waits.

    Raises Unavailable, also if CUDA does not find a GPU that CUDA_VISIBLE_DEVICES lists; or ScaleprogError if this node
    was given fewer GPUs than ranks.
    """
    place = Place.current()
    found, listed = torch.cuda.device_count() if torch.cuda.is_available() else 0, _listed_gpus()
    if place.local_rank >= found and place.local_rank < listed:
        raise Unavailable(
            f"rank {place.rank}: CUDA finds {found} of the {listed} GPUs that CUDA_VISIBLE_DEVICES lists on "
            f"{socket.gethostname()}; one may be broken (see nvidia-smi and dmesg there); to train on the CPU, set "
            "CUDA_VISIBLE_DEVICES= (nothing)"
        )
    if found:
        if place.local_rank >= found:
            raise ScaleprogError(
                f"rank {place.rank} is number {place.local_rank + 1} of the {place.local_world} ranks on "
                f"{socket.gethostname()}, and needs a CUDA device of its own; CUDA devices available there: "
                f"{torch.cuda.device_count()}; request as many GPUs as ranks on each node"
            )
        if deterministic:
            pin_algorithms()
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, as in matrix products, where torch has it so
        backend = "cpu:gloo,cuda:nccl"
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world))
    with place.joined(backend, limit):
        try:
            yield Coordinator(), device
        except BaseException:
            if dist.get_world_size() == 1:  # with more ranks, the others would fail too and hide the first cause
                dist.destroy_process_group()
            raise
        finally:
            if deterministic:
                torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()


def _listed_gpus() -> int:
    """How many GPUs CUDA_VISIBLE_DEVICES lists; 0 without the variable, and where torch is built without CUDA."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if torch.backends.cuda.is_built() else []
    usable = takewhile(lambda name: name.strip() not in ("", "-1", "NoDevFiles"), names)  # CUDA ignores what follows
    return len(list(usable))


def collectives() -> str | None:
    """The last collectives of this rank on CUDA, from torch's flight recorder, as JSON; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    from torch._C._distributed_c10d import (  # type: ignore[attr-defined]  # only builds with NCCL have it
        _dump_nccl_trace_json,
    )

    recorded: bytes = _dump_nccl_trace_json()
    return recorded.decode()


def pin_algorithms() -> None:
    """Makes CUDA, cuDNN, cuBLAS, and NCCL choose algorithms that always add in the same order.

    The variables count only until the libraries start, so they must be set first.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, value in (("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple"), ("NCCL_NVLS_ENABLE", "0")):
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False


def ranks_per_node() -> int:
    """How many ranks the launcher has started on this node; 1 without a launcher."""
    return Place.current().local_world


class Coordinator:
    """Exchanges small values between the ranks of a run: decisions, counts, losses.

    A decision takes three collectives on any number of ranks: two broadcasts along a tree, and a reduction to verify
    the result.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a process group of all ranks that can carry CPU tensors (None: the default group)."""
        self.group = group
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def decide(self, what: str, value: Callable[[], Any]) -> Any:
        """Evaluates `value` on rank 0 only, and returns the result on every rank, verified.

        Args:
            what: names the value in an error.
            value: its result must survive JSON.

        Raises:
            Disagreement: the ranks did not receive the same result.
        """
        text = json.dumps(value()).encode() if self.rank == 0 else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, group=self.group)
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.rank == 0 else None
        payload = payload if payload is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.group)
        decided = json.loads(bytes(payload.tolist()))
        self.verify(what, decided)
        return decided

    def on_rank_0(self, what: str, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 only; returns its value, or raises its ScaleprogError, on every rank."""

        def attempt() -> list[Any]:
            try:
                return [action(), None]
            except ScaleprogError as error:
                return [None, errors.to_plain(error)]

        value, failure = self.decide(what, attempt)
        if failure is not None:
            raise errors.of_plain(failure)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in order, on every rank. A value must survive JSON: nothing is unpickled."""
        text = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
        widest = max(int(length) for length in lengths)
        texts = [torch.empty(widest, dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.frombuffer(bytearray(text.ljust(widest)), dtype=torch.uint8)
        dist.all_gather(texts, padded, group=self.group)
        return [json.loads(text.numpy().tobytes()) for text in texts]  # JSON ignores the padding, which is blanks

    def verify(self, what: str, value: Any) -> None:
        """Raises Disagreement on every rank, with the different values, unless all ranks hold the same `value`."""
        text = json.dumps(value, sort_keys=True)
        digest = _digest(text)
        bounds = torch.tensor([digest, -digest])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.group)
        if int(bounds[0]) == -int(bounds[1]):
            return
        raise Disagreement(f"{what}: {_camps(self.gather(text))}")

    def mean(self, values: list[float]) -> list[float]:
        """Element-wise mean over ranks."""
        return [v / self.world for v in self.total(values)]

    def total(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def maximum_later(self, values: list[float]) -> Callable[[], list[float]]:
        """Starts `maximum`, and returns a function that waits for its result."""
        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True)

        def result() -> list[float]:
            work.wait()
            return tensor.tolist()

        return result

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        dist.barrier(group=self.group)

    def _reduce(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.group)
        return tensor.tolist()


def _camps(values: list[str]) -> str:
    """Which ranks hold which value, in one line that stays short on many ranks."""
    camps: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        camps.setdefault(value, []).append(rank)
    return "; ".join(
        f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more ranks have " if ranks[1:] else " has ") + value
        for value, ranks in list(camps.items())[:NAMED]
    ) + (f"; {len(camps) - NAMED} more values" if len(camps) > NAMED else "")


def _digest(text: str) -> int:
    """62 bits of a cryptographic hash, so that it and its negative fit an int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2
