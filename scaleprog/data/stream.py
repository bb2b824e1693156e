"""Worker processes decode batches ahead of the step and hand them over in shared memory.

torch's DataLoader sends every tensor as a file through a socket, which takes about a millisecond per tensor: a fifth of
a small network's step. Here, all workers write into the same slots, which the rank shares with them, each slot a whole
batch. So nothing is copied between a worker and the device, and two semaphores per worker control whose turn it is.
"""

import gc
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Self

import cv2
import torch
from torch import Tensor

from scaleprog.data.damaged import NAME_BYTES
from scaleprog.errors import Unavailable

FORK = multiprocessing.get_context("fork")  # shares the cached shards
POLL_SECONDS = 1.0
START_SECONDS = 20.0  # a worker that has not begun after this long counts as hung


@dataclass
class Batch:
    """One rank's part of a batch; in training its rows are lane-major: (lane, sample of the lane)."""

    images: Tensor
    """(B_local, r, r, C) uint8."""
    labels: Tensor
    """(B_local,) int64; -1 in rows that pad an evaluation batch."""
    ids: Tensor
    """(B_local,) int64: position in the split (samples of earlier shards + index in its shard); -1 in padding."""
    erasing: Tensor
    """(B_local, 5) int64: what is to be erased of each image, see `augment.Erasing`."""
    operations: Tensor
    """(B_local, operations, 2) float32: what the device does to each image, see `tensor_operations.packed`."""
    token_labels: Tensor
    """(B_local, numbers) float32, the rows of `token_labels.pack`; no numbers if there are no token labels."""
    replaced: Tensor
    """(B_local, NAME_BYTES) uint8: the name of the damaged sample that the row's sample replaces, see `damaged.py`; or
    zeros."""

    def rows(self, rows: slice) -> "Batch":
        """Some rows of it, in the same memory."""
        return Batch(*(tensor[rows] for tensor in vars(self).values()))

    def clone(self) -> "Batch":
        """A copy, in memory of its own."""
        return Batch(*(tensor.clone() for tensor in vars(self).values()))


@dataclass(frozen=True)
class Layout:
    """The size of a batch.

    Args:
        rows: B_local.
        resolution: the largest r, in pixels.
        channels: C.
        numbers: in a row of token labels; 0: there are none.
        operations: the most that the device does to an image; 0: none.
    """

    rows: int
    resolution: int
    channels: int
    numbers: int = 0
    operations: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of a batch at the largest resolution, rounded up to whole pages."""
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._parts(self.resolution))
        return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE

    def batch(self, memory: Tensor, resolution: int) -> Batch:
        """The batch that lies in `bytes` bytes of memory, at one resolution."""
        tensors, start = [], 0
        for shape, dtype in self._parts(resolution):
            stop = start + math.prod(shape) * dtype.itemsize
            tensors.append(memory[start:stop].view(dtype).view(shape))
            start = stop
        labels, ids, erasing, operations, token_labels, images, replaced = tensors
        return Batch(images, labels, ids, erasing, operations, token_labels, replaced)

    def _parts(self, resolution: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shapes and types, the largest numbers first, so that all are aligned."""
        return (
            ((self.rows,), torch.int64),
            ((self.rows,), torch.int64),
            ((self.rows, 5), torch.int64),
            ((self.rows, self.operations, 2), torch.float32),
            ((self.rows, self.numbers), torch.float32),
            ((self.rows, resolution, resolution, self.channels), torch.uint8),
            ((self.rows, NAME_BYTES), torch.uint8),
        )


Fill = tuple[int, Callable[[Batch], None]]
"""The resolution of a batch, and what writes the producer's rows into it."""
Produce = Callable[[range], Iterator[Fill]]
"""Produces some of the units that make up every batch (lanes, or rows), for one batch after another."""


