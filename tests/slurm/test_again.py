"""A job that loses a node goes on inside its allocation, on a spare node or on fewer ones."""

from pathlib import Path

import pytest

from scaleprog.launchers.status import restarts
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.job import BOTH, TrainingJob


@pytest.mark.timeout(900)
def test_a_spare_node_takes_the_place_of_a_lost_one(cluster: Cluster, patterns: Path, tmp_path: Path) -> None:
    """The spare node is the third of the job; Slurm notices after some 16 s that it has lost the second."""
    recipe = short_recipe(patterns, data={"trace": True}, train={"log_every": 1}, checkpoint={"every_steps": 7})
    run(recipe, tmp_path / "undisturbed", ranks=2)
    for by in BOTH:
        cluster.up()
        job = TrainingJob(cluster, recipe, tmp_path / by, by)
        job.hold_at(9)
        job.submit(spare_nodes="1")
        job.wait_held()
        first, second, third = cluster.job_nodes(job.id)
        assert f"2 of 3 nodes train, idle: node{third}; spare" in job.log()
        cluster.kill_node(second)
        job.wait("tasks that start again", lambda job=job: job.repeats)
        job.finish()
        assert job.restarts == 0, by
        assert [event["world"] for event in job.events("start")] == [2, 2], by
        assert [event["repeated_steps"] for event in job.events("start")] == [0, 2], by
        assert len(list(restarts(job.events(), job.requeues()))) == 1, by
        assert f"2 ranks on node[{first},{third}]" in job.log(), by
        assert differences(recipe, job.run, tmp_path / "undisturbed") == [], by
