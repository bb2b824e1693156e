"""Mistakes on a real cluster: each is told in words, costs no time in the queue, and harms nothing that is there."""

import shutil
import socket
import sys
from pathlib import Path

import pytest

from scaleprog.recipe import Recipe
from tests.conftest import short_recipe
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.job import BOTH, ROOT, SECONDS, By, TrainingJob


@pytest.fixture(scope="module")
def recipe(patterns: Path) -> Recipe:
    return short_recipe(patterns, growth={"schedule": "original"})


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("submit", "--partition hgih: no such partition; available: low, high"),
        ("sbatch", "invalid partition specified: hgih"),
    ],
)
def test_an_unknown_partition(by: By, message: str, cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    job = TrainingJob(cluster, recipe, tmp_path / "run", by)
    with pytest.raises(RuntimeError, match=message):
        job.submit(partition="hgih")
    assert not job.run.exists()
    assert cluster.run(["squeue", "-h"]).stdout == ""


@pytest.mark.parametrize("by", BOTH)
def test_what_the_nodes_do_not_share(by: By, cluster: Cluster, recipe: Recipe, patterns: Path, tmp_path: Path) -> None:
    """Every node, this one too, sees a directory of its own at `local`: first for the run, then for its shards."""
    cluster.up(Settings(nodes=2, private_dir=tmp_path / "local"))
    job = TrainingJob(cluster, recipe, tmp_path / "local" / "run", by, beside=tmp_path)
    job.submit()
    job.wait_state("FAILED")
    assert job.restarts == 0
    assert job.committed() == 0
    if by == "sbatch":
        assert f"{job.run}: missing on a node; put it on a file system that all nodes share" in job.log()
        assert job.show()["ExitCode"] == "2:0"
        assert not job.run.exists(), "on this machine"
        return
    seen = f"it was seen on {socket.gethostname()} when the job was submitted at"
    assert job.log() == ""  # Slurm had nowhere to write it
    told = cluster.run([sys.executable, "-m", "scaleprog", "status", job.run], seconds=SECONDS).stdout
    assert f"FAILED without a log: node[0-1] may not have {job.run}; {seen}" in told

    shards = shutil.copytree(patterns, tmp_path / "local" / "shards")
    job = TrainingJob(cluster, short_recipe(shards), tmp_path / "run", by, nodes=1)
    job.submit()
    assert job.wait_state("FAILED")["ExitCode"] == "2:0"
    missing = f"node0: {shards}: the folder of shards does not exist; {seen}"
    assert missing in job.log()
    assert missing in job.requeues()[-1]["cause"]


def test_two_jobs_on_one_run_directory(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    first, second, third = (TrainingJob(cluster, recipe, tmp_path / "run", by, nodes=1) for by in ("sbatch", *BOTH))
    first.control.slow_down(0.3)
    first.hold_at(10)
    first.submit()
    first.wait_held()
    present = files(first.run)
    refusal = f"{first.run} belongs to job {first.id}, which is RUNNING"
    with pytest.raises(RuntimeError, match=refusal):
        second.submit()
    assert files(first.run) == present
    third.submit()
    assert third.wait_state("FAILED")["ExitCode"] == "2:0"
    assert refusal in third.log()
    assert files(first.run) == present

    (first.run / "job.json").unlink()  # both started at once, say, and neither saw the other's
    third.submit()
    assert third.wait_state("FAILED")["ExitCode"] == "2:0"
    assert "is in use by" in third.log()
    cluster.run(["scancel", "--signal=USR2", first.id])
    first.wait("told", first.signals)
    first.go_on()
    first.wait_state("PENDING", "RUNNING", restarts=1)
    first.finish()


def files(run: Path) -> dict[str, bytes]:
    """The files of a run directory but for those of what it holds in folders."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize("by", BOTH)
def test_cancel_ends_the_job_that_trains_in_a_directory_and_no_other(
    by: By, cluster: Cluster, recipe: Recipe, tmp_path: Path
) -> None:
    job = TrainingJob(cluster, recipe, tmp_path / "run", by, nodes=1)
    job.hold_at(3)
    job.submit()
    job.wait_held()
    another = tmp_path / "of somebody else"
    another.mkdir()
    for name in ("job.json", "recipe.yaml"):
        (another / name).write_text((job.run / name).read_text())
    cancel = [sys.executable, "-m", "scaleprog", "cancel"]
    refused = cluster.run(["env", f"--chdir={ROOT}", *cancel, another], check=False, seconds=SECONDS)
    assert f"names job {job.id}, but Slurm's record of its command" in " ".join(refused.stderr.split())
    assert job.show()["JobState"] == "RUNNING"
    assert f"canceled job {job.id}, which was RUNNING" in " ".join(
        cluster.run(["env", f"--chdir={ROOT}", *cancel, job.run], seconds=SECONDS).stdout.split()
    )
    job.wait_state("CANCELLED")
