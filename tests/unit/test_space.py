"""The growth space: which sizes a network may take, and which of them a search looks at."""

import math
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.space import GrowthSpace, Subnet, ladder
from scaleprog.models.cost import parameters
from scaleprog.models.vit import ElasticViT
from scaleprog.recipe.keys import ModelSettings

DEIT = GrowthSpace((128, 160, 192, 224), (6, 8, 10, 12))


def subnets(*sizes: tuple[int, int]) -> tuple[Subnet, ...]:
    return tuple(Subnet(*size) for size in sizes)


def grid(resolutions: tuple[int, ...], depths: tuple[int, ...]) -> tuple[Subnet, ...]:
    return tuple(Subnet(r, d) for r in sorted(resolutions) for d in sorted(depths))


@st.composite
def spaces(draw: st.DrawFn) -> GrowthSpace:
    """As `of` builds them: ascending, without duplicates, up to 8 of each."""
    resolutions = draw(st.sets(st.integers(1, 40), min_size=1, max_size=8))
    depths = draw(st.sets(st.integers(1, 40), min_size=1, max_size=8))
    return GrowthSpace(tuple(sorted(resolutions)), tuple(sorted(depths)))


# ---- the ladder


@pytest.mark.parametrize(
    ("full", "smallest", "multiple", "expected"),
    [
        ((224, 12), 0.5, 32, [(128, 6), (160, 8), (192, 10), (224, 12)]),
        ((224, 12), 0.5, 16, [(112, 6), (144, 8), (192, 10), (224, 12)]),
        ((28, 8), 0.5, 4, [(16, 4), (20, 5), (24, 7), (28, 8)]),
        ((28, 8), 0.4, 4, [(12, 3), (16, 5), (24, 6), (28, 8)]),
        ((224, 18), 0.5, 32, [(128, 9), (160, 12), (192, 15), (224, 18)]),
        ((224, 24), 0.5, 32, [(128, 12), (160, 16), (192, 20), (224, 24)]),
    ],
)
def test_the_published_ladders(full: tuple, smallest: float, multiple: int, expected: list) -> None:
    assert ladder(Subnet(*full), smallest, 4, multiple) == subnets(*expected)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 100), st.integers(1, 8), st.sampled_from((1, 4, 16, 32)))
def test_ladder_rounds_exact_ratios_with_halves_up(
    units: int, depth: int, percent: int, stages: int, multiple: int
) -> None:
    """Computed in fractions, where 0.7 * 10 is 7 and a half is a half."""
    full = Subnet(units * multiple, depth)
    first = Fraction(percent, 100)
    expected = []
    for k in range(stages):
        ratio = first + (1 - first) * Fraction(k, stages - 1) if stages > 1 else Fraction(1)
        units_k = max(1, math.floor(ratio * units + Fraction(1, 2)))
        expected.append(Subnet(units_k * multiple, max(1, math.floor(ratio * depth + Fraction(1, 2)))))
    assert ladder(full, percent / 100, stages, multiple) == tuple(expected)


@given(st.integers(1, 400), st.integers(1, 60), st.floats(0.01, 1), st.integers(1, 8), st.integers(1, 64))
def test_ladder_ascends_to_the_full_network(
    resolution: int, depth: int, smallest: float, stages: int, multiple: int
) -> None:
    """Also where the full resolution is no multiple: nothing exceeds it."""
    full = Subnet(resolution, depth)
    steps = ladder(full, smallest, stages, multiple)
    assert len(steps) == stages
    assert steps[-1] == full
    for dimension in ([s.resolution for s in steps], [s.depth for s in steps]):
        assert dimension == sorted(dimension)
        assert dimension[0] >= 1
    assert all(s.resolution % multiple == 0 or s.resolution == resolution for s in steps)


def test_ratio_one_is_the_full_network_throughout() -> None:
    assert ladder(Subnet(224, 12), 1.0, 3, 32) == (Subnet(224, 12),) * 3


