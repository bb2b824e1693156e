"""A job with spare nodes loses nodes, and continues without the queue; not without the node of its batch script."""

from pathlib import Path

import pytest

from scaleprog.launchers.status import restarts
from scaleprog.recipe import Recipe
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.job import By, TrainingJob


@pytest.fixture(scope="module")
def undisturbed(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe, and the run directory of its run on two ranks."""
    recipe = short_recipe(patterns, data={"trace": True}, train={"log_every": 1}, checkpoint={"every_steps": 7})
    folder = tmp_path_factory.mktemp("spare") / "undisturbed"
    run(recipe, folder, ranks=2)
    return recipe, folder


def held(cluster: Cluster, recipe: Recipe, run: Path, by: By, spare: int) -> TrainingJob:
    """A job with spare nodes, whose ranks wait at step 9."""
    job = TrainingJob(cluster, recipe, run, by)
    job.hold_at(9)
    job.submit(spare_nodes=str(spare))
    job.wait_held()
    return job


def wait_watched(job: TrainingJob, watching: int, watched: int) -> None:
    """Waits until one node watches the node of the batch script."""
    line = f"node{watching} watches node{watched}, the node of the batch script"
    job.wait("watched", lambda: line in job.log())


@pytest.mark.timeout(600)
def test_the_watch_requeues_a_job_that_has_lost_its_batch_script(
    cluster: Cluster, undisturbed: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, reference = undisturbed
    job = held(cluster, recipe, tmp_path / "run", "sbatch", 1)
    wait_watched(job, 2, 0)
    job.wait("a checkpoint", lambda: job.committed() == 7)  # of rank 0, whose node is lost
    cluster.kill_node(0)
    job.wait_state("RUNNING", restarts=1)
    assert cluster.job_nodes(job.id) == [1, 2, 3]
    job.finish()
    assert job.restarts == 1
    (restart,) = restarts(job.events(), job.requeues())
    assert (restart.step, restart.cause) == (7, "Slurm has lost node0, the node of the batch script")
    assert [row["requeue"] for row in job.requeues()] == [True]
    assert differences(recipe, job.run, reference) == []


@pytest.mark.timeout(600)
def test_ranks_that_crash_before_slurm_notices_the_lost_node_start_again(
    cluster: Cluster, undisturbed: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """Their step stays in the books of Slurm before 23.11, with its cores."""
    recipe, reference = undisturbed
    job = TrainingJob(cluster, recipe, tmp_path / "run", "sbatch")
    job.control.slow_down(0.3)
    job.submit(spare_nodes="1")
    job.wait("some steps", lambda: job.trained() >= 9)
    cluster.kill_node(1)
    job.wait("tasks that start again", lambda: job.repeats)
    job.finish()
    assert job.restarts == 0
    assert "starts its tasks again, without node1" in job.log()
    assert differences(recipe, job.run, reference) == []


@pytest.mark.timeout(600)
def test_a_lost_watch_starts_on_another_node_and_a_spare_node_replaces_a_lost_one(
    cluster: Cluster, undisturbed: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, reference = undisturbed
    job = held(cluster, recipe, tmp_path / "run", "submit", 2)
    assert "2 of 4 nodes train, idle: node2, node3; spare" in job.log()
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
    assert differences(recipe, job.run, reference) == []


@pytest.mark.timeout(600)
def test_a_job_of_an_array_with_a_spare_node_loses_nodes_and_is_preempted(
    cluster: Cluster, undisturbed: tuple[Recipe, Path], tmp_path: Path
) -> None:
    cluster.up(Settings(grace=60))
    recipe, reference = undisturbed
    job = TrainingJob(cluster, recipe, tmp_path / "sweep" / "seed0", "submit", beside=tmp_path)
    job.hold_at(9)
    job.submit(spare_nodes="1", sweep=f"seed={recipe.seed}")
    job.wait_held()
    cluster.kill_node(1)
    job.hold_at(16)
    job.wait("tasks that start again", lambda: job.repeats)
    job.wait_held()
    cluster.start_node(1)
    cluster.run(["sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"])
    job.wait("the notice", job.signals)
    job.hold_at(30)
    job.wait_state("RUNNING", restarts=1)
    job.wait_held()
    lost = cluster.job_nodes(job.id)[0]
    wait_watched(job, cluster.job_nodes(job.id)[2], lost)
    cluster.kill_node(lost)
    job.wait_state("RUNNING", restarts=2)
    job.finish()
    assert job.restarts == 2
    assert "starts its tasks again, without node1" in job.log()
    _, preempted, lost_script = (restart.cause for restart in restarts(job.events(), job.requeues()))
    assert preempted.startswith("stopped by SIGUSR2 after step"), preempted
    assert lost_script == f"Slurm has lost node{lost}, the node of the batch script"
    begun = [event["step"] for event in job.events("start")]
    assert begun[:2] == [0, 7]
    assert 16 <= begun[2] < 30, "a preempted job saves where its ranks agree to stop"
    assert begun[3] == max(28, begun[2]), "a lost node costs the steps since the last checkpoint"
    assert differences(recipe, job.run, reference) == []
