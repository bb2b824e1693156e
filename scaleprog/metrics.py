"""What a run tells: metrics.jsonl and TensorBoard (each step once, over restarts), events.jsonl, a progress line."""

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from scaleprog.sharding.coordinator import Coordinator

PLAIN_EVERY = 15.0  # seconds between two progress lines where the output is no terminal


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
    """Rank 0's record of a run. Steps are buffered on the device and resolved in `flush`, one reduction for all."""

    def __init__(self, run: Path, coordinator: Coordinator, step: int, log_every: int) -> None:
        """`step`: optimizer steps finished; whatever a run that got further wrote beyond it is dropped."""
        self.coordinator, self.log_every = coordinator, log_every
        self._pending: list[tuple[dict[str, Any], Tensor, Tensor, StepTimer]] = []
        self._main = coordinator.rank == 0
        if not self._main:
            return
        self._events = _Lines(run / "events.jsonl")
        self.repeated = _truncate(run / "metrics.jsonl", step)  # steps that were trained before and are lost
        self._metrics = _Lines(run / "metrics.jsonl")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def step(self, row: dict[str, Any], loss: Tensor, grad_norm: Tensor, timer: StepTimer) -> None:
        """Takes one finished step; `loss` is this rank's mean, `row` holds everything known on the host."""
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
                if row["step"] % self.log_every == 0:
                    self._scalars("train", row, skip=("step", "phase", "images"))
        return written

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes accuracies after `step` steps, as a row of their own."""
        if self._main:
            self._metrics.write({"step": step, **values})
            self.curve(step, "evaluation", values)

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value in TensorBoard."""
        if self._main:
            self._scalars(tag, {"step": step, **values}, skip=("step",))

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one event of the run's life; from any thread."""
        if self._main:
            self._events.write({"time": time.time(), "event": kind, **fields})

    def sync(self) -> None:
        """Makes everything recorded durable: a checkpoint of this step must not know more than its curves do."""
        if self._main:
            self._metrics.sync()
            self._board.flush()

    def close(self) -> None:
        """Writes out what is buffered by TensorBoard."""
        if self._main:
            self._board.close()
            self._metrics.close()
            self._events.close()

    def _scalars(self, tag: str, row: Mapping[str, Any], skip: tuple[str, ...]) -> None:
        for key, value in row.items():
            if key not in skip:
                self._board.add_scalar(f"{tag}/{key}", value, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that was cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
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
        """Prints a line of its own on rank 0."""
        if self._enabled:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._enabled and self._terminal:
            self._live.stop()


class _Lines:
    """Objects appended to a .jsonl file, whole or not at all; what a full disk refuses is kept for the next time."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._refused = b""
        self._lock = threading.Lock()

    def write(self, *rows: Mapping[str, Any]) -> None:
        with self._lock:
            data = self._refused + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
            before = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._refused = b""
            except OSError as error:
                if not self._refused:
                    print(f"{self._file.name}: {error}; kept for later", file=sys.stderr, flush=True)
                self._file.truncate(before)
                self._refused = data

    def sync(self) -> None:
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._refused:
            self.write()
        self._file.close()


def _truncate(path: Path, step: int) -> int:
    """Drops rows beyond `step`: each step stands in the file once, however often it was trained. Returns how many."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    if path.exists():
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
    return sum("loss" in row for row in rows) - sum("loss" in row for row in kept)
