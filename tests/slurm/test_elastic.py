"""Jobs that ask for a range of nodes: each start uses what it gets and can train, and the run is the same."""

from pathlib import Path

import pytest

from scaleprog.rundir.recorder import read_rows
from tests.compare import samples
from tests.conftest import run, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.job import BOTH, TrainingJob

EPOCHS, STEPS, SAMPLES = 2, 20, 160  # the last two per epoch


def test_a_run_goes_on_with_the_nodes_that_each_start_gets(cluster: Cluster, patterns: Path, tmp_path: Path) -> None:
    recipe = short_recipe(
        patterns,
        data={"trace": True},
        train={"epochs": EPOCHS, "log_every": 1},
        growth={"schedule": "linear", "stages": 2},
    )
    undisturbed = tmp_path / "undisturbed"
    run(recipe, undisturbed)
    jobs = [TrainingJob(cluster, recipe, tmp_path / by, by) for by in BOTH]
    cluster.drain(3)
    for job in jobs:
        job.control.slow_down(0.3)  # a signal is acted upon within some two seconds of steps
        job.hold_at(3)
        job.submit(nodes="1:4")
    assert wait_training(jobs, 2) == [[0, 1, 2]] * 2, "three nodes are free"
    assert all("2 of 3 nodes train, idle: node2; 3 ranks do not divide data.lanes, 4;" in job.log() for job in jobs)

    cluster.drain(0, 1)
    start_again(cluster, jobs)
    assert wait_training(jobs, 1) == [[2]] * 2, "one node is free"

    cluster.undrain(0, 1, 3)
    start_again(cluster, jobs)
    assert wait_training(jobs, 4) == [[0, 1, 2, 3]] * 2
    for job in jobs:
        job.finish()
        assert [event["world"] for event in job.events("start")] == [2, 1, 4], job.by
        assert [event["repeated_steps"] for event in job.events("start")] == [0, 0, 0], job.by
        assert job.log().count("idle:") == 1, job.by
        check_equal(job.run, undisturbed)


def wait_training(jobs: list[TrainingJob], nodes: int) -> list[list[int]]:
    """Waits until the jobs are held, each training on so many nodes; returns the nodes that they have."""
    for job in jobs:
        job.nodes = nodes
        job.wait_held()
    return [job.cluster.job_nodes(job.id) for job in jobs]


def start_again(cluster: Cluster, jobs: list[TrainingJob]) -> None:
    """Tells the held jobs to leave after a checkpoint, as a preemption does, and holds them anew when they are back."""
    before = [(job.restarts, len(job.events("start"))) for job in jobs]
    cluster.run(["scancel", "--signal=USR2", *(job.id for job in jobs)])
    for job in jobs:
        job.wait("told by SIGUSR2", lambda job=job: "SIGUSR2" in job.signals())
        job.go_on()
    for job, (restarts, starts) in zip(jobs, before):
        job.wait_state("PENDING", "RUNNING", restarts=restarts + 1)
        job.hold_at(job.committed() + 2)
        assert len(job.events("start")) == starts, f"{job.by}: it trains before it was to be held"


def check_equal(folder: Path, reference: Path) -> None:
    """Asserts that every step was trained once, on the samples and to the losses of the reference."""
    mine, theirs = ([row for row in read_rows(f / "metrics.jsonl") if "loss" in row] for f in (folder, reference))
    assert [row["step"] for row in mine] == list(range(1, EPOCHS * STEPS + 1))
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    taken, known = samples(folder), samples(reference)
    assert {step: sorted(ids) for step, ids in taken.items()} == {step: sorted(ids) for step, ids in known.items()}
    for epoch in range(EPOCHS):
        ids = [i for step in range(epoch * STEPS, (epoch + 1) * STEPS) for i in taken[step + 1]]
        assert len(ids) == len(set(ids)) == SAMPLES
