"""Two ranks, stopped and killed by real signals: what the run tells of it, and its curves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import scaleprog.training.loop
from scaleprog.errors import EXIT_CODE, Preempted, ScaleprogError
from scaleprog.launchers import status
from scaleprog.launchers.local import RankFailed, launch
from scaleprog.recipe import Recipe
from scaleprog.reporting.report import write_report
from scaleprog.reporting.timeline import read_timeline
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.loop import train_rank
from scaleprog.training.process import Run
from tests.compare import board, differences, rank_curves
from tests.conftest import run as run_here
from tests.conftest import step_rows

SAVE_STEPS = 9


def start(recipe: Path, folder: Path, ranks: int = 2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scaleprog", "train", recipe, "--nproc", str(ranks), "--run-dir", folder]
    return subprocess.Popen(list(map(str, command)), start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def reached(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while max(step_rows(folder), default=0) < step:
        assert process.poll() is None, f"it ended before step {step}"
        time.sleep(0.01)


def train_signalled(recipe: Recipe, folder: Path, kind: str) -> None:
    """A rank of a run in which something happens to rank 1 after some steps."""
    original = scaleprog.training.loop.train_step

    def train_step(run: Run, *arguments: Any) -> None:
        original(run, *arguments)
        if run.state.step == 5 and run.coordinator.rank == 1:
            if kind == "crash":
                raise OSError("no such shard\nany more")
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(2.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    scaleprog.training.loop.train_step = train_step
    train_rank(recipe, folder)


def test_a_run_that_was_stopped_and_killed_tells_its_life(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(
        train={"epochs": 8, "log_every": 3, "rank_curves": True},
        checkpoint={"every_steps": SAVE_STEPS},
        model={"width": 64, "depth": 6},
    )
    path, run, straight = tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "straight"
    path.write_text(recipe.dump())
    run_here(recipe, straight, ranks=2)

    stopped = start(path, run)
    reached(run, 20, stopped)
    stopped.terminate()
    assert stopped.wait() == EXIT_CODE
    here = max(step_rows(run))
    killed = start(path, run)
    reached(run, here + 20, killed)
    os.killpg(killed.pid, signal.SIGKILL)  # launcher and ranks alike
    killed.wait()
    run_here(recipe, run, ranks=2)

    assert differences(recipe, run, straight) == []
    every = list(range(3, max(step_rows(straight)) + 1, 3))
    assert [step for step, _ in board(run)["train/loss"]] == every
    own = {f"vitals/{key}_seconds": every for key in ("step", "data_wait", "collective_wait")}
    assert rank_curves(run) == {"rank_0": own, "rank_1": own}

    events = read_rows(run / "events.jsonl")
    assert [event["generation"] for event in events] == sorted(event["generation"] for event in events)
    signals = [(e["generation"], e["rank"], e["signal"]) for e in events if e["event"] == "signal"]
    assert sorted(signals) == [(1, 0, "SIGTERM"), (1, 1, "SIGTERM")]
    starts = [event for event in events if event["event"] == "start"]
    assert [event["generation"] for event in starts] == [1, 2, 3]
    assert [event["repeated_steps"] > 0 for event in starts] == [False, False, True]
    assert all(event["startup_seconds"] > 0 for event in starts)

    timeline = read_timeline(run, "run", read_rows(run / "metrics.jsonl"), events)
    assert timeline is not None
    told = [(mark.kind, mark.text) for mark in timeline.marks if mark.step is None]
    assert told == [
        ("signal", "SIGTERM"), ("stop", ""), ("killed", "ended without notice"), ("finish", "finished")
    ]  # fmt: skip
    assert timeline.lost == starts[2]["repeated_steps"] <= 2 * SAVE_STEPS
    costs = {what: seconds for what, seconds in timeline.costs.items() if seconds is not None}
    assert costs.keys() == timeline.costs.keys()
    assert abs(sum(costs.values()) - timeline.wall) < 0.01 * timeline.wall
    write_report([run], tmp_path / "report")
    assert (tmp_path / "report" / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("ranks", [1, 2])
def test_cancel_finds_the_process_that_trains(ranks: int, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(make_recipe(train={"epochs": 200}).dump())
    training = start(path, run, ranks)
    try:
        reached(run, 5, training)
        assert "to save a checkpoint and stop" in status.cancel(run)
        assert training.wait() == EXIT_CODE
    finally:
        with suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)
    with pytest.raises(ScaleprogError, match="nothing to cancel"):
        status.cancel(run)


def happened_to_ranks(folder: Path) -> list[tuple[str, int, str | None]]:
    rows = [row for row in read_rows(folder / "events.jsonl") if "rank" in row]
    assert {row["generation"] for row in rows} == {1}
    return [(row["event"], row["rank"], row.get("signal") or row.get("message")) for row in rows]


def test_a_second_signal_is_recorded_by_the_rank_that_it_reaches(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(Preempted):
        launch(2, train_signalled, make_recipe(), tmp_path, "second signal")
    assert happened_to_ranks(tmp_path)[:2] == [("signal", 1, "SIGUSR2"), ("hurried", 1, None)]


def test_an_error_is_recorded_by_the_rank_that_it_happens_to(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RankFailed, match="no such shard"):
        launch(2, train_signalled, make_recipe(), tmp_path, "crash")
    assert happened_to_ranks(tmp_path)[0] == ("error", 1, "OSError: no such shard\nany more")
