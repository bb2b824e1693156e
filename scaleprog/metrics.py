"""What a run tells: metrics.jsonl and TensorBoard (each step once, over restarts), events.jsonl, a progress line."""

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from scaleprog.files import lock, unlock, write_whole
from scaleprog.sharding.coordinator import Coordinator

PLAIN_EVERY = 15.0  # seconds between two progress lines where the output is no terminal
LOCK_SECONDS = 2.0  # a line is written without the lock if another process has held it for so long
PER_RANK = ("step_seconds", "data_wait_seconds")  # curves that every rank draws of its own


class StepTimer:
    """Seconds and CPU seconds of one training step; on CUDA by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Call once, when the step has been issued."""
        self.cpu_seconds = time.process_time() - self._cpu_began
        self._elapsed = time.perf_counter() - self._began
        if self._cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """The step's duration; waits for the device where it has not finished."""
        if not self._cuda:
            return self._elapsed
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class Recorder:
    """The record of a run. Rank 0 writes what all ranks share; every rank what happens to it alone, and its own curves.
    Steps are buffered on the device and resolved in `flush`, one reduction for all."""

    def __init__(
        self, run: Path, coordinator: Coordinator, generation: int, step: int, log_every: int, due: bool = False
    ) -> None:
        """`generation`: of this start, which its events and samples carry; `step`: optimizer steps finished; whatever
        a run that got further wrote beyond it is dropped; `due`: so is what was measured after that step, as it is
        again."""
        self.coordinator, self.log_every = coordinator, log_every
        self._pending: list[tuple[dict[str, Any], Tensor, Tensor, StepTimer]] = []
        self._generation, self._main = generation, coordinator.rank == 0
        self._events = _Lines(run / "events.jsonl")
        self._samples: _Lines | None = None
        self._samples_path = run / f"samples-{coordinator.rank}.jsonl"
        board, world = run / "tensorboard", coordinator.world
        self._own_board = _Board(board / f"rank_{coordinator.rank}", step) if world > 1 else None
        if not self._main:
            return
        self.lost = _truncate(run / "metrics.jsonl", step, due)
        self._metrics = _Lines(run / "metrics.jsonl")
        self._board = _Board(board, step - due)
        if due:
            for row in read_rows(run / "metrics.jsonl")[-1:]:
                self._draw_step(row)
        for folder in board.glob("rank_*"):  # of ranks that an earlier start had and this one has not
            if world == 1 or int(folder.name[5:]) >= world:
                _Board(folder, step).close()

    def step(self, row: dict[str, Any], loss: Tensor, grad_norm: Tensor, timer: StepTimer) -> None:
        """Takes one finished step; `loss` is this rank's mean, `row` holds everything known on the host."""
        row["time"] = time.time()
        self._pending.append((row, loss.detach(), grad_norm.detach(), timer))

    def flush(self) -> list[dict[str, Any]]:
        """Resolves the pending steps on all ranks and writes them; returns their rows, losses averaged over ranks."""
        if not self._pending:
            return []
        rows, losses, norms, timers = zip(*self._pending)
        self._pending = []
        means = self.coordinator.mean(torch.stack(losses).double().tolist())
        written = []
        for row, loss, norm, timer in zip(rows, means, torch.stack(norms).tolist(), timers):
            seconds = timer.seconds()
            row |= {"loss": loss, "grad_norm": norm, "step_seconds": seconds}
            row["images_per_second"] = row["images"] / (seconds + row["data_wait_seconds"])
            row["cpu_seconds"] = timer.cpu_seconds
            written.append(row)
        if self._main:
            self._metrics.write(*written)
        for row in written:
            self._draw_step(row)
            if self._own_board is not None and row["step"] % self.log_every == 0:
                self._own_board.draw("rank", row["step"], {key: row[key] for key in PER_RANK})
        return written

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes accuracies after `step` steps, as a row of their own."""
        if self._main:
            self._metrics.write({"step": step, **values})
            self.curve(step, "evaluation", values)

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value in TensorBoard."""
        if self._main:
            self._board.draw(tag, step, values)

    def samples(self, step: int, ids: list[int]) -> None:
        """Writes down which samples this rank trained on in a step, in a file of its own."""
        if self._samples is None:
            self._samples = _Lines(self._samples_path)
        self._samples.write({"step": step, "generation": self._generation, "ids": ids})

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event of the run's life, once for all ranks; from any thread."""
        if self._main:
            self._write_event(kind, fields)

    def own_event(self, kind: str, **fields: Any) -> None:
        """Writes what happens to this rank, whichever it is; from any thread."""
        self._write_event(kind, {"rank": self.coordinator.rank, **fields})

    def sync(self) -> None:
        """Makes everything recorded durable: a checkpoint of this step must not know more than its curves do."""
        if self._main:
            self._metrics.sync()
            self._board.sync()
        if self._own_board is not None:
            self._own_board.sync()

    def close(self) -> None:
        """Writes out what a full disk has refused, or tells that it is lost; raises neither then nor otherwise."""
        if self._own_board is not None:
            self._own_board.close()
        if self._main:
            self._board.close()
            self._metrics.close()
        if self._samples is not None:
            self._samples.close()
        self._events.close()

    def _draw_step(self, row: Mapping[str, Any]) -> None:
        if row["step"] % self.log_every == 0:
            self.curve(row["step"], "train", {k: v for k, v in row.items() if k not in ("phase", "images", "time")})

    def _write_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.write({"time": time.time(), "event": kind, "generation": self._generation, **fields})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that were cut off, by a loss of power say, are left out."""
    rows = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


class ProgressLine:
    """A live line on rank 0 where the output is a terminal, else a plain line every few seconds."""

    def __init__(self, total: int, step: int, enabled: bool) -> None:
        console = Console(file=sys.stderr)
        self._live = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._enabled, self._terminal = enabled, console.is_terminal
        self._task = self._live.add_task("starting", total=total, completed=step)
        self._total, self._told = total, 0.0
        if enabled and self._terminal:
            self._live.start()

    def update(self, row: Mapping[str, Any], total: int) -> None:
        """Shows one resolved step; `total` may have become known better since."""
        text = (
            f"stage {row['stage']} {row['phase']} {row['resolution']} px x {row['depth']} "
            f"loss {row['loss']:.3f} {row['images_per_second']:.0f} img/s"
        )
        if self._enabled and self._terminal:
            self._live.update(self._task, completed=row["step"], total=total, description=text)
        elif self._enabled and time.monotonic() - self._told > PLAIN_EVERY:
            self._told = time.monotonic()
            self.say(f"step {row['step']}/{total} {text}")

    def say(self, text: str) -> None:
        """Prints a line of its own on rank 0, as far as the disk of the log takes it."""
        if self._enabled:
            with suppress(OSError):
                self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._enabled and self._terminal:
            self._live.stop()


class _Appended:
    """A file that is appended to whole or not at all; what a full disk refuses is kept for the next time."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
        self._refused = b""

    def write(self, data: bytes = b"", mend: bytes = b"") -> None:
        """Appends what was refused so far and `data`; `mend` goes before both."""
        data = self._refused + data
        try:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(mend + data) < len(mend + data):
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._refused = b""
        except OSError as error:
            if not self._refused:
                self._tell(f"{error}; kept for later")
            self._refused = data

    def sync(self) -> None:
        with suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self._refused:
            self._tell(f"the last {len(self._refused)} bytes ARE LOST, the disk did not take them")
        try:
            self.file.close()
        except OSError as error:  # what a network file system has put off
            self._tell(str(error))

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # the log may lie on the same disk
            print(f"{self.file.name}: {text}", file=sys.stderr, flush=True)


