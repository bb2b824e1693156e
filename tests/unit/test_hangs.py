"""Hangs: when a rank counts as hung, what its launcher notices, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scaleprog.errors import HANG_CODE
from scaleprog.launchers import hangs, requeue, task
from scaleprog.launchers.attempt import Attempt, report, reports_of
from scaleprog.launchers.hangs import Guard, Hang
from scaleprog.launchers.requeue import how_it_ended
from scaleprog.ranks import patience, processes
from scaleprog.ranks.patience import LONG_SECONDS, Track
from scaleprog.ranks.pulse import PULSE, Pulse, Stand
from scaleprog.ranks.rendezvous import Place
from scaleprog.rundir.reading import read, read_rows
from scaleprog.rundir.records import EVENT, EVENTS
from scaleprog.training.process import watched_patience
from tests.conftest import MakeRecipe

STAND = Stand(0, "n0", 10, 3, 12, "training", 61.0, 60.0, hung=True, together=True, where="scaleprog/a.py:1 in b")
PREPARED = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from scaleprog.ranks.patience import Patience
rank = Patience({seconds}, Path(sys.argv[1]), 1, generation=2)
rank.at("training", 12)
with rank.watching():
    {body}
"""
FULL_LOG = """
    patience = sys.modules["scaleprog.ranks.patience"]
    patience.WRITE_SECONDS, rank.rank, pipe = 0.2, 0, os.pipe()
    os.dup2(pipe[1], 2), os.write(2, bytes(2**16))
"""
"""What the process writes into its log waits until somebody reads it."""


def start(folder: Path, body: str, seconds: float = 0.4, pulse: Pulse | None = None) -> subprocess.Popen[bytes]:
    """A process that watches itself."""
    variables = {} if pulse is None else {PULSE: f"{pulse.descriptor}:{pulse.rank}"}
    return subprocess.Popen(
        [sys.executable, "-c", PREPARED.format(seconds=seconds, body=body), folder],
        env={**os.environ, **variables}, pass_fds=() if pulse is None else (pulse.descriptor,),
    )  # fmt: skip


@pytest.fixture
def pulse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pulse]:
    """Memory for one rank, and a launcher that looks often."""
    for module in (hangs, task):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
        monkeypatch.setattr(module, "SETTLE_SECONDS", 0.5)
    descriptor = os.memfd_create("pulse")
    yield Pulse(descriptor, 0)
    os.close(descriptor)


def until_hung(guard: Guard) -> Stand:
    while not (stands := guard.look()):
        time.sleep(0.02)
    return stands[0]


# ---- when


def test_how_long_something_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    track = Track()
    track.at("waiting for data", 5)
    assert track.mark is not None
    assert track.allowed(track.mark, 60) == 60
    for seconds, may in ((200.0, LONG_SECONDS), (30.0, 600), (10.0, 90), (10.0, 60)):
        track.at("training", kind="a step")
        assert track.mark.step == 5
        assert track.allowed(track.mark, 60) == may
        now += seconds
    assert patience.long_wait(3600) == 3 * 3600


@pytest.mark.process
def test_a_rank_that_makes_no_progress_ends_with_its_workers(tmp_path: Path) -> None:
    rank = start(tmp_path, "print(subprocess.Popen(['sleep', '600']).pid, file=open(sys.argv[1] + '/worker', 'w')); "
                           "time.sleep(600)")  # fmt: skip
    assert rank.wait() == HANG_CODE
    told = (tmp_path / "stacks/stack-generation-2-rank-1.txt").read_text()
    worker = int((tmp_path / "worker").read_text())
    assert f"process {rank.pid}) hangs: training, step 12" in told
    assert 'File "<string>", line' in told
    assert f"process {worker}: sleep 600" in told
    while processes.lives(worker):
        time.sleep(0.01)


