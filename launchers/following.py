"""Follows a run, under Slurm or on this machine, until it ends: `submit --wait` and `status --follow`."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from scaleprog.files.display import as_text, clock, say
from scaleprog.launchers.exits import CRASHED, FINISHED, STOPPED
from scaleprog.launchers.snapshot import JobFile
from scaleprog.launchers.status import cause_of, standing, status
from scaleprog.recipe import Recipe
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.lease import between_starts, is_alive, read_owner
from scaleprog.rundir.reading import read
from scaleprog.rundir.records import EVENT, EVENTS, LEFT, METRIC, METRICS, REQUEUES, RESULTS

POLL_SECONDS = 3.0
TELL_SECONDS = 15.0  # between two lines of progress


@dataclass(frozen=True)
class Look:
    """What trains a run at the moment, in words.

    Attributes:
        text: the state of its job in Slurm, its process, or why neither is known.
        over: whether nothing trains it.
        job: Slurm's record of its job; None without one, or if Slurm does not know it or does not answer.
    """

    text: str
    over: bool
    job: slurm_queue.Job | None = None


def follow(run: Path, in_place: bool = False, out: TextIO | None = None) -> int:
    """Shows the progress of a run until it has ended; returns its exit code.

    Args:
        run: the run directory.
        in_place: keep the whole status on a terminal up to date, instead of a line when something changes.
        out: where to show it; default: stdout.

    Raises:
        ScaleprogError: it is not a run directory, or only a Slurm that this machine does not have knows its job.
    """
    Recipe.of_run(run)
    endings = 0
    with (_frame if in_place else _lines)(run, out or sys.stdout) as show:
        while True:
            seen = look(run)
            show(seen)
            endings = endings + 1 if seen.over else 0
            if endings == 2 or (seen.over and is_finished(run)):  # Slurm may requeue a job that has just ended
                return exit_code(run, seen.job)
            time.sleep(POLL_SECONDS)


def look(run: Path) -> Look:
    """What trains a run at the moment. Raises ScaleprogError as `follow` does."""
    file, owner, job, unheard = JobFile.read(run), read_owner(run), None, None
    text = "finished" if is_finished(run) else "nothing trains it"
    if file is not None:
        try:
            job = file.ask()
            text = f"job {file.job}: {_now(job)}"
        except slurm_queue.NoAnswer as error:  # for example, Slurm's controller restarts
            unheard = error
    if job is not None and not job.over:
        return Look(text, over=False, job=job)
    if owner is not None and is_alive(owner, run):
        return Look(f"running, {owner}", over=False)
    if not is_finished(run) and (ended := between_starts(owner)):
        return Look(ended, over=False)
    if unheard is None or is_finished(run):
        return Look(text, over=True, job=job)
    if shutil.which("scontrol") is None:
        raise unheard
    return Look(str(unheard), over=False)


def is_finished(run: Path) -> bool:
    """Whether a run has trained its last step."""
    return (run / RESULTS).exists()


def exit_code(run: Path, job: slurm_queue.Job | None) -> int:
    """The exit code of a run that has ended. Unless it is 0, prints why the run ended."""
    if is_finished(run) or (job is not None and job.state == "COMPLETED"):
        return FINISHED
    file = JobFile.read(run)
    if file is not None:
        last = next(reversed(read(run / REQUEUES, LEFT).rows), None)
        mine = last if last is not None and last.get("job") == file.job else None
        say(standing(run)[1] if mine is None else mine["cause"])
        if job is not None or mine is None or mine.get("requeue") or mine.get("here"):
            return (0 if job is None else job.exit_code) or CRASHED
        return mine.get("code") or CRASHED  # Slurm has forgotten the job
    events = read(run / EVENTS, EVENT).rows
    begun = max((i for i, event in enumerate(events) if event["event"] == "start"), default=0)
    ends = [event for event in events[begun:] if event["event"] in ("error", "preempted", "hang", "stopped_early")]
    if ends and ends[-1]["event"] == "stopped_early":
        return FINISHED
    if not ends:
        say("it has not trained, or ended without notice")
        return CRASHED
    stopped = ends[-1]["event"] == "preempted"
    say(f"{'stopped: ' if stopped else ''}{cause_of(ends[-1])}")
    return STOPPED if stopped else CRASHED


@contextmanager
def _lines(run: Path, out: TextIO) -> Iterator[Callable[[Look], None]]:
    """Shows a line when the state changes, and now and then one for the last step."""
    said, step, told = "", None, 0.0

    def show(seen: Look) -> None:
        nonlocal said, step, told
        if seen.text != said:
            said = seen.text
            print(f"{clock(time.time())} {as_text(said)}", file=out, flush=True)
        if time.monotonic() - told > TELL_SECONDS and (line := _last_step(run)) not in (step, None):
            step, told = line, time.monotonic()
            print(f"{clock(time.time())} {line}", file=out, flush=True)

    yield show


@contextmanager
def _frame(run: Path, out: TextIO) -> Iterator[Callable[[Look], None]]:
    """Shows the whole status, each time in place of the last one."""
    with Live(console=Console(file=out), auto_refresh=False) as live:
        yield lambda _: live.update(Text(status(run).text()), refresh=True)


def _now(job: slurm_queue.Job | None) -> str:
    if job is None:
        return "Slurm no longer knows it"
    about = [job.state, job.nodes and f"on {job.nodes}", job.reason, f"restart {job.restarts}" if job.restarts else ""]
    return ", ".join(filter(None, about))


def _last_step(run: Path) -> str | None:
    """The last line of `metrics.jsonl` in words."""
    for row in reversed(read(run / METRICS, METRIC, last=2**14).rows):
        if "loss" in row:
            return f"step {row['step']}, stage {row['stage']} {row['phase']}, loss {row['loss']:.3f}"
    return None
