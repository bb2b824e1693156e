"""RunState: what survives a preemption comes back from JSON as it was."""

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.search import Decision, decide
from scaleprog.growth.space import Choice, Subnet
from scaleprog.state import RunState, decision_from_json, decision_to_json

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)
subnets = st.builds(Subnet, st.integers(1, 10**4), st.integers(1, 10**3))


def tuples(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(values, max_size=5).map(tuple)


decisions = st.builds(
    Decision,
    stage=st.integers(1, 20),
    candidates=tuples(subnets),
    losses=tuples(numbers),
    times=tuples(numbers),
    scores=tuples(st.none() | numbers),
    chosen=subnets,
    alpha=st.none() | numbers,
    complete_from=st.none() | counts,
    over=st.none() | numbers,
)
FIELDS = {
    "step": counts,
    "phase": st.integers(-1, 100),
    "growths": counts,
    "gated": tuples(tuples(st.booleans())),
    "decisions": st.lists(decisions, max_size=3),
    "measured": st.lists(st.dictionaries(subnets, numbers, max_size=4), max_size=3),
    "step_seconds": st.dictionaries(subnets, st.lists(numbers, max_size=4), max_size=4),
    "timed_on": st.text(max_size=8),
    "train_seconds": numbers,
    "train_cpu_seconds": numbers,
    "search_seconds": numbers,
    "wall_seconds": numbers,
    "images": counts,
    "accuracies": st.dictionaries(st.text(max_size=8), numbers, max_size=4),
    "due": st.lists(st.text(max_size=8), max_size=3),
    "best_step": counts,
    "best_top1": numbers,
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
    assert all(isinstance(s, Subnet) for s in [*restored.step_seconds, *(c.subnet for c in restored.choices)])
    assert list(restored.step_seconds) == list(state.step_seconds), "in the same order"
    assert json.dumps(restored.to_json(), allow_nan=False) == text


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
