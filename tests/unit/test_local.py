"""Ranks as processes of this machine: what an end of theirs means, and signals that come before they listen."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import DataError, Preempted, ScaleprogError, Unavailable
from scaleprog.launchers import local
from scaleprog.launchers.exits import CRASHED, MISTAKE, STOPPED, Exit, exit_by
from scaleprog.launchers.local import RankFailed, launch, ranks_to_start
from scaleprog.launchers.world import Count
from scaleprog.recipe.worlds import Worlds

pytestmark = pytest.mark.process


def begin(folder: Path, kind: str = "") -> None:
    """What the ranks do: one file for each that comes so far."""
    (folder / f"{os.getpid()}").touch()
    if kind == "unavailable":
        raise Unavailable("shard 3: the disk does not answer")
    if kind == "preempted":
        raise Preempted("stopped after step 7", "time limit")
    if kind == "crash":
        os._exit(9)


def begun(folder: Path) -> int:
    return len(list(folder.iterdir()))


def signal_me(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (Preempted("left", "SIGTERM"), Exit(STOPPED, "left", "left", reason="SIGTERM")),
        (DataError("damaged"), Exit(MISTAKE, "damaged", "damaged")),
        (Unavailable("full\ndisk"), Exit(CRASHED, "full\ndisk", "full\ndisk")),
        (ValueError("a\nb"), Exit(CRASHED, "ValueError: a", "failed\nValueError: a\nb\n")),
        (RuntimeError(), Exit(CRASHED, "RuntimeError: ", "failed\nRuntimeError\n", delay=3.0)),
    ],
)
def test_what_an_error_means(error: Exception, known: Exit) -> None:
    assert exit_by(error) == known


def test_what_may_pass_is_tried_again_and_told_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFailed) as caught:
        launch(1, begin, tmp_path, "unavailable", restarts=1)
    assert str(caught.value) == "rank 0: shard 3: the disk does not answer"
    assert not caught.value.mistake
    assert begun(tmp_path) == 2
    assert "Traceback" not in capfd.readouterr().err


def begin_with(folder: Path) -> None:
    """What ranks do of which there are too many until there are two."""
    (folder / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}").touch()
    if os.environ["WORLD_SIZE"] != "2":
        os._exit(9)


def test_each_start_asks_for_the_number_of_ranks(tmp_path: Path) -> None:
    numbers = iter((3, 1, 2))
    launch(lambda: next(numbers), begin_with, tmp_path, restarts=2)
    assert {path.name for path in tmp_path.iterdir()} >= {"1-0", "2-0", "2-1"}
    assert next(numbers, None) is None
    assert not list(tmp_path.glob("2-2"))


@pytest.mark.parametrize(
    ("asked", "room", "taken", "why"),
    [
        (Count(1, 4), 8, 4, ""),
        (Count(1, 4), 3, 2, "starting 2 of at most 4 ranks; GPUs available: 3; 3 ranks do not divide data.lanes, 4"),
        (Count(1, 4), 2, 2, "starting 2 of at most 4 ranks; GPUs available: 2\n"),
        (Count(1, 6), 8, 4, "starting 4 of at most 6 ranks; 6 ranks do not divide data.lanes, 4; to use them"),
    ],
)
def test_a_start_takes_what_the_machine_has_and_can_train(
    asked: Count, room: int, taken: int, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scaleprog.launchers.local.room_here", lambda: (room, "GPUs"))
    assert ranks_to_start(asked, Worlds(4, 4)) == taken
    told = capsys.readouterr().err
    assert told.startswith(f"scaleprog: {why}") if why else told == ""
    assert told.count("\n") == bool(why)


def test_a_range_that_the_machine_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 7})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ScaleprogError, match="--nproc 4:8: CPU cores available: 3; to start N"):
        ranks_to_start(Count(4, 8), Worlds(8, 8))
    with pytest.raises(
        ScaleprogError,
        match=r"^--nproc 3:8 \(CPU cores available: 3\), narrowed to 3: cannot train; .* 8 \(1, 2, 4, 8\)$",
    ):
        ranks_to_start(Count(3, 8), Worlds(8, 8))


@pytest.mark.parametrize(("ranks", "devices"), [(2, 1), (8, 4), (1, 0), (8, 0), (4, 4), (2, 4)])
def test_ranks_need_a_gpu_each_where_there_are_gpus(ranks: int, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    if ranks <= devices or not devices:
        local.check_devices(ranks)
        return
    message = f"--nproc {ranks}: .*; CUDA devices available: {devices}; use --nproc {devices}.*CUDA_VISIBLE_DEVICES="
    with pytest.raises(ScaleprogError, match=message):
        local.check_devices(ranks)
    with pytest.raises(ScaleprogError, match=message):
        ranks_to_start(Count(ranks, 16), Worlds(16, 16))


def threads_of(folder: Path) -> None:
    (folder / f"{os.getpid()}").write_text(f"{os.environ['OMP_NUM_THREADS']}")


@pytest.mark.parametrize(("cores", "ranks", "given", "threads"), [(8, 2, None, 4), (1, 2, None, 1), (8, 2, "3", 3)])
def test_ranks_share_the_threads_of_the_machine(
    cores: int, ranks: int, given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(ranks, threads_of, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [f"{threads}"] * ranks
    assert os.environ.get("OMP_NUM_THREADS") == given


def test_ranks_that_stop_by_themselves_say_why(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match=r"^stopped after step 7$") as caught:
        launch(1, begin, tmp_path, "preempted", restarts=1)
    assert caught.value.reason == "time limit"


@pytest.mark.parametrize(
    ("number", "call", "starts"), [(signal.SIGTERM, 1, 0), (signal.SIGUSR2, 1, 0), (signal.SIGTERM, 2, 1)]
)
def test_a_signal_before_a_start_lets_nothing_start(
    number: int, call: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, launches, launch_once = iter(range(1, 9)), [], local._launch_once

    def counted(*arguments: Any) -> None:
        launches.append(arguments)
        launch_once(*arguments)

    monkeypatch.setattr(local, "_launch_once", counted)

    def progress() -> None:
        if next(calls) == call:
            signal_me(number)

    with pytest.raises(Preempted, match=f"stopped by {signal.Signals(number).name}") as caught:
        launch(1, begin, tmp_path, "crash", restarts=2, progress=progress)
    assert caught.value.reason == signal.Signals(number).name
    assert begun(tmp_path) == len(launches) == starts


def when_spawned(over: threading.Event) -> None:
    """Signals this process as soon as its first rank is there, which then still imports torch."""
    while not multiprocessing.active_children():
        if over.wait(0.001):
            return
    signal_me(signal.SIGTERM)


def test_a_signal_while_ranks_start_is_no_crash(tmp_path: Path) -> None:
    over = threading.Event()
    watching = threading.Thread(target=when_spawned, args=[over], daemon=True)
    try:
        with pytest.raises(Preempted, match="stopped by SIGTERM") as caught:
            launch(2, begin, tmp_path, restarts=2, progress=watching.start)
    finally:
        over.set()
    assert caught.value.reason == "SIGTERM"
    assert begun(tmp_path) == 0


def test_a_signal_just_before_the_spawn_reaches_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_once = local._launch_once

    def after_the_signal(*arguments: Any) -> None:
        signal_me(signal.SIGTERM)  # nobody is there to be told
        launch_once(*arguments)

    monkeypatch.setattr(local, "_launch_once", after_the_signal)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM$"):
        launch(2, begin, tmp_path)
    assert begun(tmp_path) == 0


def fail_in_turn(kind: str, folder: Path) -> None:
    """Rank 1 is the first to fail, in some way; what happens to the others afterwards is an echo."""
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, lambda *_: None if kind == "deaf" else os._exit(3))
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 3:
        time.sleep(0.01)
    if rank == 1 and kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and kind == "real-time":
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
    if rank == 1:
        raise DataError(f"shard 3 is damaged\n{'x' * 200_000}")
    time.sleep(0.5 if rank == 0 and kind == "echo" else 600)
    raise DataError("connection closed")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("echo", "rank 1: shard 3 is damaged\n" + "x" * 200_000),
        ("deaf", "rank 1: shard 3 is damaged\n" + "x" * 200_000),
        ("killed", "rank 1 was killed by SIGKILL; the launcher stopped all other ranks"),
        ("real-time", f"rank 1 was killed by signal {signal.SIGRTMIN + 3}; the launcher stopped all other ranks"),
    ],
)
def test_the_first_to_fail_is_named_and_the_others_are_ended(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 1.0)
    with pytest.raises(RankFailed) as caught:
        launch(3, fail_in_turn, kind, tmp_path)
    assert str(caught.value) == message
    assert caught.value.mistake == ("damaged" in message)
    assert not multiprocessing.active_children()


def stay(folder: Path) -> None:
    """Waits for a signal, and says which came."""

    def heard(number: int, _: object) -> None:
        (folder / f"heard {number}").touch()
        os._exit(STOPPED)

    signal.signal(signal.SIGINT, heard)
    (folder / "waits").touch()
    time.sleep(600)


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_ranks_whose_launcher_is_killed_are_asked_to_stop(tmp_path: Path) -> None:
    launcher = multiprocessing.get_context("spawn").Process(target=launch, args=(1, stay, tmp_path))
    launcher.start()
    until((tmp_path / "waits").exists)
    launcher.kill()
    launcher.join()
    until((tmp_path / f"heard {signal.SIGINT}").exists)
