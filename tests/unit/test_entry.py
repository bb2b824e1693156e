"""Layer maps by which the phases of a run are entered, executed on labels instead of weights."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.operators import LayerMap, grow
from scaleprog.growth.phase import Phase, undivided
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.space import Choice, Subnet
from scaleprog.recipe.keys import SubnetSettings
from tests.unit.schedules import D1, DEIT, OPERATORS, of, published, two_groups, unroll

Network = tuple[tuple[object, ...], ...]


def execute(layer_map: LayerMap, network: Network | None, fresh: str) -> Network:
    """A network of labels grown by a layer map: what each layer is made of."""
    assert network is None or len(network) == len(layer_map.groups)
    return tuple(
        tuple(fresh if o.source is None else network[g][o.source] for o in group)
        for g, group in enumerate(layer_map.groups)
    )


def expected_growth(operator: str, network: Network, depths: tuple[int, ...], fresh: str) -> Network:
    """Growth by the paper's words, on labels."""
    grown = []
    for group, depth in zip(network, depths):
        old = len(group)
        if operator == "rand_init":
            grown.append((*group, *[fresh] * (depth - old)))
        elif operator == "stacking":
            grown.append((group * depth)[:depth])
        else:
            q, m = divmod(depth, old)
            grown.append(tuple(label for i, label in enumerate(group) for _ in range(q + (i >= old - m))))
    return tuple(grown)


def map_of(schedule: Schedule, phases: Sequence[Phase], index: int) -> LayerMap | None:
    """The layer map of a phase's entry; None if the network stays."""
    entry = schedule.entry(phases, index)
    return None if entry is None else entry.layer_map


@pytest.mark.parametrize("split", [undivided, two_groups])
@pytest.mark.parametrize("operator", OPERATORS)
@given(data=st.data())
def test_a_recycled_run_grows_as_if_it_had_grown_straight_into_each_choice(
    operator: str, split: Callable[[int], tuple[int, ...]], data: st.DataObject
) -> None:
    """The supernet only ever adds what the operator would have added: its way in and out is the operator's growth."""
    schedule = of(D1, rule=data.draw(st.sampled_from(("all", "window"))), operator=operator, split=split)
    phases, _ = unroll(schedule, lambda phases: Choice(data.draw(st.sampled_from(phases[-1].candidates))))
    network: Network | None = None
    trained: Network | None = None  # after the last train phase
    for i, phase in enumerate(phases):
        layer_map = map_of(schedule, phases, i)
        if layer_map is None:
            assert phase.candidates == phases[i - 1].candidates
        else:
            network = execute(layer_map, network, f"fresh {phase.stage}")
        assert network is not None
        depths = split(phase.network.depth)
        assert tuple(len(group) for group in network) == depths
        if phase.kind == "supernet":
            assert layer_map.rest == ("ema" if operator == "mogrow" and i else "online" if i else "fresh")
            continue
        if i and phases[i - 1].searched:
            assert layer_map.rest == "online", "weights are recycled as the search left them"
            assert {(o.weights, o.gate) for group in layer_map.groups for o in group} == {("online", 1)}
        if trained is not None:
            assert network == expected_growth(operator, trained, depths, f"fresh {phase.stage}")
        trained = network = tuple(tuple((phase.stage, label) for label in group) for group in network)


