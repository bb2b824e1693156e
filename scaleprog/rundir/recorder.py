"""The records of a run: metrics.jsonl and TensorBoard (each step once, despite restarts), events.jsonl."""

import errno
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from scaleprog.errors import CheckpointError, Unavailable
from scaleprog.files.atomic import lock, unlock, write_parts
from scaleprog.files.display import as_text, counted
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.reading import IN_THE_WAY, is_torn, lines, open_to_append, read, read_rows, reason, to_line
from scaleprog.rundir.records import EVENTS, METRIC, METRICS, NUMBERED

__all__ = ["Recorder", "StepTimer", "read_rows"]

EVENT_FILE = "events.out.tfevents."
LOCK_SECONDS = 2.0  # if another process holds the lock for this long, a line is written without it
LAST_ROW_BYTES = 2**16  # larger than the last row of metrics.jsonl
MOST_WAITING = 0.2  # share of the time that steps may wait for data without a warning
PER_RANK = ("step_seconds", "data_wait_seconds")  # curves that every rank draws for itself


class StepTimer:
    """Seconds and CPU seconds of one training step. On CUDA it uses events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self.began, self._cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Ends the measurement; call it once, when the step has been issued."""
        self.cpu_seconds = time.process_time() - self._cpu_began
        self._elapsed = time.perf_counter() - self.began
        if self._cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """The step's duration in seconds; waits for the device if it has not finished."""
        if not self._cuda:
            return self._elapsed
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


@dataclass
class _Pending:
    """A step whose loss and gradient norm are still on the device."""

    row: dict[str, Any]
    loss: Tensor
    grad_norm: Tensor
    timer: StepTimer
    ids: Tensor