@pytest.mark.process
@pytest.mark.parametrize(
    "body",
    [
        "import linecache; linecache.checkcache = lambda *_: time.sleep(600)",  # reads the source files
        f"{FULL_LOG}    rank.folder = None",
        f"{FULL_LOG}    [(rank.at('training', 12, 'a step'), time.sleep(0.5)) for _ in range(4)]",
        "rank._memory = -1",
    ],
    ids=["source files", "log", "log that warns", "error"],
)
def test_a_rank_ends_though_what_it_writes_about_its_hang_hangs_or_fails(body: str, tmp_path: Path) -> None:
    rank = start(tmp_path, f"{body}\n    time.sleep(600)", 0.3)
    try:
        assert rank.wait(60) == HANG_CODE
    finally:
        rank.kill()


@pytest.mark.process
def test_a_rank_that_makes_progress_goes_on_though_it_was_stopped(tmp_path: Path) -> None:
    body = "print(file=open(sys.argv[1] + '/on', 'w')); [(rank.at('training', 12), time.sleep(0.1)) for _ in range(12)]"
    rank = start(tmp_path, body, seconds=0.5)
    while not (tmp_path / "on").exists():
        time.sleep(0.01)
    rank.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    rank.send_signal(signal.SIGCONT)
    assert rank.wait() == 0
    assert not (tmp_path / "stacks").exists()


@pytest.mark.process
def test_steps_longer_than_the_patience_are_waited_for_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "rank.rank = 0; [(rank.at('training', 12, 'a step'), time.sleep(0.5)) for _ in range(4)]"
    assert start(tmp_path, body, seconds=0.3).wait() == 0
    told = capfd.readouterr().err
    assert told.count("train.patience") == 2, "once, and what to set"
    assert "train.patience=0.005 is 0.3 s, but a step takes 0.5" in told
    assert "set train.patience=0.02" in told


# ---- what the launcher notices


@pytest.mark.process
def test_a_stopped_rank(tmp_path: Path, pulse: Pulse) -> None:
    rank = start(tmp_path, "[(rank.at('training', 12), time.sleep(0.05)) for _ in range(1000)]", 0.5, pulse)
    guard = Guard(tmp_path, [pulse])
    while pulse.read() is None:
        assert guard.look() is None
    rank.send_signal(signal.SIGSTOP)
    stand = until_hung(guard)
    assert (stand.rank, stand.step, stand.doing, stand.state) == (1, 12, "training", "T (stopped)")
    assert f"process {rank.pid}: {sys.executable}" in (tmp_path / "stacks/stack-generation-2-rank-1.txt").read_text()
    processes.kill_with_children(rank.pid)
    assert rank.wait() == -signal.SIGKILL


@pytest.mark.process
def test_a_rank_in_which_no_thread_of_python_runs(tmp_path: Path, pulse: Pulse) -> None:
    rank = start(tmp_path, "time.sleep(0.3); [ctypes.PyDLL(None).sleep(600) for _ in range(9)]", 0.5, pulse)
    stand = until_hung(Guard(tmp_path, [pulse]))
    assert stand.state == "S (sleeping)"
    told = (tmp_path / "stacks/stack-generation-2-rank-1.txt").read_text()
    assert 'File "<string>", line' in told, "its own stacks, by a signal"
    rank.kill()
    rank.wait()


@pytest.mark.process
def test_a_rank_that_is_stopped_in_a_long_step_is_named_once_another_hangs(
    tmp_path: Path, pulse: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangs, "SETTLE_SECONDS", 0.0)
    other = Pulse(pulse.descriptor, 1)
    rank = start(tmp_path, "time.sleep(600)", 60, other)
    guard = Guard(tmp_path, [pulse, other])
    while other.read() is None:
        time.sleep(0.01)
    rank.send_signal(signal.SIGSTOP)
    for _ in range(4 * hangs.SILENT_LOOKS):
        assert guard.look() is None
        time.sleep(hangs.LOOK_SECONDS)
    pulse.write(replace(STAND, together=True))
    waiting, stopped = guard.look() or ()
    assert waiting.rank == 0
    assert (stopped.rank, stopped.state) == (1, "T (stopped)")
    assert "rank 1" in guard.conclude([waiting, stopped]).message.partition(" did not come")[0]
    processes.kill_with_children(rank.pid)
    assert rank.wait() == -signal.SIGKILL


