"""`checkpoint.every: auto`: how a run chooses the time between two checkpoints."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaleprog.planning.interval import DAY
from scaleprog.rundir.checkpoint import Commit
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.interval import AutomaticInterval, faults_of, repeated_seconds
from tests.conftest import MakeRecipe, run, write_lines


def start(generation: int, **more: Any) -> dict[str, Any]:
    return {"event": "start", "generation": generation, **more}


def end(generation: int, how: str) -> dict[str, Any]:
    return {"event": how, "generation": generation}


def test_starts_that_did_not_leave_well_are_faults() -> None:
    events = [start(1), end(1, "error"), start(2), end(2, "preempted"), start(3), start(4), end(4, "signal"), start(5)]
    assert faults_of(events, 5) == 3, "an error, a kill, and a signal that left no time"
    assert faults_of(events, 1) == 0
    assert faults_of([start(1), end(1, "stopped_early"), start(2)], 2) == 0
    assert faults_of([], 1) == 0


def test_repeated_seconds_are_added_up() -> None:
    assert repeated_seconds([start(1), start(2, repeated_seconds=2.5), start(3, repeated_seconds=4.0)]) == 6.5


@pytest.mark.process
def test_a_run_saves_by_what_saving_costs_and_says_so_at_every_start(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        growth={"schedule": "original"}, train={"epochs": 1}, checkpoint={"every": "auto", "every_steps": 3}
    )
    run(recipe, tmp_path, max_steps=10)
    (tmp_path / "events.jsonl").write_text(
        "".join(
            line for line in (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
            if '"stopped_early"' not in line
        )
    )  # fmt: skip
    run(recipe, tmp_path)
    events = read_rows(tmp_path / "events.jsonl")
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    assert saved == [10, 20], "every_steps has no say"
    told = [event for event in events if event["event"] == "interval"]
    assert [event["generation"] for event in told][:2] == [1, 2]
    for event, faults in zip(told, (0, 1)):
        assert (event["faults"], event["nodes"]) == (faults, 1)
        assert event["mtbf"] == pytest.approx((DAY + event["trained_seconds"]) / (1 + faults))
        assert event["seconds"] == max(math.sqrt(2 * event["pause"] * event["mtbf"]), event["save"])
    first = next(event for event in events if event["event"] == "checkpoint")
    assert (told[0]["pause"], told[0]["save"]) == (first["stall"], first["seconds"])
    assert told[1]["step"] == 10, "known from the start before"


def test_a_fork_counts_its_own_time_as_it_counts_its_own_faults(tmp_path: Path) -> None:
    forked = {"time": 1.0, "event": "forked", "generation": 0, "step": 7, "run": "parent", "wall_seconds": 10 * DAY}
    about = {"time": 1.0, "step": 7, "world": 1, "device": "cpu"}
    write_lines(tmp_path / "events.jsonl", [forked, start(1, **about), start(2, **about, repeated_seconds=5.0)])
    told: list[dict[str, Any]] = []
    recorder = SimpleNamespace(event=lambda kind, **values: told.append(values))
    run: Any = SimpleNamespace(
        folder=tmp_path,
        lease=SimpleNamespace(generation=2),
        state=SimpleNamespace(wall_seconds=10 * DAY + 100.0, step=8),
        watch=SimpleNamespace(save_every=lambda seconds: None),
        recorder=recorder,
        progress=SimpleNamespace(say=lambda text: None),
    )
    AutomaticInterval(run, nodes=1).saved(Commit(tmp_path, 8, 0.1, 1.0, 0))
    assert (told[0]["trained_seconds"], told[0]["faults"]) == (105.0, 1)
