"""A job with spare nodes loses nodes, and continues without the queue; not without the node of its batch script."""

from pathlib import Path

import pytest

from scaleprog.launchers.status import restarts
from scaleprog.recipe import Recipe
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.job import TrainingJob


def spare_recipe(patterns: Path) -> Recipe:
    return short_recipe(patterns, data={"trace": True}, train={"log_every": 1}, checkpoint={"every_steps": 7})


def wait_watched(job: TrainingJob, watching: int, watched: int) -> None:
    """Waits until one node watches the node of the batch script."""
    line = f"node{watching} watches node{watched}, the node of the batch script"
    job.wait("watched", lambda: line in job.log())


@pytest.mark.timeout(600)
def test_a_spare_node_replaces_a_lost_one_and_the_watch_requeues_without_a_batch_script(
    cluster: Cluster, patterns: Path, tmp_path: Path
) -> None:
    recipe = spare_recipe(patterns)
    run(recipe, tmp_path / "undisturbed", ranks=2)
    job = TrainingJob(cluster, recipe, tmp_path / "run", "submit")
    job.hold_at(9)
    job.submit(spare_nodes="1")
    job.wait_held()
    first, second, third = cluster.job_nodes(job.id)
    assert f"2 of 3 nodes train, idle: node{third}; spare" in job.log()
    wait_watched(job, third, first)
    cluster.kill_node(second)
    job.wait("tasks that start again", lambda: job.repeats)
    job.hold_at(16)
    job.wait_held()
    assert job.restarts == 0
    assert f"2 ranks on node[{first},{third}]" in job.log()

    cluster.start_node(second)
    cluster.kill_node(first)
    job.wait_state("RUNNING", restarts=1)
    assert first not in cluster.job_nodes(job.id)
    job.finish()
    assert job.restarts == 1
    in_job, requeue = restarts(job.events(), job.requeues())
    assert (in_job.step, requeue.step) == (7, 14)
    assert requeue.cause == f"Slurm has lost node{first}, the node of the batch script"
    assert [(row["requeue"], row.get("here")) for row in job.requeues()] == [(False, True), (True, None)]
    assert differences(recipe, job.run, tmp_path / "undisturbed") == []


@pytest.mark.timeout(600)
def test_a_watch_that_is_lost_starts_on_another_node_and_two_losses_are_survived(
    cluster: Cluster, patterns: Path, tmp_path: Path
) -> None:
    recipe = spare_recipe(patterns)
    run(recipe, tmp_path / "undisturbed", ranks=2)
    job = TrainingJob(cluster, recipe, tmp_path / "run", "sbatch")
    job.hold_at(9)
    job.submit(spare_nodes="2")
    job.wait_held()
    wait_watched(job, 3, 0)
    cluster.kill_node(3)
    wait_watched(job, 2, 0)
    assert job.requeues() == [], "no rank was on that node"
    cluster.kill_node(1)
    job.wait("tasks that start again", lambda: job.repeats)
    job.finish()
    assert job.restarts == 0
    assert "starts its tasks again, without node1, node3" in job.log()
    assert "2 ranks on node[0,2]" in job.log()
    assert [event["step"] for event in job.events("start")] == [0, 7]
    assert differences(recipe, job.run, tmp_path / "undisturbed") == []
