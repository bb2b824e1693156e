"""The elastic supernet: sub-networks nest, each is what the operator would have built, sampling is fair."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.operators import RULES, grow, interpolation, stacking
from scaleprog.growth.phase import active_layers, sample
from scaleprog.growth.space import Subnet

OPERATORS = tuple(RULES)
SIZES = [(base, full) for full in range(1, 25) for base in range(1, full + 1)]
CANDIDATES = tuple(Subnet(r, d) for r in (128, 192, 224) for d in (6, 10, 12))


@pytest.mark.parametrize("operator", OPERATORS)
def test_sub_networks_nest(operator: str) -> None:
    for base, full in SIZES:
        smaller: set[int] = set()
        for depth in range(base, full + 1):
            active = active_layers(operator, base, full, depth)
            assert len(active) == depth
            assert list(active) == sorted(set(active))
            assert set(active) <= set(range(full))
            assert smaller <= set(active), (base, full, depth)
            smaller = set(active)
        assert smaller == set(range(full))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_sub_network_is_what_the_operator_would_have_built(operator: str) -> None:
    """Gates and weights included: the supernet cut down to a depth is the growth to that depth."""
    for base, full in SIZES:
        (supernet,) = grow(operator, (base,), (full,)).groups
        for depth in range(base, full + 1):
            active = active_layers(operator, base, full, depth)
            assert (tuple(supernet[i] for i in active),) == grow(operator, (base,), (depth,)).groups, (
                base,
                full,
                depth,
            )


def test_sources_of_the_active_layers() -> None:
    for base, full in SIZES:
        for depth in range(base, full + 1):
            where = (base, full, depth)
            for operator in ("interpolation", "identity", "mogrow"):
                active = active_layers(operator, base, full, depth)
                assert tuple(interpolation(base, full)[i] for i in active) == interpolation(base, depth), where
            active = active_layers("stacking", base, full, depth)
            assert tuple(stacking(base, full)[i] for i in active) == tuple(i % base for i in range(depth)), where
            assert active_layers("rand_init", base, full, depth) == tuple(range(depth)), where


@pytest.mark.parametrize("operator", ["interpolation", "identity", "mogrow"])
def test_the_base_is_the_first_appearance_of_every_layer_and_the_last_copies_join_first(operator: str) -> None:
    for base, full in SIZES:
        positions = [interpolation(base, full).index(i) for i in range(base)]
        assert list(active_layers(operator, base, full, base)) == positions
    # 4 -> 8 is 0 0 1 1 2 2 3 3: copies sit at 1, 3, 5, 7
    assert active_layers(operator, 4, 8, 5) == (0, 2, 4, 6, 7)
    assert active_layers(operator, 4, 8, 6) == (0, 2, 4, 5, 6, 7)
    assert active_layers(operator, 6, 8, 7) == (0, 1, 2, 3, 4, 6, 7)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("depth", [3, 9])
def test_depths_outside_the_supernet_are_refused(operator: str, depth: int) -> None:
    with pytest.raises(ValueError, match=f"4 to 8 layers has no Subnet of {depth}"):
        active_layers(operator, 4, 8, depth)


# ---- sampling


@pytest.mark.parametrize("seed", [0, 1, 2026])
def test_samples_are_uniform(seed: int) -> None:
    """Chi-square: 8 degrees of freedom exceed 40 once in 300,000 seeds, and those of 81 pairs 140 once in 25,000."""
    steps = 18_000
    drawn = [sample(CANDIDATES, seed, step) for step in range(steps)]
    counts = Counter(drawn)
    expected = steps / 9
    assert sum((counts[c] - expected) ** 2 / expected for c in CANDIDATES) < 40
    pairs = Counter(zip(drawn[::2], drawn[1::2]))
    expected = steps / 2 / 81
    assert sum((pairs[a, b] - expected) ** 2 / expected for a in CANDIDATES for b in CANDIDATES) < 140


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_a_sample_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    assert sample(CANDIDATES, seed, step) == sample(list(CANDIDATES), seed, step)
    assert sample(CANDIDATES[:1], seed, step) == CANDIDATES[0]


def test_seeds_and_steps_have_their_own_samples() -> None:
    def draws(seed: int, first: int) -> list[Subnet]:
        return [sample(CANDIDATES, seed, step) for step in range(first, first + 50)]

    assert draws(0, 0) != draws(1, 0)
    assert draws(0, 0) != draws(0, 1)
    assert draws(1, 1) != draws(11, 0)


def test_samples_are_the_same_for_ever() -> None:
    """Ranks and resumed runs must agree, whatever PYTHONHASHSEED: these choices may never change."""
    drawn = [CANDIDATES.index(sample(CANDIDATES, 2026, step)) for step in range(12)]
    assert drawn == [3, 6, 2, 5, 3, 5, 2, 7, 2, 1, 6, 4]
