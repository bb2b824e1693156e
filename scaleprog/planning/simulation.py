"""A run under random faults, simulated event by event: where its time goes. Pure values; nothing is trained.

The simulation alternates between starts and faults. A start takes `start_up` and `reading`, repeats the steps since the
last visible checkpoint, and trains until its fault. Faults form a Poisson process while the run holds its nodes and
works. The faults of many runs are drawn together, and so are those of two scenarios with the same seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaleprog.planning.faults import CAUSES
from scaleprog.planning.interval import DAY, young_daly

PARTS = ("detection", "queue", "start-up", "reading", "repeated steps")
"""What a fault costs; the detection of a preemption is the time that the run takes to save and leave."""
FIRST = len(CAUSES)
"""Stands for the first start among the causes of starts."""
MOST_FAULTS = 5000
"""Of one run, unless a caller wants fewer; it then ends unfinished."""
CRASH, HANG, PREEMPTION, NODE = range(len(CAUSES))
DETECTION, QUEUE, START_UP, READING, REPEATED = range(len(PARTS))
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scenario:
    """A run and what may happen to it. Times in seconds, rates per 1,000 node-days.

    Args:
        nodes: that train.
        training: time that the run would take without faults and checkpoints.
        crash, hang, preemption, node: rates.
        crash_detection, hang_detection, node_detection: from the fault until all ranks have ended.
        leaving: of a run that is asked to stop, until all ranks have ended, without the save.
        queue_least: until Slurm considers a requeued job at all.
        queue_mean: mean of the exponentially distributed rest of the wait.
        start_up: from the launch of the ranks until the first step, without `reading`.
        reading: of the checkpoint.
        interval: training between two saves.
        pause: for which a save pauses training.
        save: from the end of the pause until the checkpoint is visible.
        spare_nodes: that the job holds besides `nodes`.
        repair: until a lost node is a spare node again.
        in_job: whether a run starts again without leaving its nodes, where that is possible.
        asynchronous: whether training continues while a checkpoint is written.
    """

    nodes: int
    training: float
    crash: float
    hang: float
    preemption: float
    node: float
    crash_detection: float
    hang_detection: float
    node_detection: float
    leaving: float
    queue_least: float
    queue_mean: float
    start_up: float
    reading: float
    interval: float
    pause: float
    save: float
    spare_nodes: int = 0
    repair: float = DAY
    in_job: bool = True
    asynchronous: bool = True

    @property
    def rates(self) -> Array:
        """Faults per second of the whole run, by cause."""
        return np.array([getattr(self, cause) for cause in CAUSES]) * self.nodes / (1000 * DAY)

    @property
    def stall(self) -> float:
        """Seconds that training loses to a save: the pause, and the wait for a previous save that takes longer."""
        return self.pause + (max(0.0, self.save - self.interval) if self.asynchronous else self.save)

    @property
    def best_interval(self) -> float:
        """The interval by Young and Daly; without faults, the whole run."""
        lossy = sum(rate for cause, rate in zip(CAUSES, self.rates) if cause != "preemption")
        if not lossy:
            return self.training
        pause, least = (self.pause, self.save) if self.asynchronous else (self.pause + self.save, 0.0)
        return max(1e-3, min(young_daly(pause, 1 / lossy, least), self.training))

    def with_best_interval(self) -> "Scenario":
        """The scenario with `best_interval`."""
        return replace(self, interval=self.best_interval)


@dataclass(frozen=True)
class Outcome:
    """What came of the simulated runs; each array has one row for a run.

    Args:
        wall: seconds from the first start until the end.
        trained: seconds of training that counted; less than the scenario's in a run that is unfinished.
        stalls: seconds of saves.
        finished: the part of the runs that trained to their end.
        costs: seconds by cause (the last one is the first start) and part: (runs, causes + 1, PARTS).
        faults: how many, by cause: (runs, causes).
    """

    wall: Array
    trained: Array
    finished: float
    stalls: Array
    costs: Array
    faults: Array

    @property
    def effective(self) -> Array:
        """Effective training time: the time of steps that count, by the wall time."""
        return self.trained / self.wall

    @property
    def mean(self) -> float:
        """The mean effective training time."""
        return float(self.effective.mean())

    @property
    def confidence(self) -> tuple[float, float]:
        """The 95 % confidence interval of `mean`."""
        half = 1.96 * float(self.effective.std(ddof=1)) / len(self.wall) ** 0.5 if len(self.wall) > 1 else 0.0
        return self.mean - half, self.mean + half

    @property
    def spread(self) -> tuple[float, float]:
        """The effective training times between which 95 % of the runs lie."""
        low, high = np.quantile(self.effective, (0.025, 0.975))
        return float(low), float(high)

    def counts(self) -> dict[str, float]:
        """The mean number of faults of a run, by cause."""
        return dict(zip(CAUSES, map(float, self.faults.mean(0))))

    def shares(self) -> Mapping[str, Mapping[str, float]]:
        """What each cause costs, as parts of the wall time."""
        whole = self.wall.sum()
        rows = zip((*CAUSES, "first start"), self.costs.sum(0) / whole)
        return {
            **{cause: dict(zip(PARTS, map(float, row))) for cause, row in rows},
            "saves": {"stall": float(self.stalls.sum() / whole)},
        }


def simulate(scenario: Scenario, runs: int, seed: int, most_faults: int = MOST_FAULTS) -> Outcome:
    """Simulates `runs` runs of a scenario, each until it has trained to its end or met `most_faults` faults."""
    rng = np.random.default_rng(seed)
    total, up_to = scenario.rates.sum(), np.cumsum(scenario.rates)
    wall, stalls, faults = np.zeros(runs), np.zeros(runs), np.zeros((runs, len(CAUSES)))
    saved, reached = np.zeros(runs), np.zeros(runs)  # training in the newest checkpoint, and the most so far
    costs = np.zeros((runs, len(CAUSES) + 1, len(PARTS)))
    healthy_at = np.zeros((runs, scenario.spare_nodes))  # the wall time from which each spare node can be used
    cause, every, running = np.full(runs, FIRST), np.arange(runs), np.full(runs, True)
    for _ in range(most_faults):
        clock, which, waiting = rng.exponential(size=runs), rng.random(runs), rng.exponential(size=runs)
        start = _start(scenario, clock / total if total else np.full(runs, np.inf), saved, reached)
        struck = np.minimum(np.searchsorted(up_to, which * total, side="right"), len(CAUSES) - 1)
        failed = running & ~start.finished
        noticed = _detection(scenario, struck, start.worked)
        in_place = _in_place(scenario, struck, failed, healthy_at, wall + start.seconds + noticed)
        queued = np.where(in_place, 0.0, scenario.queue_least + waiting * scenario.queue_mean)

        costs[every, cause, START_UP] += running * start.starting
        costs[every, cause, READING] += running * start.reading
        costs[every, cause, REPEATED] += running * start.repeated
        costs[every, struck, DETECTION] += failed * noticed
        costs[every, struck, QUEUE] += failed * queued
        faults[every, struck] += failed
        stalls += running * (start.training - start.worked)
        wall += running * start.seconds + failed * (noticed + queued)
        reached = np.where(running, np.maximum(reached, saved + start.worked), reached)
        saved += failed * np.where(struck == PREEMPTION, start.worked, start.visible)
        cause, running = np.where(failed, struck, cause), failed
        if not running.any():
            break
    return Outcome(wall, reached, 1 - float(running.mean()), stalls, costs, faults)


@dataclass(frozen=True)
class _Start:
    """What happens from a launch of the ranks until a fault or the end, in seconds; one row for a run.

    Args:
        starting: of the start-up.
        reading: of reading the checkpoint.
        training: of training, with the stalls of saves.
        worked: of training alone.
        repeated: the part of `worked` that had been trained before.
        visible: the part of `worked` that a visible checkpoint holds.
        finished: whether the run ends before the fault.
    """

    starting: Array
    reading: Array
    training: Array
    worked: Array
    repeated: Array
    visible: Array
    finished: NDArray[np.bool_]

    @property
    def seconds(self) -> Array:
        """All of it."""
        return self.starting + self.reading + self.training


def _start(scenario: Scenario, until: Array, saved: Array, reached: Array) -> _Start:
    """A start from the checkpoints that hold `saved` seconds of training, with a fault after `until` seconds."""
    interval, stall = scenario.interval, scenario.stall
    lag = scenario.save if scenario.asynchronous else 0.0
    reading = np.where(saved > 0, scenario.reading, 0.0)
    left = scenario.training - saved
    saves = np.maximum(np.ceil(left / interval) - 1, 0)  # the last one is part of the end
    to_finish = left + saves * stall
    training = np.clip(until - scenario.start_up - reading, 0, to_finish)
    finished = training >= to_finish
    cycles = np.floor(training / (interval + stall))
    worked = np.where(finished, left, cycles * interval + np.minimum(training - cycles * (interval + stall), interval))
    return _Start(
        starting=np.minimum(until, scenario.start_up),
        reading=np.clip(until - scenario.start_up, 0, reading),
        training=training,
        worked=worked,
        repeated=np.clip(reached - saved, 0, worked),
        visible=np.maximum(np.floor((training - lag) / (interval + stall)), 0) * interval,
        finished=finished,
    )


def _detection(scenario: Scenario, struck: NDArray[np.intp], worked: Array) -> Array:
    """Seconds from a fault until all ranks have ended; a run that is asked to stop saves first."""
    leaving = scenario.leaving + np.where(worked > 0, scenario.pause + scenario.save, 0.0)
    detection = np.array([scenario.crash_detection, scenario.hang_detection, 0.0, scenario.node_detection])
    return np.where(struck == PREEMPTION, leaving, detection[struck])


def _in_place(
    scenario: Scenario, struck: NDArray[np.intp], failed: NDArray[np.bool_], healthy_at: Array, now: Array
) -> NDArray[np.bool_]:
    """Which runs start again without leaving their nodes; for lost nodes, takes spare ones from `healthy_at`.

    A run that leaves its nodes comes back with healthy ones.
    """
    in_place = scenario.in_job & (struck != PREEMPTION)
    if not scenario.spare_nodes:
        return in_place & (struck != NODE)
    every, first = np.arange(len(now)), healthy_at.argmin(1)
    spared = in_place & (healthy_at[every, first] <= now)
    taken = failed & spared & (struck == NODE)
    healthy_at[every[taken], first[taken]] = now[taken] + scenario.repair
    in_place &= (struck != NODE) | spared
    healthy_at[failed & ~in_place] = 0.0
    return in_place
