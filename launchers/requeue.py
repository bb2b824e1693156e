"""Decides whether a Slurm job starts again. The batch script runs this after the tasks have ended for any reason.

`python -m scaleprog.launchers.requeue RUN CODE MAX_RESTARTS [SIGNAL_BEFORE]`, where CODE is srun's exit code. That code
is not enough: if srun kills the other tasks, its exit code shows their signal and hides how the first task failed. So
each task that exits for a known reason writes a report (`attempt.report`). SIGNAL_BEFORE says how many seconds before
the time limit Slurm signals it.
"""

import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import say as _say
from scaleprog.launchers.attempt import Attempt, hurried_by, object_in, refused, report_files, reports_of, rows_in
from scaleprog.launchers.attempt import report as report  # also imported from here
from scaleprog.launchers.exits import CRASHED, FINISHED, MISTAKE, STOPPED
from scaleprog.launchers.hangs import Hang
from scaleprog.ranks.pulse import stand_of
from scaleprog.ranks.stop import ignore_stops
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.reading import append_row
from scaleprog.rundir.records import LEFT, REQUEUES, Measured

INTERRUPTED, USR2, TERM = (128 + number for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM))
"""Exit codes of a task that gets a signal before the run handles signals."""
FRUITLESS = 3  # after this many consecutive restarts without a new checkpoint, the cause is not bad luck
LINE_BYTES = 4096  # more than a line of requeues.jsonl has
PAUSES = (1, 1, 2, 4, 8, 15, 30, 60, 60)  # seconds before each retry; short at first: a grace time may be running
MAX_RESTARTS, SIGNAL_BEFORE = 20, 120  # used if the batch script does not pass a number
EARLY_SECONDS = 60  # how much earlier than that Slurm may signal a time limit
AGAIN = "submit it again to resume from the last checkpoint"

Kind = Literal["finished", "mistake", "interrupted", "stopped", "crash"]


@dataclass(frozen=True)
class End:
    """How a start ended. `code` is the exit code for the batch script."""

    kind: Kind
    code: int
    cause: str


@dataclass(frozen=True)
class Verdict:
    """Whether the job starts again; if not, `why` gives the reason."""

    requeue: bool
    why: str = ""
    here: bool = False
    """Whether it starts again without Slurm: the batch script starts the tasks once more."""


def how_it_ended(
    code: int,
    reports: Sequence[Mapping[str, Any]],
    signals: Sequence[str],
    preempted: bool,
    hang: Hang | None = None,
) -> End:
    """Determines how a start ended.

    Args:
        code: srun's exit code.
        reports: the reports of the tasks. A mistake takes precedence over all other reports, then an orderly stop.
        signals: the signals that made the run exit at once, without a report.
        preempted: whether Slurm has announced a preemption.
        hang: what the reports of hung tasks show.
    """
    if code == FINISHED:
        return End("finished", FINISHED, "finished")
    first = sorted(reports, key=lambda row: row["time"])
    for row in first:
        if row["code"] == MISTAKE:
            return End("mistake", MISTAKE, row["cause"])
    if code == MISTAKE:
        return End("mistake", MISTAKE, "see the log")
    for row in first:
        if row["code"] == STOPPED:
            return _stop(row["cause"], row.get("reason"))
    if hang is not None:
        return End("crash", code, hang.message)
    for row in first:
        return End("crash", code, f"rank {row['rank']}: {row['cause']}")
    if signals:
        return _stop(f"stopped at once by {' and '.join(signals)}", *signals)
    if code in (INTERRUPTED, USR2, STOPPED) or (code == TERM and preempted):
        by = {INTERRUPTED: "SIGINT", USR2: "SIGUSR2", TERM: "SIGTERM"}.get(code, "a signal")
        return _stop(f"stopped by {by} before training began", by)
    return End("crash", code, f"{'a task was killed, ' if code > 128 else ''}exit code {code}")


def with_limit(end: End, job: slurm_queue.Job | None, ended: float, notice: int) -> End:
    """The end of a start. If its signal came when Slurm signals a time limit, the cause names the limit instead.

    Args:
        end: how the start ended.
        job: Slurm's current record of the job; None if there is none.
        ended: when it ended, in seconds since 1970.
        notice: how many seconds before its time limit Slurm signals a job.
    """
    if end.kind != "stopped" or job is None or job.end is None or job.preempted:
        return end
    if job.state not in ("RUNNING", "TIMEOUT") or job.end - ended > notice + EARLY_SECONDS:
        return end
    if end.cause.startswith("stopped at once by SIGUSR2"):
        return replace(end, cause=f"reached its time limit: {end.cause}")
    return replace(end, cause=end.cause.replace("stopped by SIGUSR2", "reached its time limit", 1))


def _stop(cause: str, *reasons: str | None) -> End:
    return End("interrupted" if "SIGINT" in reasons else "stopped", STOPPED, cause)


