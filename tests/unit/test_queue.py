"""What Slurm says about a job."""

import pytest

from scaleprog import queue
from scaleprog.queue import Job
from tests.unit.fake_slurm import FakeSlurm


def test_a_job_as_scontrol_shows_it(fake: FakeSlurm) -> None:
    assert queue.find("7") == Job("7", "scaleprog-a b", "RUNNING", nodes="node[0-1]")
    fake.show(state="SIGNALING", restarts=2, preempt="1795468837", end="1795468900")
    job = queue.find("7")
    assert job is not None
    assert (job.state, job.restarts, job.preempted, job.end, job.over) == ("RUNNING", 2, True, 1795468900.0, False)
    for code, known in (("2:0", 2), ("0:9", 137)):
        fake.show(state="FAILED", code=code)
        job = queue.find("7")
        assert job is not None
        assert (job.over, job.exit_code) == (True, known)


def test_a_job_that_slurm_has_forgotten(fake: FakeSlurm) -> None:
    fake.command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake.command("sacct", "echo 'scaleprog-a b|CANCELLED by 0|0:15|node0'")
    assert queue.find("7") == Job("7", "scaleprog-a b", "CANCELLED", nodes="node0", exit_code=143)
    fake.command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert queue.find("7") is None


def test_no_answer(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(queue.NoAnswer, match="Unable to contact slurm controller"):
        queue.find("7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(queue.NoAnswer, match="scontrol is not there"):
        queue.find("7")


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node0", ["node0"]),
        ("node[0-1]", ["node0", "node1"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("a-b[1-2]-c,x.y", ["a-b1-c", "a-b2-c", "x.y"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_hosts(nodelist: str, names: list[str]) -> None:
    assert queue.hosts(nodelist) == names
