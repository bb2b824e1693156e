"""What the tasks of a job listen on: loopback on one node; on several, rank 0's port and gloo's, on their network."""

from pathlib import Path

import pytest

from scaleprog.launchers.task import PORTS
from scaleprog.recipe import Recipe
from tests.conftest import short_recipe
from tests.listening import Listener, descendants, listeners
from tests.slurm.cluster import Cluster
from tests.slurm.job import BOTH, By, TrainingJob


@pytest.fixture
def recipe(patterns: Path) -> Recipe:
    return short_recipe(patterns, growth={"schedule": "original"}, data={"workers": 1})


def heard_by(job: TrainingJob) -> list[set[Listener]]:
    """What each rank of a job listens on, itself and its workers, while it is held after a step."""
    job.hold_at(3)
    job.submit()
    job.wait_held()
    found = [listeners(pid for own in job.processes(rank) for pid in descendants(own)) for rank in range(job.ranks)]
    job.cluster.cancel_all()
    return found


@pytest.mark.parametrize("by", BOTH)
def test_a_job_on_one_node_listens_on_loopback_only(by: By, cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    heard = heard_by(TrainingJob(cluster, recipe, tmp_path / "run", by, nodes=1, tasks_per_node=2))
    assert all(heard), "gloo's at least"
    assert [listener for own in heard for listener in own if not listener.local] == []
    assert sum(listener.port in PORTS for listener in heard[0]) == 1, "where the ranks meet"


def test_a_job_on_two_nodes_listens_on_their_network_only(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    heard = heard_by(TrainingJob(cluster, recipe, tmp_path / "run", "submit", nodes=2))
    for node, own in enumerate(heard):
        assert own
        assert {listener.address for listener in own} == {f"10.213.{cluster.number}.{10 + node}"}
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    meeting, gloo = ([{o.port for o in own if (o.port in PORTS) == fixed} for own in heard] for fixed in (True, False))
    assert [len(ports) for ports in meeting] == [1, 0]
    assert all(low <= port <= high for ports in gloo for port in ports)