class Recorder:
    """Writes the records of a run. Rank 0 writes what all ranks share; every rank writes its own events and curves.

    Steps stay buffered on the device until `flush` reduces all of them at once.
    """

    def __init__(
        self,
        run: Path,
        coordinator: Coordinator,
        generation: int,
        step: int,
        log_every: int,
        redo_evaluation: bool = False,
    ) -> None:
        """Opens the records, and drops what an earlier start wrote about steps after `step`.

        Args:
            run: the run directory.
            coordinator: the ranks that write.
            generation: number of this start; its events and samples carry it.
            step: optimizer steps finished.
            log_every: steps between two points of a curve.
            redo_evaluation: whether to drop the accuracies after `step`, too, because they will be measured again.

        Raises:
            CheckpointError: something other than a regular file is in the place of a record.
            Unavailable: a file cannot be written now.
        """
        self.coordinator, self.log_every = coordinator, log_every
        self._pending: list[_Pending] = []
        self._generation, self._main = generation, coordinator.rank == 0
        self._samples: _Lines | None = None
        self.waiting = 0.0  # the share of the time of the last steps in which some rank waited for data
        self._samples_path = run / f"samples-{coordinator.rank}.jsonl"
        with _to_be_recorded(run):
            self._open(run, step, redo_evaluation)

    def _open(self, run: Path, step: int, redo_evaluation: bool) -> None:
        self._events = _Lines(run / EVENTS)
        board, world = run / "tensorboard", self.coordinator.world
        self._own_board = _Board(board / f"rank_{self.coordinator.rank}", step) if world > 1 else None
        if not self._main:
            return
        self.lost = truncate(run / METRICS, step, redo_evaluation)
        self._metrics = _Lines(run / METRICS)
        self._board = _Board(board, step - 1 if redo_evaluation else step)
        if redo_evaluation:
            for row in read(run / METRICS, METRIC, last=LAST_ROW_BYTES).rows[-1:]:
                self._draw_step(row)
        for folder in board.glob("rank_*"):  # of ranks that only an earlier start had
            number = re.fullmatch("rank_([0-9]{1,9})", folder.name)
            if number and folder.is_dir() and (world == 1 or int(number[1]) >= world):
                _Board(folder, step).close()

    def step(self, row: dict[str, Any], loss: Tensor, grad_norm: Tensor, timer: StepTimer, ids: Tensor) -> None:
        """Buffers one finished step. `loss` is this rank's mean; `row` holds everything known on the host; `ids` are
        this rank's samples."""
        row["time"] = time.time()
        self._pending.append(_Pending(row, loss.detach(), grad_norm.detach(), timer, ids))

    def flush(self) -> list[dict[str, Any]]:
        """Resolves the buffered steps on all ranks and writes them. Returns their rows, with mean losses.

        `step_seconds` are those of the fastest rank, because the others also wait for a rank whose batch comes late.
        `images_per_second` is the rate since the first of these steps, by the clock on the wall, and `data_wait_share`
        the part of that time in which the rank that waited longest waited for data.
        """
        if not self._pending:
            return []
        steps, self._pending = self._pending, []
        losses = torch.stack([step.loss for step in steps]).double().tolist()
        norms = torch.stack([step.grad_norm for step in steps]).tolist()
        seconds = [step.timer.seconds() for step in steps]
        waited = sum(step.row["data_wait_seconds"] for step in steps)
        wall = time.perf_counter() - (steps[0].timer.began - steps[0].row["data_wait_seconds"])
        rate = sum(step.row["images"] for step in steps) / wall
        means = self.coordinator.mean(losses)
        *negated, waiting = self.coordinator.maximum([*(-value for value in seconds), waited / wall])
        fastest = [-value for value in negated]
        for step, mean, norm, least in zip(steps, means, norms, fastest):
            step.row |= {
                "loss": mean,
                "grad_norm": norm,
                "step_seconds": least,
                "images_per_second": rate,
                "data_wait_share": waiting,
                "cpu_seconds": step.timer.cpu_seconds,
            }
        self._name_ranks_of_nonfinite(steps, losses)
        self._warn_of_waiting(waiting, steps[-1].row["step"])
        rows = [step.row for step in steps]
        if self._main:
            self._metrics.write(*rows)
        for row, own in zip(rows, seconds):
            self._draw_step(row)
            if self._own_board is not None and row["step"] % self.log_every == 0:
                self._own_board.draw("rank", row["step"], {**{key: row[key] for key in PER_RANK}, "step_seconds": own})
        return rows

    def _name_ranks_of_nonfinite(self, steps: "list[_Pending]", losses: list[float]) -> None:
        """Adds the ranks without a finite loss to the row of each step without finite gradients; writes an event."""
        bad = [i for i, step in enumerate(steps) if not math.isfinite(step.row["grad_norm"])]  # the same on all ranks
        if not bad:
            return
        everyones = self.coordinator.gather([[math.isfinite(losses[i]), steps[i].ids.tolist()] for i in bad])
        for row, held in zip((steps[i].row for i in bad), zip(*everyones)):
            row["nonfinite_ranks"] = ranks = [rank for rank, (finite, _) in enumerate(held) if not finite]
            values = {
                key: row[key] if math.isfinite(row[key]) else str(row[key]) for key in ("lr", "loss", "grad_norm")
            }
            samples = {str(rank): ids for rank, (finite, ids) in enumerate(held) if not finite or not ranks}
            self.event("nonfinite", step=row["step"], **values, ranks=ranks, samples=samples)

    def _warn_of_waiting(self, share: float, step: int) -> None:
        """Says so once, and writes an event, if the steps up to `step` waited for data during too large a `share`."""
        if share > MOST_WAITING >= self.waiting and self._main:
            text = f"step {step}: waiting for data takes {share:.0%} of the time; raise data.workers or data.prefetch"
            with suppress(OSError):  # the log may be on a full disk
                print(text, file=sys.stderr, flush=True)
            self.event("data_wait", step=step, share=share)
        self.waiting = share

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the accuracies (percent) after `step` steps as a separate row."""
        if self._main:
            self._metrics.write({"step": step, **values})
            self.curve(step, "evaluation", values)

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value in TensorBoard."""
        if self._main:
            self._board.draw(tag, step, values)

    def samples(self, step: int, ids: list[int]) -> None:
        """Writes the IDs of the samples of a step into this rank's own file. Raises CheckpointError or Unavailable."""
        if self._samples is None:
            with _to_be_recorded(self._samples_path):
                self._samples = _Lines(self._samples_path)
        self._samples.write({"step": step, "generation": self._generation, "ids": ids})

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event for all ranks; may be called from any thread."""
        if self._main:
            self._write_event(kind, fields)

    def own_event(self, kind: str, **fields: Any) -> None:
        """Writes one event of this rank; may be called from any thread."""
        self._write_event(kind, {"rank": self.coordinator.rank, **fields})

    def sync(self) -> None:
        """Makes metrics and curves durable, because a checkpoint of this step must not be ahead of them."""
        if self._main:
            self._metrics.sync()
            self._board.sync()
        if self._own_board is not None:
            self._own_board.sync()

    def close(self) -> None:
        """Writes what a full disk has refused so far, or prints that it is lost. Never raises."""
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
            drawn = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in ("images", "time")}
            self.curve(row["step"], "train", drawn)

    def _write_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.write({"time": time.time(), "event": kind, "generation": self._generation, **fields})


class _Appended:
    """A file to append: each write succeeds whole or not at all. The next write retries what a full disk refused."""

    def __init__(self, path: Path) -> None:
        self.file = open_to_append(path)
        self._refused = b""

    def write(self, data: bytes = b"", mend: bytes = b"") -> None:
        """Appends `mend`, then what was refused so far, then `data`."""
        data = self._refused + data
        try:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(mend + data) < len(mend + data):
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._refused = b""
        except OSError as error:
            if not self._refused:
                self._tell(f"{error}; will retry")
            self._refused = data

    def sync(self) -> None:
        with suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self._refused:
            self._tell(f"the last {len(self._refused)} bytes ARE LOST: the disk refused them")
        try:
            self.file.close()
        except OSError as error:  # a network file system may report a failed write only now
            self._tell(str(error))

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # the log may be on the same full disk
            print(f"{self.file.name}: {text}", file=sys.stderr, flush=True)


class _Lines:
    """A .jsonl file to which several processes append objects."""

    def __init__(self, path: Path) -> None:
        self._appended = _Appended(path)
        self._lock = threading.Lock()

    def write(self, *rows: Mapping[str, Any]) -> None:
        file = self._appended.file
        with self._lock, _locked(file):
            self._appended.write(b"".join(map(to_line, rows)), mend=b"\n" if is_torn(file) else b"")

    def sync(self) -> None:
        self.write()
        self._appended.sync()

    def close(self) -> None:
        self.write()
        self._appended.close()


class _Board:
    """Curves in a TensorBoard event file.

    TensorBoard's own SummaryWriter cannot handle a full disk: the error in its thread reaches the training loop, and
    the file ends in half a record, which hides everything that is written later.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Continues the curves in a folder. TensorBoard drops the points beyond `step` that earlier starts drew."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, also if a clock has been set back since the last one
        found = (re.match(rf"{re.escape(EVENT_FILE)}([0-9]{{10}}\.[0-9]{{6}})", path.name) for path in folder.iterdir())
        moment = max([time.time(), *(float(match[1]) + 1 for match in found if match)])
        name = f"{EVENT_FILE}{moment:017.6f}.{socket.gethostname()}.{os.getpid()}"
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


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keeps other processes from writing: on NFS, two hosts that append at the same time overwrite each other."""
    with suppress(TimeoutError):  # the holder hangs: better to risk the overlap than to lose the line
        lock(file, LOCK_SECONDS, pause=0.002)
    try:
        yield
    finally:
        unlock(file)


@contextmanager
def _to_be_recorded(path: Path) -> Iterator[None]:
    """Turns OSError into CheckpointError if something other than a regular file is in the place of a record, else into
    Unavailable."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or path}: cannot record there: {reason(error)}"
        if error.errno in IN_THE_WAY:
            raise CheckpointError(f"{what}; move it away and start again") from error
        raise Unavailable(f"{what}; fix that and start again") from error


