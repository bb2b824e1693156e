"""A job in which a rank hangs: the job names it, and starts again."""

import os
import re
import signal
from pathlib import Path

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


def test_a_stopped_task_and_a_cut_network(cluster: Cluster, patterns: Path, tmp_path: Path) -> None:
    recipe = hang_recipe(patterns)
    run(recipe, tmp_path / "undisturbed", ranks=2)
    jobs = [TrainingJob(cluster, recipe, tmp_path / by, by) for by in BOTH]
    for job in jobs:
        job.control.slow_down(SLOW_STEP)
        job.submit()
    for job in jobs:
        job.wait("some steps", lambda job=job: job.trained() >= STRIKE_AFTER)
    stopped, parted = jobs
    (pid,) = stopped.processes(rank=1)
    os.kill(pid, signal.SIGSTOP)
    cluster.cut_net(cluster.job_nodes(parted.id)[-1])  # rank 0 is with the batch script, and with the controller
    for job in jobs:
        job.wait_state("PENDING", "RUNNING", restarts=1)
        job.finish()
    culprit = r"rank 1 \(host node\d, process \d+\) did not come: state T \(stopped\)"
    (hang,) = stopped.events("hang")
    assert hang["culprits"] == [1]
    (restart,) = restarts(stopped.events(), stopped.requeues())
    assert re.search(culprit, restart.cause)
    assert re.search(culprit, stopped.requeues()[0]["cause"])
    assert "state: T" in (stopped.run / "stacks/stack-generation-1-rank-1.txt").read_text()
    assert "hangs: " in (stopped.run / "stacks/stack-generation-1-rank-0.txt").read_text()
    (hang,) = parted.events("hang")
    assert "waited for the others" in hang["message"]
    assert [differences(recipe, job.run, tmp_path / "undisturbed") for job in jobs] == [[], []]
