"""Where a run stands: from its run directory, and from Slurm where it is a Slurm job."""

import math
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from launchers.requeue import newest_step
from launchers.snapshot import JOB, JobFile
from scaleprog import queue
from scaleprog.claim import ask_to_stop, is_alive, read_owner
from scaleprog.display import as_text, first_line
from scaleprog.errors import ScaleprogError
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Choice, Subnet
from scaleprog.life import still_told
from scaleprog.plan import Plan
from scaleprog.reading import read, read_object
from scaleprog.recipe import Recipe
from scaleprog.records import EVENT, EVENTS, LEFT, METRIC, METRICS, REQUEUES, Results
from scaleprog.state import decision_from_json

RECENT_STEPS = 50
POLL_SECONDS = 3.0
TELL_SECONDS = 15.0  # between two lines of progress
LAST_BYTES = 8 * 2**20  # of metrics.jsonl, which may be long: thousands of steps
MOST_RESTARTS = 50  # that are shown
Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Restart:
    """A start after the first: why it was needed, and the step at which it went on."""

    time: float
    cause: str
    step: int


@dataclass(frozen=True)
class Status:
    """What a run directory tells. Times in seconds, accuracies in percent; None is what is not known (yet)."""

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
    commit_step: int
    commit_age: float | None
    restarts: list[Restart]
    troubles: list[str]
    """What of the run directory could not be read, in words."""

    def text(self) -> str:
        """The same for people."""
        of = "" if self.steps is None else f" of {self.steps} ({self.step / self.steps:.0%})"
        lines = [("state", f"{self.state}{self.detail and f' ({self.detail})'}"), ("step", f"{self.step}{of}")]
        if self.stage is not None:
            loss = "no number" if self.loss is None else f"{self.loss:.3f}"
            lines.append(("stage", f"{self.stage}, {self.phase}, {self.network}, loss {loss}"))
        if self.top1 is not None:
            lines.append(("top-1", f"{self.top1:.2f} % after step {self.top1_step}"))
        if self.images_per_second is not None:
            left = "" if self.seconds_left is None else f"; about {_span(self.seconds_left)} of training left"
            lines.append(("rate", f"{self.images_per_second:.0f} images/s{left}"))
        if self.commit_age is None:
            lines.append(("checkpoint", "none yet"))
        else:
            lines.append(("checkpoint", f"step {self.commit_step}, {_span(self.commit_age)} ago"))
        more = len(self.restarts) - MOST_RESTARTS
        lines += [("restart", f"{more} earlier ones")] if more > 0 else []
        lines += [("restart", f"{_clock(r.time)} at step {r.step}: {r.cause}") for r in self.restarts[-MOST_RESTARTS:]]
        lines += [("left out", trouble) for trouble in self.troubles]
        return "\n".join([as_text(self.run), *(f"  {key:<11}{as_text(value)}" for key, value in lines)])


def status(run: Path) -> Status:
    """Where the run in a directory stands. Raises ScaleprogError where there is no run, or none of this version."""
    recipe = Recipe.of_run(run)
    records = [read(run / METRICS, METRIC, LAST_BYTES), read(run / EVENTS, EVENT), read(run / REQUEUES, LEFT)]
    rows, events, ends = (told.rows for told in records)
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in (*still_told(events), *rows) if row.keys() >= {"top1", "top1_ema"}]
    now = trained[-1] if trained else None
    commit = newest_step(run)
    step = max(commit, now["step"]) if now else commit
    recent = trained[-RECENT_STEPS:]
    steps, left = outlook(recipe, events, step, recent)
    troubles = [told.trouble for told in records if told.trouble]
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
        top1=max(evaluated[-1]["top1"], evaluated[-1]["top1_ema"]) if evaluated else None,
        top1_step=evaluated[-1]["step"] if evaluated else None,
        images_per_second=_finite(sum(row.get("images", 0) for row in recent) / seconds) if seconds else None,
        seconds_left=None if left is None else _finite(left),
        commit_step=commit,
        commit_age=_age(run / "checkpoints" / f"step-{commit:08d}"),
        restarts=list(restarts(events, ends)),
        troubles=troubles,
    )


