"""`scaleprog status`, `status --follow`, `cancel` and `submit --wait`: where a run stands."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.growth.space import Subnet
from scaleprog.launchers import following, several, snapshot, status
from scaleprog.launchers.snapshot import JobFile
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.folders import runs_at
from scaleprog.rundir.lease import read_owner
from scaleprog.rundir.planned import write_plan
from tests.conftest import MakeRecipe, write_lines
from tests.unit.command import Command, is_mistake
from tests.unit.fake_slurm import FakeSlurm

OWNER = {
    "generation": 1,
    "nonce": "n",
    "job": None,
    "restart": 0,
    "host": socket.gethostname(),
    "pid": 1,
    "started": "0",
}
TRAINS = (  # a process that trains in the folder it is given, as far as can be seen from outside
    "import os, sys, time; os.open(sys.argv[-1], os.O_RDONLY); print('open', flush=True); time.sleep(60)"
)


def step_row(step: int, subnet: Subnet, seconds: float) -> dict[str, Any]:
    return {
        "step": step, "stage": 1, "phase": "train", "resolution": subnet.resolution, "depth": subnet.depth, "images": 8,
        "loss": 2.5 - step / 100, "step_seconds": seconds, "data_wait_seconds": 0.0,
    }  # fmt: skip


@pytest.fixture
def made_up(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A run directory that Prog has left after 30 of 80 steps, with a restart at step 20."""
    recipe, run = make_recipe(growth={"schedule": "linear", "stages": 2}), tmp_path / "run"
    plan = Plan.of(recipe)
    small = plan.schedule.phases(())[0].network
    cost = plan.gmacs(small)
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.dump())
    write_plan(run, plan.schedule, plan.gmacs)
    rows: list[dict[str, Any]] = [step_row(step, small, seconds=0.5 * cost) for step in range(1, 31)]
    write_lines(run / "metrics.jsonl", [*rows[:20], {"step": 20, "top1": 40.0, "top1_ema": 41.5}, *rows[20:]])
    write_lines(
        run / "events.jsonl",
        [
            {"time": 1.0, "event": "start", "step": 0, "generation": 1},
            {"time": 2.0, "event": "error", "step": 25, "message": "OSError: gone\nmore", "generation": 1},
            {"time": 3.0, "event": "start", "step": 20, "generation": 2},
            {"time": 5.0, "event": "start", "step": 20, "generation": 3},
            {"time": 6.0, "event": "signal", "signal": "SIGTERM", "generation": 3},
            {"time": 9.0, "event": "start", "step": 20, "generation": 4},
        ],
    )
    write_lines(run / "requeues.jsonl", [{"time": 8.0, "job": "7", "cause": "a task was killed", "requeue": True}])
    return run


def test_a_straggler_is_named_until_it_ends_or_the_run_starts_again(made_up: Path) -> None:
    def tell(kind: str, *ranks: int, seconds: float = 0.5) -> dict[str, Any]:
        slow = [{"rank": rank, "host": f"node{rank}", "seconds": seconds, "data_seconds": 0.1} for rank in ranks]
        return {"time": 10.0, "event": kind, "step": 25, "generation": 4, "median_seconds": 0.25, "slow": slow}

    def events(*more: dict[str, Any]) -> list[str]:
        with (made_up / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in more)
        return status.status(made_up).slow

    assert events(tell("straggler", 1, 2)) == [
        f"rank {rank} on node{rank}, seen after step 25: 0.5 s a step, the median rank 0.25 s" for rank in (1, 2)
    ]
    assert "  slow       rank 1 on node1, seen" in status.status(made_up).text()
    (left,) = events(tell("straggler_over", 1))
    assert left.startswith("rank 2")
    assert len(events(tell("straggler", *range(3, 23)))) == 21
    assert status.status(made_up).text().count("seen after") == status.MOST_SLOW
    assert "  slow       13 more ranks" in status.status(made_up).text()
    assert len(events(tell("straggler_over", *range(3, 23)))) == 1
    assert events({"time": 11.0, "event": "start", "step": 25, "generation": 5}) == []
    assert "slow" not in status.status(made_up).text()
    slowest = events(tell("straggler", 1), tell("straggler", 2, seconds=0.75))[0]
    assert slowest.startswith("rank 2")


