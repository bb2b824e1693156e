"""Slurm jobs without a Slurm: what tasks derive, scripts contain, the batch script decides, and status tells.

`slurm` puts commands of Slurm's names on the PATH that write down how they were called and answer what a test wants.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers import queue, requeue, slurm, snapshot, status, task
from launchers.queue import Job
from launchers.requeue import End, Start, decide, how_it_ended
from launchers.slurm import Request
from launchers.snapshot import JobFile
from scaleprog import preemption
from scaleprog.claim import read_owner
from scaleprog.errors import CheckpointError, DataError, ScaleprogError
from scaleprog.growth.space import Subnet
from scaleprog.models.cost import gmacs
from scaleprog.plan import Plan
from scaleprog.recipe import Recipe

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
SHOWN = (
    "JobId=7 JobName=scaleprog-a b UserId=me(1) GroupId=me(1) JobState={state} Reason={reason} Requeue=1 "
    "Restarts={restarts} ExitCode={code} TimeLimit=00:05:00 SubmitTime=1795468537 EndTime={end} PreemptTime={preempt} "
    "NodeList=node[0-1] BatchHost=node0\n"
)


class FakeSlurm:
    """Commands in a folder of the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.show()
        self.command("sinfo", "echo low; echo high; echo low")
        self.command("sbatch", "echo Submitted batch job 7")
        self.command("squeue", "echo 'Invalid job id specified' >&2; exit 1")
        self.command("scancel", "exit 0")

    def command(self, name: str, script: str) -> None:
        """Makes a command do what `script` says."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def show(self, **fields: Any) -> None:
        """What scontrol shows of job 7; `requeue` does nothing."""
        values = {
            "state": "RUNNING",
            "reason": "None",
            "restarts": 0,
            "code": "0:0",
            "end": "Unknown",
            "preempt": "None",
        }
        (self.folder / "shown").write_text(SHOWN.format(**values | fields))
        self.command("scontrol", f'[ "$1" = requeue ] || cat {self.folder}/shown')

    def calls(self, name: str) -> list[str]:
        """How a command was called."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "slurm-commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return FakeSlurm(folder)


# ---- a task's place


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
    assert task.hosts(nodelist) == names


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert task.tasks_per_node(text) == counts