class _Lines:
    """Objects appended to a .jsonl file by several processes."""

    def __init__(self, path: Path) -> None:
        self._appended = _Appended(path)
        self._lock = threading.Lock()

    def write(self, *rows: Mapping[str, Any]) -> None:
        file = self._appended.file
        with self._lock, _locked(file):
            lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
            self._appended.write(lines, mend=b"\n" if _torn(file) else b"")

    def sync(self) -> None:
        self.write()
        self._appended.sync()

    def close(self) -> None:
        self.write()
        self._appended.close()


class _Board:
    """Curves in a file of TensorBoard's.

    Not by its SummaryWriter: that raises in the training loop what a full disk did to its thread, and leaves half a
    record, beyond which nothing of the file is read.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on with the curves of a folder; TensorBoard drops the points beyond `step` that earlier starts drew."""
        folder.mkdir(parents=True, exist_ok=True)
        # read in the order of their names
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._appended = _Appended(folder / name)
        self._records = RecordWriter(self._appended)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def draw(self, tag: str, step: int, values: Mapping[str, Any]) -> None:
        """Draws one point of each value."""
        points = [
            Summary.Value(tag=f"{tag}/{key}", simple_value=value) for key, value in values.items() if key != "step"
        ]
        self._add(step=step, summary=Summary(value=points))

    def sync(self) -> None:
        self._appended.write()
        self._appended.sync()

    def close(self) -> None:
        self._appended.write()
        self._appended.close()

    def _add(self, **event: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())


def _torn(file: IO[bytes]) -> bool:
    """Whether a process died in the middle of the last line."""
    with suppress(OSError):
        size = os.fstat(file.fileno()).st_size
        return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
    return False


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keeps other processes from writing inside: on NFS two hosts that append at once write over each other."""
    with suppress(TimeoutError):  # a holder that hangs: a line is worth the risk
        lock(file, LOCK_SECONDS, pause=0.002)
    try:
        yield
    finally:
        unlock(file)


def _truncate(path: Path, step: int, due: bool) -> dict[str, Any]:
    """Drops rows beyond `step`: each step stands in the file once, however often it was trained. With `due`, drops
    the accuracies after that step, too.

    Returns what a start event says of the steps that are lost: how many, how long they took, when they were trained.
    """
    rows = read_rows(path)
    if path.exists():
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and ("loss" in row or not due))]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    lost = [row for row in rows if row["step"] > step and "loss" in row]
    told: dict[str, Any] = {"repeated_steps": len(lost)}
    if lost and "time" in lost[0]:  # rows of early versions do not tell
        seconds = [row["step_seconds"] + row["data_wait_seconds"] for row in lost]
        told |= {"repeated_seconds": sum(seconds), "repeated_since": lost[0]["time"] - seconds[0],
                 "repeated_until": lost[-1]["time"]}  # fmt: skip
    return told
