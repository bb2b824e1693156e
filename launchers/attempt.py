"""One start of a job's tasks, and what it leaves in the run directory: reports, its name as the owner, its events."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from scaleprog.errors import ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import as_text, say
from scaleprog.ranks.pulse import Stand
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.reading import read, read_object, to_line
from scaleprog.rundir.records import EVENT, EVENTS, Job, Owner, Report

MOST_REPORTS = 100_000
T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """One start of a job's tasks.

    Args:
        job: the id of the job.
        restart: how many times Slurm had restarted the job before.
        repeat: how many times the batch script had started the tasks again since then, see `again.py`.
    """

    job: str
    restart: int
    repeat: int = 0

    @classmethod
    def current(cls, variables: Mapping[str, str] = os.environ) -> "Attempt":
        """The start of this process, from its environment. Raises ScaleprogError outside a job."""
        job = slurm_queue.own_job(variables)
        if job is None:
            given = as_text(variables.get("SLURM_JOB_ID", ""), most=60)
            raise ScaleprogError(f"SLURM_JOB_ID is {given!r}, so this is not a Slurm job")
        return cls(job, *slurm_queue.own_start(variables))

    def __str__(self) -> str:
        return f"{self.job}-{self.restart}{f'.{self.repeat}' if self.repeat else ''}"


def report(
    run: Path, start: Attempt, rank: int, code: int, cause: str, reason: str | None = None, stand: Stand | None = None
) -> None:
    """Writes a report of why a task exits with `code`.

    If it cannot write the report, it raises no error: the exit code alone must suffice.

    Args:
        run: the run directory.
        start: the start that the task belongs to.
        rank: the rank of the task.
        code: the exit code of the task.
        cause: why it exits, in words.
        reason: the `reason` of a Preempted; None for every other error.
        stand: where the task stands, if it hangs.
    """
    with suppress(OSError):
        path = _report(run, start, rank)
        (run / "jobs").mkdir(exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        row = {"time": time.time(), "rank": rank, "code": code, "cause": cause, "reason": reason}
        row |= {} if stand is None else {"stand": asdict(stand)}
        write_whole(path, to_line(row).decode())


def reports_of(run: Path, start: Attempt) -> list[Report]:
    """The reports of the tasks of a start."""
    return [row for path in report_files(run, start) if (row := object_in(path, Report)) is not None]


def has_reported(run: Path, start: Attempt, rank: int) -> bool:
    """Whether a task has written its report."""
    return _report(run, start, rank).exists()


def _report(run: Path, start: Attempt, rank: int) -> Path:
    return _reports(run) / f"{start}-{rank}.json"


def report_files(run: Path, start: Attempt) -> list[Path]:
    """The files of the reports of a start's tasks."""
    return list(islice(_reports(run).glob(f"{start}-*.json"), MOST_REPORTS))


def _reports(run: Path) -> Path:
    return run / "jobs" / "reports"


def refused(run: Path, start: Attempt) -> bool:
    """Whether the run directory is that of another job: by `job.json`, unless the job of `start` trains there."""
    job, owner = object_in(run / "job.json", Job), object_in(run / "owner.json", Owner)
    return job is not None and job["job"] != start.job and (owner is None or owner["job"] != start.job)


def latest(run: Path, start: Attempt) -> Attempt:
    """The last start of the tasks since Slurm's restart `start`, as far as they have begun to train."""
    owner = object_in(run / "owner.json", Owner)
    if owner is None or (owner["job"], owner["restart"]) != (start.job, start.restart):
        return start
    return replace(start, repeat=owner.get("repeat", 0))


def step_of(run: Path, start: Attempt) -> str | None:
    """The number of Slurm's step in which a start trains; None while it has not begun to."""
    owner = _owner(run, start)
    return None if owner is None else owner.get("step")


def _owner(run: Path, start: Attempt) -> Owner | None:
    """What owner.json says of a start; None if the last start that has begun to train is another one."""
    owner = object_in(run / "owner.json", Owner)
    if owner is None or (owner["job"], owner["restart"], owner.get("repeat", 0)) != astuple(start):
        return None
    return owner


def hurried_by(run: Path, start: Attempt) -> list[str]:
    """The names of the signals, if `events.jsonl` says that they made this start exit at once; otherwise empty."""
    owner = _owner(run, start)
    if owner is None:
        return []
    mine = [event for event in rows_in(run / EVENTS, EVENT) if event.get("generation") == owner["generation"]]
    hurried = any(event["event"] == "hurried" for event in mine)
    signals = (event["signal"] for event in mine if event["event"] == "signal")  # one event from every rank
    return list(dict.fromkeys(signals)) if hurried else []


def rows_in(path: Path, kind: Any) -> list[Any]:
    """The records in a file. Invalid lines count as absent, and a message says so."""
    told = read(path, kind)
    if told.trouble:
        say(told.trouble)
    return told.rows


def object_in(path: Path, kind: type[T]) -> T | None:
    """The record in a small file. An invalid file counts as absent (None), and a message says so."""
    try:
        return read_object(path, kind)
    except ScaleprogError as error:
        say(f"{error}; the file counts as absent")
        return None