# ---- candidates


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_space_is_the_product_without_duplicates(sizes: list) -> None:
    space = GrowthSpace.of([Subnet(*size) for size in sizes])
    assert list(space.resolutions) == sorted(set(space.resolutions))
    assert list(space.depths) == sorted(set(space.depths))
    assert set(product(space.resolutions, space.depths)) == {(r, d) for r, _ in sizes for _, d in sizes}


def test_ladder_duplicates_drop_out_of_the_space() -> None:
    steps = ladder(Subnet(64, 3), 0.5, 4, 32)
    assert steps == subnets((32, 2), (32, 2), (64, 3), (64, 3))
    assert GrowthSpace.of(steps) == GrowthSpace((32, 64), (2, 3))


@given(spaces(), st.data())
def test_candidates_are_members_in_ascending_order(space: GrowthSpace, data: st.DataObject) -> None:
    members = grid(space.resolutions, space.depths)
    previous = data.draw(st.none() | st.sampled_from(members))
    for rule in ("all", "window"):
        found = space.candidates(previous, rule)
        assert found
        assert set(found) <= set(members)
        assert list(found) == sorted(set(found)), "ascending, none twice"
        if previous is not None:
            assert all(s.depth >= previous.depth for s in found), "eq. 8: a network never loses parameters"


def test_all_is_equation_8_by_counted_parameters() -> None:
    model = ModelSettings(name="deit_tiny_patch16_224", width=16, heads=2, classes=5, resolution=64)
    space = GrowthSpace((32, 48, 64), (1, 2, 4, 5))
    members = grid(space.resolutions, space.depths)
    count = {depth: parameters(ElasticViT, model, depth) for depth in space.depths}
    assert space.candidates(None, "all") == members
    for previous in members:
        expected = tuple(s for s in members if count[s.depth] >= count[previous.depth])
        assert space.candidates(previous, "all") == expected


def test_corners_are_either_dimension_as_it_is_or_complete() -> None:
    assert DEIT.candidates(None, "corners") == grid((128, 224), (6, 12))
    assert DEIT.candidates(Subnet(160, 8), "corners") == grid((160, 224), (8, 12))
    assert DEIT.candidates(Subnet(160, 12), "corners") == grid((160, 224), (12,))
    assert DEIT.candidates(Subnet(224, 12), "corners") == grid((224,), (12,))


@pytest.mark.parametrize(
    ("previous", "resolutions", "depths"),
    [
        (None, (128, 192, 224), (6, 10, 12)),
        ((128, 6), (128, 160), (8, 10, 12)),
        ((128, 8), (128, 160), (10, 12)),
        ((160, 10), (160, 192), (12,)),
        ((192, 6), (192, 224), (8, 10, 12)),
        ((128, 12), (128, 160), (12,)),
        ((224, 8), (224,), (10, 12)),
        ((224, 12), (224,), (12,)),
    ],
)
def test_window_of_the_published_space(previous: tuple | None, resolutions: tuple, depths: tuple) -> None:
    found = DEIT.candidates(None if previous is None else Subnet(*previous), "window")
    assert found == grid(resolutions, depths)


def test_window_takes_no_more_than_three_depths_and_two_resolutions() -> None:
    space = GrowthSpace((1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7))
    assert space.candidates(Subnet(2, 2), "window") == grid((2, 3), (3, 4, 5))
    assert space.candidates(None, "window") == grid((1, 3, 5), (1, 4, 7))


@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from(("all", "window")))
def test_a_space_of_one_leaves_nothing_to_search(resolution: int, depth: int, rule: str) -> None:
    only = Subnet(resolution, depth)
    space = GrowthSpace.of([only, only])
    assert space.candidates(None, rule) == space.candidates(only, rule) == (only,)


def test_subnets_name_themselves() -> None:
    assert str(Subnet(224, 12)) == "224 px, 12 layers"
    assert Subnet(224, 12).short == "224x12"
