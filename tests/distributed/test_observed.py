"""Runs that trackers and profilers look at: nothing changes, nothing is lost, no step comes twice."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from scaleprog.rundir import profiles, sending
from scaleprog.rundir.drawn import points
from scaleprog.rundir.recorder import read_rows
from scaleprog.training import loop
from tests.compare import curves, differences
from tests.conftest import MakeRecipe, run
from tests.tracked import MLflowServer, mlflow_server  # noqa: F401

pytestmark = pytest.mark.process

SHORT: dict[str, Any] = {"growth": {"schedule": "linear", "stages": 2}, "checkpoint": {"every_steps": 10}}


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start fails in a step, as by a bug."""
    train_step = loop.train_step

    def fail(run: Any, *arguments: Any) -> None:
        train_step(run, *arguments)
        if run.state.step == step:
            monkeypatch.setattr(loop, "train_step", train_step)
            raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "train_step", fail)


def test_mlflow_has_the_curves_of_a_run_with_two_restarts_and_an_outage(
    make_recipe: MakeRecipe,
    mlflow_server: MLflowServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe, folder = make_recipe(tracking=["mlflow"], **SHORT), tmp_path / "tracked"
    monkeypatch.setattr(sending, "LAST_SECONDS", 300.0)
    crash_at(27, monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        run(recipe, folder)
    assert [step for step, _ in mlflow_server.curves("tracked")["train/loss"]] == [5, 10, 15]
    mlflow_server.stop()
    monkeypatch.setattr(sending, "LAST_SECONDS", 1.0)
    run(recipe, folder, max_steps=60)
    assert "mlflow does not have all points" in capfd.readouterr().err
    mlflow_server.start()
    monkeypatch.setattr(sending, "LAST_SECONDS", 300.0)
    run(recipe, folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "phase" not in row or row["step"] % 5 == 0]
    expected = {tag: [(row["step"], points(row)[tag]) for row in rows if tag in points(row)] for tag in curves(folder)}
    assert [step for step, _ in expected["train/loss"]] == list(range(5, 81, 5))
    assert mlflow_server.curves("tracked") == expected


def traces(folder: Path) -> dict[str, set[str]]:
    """The names of what happened, by trace."""
    found = {}
    for path in (folder / "profiles").rglob("*.json.gz"):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        found[f"{path.parent.name}/{path.name}"] = {event["name"] for event in events}
    return found


def test_a_profiled_run_trains_the_same(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, straight, profiled = make_recipe(**SHORT), tmp_path / "straight", tmp_path / "profiled"
    run(recipe, straight, ranks=2)
    profiled.mkdir()
    request = profiles.ask(profiled, steps=2, ranks=[0, 1], memory=False)
    planned = make_recipe(train={"profile": {"at": [50], "steps": 40, "ranks": [1, 5]}}, **SHORT)
    run(planned, profiled, ranks=2)
    assert differences(recipe, profiled, straight) == []
    asked = profiles.answer(profiled, request)
    assert asked is not None
    assert sorted(asked) == [0, 1]
    by_trace = traces(profiled)
    folder = asked[0].parent.name
    assert by_trace.keys() == {f"{folder}/rank_0.json.gz", f"{folder}/rank_1.json.gz", "step_50/rank_1.json.gz"}
    assert all("aten::_fused_adamw_" in names for names in by_trace.values())
    told = [event for event in read_rows(profiled / "events.jsonl") if event["event"] == "profile"]
    steps = {(f"step_{event['step']}", event["rank"]): event["steps"] for event in told}
    assert steps == {(folder, 0): 2, (folder, 1): 2, ("step_50", 1): 31}, "the last evaluation ends the long one"
    assert not list(profiled.rglob("*.error"))
