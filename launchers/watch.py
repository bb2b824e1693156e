"""Watches the node of a batch script from another node of its job, for a job with spare nodes.

Such a job outlives lost nodes (sbatch's `--no-kill`), and Slurm does not make an exception for the node of its batch
script: the job would stay RUNNING, with nothing left that trains, starts the tasks, or ends it. So a step on another
node asks Slurm whether that node is still part of the job, and requeues the job if not. Only Slurm's word counts: when
it gives a node up, it ends the step of the ranks, whatever the node itself still does or sees.

`python -m scaleprog.launchers.watch RUN` runs in the batch script, beside the tasks: it starts this step, and another
one elsewhere when that ends. `python -m scaleprog.launchers.watch RUN NODE` is the step; NODE runs the batch script.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import say
from scaleprog.launchers.attempt import Attempt, latest
from scaleprog.launchers.exits import MISTAKE
from scaleprog.launchers.requeue import End, Remains, Verdict
from scaleprog.rundir import slurm_queue

LOOK_SECONDS = 15.0  # far less than Slurm takes to notice a lost node, unless a cluster says otherwise
CONFIRM_SECONDS = 2.0
START_SECONDS = 60.0
PAUSES = (1, 5, 15, 30, 60)
"""Seconds until the next attempt to start a step: after one that has watched, and after each that has not."""
MOST_REFUSALS = 40  # ten minutes of answers that the job cannot be requeued
WATCHING = "watching"
"""The line by which a step says that it has heard from Slurm."""
ENDING = ("PENDING", "COMPLETING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
KEPT = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
"""Slurm's variables that the step needs; the others tell srun what the tasks that train need."""


def judge(job: slurm_queue.Job | None, start: Attempt, node: str) -> Literal["watch", "lost", "leave"]:
    """Whether a job has lost the node of its batch script, or needs no watch any more.

    Args:
        job: Slurm's record of the job; None if it does not know the job.
        start: the start that is watched.
        node: the node of its batch script.
    """
    if job is None or job.restarts != start.restart or job.over or job.state in ENDING:
        return "leave"
    if job.state != "RUNNING":  # such as SUSPENDED
        return "watch"
    try:
        return "watch" if node in slurm_queue.hosts(job.nodes) else "lost"
    except ScaleprogError:  # no list of nodes
        return "watch"


# ---- the step


def watch(run: Path, node: str, pause: Callable[[float], object] = time.sleep) -> None:
    """Returns when a job needs no watch any more; requeues it if it has lost the node of its batch script.

    That it has must be Slurm's answer twice in a row. While Slurm does not answer, this asks again.

    Args:
        run: the run directory.
        node: the node of the batch script.
        pause: called with the seconds to wait between two looks.
    """
    start = Attempt.current()
    greeted, looks, refusals, why = False, 0, 0, ""
    while True:
        seconds = LOOK_SECONDS
        with suppress(slurm_queue.NoAnswer):
            job = slurm_queue.find(start.job)
            found = judge(job, start, node)
            if not greeted:
                greeted = True
                print(WATCHING, flush=True)
            if found == "leave":
                if looks > 1:
                    over = job is None or job.over
                    record(run, start, node, Verdict(not over, why if over else ""))
                return
            looks = looks + 1 if found == "lost" else 0
            if looks > 1:
                why = give_back(start.job, refusals)
                if why:
                    refusals += 1
            if looks and not why:
                seconds = CONFIRM_SECONDS
        pause(seconds)


def give_back(job: str, refusals: int) -> str:
    """Requeues a job that has lost its batch script, or cancels it if Slurm keeps refusing.

    Args:
        job: its ID.
        refusals: how often Slurm has refused.

    Returns:
        Why Slurm does not requeue it; empty if it does.
    """
    try:
        slurm_queue.requeue(job)
    except slurm_queue.NoAnswer as error:
        if refusals >= MOST_REFUSALS:
            slurm_queue.cancel(job)
        return f"Slurm does not requeue it: {error}"
    return ""


def record(run: Path, start: Attempt, node: str, verdict: Verdict) -> None:
    """Adds a line to `requeues.jsonl`, unless the batch script has: its node may live although Slurm gave it up."""
    start = latest(run, start)
    remains = Remains.by(run, start, code=1, notice=0)
    told = [row for row in remains.earlier if row.get("requeue")]
    if any((row.get("job"), row.get("restart")) == (start.job, start.restart) for row in told):
        return
    end = End("crash", 1, f"Slurm has lost {node}, the node of the batch script")
    outcome = f"starts again: the watch on {slurm_queue.own_node()} has requeued it"
    remains.record(end, verdict, False, outcome if verdict.requeue else f"does not start again: {verdict.why}")


