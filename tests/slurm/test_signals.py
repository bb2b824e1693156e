"""What can happen to a job: every row of the table on a real Slurm, for both ways to submit.

A story is a run that goes through several rows, one after the other; at each, training is held, the event strikes, and
the steps that it costs are counted when the next start is held. In the end the run must equal, bit for bit, the one
that nothing ever happened to.
"""

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from scaleprog.launchers.status import restarts
from scaleprog.recipe import Recipe
from scaleprog.rundir.reading import read_rows
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.job import BOTH, TrainingJob

SAVE_STEPS = 7
SLOW_STEP = 0.3  # s; a signal is acted upon within some two seconds of steps
Jobs = Sequence[TrainingJob]


# ---- what strikes; returns the nodes that it has broken


def preempt(cluster: Cluster, _: Jobs) -> None:
    cluster.run(["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true"])


def preempt_during_a_long_checkpoint(cluster: Cluster, jobs: Jobs) -> None:
    for job in jobs:
        job.control.hold("save")
    preempt(cluster, jobs)


def reach_the_time_limit(cluster: Cluster, jobs: Jobs) -> None:
    """--time is an hour; it is drawn so near that the notice of --signal-before is due at Slurm's next look. It stays
    there until the batch script has asked for it (`restore_the_time_limit`)."""
    for job in jobs:
        hours, minutes, _ = job.show()["RunTime"].split(":")
        cluster.run(["scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}"])


def restore_the_time_limit(cluster: Cluster, job: TrainingJob) -> None:
    cluster.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=60"])


def requeue(cluster: Cluster, jobs: Jobs) -> None:
    for job in jobs:
        cluster.run(["scontrol", "requeue", job.id])


def scancel(*options: str) -> Callable[[Cluster, Jobs], None]:
    def strike(cluster: Cluster, jobs: Jobs) -> None:
        cluster.run(["scancel", *options, *(job.id for job in jobs)])

    return strike


def kill_one_task(_: Cluster, jobs: Jobs) -> None:
    for job in jobs:
        (pid,) = job.processes(rank=1)
        os.kill(pid, signal.SIGKILL)


def cut_power(cluster: Cluster, jobs: Jobs) -> set[int]:
    nodes = {cluster.job_nodes(job.id)[0] for job in jobs}  # where the batch script and rank 0 are
    for node in nodes:
        cluster.kill_node(node)
    return nodes


def kill_slurmd(cluster: Cluster, jobs: Jobs) -> set[int]:
    nodes = {cluster.job_nodes(job.id)[-1] for job in jobs}
    for node in nodes:
        cluster.kill_slurmd(node)
    return nodes


# ---- the table

AGAIN, INSIDE, FAILED, CANCELLED = "starts again", "starts its tasks again", "FAILED", "CANCELLED"


@dataclass(frozen=True)
class Row:
    """An event, and what must come of it."""

    event: str
    strike: Callable[[Cluster, Jobs], set[int] | None]
    notice: str | None
    """The signal by which the ranks learn of it, in time to stop by themselves."""
    loses: bool
    """Whether the steps since the last commit are trained again; otherwise none are."""
    then: str
    """Whether the job starts again by itself, or its tasks inside it; otherwise the state in which it stays, and the
    same is submitted again."""
    cause: str
    """How the run's status explains the restart: a regular expression."""
    again: Callable[[Cluster, TrainingJob], None] = lambda cluster, job: None
    """Called once the job starts again."""


USR2, TERM, INT = (f"^stopped by {name} after step" for name in ("SIGUSR2", "SIGTERM", "SIGINT"))
LIMIT = "^reached its time limit after step"
HURT = "SIGTERM|ended without notice"  # what the ranks that were left have heard, if any
STORIES = {
    "preemption sends SIGUSR2": (
        Settings(user_signal=True, grace=15),
        Row("preemption, signal on", preempt, "SIGUSR2", False, AGAIN, USR2),
        Row("checkpoint longer than the grace", preempt_during_a_long_checkpoint, "SIGUSR2", True, AGAIN, "SIGUSR2"),
        Row("kill -9 of one task", kill_one_task, None, True, INSIDE, "^a task was killed, exit code 137"),
        Row("node power cut", cut_power, None, True, AGAIN, HURT),
        Row("slurmd killed", kill_slurmd, None, True, AGAIN, HURT),
    ),
    "preemption sends SIGTERM": (
        Settings(user_signal=False, grace=60, kill_wait=30),
        Row("preemption, signal off", preempt, "SIGTERM", False, AGAIN, TERM),
        Row("scontrol requeue", requeue, "SIGTERM", False, AGAIN, TERM),
        Row("time limit", reach_the_time_limit, "SIGUSR2", False, AGAIN, LIMIT, restore_the_time_limit),
        Row("scancel --signal=INT", scancel("--signal=INT"), "SIGINT", False, FAILED, INT),
        Row("scancel", scancel(), "SIGTERM", False, CANCELLED, TERM),
    ),
}