def test_rank_variables() -> None:
    variables = {
        "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,3", "SLURM_PROCID": "4", "SLURM_NTASKS": "5",
        "SLURM_LOCALID": "2",
    }  # fmt: skip
    ranks = task.rank_variables(variables, Start("12", 0))
    port = ranks.pop("MASTER_PORT")
    assert ranks == {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    assert int(port) in range(15_000, 30_000)
    for gpus, local in (("0,1,2", "2"), ("2", "0")):  # all GPUs of the node are visible, or only the task's own
        assert task.rank_variables(variables | {"CUDA_VISIBLE_DEVICES": gpus}, Start("12", 0))["LOCAL_RANK"] == local


def test_ports_differ_between_starts() -> None:
    starts = [Start(str(job), restart) for job in (1, 2, 3, 10**8) for restart in range(6)]
    ports = {task.port(start) for start in starts}
    assert len(ports) == len(starts)
    assert min(ports) >= 15_000
    assert max(ports) < 32_768  # where Linux begins to give ports out


def test_network_on_one_host() -> None:
    variables = task.network_variables({"SLURM_JOB_NODELIST": "node3"})
    assert variables == {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


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
    with pytest.raises(ScaleprogError, match="gone0: no address is known"):
        task.network_variables(unknown)


def test_interface() -> None:
    assert task.interface("127.0.0.1") == "lo"
    assert task.interface("") == task.interface("no address") == ""


def test_time_limit_is_asked_for_where_slurm_does_not_set_it(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.show(end="1795468837")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "5")
    task.tell_time_limit(Start("7", 0))
    assert preemption.deadline() == 5
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    task.tell_time_limit(Start("7", 0))
    assert preemption.deadline() == 1795468837
    fake.show(end="Unknown")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    task.tell_time_limit(Start("7", 0))
    assert preemption.deadline() is None


# ---- what Slurm says


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


# ---- how it ended, and whether it starts again

STOPPED = {"time": 2.0, "rank": 0, "code": 75, "cause": "stopped by SIGTERM after step 9 with a checkpoint"}
INTERRUPTED = STOPPED | {"cause": "stopped by SIGINT after step 9 with a checkpoint"}
CRASHED = {"time": 3.0, "rank": 1, "code": 1, "cause": "ValueError: x"}
EARLIER = CRASHED | {"time": 1.0, "rank": 3}
MISTAKE = {"time": 4.0, "rank": 2, "code": 2, "cause": "a shard is damaged"}


def test_codes_are_those_of_the_core() -> None:
    assert requeue.STOPPED == preemption.EXIT_CODE
    assert {requeue.INTERRUPTED, requeue.USR2, requeue.TERM} == {128 + number for number in preemption.SIGNALS}


def test_the_batch_script_need_not_wait_for_torch() -> None:
    check = "import launchers.requeue, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "reports", "signals", "preempted", "end"),
    [
        (0, [], [], False, ("finished", 0, "finished")),
        (2, [], [], False, ("mistake", 2, "see the log")),
        (137, [STOPPED, CRASHED, MISTAKE], ["SIGTERM"], True, ("mistake", 2, "a shard is damaged")),
        (137, [CRASHED, STOPPED], [], False, ("stopped", 75, STOPPED["cause"])),
        (143, [INTERRUPTED], [], False, ("interrupted", 75, INTERRUPTED["cause"])),
        (137, [CRASHED, EARLIER], ["SIGTERM"], False, ("crash", 137, "rank 3: ValueError: x")),
        (137, [], ["SIGTERM"], False, ("stopped", 75, "stopped by SIGTERM, in a hurry")),
        (137, [], ["SIGINT", "SIGTERM"], False, ("interrupted", 75, "stopped by SIGINT and SIGTERM, in a hurry")),
        (75, [], [], False, ("stopped", 75, "stopped by a signal before it trained")),
        (140, [], [], False, ("stopped", 75, "stopped by SIGUSR2 before it trained")),
        (130, [], [], False, ("interrupted", 75, "stopped by SIGINT before it trained")),
        (143, [], [], True, ("stopped", 75, "stopped by SIGTERM before it trained")),
        (143, [], [], False, ("crash", 143, "a task was killed, exit code 143")),  # srun ends the others by TERM
        (137, [], [], False, ("crash", 137, "a task was killed, exit code 137")),
        (1, [], [], False, ("crash", 1, "exit code 1")),
    ],
)  # fmt: skip
def test_how_it_ended(code: int, reports: list, signals: list, preempted: bool, end: tuple[str, int, str]) -> None:
    assert how_it_ended(code, reports, signals, preempted) == End(*end)  # type: ignore[arg-type]


RUNNING = Job("7", "n", "RUNNING", restarts=4)
STOP, CRASH = End("stopped", 75, ""), End("crash", 137, "")


def crash(step: int, job: str = "7", kind: str = "crash") -> dict[str, Any]:
    return {"job": job, "kind": kind, "step": step}


@pytest.mark.parametrize(
    ("end", "job", "earlier", "again", "why"),
    [
        (End("finished", 0, ""), RUNNING, [], False, ""),
        (End("mistake", 2, ""), RUNNING, [], False, "another try would end the same"),
        (End("interrupted", 75, ""), RUNNING, [], False, "somebody asked it to stop"),
        (STOP, RUNNING, [], True, ""),
        (STOP, RUNNING, [crash(9)] * 30, True, ""),  # being preempted is no fault
        (STOP, None, [], False, "Slurm cannot be asked from here"),
        (STOP, replace(RUNNING, state="COMPLETING"), [], False, "Slurm is ending it: COMPLETING"),
        (STOP, replace(RUNNING, state="CANCELLED"), [], False, "Slurm is ending it: CANCELLED"),
        (STOP, replace(RUNNING, restarts=5), [], False, "Slurm has started it again by itself, restart 5"),  # an orphan
        (CRASH, RUNNING, [], True, ""),
        (CRASH, replace(RUNNING, state="CANCELLED"), [], False, "Slurm is ending it"),
        (CRASH, RUNNING, [crash(n) for n in range(5)], False, "it has crashed 6 times (--max-restarts 5)"),
        (CRASH, RUNNING, [crash(n, "6") for n in range(5)], True, ""),  # another job's
        (CRASH, RUNNING, [crash(3), crash(9), crash(9)], True, ""),
        (CRASH, RUNNING, [crash(9), crash(9), crash(9)], False, "3 restarts in a row committed nothing new"),
        (CRASH, RUNNING, [crash(9), crash(9, kind="stopped"), crash(9)], True, ""),
        (CRASH, RUNNING, [crash(9), crash(9), crash(9), crash(9, "6")], False, "3 restarts in a row"),
    ],
)
def test_decide(end: End, job: Job | None, earlier: list[dict[str, Any]], again: bool, why: str) -> None:
    verdict = decide(end, Start("7", 4), job, earlier, step=9, limit=5)
    assert verdict.requeue == again
    assert verdict.why.startswith(why)
    assert bool(verdict.why) == bool(why)


def test_after(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    start = Start.current()
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000012.1").mkdir()
    assert requeue.after(tmp_path, 0, limit=3) == 0
    assert not (tmp_path / "requeues.jsonl").exists()

    requeue.report(tmp_path, start, 0, 75, "stopped by SIGUSR2 after step 9 with a checkpoint")
    requeue.report(tmp_path, Start("7", 1), 1, 2, "a report of another start")
    assert requeue.after(tmp_path, 137, limit=3) == 75
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    (row,) = requeue.read_lines(tmp_path / "requeues.jsonl")
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {
        "job": "7", "restart": 0, "kind": "stopped", "code": 75, "step": 9, "requeue": True, "why": "",
        "cause": "stopped by SIGUSR2 after step 9 with a checkpoint",
    }  # fmt: skip
    assert len(list((tmp_path / "jobs" / "reports").iterdir())) == 1  # read once
    requeue.report(tmp_path / "not on this node", start, 0, 2, "x")
    assert not (tmp_path / "not on this node").exists()

    fake.show(state="CANCELLED")
    assert requeue.after(tmp_path, 143, limit=3) == 143
    assert requeue.read_lines(tmp_path / "requeues.jsonl")[1]["why"] == "Slurm is ending it: CANCELLED"
    assert len(fake.calls("scontrol requeue")) == 1

    (tmp_path / "job.json").write_text('{"job": "6"}')  # whose run directory it is; job 7 was refused
    assert requeue.after(tmp_path, 2, limit=3) == 2
    assert len(requeue.read_lines(tmp_path / "requeues.jsonl")) == 2


def test_a_run_that_left_in_a_hurry(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = [
        {"event": "start", "generation": 2}, {"event": "signal", "signal": "SIGINT"}, {"event": "hurried"},
        {"event": "start", "generation": 3}, {"event": "signal", "signal": "SIGTERM"},
    ]  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "owner.json").write_text(json.dumps({"generation": 3, "job": "7", "restart": 0}))
    write_lines(tmp_path / "events.jsonl", events)
    assert requeue.after(tmp_path, 137, limit=3) == 137  # signalled, but not for that
    write_lines(tmp_path / "events.jsonl", [*events, {"event": "hurried"}])
    assert requeue.after(tmp_path, 137, limit=3) == 75
    rows = requeue.read_lines(tmp_path / "requeues.jsonl")
    assert [row["kind"] for row in rows] == ["crash", "stopped"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- submit


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("2-0:0:5", 172805)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert slurm.seconds(limit) == expected


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(time="soon"), "--time soon: not a time"),
        (Request(time="3"), "--time 3 leaves nothing for training.* ask for 4 min or more"),
        (Request(time="5", signal_before=300), "--time 5 leaves nothing for training"),
        (Request(gpus_per_node=2, tasks_per_node=4), "--tasks-per-node 4: there is one task per GPU"),
        (Request(options=("nodes=3",)), "--sbatch nodes=3: say it by --nodes"),
        (Request(options=("cpus_per_task=3",)), "--sbatch cpus_per_task=3: say it by --cpus-per-task"),
        (Request(options=("array=1-3",)), "--sbatch array=1-3: scaleprog sets array itself"),
        (Request(options=("-N3",)), "--sbatch -N3: not of the form KEY=VALUE"),
        (Request(options=("comment=a\n#SBATCH --uid=0",)), "not of the form KEY=VALUE"),
        (Request(qos="a\nb"), "--qos: more than one line"),
        (Request(nodes=3), "4 lanes cannot be spread evenly over 3 ranks"),
        (Request(nodes=2, gpus_per_node=4), "4 lanes cannot be spread evenly over 8 ranks"),
    ],
)
def test_what_cannot_work_is_refused(
    request_: Request, message: str, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ScaleprogError, match=message):
        slurm.submit(make_recipe(), tmp_path / "run", request_)
    assert not (tmp_path / "run").exists()
    assert fake.calls("sbatch") == []


