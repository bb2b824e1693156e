"""The status of a run, from its run directory and, if it is a Slurm job, from Slurm."""

import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text, clock, counted, first_line
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Choice, Subnet
from scaleprog.launchers.snapshot import JOB, JobFile
from scaleprog.recipe import Recipe
from scaleprog.recipe.parent import ParentSettings
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.lease import ask_to_stop, between_starts, is_alive, read_owner, runs
from scaleprog.rundir.planned import read_plan
from scaleprog.rundir.reading import read, read_object, still_told
from scaleprog.rundir.records import EVENT, EVENTS, LEFT, METRIC, METRICS, REQUEUES, RESULTS, Results
from scaleprog.rundir.state import decision_from_json

RECENT_STEPS = 50
ORDERLY = {"stopped_early": "reached train.max_steps", "finish": "finished, then made longer"}
"""Events that end a start as its recipe asks, and what comes of that if there is another start."""
LAST_BYTES = 8 * 2**20  # read only the end of metrics.jsonl (thousands of steps); the file may be long
MOST_RESTARTS = 50  # the most restarts shown
MOST_SLOW = 8  # the most slow ranks shown
MOST_SECONDS = 1e9  # a rate by which a step took longer is not believed
Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Restart:
    """A start after the first: when it began (seconds since the epoch), why it was needed, and the step it began at."""

    time: float
    cause: str
    step: int


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Attributes:
        run: the run directory.
        state: "finished", "running", "stopped", or the job's state in Slurm, in lowercase.
        detail: more about the state, in words; may be empty.
        job: the id of the Slurm job; None without one.
        step: the last optimizer step known.
        steps: optimizer steps in the whole run, as far as decided or expected.
        stage: the stage of the last step, from 1.
        phase: the kind of phase of the last step.
        network: the Subnet of the last step, in words.
        loss: the loss of the last step; None also if it is not finite.
        top1: the latest top-1 accuracy, in percent; the better of the online and EMA weights.
        top1_step: the step of that evaluation.
        images_per_second: the recent rate of training.
        seconds_left: expected training time left.
        damaged: different damaged samples that were replaced so far.
        slow: a sentence on each rank that has been slow for long, the slowest first; empty for a finished run.
        commit_step: the step of the newest checkpoint; 0 if there is none.
        commit_age: seconds since that checkpoint was written.
        restarts: every start after the first.
        parent: the run that this one continues, and the step from which it does; None unless it is a fork.
        troubles: what could not be read in the run directory, in words.

    None means "not known (yet)" unless noted otherwise.
    """

    run: str
    state: str
    detail: str
    job: str | None
    step: int
    steps: int | None
    stage: int | None
    phase: str | None
    network: str | None
    loss: float | None
    top1: float | None
    top1_step: int | None
    images_per_second: float | None
    seconds_left: float | None
    damaged: int
    slow: list[str]
    commit_step: int
    commit_age: float | None
    restarts: list[Restart]
    parent: str | None
    troubles: list[str]

    def text(self) -> str:
        """The status as text for people."""
        of = "" if self.steps is None else f" of {self.steps} ({self.step / self.steps:.0%})"
        lines = [("state", f"{self.state}{self.detail and f' ({self.detail})'}"), ("step", f"{self.step}{of}")]
        lines += [("continues", self.parent)] if self.parent else []
        if self.stage is not None:
            loss = "not finite" if self.loss is None else f"{self.loss:.3f}"
            lines.append(("stage", f"{self.stage}, {self.phase}, {self.network}, loss {loss}"))
        if self.top1 is not None:
            lines.append(("top-1", f"{self.top1:.2f} % after step {self.top1_step}"))
        if self.images_per_second is not None:
            left = "" if self.seconds_left is None else f"; about {span(self.seconds_left)} of training left"
            lines.append(("rate", f"{self.images_per_second:.0f} images/s{left}"))
        if self.damaged:
            lines.append(("damaged", f"{counted(self.damaged, 'sample')}, replaced by others; events.jsonl has names"))
        lines += [("slow", sentence) for sentence in self.slow[:MOST_SLOW]]
        lines += [("slow", f"{len(self.slow) - MOST_SLOW} more ranks")] if len(self.slow) > MOST_SLOW else []
        if self.commit_age is None:
            lines.append(("checkpoint", "none yet"))
        else:
            lines.append(("checkpoint", f"step {self.commit_step}, {span(self.commit_age)} ago"))
        more = len(self.restarts) - MOST_RESTARTS
        lines += [("restart", f"{more} earlier restarts")] if more > 0 else []
        lines += [("restart", f"{clock(r.time)} at step {r.step}: {r.cause}") for r in self.restarts[-MOST_RESTARTS:]]
        lines += [("left out", trouble) for trouble in self.troubles]
        return "\n".join([as_text(self.run), *(f"  {key:<11}{as_text(value)}" for key, value in lines)])


def status(run: Path) -> Status:
    """The status of the run in a directory. Raises ScaleprogError if it holds no run, or a run of another version."""
    parent = Recipe.of_run(run).parent  # also refuses a directory that is not a run directory
    records = [read(run / METRICS, METRIC, LAST_BYTES), read(run / EVENTS, EVENT), read(run / REQUEUES, LEFT)]
    rows, events, ends = (told.rows for told in records)
    trained = [row for row in rows if "loss" in row]
    still = still_told(events)
    evaluated = [row for row in (*still, *rows) if row.keys() >= {"top1", "top1_ema"}]
    now = trained[-1] if trained else None
    commit = committed_step(run)
    step = max(commit, now["step"]) if now else commit
    recent = trained[-RECENT_STEPS:]
    steps, left, trouble = time_left(run, parent, events, step, recent)
    troubles = [*(told.trouble for told in records if told.trouble), *filter(None, [trouble])]
    state, detail, job = standing(run, troubles)
    if state == "finished":
        left = None
    seconds = _seconds(recent)
    return Status(
        run=str(run),
        state=state,
        detail=detail,
        job=job,
        step=step,
        steps=steps,
        stage=now["stage"] if now else None,
        phase=now["phase"] if now else None,
        network=str(Subnet(now["resolution"], now["depth"])) if now else None,
        loss=_finite(now["loss"]) if now else None,
        top1=Accuracies(evaluated[-1]).best if evaluated else None,
        top1_step=evaluated[-1]["step"] if evaluated else None,
        images_per_second=_finite(sum(row.get("images", 0) for row in recent) / seconds) if seconds else None,
        seconds_left=None if left is None else _finite(left),
        damaged=next((event["total"] for event in reversed(still) if event["event"] == "damaged"), 0),
        slow=[] if state == "finished" else slow_ranks(events),
        commit_step=commit,
        commit_age=_age(run / "checkpoints" / f"step-{commit:08d}"),
        restarts=list(restarts(events, ends)),
        parent=None if parent is None else f"{parent.run}, step {parent.step}",
        troubles=troubles,
    )


def standing(run: Path, troubles: list[str] | None = None) -> tuple[str, str, str | None]:
    """The state of a run.

    Args:
        run: the run directory.
        troubles: gets a sentence for each file that cannot be read.

    Returns:
        The state, details about it (may be empty), and the id of the Slurm job (None without one); see `Status`.
    """
    troubles = [] if troubles is None else troubles
    file, owner, unknown = _told(partial(JobFile.read, run), troubles), _told(partial(read_owner, run), troubles), ""
    job, name = None, None if file is None else file.job
    if (run / RESULTS).exists():
        _told(partial(read_object, run / RESULTS, Results), troubles)
        return "finished", "", name
    if file is not None:
        try:
            job = file.ask()
        except slurm_queue.NoAnswer as error:
            unknown = f"job {file.job}; {error}"
    if job is not None and not job.over:
        about = [f"job {job.id}", job.nodes and f"on {job.nodes}", job.reason]
        return job.state.lower(), ", ".join(filter(None, about)), name
    if owner is not None and is_alive(owner, run):
        return "running", f"process {owner.pid} on {owner.host}", owner.job
    if owner is not None and (ended := between_starts(owner)):
        return "running", ended, owner.job
    ends = read(run / REQUEUES, LEFT).rows
    last = ends[-1] if ends else {}
    if file is not None and last.get("job") == file.job and not (last.get("requeue") or last.get("here")):
        return "stopped", f"job {file.job}: {last['cause']}", name
    if job is not None and file is not None:
        return "stopped", f"job {job.id}: {job.state}{no_log(run, file, job)}", name
    return "stopped", unknown or ("never started" if owner is None else ""), name


def no_log(run: Path, file: JobFile, job: slurm_queue.Job) -> str:
    """What it means if a job has failed without a log; empty if it has one."""
    if job.state != "FAILED" or not job.nodes or not file.log or not file.host or (run / file.log).exists():
        return ""
    return f" without a log: {job.nodes} may not have {run.absolute()}; {file.seen()}"


def _told(ask: Callable[[], T], troubles: list[str]) -> T | None:
    """The result of `ask`. If it raises ScaleprogError, adds the message to `troubles` and returns None."""
    try:
        return ask()
    except ScaleprogError as error:
        troubles.append(str(error))
        return None


def restarts(events: Sequence[Row], ends: Sequence[Row]) -> Iterator[Restart]:
    """The starts after the first, each with the cause that ended the start before.

    The cause comes from the batch script's line in `requeues.jsonl`. Without such a line, it is the first error (later
    errors are echoes from other ranks). Without an error, it is the last signal. A hang comes before all of these.

    Args:
        events: the lines of `events.jsonl`.
        ends: the lines of `requeues.jsonl`.
    """
    before = None
    for start in (event for event in events if event["event"] == "start"):
        if before is not None:
            own = [e for e in events if e.get("generation") == before.get("generation") and e["time"] < start["time"]]
            signals = [e for e in own if e["event"] == "signal"]
            ended = [e for e in own if e["event"] in ("error", "preempted", *ORDERLY)]
            words = [e for e in ends if before["time"] < e["time"] < start["time"]]
            hung = [e for e in own if e["event"] == "hang"]
            told = [*signals[-1:], *ended[:1], *words[-1:], *hung[-1:]]
            yield Restart(start["time"], cause_of(told[-1]) if told else "ended without notice", start["step"])
        before = start


def slow_ranks(events: Sequence[Row]) -> list[str]:
    """A sentence on each straggler of the last start, the slowest first, from the lines of `events.jsonl`."""
    present: dict[int, tuple[float, str]] = {}
    for event in events:
        if event["event"] == "start":
            present = {}
        elif event["event"] == "straggler":
            for slow in event["slow"]:
                who = f"rank {slow['rank']} on {slow['host']}, seen after step {event['step']}"
                median = f"the median rank {event['median_seconds']:.3g} s"
                present[slow["rank"]] = slow["seconds"], f"{who}: {slow['seconds']:.3g} s a step, {median}"
        elif event["event"] == "straggler_over":
            for slow in event["slow"]:
                present.pop(slow["rank"], None)
    return [sentence for _, sentence in sorted(present.values(), key=lambda slow: -slow[0])]


def cause_of(row: Row) -> str:
    """Why a start ended, from a line of `requeues.jsonl` or from the event that ended it."""
    if "cause" in row:
        return first_line(row["cause"])
    if row["event"] in ORDERLY:
        return ORDERLY[row["event"]]
    keys = {"preempted": "reason", "error": "message", "signal": "signal", "hang": "message"}
    return first_line(row[keys[row["event"]]])


def time_left(
    run: Path, parent: ParentSettings | None, events: Sequence[Row], step: int, recent: Sequence[Row]
) -> tuple[int | None, float | None, str]:
    """Estimates how much training is left, with `Schedule.expected` for stages without a choice.

    Assumes that the time of a step is proportional to its Subnet's multiply-accumulates, at the recent rate.

    Args:
        run: the run directory.
        parent: the run that it continues.
        events: the lines of `events.jsonl`.
        step: the current optimizer step.
        recent: the lines of `metrics.jsonl` for the recent steps; they give the rate.

    Returns:
        The steps of the whole run, the seconds of training left, and a sentence about what could not be read (may be
        empty). The numbers are None if they are not known.
    """
    try:
        planned = read_plan(run, parent)
    except ScaleprogError as error:
        return None, None, str(error)
    if planned is None:  # the run has not started
        return None, None, ""
    schedule, gmacs = planned
    told = [e for e in still_told(events) if e["event"] == "choice" and e["step"] <= step]
    choices = possible(schedule, [decision_from_json(event).choice for event in told])
    try:
        phases = schedule.expected(choices, gmacs.__getitem__)
        work = schedule.cost([phase for phase in phases if phase.stop > step], gmacs.__getitem__, step)
        trained = sum(gmacs[Subnet(row["resolution"], row["depth"])] for row in recent)
    except (LookupError, ArithmeticError):  # the plan does not contain such a network, or is invalid
        return None, None, ""
    return phases[-1].stop, _seconds(recent) / trained * work if trained else None, ""


def possible(schedule: Schedule, choices: Sequence[Choice]) -> list[Choice]:
    """The choices up to, but not including, the first one that no search of `schedule` can have made."""
    made = list(choices[: len(schedule.settled)])
    for choice in choices[len(made) :]:
        search = schedule.phases(made)[-1]
        if not search.searched or choice.subnet not in search.candidates:
            break
        position, budget, takeover = schedule.position_after(search), schedule.budget, choice.complete_from
        if (takeover is None) != (budget is None):
            break
        if takeover is not None and budget is not None and not position <= takeover <= max(position, budget.latest):
            break
        made.append(choice)
    return made


def cancel(run: Path) -> str:
    """Ends the run in a directory: a queued or running Slurm job, or a process on this machine.

    Returns:
        A message about what was ended and which checkpoint remains.

    Raises:
        ScaleprogError: nothing trains the run, another machine trains it, Slurm's job does not match it, or Slurm does
            not answer.
    """
    file, owner = JobFile.read(run), read_owner(run)
    job = None if file is None else file.ask()
    if job is not None and not job.over:
        scripts = run.absolute().parent if "_" in job.id else run  # that of an array is in the sweep's folder
        if not job.names(scripts):
            raise ScaleprogError(
                f"{run / JOB} names job {job.id}, but Slurm's record of its command does not name this run directory; "
                f"nothing was canceled; if the job does train this run, use `scancel {job.id}`"
            )
        slurm_queue.cancel(job.id)
        done = f"canceled job {job.id}, which was {job.state}"
    elif owner is not None and is_alive(owner, run):
        elsewhere = owner.host != socket.gethostname()
        if owner.job is not None and (elsewhere or not runs(owner, run)):
            raise ScaleprogError(
                f"{run} is being trained on {owner.host} by job {owner.job}; run `scaleprog cancel` there, or "
                f"`scancel {owner.job}`, which ends everything in that job"
            )
        if elsewhere:
            raise ScaleprogError(f"{run} is being trained on {owner.host}; run `scaleprog cancel` there")
        ask_to_stop(owner, run)
        done = f"asked process {owner.pid} to save a checkpoint and stop"
    elif owner is not None and between_starts(owner):
        raise ScaleprogError(
            f"{run}: its ranks have ended, but not their launcher; retry, or end process {owner.launcher}"
        )
    else:
        raise ScaleprogError(f"{run}: nothing to cancel; no job and no process on this machine trains it")
    kept = committed_step(run)
    remains = (
        f"step {kept}, or a newer one if there is time to write it" if kept else "only if there is time to write it"
    )
    return f"{done}; checkpoint: {remains}; the same command resumes from there"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds(rows: Sequence[Row]) -> float:
    """Seconds of steps by the recorded rate, which has what any rank waited for data while its device was idle."""

    def of(row: Row) -> float:
        rate, apart = row.get("images_per_second"), row["step_seconds"] + row["data_wait_seconds"]
        seconds = row["images"] / rate if rate and "images" in row else math.inf  # an early version wrote no rate
        return seconds if seconds <= MOST_SECONDS else apart

    return sum(map(of, rows))


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def span(seconds: float) -> str:
    """A duration in words."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
