"""Records a run: metrics.jsonl and TensorBoard (each step once, despite restarts), events.jsonl."""

import math
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaleprog.errors import CheckpointError, Unavailable
from scaleprog.growth.search import Decision
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.ranks.waits import Waited
from scaleprog.rundir.appending import Lines, truncate
from scaleprog.rundir.board import About, Board, event_files
from scaleprog.rundir.drawn import is_drawn
from scaleprog.rundir.pictures import grid
from scaleprog.rundir.reading import IN_THE_WAY, each_row, read, read_rows, reason
from scaleprog.rundir.records import EVENT, EVENTS, METRIC, METRICS
from scaleprog.rundir.state import decision_from_json
from scaleprog.rundir.straggler import Change, Stragglers
from scaleprog.rundir.vitals import StepTimer, memory

__all__ = ["Recorder", "StepTimer", "read_rows"]

LAST_ROW_BYTES = 2**16  # larger than the last row of metrics.jsonl
MOST_WAITING = 0.2  # share of the time that steps may wait for data without a warning
PER_RANK = ("step", "phase", "data_wait_seconds")  # what a rank draws of its rows, besides what it measured itself
CPU = torch.device("cpu")
OLD_BOARD = "tensorboard"  # the folder in which earlier versions drew


@dataclass(slots=True)
class _Pending:
    """A step whose loss and gradient norm are still on the device."""

    row: dict[str, Any]
    loss: Tensor
    grad_norm: Tensor
    timer: StepTimer
    ids: Tensor
    flops: float
    waited: Waited | None

    def own(self) -> dict[str, float]:
        """What this rank alone has measured of the step, in seconds; waits for the device if it has not finished."""
        found = {"step_seconds": self.timer.seconds()}
        if self.waited is not None:
            found["collective_wait_seconds"] = min(self.waited.seconds(), found["step_seconds"])
        return found


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
        *,
        about: About | None = None,
        hosts: Sequence[str] = (),
        skipped: int = 0,
        peak_flops: float | None = None,
        device: torch.device = CPU,
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
            about: what to say of the run at its beginning.
            hosts: the host of every rank; default: all on this one.
            skipped: updates skipped before `step`.
            peak_flops: bf16 FLOP/s of all ranks' devices; None: not known, so `mfu` is left out.
            device: this rank's, whose memory is recorded.

        Raises:
            CheckpointError: something other than a regular file is in the place of a record.
            Unavailable: a file cannot be written now.
        """
        self.coordinator, self.log_every, self._unit = coordinator, log_every, unit
        self.peak_flops, self._device, self._skipped, self._about = peak_flops, device, skipped, about
        self._stragglers = Stragglers(hosts or [socket.gethostname()] * coordinator.world, log_every)
        self._pending: list[_Pending] = []
        self._images: list[tuple[int, str, Tensor]] = []
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
        if self._about is not None:
            self._board.introduce(self._about)
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

    def step(
        self,
        row: dict[str, Any],
        loss: Tensor,
        grad_norm: Tensor,
        timer: StepTimer,
        ids: Tensor,
        *,
        flops: float = 0.0,
        waited: Waited | None = None,
    ) -> None:
        """Buffers one finished step.

        Args:
            row: everything known on the host.
            loss: this rank's mean, 0-D, without a graph.
            grad_norm: of the gradients, 0-D, likewise.
            timer: of the step.
            ids: this rank's samples.
            flops: model FLOPs of the step on all ranks.
            waited: this rank's time in collectives; None: not measured.
        """
        row["time"] = time.time()
        self._pending.append(_Pending(row, loss, grad_norm, timer, ids, flops, waited))

    def flush(self) -> list[dict[str, Any]]:
        """Resolves the buffered steps on all ranks and writes them. Returns their rows, with mean losses.

        docs/tensorboard.md says what the numbers of a row mean. `step_seconds` are those of the fastest rank, because
        the others also wait for a rank whose batch comes late. Rates and shares are those of the time since the first
        of these steps, by the clock on the wall.
        """
        if not self._pending:
            return []
        steps, self._pending = self._pending, []
        losses = torch.stack([step.loss for step in steps]).double().tolist()
        norms = torch.stack([step.grad_norm for step in steps]).tolist()
        owns = [step.own() for step in steps]
        waited = sum(step.row["data_wait_seconds"] for step in steps)
        wall = time.perf_counter() - (steps[0].timer.began - steps[0].row["data_wait_seconds"])
        counts = 1.0  # of the waits for data, the part in which the device was idle
        if self._device.type == "cuda" and waited:
            idle = max(0.0, wall - sum(own["step_seconds"] for own in owns))
            counts = min(1.0, idle / waited)
        held = memory(self._device)
        busy = self._busy(steps, owns, counts)
        means = self.coordinator.mean([*losses, *busy])
        least = [-own["step_seconds"] for own in owns]
        *most, waiting = self.coordinator.maximum([*least, *held.values(), counts * waited / wall])
        shared = {
            "images_per_second": sum(step.row["images"] for step in steps) / wall,
            "data_wait_share": waiting,
            **dict(zip(held, most[len(steps) :])),
        }
        if self.peak_flops:
            shared["mfu"] = sum(step.flops for step in steps) / wall / self.peak_flops
        shared |= self._over_ranks(steps, means[len(steps) :], wall)
        for step, mean, norm, negated, own in zip(steps, means, norms, most, owns):
            self._skipped += 0 if math.isfinite(norm) else 1
            row = step.row
            row["loss"], row["grad_norm"] = mean, norm
            row.update(own)
            row["step_seconds"] = -negated
            row.update(shared)
            row["cpu_seconds"], row["skipped_updates"] = step.timer.cpu_seconds, self._skipped
        self._name_ranks_of_nonfinite(steps, losses)
        self._warn_of_waiting(waiting, steps[-1].row["step"])
        rows = [step.row for step in steps]
        self._show_images()
        if self._main:
            self._metrics.write(*rows)
        for row, own in zip(rows, owns):
            self._draw(row)
            if self._own_board is not None and row["step"] % self.log_every == 0:
                self._own_board.draw({key: row[key] for key in PER_RANK} | own)
        return rows

    def _busy(self, steps: "list[_Pending]", owns: Sequence[Mapping[str, float]], counts: float) -> list[float]:
        """A sum over ranks of which holds each rank's own seconds of some steps, then each rank's waits for data.

        `counts`: the part of this rank's waits for data that counts.

        Empty if there are no other ranks, or no step in which the time in collectives was measured.
        """
        world, rank = self.coordinator.world, self.coordinator.rank
        measured = [(step, own) for step, own in zip(steps, owns) if step.waited is not None]
        if world == 1 or not measured:
            return []
        data = counts * sum(step.row["data_wait_seconds"] for step, _ in measured)
        busy = sum(own["step_seconds"] - own["collective_wait_seconds"] for _, own in measured)
        found = [0.0] * (2 * world)
        found[rank], found[world + rank] = data + busy, data
        return found

    def _over_ranks(self, steps: "list[_Pending]", means: Sequence[float], wall: float) -> dict[str, float]:
        """What the rows show of the ranks' own seconds; `means`: of what `_busy` returned on each rank.

        Names ranks that have become stragglers, or are none any more.
        """
        if not means:
            return {}
        measured = len([step for step in steps if step.waited is not None])
        own, data = self.coordinator.world / measured * np.reshape(means, (2, -1))  # of a step
        count, step = len(steps), steps[-1].row["step"]
        if self._main and (change := self._stragglers.add(count * own, count * data, count, wall)) is not None:
            self._tell_of_stragglers(step, change)
        return {
            "slowest_rank": int(own.argmax()),
            "slowest_rank_seconds": float(own.max()),
            "median_rank_seconds": float(np.median(own)),
        }

    def _tell_of_stragglers(self, step: int, change: Change) -> None:
        """Says which ranks became stragglers by `step`, or are none any more, and writes events with all of them."""
        for sentence in change.sentences:
            _say(f"step {step}: {sentence}")
        began, ended = [*change.began, *change.more_began], [*change.ended, *change.more_ended]
        for kind, ranks in (("straggler", began), ("straggler_over", ended)):
            if ranks:
                slow = [vars(rank) for rank in ranks]
                self.event(kind, step=step, median_seconds=change.median_seconds, slow=slow)

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
            _say(f"step {step}: waiting for data takes {share:.0%} of the time; raise data.workers or data.prefetch")
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

    def images(self, step: int, tag: str, images: Tensor) -> None:
        """Shows images (B, H, W, C) uint8, on any device, side by side in TensorBoard, from the next `flush` on."""
        if self._main:
            self._images.append((step, tag, images))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """Shows a PNG in TensorBoard."""
        if self._main:
            self._board.picture(step, tag, png)

    def conclude(self) -> None:
        """Marks the run as finished in TensorBoard's table of runs."""
        if self._main:
            self._board.conclude()

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

    def _show_images(self) -> None:
        for step, tag, images in self._images:
            self._board.picture(step, tag, grid(images.cpu()))
        self._images = []

    def _draw(self, row: Mapping[str, Any]) -> None:
        """On rank 0, draws a row of metrics.jsonl, if it is an evaluation or a step that makes a point."""
        if self._main and is_drawn(row, self.log_every):
            self._board.draw(row)

    def _write_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._events.write({"time": time.time(), "event": kind, "generation": self._generation, **fields})


def _say(text: str) -> None:
    with suppress(OSError):  # the log may be on a full disk
        print(text, file=sys.stderr, flush=True)


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