def test_waiting_that_overlaps_the_devices_work_counts_once(made_up: Path) -> None:
    """On a GPU, the recorded rate is that of both together."""
    rows = [
        json.loads(line) | {"step_seconds": 0.05, "data_wait_seconds": 0.03, "images": 8, "images_per_second": 160.0}
        for line in (made_up / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    write_lines(made_up / "metrics.jsonl", rows)
    assert status.status(made_up).images_per_second == pytest.approx(160)


def test_the_rate_is_the_recorded_one_also_where_another_rank_waits_for_data(made_up: Path) -> None:
    before = status.status(made_up)
    rows = [json.loads(line) for line in (made_up / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    rate = before.images_per_second / 4  # another rank waits for three times as long as a step takes
    write_lines(made_up / "metrics.jsonl", [row | {"images_per_second": rate} for row in rows])
    now = status.status(made_up)
    assert now.images_per_second == pytest.approx(rate)
    assert now.seconds_left == pytest.approx(4 * before.seconds_left)


def test_status_of_a_run_directory(made_up: Path) -> None:
    found = status.status(made_up)
    assert (found.state, found.detail, found.job) == ("stopped", "never started", None)
    assert (found.step, found.steps, found.stage, found.phase, found.network) == (30, 80, 1, "train", "16 px, 2 layers")
    assert (found.loss, found.top1, found.top1_step) == (pytest.approx(2.2), 41.5, 20)
    assert (found.commit_step, found.commit_age) == (20, pytest.approx(0, abs=60))
    plan = Plan.of(Recipe.load(made_up / "recipe.yaml"))
    small, large = (plan.gmacs(p.network) for p in plan.schedule.phases(()))
    assert found.seconds_left == pytest.approx(0.5 * (10 * small + 40 * large))  # a later step takes longer
    assert found.images_per_second == pytest.approx(8 / (0.5 * small))
    told = [(restart.cause, restart.step) for restart in found.restarts]
    assert told == [("OSError: gone", 20), ("ended without notice", 20), ("a task was killed", 20)]
    text = found.text()
    for part in ("stopped (never started)", "30 of 80 (38%)", "41.50 % after step 20", "at step 20: a task was killed"):
        assert part in text


@pytest.mark.parametrize(
    ("between", "ends", "cause"),
    [
        ([("error", 2, "OSError: gone"), ("error", 2, "RuntimeError: Connection closed")], [], "OSError: gone"),
        ([("error", 1, "Superseded: x")], [], "ended without notice"),  # an orphan's
        ([("signal", 2, "SIGTERM"), ("error", 1, "Superseded: x")], [], "SIGTERM"),
        ([("signal", 2, "SIGTERM"), ("error", 2, "OSError: gone")], [], "OSError: gone"),
        ([("preempted", 2, "SIGINT"), ("error", 2, "RuntimeError: Connection closed")], [], "SIGINT"),
        ([("error", 2, "RuntimeError: Connection closed")], ["a task was killed"], "a task was killed"),
        ([("stopped_early", 2, "")], [], "reached train.max_steps"),
        ([("finish", 2, "")], [], "finished, then made longer"),
    ],
)
def test_the_cause_of_a_restart(between: list[tuple[str, int, str]], ends: list[str], cause: str) -> None:
    said = {"error": "message", "signal": "signal", "preempted": "reason", "stopped_early": "", "finish": ""}
    events = [{"time": float(g), "event": "start", "generation": g, "step": 20} for g in (1, 2)]
    events += [{"time": 3.0 + i, "event": e, "generation": g, said[e]: t} for i, (e, g, t) in enumerate(between)]
    events.append({"time": 9.0, "event": "start", "generation": 3, "step": 20})
    rows = [{"time": 8.0, "cause": text} for text in ends]
    assert [restart.cause for restart in status.restarts(events, rows)] == ["ended without notice", cause]


def test_status_of_little(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
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
    with pytest.raises(ScaleprogError, match="does not name this run directory; nothing was canceled"):
        status.cancel(made_up)  # Slurm tells no command
    fake.show(command=f" Command=/home/me/train.sbatch a.yaml {made_up} WorkDir=/home/me StdErr=/dev/null")
    assert status.cancel(made_up).startswith("canceled job 7, which was RUNNING; checkpoint: step 20, or a newer")
    assert fake.calls("scancel") == ["scancel 7"]
    fake.show(state="CANCELLED")
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(made_up)


@pytest.mark.parametrize(
    ("command", "cancelled"),
    [
        ("{run}/jobs/20260101-000000/submission_file_1.sh", True),
        ("/home/me/train.sbatch my recipe.yaml {run} seed=1", True),
        ("/home/me/train.sbatch my recipe.yaml a run/ seed=1", True),
        ("/home/me/train.sbatch recipe.yaml ./x/../a run", True),
        ("/home/me/train.sbatch recipe.yaml another run", False),
        ("/home/me/train.sbatch recipe.yaml {run}/other", False),
        ("{run}-2/jobs/20260101-000000/submission_file_1.sh", False),
        ("/home/me/simulate.sh", False),
        ("(null)", False),
    ],
)
def test_cancel_leaves_a_job_alone_that_does_not_train_there(
    command: str, cancelled: bool, made_up: Path, fake: FakeSlurm
) -> None:
    run = made_up.rename(made_up.with_name("a run"))
    JobFile("7", "scaleprog-a b", "code/x").write(run)
    fake.show(command=f" Command={command.format(run=run)} WorkDir={run.parent} StdErr={run.parent}/7.out")
    if cancelled:
        assert status.cancel(run).startswith("canceled job 7, which was RUNNING")
    else:
        with pytest.raises(
            ScaleprogError, match=r"names job 7, but Slurm's record .*; nothing was canceled; .*`scancel 7`"
        ):
            status.cancel(run)
    assert fake.calls("scancel") == ["scancel 7"] * cancelled


def owned_by_process(run: Path, pid: int, **changes: Any) -> None:
    """Makes a process, and no other of its number, the owner of a run directory."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    (run / "owner.json").write_text(json.dumps(OWNER | {"pid": pid, "started": started, **changes}))


@contextmanager
def process_called(*command: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that says when it is ready."""
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_runs_are_in_the_order_of_the_numbers_in_their_names(tmp_path: Path) -> None:
    names = ["2r", "lr5", "lr5²", "lr10", "r"]  # to Python, ² is a digit
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
    assert [run.name for run in runs_at(tmp_path)] == names


def test_cancel_of_what_is_no_run_is_a_mistake(command: Command, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert is_mistake(command("cancel", path), f"{path}: not a run directory")


def test_cancel_several_says_so_if_slurm_is_silent(made_up: Path, fake: FakeSlurm) -> None:
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ScaleprogError, match=f"^{made_up.name}: Unable to contact slurm controller$"):
        several.cancel_all([made_up])


def test_cancel_a_run_of_an_array_from_within(made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    JobFile("7_0", "scaleprog-a b", "code/x").write(made_up)
    script = made_up.parent / "jobs/1/submission.sh"
    fake.show(command=f" ArrayJobId=7 ArrayTaskId=0 Command={script} WorkDir=/home/me StdErr=/dev/null")
    monkeypatch.chdir(made_up)
    assert status.cancel(Path(".")).startswith("canceled job ")


def test_cancel_a_process(made_up: Path) -> None:
    with process_called(sys.executable, "-c", TRAINS, "scaleprog", "train", made_up) as process:
        owned_by_process(made_up, process.pid)
        assert status.standing(made_up) == ("running", f"process {process.pid} on {socket.gethostname()}", None)
        assert f"asked process {process.pid} to save a checkpoint and stop" in status.cancel(made_up)
        assert process.wait(timeout=30) == -15
    assert status.standing(made_up)[0] == "stopped"
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(made_up)
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"host": "elsewhere"}))
    with pytest.raises(ScaleprogError, match="is being trained on elsewhere"):
        status.cancel(made_up)
    assert read_owner(made_up) is not None


@pytest.mark.parametrize("job", [{}, {"job": "7", "step": "0"}, {"job": "7", "step": "batch"}])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETED"])
def test_status_and_cancel_agree_about_a_process_inside_an_allocation(
    job: dict[str, str], state: str, made_up: Path, fake: FakeSlurm
) -> None:
    """Its process decides, not its job: the job runs while the shell of salloc is open."""
    fake.show(state=state, batch=0)
    with process_called(sys.executable, "-c", TRAINS, "scaleprog", "train", made_up) as process:
        owned_by_process(made_up, process.pid, **job)
        running = ("running", f"process {process.pid} on {socket.gethostname()}", job.get("job"))
        assert status.standing(made_up) == running
        assert f"asked process {process.pid} to save a checkpoint" in status.cancel(made_up)
        assert process.wait(timeout=30) == -15
    assert status.standing(made_up)[0] == "stopped"
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(made_up)
    assert fake.calls("scancel") == []


def test_cancel_names_the_job_whose_process_is_not_here(made_up: Path, fake: FakeSlurm) -> None:
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"job": "7", "host": "node0"}))
    with pytest.raises(
        ScaleprogError, match="being trained on node0 by job 7; run `scaleprog cancel` there, or `scanc"
    ):
        status.cancel(made_up)
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"job": "7"}))  # gone, but its batch job may start it again
    with pytest.raises(ScaleprogError, match=r"by job 7; .*`scancel 7`"):
        status.cancel(made_up)
    assert fake.calls("scancel") == []