@pytest.fixture(scope="module")
def recipe(patterns: Path) -> Recipe:
    return short_recipe(
        patterns,
        data={"trace": True},
        train={"log_every": 1},  # so that every step lost is known
        checkpoint={"every_steps": SAVE_STEPS, "every_minutes": None},
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(recipe, folder, ranks=2)
    return folder


@pytest.mark.timeout(1800)  # every row restarts eight ranks or so on two cores
@pytest.mark.parametrize("story", STORIES)
def test_a_run_goes_on_from_whatever_happens(
    story: str, cluster: Cluster, recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    settings, *rows = STORIES[story]
    cluster.up(settings)
    jobs = [TrainingJob(cluster, recipe, tmp_path / by, by) for by in BOTH]
    for job in jobs:
        job.control.slow_down(SLOW_STEP)
        job.hold_at(2)
        job.submit()
    for job in jobs:
        job.wait_held()
        used = [Path(mark["code"]) for mark in job.control.held("step", 2, job.start).values()]
        assert all(path.is_relative_to(job.run / "code") for path in used), "the tasks run the snapshot"
    for row in rows:
        try:
            go_through(row, cluster, jobs, save_steps(undisturbed))
        except (Exception, pytest.fail.Exception) as error:
            error.add_note(f"in the row {row.event!r} of {story!r}")
            raise
    for job in jobs:
        job.finish()
    assert [differences(recipe, job.run, undisturbed) for job in jobs] == [[], []]


def go_through(row: Row, cluster: Cluster, jobs: Jobs, saves: set[int]) -> None:
    """Strikes the held jobs, and asserts what it costs when they are held again."""
    before = [(job.held_step, job.restarts, job.repeats, len(job.events("start"))) for job in jobs]
    broken = row.strike(cluster, jobs)
    for job in jobs:
        if row.notice:
            job.wait(f"told by {row.notice}", lambda job=job: row.notice in job.signals())
            job.go_on()
    lost = []
    for job, (held, earlier, repeats, starts) in zip(jobs, before):
        about = f"{row.event}, by {job.by}"
        if row.then == AGAIN:
            job.wait_state("PENDING", "RUNNING", restarts=earlier + 1)
            row.again(cluster, job)
        elif row.then == INSIDE:
            job.wait(INSIDE, lambda job=job, before=repeats: job.repeats > before)
            assert job.restarts == earlier, f"{about}: Slurm has nothing to do with it"
        else:
            ended = job.wait_state("FAILED", "CANCELLED", "COMPLETED")
            assert ended["JobState"] == row.then, about
            assert "does not start again" in job.log(), about
            if row.then == FAILED:
                assert ended["ExitCode"] == "75:0", about
        commit = job.committed()
        lost.append(job.trained() - commit)
        assert len(job.events("start")) == starts, f"{about}: it trains before it was to be held"
        if row.loses:
            assert commit <= held, about
            assert lost[-1] > 0, f"{about}: the row is about lost steps"
            assert row.notice or lost[-1] == held - commit <= SAVE_STEPS, about
            assert not row.notice or f"{held - commit} steps since the last checkpoint, about" in job.log(), about
        else:
            assert commit >= held, f"{about}: no checkpoint since the notice"
            assert lost[-1] == 0, f"{about}: {lost[-1]} steps are lost"
        job.control.release("save")
        job.hold_at(min({commit + 2, commit + 3, commit + 4} - saves))
        if row.then not in (AGAIN, INSIDE):
            job.submit()
    for job, steps in zip(jobs, lost):
        about = f"{row.event}, by {job.by}"
        job.wait_held()
        start = job.events("start")[-1]
        assert start["repeated_steps"] == steps, about
        cause = list(restarts(job.events(), job.requeues()))[-1].cause
        assert re.search(row.cause, cause), f"{about}: {cause}"
    for node in broken or ():
        cluster.start_node(node)


def save_steps(run: Path) -> set[int]:
    """After which steps a run takes checkpoints: a job held there has nothing to lose."""
    return {event["step"] for event in read_rows(run / "events.jsonl") if event["event"] == "checkpoint"}


def test_what_a_cut_network_leaves_running_is_refused(
    cluster: Cluster, recipe: Recipe, undisturbed: Path, tmp_path: Path
) -> None:
    """Both ranks are on one node, so that they can train on without a network."""
    resumed, contested = sorted(save_steps(undisturbed))[:2]
    jobs = [TrainingJob(cluster, recipe, tmp_path / by, by, nodes=1, tasks_per_node=2) for by in BOTH]
    for job in jobs:
        job.control.hold("save", contested)
        job.submit()
    for job in jobs:
        job.wait_held("save", contested)
        job.control.hold("save", contested, job.start)  # of this start only, which becomes the orphan
        job.hold_at(resumed + 1)
    nodes = {cluster.job_nodes(job.id)[0] for job in jobs}
    for node in nodes:
        cluster.cut_net(node)
    for job in jobs:
        job.wait_state("RUNNING", restarts=1)
        job.wait_held()
        assert len(job.processes(rank=0)) == 2, f"{job.by}: the orphan lives"
        assert job.committed() == resumed, job.by
        job.control.release("save", contested)
        job.wait("the orphan is refused", lambda job=job: "generation 1 was superseded by generation 2" in job.log())
        job.wait("the orphan leaves", lambda job=job: len(job.processes(rank=0)) == 1)
        assert job.committed() == resumed, f"{job.by}: the orphan has written a checkpoint"
    for job in jobs:
        job.finish()
        assert job.restarts == 1, job.by
    assert [differences(recipe, job.run, undisturbed) for job in jobs] == [[], []]
