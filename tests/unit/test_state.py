"""RunState: what survives a preemption comes back from JSON as it was."""

import dataclasses
import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprog.errors import CheckpointError
from scaleprog.growth.search import Decision, decide
from scaleprog.growth.space import Choice, Subnet
from scaleprog.rundir.old_names import FIRST_STATE
from scaleprog.rundir.state import RunState, decision_from_json, decision_to_json

numbers = st.floats(0, 1e12)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
percents = st.floats(0, 100)
counts = st.integers(0, 2**60)
subnets = st.builds(Subnet, st.integers(1, 10**4), st.integers(1, 10**3))


def tuples(values: st.SearchStrategy, size: int | None = None) -> st.SearchStrategy:
    return st.lists(values, min_size=size or 0, max_size=5 if size is None else size).map(tuple)


def of_candidates(count: int) -> st.SearchStrategy[Decision]:
    return st.builds(
        Decision,
        stage=st.integers(1, 20),
        candidates=tuples(subnets, count),
        losses=tuples(positive, count),
        times=tuples(positive, count),
        scores=tuples(st.none() | st.floats(allow_nan=False, allow_infinity=False), count),
        chosen=subnets,
        alpha=st.none() | numbers,
        complete_from=st.none() | counts,
        why=st.none() | st.text(max_size=8),
    )


decisions = st.integers(0, 5).flatmap(of_candidates)
FIELDS = {
    "step": counts,
    "phase": st.integers(-1, 100),
    "growths": counts,
    "gated": tuples(tuples(st.booleans())),
    "decisions": st.lists(decisions, max_size=3),
    "last_search": st.tuples(counts, counts),
    "measured": st.lists(st.dictionaries(subnets, positive, max_size=4), max_size=3),
    "errors": st.dictionaries(subnets, numbers, max_size=4),
    "step_seconds": st.dictionaries(subnets, st.lists(numbers, min_size=1, max_size=4), max_size=4),
    "timed_on": st.text(max_size=8),
    "train_seconds": numbers,
    "train_cpu_seconds": numbers,
    "search_seconds": numbers,
    "wall_seconds": numbers,
    "images": counts,
    "accuracies": st.dictionaries(st.text(max_size=8), percents, max_size=4),
    "pending": st.lists(st.text(max_size=8), max_size=3),
    "best_step": counts,
    "best_top1": percents,
    "skipped": st.lists(counts, max_size=3),
    "damaged": st.lists(st.text(min_size=1, max_size=8), max_size=3),
    "arithmetic": st.integers(1, 10**6),
    "weights": st.just("") | st.text("0123456789abcdef", min_size=64, max_size=64),
    "data": st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
}


def test_every_field_is_tried() -> None:
    assert set(FIELDS) == {f.name for f in dataclasses.fields(RunState)}


@given(st.builds(RunState, **FIELDS))
def test_a_state_survives_json(state: RunState) -> None:
    text = json.dumps(state.to_json(), allow_nan=False)
    restored = RunState.from_json(json.loads(text))
    assert restored == state
    assert type(restored.gated) is tuple
    assert all(type(group) is tuple for group in restored.gated)
    assert type(restored.last_search) is tuple
    assert all(isinstance(s, Subnet) for s in [*restored.step_seconds, *(c.subnet for c in restored.choices)])
    assert list(restored.step_seconds) == list(state.step_seconds), "in the same order"
    assert json.dumps(restored.to_json(), allow_nan=False) == text


# ---- what may be anything

SUBNET = [16, 2]
MADE = Decision(1, (Subnet(16, 2), Subnet(32, 4)), (2.0, 1.0), (1.0, 3.0), (None, 0.5), Subnet(16, 2), 0.5, 7, "free")
DECISION = json.loads(json.dumps(decision_to_json(MADE)))
NOTHING: dict[str, list[Any]] = {  # by key, values that it cannot have
    "step": [-1, 1.5, "1", None, True, 2**70, [], {}, math.nan],
    "phase": [-2, 2**40, "0", False],
    "growths": [-1, 0.5, None],
    "gated": [True, [True], [[1]], [["no"]], [[None]], {}, [[False] * 20_000], "[]"],
    "decisions": [{}, [None], [[]], [{}], "[]", [DECISION | {"stage": -1}], [DECISION | {"losses": [1.0]}],
                  [DECISION | {"losses": [2.0, math.inf]}], [DECISION | {"losses": [2.0, -1.0]}],
                  [DECISION | {"times": [0.0, 1.0]}], [DECISION | {"times": ["1", 1.0]}],
                  [DECISION | {"candidates": [SUBNET, [16]]}], [DECISION | {"candidates": [SUBNET, [0, -3]]}],
                  [DECISION | {"scores": [math.nan, 1.0]}], [DECISION | {"chosen": [16, 2, 3]}],
                  [DECISION | {"chosen": 3}], [DECISION | {"alpha": "0.5"}], [DECISION | {"complete_from": -1}],
                  [DECISION | {"complete_from": 0.5}], [DECISION | {"why": 3}], [DECISION] * 20_000],
    "last_search": [3, None, [], [1], [0, 0, 0], [-1, 3], [0.5, 3], ["1", 3], {}],
    "measured": [3, {}, [3], [[3]], [[SUBNET]], [[[16, 2, math.nan]]], [[[16, 2, 0.0]]], [[[16, 2, "1"]]],
                 [[[16.5, 2, 1.0]]], [[[16, 2, 1.0], [16, 2, 2.0]]], [[[2**30, 2, 1.0]]]],
    "errors": [{}, [[16, 2, -1.0]], [[16, 2, math.nan]], [[16, 2, 1.0], [16, 2, 1.0]], [[16, 2]]],
    "step_seconds": [{}, [[16, 2, 1.0]], [[16, 2, []]], [[16, 2, [-1.0]]], [[16, 2, [math.inf]]], [[[], 2, [1.0]]]],
    "timed_on": [None, 3, [], "x" * 20_000, "\ud800"],
    "train_seconds": [-1.0, math.inf, math.nan, 1e300, "1", None, True, 10**400],
    "train_cpu_seconds": [-1e-9, math.nan],
    "search_seconds": [[], -1],
    "wall_seconds": [1e13, -0.5],
    "images": [-1, 1.0, 2**61],
    "accuracies": [[], None, 3, {"top1": -1}, {"top1": 101}, {"top1": math.nan}, {"top1": "9"}, {"top5_ema": 101},
                   {"val_loss": -1.0}, {"val_loss": math.inf},
                   {str(i): 1.0 for i in range(1001)}],
    "pending": ["choice", [None], [1], {}, ["choice"] * 20_000],
    "best_step": [-1, None, 0.5],
    "best_top1": [-1, 100.5, math.nan, "100"],
    "skipped": [3, None, [-1], [0.5], ["3"], {}, [1] * 20_000],
    "damaged": [3, None, "x", [3], [None], [""], ["x" * 257], {}, ["x"] * 20_000],
    "arithmetic": [0, -1, 1.5, "1", None, True, 2**70],
    "weights": [None, 3, "abc", "G" * 64, ["0" * 64]],
    "data": [[], None, {"train": 3}, {"train": None}, {"train": ["x"]}, {"train": "x" * 101}, {"x" * 101: ""},
             {str(i): "" for i in range(5)}],
}  # fmt: skip


