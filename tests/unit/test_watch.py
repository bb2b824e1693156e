"""The watch on the node of a batch script: when it requeues a job, and when it starts elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.launchers import watch
from scaleprog.launchers.attempt import Attempt
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.slurm_queue import Job
from tests.unit.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_job(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:  # after `fake`, which removes them
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "node0")


def job(**changes: Any) -> Job:
    return Job(**{"id": "7", "name": "a", "state": "RUNNING", "nodes": "node[0-2]", **changes})


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (job(), "watch"),
        (job(nodes="node[1-2]"), "lost"),
        (job(nodes="node[10-12]"), "lost"),
        (job(nodes=""), "watch"),
        (job(nodes="node[1-2]", state="SUSPENDED"), "watch"),
        (job(nodes="node[1-2]", state="COMPLETING"), "leave"),  # a job that ends gives its nodes back one by one
        (job(nodes="", state="PENDING"), "leave"),
        (job(nodes="node[1-2]", state="CANCELLED"), "leave"),
        (job(nodes="node[1-2]", restarts=1), "leave"),
        (None, "leave"),
    ],
)
def test_what_slurm_says_of_the_job(shown: Job | None, expected: str) -> None:
    assert watch.judge(shown, Attempt("7", 0), "node0") == expected


def steps(*actions: Callable[[], object]) -> Callable[[float], None]:
    """A pause in which one thing after the other happens; the test fails if the watch goes on after that."""
    left = list(actions)

    def pause(_: float) -> None:
        left.pop(0)()

    return pause


def requeues(fake: FakeSlurm, refuse: int = 0) -> None:
    """`scontrol requeue` puts job 7 back into the queue, after so many refusals."""
    shown = fake.folder / "shown"
    refusal = f"[ $(grep -c requeue {fake.folder}/calls) -gt {refuse} ] || {{ echo no >&2; exit 1; }}"
    change = f"sed -i 's/State=RUNNING/State=PENDING/; s/Restarts=0/Restarts=1/' {shown}"
    fake.command("scontrol", f'[ "$1" = requeue ] || {{ cat {shown}; exit; }}\n{refusal}\n{change}')


def test_a_job_without_its_batch_script_is_requeued_once(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose() -> None:
        fake.show(nodes="node1")
        requeues(fake)

    (tmp_path / "owner.json").write_text('{"generation": 3, "job": "7", "restart": 0, "repeat": 2}')
    silent = [lambda: fake.command("scontrol", "echo unreachable >&2; exit 1"), lose]
    watch.watch(tmp_path, "node0", steps(*silent, lambda: None, lambda: None))
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert row["cause"] == "Slurm has lost node0, the node of the batch script"
    assert (row["kind"], row["requeue"], row["restart"], row["repeat"]) == ("crash", True, 0, 2)
    assert capsys.readouterr().out == "watching\n"


def test_one_answer_is_not_enough(fake: FakeSlurm, tmp_path: Path) -> None:
    """A node that is there again was not given up."""
    fake.show(nodes="node1")
    watch.watch(tmp_path, "node0", steps(fake.show, lambda: fake.show(state="COMPLETED")))
    assert fake.calls("scontrol requeue") == []
    assert not (tmp_path / "requeues.jsonl").exists()


def test_a_refused_requeue_is_asked_again_and_the_job_canceled_in_the_end(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MOST_REFUSALS", 3)
    fake.show(nodes="node1")
    requeues(fake, refuse=1)
    watch.watch(tmp_path, "node0", steps(*[lambda: None] * 3))
    assert len(fake.calls("scontrol requeue")) == 2
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert row["requeue"]

    fake.show(nodes="node1")
    requeues(fake, refuse=99)
    fake.command("scancel", f"sed -i s/RUNNING/CANCELLED/ {fake.folder}/shown")
    watch.watch(tmp_path / "other", "node0", steps(*[lambda: None] * 5))
    assert fake.calls("scancel") == ["scancel 7"]


def test_the_batch_script_of_a_node_that_lives_may_have_written_the_line(fake: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "requeues.jsonl").write_text('{"time": 1, "job": "7", "restart": 0, "cause": "x", "requeue": true}\n')
    fake.show(nodes="node1")
    requeues(fake)
    watch.watch(tmp_path, "node0", steps(*[lambda: None] * 2))
    assert len(read_rows(tmp_path / "requeues.jsonl")) == 1


def test_a_lost_watch_starts_on_another_node_and_one_that_cannot_start_is_told(
    fake: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """node2 watches, and is lost; node1 cannot; then the job ends."""
    fake.show(nodes="node[0-2]")
    fake.command("sinfo", "echo node1 allocated; echo node2 allocated")
    fake.command(
        "srun",
        f'[[ $* = *--nodelist=node2* ]] || {{ echo "srun: error: no"; exit 1; }}\necho watching\nenv > {tmp_path}/env\n'
        f"sed -i 's/NodeList=node.0-2./NodeList=node[0-1]/' {fake.folder}/shown",
    )
    pauses = steps(lambda: None, lambda: None, lambda: fake.show(state="COMPLETED"))
    watch.keep(tmp_path, pauses)
    calls = fake.calls("srun")
    assert [call.partition("nodelist=")[2].partition(" ")[0] for call in calls] == ["node2", "node1", "node1"]
    assert all("--overlap" in call and "--gres=none" in call and "--no-kill" not in call for call in calls)
    told = capfd.readouterr().err
    assert "scaleprog: node2 watches node0, the node of the batch script\n" in told
    assert told.count("no other node watches node0") == 2
    assert "(node1: srun: error: no); trying again" in told
    assert "SLURM_JOB_ID=7" in (tmp_path / "env").read_text()


def test_a_job_without_other_nodes_needs_no_watch(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.show(nodes="node0")
    watch.keep(tmp_path, steps())
    assert fake.calls("srun") == []


def test_the_next_node() -> None:
    assert watch.next_node(["node1", "node2", "node3"], []) == "node3"
    assert watch.next_node(["node1", "node2"], ["node2"]) == "node1"
    assert watch.next_node(["node1", "node2"], ["node1", "node2"]) == "node1"


def test_the_step_takes_none_of_the_options_of_the_ranks() -> None:
    given = {"SLURM_GPUS_PER_NODE": "8", "SLURM_NTASKS": "16", "SLURM_RESTART_COUNT": "2", "PATH": "/bin"}
    assert watch.variables(given) == {"SLURM_RESTART_COUNT": "2", "PATH": "/bin"}


@pytest.mark.process
def test_the_keeper_ends_its_step_with_the_batch_script(fake: FakeSlurm, tmp_path: Path) -> None:
    """Not with the signals for the ranks."""
    fake.command("sinfo", "echo node1 allocated")
    fake.command("srun", f"echo watching; exec {sys.executable} -c 'import time; time.sleep(100)'")
    command = [sys.executable, "-m", "scaleprog.launchers.watch", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as keeper:
        assert keeper.stderr is not None
        assert "node1 watches node0" in keeper.stderr.readline()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            keeper.send_signal(number)
        time.sleep(0.5)
        assert keeper.poll() is None
        keeper.send_signal(signal.SIGHUP)
        assert keeper.wait(timeout=20) == 0
    assert os.environ["SLURM_JOB_ID"] == "7"
