"""Which rank holds which elements: every element once, found where it is looked for, moved to where it is wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.sharding.spread import Part, Spread, move

spreads = st.builds(Spread, numel=st.integers(1, 200), size=st.integers(1, 60), offset=st.integers(0, 150))


def ranks(spread: Spread) -> int:
    """As many as are needed to hold all elements."""
    return (spread.numel + spread.offset - 1) // spread.size + 1


@given(spreads)
def test_the_parts_of_all_ranks_are_the_whole(spread: Spread) -> None:
    held = [element for rank in range(ranks(spread)) for element in spread.part(rank)]
    assert held == list(range(spread.numel))
    assert all(len(spread.part(rank)) <= spread.size for rank in range(ranks(spread)))
    assert not spread.part(ranks(spread))


@given(spreads, st.data())
def test_holders_are_those_who_hold(spread: Spread, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, spread.numel))
    wanted = range(start, data.draw(st.integers(start, spread.numel)))
    found = list(spread.holders(wanted))
    assert [element for _, part in found for element in part] == list(wanted)
    assert all(part and set(part) <= set(spread.part(rank)) for rank, part in found)
    assert [rank for rank, _ in found] == sorted({rank for rank, _ in found})


@given(spreads)
def test_the_whole_is_rank_0s(spread: Spread) -> None:
    whole = Spread.whole(spread.numel)
    assert whole.part(0) == range(spread.numel)
    assert not whole.part(1)


def test_sharding_as_engines_do_it() -> None:
    # 7 rows of 3 on 4 ranks, as FSDP2 cuts them; 10 elements on 4, as ZeRO-3 does; a tensor across a border, as ZeRO-1
    assert [Spread(21, 6).part(r) for r in range(4)] == [range(6), range(6, 12), range(12, 18), range(18, 21)]
    assert [len(Spread(10, 3).part(r)) for r in range(4)] == [3, 3, 3, 1]
    assert [list(Spread(5, 8, offset=6).part(r)) for r in range(3)] == [[0, 1], [2, 3, 4], []]


def test_one_rank_alone_copies() -> None:
    source, target = torch.arange(6.0), torch.zeros(6)
    move([source], Spread.whole(6), [target], Spread(6, 9), group=None)
    assert torch.equal(source, target)


def test_a_part_is_the_tensor_itself() -> None:
    matrix = torch.zeros(2, 3)
    part = Part.whole(matrix)
    part.tensor[4] = 1
    assert (part.start, part.numel, float(matrix[1, 1])) == (0, 6, 1)
    with pytest.raises(RuntimeError, match="view"):
        Part.whole(matrix.t())