@pytest.mark.parametrize(
    ("command", "doubt"),
    [
        (("sh", "-c", "echo; exec sleep 60"), "whose command line is not scaleprog's"),
        ((sys.executable, "-c", TRAINS, "train", "RUN"), "whose command line is not scaleprog's"),
        ((sys.executable, "-c", TRAINS, "my-scaleprog", "RUN"), "whose command line is not scaleprog's"),
        ((sys.executable, "-c", TRAINS, "scaleprog", "train", "OTHER"), "does not have this run directory open"),
        ((sys.executable, "-c", TRAINS, "--multiprocessing-fork", "OTHER"), "does not have this run directory open"),
    ],
)
def test_cancel_leaves_a_process_alone_that_does_not_train_there(
    command: tuple[str, ...], doubt: str, made_up: Path, tmp_path: Path
) -> None:
    folders = {"RUN": str(made_up), "OTHER": str(tmp_path)}
    with process_called(*(folders.get(word, word) for word in command)) as process:
        owned_by_process(made_up, process.pid)
        with pytest.raises(
            ScaleprogError, match=rf"owner\.json names process {process.pid}, .*{doubt}; nothing was signaled"
        ):
            status.cancel(made_up)
        assert process.poll() is None
        for started in ("1", None):  # that process ended, and its number is another's now
            owned_by_process(made_up, process.pid, started=started)
            with pytest.raises(ScaleprogError, match="nothing to cancel"):
                status.cancel(made_up)
        time.sleep(0.1)
        assert process.poll() is None


