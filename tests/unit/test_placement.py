"""Which rank holds which elements: every element once, found where it is looked for, moved to where it is wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.sharding.placement import LocalSlice, Placement, move

placements = st.builds(Placement, numel=st.integers(1, 200), size=st.integers(1, 60), offset=st.integers(0, 150))


def ranks(placement: Placement) -> int:
    """As many as are needed to hold all elements."""
    return (placement.numel + placement.offset - 1) // placement.size + 1


@given(placements)
def test_the_parts_of_all_ranks_are_the_whole(placement: Placement) -> None:
    held = [element for rank in range(ranks(placement)) for element in placement.local(rank)]
    assert held == list(range(placement.numel))
    assert all(len(placement.local(rank)) <= placement.size for rank in range(ranks(placement)))
    assert not placement.local(ranks(placement))


@given(placements, st.data())
def test_holders_are_those_who_hold(placement: Placement, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, placement.numel))
    wanted = range(start, data.draw(st.integers(start, placement.numel)))
    found = list(placement.holders(wanted))
    assert [element for _, part in found for element in part] == list(wanted)
    assert all(part and set(part) <= set(placement.local(rank)) for rank, part in found)
    assert [rank for rank, _ in found] == sorted({rank for rank, _ in found})


@given(placements)
def test_the_whole_is_rank_0s(placement: Placement) -> None:
    whole = Placement.whole(placement.numel)
    assert whole.local(0) == range(placement.numel)
    assert not whole.local(1)


def test_sharding_as_engines_do_it() -> None:
    # 7 rows of 3 on 4 ranks, as FSDP2 cuts them; 10 elements on 4, as ZeRO-3 does; a tensor across a border, as ZeRO-1
    assert [Placement(21, 6).local(r) for r in range(4)] == [range(6), range(6, 12), range(12, 18), range(18, 21)]
    assert [len(Placement(10, 3).local(r)) for r in range(4)] == [3, 3, 3, 1]
    assert [list(Placement(5, 8, offset=6).local(r)) for r in range(3)] == [[0, 1], [2, 3, 4], []]


def test_one_rank_alone_copies() -> None:
    source, target = torch.arange(6.0), torch.zeros(6)
    move([source], Placement.whole(6), [target], Placement(6, 9), group=None)
    assert torch.equal(source, target)


def test_a_part_is_the_tensor_itself() -> None:
    matrix = torch.zeros(2, 3)
    part = LocalSlice.whole(matrix)
    part.tensor[4] = 1
    assert (part.start, part.numel, float(matrix[1, 1])) == (0, 6, 1)
    with pytest.raises(RuntimeError, match="view"):
        LocalSlice.whole(matrix.t())
