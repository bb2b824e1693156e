"""A task of a Slurm job: which rank it is, and where it meets the others."""

import socket
import sys
from pathlib import Path

import pytest

from scaleprog.errors import AbsentData, DataError, Preempted, ScaleprogError, Unavailable
from scaleprog.launchers import task
from scaleprog.launchers.attempt import Attempt
from scaleprog.launchers.snapshot import JobFile
from scaleprog.ranks.stop import deadline
from scaleprog.rundir.reading import read_rows
from tests.unit.fake_slurm import FakeSlurm


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert task.tasks_per_node(text) == counts


def test_rank_variables() -> None:
    variables = {
        "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,3", "SLURM_PROCID": "4", "SLURM_NTASKS": "5",
        "SLURM_LOCALID": "2",
    }  # fmt: skip
    ranks = task.rank_variables(variables, Attempt("12", 0))
    port = ranks.pop("MASTER_PORT")
    assert ranks == {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    assert int(port) in range(15_000, 30_000)
    for gpus, local in (("0,1,2", "2"), ("2", "0")):  # all GPUs of the node are visible, or only the task's own
        assert task.rank_variables(variables | {"CUDA_VISIBLE_DEVICES": gpus}, Attempt("12", 0))["LOCAL_RANK"] == local


def test_ports_differ_between_starts() -> None:
    starts = [Attempt(str(job), restart) for job in (1, 2, 3, 10**8) for restart in range(6)]
    ports = {task.port(start) for start in starts}
    assert len(ports) == len(starts)
    tasks = [("100", "100_0"), ("101", "100_1"), ("102", "102_0"), ("103", "102_1"), ("104", "104")]  # of arrays, a job
    assert len({task.port(Attempt(job, 0), number) for number, job in tasks}) == len(tasks)
    assert min(ports) >= 15_000
    assert max(ports) < 32_768  # where Linux begins to give ports out


def test_network_on_one_host() -> None:
    variables = task.network_variables({"SLURM_JOB_NODELIST": "node3"})
    assert variables == {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    asked = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0", "MASTER_ADDR": "10.0.0.1"}
    assert task.network_variables({"SLURM_JOB_NODELIST": "node3"} | asked) == variables


def test_rank_0_is_where_others_find_it_though_its_name_means_loopback_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"node0": "127.0.1.1", "node1": "10.0.0.2"}  # node0's own /etc/hosts
    monkeypatch.setattr(task, "address", lambda host: addresses[host])
    monkeypatch.setattr(task, "address_towards", lambda peer: {"10.0.0.2": "10.0.0.1"}.get(peer, ""))
    monkeypatch.setattr(task, "interface", lambda peer: {"10.0.0.2": "to1"}.get(peer, ""))
    variables = task.network_variables({"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NODEID": "0"})
    assert variables == {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "to1", "NCCL_SOCKET_IFNAME": "to1"}


def test_network_over_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"node0": "10.0.0.1", "node1": "10.0.0.2"}
    monkeypatch.setattr(task, "address", lambda host: addresses.get(host, ""))
    monkeypatch.setattr(task, "interface", lambda peer: {"10.0.0.1": "to0", "10.0.0.2": "to1"}.get(peer, ""))
    nodes = {"SLURM_STEP_NODELIST": "node[0-1]", "SLURM_JOB_NODELIST": "x"}
    for node, chosen in (("0", "to1"), ("1", "to0")):  # on rank 0's own node its address would lead to loopback
        variables = task.network_variables(nodes | {"SLURM_NODEID": node, "NCCL_SOCKET_IFNAME": "ib0"})
        assert variables == {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": chosen}
    unknown = {"SLURM_JOB_NODELIST": "gone[0-1]", "SLURM_NODEID": "1"}
    assert task.network_variables(unknown | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"
    for told in ({}, {"SLURM_LAUNCH_NODE_IPADDR": "fd00::1"}):
        with pytest.raises(ScaleprogError, match=r"gone0: cannot resolve the address.*ranks do not meet by IPv6"):
            task.network_variables(unknown | told)


def test_interface() -> None:
    assert task.interface("127.0.0.1") == "lo"
    assert task.interface("") == task.interface("no address") == ""


def test_time_limit_is_asked_for_where_slurm_does_not_set_it(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.show(end="1795468837")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "5")
    task.tell_time_limit(Attempt("7", 0))
    assert deadline() == 5
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    task.tell_time_limit(Attempt("7", 0))
    assert deadline() == 1795468837
    fake.show(end="Unknown")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    task.tell_time_limit(Attempt("7", 0))
    assert deadline() is None


@pytest.mark.parametrize(
    ("rank", "error", "code", "cause", "reason"),
    [
        (0, Preempted("stopped after step 9", "SIGUSR2"), 75, "stopped after step 9", "SIGUSR2"),
        (1, DataError("a shard is damaged"), 2, "a shard is damaged", None),
        (1, Unavailable("a worker is gone"), 1, "a worker is gone", None),
        (1, ValueError("x\ny"), 1, "ValueError: x", None),
    ],
)
def test_a_task_that_leaves_says_why(
    rank: int, error: Exception, code: int, cause: str, reason: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(task, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        task.leave(tmp_path, Attempt("7", 2), rank, error)
    assert left.value.code == code
    (row,) = read_rows(tmp_path / "jobs" / "reports" / f"7-2-{rank}.json")
    assert (row["code"], row["cause"], row["reason"]) == (code, cause, reason)
    told = capsys.readouterr().err
    if isinstance(error, Preempted):
        assert told == ""
    elif isinstance(error, ScaleprogError):
        assert told == f"scaleprog: rank 1: {error}\n"
    else:
        assert told == "scaleprog: rank 1: failed\nValueError: x\ny\n\n"


@pytest.mark.parametrize(
    ("start", "step", "code"), [(Attempt("7", 0), 9, 2), (Attempt("7", 1), 0, 2), (Attempt("7", 1), 9, 1)]
)
def test_what_an_earlier_start_had_may_come_back(
    start: Attempt, step: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may have the file system that this one has not."""
    (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(task, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        task.leave(tmp_path, start, 0, AbsentData("data/x: no folder. Build it.", "data/x: no folder"))
    assert left.value.code == code
    (row,) = read_rows(tmp_path / "jobs" / "reports" / f"{start}-0.json")
    assert row["cause"].endswith("an earlier start of this job had it") == (code == 1)


def test_what_a_node_does_not_have_was_seen_where_the_job_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = AbsentData("data/x: no folder. Build it with `scaleprog shards`.", "data/x: no folder")
    assert task.missing_here(tmp_path, error) is error, "nobody has looked for it"
    JobFile("7", "a", "code/x").write(tmp_path)
    assert task.missing_here(tmp_path, error) is error, "plain sbatch does not look"
    JobFile("7", "a", "code/x", host="login1", time=1795468537.0).write(tmp_path)
    monkeypatch.delenv("SLURM_SUBMIT_DIR", raising=False)
    told = str(task.missing_here(tmp_path, error))
    assert told.startswith(
        f"{socket.gethostname()}: data/x: no folder; it was seen on login1 when the job was submitted"
    )
    assert told.endswith("is it on a file system that all nodes share?")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_SUBMIT_DIR", "/home/me")
    told = str(task.missing_here(tmp_path, error))
    assert told.endswith(f" (relative paths begin at {tmp_path} here, and began at /home/me there)")