@pytest.mark.process
def test_a_rank_that_has_ended_does_not_hang(tmp_path: Path, pulse: Pulse) -> None:
    assert start(tmp_path, "time.sleep(0.1)", 0.5, pulse).wait() == 0
    assert pulse.read() is None
    pulse.write(replace(STAND, hung=False, patience=0.1, pid=2**22 - 1))
    guard = Guard(tmp_path, [pulse])
    give_up = time.monotonic() + 0.6
    while time.monotonic() < give_up:
        assert guard.look() is None
        time.sleep(0.05)


def test_the_launcher_waits_until_a_hung_rank_has_collected_its_stacks(
    tmp_path: Path, pulse: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangs, "SETTLE_SECONDS", 600)
    guard = Guard(tmp_path, [pulse])
    pulse.write(replace(STAND, where="", together=False))
    assert guard.look() is None
    assert guard.has_noticed
    pulse.write(STAND)
    assert guard.look() == [STAND]


@pytest.mark.process
def test_a_stopped_task_is_reported_and_killed(tmp_path: Path, pulse: Pulse) -> None:
    rank = start(tmp_path, "time.sleep(600)", 0.5, pulse)
    while pulse.read() is None:
        time.sleep(0.01)
    rank.send_signal(signal.SIGSTOP)
    handle, attempt = os.pidfd_open(rank.pid), Attempt("7", 0)
    task.watch(Guard(tmp_path, [pulse]), handle, lambda stand: task.report_hang(tmp_path, attempt, 1, stand))
    os.close(handle)
    assert rank.wait() == -signal.SIGKILL
    (row,) = reports_of(tmp_path, attempt)
    assert (row["rank"], row["code"], row["stand"]["state"]) == (1, HANG_CODE, "T (stopped)")
    hang = Hang.of([requeue.stand_of(row["stand"])], tmp_path)
    assert hang.culprits == (1,)
    end = how_it_ended(1, [row], [], False, hang)
    assert (end.kind, end.cause) == ("crash", hang.message)


GUARDED = """
import os, signal, sys, time
from pathlib import Path
from scaleprog.launchers import task
from scaleprog.launchers.attempt import Attempt
from scaleprog.ranks.patience import Patience
if sys.argv[2] == "stopped":
    task.SETTLE_SECONDS = 0.5
run = Path(sys.argv[1])
task.guard(run, Attempt("7", 0), 1)
rank = Patience(1.0, run, 1, generation=2)
rank.at("training", 12)
with rank.watching():
    if sys.argv[2] == "stopped":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
"""


