"""data.workers: auto: which cores a rank has for itself, and how many workers it starts on them."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scaleprog.data.reader import TrainReader
from scaleprog.planning.plan import Plan
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.recorder import read_rows
from scaleprog.training import workers
from scaleprog.training.process import Run
from tests.conftest import MakeRecipe, run

HERE = os.uname().nodename


@pytest.mark.parametrize(
    ("mine", "others", "own"),
    [
        (range(8), [], 8),
        (range(8), [(HERE, range(8))], 4),
        (range(4), [(HERE, range(4, 8))], 4),
        (range(6), [(HERE, range(4, 10))], 5),
        (range(8), [("elsewhere", range(8))] * 7, 8),
        (range(1), [(HERE, range(1))] * 3, 1),
    ],
)
def test_cores_that_several_ranks_may_use_are_shared_out(
    mine: range, others: list[Any], own: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyones = [[HERE, list(mine)], *([host, list(cores)] for host, cores in others)]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(mine))
    ranks = cast(Coordinator, SimpleNamespace(gather=lambda value: [value, *everyones[1:]]))
    plan = workers.with_own_cores(Plan.of(make_recipe(data={"workers": "auto"})), ranks)
    assert (plan.data.cores, plan.data.workers) == (own, max(1, own - 1))


@pytest.mark.process
def test_a_run_with_as_many_workers_as_cores_ends_with_the_results_of_one_without(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """No split is cached, so that workers decode for the evaluation, too."""
    losses, growth = {}, {"schedule": "linear", "stages": 2}
    for count in ("auto", 0):
        data, folder = {"workers": count, "cache": 0}, tmp_path / str(count)
        recipe = make_recipe(data=data, growth=growth, sharding={"engine": "replicated"}, evaluate={"every": 0.5})
        run(recipe, folder, epochs=1)
        losses[count] = [row.get("loss", row.get("val_loss")) for row in read_rows(folder / "metrics.jsonl")]
    assert losses["auto"] == losses[0]
    events = read_rows(tmp_path / "auto" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "workers"] == [0, 10], "at the start of each stage"
    assert all(event["workers"] >= 1 for event in events if event["event"] == "workers")


def run_of(recipe: Any, cores: int, waiting: float) -> Run:
    plan = Plan.of(recipe)
    plan = replace(plan, data=replace(plan.data, cores=cores))
    reader = TrainReader(plan.data, plan.order, 0, 0, 1)
    recorder = SimpleNamespace(waiting=waiting, own_event=lambda kind, **fields: None)
    return cast(Run, SimpleNamespace(plan=plan, reader=reader, recorder=recorder, state=SimpleNamespace(step=7)))


@pytest.mark.parametrize(
    ("setting", "cores", "waiting", "expected"),
    [
        ("auto", 3, 0.0, 2),
        ("auto", 3, 0.5, 3),
        ("auto", 64, 0.5, 4),
        ("auto", 1, 0.0, 1),
        (2, 64, 0.5, 2),
        (0, 64, 0.5, 0),
    ],
)
def test_a_rank_that_waited_gives_its_own_core_away(
    setting: int | str, cores: int, waiting: float, expected: int, make_recipe: MakeRecipe
) -> None:
    """The recipe has four lanes, and no more workers than that."""
    run = run_of(make_recipe(data={"workers": setting}), cores, waiting)
    workers.adapt_workers(run, 32)
    assert run.reader.workers == expected


def test_there_are_as_many_workers_as_memory_has_room_for(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(make_recipe(data={"workers": "auto", "cache": 0}), 5, 0.0)
    memory = [0] + [setattr(run.reader, "workers", count) or run.reader.memory(32) for count in range(1, 5)]
    assert memory == sorted(set(memory)), "every worker takes some"
    for available, expected in ((memory[4], 4), (memory[4] - 1, 3), (memory[2], 2), (1, 1)):
        monkeypatch.setattr(workers, "host_memory_available", lambda free=available: free)
        workers.adapt_workers(run, 32)
        assert run.reader.workers == expected
    monkeypatch.setattr(workers, "host_memory_available", lambda: 2 * memory[3])
    monkeypatch.setattr(workers, "ranks_per_node", lambda: 2)
    workers.adapt_workers(run, 32)
    assert run.reader.workers == 3, "each of two ranks has half"
