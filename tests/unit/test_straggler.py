"""The rule by which a run names its slow ranks."""

import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.ranks.waits import Waits
from scaleprog.rundir.straggler import INTERVALS, MARGIN, MOST_NAMED, Change, Stragglers, slow_ranks
from scaleprog.training.start import no_slow_ranks

STEPS = 5
USUAL, SLOW = 0.1, 0.15


def watch(world: int, least_seconds: float = 0.0) -> Stragglers:
    return Stragglers([f"node{rank // 8}" for rank in range(world)], STEPS, least_seconds)


def add(watched: Stragglers, own: Sequence[float], intervals: int = 1) -> list[Change]:
    """What changes in some intervals of which every step takes each rank `own` seconds."""
    spent = [STEPS * seconds for seconds in own]
    found = [watched.add(spent, [seconds / 2 for seconds in spent], STEPS, sum(spent)) for _ in range(intervals)]
    return [change for change in found if change is not None]


def ranks(world: int, *slow: int) -> list[float]:
    return [SLOW if rank in slow else USUAL for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3, 512])
def test_a_rank_that_is_slow_for_long_is_named_once_and_so_is_its_end(world: int) -> None:
    watched = watch(world)
    assert not add(watched, ranks(world), 10)
    assert not add(watched, ranks(world, 1), INTERVALS - 1)
    (change,) = add(watched, ranks(world, 1), 20)
    (slow,) = change.began
    assert (slow.rank, slow.host, change.ended) == (1, "node0", [])
    assert (slow.seconds, slow.data_seconds) == pytest.approx((SLOW, SLOW / 2))
    assert change.median_seconds == pytest.approx(statistics.median(ranks(world, 1)))
    assert "rank 1 on node0 is slow" in change.sentences[0]
    assert not add(watched, ranks(world), INTERVALS - 1)
    (change,) = add(watched, ranks(world), 20)
    assert ([slow.rank for slow in change.ended], change.began) == ([1], [])
    assert "no longer slow" in change.sentences[0]


def test_a_rank_that_is_slow_now_and_then_and_one_after_another_are_not_named() -> None:
    watched = watch(4)
    for interval in range(20):
        assert not add(watched, ranks(4, interval % 4))
    for _ in range(10):
        assert not add(watched, ranks(4, 2), INTERVALS - 1)
        assert not add(watched, ranks(4))


def test_a_whole_node_is_named_and_a_crowd_only_in_part() -> None:
    watched = watch(64)
    (change,) = add(watched, ranks(64, *range(8, 16)), INTERVALS)
    assert [slow.rank for slow in change.began] == list(range(8, 16))
    assert {slow.host for slow in change.began} == {"node1"}
    (change,) = add(watched, ranks(64, *range(30)), INTERVALS)
    assert len(change.began) == MOST_NAMED


def test_every_rank_of_a_crowd_is_slow_until_it_is_no_more() -> None:
    watched = watch(64)
    (change,) = add(watched, ranks(64, *range(30)), INTERVALS)
    assert [slow.rank for slow in (*change.began, *change.more_began)] == list(range(30))
    assert change.sentences[MOST_NAMED:] == ["22 more ranks are slow; events.jsonl names them"]
    (change,) = add(watched, ranks(64), INTERVALS)
    assert [slow.rank for slow in (*change.ended, *change.more_ended)] == list(range(30))
    assert change.sentences[MOST_NAMED:] == ["22 more ranks are no longer slow; events.jsonl names them"]


def test_an_interval_lasts_long_enough_and_has_enough_steps() -> None:
    watched = watch(2, least_seconds=10.0)
    own = [0.1, 0.2]
    assert not any(watched.add(own, [0.0, 0.0], 1, 1.0) for _ in range(10 * INTERVALS - 1))
    assert watched.add(own, [0.0, 0.0], 1, 1.0) is not None
    watched = watch(2)
    assert not any(watched.add(own, [0.0, 0.0], 1, 1.0) for _ in range(STEPS * INTERVALS - 1))
    assert watched.add(own, [0.0, 0.0], 1, 1.0) is not None


@given(st.lists(st.floats(0.0, 1e6), min_size=2, max_size=9))
def test_a_slow_rank_takes_clearly_longer_than_the_median_of_the_others(own: list[float]) -> None:
    others = [statistics.median(own[:rank] + own[rank + 1 :]) for rank in range(len(own))]
    assert slow_ranks(own) == [seconds > (1 + MARGIN) * other for seconds, other in zip(own, others)]


def test_a_rank_alone_is_never_slow() -> None:
    assert not add(watch(1), [5.0], 10)


@pytest.mark.parametrize(
    ("engine", "device", "known", "told"),
    [
        ("fsdp", "cuda", False, "no rank will be called slow: sharding.engine: fsdp on GPUs does not measure"),
        ("zero", "cpu", False, "no rank will be called slow: sharding.engine: zero does not measure"),
        ("replicated", "cuda", True, ""),
    ],
)
def test_a_run_that_cannot_name_slow_ranks_says_so(engine: str, device: str, known: bool, told: str) -> None:
    where = torch.device(device)
    backend: Any = SimpleNamespace(waits=Waits(where, known), device=where, sharding=SimpleNamespace(engine=engine))
    assert no_slow_ranks(backend, 2).startswith(told)
    assert bool(no_slow_ranks(backend, 2)) == bool(told)
    assert no_slow_ranks(backend, 1) == ""