def test_the_cluster_is_asked(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    with pytest.raises(ScaleprogError, match="--partition hgih: there is none of this name; there are low, high"):
        slurm.submit(recipe, run, Request(partition="low,hgih"))
    with pytest.raises(DataError):
        slurm.submit(make_recipe(data={"path": str(tmp_path / "gone")}), run, Request())
    with pytest.raises(ScaleprogError, match="Slurm would replace the %"):
        slurm.submit(recipe, tmp_path / "50%", Request())
    fake.command("sbatch", "echo 'sbatch: error: invalid account or qos' >&2; exit 1")
    with pytest.raises(ScaleprogError, match="Slurm refuses the job: sbatch: error: invalid account or qos"):
        slurm.submit(recipe, run, Request(qos="mine"))
    assert not run.exists()


def test_no_slurm(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ScaleprogError, match="no Slurm on this machine: sbatch is not there"):
        slurm.submit(make_recipe(), tmp_path / "run", Request())
    assert "#SBATCH --nodes=2\n" in slurm.script(make_recipe(), tmp_path / "run", Request(nodes=2))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(ScaleprogError, match=r"submitit is not installed: pip install 'scaleprog\[slurm\]'"):
        slurm.script(make_recipe(), tmp_path / "run", Request())


def test_submit(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    file = slurm.submit(recipe, run, Request(nodes=2, time="10", partition="high"))
    assert (file.job, file.name) == ("7", "scaleprog-run")
    assert JobFile.read(run) == file
    assert Recipe.load(run / "recipe.yaml") == recipe
    assert (run / file.code / "launchers" / "task.py").read_text() == (ROOT / "launchers" / "task.py").read_text()
    assert list(run.glob("jobs/*/7_submitted.pkl"))
    assert not list(run.glob("jobs/*/*result*"))

    fake.show(state="PENDING")
    fake.command("scontrol", f"sed s/scaleprog-a.b/scaleprog-run/ {fake.folder}/shown")
    with pytest.raises(CheckpointError, match="belongs to job 7, which is PENDING; `scaleprog cancel"):
        slurm.submit(recipe, run, Request())
    fake.show(state="FAILED")
    with pytest.raises(CheckpointError, match=r"run directory of another recipe:\n  seed: 1 here, 0 there"):
        slurm.submit(make_recipe(seed=1), run, Request())
    assert Recipe.load(run / "recipe.yaml") == recipe
    assert slurm.submit(recipe, run, Request()).job == "7"


def test_script(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    request = Request(
        nodes=2, gpus_per_node=2, cpus_per_task=3, time="2:00:00", account="me", qos="long", signal_before=90,
        options=("mem=4G", "exclusive", "constraint=a&b"), max_restarts=5,
    )  # fmt: skip
    text = slurm.script(make_recipe(), tmp_path / "run", request)
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    log = options & {o for o in options if o.startswith("output=")}
    assert options - log == {
        "nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=3", "time=2:00:00", "account=me", "qos=long",
        "signal=USR2@90", "mem=4G", "exclusive", "constraint='a&b'", "requeue", "open-mode=append",
        "job-name=scaleprog-run",
    }  # fmt: skip
    (srun,) = (shlex.split(line) for line in text.splitlines() if line.startswith("srun"))
    assert {"--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=3"} <= set(srun)
    assert "time=" not in slurm.script(make_recipe(), tmp_path / "run", Request())  # the partition's own


def run_batch(arguments: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A batch script as job 7 would run it, in an environment of Slurm's."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "scaleprog", "SLURM_SUBMIT_DIR": str(cwd)}
    environment["SLURM_JOB_NUM_NODES"] = "2"
    environment["PYTHON"] = sys.executable
    return subprocess.run(
        ["bash", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_batch_script_requeues_from_its_snapshot(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a b'$(touch ruined);"
    file = slurm.submit(make_recipe(), run, Request())
    (script,) = run.glob("jobs/*/7_submission.sh")
    fake.command("srun", 'echo "$PYTHONPATH" > python-path; exit 137')
    done = run_batch([script], tmp_path)
    assert done.returncode == 137, done.stderr
    assert (tmp_path / "python-path").read_text().split(":")[0].strip() == str(run / file.code)
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    assert "a task was killed, exit code 137" in done.stderr
    assert not (tmp_path / "ruined").exists()
    fake.command("srun", "exit 0")
    assert run_batch([script], tmp_path).returncode == 0
    assert len(requeue.read_lines(run / "requeues.jsonl")) == 1


def test_train_sbatch(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    script, recipe, run = ROOT / "slurm" / "train.sbatch", tmp_path / "my recipe.yaml", tmp_path / "a run"
    recipe.write_text(make_recipe().dump())
    fake.command("srun", "exit 1")
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 2
    assert f"scaleprog: {run}: not there on every node" in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol"))
    seen = 'case $* in *bash*) exec "${@:3}" ;; esac'  # what is to be asked on every node, asked here
    fake.command("srun", f'{seen}; printf "%s\\n" "$PYTHONPATH" "$@" > "{tmp_path}/srun-arguments"; exit 1')
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 1, done.stderr
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    assert Recipe.load(run / "recipe.yaml").seed == 3
    file = JobFile.read(run)
    assert file is not None
    path, *arguments = (tmp_path / "srun-arguments").read_text().splitlines()
    assert path.split(":")[0] == str(run / file.code)
    assert arguments[-4:] == ["-u", "-m", "launchers.task", str(run)]
    assert {"--kill-on-bad-exit=1", "--wait=60"} <= set(arguments)

    recipe.write_text("seed: edited while the job was queued again")
    fake.command("srun", "exit 0")
    assert run_batch([script, recipe, "a run"], tmp_path).returncode == 0
    assert Recipe.load(run / "recipe.yaml").seed == 3

    calls = len(fake.calls("scontrol"))
    done = run_batch([script, recipe, "another run"], tmp_path)
    assert done.returncode == 2
    assert "scaleprog: " in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol")[calls:])
    assert not (tmp_path / "another run" / "recipe.yaml").exists()
    assert run_batch([script, recipe], tmp_path).stderr.startswith("usage: sbatch")


def test_a_snapshot_does_not_follow_the_working_tree(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, run = tmp_path / "tree", tmp_path / "run"
    for package in snapshot.PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(snapshot.launchers, "__file__", str(tree / "launchers" / "__init__.py"))
    before = snapshot.take(make_recipe(), run)
    assert snapshot.take(make_recipe(), run) == before == snapshot.code_folder(run)
    (tree / "scaleprog" / "__init__.py").write_text('__version__ = "edited"\n')
    after = snapshot.take(make_recipe(), run)
    versions = []
    for code in (before, after):
        environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        told = subprocess.run(
            [sys.executable, "-c", "import scaleprog; print(scaleprog.__file__, scaleprog.__version__)"],
            cwd=tree, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        file, version = told.stdout.split()
        assert Path(file).is_relative_to(code)
        versions.append(version)
    assert versions[0] != versions[1] == "edited"


# ---- status and cancel

OWNER = {
    "generation": 1,
    "nonce": "n",
    "job": None,
    "restart": 0,
    "host": socket.gethostname(),
    "pid": 0,
    "started": "",
}


def step_row(step: int, subnet: Subnet, seconds: float) -> dict[str, Any]:
    return {
        "step": step, "stage": 1, "phase": "train", "resolution": subnet.resolution, "depth": subnet.depth, "images": 8,
        "loss": 2.5 - step / 100, "step_seconds": seconds, "data_wait_seconds": 0.0,
    }  # fmt: skip


@pytest.fixture
def made_up(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A run directory that Prog has left after 30 of 80 steps, with a restart at step 20."""
    recipe, run = make_recipe(growth={"schedule": "linear", "stages": 2}), tmp_path / "run"
    plan = Plan.of(recipe, 1)
    small = plan.schedule.phases(())[0].network
    cost = gmacs(plan.family, recipe.model, small)
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.dump())
    rows: list[dict[str, Any]] = [step_row(step, small, seconds=0.5 * cost) for step in range(1, 31)]
    write_lines(run / "metrics.jsonl", [*rows[:20], {"step": 20, "top1": 40.0, "top1_ema": 41.5}, *rows[20:]])
    write_lines(
        run / "events.jsonl",
        [
            {"time": 1.0, "event": "start", "step": 0, "generation": 1},
            {"time": 2.0, "event": "error", "step": 25, "message": "OSError: gone\nmore"},
            {"time": 3.0, "event": "start", "step": 20, "generation": 2},
            {"time": 5.0, "event": "start", "step": 20, "generation": 3},
            {"time": 6.0, "event": "signal", "signal": "SIGTERM"},
            {"time": 9.0, "event": "start", "step": 20, "generation": 4},
        ],
    )
    write_lines(run / "requeues.jsonl", [{"time": 8.0, "job": "7", "cause": "a task was killed", "requeue": True}])
    return run


def test_status_of_a_run_directory(made_up: Path) -> None:
    found = status.status(made_up)
    assert (found.state, found.detail, found.job) == ("stopped", "never started", None)
    assert (found.step, found.steps, found.stage, found.phase, found.network) == (30, 80, 1, "train", "16 px, 2 layers")
    assert (found.loss, found.top1, found.top1_step) == (pytest.approx(2.2), 41.5, 20)
    assert (found.commit_step, found.commit_age) == (20, pytest.approx(0, abs=60))
    plan = Plan.of(Recipe.load(made_up / "recipe.yaml"), 1)
    small, large = (gmacs(plan.family, plan.recipe.model, p.network) for p in plan.schedule.phases(()))
    assert found.seconds_left == pytest.approx(0.5 * (10 * small + 40 * large))  # a later step takes longer
    assert found.images_per_second == pytest.approx(8 / (0.5 * small))
    told = [(restart.cause, restart.step) for restart in found.restarts]
    assert told == [("OSError: gone", 20), ("ended without notice", 20), ("a task was killed", 20)]
    text = found.text()
    for part in ("stopped (never started)", "30 of 80 (38%)", "41.50 % after step 20", "at step 20: a task was killed"):
        assert part in text


def test_status_of_little(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run directory"):
        status.status(tmp_path)
    recipe = make_recipe()
    snapshot.take(recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "not/here"})}), tmp_path)
    found = status.status(tmp_path)
    assert (found.step, found.steps, found.seconds_left, found.commit_age) == (0, None, None, None)
    assert "none yet" in found.text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')  # being written
    assert status.status(tmp_path).step == 0


def test_status_of_a_job(made_up: Path, fake: FakeSlurm) -> None:
    def standing(**fields: Any) -> tuple[str, str, str | None]:
        fake.show(**fields)
        return status.standing(made_up)

    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    assert standing(state="PENDING", reason="Resources") == ("pending", "job 7, on node[0-1], Resources", "7")
    assert standing() == ("running", "job 7, on node[0-1]", "7")
    assert standing(state="TIMEOUT") == ("stopped", "job 7: TIMEOUT", "7")
    write_lines(made_up / "requeues.jsonl", [{"time": 9.0, "job": "7", "cause": "a shard is gone", "requeue": False}])
    assert standing(state="FAILED") == ("stopped", "job 7: a shard is gone", "7")
    JobFile("7", "of another cluster", "code/x").write(made_up)
    (made_up / "requeues.jsonl").unlink()
    assert standing() == ("stopped", "never started", "7")
    fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert status.standing(made_up) == ("stopped", "job 7; Unable to contact slurm controller", "7")
    (made_up / "results.json").write_text("{}")
    assert status.standing(made_up)[0] == "finished"


def test_cancel_a_job(made_up: Path, fake: FakeSlurm) -> None:
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    assert status.cancel(made_up).startswith(
        "job 7, which was RUNNING, is cancelled; checkpoint of step 20, or a newer"
    )
    assert fake.calls("scancel") == ["scancel 7"]
    fake.show(state="CANCELLED")
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(made_up)


def test_cancel_a_process(made_up: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"pid": process.pid, "started": started}))
    assert status.standing(made_up) == ("running", f"process {process.pid} on {socket.gethostname()}", None)
    assert f"process {process.pid} is asked to stop" in status.cancel(made_up)
    assert process.wait(timeout=30) == -15
    assert status.standing(made_up)[0] == "stopped"
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(made_up)
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"host": "elsewhere"}))
    with pytest.raises(ScaleprogError, match="is trained on elsewhere"):
        status.cancel(made_up)
    assert read_owner(made_up) is not None


@pytest.mark.parametrize(
    ("ending", "code"), [({"state": "COMPLETED"}, 0), ({"state": "FAILED", "code": "2:0"}, 2),
                         ({"state": "CANCELLED", "code": "0:15"}, 143), ({"state": "TIMEOUT"}, 1)],
)  # fmt: skip
def test_follow(
    ending: dict[str, str], code: int, made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    states: list[dict[str, Any] | None] = [  # None: Slurm does not answer
        {"state": "PENDING", "reason": "Priority"},
        {},
        ending,
        None,
        {"restarts": 1},
        ending,
        ending,
    ]
    file = JobFile("7", "scaleprog-a b", "code/x")

    def advance(_: float) -> None:
        if not states:
            return
        if (fields := states.pop(0)) is not None:
            fake.show(**fields)
        else:
            fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")

    advance(0)
    monkeypatch.setattr(status.time, "sleep", advance)
    assert status.follow(made_up, file) == code
    told, wrong = capfd.readouterr()
    assert wrong == ("scaleprog: a task was killed\n" if code else "")
    for part in ("PENDING", "Priority", "RUNNING", "Unable to contact", "restart 1", "step 30, stage 1"):
        assert part in told
    assert states == []