def standing(run: Path, troubles: list[str] | None = None) -> tuple[str, str, str | None]:
    """State, what there is to say about it, and the Slurm job; what cannot be read is added to `troubles`."""
    troubles = [] if troubles is None else troubles
    file, owner, unknown = _told(partial(JobFile.read, run), troubles), _told(partial(read_owner, run), troubles), ""
    job = None
    if file is not None:
        try:
            job = file.ask()
        except queue.NoAnswer as error:
            unknown = f"job {file.job}; {error}"
    name = None if file is None else file.job
    if (run / "results.json").exists():
        _told(partial(read_object, run / "results.json", Results), troubles)
        return "finished", "", name
    if job is not None and not job.over:
        about = [f"job {job.id}", job.nodes and f"on {job.nodes}", job.reason]
        return job.state.lower(), ", ".join(filter(None, about)), name
    if owner is not None and is_alive(owner, run):
        return "running", f"process {owner.pid} on {owner.host}", owner.job
    ends = read(run / REQUEUES, LEFT).rows
    if file is not None and ends and ends[-1].get("job") == file.job and not ends[-1].get("requeue"):
        return "stopped", f"job {file.job}: {ends[-1]['cause']}", name
    if job is not None:
        return "stopped", f"job {job.id}: {job.state}", name
    return "stopped", unknown or ("never started" if owner is None else ""), name


def _told(ask: Callable[[], T], troubles: list[str]) -> T | None:
    """What a file tells; one that cannot be read counts as absent, and is added to `troubles`."""
    try:
        return ask()
    except ScaleprogError as error:
        troubles.append(str(error))
        return None


def restarts(events: Sequence[Row], ends: Sequence[Row]) -> Iterator[Restart]:
    """The starts after the first, each with why the one before ended: the batch script's word on it, else what ended it
    first (later errors are echoes of other ranks), else the last signal that it heard."""
    before = None
    for start in (event for event in events if event["event"] == "start"):
        if before is not None:
            own = [e for e in events if e.get("generation") == before.get("generation") and e["time"] < start["time"]]
            signals = [e for e in own if e["event"] == "signal"]
            ended = [e for e in own if e["event"] in ("error", "preempted")]
            words = [e for e in ends if before["time"] < e["time"] < start["time"]]
            told = [*signals[-1:], *ended[:1], *words[-1:]]
            yield Restart(start["time"], _cause(told[-1]) if told else "ended without notice", start["step"])
        before = start


def _cause(row: Row) -> str:
    """Why a start ended, by an event of its end or a line of `requeues.jsonl`."""
    if "cause" in row:
        return first_line(row["cause"])
    return first_line(row[{"preempted": "reason", "error": "message", "signal": "signal"}[row["event"]]])


def outlook(recipe: Recipe, events: Sequence[Row], step: int, recent: Sequence[Row]) -> tuple[int | None, float | None]:
    """Steps in all and seconds of training left, stages still to be searched as they are expected.

    A step is taken to cost its sub-network's multiply-accumulates, at the rate of the recent steps.
    """
    try:
        plan = Plan.of(recipe, 1)
    except ScaleprogError:  # the shards need not be within reach of whoever asks
        return None, None
    told = [e for e in still_told(events) if e["event"] == "choice" and e["step"] <= step]
    choices = possible(plan.schedule, [decision_from_json(event).choice for event in told])
    phases = plan.schedule.expected(choices, plan.gmacs)

    left = [replace(phase, start=max(phase.start, step)) for phase in phases if phase.stop > step]
    work = plan.schedule.cost(left, plan.gmacs)
    trained = [Subnet(row["resolution"], row["depth"]) for row in recent]
    networks = {subnet for phase in phases for subnet in phase.candidates}
    if not trained or not networks.issuperset(trained):  # nobody knows what such a network would cost
        return phases[-1].stop, None
    return phases[-1].stop, _seconds(recent) / sum(map(plan.gmacs, trained)) * work


