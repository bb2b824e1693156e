"""A job in which a rank hangs: the job names it, and starts again."""

import os
import re
import signal
from pathlib import Path

import pytest

from scaleprog.launchers.status import restarts
from scaleprog.recipe import Recipe
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.job import BOTH, TrainingJob

SLOW_STEP = 0.3  # s
STRIKE_AFTER = 9  # steps


def hang_recipe(patterns: Path) -> Recipe:
    return short_recipe(
        patterns, data={"trace": True}, train={"log_every": 1, "patience": 0.15}, checkpoint={"every_steps": 7}
    )


def start_again(job: TrainingJob) -> None:
    """Waits until the job has started its tasks again, and trained to the end."""
    job.wait("tasks that start again", lambda: job.repeats)
    job.finish()
    assert job.restarts == 0, job.by


@pytest.mark.timeout(1200)
def test_a_stopped_task_and_parted_nodes(cluster: Cluster, patterns: Path, tmp_path: Path) -> None:
    """Slurm notices neither."""
    recipe = hang_recipe(patterns)
    run(recipe, tmp_path / "undisturbed", ranks=2)
    stopped, parted = jobs = [TrainingJob(cluster, recipe, tmp_path / by, by) for by in BOTH]
    for job in jobs:
        job.control.slow_down(SLOW_STEP)
        job.submit()
        job.wait("some steps", lambda job=job: job.trained() >= STRIKE_AFTER)
        if job is stopped:
            (pid,) = job.processes(rank=1)
            os.kill(pid, signal.SIGSTOP)
            start_again(job)  # before the nodes, which are the same, are parted
    first, second = cluster.job_nodes(parted.id)
    cluster.part(first, second)
    parted.wait("Slurm that starts it again", lambda: parted.restarts == 1)  # srun would wait for the other node
    cluster.part(first, second, undo=True)
    parted.finish()
    culprit = r"rank 1 \(host node\d, process \d+\) did not come: state T \(stopped\)"
    (hang,) = stopped.events("hang")
    assert hang["culprits"] == [1]
    (restart,) = restarts(stopped.events(), stopped.requeues())
    assert re.search(culprit, restart.cause)
    assert re.search(culprit, stopped.requeues()[0]["cause"])
    assert "state: T" in (stopped.run / "stacks/stack-generation-1-rank-1.txt").read_text()
    assert "hangs: " in (stopped.run / "stacks/stack-generation-1-rank-0.txt").read_text()
    (hang,) = parted.events("hang")
    assert hang["culprits"] == []
    assert re.search(r"is the network between node\d, node\d whole\?", hang["message"])
    assert [differences(recipe, job.run, tmp_path / "undisturbed") for job in jobs] == [[], []]