def decide(
    end: End,
    start: Attempt,
    job: slurm_queue.Job | None,
    earlier: Sequence[Mapping[str, Any]],
    progress: tuple[int, int],
    limit: int,
    forgotten: bool = False,
    unrecorded: int = 0,
) -> Verdict:
    """Decides whether the job starts again.

    Args:
        end: how this start ended.
        start: this start. It may be an orphan: Slurm may already have started the job again elsewhere.
        job: Slurm's current record of the job; None if Slurm does not answer, or has none.
        earlier: the lines of `requeues.jsonl`.
        progress: the result of `progress_of` for the run.
        limit: the most restarts after crashes; requested stops do not count.
        forgotten: whether Slurm has answered that it does not know the job.
        unrecorded: the result of `unrecorded`.
    """
    if end.kind == "finished":
        return Verdict(False)
    if end.kind == "mistake":
        return Verdict(False, "a retry would fail the same way")
    if end.kind == "interrupted":
        return Verdict(False, "a user asked it to stop")
    if job is None and forgotten:
        return Verdict(False, f"Slurm answers, but no longer knows the job; {AGAIN}")
    if job is None:
        return Verdict(False, f"this node cannot reach Slurm; {AGAIN}")
    if job.restarts != start.restart:
        return Verdict(False, f"Slurm itself has already restarted it (restart {job.restarts})")
    if job.state != "RUNNING":
        return Verdict(False, f"Slurm is ending it: {job.state}")
    own = [row for row in earlier if row.get("job") == start.job]
    crashes = sum(row.get("kind") == "crash" for row in own)
    if end.kind == "crash" and crashes >= limit:
        return Verdict(False, f"it has crashed {crashes + 1} times (--max-restarts {limit})")
    if end.kind == "crash" and unrecorded >= FRUITLESS:
        return Verdict(False, f"{unrecorded} restarts could not be counted, because {REQUEUES} cannot be written")
    last = [(row.get("kind"), row.get("step"), row.get("measured", 0)) for row in own[-FRUITLESS:]]
    if last == [(end.kind, *progress)] * FRUITLESS:
        if end.kind == "crash":
            return Verdict(False, f"{FRUITLESS} consecutive restarts committed nothing new; see the log")
        if not job.preempted and not any(row.get("preempted") for row in own[-FRUITLESS:]):
            why = "its time is too short to make progress, or there is no room for a checkpoint"
            return Verdict(False, f"{FRUITLESS} consecutive restarts stopped with nothing new: {why}; see the log")
    return Verdict(True)


def after(run: Path, code: int, limit: int, notice: int = SIGNAL_BEFORE) -> int:
    """Decides whether the job starts again, requeues it or prints why not, and adds a line to `requeues.jsonl`.

    Args:
        run: the run directory.
        code: srun's exit code.
        limit: the most restarts after crashes.
        notice: how many seconds before its time limit Slurm signals the job.

    Returns:
        The exit code for the batch script.
    """
    if code == FINISHED:
        return code
    try:
        start = Attempt.current()
    except ScaleprogError as error:
        _say(f"{error}; scaleprog restarts nothing")
        return code
    remains = Remains.by(run, start, code, notice)
    end, verdict, preempted = _decide_and_requeue(remains, limit)
    outcome = "starts again" if verdict.requeue else f"does not start again: {verdict.why}"
    remains.record(end, verdict, preempted, outcome)
    return end.code