@pytest.mark.parametrize("pid", [-1, 0, 1, -(2**31), 2**22, 2**64, True, "1", None, [1], 1.0])
def test_cancel_signals_no_number_that_a_run_directory_makes_up(
    pid: Any, made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: object) -> None:
        raise AssertionError("a process was signalled")

    monkeypatch.setattr("os.kill", signalled)
    monkeypatch.setattr("signal.pidfd_send_signal", signalled)
    (made_up / "owner.json").write_text(json.dumps(OWNER | {"pid": pid}))
    with pytest.raises(ScaleprogError, match=r"nothing to cancel|not readable"):
        status.cancel(made_up)


def test_a_process_of_another_user_is_left_alone(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process_called(sys.executable, "-c", TRAINS, "scaleprog", "train", made_up) as process:
        owned_by_process(made_up, process.pid)
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ScaleprogError, match="which belongs to another user; nothing was signaled"):
            status.cancel(made_up)
        assert process.poll() is None


@pytest.mark.parametrize("job", ["-1", "--help", "7 8", "$(touch x)", "", "7\n8", 7, None, [7]])
def test_slurm_is_asked_about_numbers_of_jobs_only(job: Any, fake: FakeSlurm) -> None:
    for ask in (slurm_queue.find, slurm_queue.cancel, slurm_queue.requeue):
        with pytest.raises(slurm_queue.NoAnswer, match="is not the number of a Slurm job"):
            ask(job)
    assert fake.calls("scontrol") == fake.calls("scancel") == []


