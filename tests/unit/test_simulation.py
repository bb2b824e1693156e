"""Runs under simulated faults: the books balance, each fault costs what it should, and `simulate` prints all of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import ScaleprogError
from scaleprog.planning.faults import CAUSES, LLAMA3_NODE_DAYS, FaultRates
from scaleprog.planning.interval import DAY, estimated_mtbf, young_daly
from scaleprog.planning.limits import FAULTS, RUNS, TARGET, limit
from scaleprog.planning.simulation import (
    CRASH,
    FIRST,
    NODE,
    PREEMPTION,
    QUEUE,
    REPEATED,
    START_UP,
    Scenario,
    simulate,
)
from scaleprog.recipe import Recipe
from scaleprog.recipe.worlds import Worlds
from tests.unit.command import Command, WriteRecipe, is_mistake

CALM = Scenario(
    nodes=4, training=1000.0, crash=0.0, hang=0.0, preemption=0.0, node=0.0, crash_detection=5.0, hang_detection=50.0,
    node_detection=9.0, leaving=3.0, queue_least=30.0, queue_mean=0.0, start_up=20.0, reading=2.0, interval=100.0,
    pause=1.0, save=7.0,
)  # fmt: skip
OFTEN = 1000 * DAY / 4 / 400  # a fault every 400 s on 4 nodes, per 1,000 node-days


def test_without_faults_a_run_pays_for_its_start_and_its_saves() -> None:
    outcome = simulate(CALM, 3, 0)
    assert outcome.wall.tolist() == [20 + 1000 + 9 * 1] * 3, "the last save is part of the end"
    assert outcome.mean == 1000 / 1029
    assert outcome.confidence == outcome.spread == (outcome.mean, outcome.mean)
    blocking = simulate(replace(CALM, asynchronous=False), 1, 0)
    assert blocking.wall.tolist() == [20 + 1000 + 9 * (1 + 7)]
    crowded = simulate(replace(CALM, save=150.0), 1, 0)
    assert crowded.wall.tolist() == [20 + 1000 + 9 * (1 + 50)], "a save waits for the one before"


@pytest.mark.parametrize(
    "changes", [{}, {"in_job": False}, {"asynchronous": False}, {"spare_nodes": 2, "repair": 900.0}, {"save": 180.0}]
)
def test_every_second_of_the_wall_time_is_in_the_books(changes: dict[str, Any]) -> None:
    each = OFTEN / 4
    stormy = replace(CALM, training=4000.0, crash=each, hang=each, preemption=each, node=each, **changes)
    outcome = simulate(stormy, 40, 1)
    assert outcome.finished == 1
    assert outcome.trained.tolist() == pytest.approx([4000.0] * 40)
    spent = outcome.trained + outcome.stalls + outcome.costs.sum((1, 2))
    assert outcome.wall.tolist() == pytest.approx(spent.tolist())
    assert min(outcome.counts().values()) > 1, "every cause has struck"
    assert outcome.costs.min() >= 0
    shares = outcome.shares()
    assert sum(sum(parts.values()) for parts in shares.values()) == pytest.approx(
        1 - outcome.trained.sum() / outcome.wall.sum()
    )


def test_what_each_fault_costs() -> None:
    crashing = simulate(replace(CALM, training=40_000.0, crash=OFTEN), 50, 0)
    faults = crashing.faults[:, CRASH].sum()
    assert crashing.costs[:, CRASH, 0].sum() == pytest.approx(5 * faults), "seconds of detection"
    assert crashing.costs[:, CRASH, QUEUE].sum() == 0, "the ranks start again on their nodes"
    assert 50 < crashing.costs[:, CRASH, REPEATED].sum() / faults < 62, "half an interval, and half a cycle of a save"
    requeued = simulate(replace(CALM, training=40_000.0, crash=OFTEN, in_job=False), 50, 0)
    assert requeued.costs[:, CRASH, QUEUE].sum() == pytest.approx(30 * requeued.faults.sum())
    stopped = simulate(replace(CALM, training=40_000.0, preemption=OFTEN), 50, 0)
    assert stopped.costs[:, PREEMPTION, REPEATED].sum() == pytest.approx(0, abs=1e-6), "a checkpoint of the last step"
    assert stopped.costs[:, PREEMPTION, QUEUE].sum() == pytest.approx(30 * stopped.faults.sum())
    assert crashing.costs[:, FIRST, START_UP].max() == 20


def test_a_spare_node_takes_the_place_of_a_lost_one_until_none_is_left() -> None:
    losing = replace(CALM, training=20_000.0, node=OFTEN, spare_nodes=1, repair=1e9)
    outcome = simulate(losing, 30, 0)
    lost = outcome.faults[:, NODE]
    assert outcome.costs[:, NODE, QUEUE].tolist() == pytest.approx((30 * (lost // 2)).tolist()), "every other one"
    soon = simulate(replace(losing, repair=0.0), 30, 0)
    assert soon.costs[:, NODE, QUEUE].sum() == 0
    none = simulate(replace(losing, spare_nodes=0), 30, 0)
    assert none.costs[:, NODE, QUEUE].sum() == pytest.approx(30 * none.faults.sum())


def test_a_run_that_cannot_get_on_ends_unfinished() -> None:
    hopeless = simulate(replace(CALM, crash=1e9), 2, 0, most_faults=50)
    assert hopeless.finished == 0
    assert hopeless.faults.sum(1).tolist() == [50] * 2
    assert hopeless.mean < 0.01


def test_a_seed_gives_the_same_runs_and_another_one_others() -> None:
    stormy = replace(CALM, crash=OFTEN)
    assert simulate(stormy, 5, 3).wall.tolist() == simulate(stormy, 5, 3).wall.tolist()
    assert simulate(stormy, 5, 3).wall.tolist() != simulate(stormy, 5, 4).wall.tolist()


# ---- the interval


def test_young_and_daly() -> None:
    assert young_daly(pause=2.0, mtbf=3600.0, save=0.0) == 120
    assert young_daly(pause=2.0, mtbf=3600.0, save=500.0) == 500, "the next save would wait"
    stormy = replace(CALM, training=50_000.0, crash=OFTEN, save=1.0)
    best = stormy.with_best_interval()
    assert best.interval == math.sqrt(2 * 1 * 400)
    found = [simulate(replace(best, interval=best.interval * by), 200, 0).mean for by in (0.25, 1, 4)]
    assert found[1] > max(found[0], found[2])
    assert CALM.best_interval == CALM.training
    assert replace(CALM, preemption=OFTEN).best_interval == CALM.training, "it loses no steps"


def test_the_mtbf_of_a_run_begins_with_a_prior_and_follows_its_faults() -> None:
    assert estimated_mtbf(0, 0.0, 1) == DAY
    assert estimated_mtbf(0, 0.0, 2048) == pytest.approx(54 * DAY / 419), "as Llama 3's"
    assert estimated_mtbf(3, 3 * 3600.0, 1) == (DAY + 3 * 3600) / 4
    assert estimated_mtbf(0, 9 * DAY, 1) == 10 * DAY


# ---- rates


def test_llama3s_rates_are_419_faults_in_54_days_on_2048_nodes() -> None:
    rates = FaultRates.parse("llama3", 8).rates
    assert sum(rates.values()) * LLAMA3_NODE_DAYS / 1000 == pytest.approx(419)
    assert rates["node"] / sum(rates.values()) == pytest.approx(0.78 + 32 / 419, abs=0.01), "hardware, maintenance"
    assert FaultRates.parse("llama3", 4).rates["node"] == rates["node"] / 2, "in proportion to the GPUs"
    assert FaultRates.parse("none", 8).rates == dict.fromkeys(CAUSES, 0)
    assert FaultRates.parse("crash=2, node=1e-1", 8).rates == {"crash": 2, "hang": 0, "preemption": 0, "node": 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "crash=2.5,node=1; or llama3, or none"),
        ("lama3", "'lama3' is not NAME=NUMBER"),
        ("crash", "'crash' is not NAME=NUMBER"),
        ("crash=1,crash=2", "crash appears twice"),
        ("crash=-1", "crash='-1' is not a number from 0 to 1e+09"),
        ("crash=nan", "crash='nan' is not a number"),
        ("crash=1e10", "crash='1e10' is not a number"),
        ("crash=", "crash='' is not a number"),
        ("crash=1,", "'' is not NAME=NUMBER"),
    ],
)
def test_rates_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ScaleprogError) as caught:
        FaultRates.parse(text, 8)
    assert message in str(caught.value)


# ---- limits


@pytest.mark.parametrize("changes", [{}, {"node": OFTEN / 10}])
def test_the_limit_of_an_input_is_where_the_target_breaks(changes: dict[str, Any]) -> None:
    scenario = replace(CALM, training=100_000.0, crash=OFTEN / 100, **changes)
    at = limit(scenario, "node", 0).value
    assert at is not None
    short = replace(scenario, training=min(scenario.training, FAULTS / scenario.rates.sum()))
    kept, broken = (simulate(replace(short, node=at * by), RUNS, 0).mean for by in (1, 1.02))
    assert kept >= TARGET > broken


@pytest.mark.parametrize("crash", [OFTEN / 100, 0.0])
def test_an_interval_that_is_too_short_has_the_limit_of_long_ones(crash: float) -> None:
    scenario = replace(CALM, training=100_000.0, crash=crash, pause=10.0)
    assert simulate(scenario, 10, 0).mean < TARGET, "a save of 10 s every 100 s"
    long = limit(scenario, "interval", 0)
    assert long.reached
    assert (long.value is None) if crash == 0 else long.value >= scenario.best_interval


def test_an_input_without_a_limit() -> None:
    bad = replace(CALM, training=100_000.0, crash=OFTEN)
    assert limit(bad, "reading", 0).reached is False, "no value is low enough"
    for name, tuned in (("reading", replace(bad, reading=0.0)), ("interval", bad.with_best_interval())):
        assert limit(tuned, name, 0).reached is False, "nor is the best, where that is the present one"
    calm = limit(CALM, "reading", 0)
    assert (calm.value, calm.reached) == (None, True), "a run without faults reads no checkpoint"


# ---- the command


def test_simulate_prints_every_input_with_its_origin(command: Command, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(checkpoint={"every_steps": 100, "every_minutes": None}, train={"patience": 3})
    arguments = ["simulate", recipe, "--nodes", 64, "--step-seconds", 0.5, "--days", 2, "--runs", 20]
    told = command(*arguments, "--faults", "crash=100,node=20", "--assume", "start_up=300")
    assert told.code == 0, told
    for name in (*CAUSES, "start_up", "pause", "save", "reading", "queue_mean", "interval", "spare_nodes", "training"):
        assert f" {name} " in told.out
    assert "95 % confidence of the mean" in told.out
    found = json.loads(command(*arguments, "--faults", "crash=100,node=20", "--assume", "start_up=300", "--json").out)
    values = {each["name"]: each for each in found["inputs"]}
    assert all(each["origin"] for each in values.values())
    assert (values["interval"]["value"], values["training"]["value"]) == (50, 2 * DAY)
    assert values["hang_detection"]["value"] == 182, "three minutes, and until all ranks have ended"
    assert (values["start_up"]["value"], values["start_up"]["origin"]) == (300, "asked, by --assume")
    assert found["confidence"][0] < found["effective"] < found["confidence"][1]
    assert found["faults"]["crash"] == pytest.approx(0.1 * 64 * found["wall_seconds"] / DAY, rel=0.3)
    gone = sum(sum(parts.values()) for parts in found["costs"].values())
    assert found["effective"] == pytest.approx(1 - gone, abs=0.005)
    others = found["alternatives"]
    assert (
        others["plain requeueing, no asynchronous save"] < others["as asked"] < others["in-job restart, 8 spare nodes"]
    )


def test_simulate_models_the_step_of_a_batch_that_fits_the_ranks(command: Command, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    lanes, batch = Worlds.of(Recipe.load(recipe)).fitted(24)
    told = command("simulate", recipe, "--nodes=3", "--faults=none", "--steps=100", "--device=cpu", "--json")
    found = {each["name"]: each for each in json.loads(told.out)["inputs"]}
    assert f"data.lanes={lanes} train.batch={batch}, because" in found["step"]["origin"]
    assert found["training"]["value"] == pytest.approx(100 * found["step"]["value"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults=lama3"], "--faults: 'lama3'"),
        (["--days=1", "--steps=1"], "--days and --steps both say how long"),
        (["--days=nan"], "--days nan: use a number above 0"),
        (["--days=0"], "--days 0: use a number above 0"),
        (["--step-seconds=inf"], "--step-seconds inf: use a number above 0"),
        (["--restart=both"], "--restart: 'both' is neither in-job nor requeue"),
        (["--assume=startup=3"], "'startup=3' is not NAME=NUMBER with one of the names crash_detection,"),
        (["--device=b200"], "unknown device 'b200'"),
    ],
)
def test_mistakes_of_simulate(
    arguments: list[str], message: str, command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    assert is_mistake(command("simulate", write_recipe(), *arguments), message)