def truncate(path: Path, step: int, redo_evaluation: bool) -> dict[str, Any]:
    """Drops rows after `step`, so that each step appears in the file once, no matter how often it was trained.

    With `redo_evaluation`, also drops the accuracies after that step. Drops lines that are not rows, and prints how
    many. Keeps all other rows unchanged.

    Returns:
        The fields of a start event about the lost steps: how many, how long they took, when they were trained.

    Raises:
        OSError: the file cannot be read or written.
    """
    lost: list[Mapping[str, Any]] = []
    damaged = 0

    def kept() -> Iterator[bytes]:
        nonlocal damaged
        for line in lines(path):
            try:
                row = NUMBERED.validate_json(line)
            except ValidationError:
                damaged += line.endswith(b"\n") and not line.isspace()
                continue
            if row["step"] < step or (row["step"] == step and ("loss" in row or not redo_evaluation)):
                yield line if line.endswith(b"\n") else line + b"\n"
            elif row["step"] > step and "loss" in row:
                lost.append(row)

    if path.is_symlink() or path.exists():
        write_parts(path, kept())
    if damaged:
        print(f"{as_text(path)}: dropped {counted(damaged, 'line')} without a step", file=sys.stderr, flush=True)
    told: dict[str, Any] = {"repeated_steps": len(lost)}
    if lost and all(row.keys() >= {"time", "step_seconds", "data_wait_seconds"} for row in lost):  # not in early rows
        seconds = [row["step_seconds"] + row["data_wait_seconds"] for row in lost]
        told |= {
            "repeated_seconds": sum(seconds),
            "repeated_since": lost[0]["time"] - seconds[0],
            "repeated_until": lost[-1]["time"],
        }
    return told