@pytest.mark.process
@pytest.mark.parametrize(("kind", "code", "state"), [("stopped", -signal.SIGKILL, "T (stopped)"), ("asleep", 76, "")])
def test_a_task_has_a_process_that_watches_it(kind: str, code: int, state: str, tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", GUARDED, tmp_path, kind], check=False).returncode == code
    (row,) = reports_of(tmp_path, Attempt("7", 0))
    assert (row["rank"], row["code"], row["stand"]["step"], row["stand"]["state"]) == (1, HANG_CODE, 12, state)
    assert (tmp_path / "stacks/stack-generation-2-rank-1.txt").exists()


# ---- what is said of it


def test_ranks_that_hang_by_themselves_waited_neither_for_others_nor_for_the_network(tmp_path: Path) -> None:
    alone = replace(STAND, together=False)
    hang = Hang.of([alone, replace(alone, rank=1, host="n1")], tmp_path)
    assert "waited" not in hang.message
    assert "network" not in hang.message


def test_ranks_that_have_answered_are_not_missing(tmp_path: Path) -> None:
    stand = replace(STAND, world=3)
    assert Hang.of([stand], tmp_path, {0, 1}).culprits == (2,)
    old = {key: value for key, value in asdict(stand).items() if key != "world"}
    assert Hang.of([requeue.stand_of(old)], tmp_path).culprits == (), "a report of an earlier version"


def test_a_task_that_left_no_report_did_not_come(tmp_path: Path) -> None:
    attempt = Attempt("7", 0)
    task.report_hang(tmp_path, attempt, 0, replace(STAND, world=2))
    hang = requeue.Remains.by(tmp_path, attempt, 1, 120).hang
    assert hang is not None
    assert hang.culprits == (1,)
    report(tmp_path, attempt, 1, 1, "RuntimeError: the connection was closed")
    hang = requeue.Remains.by(tmp_path, attempt, 1, 120).hang
    assert hang is not None
    assert hang.culprits == ()


def test_a_rank_knows_how_many_there_are(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in Place(1, 3, 1, 3, "file:none").variables().items():
        monkeypatch.setenv(name, value)
    with watched_patience(make_recipe(), tmp_path) as rank:
        assert (rank.rank, rank.world) == (1, 3)


@pytest.mark.parametrize(
    ("stands", "culprits", "message"),
    [
        ([{"state": "D (waits)"}, {}, {}], (0,), "rank 0 (host n0, process 10) did not come: state D (waits)"),
        ([{}, {"together": False, "where": "x.py:3 in f"}], (1,), "come: training, at x.py:3 in f; rank 0 waited"),
        ([{"step": 11}, {}, {}], (0,), "ranks 1, 2 waited for the others in step 12 (training)"),
        ([{}, {"host": "n1"}], (), "no rank stands apart; is the network between n0, n1 whole?"),
        ([{"together": False}, {"together": False}], (), "no rank stands apart"),
        ([{"together": False}, {"together": False, "host": "n1"}], (), "all ranks hang by themselves: training at "),
        ([{"doing": "waiting for data", "together": False}] * 2, (), "b; a file system or device that all share?"),
        ([{"together": False}, {"together": False, "doing": "evaluating"}], (1,), "; rank 0 waited for the others"),
        ([{"together": False}, {"together": False, "doing": "waiting for data"}, {}], (1,), "ranks 0, 2 waited for"),
        ([{"world": 2}], (1,), "rank 1 said nothing; rank 0 waited for the others in step 12 (training)"),
        ([{"world": 3, "state": "D (waits)"}, {}], (0,), "rank 0 (host n0, process 10) did not come: state D (waits)"),
        ([{"world": 3, "doing": "waiting for data", "together": False}], (0,), "rank 0 (host n0, process 10) did not"),
        ([{"together": False}], (0,), "rank 0 (host n0, process 10) did not come: training"),
        ([{"state": "T (stopped)"}] * 2, (0, 1), "rank 1 (host n0, process 10) did not come: state T"),
        ([{"state": "T (stopped)"}] + [{}] * 511, (0,), "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 503 more ranks waited"),
    ],
)  # fmt: skip
def test_which_ranks_did_not_come(
    stands: list[dict[str, object]], culprits: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    hang = Hang.of([replace(STAND, rank=rank, **changes) for rank, changes in enumerate(stands)], tmp_path)  # type: ignore[arg-type]
    assert hang.culprits == culprits
    assert message in hang.message
    assert len(hang.message) < 1000
    hang.record(tmp_path)
    (event,) = read(tmp_path / EVENTS, EVENT).rows
    assert (event["event"], event["step"], event["generation"]) == ("hang", 12, 3)
    (row,) = read_rows(tmp_path / EVENTS)
    assert json.dumps(row["culprits"]) == json.dumps(list(culprits))