def watched(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Any] | None]) -> None:
    """Slurm goes from state to state (None: it does not answer) whenever `follow` waits."""

    def advance(_: float) -> None:
        if not states:
            return
        if (fields := states.pop(0)) is not None:
            fake.show(**fields)
        else:
            fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")

    advance(0)
    # not time.sleep itself: subprocess waits by it, too
    monkeypatch.setattr(following, "time", SimpleNamespace(**vars(time) | {"sleep": advance}))


@pytest.mark.parametrize(
    ("ending", "code"), [({"state": "COMPLETED"}, 0), ({"state": "FAILED", "code": "2:0"}, 2),
                         ({"state": "CANCELLED", "code": "0:15"}, 143), ({"state": "TIMEOUT"}, 1)],
)  # fmt: skip
def test_follow(
    ending: dict[str, str], code: int, made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    waiting = {"state": "PENDING", "reason": "Priority"}
    states: list[dict[str, Any] | None] = [waiting, waiting, {}, ending, None, {"restarts": 1}, ending, ending]
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    watched(fake, monkeypatch, states)
    assert following.follow(made_up) == code
    told, wrong = capfd.readouterr()
    assert wrong == ("scaleprog: a task was killed\n" if code else "")
    for part in ("PENDING", "Priority", "RUNNING", "Unable to contact", "restart 1", "step 30, stage 1"):
        assert part in told
    assert told.count("PENDING") == 1, "a line only where something changes"
    assert states == []


def test_follow_in_place_shows_the_whole_status(
    made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    watched(fake, monkeypatch, [{}, {"state": "COMPLETED"}, {"state": "COMPLETED"}])
    out = StringIO()
    assert following.follow(made_up, in_place=True, out=out) == 0
    assert "state      stopped (job 7: COMPLETED)" in out.getvalue()
    assert "top-1      41.50 % after step 20" in out.getvalue()


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        ({"event": "preempted", "reason": "SIGTERM"}, 75, "stopped: SIGTERM"),
        ({"event": "error", "message": "DataError: a shard is gone\nmore"}, 1, "DataError: a shard is gone"),
    ],
)
def test_follow_a_process(
    last: dict[str, str], code: int, message: str, made_up: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with process_called(sys.executable, "-c", TRAINS, "scaleprog", "train", made_up) as process:
        owned_by_process(made_up, process.pid)

        def end(_: float) -> None:
            with (made_up / "events.jsonl").open("a") as file:
                file.write(json.dumps({"time": 10.0, "generation": 4, **last}) + "\n")
            process.kill()
            process.wait()

        monkeypatch.setattr(following, "time", SimpleNamespace(**vars(time) | {"sleep": end}))
        assert following.follow(made_up) == code
    told, wrong = capfd.readouterr()
    assert f"running, process {process.pid}" in told
    assert wrong == f"scaleprog: {message}\n"


def test_follow_waits_while_the_launcher_may_start_the_ranks_again(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with process_called(sys.executable, "-c", TRAINS, made_up) as launcher:
        started = Path(f"/proc/{launcher.pid}/stat").read_text().rpartition(")")[2].split()[19]
        owner = OWNER | {"launcher": launcher.pid, "launcher_started": started}
        (made_up / "owner.json").write_text(json.dumps(owner))
        with (made_up / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 10.0, "generation": 4, "event": "error", "message": "OSError: gone"}) + "\n")
        told = f"its ranks have ended; their launcher, process {launcher.pid}, still runs"
        assert status.standing(made_up) == ("running", told, None)
        with pytest.raises(ScaleprogError, match="its ranks have ended, but not their launcher; retry"):
            status.cancel(made_up)
        (made_up / "results.json").write_text("{}")
        assert following.look(made_up) == following.Look("finished", over=True)
        (made_up / "results.json").unlink()
        looks: list[int] = []

        def end(_: float) -> None:
            looks.append(1)
            if len(looks) == 5:
                launcher.kill()
                launcher.wait()

        monkeypatch.setattr(following, "time", SimpleNamespace(**vars(time) | {"sleep": end}))
        assert following.follow(made_up) == 1
    assert len(looks) == 6
    assert told in capfd.readouterr().out
    assert status.standing(made_up)[0] == "stopped"
    (made_up / "owner.json").write_text(json.dumps(owner | {"launcher_started": None}))
    assert status.standing(made_up)[0] == "stopped", "any process may have that number now"


