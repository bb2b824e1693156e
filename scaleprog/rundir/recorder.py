"""Records a run: metrics.jsonl and TensorBoard (each step once, despite restarts), events.jsonl."""

import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleprog.errors import CheckpointError, Unavailable
from scaleprog.growth.search import Decision
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.appending import Lines, truncate
from scaleprog.rundir.board import Board, event_files
from scaleprog.rundir.drawn import is_drawn
from scaleprog.rundir.reading import IN_THE_WAY, each_row, read, read_rows, reason
from scaleprog.rundir.records import EVENT, EVENTS, METRIC, METRICS
from scaleprog.rundir.state import decision_from_json

__all__ = ["Recorder", "StepTimer", "read_rows"]

LAST_ROW_BYTES = 2**16  # larger than the last row of metrics.jsonl
MOST_WAITING = 0.2  # share of the time that steps may wait for data without a warning
PER_RANK = ("step", "phase", "step_seconds", "data_wait_seconds")  # what a rank draws of a row for itself
OLD_BOARD = "tensorboard"  # the folder in which earlier versions drew


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
    """Writes the records of a run. Rank 0 writes what all ranks share; every rank writes its own events, and curves if
    asked.

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
        rank_curves: bool = False,
        unit: str = "step ms",
    ) -> None:
        """Opens the records, and drops what an earlier start wrote about steps after `step`.

        Args:
            run: the run directory.
            coordinator: the ranks that write.
            generation: number of this start; its events and samples carry it.
            step: optimizer steps finished.
            log_every: steps between two points of a curve.
            redo_evaluation: whether to drop the accuracies after `step`, too, because they will be measured again.
            rank_curves: whether every rank draws curves of its own.
            unit: the unit of the times of a search's candidates; see `Decision.table`.

        Raises:
            CheckpointError: something other than a regular file is in the place of a record.
            Unavailable: a file cannot be written now.
        """
        self.coordinator, self.log_every, self._unit = coordinator, log_every, unit
        self._pending: list[_Pending] = []
        self._generation, self._main = generation, coordinator.rank == 0
        self._samples: Lines | None = None
        self.waiting = 0.0  # the share of the time of the last steps in which some rank waited for data
        self._samples_path = run / f"samples-{coordinator.rank}.jsonl"
        with _to_be_recorded(run):
            self._open(run, step, redo_evaluation, rank_curves and coordinator.world > 1)

    def _open(self, run: Path, step: int, redo_evaluation: bool, rank_curves: bool) -> None:
        self._events = Lines(run / EVENTS)
        rank, world = self.coordinator.rank, self.coordinator.world
        self._own_board = Board(run / f"rank_{rank}", step) if rank_curves else None
        if not self._main:
            return
        self.lost = truncate(run / METRICS, step, redo_evaluation)
        self._metrics = Lines(run / METRICS)
        self._open_board(run, step, redo_evaluation)
        for folder in run.glob("rank_*"):  # of ranks that only an earlier start drew
            number = re.fullmatch("rank_([0-9]{1,9})", folder.name)
            if number and folder.is_dir() and not (rank_curves and int(number[1]) < world):
                Board(folder, step).close()

    def _open_board(self, run: Path, step: int, redo_evaluation: bool) -> None:
        """Continues the curves, or draws all of them again if the run directory has none of its own yet."""
        old = event_files(run / OLD_BOARD)
        if event_files(run) and not old:
            self._board = Board(run, step - 1 if redo_evaluation else step)
            if redo_evaluation:
                for row in read(run / METRICS, METRIC, last=LAST_ROW_BYTES).rows[-1:]:
                    self._draw(row)
            return
        self._board = Board(run, step=0)
        self._board.lay_out()
        moment = time.time()  # evaluations take that of the step before
        for row in each_row(run / METRICS):
            moment = row.get("time", moment)
            self._draw(row | {"time": moment})
        for event in read(run / EVENTS, EVENT).rows:
            if event["event"] == "choice" and event["step"] <= step:
                self._board.tell(event["step"], decision_from_json(event), self._unit)
        if self._board.sync():
            for path in old:
                path.unlink()

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
            self._draw(row)
            if self._own_board is not None and row["step"] % self.log_every == 0:
                self._own_board.draw({key: row[key] for key in PER_RANK} | {"step_seconds": own})
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
        """Writes what an evaluation found after `step` steps as a separate row."""
        if self._main:
            row = {"step": step, **values}
            self._metrics.write(row)
            self._draw(row)

    def choice(self, step: int, decision: Decision) -> None:
        """Shows what a search found and chose in TensorBoard."""
        if self._main:
            self._board.tell(step, decision, self._unit)

    def curve(self, step: int, tag: str, values: Mapping[str, float]) -> None:
        """Draws one point of each value in TensorBoard, as `tag/NAME`: for numbers that no row of metrics.jsonl has."""
        if self._main:
            self._board.curve(step, tag, values)

    def samples(self, step: int, ids: list[int]) -> None:
        """Writes the IDs of the samples of a step into this rank's own file. Raises CheckpointError or Unavailable."""
        if self._samples is None:
            with _to_be_recorded(self._samples_path):
                self._samples = Lines(self._samples_path)
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

    def _draw(self, row: Mapping[str, Any]) -> None:
        """On rank 0, draws a row of metrics.jsonl, if it is an evaluation or a step that makes a point."""
        if self._main and is_drawn(row, self.log_every):
            self._board.draw(row)

    def _write_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.write({"time": time.time(), "event": kind, "generation": self._generation, **fields})


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
