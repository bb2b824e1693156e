"""Growth operators: every layer map for all 1 <= L <= N <= 24, against the paper's words."""

from itertools import groupby
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth import operators
from scaleprog.growth.operators import RULES, LayerMap, Origin, fresh, grow, interpolation, keep, stacking
from scaleprog.growth.phase import active_layers
from scaleprog.recipe.keys import Engine, Operator
from scaleprog.sharding import ENGINES, engine

SIZES = [(old, new) for new in range(1, 25) for old in range(1, new + 1)]
OPERATORS = tuple(RULES)


def interpolated(old: int, new: int) -> list[int]:
    """The paper's rule, followed literally: repeat the stack, one copy per layer and round, starting from the last."""
    copies, position = [1] * old, old - 1
    for _ in range(new - old):
        copies[position] += 1
        position = (position - 1) % old
    return [layer for layer in range(old) for _ in range(copies[layer])]


def sources(layer_map: LayerMap) -> list[list[int | None]]:
    return [[origin.source for origin in group] for group in layer_map.groups]


def test_interpolation_puts_copies_next_to_their_sources_from_the_last_on() -> None:
    for old, new in SIZES:
        assert list(interpolation(old, new)) == interpolated(old, new), (old, new)


def test_interpolation_has_the_counts_of_the_formula() -> None:
    for old, new in SIZES:
        runs = [(layer, len(list(run))) for layer, run in groupby(interpolation(old, new))]
        q, m = new // old, new % old
        assert runs == [(i, q) for i in range(old - m)] + [(i, q + 1) for i in range(old - m, old)], (old, new)


def test_examples() -> None:
    assert interpolation(6, 8) == (0, 1, 2, 3, 4, 4, 5, 5)
    assert interpolation(6, 12) == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    assert interpolation(3, 8) == (0, 0, 1, 1, 1, 2, 2, 2)
    assert stacking(6, 8) == (0, 1, 2, 3, 4, 5, 0, 1)
    assert stacking(3, 8) == (0, 1, 2, 0, 1, 2, 0, 1)


def test_stacking_repeats_the_old_stack() -> None:
    for old, new in SIZES:
        expected = (list(range(old)) * new)[:new]
        assert list(stacking(old, new)) == expected, (old, new)
        assert sources(grow("stacking", (old,), (new,))) == [expected]


def test_rand_init_keeps_the_old_layers_first() -> None:
    for old, new in SIZES:
        (group,) = grow("rand_init", (old,), (new,)).groups
        assert group[:old] == tuple(Origin(i, "online", 1) for i in range(old))
        assert group[old:] == (Origin(None, "fresh", 1),) * (new - old)


def test_identity_closes_exactly_the_added_copies() -> None:
    for old, new in SIZES:
        (group,) = grow("identity", (old,), (new,)).groups
        assert [o.source for o in group] == interpolated(old, new)
        first = [i == 0 or group[i - 1].source != o.source for i, o in enumerate(group)]
        assert [o.gate for o in group] == [1 if is_first else 0 for is_first in first], (old, new)
        assert sum(o.gate for o in group) == old


def test_mogrow_is_interpolation_of_the_ema_everywhere() -> None:
    for old, new in SIZES:
        grown = grow("mogrow", (old,), (new,))
        assert grown.groups == (tuple(Origin(i, "ema", 1) for i in interpolated(old, new)),)
        assert grown.rest == "ema"


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o != "mogrow"])
def test_the_others_read_online_weights(operator: str) -> None:
    for old, new in SIZES:
        grown = grow(operator, (old,), (new,))
        assert grown.rest == "online"
        assert {o.weights for o in grown.groups[0] if o.source is not None} == {"online"}
        if operator != "identity":
            assert {o.gate for o in grown.groups[0]} == {1}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_old_layer_survives_and_equal_depths_change_nothing(operator: str) -> None:
    for old, new in SIZES:
        grown = grow(operator, (old,), (new,))
        assert grown.depths == (new,)
        assert set(range(old)) <= set(sources(grown)[0])
        if old == new:
            assert sources(grown) == [list(range(old))]
            assert {o.gate for o in grown.groups[0]} == {1}


@pytest.mark.parametrize("operator", OPERATORS)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=4))
def test_groups_grow_independently(operator: str, sizes: list) -> None:
    old, new = [size for size, _ in sizes], [size + more for size, more in sizes]
    grown = grow(operator, old, new)
    assert grown.depths == tuple(new)
    for group, o, n in zip(grown.groups, old, new):
        assert (group,) == grow(operator, (o,), (n,)).groups


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("old", "new"), [((3,), (2,)), ((0,), (2,)), ((4, 5), (6, 4))])
def test_shrinking_and_growing_from_nothing_are_refused(operator: str, old: tuple, new: tuple) -> None:
    with pytest.raises(ValueError, match="never shrinks"):
        grow(operator, old, new)


@pytest.mark.parametrize("operator", OPERATORS)
def test_sources_of_a_smaller_stack_are_refused(operator: str) -> None:
    with pytest.raises(ValueError, match="cannot grow 5 layers into 4"):
        operators.sources(operator, 5, 4)


def test_groups_must_agree_in_number() -> None:
    with pytest.raises(ValueError, match="argument"):
        grow("mogrow", (2, 3), (4,))


def test_keep_only_drops_layers() -> None:
    layer_map = keep([(0, 2, 5), (1,)])
    assert sources(layer_map) == [[0, 2, 5], [1]]
    assert {(o.weights, o.gate) for group in layer_map.groups for o in group} == {("online", 1)}
    assert layer_map.rest == "online"


def test_fresh_reads_nothing() -> None:
    layer_map = fresh((3, 2))
    assert layer_map.depths == (3, 2)
    assert {(o.source, o.weights, o.gate) for group in layer_map.groups for o in group} == {(None, "fresh", 1)}
    assert layer_map.rest == "fresh"


def test_every_operator_has_a_rule_and_a_name_in_recipes() -> None:
    assert set(RULES) == set(get_args(Operator))


def test_unknown_operators_are_refused() -> None:
    for ask in (lambda: grow("stackng", (2,), (4,)), lambda: active_layers("stackng", 2, 4, 3)):
        with pytest.raises(ValueError, match="'stackng' is not a growth operator; choose from rand_init, stacking, "):
            ask()


def test_unknown_engines_are_refused() -> None:
    assert set(ENGINES) == set(get_args(Engine))
    with pytest.raises(ValueError, match="'fdsp' is not an engine; choose from fsdp, hsdp, zero, replicated"):
        engine("fdsp")
