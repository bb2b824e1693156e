"""How a start of a Slurm job ended, and whether the job starts again."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaleprog.launchers import requeue
from scaleprog.launchers.attempt import Attempt, report
from scaleprog.launchers.requeue import End, decide, how_it_ended
from scaleprog.ranks.stop import SIGNALS
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.slurm_queue import Job
from tests.conftest import write_lines
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
STOPPED = {"time": 2.0, "rank": 0, "code": 75, "cause": "stopped after step 9", "reason": "SIGTERM"}
INTERRUPTED = STOPPED | {"reason": "SIGINT"}
CRASHED = {"time": 3.0, "rank": 1, "code": 1, "cause": "ValueError: x"}
EARLIER = CRASHED | {"time": 1.0, "rank": 3}
MISTAKE = {"time": 4.0, "rank": 2, "code": 2, "cause": "a shard is damaged"}


def test_codes_are_those_of_the_signals_that_the_core_hears() -> None:
    assert {requeue.INTERRUPTED, requeue.USR2, requeue.TERM} == {128 + number for number in SIGNALS}


def test_a_trial_of_the_disk_writes_through_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".requeues.jsonl.7-3").symlink_to(victim)
    assert requeue.unrecorded(tmp_path / "run", Attempt("7", 3), []) == 0
    assert victim.read_text() == "precious"
    assert not list((tmp_path / "run").iterdir())


def test_the_batch_script_need_not_wait_for_torch() -> None:
    check = "import scaleprog.launchers.requeue, scaleprog.launchers.snapshot, sys; sys.exit('torch' in sys.modules)"
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
        (137, [], ["SIGTERM"], False, ("stopped", 75, "stopped at once by SIGTERM")),
        (137, [], ["SIGINT", "SIGTERM"], False, ("interrupted", 75, "stopped at once by SIGINT and SIGTERM")),
        (75, [], [], False, ("stopped", 75, "stopped by a signal before training began")),
        (140, [], [], False, ("stopped", 75, "stopped by SIGUSR2 before training began")),
        (130, [], [], False, ("interrupted", 75, "stopped by SIGINT before training began")),
        (143, [], [], True, ("stopped", 75, "stopped by SIGTERM before training began")),
        (143, [], [], False, ("crash", 143, "a task was killed, exit code 143")),  # srun ends the others by TERM
        (137, [], [], False, ("crash", 137, "a task was killed, exit code 137")),
        (1, [], [], False, ("crash", 1, "exit code 1")),
    ],
)  # fmt: skip
def test_how_it_ended(code: int, reports: list, signals: list, preempted: bool, end: tuple[str, int, str]) -> None:
    assert how_it_ended(code, reports, signals, preempted) == End(*end)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cause", "left", "changes", "expected"),
    [
        ("stopped by SIGUSR2 after step 3", 100, {}, "reached its time limit after step 3"),
        ("stopped by SIGUSR2 before training began", 149, {}, "reached its time limit before training began"),
        ("stopped at once by SIGUSR2", 9, {}, "reached its time limit: stopped at once by SIGUSR2"),
        ("stopped by SIGUSR2 after step 3", 151, {}, None),  # too early: a user's, or a preemption's
        ("stopped by SIGUSR2 after step 3", 100, {"preempted": True}, None),
        ("stopped by SIGUSR2 after step 3", 0, {"state": "CANCELLED"}, None),  # its end is not its limit
        ("stopped by SIGTERM after step 3", 100, {}, None),
    ],
)
def test_a_time_limit_shows_as_one(cause: str, left: float, changes: dict[str, Any], expected: str | None) -> None:
    end, job = End("stopped", 75, cause), replace(RUNNING, end=1000.0 + left, **changes)
    assert requeue.with_limit(end, job, ended=1000.0, notice=90) == replace(end, cause=expected or cause)
    unlimited = replace(job, end=None)
    assert requeue.with_limit(end, unlimited, 1000.0, 90) == requeue.with_limit(end, None, 1000.0, 90) == end


RUNNING = Job("7", "n", "RUNNING", restarts=4)
STOP, CRASH = End("stopped", 75, ""), End("crash", 137, "")


def crash(step: int, job: str = "7", kind: str = "crash") -> dict[str, Any]:
    return {"job": job, "kind": kind, "step": step}


def stop(measured: int = 0, preempted: bool = False) -> dict[str, Any]:
    return {"job": "7", "kind": "stopped", "step": 9, "measured": measured, "preempted": preempted}


@pytest.mark.parametrize(
    ("end", "job", "earlier", "again", "why"),
    [
        (End("finished", 0, ""), RUNNING, [], False, ""),
        (End("mistake", 2, ""), RUNNING, [], False, "a retry would fail the same way"),
        (End("interrupted", 75, ""), RUNNING, [], False, "a user asked it to stop"),
        (STOP, RUNNING, [], True, ""),
        (STOP, RUNNING, [crash(9)] * 30, True, ""),  # being stopped is no fault
        (STOP, RUNNING, [stop()] * 2, True, ""),
        (STOP, RUNNING, [stop()] * 3, False, "3 consecutive restarts stopped with nothing new"),
        (STOP, RUNNING, [*[crash(9, kind="stopped")] * 3, crash(9, "6")], False, "3 consecutive restarts stopped"),
        (STOP, RUNNING, [stop(), crash(9), stop()], True, ""),
        (STOP, RUNNING, [stop(), stop(measured=1), stop()], True, ""),  # half a measurement is kept
        (STOP, RUNNING, [stop(), stop(preempted=True), stop()], True, ""),
        (STOP, replace(RUNNING, preempted=True), [stop()] * 9, True, ""),
        (STOP, None, [], False, "this node cannot reach Slurm"),
        (STOP, replace(RUNNING, state="COMPLETING"), [], False, "Slurm is ending it: COMPLETING"),
        (STOP, replace(RUNNING, state="CANCELLED"), [], False, "Slurm is ending it: CANCELLED"),
        (STOP, replace(RUNNING, restarts=5), [], False, "Slurm itself has already restarted it"),  # an orphan
        (CRASH, RUNNING, [], True, ""),
        (CRASH, replace(RUNNING, state="CANCELLED"), [], False, "Slurm is ending it"),
        (CRASH, RUNNING, [crash(n) for n in range(5)], False, "it has crashed 6 times (--max-restarts 5)"),
        (CRASH, RUNNING, [crash(n, "6") for n in range(5)], True, ""),  # another job's
        (CRASH, RUNNING, [crash(3), crash(9), crash(9)], True, ""),
        (CRASH, RUNNING, [crash(9), crash(9), crash(9)], False, "3 consecutive restarts committed nothing new"),
        (CRASH, RUNNING, [crash(9), crash(9, kind="stopped"), crash(9)], True, ""),
        (CRASH, RUNNING, [crash(9), crash(9), crash(9), crash(9, "6")], False, "3 consecutive restarts"),
    ],
)
def test_decide(end: End, job: Job | None, earlier: list[dict[str, Any]], again: bool, why: str) -> None:
    verdict = decide(end, Attempt("7", 4), job, earlier, progress=(9, 0), limit=5)
    assert verdict.requeue == again
    assert verdict.why.startswith(why)
    assert bool(verdict.why) == bool(why)


def test_a_job_that_slurm_has_forgotten_is_not_a_slurm_that_is_silent(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake.command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake.command("sacct", "exit 1")
    assert requeue.after(tmp_path, 137, limit=3) == 137
    told = capsys.readouterr().err
    assert "does not start again: Slurm answers, but no longer knows the job; submit it again" in told
    assert "cannot reach" not in told
    assert len(fake.calls("scontrol")) == 1, "another question would get the same answer"


def test_after(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    start = Attempt.current()
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000012.1").mkdir()
    assert requeue.after(tmp_path, 0, limit=3) == 0
    assert not (tmp_path / "requeues.jsonl").exists()

    report(tmp_path, start, 0, 75, "stopped by SIGUSR2 after step 9 with a checkpoint", "SIGUSR2")
    report(tmp_path, Attempt("7", 1), 1, 2, "a report of another start")
    (tmp_path / "measuring.json").write_text('{"where": {}, "done": 48}')
    assert requeue.after(tmp_path, 137, limit=3) == 75
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {
        "job": "7", "restart": 0, "kind": "stopped", "code": 75, "step": 9, "requeue": True, "why": "",
        "cause": "stopped by SIGUSR2 after step 9 with a checkpoint", "measured": 48, "preempted": False,
    }  # fmt: skip
    assert len(list((tmp_path / "jobs" / "reports").iterdir())) == 1  # read once
    report(tmp_path / "not on this node", start, 0, 2, "x")
    assert not (tmp_path / "not on this node").exists()

    fake.show(state="CANCELLED")
    assert requeue.after(tmp_path, 143, limit=3) == 143
    assert read_rows(tmp_path / "requeues.jsonl")[1]["why"] == "Slurm is ending it: CANCELLED"
    assert len(fake.calls("scontrol requeue")) == 1

    (tmp_path / "job.json").write_text('{"job": "6"}')  # whose run directory it is; job 7 was refused
    assert requeue.after(tmp_path, 2, limit=3) == 2
    assert len(read_rows(tmp_path / "requeues.jsonl")) == 2

    (tmp_path / "owner.json").write_text(json.dumps({"generation": 1, "job": "7", "restart": 0}))  # 6 was
    requeue.after(tmp_path, 1, limit=3)
    assert len(read_rows(tmp_path / "requeues.jsonl")) == 3


@pytest.mark.parametrize(
    ("restart", "step", "told", "kind"),
    [
        (1, 9, False, "crash"),  # the node of this start lacks a program, or the run directory
        (1, 9, True, "mistake"),
        (0, 9, False, "mistake"),
        (1, 0, False, "mistake"),
    ],
)
def test_a_mistake_without_a_report_is_none_where_the_run_has_trained(
    restart: int, step: int, told: bool, kind: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    fake.show(restarts=restart)
    if step:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    if told:
        report(tmp_path, Attempt.current(), 0, 2, "a shard is damaged")
    assert requeue.after(tmp_path, 2, limit=3) == (1 if kind == "crash" else 2)
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert (row["kind"], row["requeue"]) == (kind, kind == "crash")


@pytest.mark.parametrize(("restart", "blocked", "again"), [(3, True, False), (2, True, True), (3, False, True)])
def test_crashes_that_cannot_be_counted_end(
    restart: int, blocked: bool, again: bool, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    fake.show(restarts=restart)
    if blocked:
        (tmp_path / "requeues.jsonl").mkdir()
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    assert requeue.after(tmp_path, 137, limit=20) == 137
    assert bool(fake.calls("scontrol requeue")) == again


SILENT = "echo 'Socket timed out on send/recv operation' >&2; exit 1"


@pytest.mark.parametrize(
    ("first", "then", "calls", "again", "why"),
    [
        (SILENT, {}, ["show", "show", "requeue"], True, ""),
        (f'[ "$1" = -o ] && cat shown || {{ {SILENT}; }}', {}, ["show", "requeue"] * 2, True, ""),
        (f'[ "$1" = -o ] && cat shown || {{ {SILENT}; }}', {"restarts": 1}, ["show", "requeue", "show"], False,
         "Slurm itself has already restarted it (restart 1)"),  # it had heard the first try
    ],
)  # fmt: skip
def test_slurm_that_does_not_answer_is_asked_again(
    first: str, then: dict[str, Any], calls: list[str], again: bool, why: str, fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake.command("scontrol", first.replace("shown", str(fake.folder / "shown")))
    written = []

    def wait(_: float) -> None:
        written.append((tmp_path / "requeues.jsonl").exists())
        fake.show(**then)

    monkeypatch.setattr(requeue, "time", SimpleNamespace(**vars(time) | {"sleep": wait}))
    requeue.after(tmp_path, 75, limit=3)
    asked = ["requeue" if "requeue" in call else "show" for call in fake.calls("scontrol")]
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert (asked, row["requeue"], row["why"]) == (calls, again, why)
    assert written == [False]


@pytest.mark.parametrize(
    ("code", "tries", "why"),
    [
        (75, len(requeue.PAUSES) + 1, "this node cannot reach Slurm; submit it again"),
        (2, 1, "a retry would fail the same way"),  # for which Slurm need not be asked
    ],
)
def test_slurm_that_never_answers(
    code: int, tries: int, why: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake.command("scontrol", SILENT)
    monkeypatch.setattr(requeue, "PAUSES", (0,) * len(requeue.PAUSES))
    requeue.after(tmp_path, code, limit=3)
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert (len(fake.calls("scontrol")), row["requeue"]) == (tries, False)
    assert row["why"].startswith(why)


def test_without_scontrol_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(requeue, "PAUSES", (600,))
    assert requeue.after(tmp_path, 75, limit=3) == 75
    (row,) = read_rows(tmp_path / "requeues.jsonl")
    assert row["why"].startswith("this node cannot reach Slurm")


def test_slurms_signals_to_a_job_that_it_requeues_do_not_end_the_decision(fake: FakeSlurm, tmp_path: Path) -> None:
    shown = fake.folder / "shown"
    fake.command("scontrol", f'[ "$1" = requeue ] && kill -TERM $PPID && sleep 0.2 || cat {shown}')
    command = [sys.executable, "-m", "scaleprog.launchers.requeue", str(tmp_path), "75", "3"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "7"}, check=False)
    assert ended.returncode == 75
    assert read_rows(tmp_path / "requeues.jsonl")[0]["requeue"]


def test_a_run_that_left_in_a_hurry(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = [
        {"event": "start", "generation": 2, "step": 0}, {"event": "signal", "generation": 2, "signal": "SIGINT"},
        {"event": "hurried", "generation": 2, "rank": 0}, {"event": "start", "generation": 3, "step": 0},
        *({"event": "signal", "generation": 3, "rank": rank, "signal": "SIGTERM"} for rank in range(2)),
        {"event": "hurried", "generation": 3, "rank": 1},
    ]  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "owner.json").write_text(json.dumps({"generation": 3, "job": "7", "restart": 0}))
    events = [{"time": float(i), **event} for i, event in enumerate(events)]
    write_lines(tmp_path / "events.jsonl", events[:-1])
    assert requeue.after(tmp_path, 137, limit=3) == 137  # signalled, but not for that
    write_lines(tmp_path / "events.jsonl", events)
    assert requeue.after(tmp_path, 137, limit=3) == 75
    rows = read_rows(tmp_path / "requeues.jsonl")
    assert [row["kind"] for row in rows] == ["crash", "stopped"]
    assert rows[1]["cause"] == "stopped at once by SIGTERM"