@dataclass(frozen=True)
class Remains:
    """What a start has left behind, and the batch script has not judged yet.

    Args:
        run: the run directory.
        start: the start.
        code: srun's exit code.
        notice: how many seconds before its time limit Slurm signals the job.
        reports: the reports of its tasks.
        signals: the signals that made the run exit at once, without a report.
        hang: what the reports of hung tasks show.
        earlier: the lines of `requeues.jsonl`.
        progress: the result of `progress_of`.
        ended: when it ended, in seconds since 1970.
    """

    run: Path
    start: Attempt
    code: int
    notice: int
    reports: Sequence[Mapping[str, Any]]
    signals: Sequence[str]
    hang: Hang | None
    earlier: Sequence[Mapping[str, Any]]
    progress: tuple[int, int]
    ended: float

    @classmethod
    def by(cls, run: Path, start: Attempt, code: int, notice: int) -> "Remains":
        """What a start has left behind."""
        reports = reports_of(run, start)
        stands = [stand_of(report["stand"]) for report in reports if "stand" in report]
        hang = Hang.of(stands, run, {report["rank"] for report in reports}) if stands else None
        signals, earlier = hurried_by(run, start), rows_in(run / REQUEUES, LEFT)
        return cls(run, start, code, notice, reports, signals, hang, earlier, progress_of(run), time.time())

    def end(self, job: slurm_queue.Job | None) -> End:
        """How the start ended. `job`: Slurm's current record of it; None if there is none."""
        preempted = job is not None and job.preempted
        found = how_it_ended(self.code, self.reports, self.signals, preempted, self.hang)
        told = any(report["code"] == MISTAKE for report in self.reports)
        again = self.start.restart or self.start.repeat
        if found.kind == "mistake" and not told and again and self.progress[0]:
            # what has trained here is no mistake of the user's: a node may lack a program, or the run directory
            found = End("crash", CRASHED, f"exit code {MISTAKE}, although the run has trained before; see the log")
        return with_limit(found, job, self.ended, self.notice)

    def record(self, end: End, verdict: Verdict, preempted: bool, outcome: str) -> None:
        """Adds a line to `requeues.jsonl`, records a hang, removes the reports, and says what comes of it."""
        if self.hang is not None:
            self.hang.record(self.run)
        step, measured = self.progress
        line = {"time": self.ended, **asdict(self.start), **asdict(end), "step": step, "measured": measured}
        line |= {"preempted": preempted, **asdict(verdict)}
        line = {key: value for key, value in line.items() if value or key not in ("repeat", "here")}
        try:
            if not refused(self.run, self.start):
                append_row(self.run / REQUEUES, line)
            for path in report_files(self.run, self.start):
                path.unlink()
        except OSError as error:
            _say(str(error))
        _say(end.cause)
        _say(f"job {self.start.job} {outcome}")


def _decide_and_requeue(remains: Remains, limit: int) -> tuple[End, Verdict, bool]:
    """Decides, and requeues the job if it starts again.

    If Slurm does not answer, this asks and decides again from scratch, because Slurm may have received the last request
    or may have ended the job in the meantime.

    Returns:
        How the start ended, the verdict, and whether Slurm has announced a preemption.
    """
    start = remains.start
    pauses = [*PAUSES] if shutil.which("scontrol") else []
    missing = unrecorded(remains.run, start, remains.earlier)
    while True:
        job, unheard = None, ""
        try:
            job = slurm_queue.find(start.job)
        except slurm_queue.NoAnswer as error:
            unheard = str(error)
        preempted = job is not None and job.preempted
        end = remains.end(job)
        forgotten = job is None and not unheard
        verdict = decide(end, start, job, remains.earlier, remains.progress, limit, forgotten, missing)
        if verdict.requeue:
            try:
                slurm_queue.requeue(start.job)
            except slurm_queue.NoAnswer as error:
                unheard, verdict = str(error), Verdict(False, f"Slurm does not requeue it: {error}; {AGAIN}")
        if not unheard or end.kind in ("mistake", "interrupted"):  # these do not need Slurm's answer
            return end, verdict, preempted
        _say(unheard)
        if not pauses:
            return end, verdict, preempted
        time.sleep(pauses.pop(0))


def unrecorded(run: Path, start: Attempt, earlier: Sequence[Mapping[str, Any]]) -> int:
    """How many of Slurm's restarts of a job have no line in `requeues.jsonl`, if no line can be written now; else 0.

    Slurm's own restarts, after the loss of a node, have none either, but then one can be written.
    """
    told = {row.get("restart") for row in earlier if row.get("job") == start.job}
    missing = start.restart - len(told)
    if missing < FRUITLESS:
        return 0
    trial = run / f".{REQUEUES}.{start}"
    try:
        trial.unlink(missing_ok=True)  # a link would be followed
        trial.write_text(" " * LINE_BYTES)
    except OSError:
        return missing
    finally:
        with suppress(OSError):
            trial.unlink()
    return 0


def progress_of(run: Path) -> tuple[int, int]:
    """The step of the newest checkpoint, and how much of an unfinished measurement the last stop saved."""
    half = object_in(run / "measuring.json", Measured)
    return committed_step(run), 0 if half is None else half["done"]


def _main(run: str, code: str, limit: str, notice: str = str(SIGNAL_BEFORE)) -> int:
    """The entry point for the batch script. It always decides, whatever the run directory contains."""
    ended = int(code) if re.fullmatch("[0-9]{1,3}", code) else 1
    try:
        most = _number("MAX_RESTARTS", limit, MAX_RESTARTS)
        return after(Path(run), ended, most, _number("SIGNAL_BEFORE", notice, SIGNAL_BEFORE))
    except Exception as error:  # nothing runs after this that could requeue the job
        _say(f"cannot decide whether the job restarts: {type(error).__name__}: {error}; {AGAIN}")
        return ended


def _number(name: str, text: str, otherwise: int) -> int:
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    _say(f"{name} {text!r} is not a number; using {otherwise}")
    return otherwise


if __name__ == "__main__":
    ignore_stops()  # they are for the tasks, or Slurm's after a requeue
    sys.exit(_main(*sys.argv[1:5]))