@pytest.mark.parametrize("split", [undivided, two_groups])
@pytest.mark.parametrize("operator", OPERATORS)
@given(data=st.data())
def test_without_recycling_a_stage_grows_the_network_from_before_its_search(
    operator: str, split: Callable[[int], tuple[int, ...]], data: st.DataObject
) -> None:
    rule = data.draw(st.sampled_from(("all", "window")))
    schedule = of(D1, rule=rule, operator=operator, split=split, recycle=False)
    phases, _ = unroll(schedule, lambda phases: Choice(data.draw(st.sampled_from(phases[-1].candidates))))
    trained: Network | None = None
    for i, phase in enumerate(phases):
        layer_map = map_of(schedule, phases, i)
        depths = split(phase.network.depth)
        if i == 0 or (i == 1 and phases[0].searched):
            assert layer_map.rest == "fresh"
            network = execute(layer_map, None, "new")
            assert network == tuple(("new",) * depth for depth in depths)
        elif layer_map is None:
            assert not phases[i - 1].searched, "after a search the network is the supernet: it must be left"
            assert phase.candidates == phases[i - 1].candidates
            network = trained
        else:
            network = execute(layer_map, trained, "new")
            assert layer_map.rest == ("ema" if operator == "mogrow" else "online")
            assert network == expected_growth(operator, trained, depths, "new")
        if phase.kind == "train":
            trained = network


def test_a_search_that_chooses_the_network_it_started_from_still_leaves_the_supernet() -> None:
    """Without recycling: 128 px, 6 layers again, after a search whose network has 12 layers."""
    schedule = of(rule="all", recycle=False, operator="interpolation")
    again = Subnet(128, 6)
    phases = schedule.phases([Choice(again)] * 2)
    assert phases[2].network == DEIT
    assert phases[3].candidates == phases[1].candidates == (again,)
    entry = schedule.entry(phases, 3)
    assert entry is not None, "None would train on in the supernet"
    assert [o.source for o in entry.layer_map.groups[0]] == list(range(6))
    assert entry.rewind_to == phases[2].start, "the network from before the search grows"


@pytest.mark.parametrize("operator", OPERATORS)
def test_entry_of_a_linear_run(operator: str) -> None:
    schedule = of(schedule="linear", operator=operator)
    phases = schedule.phases([])
    first = map_of(schedule, phases, 0)
    assert first.depths == (6,)
    assert first.rest == "fresh"
    for i, (old, new) in enumerate(((6, 8), (8, 10), (10, 12)), 1):
        assert map_of(schedule, phases, i) == grow(operator, (old,), (new,))


def test_entry_is_none_where_the_network_stays() -> None:
    sizes = ((128, 6), (128, 6), (160, 6), (224, 12))
    schedule = of(schedule=tuple(SubnetSettings(resolution=r, depth=d) for r, d in sizes))
    entries = [map_of(schedule, schedule.phases([]), i) for i in range(4)]
    assert [entry is None for entry in entries] == [False, True, False, False]
    assert entries[2] == grow("mogrow", (6,), (6,)), "a growth in resolution alone reads the EMA too"
    automatic = of()
    phases = automatic.phases([Choice(DEIT)])  # the first search chose the full network
    assert map_of(automatic, phases, 1).depths == (12,), "the search's network is left once"
    assert [automatic.entry(phases, i) for i in (2, 3, 4)] == [None] * 3


def test_identity_opens_no_gate_on_the_way_out_of_a_supernet() -> None:
    schedule = of(operator="identity")
    phases = schedule.phases(published((128, 6), (160, 8)))
    into, out = map_of(schedule, phases, 2), map_of(schedule, phases, 3)
    assert [o.gate for o in into.groups[0]] == [1, 0] * 6
    assert [o.source for o in out.groups[0]] == [0, 2, 4, 6, 8, 9, 10, 11]


def test_the_checkpoint_from_before_a_search_is_needed_until_what_follows_it_has_trained() -> None:
    schedule = of(rule="all", recycle=False)
    choices = published((128, 6), (160, 10), (192, 12))
    phases = schedule.phases(choices)
    for index, phase in enumerate(phases):
        entry, needed = schedule.entry(phases, index), schedule.rewinds_to(choices, phase)
        if entry is not None and entry.rewind_to is not None:
            assert needed == entry.rewind_to == phases[index - 1].start
            assert schedule.rewinds_to(choices[: index // 2], phases[index - 1]) == needed, "before it is decided, too"
        assert (needed is None) == (not phase.searched and (index == 0 or not phases[index - 1].searched))
        assert of(rule="all").rewinds_to(choices, phase) is None