def test_what_no_state_can_be_is_refused_by_its_key() -> None:
    assert NOTHING.keys() == {f.name for f in dataclasses.fields(RunState)}
    values = RunState().to_json()
    RunState.from_json(values | {"decisions": [DECISION]})
    RunState.from_json(values | {"accuracies": {"top1": 100.0, "val_loss": 700.0, "val_loss_ema_1": 101.0}})
    for key, strange in NOTHING.items():
        for value in strange:
            with pytest.raises(CheckpointError, match=rf"^state: .*{key}|^state: decision 0|^state: more than 1000 "):
                RunState.from_json(values | {key: value})
        if key not in FIRST_STATE:
            with pytest.raises(CheckpointError, match=f"^state: '{key}' is missing"):
                RunState.from_json({name: value for name, value in values.items() if name != key})
    with pytest.raises(CheckpointError, match=r"^state: '\\x1b' is unknown"):
        RunState.from_json(values | {"\x1b": 1})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.data(), st.builds(RunState, **FIELDS))
def test_no_value_anywhere_in_a_state_ends_in_anything_but_a_state_or_a_refusal(
    data: st.DataObject, state: RunState
) -> None:
    values = json.loads(json.dumps(state.to_json()))
    place, inner = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(place[inner], list | dict) and place[inner] and data.draw(st.booleans()):
        place = place[inner]
        inner = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    place[inner] = data.draw(anything)
    with suppress(CheckpointError):
        json.dumps(RunState.from_json(values).to_json(), allow_nan=False)


@given(decisions)
def test_a_decision_survives_json(decision: Decision) -> None:
    restored = decision_from_json(json.loads(json.dumps(decision_to_json(decision))))
    assert restored == decision
    assert hash(restored) == hash(decision), "tuples are tuples again: decisions compare across ranks"


def test_a_decision_of_the_search_is_plain_values() -> None:
    """NumPy's numbers would not go into JSON."""
    losses = {Subnet(128, 6): 2.5, Subnet(160, 8): 2.0, Subnet(192, 10): 1.9}
    times = {Subnet(128, 6): 0.1, Subnet(160, 8): 0.2, Subnet(192, 10): 0.4}
    decision = decide(1, [losses, losses], times)
    assert decision_from_json(json.loads(json.dumps(decision_to_json(decision)))) == decision


@given(st.lists(decisions, max_size=4))
def test_choices_are_those_of_the_decisions(made: list[Decision]) -> None:
    assert RunState(decisions=made).choices == [Choice(d.chosen, d.complete_from) for d in made]


def test_a_new_run_stands_before_its_first_phase() -> None:
    state = RunState.from_json(json.loads(json.dumps(RunState().to_json())))
    assert (state.step, state.phase, state.growths, state.choices) == (0, -1, 0, [])
    state.decisions.append("mine")
    assert RunState().decisions == []


def test_a_state_of_the_first_version_knows_neither_its_arithmetic_nor_its_data() -> None:
    values = RunState(step=3, data={"train": "160 samples, 0"}).to_json()
    old = RunState.from_json({key: value for key, value in values.items() if key not in ("arithmetic", "data")})
    assert (old.step, old.arithmetic, old.data) == (3, 1, {})


def test_a_state_of_earlier_names_is_read() -> None:
    values = RunState(step=3, pending=["evaluation"]).to_json()
    old = {"due" if key == "pending" else key: value for key, value in values.items()}
    assert RunState.from_json(old) == RunState(step=3, pending=["evaluation"])
    with pytest.raises(CheckpointError, match="'due' is unknown"):
        RunState.from_json(values | {"due": []})