# ---- in the batch script


class Watched(NamedTuple):
    """What came of a step: whether it has watched, and the last line of its output."""

    began: bool
    last: str


def keep(run: Path, pause: Callable[[float], object] = time.sleep) -> None:
    """Keeps a watch on another node of the job, until the job needs none.

    A job without another node needs none: if it loses its last node, Slurm requeues it.

    Args:
        run: the run directory.
        pause: called with the seconds to wait between two attempts.
    """
    start, here = Attempt.current(), slurm_queue.own_node()
    tried: list[str] = []
    trouble, said, failures = "", "", 0
    while True:
        try:
            job = slurm_queue.find(start.job)
            if job is None or judge(job, start, here) != "watch":
                return
            others = [node for node in slurm_queue.hosts(job.nodes or here) if node != here]
            if not others:
                return
            if trouble and trouble != said:
                said = trouble
                warn(start.job, here, trouble)
            reached = [node for node in others if node not in slurm_queue.lost(others)]
            if reached:
                node = next_node(reached, tried)
                watched = run_step(run, here, node)
                failures = 0 if watched.began else failures + 1
                trouble = f"{node}: {watched.last or 'the step has ended'}"
                tried = [*(other for other in tried if other != node), node]
            else:
                trouble, failures = f"Slurm reaches none of {', '.join(others)}", failures + 1
        except slurm_queue.NoAnswer as error:
            trouble, failures = str(error), failures + 1
        pause(PAUSES[min(failures, len(PAUSES) - 1)])


def next_node(reached: Sequence[str], tried: Sequence[str]) -> str:
    """The node for the next step: one without a step yet, spare nodes (the last) first, or else the longest ago."""
    fresh = [node for node in reached if node not in tried]
    return fresh[-1] if fresh else min(reached, key=tried.index)


def warn(job: str, node: str, trouble: str) -> None:
    """Says that nothing watches the node of the batch script at the moment."""
    say(
        f"no other node watches {node}, the node of the batch script ({trouble}); trying again. If Slurm loses {node} "
        f"in the meantime, the job stays RUNNING with nothing in it: end it with scancel {job}, and submit it again"
    )


def run_step(run: Path, here: str, node: str) -> Watched:
    """Starts a step that watches the node `here` from another node, and waits until it ends."""
    module = [sys.executable, "-m", "scaleprog.launchers.watch", str(run), here]
    began, last = False, ""
    with subprocess.Popen(
        [*srun(node), *module],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables(os.environ),
    ) as process:
        assert process.stdout is not None
        try:
            while began or select.select([process.stdout], [], [], START_SECONDS)[0]:
                line = process.stdout.readline().decode("utf-8", "replace")
                if not line:
                    return Watched(began, last)
                if line.strip() != WATCHING:
                    last = line.strip()
                elif not began:
                    began = True
                    say(f"{node} watches {here}, the node of the batch script")
            return Watched(False, last or f"not started within {START_SECONDS:.0f} s")
        finally:
            process.terminate()  # srun ends the step


def srun(node: str) -> list[str]:
    """The command that starts a step of one task on a node, besides the tasks that train there, and without GPUs."""
    size = ["--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=0", "--gres=none"]
    return ["srun", "--overlap", *size, f"--nodelist={node}", "--job-name=watch"]


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for `srun`, from that of the batch script."""
    options = ("SLURM_", "SRUN_", "SBATCH_")
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(options)}


def _leave(*_: object) -> NoReturn:
    sys.exit(0)


def _main(run: Path, node: str = "") -> None:
    wake = threading.Event()

    def look_now(*_: object) -> None:
        wake.set()

    def pause(seconds: float) -> None:
        wake.wait(seconds)
        wake.clear()

    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # for the tasks; a command that this starts does not inherit it
    signal.signal(signal.SIGTERM, look_now)  # the job may end, or only stop
    if node:
        if shutil.which("scontrol") is None:
            print("this node has no scontrol, so it cannot watch", flush=True)
            sys.exit(MISTAKE)
        watch(run, node, pause)
    else:
        signal.signal(signal.SIGHUP, _leave)  # the batch script ends
        keep(run, pause)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), *sys.argv[2:])
    except (ScaleprogError, OSError, ValueError) as error:
        say(f"the watch has ended: {error}")
        sys.exit(1)
