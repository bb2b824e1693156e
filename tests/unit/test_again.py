"""A job whose tasks crash starts them again itself, where that is enough."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import ScaleprogError
from scaleprog.launchers import slurm
from scaleprog.launchers.again import may_stay
from scaleprog.launchers.attempt import Attempt
from scaleprog.launchers.exits import UNHEARD
from scaleprog.launchers.request import JobRequest
from scaleprog.launchers.requeue import End
from scaleprog.launchers.task import port
from scaleprog.launchers.world import Count
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.slurm_queue import Job, NoAnswer, lost
from tests.conftest import MakeRecipe
from tests.unit.command import Command, is_mistake
from tests.unit.fake_slurm import FakeSlurm

CRASH = End("crash", 1, "rank 1: it")
BY, TWO = ("submit", "sbatch"), Count(2, 2)
ROOT = Path(__file__).parents[2]


def job(**changes: Any) -> Job:
    return Job(**{"id": "7", "name": "a", "state": "RUNNING", "nodes": "node[0-1]", **changes})


def line(**changes: Any) -> dict[str, Any]:
    return {"job": "7", "restart": 0, "kind": "crash", "step": 9, "measured": 0, "here": True, **changes}


@pytest.mark.parametrize(
    ("end", "job", "repeat", "earlier", "expected"),
    [
        (CRASH, job(), 0, [], True),
        (End("stopped", 75, "SIGUSR2"), job(), 0, [], False),
        (CRASH, job(preempted=True), 0, [], False),
        (End("crash", UNHEARD, "no rank stands apart"), job(), 0, [], False),
        (CRASH, job(end=time.time() + 10_000), 0, [], True),
        (CRASH, job(end=time.time() + 100), 0, [], False),
        (CRASH, job(), 1, [line()], False),
        (CRASH, job(), 1, [line(step=8)], True),
        (CRASH, job(), 1, [line(step=8, restart=3)], False),
        (CRASH, job(), 2, [line(step=8)], False),  # the line of the last start could not be written
        (CRASH, job(), 1, [], False),
        (CRASH, job(), 0, [line(), line(here=False, requeue=True)], True),
        (CRASH, job(), 0, [line(job="6")], True),
    ],
)
def test_may_stay(end: End, job: Job, repeat: int, earlier: list[dict[str, Any]], expected: bool) -> None:
    assert may_stay(end, Attempt("7", 0, repeat), job, earlier, progress=(9, 0), notice=120) == expected


def test_lost_nodes_are_no_reason_to_leave_those_that_replace_them() -> None:
    for ended, replaced, expected in (
        (CRASH, True, True),
        (CRASH, False, False),
        (End("stopped", 75, "x"), True, False),
    ):
        assert may_stay(ended, Attempt("7", 0, 1), job(), [line()], (9, 0), 120, replaced) == expected


def test_a_start_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [Attempt("7", restart, repeat) for restart in range(3) for repeat in range(3)]
    assert len({str(start) for start in starts}) == len({port(start) for start in starts}) == len(starts)
    assert str(starts[0]) == "7-0", "as earlier versions called it"
    assert Attempt.current({"SLURM_JOB_ID": "7", "SCALEPROG_REPEAT": "2"}) == Attempt("7", 0, 2)


def test_lost_nodes(fake: FakeSlurm) -> None:
    fake.command("sinfo", "echo 'a mixed\na mixed\nb down*\nc allocated*\nd draining\ne failing\nf drained'")
    assert lost(["a", "b", "c", "d", "e", "f", "g"]) == ["b", "c", "e", "f", "g"]
    fake.command("sinfo", "exit 0")
    with pytest.raises(NoAnswer, match="sinfo: shows none of the job's nodes"):
        lost(["a"])


Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=BY)
def start(request: pytest.FixtureRequest, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> Start:
    """Runs the batch script of a job of two nodes that trains in `run`."""
    recipe, run = make_recipe(), tmp_path / "run"
    fake.command("sinfo", "echo low; " + "; ".join(f"echo 'node{number} allocated'" for number in range(4)))

    def start(
        in_job: bool = True, nodes: Count = TWO, spare: int = 0, **further: str
    ) -> subprocess.CompletedProcess[str]:
        there = nodes.most + spare
        variables = {
            "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "scaleprog", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHONPATH": str(ROOT),
            "SLURM_JOB_NUM_NODES": str(there), "SLURM_JOB_NODELIST": f"node[0-{there - 1}]", "PYTHON": sys.executable,
            "SLURMD_NODENAME": "node0", **further,
        }  # fmt: skip
        if request.param == "submit":
            slurm.submit(recipe, run, JobRequest(nodes=nodes, spare_nodes=spare, in_job=in_job))
            (script,) = run.glob("jobs/*/7_submission.sh")
            command: list[str | Path] = ["bash", script]
        else:
            (tmp_path / "recipe.yaml").write_text(recipe.dump())
            command = ["bash", ROOT / "slurm" / "train.sbatch", tmp_path / "recipe.yaml", run]
            variables |= {} if in_job else {"RESTART": "requeue"}
            variables |= {} if nodes.fixed else {"MIN_NODES": str(nodes.least)}
            variables |= {"SPARE_NODES": str(spare)} if spare else {}
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)

    return start


def crash(fake: FakeSlurm, times: int, then: str = "") -> None:
    """The tasks crash so many times, and `then` something happens; after that they finish."""
    asked = f"{fake.folder}/started"
    fake.command(
        "srun",
        f"[[ $* = *launchers.task* || $* = *submitit* ]] || exit 0\n"
        f'echo "$SCALEPROG_REPEAT" >> {asked}\n'
        f'echo "$SLURM_JOB_NUM_NODES $SLURM_NTASKS $*" | grep -o "^[^-]*\\|--exclude=[^ ]*" >> {asked}-where\n'
        f"[ $(wc -l < {asked}) -gt {times} ] || {{ {then or ':'}; exit 1; }}",
    )


def started(fake: FakeSlurm) -> list[str]:
    """The number of each start of the tasks."""
    return (fake.folder / "started").read_text().split()


@pytest.mark.process
def test_tasks_that_crash_start_again_inside_the_job(fake: FakeSlurm, start: Start, tmp_path: Path) -> None:
    crash(fake, 1)
    done = start()
    assert done.returncode == 0, done.stderr
    assert started(fake) == ["0", "1"]
    assert "exit code 1\nscaleprog: job 7 starts its tasks again\n" in done.stderr
    (row,) = read_rows(tmp_path / "run" / "requeues.jsonl")
    assert (row["kind"], row["requeue"], row["here"], row.get("repeat")) == ("crash", False, True, None)
    assert fake.calls("scontrol requeue") == []


def where(fake: FakeSlurm) -> list[str]:
    """On how many nodes, and with how many ranks, the tasks started each time, and the nodes that srun left out."""
    return [line.strip() for line in (fake.folder / "started-where").read_text().splitlines()]


@pytest.mark.process
def test_spare_nodes_take_the_place_of_two_lost_ones(fake: FakeSlurm, start: Start, tmp_path: Path) -> None:
    """Slurm has taken the first one from the job, and does not reach the second one; the ranks have committed nothing
    in the meantime."""
    fake.show(nodes="node[0-3]")
    shown, sinfo = fake.folder / "shown", fake.folder / "sinfo"
    first = f"sed -i 's/NodeList=node.0-3./NodeList=node[0,2-3]/' {shown}"
    second = f"echo 'echo \"node2 down*\"' >> {sinfo}"
    crash(fake, 2, f"if [ $SCALEPROG_REPEAT = 0 ]; then {first}; else {second}; fi")
    done = start(spare=2)
    assert done.returncode == 0, done.stderr
    assert started(fake) == ["0", "1", "2"]
    assert where(fake) == ["2 2", "2 2", "--exclude=node1", "2 2", "--exclude=node1,node2"]
    assert "2 of 4 nodes train, idle: node2, node3; spare\n" in done.stderr
    assert "2 of 3 nodes train, idle: node3; spare\n" in done.stderr
    assert "job 7 starts its tasks again, without node1\n" in done.stderr
    assert "job 7 starts its tasks again, without node1, node2\n" in done.stderr
    assert fake.calls("scontrol requeue") == []
    rows = read_rows(tmp_path / "run" / "requeues.jsonl")
    assert [(row["requeue"], row["here"], row.get("repeat", 0)) for row in rows] == [(False, True, 0), (False, True, 1)]


@pytest.mark.process
@pytest.mark.parametrize(
    ("left", "why"),
    [
        ("node0", "the job has lost node1, node2, and needs 2 nodes"),
        ("node[1-2]", "Slurm has given up node0, the node of the batch script"),
    ],
)
def test_a_job_without_enough_nodes_or_without_its_first_is_requeued(
    fake: FakeSlurm, start: Start, left: str, why: str
) -> None:
    fake.show(nodes="node[0-2]")
    crash(fake, 1, f"sed -i 's/NodeList=node.0-2./NodeList={left}/' {fake.folder}/shown")
    done = start(spare=1)
    assert done.returncode == 1
    assert f"do not start again inside the job: {why}" in done.stderr
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.process
def test_a_range_with_a_spare_node_continues_with_fewer(fake: FakeSlurm, start: Start) -> None:
    fake.show(nodes="node[0-2]")
    crash(fake, 1, f"sed -i 's/NodeList=node.0-2./NodeList=node0/' {fake.folder}/shown")
    done = start(nodes=Count(1, 2), spare=1)
    assert done.returncode == 0, done.stderr
    assert where(fake) == ["2 2", "1 1", "--exclude=node1,node2"]


@pytest.mark.process
def test_train_sbatch_refuses_spare_nodes_that_cannot_help(fake: FakeSlurm, tmp_path: Path) -> None:
    for nodes, variables, message in (
        ("3", {"SPARE_NODES": "-1"}, "SPARE_NODES=-1: is not a number of nodes"),
        ("3", {"SPARE_NODES": "1", "RESTART": "requeue"}, "SPARE_NODES=1: RESTART=requeue cannot use them"),
        ("3", {"SPARE_NODES": "2"}, "SPARE_NODES=2: of 3 nodes, at least 2 must be left to train"),
    ):
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": nodes, "PYTHON": "false"}
        command = ["bash", ROOT / "slurm" / "train.sbatch", tmp_path / "recipe.yaml", tmp_path / "run"]
        done = subprocess.run(command, env=os.environ | job | variables, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"scaleprog: {message}\n")


def test_what_submit_asks_for_spare_nodes(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for nodes, spare, asked in ((TWO, 0, "2"), (TWO, 1, "3"), (Count(1, 2), 0, "1-2"), (Count(1, 2), 2, "3-4")):
        text = slurm.script(make_recipe(), tmp_path / "run", JobRequest(nodes=nodes, spare_nodes=spare))
        assert f"#SBATCH --nodes={asked}\n" in text
        assert ("#SBATCH --no-kill\n" in text) == ("scaleprog.launchers.watch" in text) == (spare > 0)
    fake.command("sinfo", 'case "$*" in *%D*) echo "4 low*"; echo "9 high";; *) echo low; echo high;; esac')
    with pytest.raises(ScaleprogError, match=r"--nodes 2 --spare-nodes 3: the job needs 5 nodes, .* partition has 4"):
        slurm.submit(make_recipe(), tmp_path / "run", JobRequest(nodes=TWO, spare_nodes=3))


def test_spare_nodes_that_cannot_help_are_refused(command: Command) -> None:
    for words, message in (
        (("--spare-nodes", "1", "--nodes", "2", "--restart", "requeue"), "--spare-nodes 1: only a job that starts its"),
        (("--spare-nodes", "1"), "--spare-nodes 1: with --nodes 1, all ranks are on the node of the batch script"),
        (("--sbatch", "no-kill", "--nodes", "2"), "--sbatch no-kill: use --spare-nodes instead"),
    ):
        assert is_mistake(command("submit", "x.yaml", *words), message)


@pytest.mark.process
def test_tasks_start_again_inside_the_job_whenever_they_have_committed_in_between(
    fake: FakeSlurm, start: Start, tmp_path: Path
) -> None:
    crash(fake, 3, f'echo "{{\\"done\\": 1$SCALEPROG_REPEAT}}" > {tmp_path}/run/measuring.json')
    done = start()
    assert done.returncode == 0, done.stderr
    assert started(fake) == ["0", "1", "2", "3"]
    assert fake.calls("scontrol requeue") == []


@pytest.mark.process
def test_after_two_crashes_without_a_checkpoint_the_job_is_requeued(
    fake: FakeSlurm, start: Start, tmp_path: Path
) -> None:
    crash(fake, 2)
    done = start()
    assert done.returncode == 1
    assert started(fake) == ["0", "1"]
    rows = read_rows(tmp_path / "run" / "requeues.jsonl")
    assert [(row["requeue"], row.get("here")) for row in rows] == [(False, True), (True, None)]
    assert rows[1]["repeat"] == 1
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.process
def test_a_job_that_has_lost_a_node_is_requeued(fake: FakeSlurm, start: Start) -> None:
    crash(fake, 1, "sed -i 's/node1 allocated/node1 down*/' $(dirname $0)/sinfo")
    done = start()
    assert done.returncode == 1
    assert "do not start again inside the job: Slurm does not reach node1" in done.stderr
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.process
def test_whoever_wants_it_is_requeued_at_once(fake: FakeSlurm, start: Start, command: Command) -> None:
    crash(fake, 1)
    assert start(in_job=False).returncode == 1
    assert started(fake) == ["0"]
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert is_mistake(command("submit", "x.yaml", "--restart", "never"), "--restart: 'never' is neither in-job nor")


@pytest.mark.process
def test_a_job_whose_run_directory_is_anothers_is_left_to_slurm(fake: FakeSlurm, start: Start, tmp_path: Path) -> None:
    crash(fake, 1, f'sed -i \'s/"job": "7"/"job": "6"/\' {tmp_path}/run/job.json')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/job.json").write_text('{"job": "6", "name": "a", "code": "code/1"}')
    assert start().returncode != 0
    assert started(fake) == ["0"]


@pytest.mark.process
def test_a_stop_is_left_to_slurm(fake: FakeSlurm, start: Start) -> None:
    crash(fake, 1, "exit 75")
    done = start()
    assert done.returncode == 75
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"]
