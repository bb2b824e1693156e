"""`checkpoint.every: auto`: rank 0 chooses the time between two checkpoints from what the run has recorded.

Only rank 0's clock decides when a checkpoint is due, and the ranks agree on it (`ranks/stop.py`), so no other rank
needs to know the interval. Checkpoints do not change weights, so a run that resumes with another interval trains the
same.
"""

from collections.abc import Iterable, Mapping
from statistics import median, median_low
from typing import Any

from scaleprog.planning.interval import estimated_mtbf, young_daly
from scaleprog.rundir.checkpoint import Commit
from scaleprog.rundir.reading import read
from scaleprog.rundir.records import EVENT, EVENTS
from scaleprog.training.process import Run

RECENT = 5  # saves whose cost counts; the first of a start takes longer
CHANGED = 1.25  # the interval is told again if it changes by this factor
LEFT_WELL = ("preempted", "finish", "stopped_early")


class AutomaticInterval:
    """The interval of one start, updated after every save."""

    def __init__(self, run: Run, nodes: int) -> None:
        """Reads what earlier starts of the run have recorded. `nodes`: how many train."""
        events = read(run.folder / EVENTS, EVENT).rows
        self._run, self._nodes, self._told = run, nodes, 0.0
        self._faults, self._repeated = faults_of(events, run.lease.generation), repeated_seconds(events)
        inherited = [event.get("wall_seconds", 0.0) for event in events if event["event"] == "forked"]
        self._inherited = inherited[-1] if inherited else 0.0  # the parent's, whose faults are not here either
        saves = [event for event in events if event["event"] == "checkpoint" and "stall" in event]
        self._saves = [(event["stall"], event["seconds"]) for event in saves[-RECENT:]]
        if self._saves:
            self._choose()

    def saved(self, commit: Commit) -> None:
        """Takes a save that is visible into account."""
        self._saves = [*self._saves, (commit.stall, commit.seconds)][-RECENT:]
        self._choose()

    def _choose(self) -> None:
        run = self._run
        pauses, saves = zip(*self._saves)
        pause, save = median_low(pauses), median(saves)
        seconds = max(0.0, run.state.wall_seconds - self._inherited) + self._repeated
        mtbf = estimated_mtbf(self._faults, seconds, self._nodes)
        interval = young_daly(pause, mtbf, save)
        run.watch.save_every(interval)
        if self._told / CHANGED < interval < self._told * CHANGED:
            return
        self._told = interval
        run.recorder.event(
            "interval", step=run.state.step, seconds=interval, pause=pause, save=save, mtbf=mtbf, faults=self._faults,
            trained_seconds=seconds, nodes=self._nodes,
        )  # fmt: skip
        run.progress.say(
            f"checkpoint.every: auto saves every {interval:.0f} s: a save pauses training for {pause:.3f} s and takes "
            f"{save:.1f} s; {self._faults} faults in {seconds / 3600:.1f} h of training on {self._nodes} nodes"
        )


def faults_of(events: Iterable[Mapping[str, Any]], generation: int) -> int:
    """How many starts before `generation` ended without saving their last step."""
    begun, left_well = set(), set()
    for event in events:
        if event["event"] == "start":
            begun.add(event.get("generation", 0))
        elif event["event"] in LEFT_WELL:
            left_well.add(event.get("generation", 0))
    return len({start for start in begun if start < generation} - left_well)


def repeated_seconds(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds of the steps that starts have trained again."""
    return sum(event.get("repeated_seconds", 0.0) for event in events if event["event"] == "start")