@pytest.mark.parametrize(("last", "code"), [({"code": 75}, 75), ({"code": 75, "requeue": True}, 1), ({}, 1)])
def test_follow_a_job_that_slurm_has_forgotten(
    last: dict[str, Any], code: int, made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    write_lines(made_up / "requeues.jsonl", [{"time": 9.0, "job": "7", "cause": "stopped by SIGTERM", **last}])
    fake.command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    monkeypatch.setattr(following, "POLL_SECONDS", 0.0)
    assert following.follow(made_up, out=StringIO()) == code


def test_follow_ends_at_once_where_the_run_has_finished(
    command: Command, made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made_up / "results.json").write_text("{}")
    JobFile("7", "scaleprog-a b", "code/x").write(made_up)
    monkeypatch.setattr(following, "time", SimpleNamespace(**vars(time) | {"sleep": None}))
    fake.command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert command("status", made_up, "--follow").code == 0
    (made_up / "results.json").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert is_mistake(command("status", made_up, "--follow"), "no Slurm on", "scontrol not found")
    assert is_mistake(command("status", made_up, "--follow", "--json"), "leave out --json")


def test_follow_says_nothing_of_steps_that_were_cut_off(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "TELL_SECONDS", -1.0)
    out = StringIO()
    with following._lines(made_up, out) as show:
        show(following.Look("running", over=False))
        write_lines(made_up / "metrics.jsonl", [])
        show(following.Look("running", over=False))
    assert "step 30" in out.getvalue()
    assert "None" not in out.getvalue()


def test_ctrl_c_ends_following_and_not_the_run(
    command: Command, made_up: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    run = made_up.rename(made_up.with_name("a run"))
    JobFile("7", "scaleprog-a b", "code/x").write(run)
    monkeypatch.setattr(following, "time", SimpleNamespace(**vars(time) | {"sleep": interrupted}))
    told = command("status", run, "--follow")
    assert (told.code, fake.calls("scancel")) == (130, [])
    assert f"{run} continues; to follow it again: scaleprog status '{run}' --follow; to end it: scaleprog" in told.err


def test_a_job_that_failed_without_a_log_may_have_had_nowhere_to_write_it(made_up: Path, fake: FakeSlurm) -> None:
    fake.show(state="FAILED")
    JobFile("7", "scaleprog-a b", "code/x", "jobs/1/7.out", "login1", 1795468537.0).write(made_up)
    detail = status.standing(made_up)[1]
    assert f"FAILED without a log: node[0-1] may not have {made_up}; it was seen on login1 when" in detail
    (made_up / "jobs" / "1").mkdir(parents=True)
    (made_up / "jobs" / "1" / "7.out").touch()
    assert status.standing(made_up)[1] == "job 7: FAILED"


def test_status_imports_what_a_login_node_can_bear() -> None:
    """numpy starts a thread per core."""
    check = "import scaleprog.launchers.following, sys; print({'torch', 'numpy'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
