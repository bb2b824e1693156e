"""Which ranks are slow for long: the rule by which a run names its stragglers, and names them no more."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MARGIN = 0.2
"""A slow rank takes longer than the median of the other ranks by more than this part of it."""
INTERVALS = 3
"""Consecutive intervals in which a rank must be slow to become a straggler, and must not be slow to be one no more."""
LEAST_SECONDS = 10.0
"""An interval lasts at least this long, because a rank may be slow for a moment for many reasons."""
MOST_NAMED = 8
"""Of the ranks that change in one interval, so many get a sentence each."""


@dataclass(frozen=True)
class Slow:
    """A straggler: its rank and host, and the mean over an interval of its own seconds of a step.

    In `seconds`, it did not wait for other ranks; in `data_seconds` of them, it waited for data.
    """

    rank: int
    host: str
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class Change:
    """Who became a straggler after an interval, and who is one no more.

    `began` and `ended` hold at most `MOST_NAMED` ranks, which the log names; `more_began` and `more_ended` the others.
    """

    began: Sequence[Slow]
    ended: Sequence[Slow]
    median_seconds: float
    """Of all ranks, in the interval."""
    more_began: Sequence[Slow] = ()
    more_ended: Sequence[Slow] = ()

    @property
    def sentences(self) -> list[str]:
        """One for each rank that the log names, and how many others there are."""
        median = f"the median rank takes {self.median_seconds:.3g} s"
        began = [
            f"rank {slow.rank} on {slow.host} is slow, and every step waits for the slowest rank: a step takes it "
            f"{slow.seconds:.3g} s without its waits for others ({slow.data_seconds:.2g} s of them for data); {median}"
            for slow in self.began
        ]
        ended = [
            f"rank {slow.rank} on {slow.host} is no longer slow: a step takes it {slow.seconds:.3g} s; {median}"
            for slow in self.ended
        ]
        for sentences, more, are in ((began, self.more_began, "slow"), (ended, self.more_ended, "no longer slow")):
            sentences += [f"{len(more)} more ranks are {are}; events.jsonl names them"] if more else []
        return began + ended


class Stragglers:
    """Watches the own seconds of all ranks: those of a step in which a rank did not wait for others.

    Nothing survives a restart, because ranks may then run on other hosts.
    """

    def __init__(self, hosts: Sequence[str], steps: int, least_seconds: float | None = None) -> None:
        """`hosts`: of every rank; an interval is at least `steps` and `least_seconds` (default: LEAST_SECONDS)."""
        self._hosts, self._steps = hosts, steps
        self._least = LEAST_SECONDS if least_seconds is None else least_seconds
        self._streaks = [0] * len(hosts)  # intervals in which a rank was slow or, negative, was not
        self._present: set[int] = set()
        self._start()

    def _start(self) -> None:
        self._own, self._data = np.zeros(len(self._hosts)), np.zeros(len(self._hosts))
        self._taken, self._lasted = 0, 0.0

    def add(self, own: ArrayLike, data: ArrayLike, steps: int, wall: float) -> Change | None:
        """Adds steps that took `wall` seconds; returns what has changed, if an interval ends and anything has.

        `own`, `data`: for every rank, the own seconds of all these steps, and the part that waited for data.
        """
        self._own += np.asarray(own)
        self._data += np.asarray(data)
        self._taken, self._lasted = self._taken + steps, self._lasted + wall
        if self._taken < self._steps or self._lasted < self._least:
            return None
        change = self._judge()
        self._start()
        return change

    def _judge(self) -> Change | None:
        for rank, is_slow in enumerate(slow_ranks(self._own.tolist())):
            streak = self._streaks[rank]
            self._streaks[rank] = max(streak, 0) + 1 if is_slow else min(streak, 0) - 1
        began = [rank for rank, n in enumerate(self._streaks) if n >= INTERVALS and rank not in self._present]
        ended = [rank for rank, n in enumerate(self._streaks) if n <= -INTERVALS and rank in self._present]
        self._present = (self._present | set(began)) - set(ended)
        if not began and not ended:
            return None
        slow, no_more = ([self._slow(rank) for rank in ranks] for ranks in (began, ended))
        median = float(np.median(self._own)) / self._taken
        return Change(
            slow[:MOST_NAMED],
            no_more[:MOST_NAMED],
            median,
            more_began=slow[MOST_NAMED:],
            more_ended=no_more[MOST_NAMED:],
        )

    def _slow(self, rank: int) -> Slow:
        own, data = (float(seconds[rank]) / self._taken for seconds in (self._own, self._data))
        return Slow(rank, self._hosts[rank], own, data)


def slow_ranks(own: Sequence[float]) -> list[bool]:
    """By rank, whether it takes clearly longer than the median of the others; `own`: seconds of each rank."""
    if len(own) < 2:
        return [False] * len(own)
    ordered = sorted(own)
    return [seconds > (1 + MARGIN) * _median_without(ordered, bisect_left(ordered, seconds)) for seconds in own]


def _median_without(ordered: Sequence[float], left_out: int) -> float:
    """The median of sorted numbers without the one at a position."""
    others = len(ordered) - 1
    low, high = (ordered[i if i < left_out else i + 1] for i in ((others - 1) // 2, others // 2))
    return (low + high) / 2
