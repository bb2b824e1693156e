"""Where a run stands: from its run directory, and from Slurm where it is a Slurm job."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launchers.requeue import REQUEUES, newest_step, read_lines
from launchers.snapshot import JOB, JobFile
from scaleprog import queue
from scaleprog.claim import ask_to_stop, is_alive, read_owner
from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.growth.space import Subnet
from scaleprog.life import still_told
from scaleprog.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.state import decision_from_json

RECENT_STEPS = 50
POLL_SECONDS = 3.0
TELL_SECONDS = 15.0  # between two lines of progress
Row = Mapping[str, Any]


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

    def text(self) -> str:
        """The same for people."""
        of = "" if self.steps is None else f" of {self.steps} ({self.step / self.steps:.0%})"
        lines = [("state", f"{self.state}{self.detail and f' ({self.detail})'}"), ("step", f"{self.step}{of}")]
        if self.stage is not None:
            lines.append(("stage", f"{self.stage}, {self.phase}, {self.network}, loss {self.loss:.3f}"))
        if self.top1 is not None:
            lines.append(("top-1", f"{self.top1:.2f} % after step {self.top1_step}"))
        if self.images_per_second is not None:
            left = "" if self.seconds_left is None else f"; about {_span(self.seconds_left)} of training left"
            lines.append(("rate", f"{self.images_per_second:.0f} images/s{left}"))
        if self.commit_age is None:
            lines.append(("checkpoint", "none yet"))
        else:
            lines.append(("checkpoint", f"step {self.commit_step}, {_span(self.commit_age)} ago"))
        lines += [("restart", f"{_clock(r.time)} at step {r.step}: {r.cause}") for r in self.restarts]
        return "\n".join([self.run, *(f"  {key:<11}{value}" for key, value in lines)])


def status(run: Path) -> Status:
    """Where the run in a directory stands. Raises CheckpointError where there is no run."""
    if not (run / "recipe.yaml").exists():
        raise CheckpointError(f"{run}: no run directory; it is what `scaleprog submit` and `scaleprog train` write")
    recipe = Recipe.load(run / "recipe.yaml")
    rows, events = read_lines(run / "metrics.jsonl"), read_lines(run / "events.jsonl")
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "top1" in row]
    now = trained[-1] if trained else None
    commit = newest_step(run)
    step = max(commit, now["step"]) if now else commit
    recent = trained[-RECENT_STEPS:]
    steps, left = outlook(recipe, events, step, recent)
    state, detail, job = standing(run)
    if state == "finished":
        left = None
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
        loss=now["loss"] if now else None,
        top1=max(evaluated[-1]["top1"], evaluated[-1]["top1_ema"]) if evaluated else None,
        top1_step=evaluated[-1]["step"] if evaluated else None,
        images_per_second=sum(row["images"] for row in recent) / _seconds(recent) if recent else None,
        seconds_left=left,
        commit_step=commit,
        commit_age=_age(run / "checkpoints" / f"step-{commit:08d}"),
        restarts=list(restarts(events, read_lines(run / REQUEUES))),
    )


def standing(run: Path) -> tuple[str, str, str | None]:
    """State, what there is to say about it, and the Slurm job."""
    file, owner, unknown = JobFile.read(run), read_owner(run), ""
    job = None
    if file is not None:
        try:
            job = file.ask()
        except queue.NoAnswer as error:
            unknown = f"job {file.job}; {error}"
    name = None if file is None else file.job
    if (run / "results.json").exists():
        return "finished", "", name
    if job is not None and not job.over:
        about = [f"job {job.id}", job.nodes and f"on {job.nodes}", job.reason]
        return job.state.lower(), ", ".join(filter(None, about)), name
    if owner is not None and is_alive(owner, run):
        return "running", f"process {owner.pid} on {owner.host}", owner.job
    ends = read_lines(run / REQUEUES)
    if file is not None and ends and ends[-1]["job"] == file.job and not ends[-1]["requeue"]:
        return "stopped", f"job {file.job}: {ends[-1]['cause']}", name
    if job is not None:
        return "stopped", f"job {job.id}: {job.state}", name
    return "stopped", unknown or ("never started" if owner is None else ""), name


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
        return row["cause"]
    return row[{"preempted": "reason", "error": "message", "signal": "signal"}[row["event"]]].splitlines()[0]


def outlook(recipe: Recipe, events: Sequence[Row], step: int, recent: Sequence[Row]) -> tuple[int | None, float | None]:
    """Steps in all and seconds of training left, stages still to be searched as they are expected.

    A step is taken to cost its sub-network's multiply-accumulates, at the rate of the recent steps.
    """
    try:
        plan = Plan.of(recipe, 1)
    except ScaleprogError:  # the shards need not be within reach of whoever asks
        return None, None
    told = [e for e in still_told(events) if e["event"] == "choice" and e["step"] <= step]
    phases = plan.schedule.expected([decision_from_json(event).choice for event in told], plan.gmacs)

    left = [replace(phase, start=max(phase.start, step)) for phase in phases if phase.stop > step]
    work = plan.schedule.cost(left, plan.gmacs)
    done = sum(plan.gmacs(Subnet(row["resolution"], row["depth"])) for row in recent)
    return phases[-1].stop, _seconds(recent) / done * work if recent else None


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
            print(f"{_clock(time.time())} {now}", flush=True)
        if time.monotonic() - told > TELL_SECONDS and (line := _last_step(run)) is not None:
            told = time.monotonic()
            print(f"{_clock(time.time())} {line}", flush=True)
        time.sleep(POLL_SECONDS)
    if (job is None and (run / "results.json").exists()) or (job is not None and job.state == "COMPLETED"):
        return 0
    last = next(reversed(read_lines(run / REQUEUES)), None)
    if last is not None and last["job"] == file.job:
        print(f"scaleprog: {last['cause']}", file=sys.stderr)
    return 1 if job is None else job.exit_code or 1


def cancel(run: Path) -> str:
    """Ends the run in a directory, whether queued, running under Slurm or on this machine; returns what remains."""
    file, owner = JobFile.read(run), read_owner(run)
    job = None if file is None else file.ask()
    if job is not None and not job.over:
        if job.command is not None and not job.names(run):
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
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()[1:]
    except OSError:
        return None
    for line in reversed(lines):
        row = json.loads(line) if line.endswith(b"}") else {}
        if "loss" in row:
            return f"step {row['step']}, stage {row['stage']} {row['phase']}, loss {row['loss']:.3f}"
    return None


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