def possible(schedule: Schedule, choices: Sequence[Choice]) -> list[Choice]:
    """The choices, up to the first that no search of `schedule` can have made."""
    made: list[Choice] = []
    for choice in choices:
        search = schedule.phases(made)[-1]
        if not search.searched or choice.subnet not in search.candidates:
            break
        position = search.position + (search.stop - search.start if schedule.recycle else 0)
        takeover = choice.complete_from
        if (takeover is None) != (schedule.budget is None):
            break
        if takeover is not None and not position <= takeover <= max(position, schedule.latest):
            break
        made.append(choice)
    return made


def follow(run: Path, file: JobFile) -> int:
    """Tells how a queued run gets on until it has ended; returns its exit code."""
    said, told, ended, job = "", 0.0, 0, None
    while ended < 2:  # Slurm may put a job that has just ended into the queue again
        try:
            job = file.ask()
            ended = ended + 1 if job is None or job.over else 0
            now = f"job {file.job}: {_now(job)}"
        except queue.NoAnswer as error:  # its controller is started anew, say
            now = str(error)
        if now != said:
            said = now
            print(f"{_clock(time.time())} {as_text(now)}", flush=True)
        if time.monotonic() - told > TELL_SECONDS and (line := _last_step(run)) is not None:
            told = time.monotonic()
            print(f"{_clock(time.time())} {line}", flush=True)
        time.sleep(POLL_SECONDS)
    if (job is None and (run / "results.json").exists()) or (job is not None and job.state == "COMPLETED"):
        return 0
    last = next(reversed(read(run / REQUEUES, LEFT).rows), None)
    if last is not None and last.get("job") == file.job:
        print(f"scaleprog: {as_text(last['cause'], lines=True)}", file=sys.stderr)
    return 1 if job is None else job.exit_code or 1


def cancel(run: Path) -> str:
    """Ends the run in a directory, whether queued, running under Slurm or on this machine; returns what remains."""
    file, owner = JobFile.read(run), read_owner(run)
    job = None if file is None else file.ask()
    if job is not None and not job.over:
        if not job.names(run):
            raise ScaleprogError(
                f"{run / JOB} names job {job.id}, whose command, as Slurm has it, does not name this run directory: "
                f"nothing was cancelled; if it trains there, `scancel {job.id}`"
            )
        queue.cancel(job.id)
        done = f"job {job.id}, which was {job.state}, is cancelled"
    elif owner is not None and owner.job is None and is_alive(owner, run):
        if owner.host != socket.gethostname():
            raise ScaleprogError(f"{run} is trained on {owner.host}; run `scaleprog cancel` there")
        ask_to_stop(owner, run)
        done = f"process {owner.pid} is asked to stop after a checkpoint"
    else:
        raise ScaleprogError(f"{run}: nothing to cancel; neither a job nor a process of this machine trains it")
    kept = newest_step(run)
    remains = f"checkpoint of step {kept}" if kept else "no checkpoint yet"
    return f"{done}; {remains}, or a newer one if there was time to write it; the same command goes on from there"


def _now(job: queue.Job | None) -> str:
    if job is None:
        return "no longer known to Slurm"
    about = [job.state, job.nodes and f"on {job.nodes}", job.reason, f"restart {job.restarts}" if job.restarts else ""]
    return ", ".join(filter(None, about))


def _last_step(run: Path) -> str | None:
    """The last line of `metrics.jsonl` in words."""
    for row in reversed(read(run / METRICS, METRIC, last=2**14).rows):
        if "loss" in row:
            return f"step {row['step']}, stage {row['stage']} {row['phase']}, loss {row['loss']:.3f}"
    return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds(rows: Sequence[Row]) -> float:
    return sum(row["step_seconds"] + row["data_wait_seconds"] for row in rows)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _clock(moment: float) -> str:
    return time.strftime("%d %b %H:%M:%S", time.localtime(moment))


def _span(seconds: float) -> str:
    """A duration as people say it."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