class Stream:
    """An iterator over batches that worker processes decode ahead, and a context manager that stops the workers.

    A batch is in memory that is written again after the next one was asked for: clone what you keep. What was copied
    from it to a GPU by then is safe.

    Args:
        produce: fills its units of every batch, in order; for any units, equally many batches.
        units: number of units, all of equally many rows.
        workers: processes that share the units; with 0, this process produces the whole batches.
        prefetch: batches decoded ahead.
        layout: of the batches.

    Raises:
        Exception: while iterating: `produce` raised an exception of the same type.
        Unavailable: while iterating: a worker died.
    """

    def __init__(self, produce: Produce, units: int, workers: int, prefetch: int, layout: Layout) -> None:
        self._layout = layout
        self._alone = iter(()) if workers else produce(range(units))
        self._copies: deque[torch.cuda.Event] | None = deque() if torch.cuda.is_available() else None
        self._count = slots_of(prefetch)
        self._slots = _shared((self._count if workers else 1, layout.bytes), torch.uint8)
        self._batches: dict[tuple[int, int], Batch] = {}
        self._taken = 0
        self.waited = 0.0
        """Seconds until the last batch was there; not those until the device had copied an earlier one."""
        bounds = [units * part // workers for part in range(workers + 1)] if workers else []
        each = layout.rows // units
        self._workers = [
            _Worker(produce, range(low, high), slice(low * each, high * each), layout, self._slots)
            for low, high in pairwise(bounds)
        ]
        self._locked = self._copies is not None and bool(workers) and _page_locked(self._slots)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            if self._taken and self._workers:
                self._give_back()
            began = time.perf_counter()
            if not self._workers:
                resolution, fill = next(self._alone)
                batch = self._batch(0, resolution)
                fill(batch)
                self.waited = time.perf_counter() - began
                return batch
            resolution, *_ = [worker.take() for worker in self._workers]  # all workers end at the same batch
        except BaseException:
            self.close()
            raise
        self.waited = time.perf_counter() - began
        self._taken += 1
        return self._batch((self._taken - 1) % self._count, resolution)

    def _batch(self, slot: int, resolution: int) -> Batch:
        if (slot, resolution) not in self._batches:
            self._batches[slot, resolution] = self._layout.batch(self._slots[slot], resolution)
        return self._batches[slot, resolution]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers and ends the iteration."""
        self._alone = iter(())
        for worker in self._workers:
            worker.terminate()
        while self._workers:
            self._workers.pop().join()
        if self._locked:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._slots.data_ptr())
            self._locked = False

    def _give_back(self) -> None:
        """Lets the workers fill the last slot again; with a GPU the one before it, because copies may still run."""
        if self._copies is not None:
            self._copies.append(torch.cuda.Event())
            self._copies[-1].record()
            if len(self._copies) == 1:
                return
            self._copies.popleft().synchronize()
        for worker in self._workers:
            worker.give_back()


def slots_of(prefetch: int) -> int:
    """How many batches are in memory if `prefetch` of them are decoded ahead of the current one."""
    return prefetch + (2 if torch.cuda.is_available() else 1)


class _Worker:
    """A process that fills its rows of every batch, in one slot after another.

    Args:
        produce: see `Stream`.
        units: those that it produces.
        rows: their rows in a batch.
        layout: of the batches.
        slots: (slots, bytes), shared memory.
    """

    def __init__(self, produce: Produce, units: range, rows: slice, layout: Layout, slots: Tensor) -> None:
        self._produce, self._units, self._rows = produce, units, rows
        self._layout, self._slots = layout, slots
        self._resolutions = _shared((len(slots),), torch.int64).numpy()  # 0: the end, or an error
        self._free = FORK.Semaphore(len(slots))
        self._filled = FORK.Semaphore(0)
        self._begun = _shared((1,), torch.int64).numpy()
        self._next = 0
        self._fork()

    def _fork(self) -> None:
        self._errors, errors = FORK.Pipe(duplex=False)
        self._process = FORK.Process(target=self._fill, args=(errors,), daemon=True)
        collects = gc.isenabled()
        gc.disable()  # until the worker has set aside what it inherits
        self._process.start()
        if collects:
            gc.enable()
        self._forked = time.monotonic()
        errors.close()

    def take(self) -> int:
        """Waits until the rows in the next slot are there, and returns their resolution.

        Raises:
            StopIteration: there are no more.
            Unavailable: the worker died.
            Exception: the producer raised it.
        """
        while not self._filled.acquire(timeout=POLL_SECONDS):
            if not self._begun[0] and time.monotonic() - self._forked > START_SECONDS:
                # Python 3.11 can hang in a fork while a C++ thread is entering Python (seen with gdb:
                # PyOS_AfterFork_Child waits for the lock of the thread states); another fork can do the same work
                self._process.kill()
                self._process.join()
                if not self._begun[0]:
                    self.join()
                    self._fork()
            if not self._process.is_alive() and not self._filled.acquire(block=False):
                raise Unavailable(
                    f"a decoding worker died (exit code {self._process.exitcode}); "
                    "if memory ran out, lower data.workers or data.prefetch"
                )
        resolution = int(self._resolutions[self._next])
        if not resolution:
            raise self._errors.recv()
        self._next = (self._next + 1) % len(self._slots)
        return resolution

    def give_back(self) -> None:
        """Lets the worker fill a slot again."""
        self._free.release()

    def terminate(self) -> None:
        """Ends the process, with SIGKILL if it still has the rank's handlers, which would pass SIGTERM to the rank."""
        if self._begun[0]:
            self._process.terminate()
        else:
            self._process.kill()

    def join(self) -> None:
        """Waits for the process to end."""
        self._process.join()
        self._process.close()
        self._errors.close()

    def _fill(self, errors: Connection) -> None:
        """Fills the slots; runs in the process."""
        rank_process = os.getppid()
        _reset_signals(rank_process)
        self._begun[0] = 1
        slot, held = 0, False

        def await_slot() -> None:
            while not self._free.acquire(timeout=POLL_SECONDS):
                if os.getppid() != rank_process:
                    os._exit(0)

        end: BaseException = StopIteration()
        try:
            for resolution, fill in self._produce(self._units):
                await_slot()
                held = True
                fill(self._layout.batch(self._slots[slot], resolution).rows(self._rows))
                self._resolutions[slot] = resolution
                self._filled.release()
                slot, held = (slot + 1) % len(self._slots), False
        except Exception as error:
            error.add_note(f"in a decoding worker:\n{traceback.format_exc()}")
            end = error
        errors.send(end)
        if not held:
            await_slot()
        self._resolutions[slot] = 0
        self._filled.release()


def _page_locked(memory: Tensor) -> bool:
    """Locks memory so that a GPU copies from it while the host goes on; whether that could be done."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA keeps the error for whoever launches the next kernel
        torch.zeros(1, device="cuda")
    return False


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that forked processes share; anonymous, so that a small /dev/shm does not limit it."""
    memory = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape)


def _reset_signals(rank_process: int) -> None:
    """Sets up the signal handlers, threads, and garbage collection of a forked worker.

    What it inherits is never collected there: a process group of torch among it would wait for its threads, which a
    forked process does not have, and the collector would copy every page that it looks at.

    Slurm and terminals signal every process of a job, and the rank still trains some steps after that. So a worker
    ignores SIGINT and SIGUSR2, and SIGTERM ends it only if the rank sent it. A worker whose rank is gone exits.
    """
    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if hasattr(os, "SCHED_BATCH"):  # otherwise a worker that wakes up can take the rank's CPU for some milliseconds
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_with, args=(rank_process,), daemon=True).start()


def _leave_with(rank_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_process:
        pass
    os._exit(0)
