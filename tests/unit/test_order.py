"""The order of the samples: every property that a resumed, rescaled or repeated run relies on."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scaleprog.data import order as order_module
from scaleprog.data.order import SEARCH_EPOCH, Order
from scaleprog.errors import DataError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=12)))
    lanes = draw(st.sampled_from((1, 2, 3, 8, 16)))
    batch = lanes * draw(st.integers(1, 4))
    assume(sum(counts) // lanes >= batch // lanes)
    return Order(counts, draw(st.integers(0, 2**40)), lanes, batch, draw(st.integers(1, 3)))


def global_batches(order: Order, epoch: int, world: int) -> np.ndarray:
    """(steps, B, 2): the batches that `world` ranks see together, lane-major."""
    lanes = [order.lane(epoch, lane) for rank in range(world) for lane in order.lanes_of(rank, world)]
    steps = [rows.reshape(order.steps_per_epoch, order.per_lane, 2) for rows in lanes]
    return np.concatenate(steps, axis=1)


@given(orders(), st.integers(0, 5))
def test_no_sample_comes_twice_in_an_epoch(order: Order, epoch: int) -> None:
    order = Order(order.counts, order.seed, order.lanes, order.batch)
    rows = global_batches(order, epoch, 1).reshape(-1, 2)
    assert len(rows) == order.steps_per_epoch * order.batch
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert all(0 <= index < order.counts[shard] for shard, index in rows.tolist())
    assert rows.dtype == np.int64


@given(orders(), st.integers(0, 5))
def test_a_batch_does_not_depend_on_the_world_size(order: Order, epoch: int) -> None:
    for world in (2, 4, 8):
        if order.lanes % world == 0:
            assert np.array_equal(global_batches(order, epoch, world), global_batches(order, epoch, 1))


@given(orders())
def test_whole_batches_only_and_less_than_one_is_dropped(order: Order) -> None:
    assert 0 <= order.dropped < order.batch
    assert order.steps_per_epoch * order.batch + order.dropped == sum(order.counts)
    assert order.per_lane * order.lanes == order.batch


@given(orders())
def test_repeated_augmentation_repeats_the_same_sequence(order: Order) -> None:
    once = Order(order.counts, order.seed, order.lanes, order.batch)
    assert order.steps_per_epoch == once.steps_per_epoch
    for lane in range(order.lanes):
        expected = np.repeat(once.lane(3, lane), order.repeats, axis=0)[: len(once.lane(3, lane))]
        assert np.array_equal(order.lane(3, lane), expected)
        assert np.array_equal(order.lane(SEARCH_EPOCH, lane), once.lane(SEARCH_EPOCH, lane)), "but no search subset"


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=20)
def test_epochs_and_seeds_have_their_own_orders(seed: int, epoch: int) -> None:
    order = Order((50, 60, 70), seed, 4, 8)
    here = order.lane(epoch, 0)
    for other in (
        order.lane(epoch + 1, 0),
        order.lane(SEARCH_EPOCH, 0),
        Order((50, 60, 70), seed + 1, 4, 8).lane(epoch, 0),
    ):
        assert not np.array_equal(here, other)
    assert np.array_equal(here, order.lane(epoch, 0))


def test_an_epoch_uses_every_sample_where_nothing_is_left_over() -> None:
    order = Order((10, 20, 2), 7, 4, 16)
    rows = global_batches(order, 0, 1).reshape(-1, 2)
    assert order.dropped == 0
    assert sorted(map(tuple, rows.tolist())) == [(s, i) for s, n in enumerate((10, 20, 2)) for i in range(n)]


def test_lanes_are_contiguous_and_read_their_shards_one_after_the_other() -> None:
    order = Order((30,) * 7, 1, 6, 6)
    sequence = np.concatenate([order.lane(0, lane)[:, 0] for lane in range(6)])
    visits = 1 + np.count_nonzero(np.diff(sequence))
    assert visits == 7, "each shard is one stretch of the epoch's sequence, cut or not"
    assert len(np.unique(order.lane(0, 1)[:, 0])) == 2, "35 samples of shards of 30: the cut falls inside a shard"


def test_more_lanes_than_shards() -> None:
    order = Order((100,), 0, 8, 16)
    rows = global_batches(order, 0, 4)
    assert rows.shape == (6, 16, 2)
    assert len(np.unique(rows.reshape(-1, 2), axis=0)) == 96


def test_a_batch_mixes_shards() -> None:
    batch = global_batches(Order((100,) * 16, 0, 16, 32), 0, 1)[0]
    assert len(np.unique(batch[:, 0])) >= 12


def test_the_order_is_the_same_for_ever() -> None:
    """A checkpoint of last year must continue in its order: these numbers may never change."""
    order = Order((3, 4, 5), 2026, 2, 4)
    assert order.lane(1, 0).tolist() == [[1, 0], [1, 2], [1, 3], [1, 1], [2, 1], [2, 3]]
    assert order.lane(1, 1).tolist() == [[2, 0], [2, 4], [2, 2], [0, 2], [0, 0], [0, 1]]


def test_a_lane_permutes_only_the_shards_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet: 1,280 shards of 1,001 samples, 64 lanes of about 20 shards."""
    sizes = []
    permutation = order_module._permutation
    monkeypatch.setattr(order_module, "_permutation", lambda n, *e: sizes.append(n) or permutation(n, *e))
    order = Order((1001,) * 1280, 0, 64, 1024)
    assert order.lane(5, 40).shape == (order.steps_per_epoch * 16, 2)
    assert len(sizes) <= 1 + 22


@pytest.mark.parametrize(
    ("counts", "lanes", "batch", "repeats", "error"),
    [
        ((100,), 8, 12, 1, ValueError),
        ((3, 4), 2, 8, 1, DataError),
        ((100,), 0, 8, 1, ValueError),
        ((100,), 8, 0, 1, ValueError),
        ((100,), 8, 8, 0, ValueError),
    ],
)
def test_what_cannot_be_is_refused(
    counts: tuple[int, ...], lanes: int, batch: int, repeats: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"batch of {batch}"):
        Order(counts, 0, lanes, batch, repeats)


def test_a_rank_owns_an_equal_share_of_the_lanes() -> None:
    with pytest.raises(ValueError, match="64 lanes cannot be shared by rank 0 of 3"):
        Order((1000,), 0, 64, 64).lanes_of(0, 3)
    assert list(Order((1000,), 0, 64, 64).lanes_of(3, 16)) == [12, 13, 14, 15]
