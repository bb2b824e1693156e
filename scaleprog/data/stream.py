"""Worker processes decode batches ahead of the step and hand them over in shared memory.

torch's DataLoader sends every tensor as a file through a socket, which takes about a millisecond per tensor: a fifth of
a small network's step. Here, a worker writes into memory slots that it shares with the rank, and two semaphores control
whose turn it is.
"""

import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

import cv2
import torch
from torch import Tensor

from scaleprog.errors import Unavailable

FORK = multiprocessing.get_context("fork")  # shares the cached shards
POLL_SECONDS = 1.0
START_SECONDS = 20.0  # a worker that has not begun after this long counts as hung


@dataclass
class Batch:
    """One rank's part of a batch; in training its rows are lane-major: (lane, sample of the lane)."""

    images: Tensor
    """(B_local, C, r, r) float32, normalized."""
    labels: Tensor
    """(B_local,) int64; -1 in rows that pad an evaluation batch."""
    ids: Tensor
    """(B_local,) int64: position in the split (samples of earlier shards + index in its shard); -1 in padding."""
    token_labels: Tensor | None = None
    """(B_local, numbers) float32, the rows of `token_labels.pack`; None if there are no token labels."""


class Stream:
    """An iterator over batches that worker processes decode ahead, and a context manager that stops the workers.

    Args:
        produce: (part, parts) -> that part of every batch, in order; all parts yield equally many.
        workers: processes, one per part; with 0, this process produces the whole batches.
        prefetch: batches decoded ahead.
        largest: (rows, C, r, r), the largest shape of a part's images.
        numbers: in a row of token labels; 0: there are none.

    Raises:
        Exception: while iterating: `produce` raised an exception of the same type.
        Unavailable: while iterating: a worker died.
    """

    def __init__(
        self,
        produce: Callable[[int, int], Iterator[Batch]],
        workers: int,
        prefetch: int,
        largest: tuple[int, int, int, int],
        numbers: int = 0,
    ) -> None:
        self._pin = torch.cuda.is_available()
        self._alone = iter(()) if workers else produce(0, 1)
        self._workers = [_Worker(produce, part, workers, prefetch, largest, numbers) for part in range(workers)]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            if not self._workers:
                return next(self._alone)
            parts = [worker.take() for worker in self._workers]  # all parts end at the same batch
            images = self._whole([images for images, _, _ in parts], 0)
            labels, ids = self._whole([rows for _, rows, _ in parts], 1)
            token_labels = self._whole([rows for _, _, rows in parts], 0)
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            worker.give_back()
        return Batch(images, labels, ids, token_labels if token_labels.numel() else None)

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

    def _whole(self, parts: list[Tensor], dim: int) -> Tensor:
        """A copy of the parts as one tensor, in page-locked memory if there is a GPU."""
        if not self._pin:
            return torch.cat(parts, dim)
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        return torch.cat(parts, dim, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))


class _Worker:
    """A process that fills a ring of `prefetch` slots with its part of the batches."""

    def __init__(
        self,
        produce: Callable[[int, int], Iterator[Batch]],
        part: int,
        parts: int,
        prefetch: int,
        largest: tuple[int, int, int, int],
        numbers: int,
    ) -> None:
        self._produce, self._part, self._parts = produce, part, parts
        rows, self._channels, *_ = largest
        self._slots = prefetch
        self._images = _shared((prefetch, math.prod(largest)), torch.float32)
        self._rows = _shared((prefetch, 2, rows), torch.int64)  # labels, ids
        self._token_labels = _shared((prefetch, rows, numbers), torch.float32)
        self._shapes = _shared((prefetch, 2), torch.int64).numpy()  # rows, resolution; 0 rows: the end or an error
        self._free = FORK.Semaphore(prefetch)
        self._filled = FORK.Semaphore(0)
        self._begun = _shared((1,), torch.int64).numpy()
        self._next = 0
        self._fork()

    def _fork(self) -> None:
        self._errors, errors = FORK.Pipe(duplex=False)
        self._process = FORK.Process(target=self._fill, args=(errors,), daemon=True)
        self._process.start()
        self._forked = time.monotonic()
        errors.close()

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next part's images (B, C, r, r), labels and IDs (2, B), and token labels (B, numbers).

        They are in shared memory: copy, then `give_back`.

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
        rows, resolution = self._shapes[self._next].tolist()
        if not rows:
            raise self._errors.recv()
        shape = (rows, self._channels, resolution, resolution)
        images = self._images[self._next, : math.prod(shape)].view(shape)
        return images, self._rows[self._next, :, :rows], self._token_labels[self._next, :rows]

    def give_back(self) -> None:
        """Lets the worker fill the taken slot again."""
        self._next = (self._next + 1) % self._slots
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
        slot = 0

        def await_slot() -> None:
            while not self._free.acquire(timeout=POLL_SECONDS):
                if os.getppid() != rank_process:
                    os._exit(0)

        end: BaseException = StopIteration()
        try:
            for batch in self._produce(self._part, self._parts):
                rows, _, resolution, _ = batch.images.shape
                await_slot()
                self._shapes[slot] = rows, resolution
                self._images[slot, : batch.images.numel()] = batch.images.flatten()
                self._rows[slot, 0, :rows] = batch.labels
                self._rows[slot, 1, :rows] = batch.ids
                if batch.token_labels is not None:
                    self._token_labels[slot, :rows] = batch.token_labels
                self._filled.release()
                slot = (slot + 1) % self._slots
        except Exception as error:
            error.add_note(f"in a decoding worker:\n{traceback.format_exc()}")
            end = error
        errors.send(end)
        await_slot()
        self._shapes[slot] = 0
        self._filled.release()


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that forked processes share; anonymous, so that a small /dev/shm does not limit it."""
    memory = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape)


def _reset_signals(rank_process: int) -> None:
    """Sets up the signal handlers and threads of a forked worker.

    Slurm and terminals signal every process of a job, and the rank still trains some steps after that. So a worker
    ignores SIGINT and SIGUSR2, and SIGTERM ends it only if the rank sent it. A worker whose rank is gone exits.
    """
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
