"""RunState: everything that must survive a preemption and is no tensor, named in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaleprog.growth.schedule import Phase, Schedule
from scaleprog.growth.search import Decision
from scaleprog.growth.space import Choice, Subnet


@dataclass
class RunState:
    """Where a run stands. Times in seconds; accuracies in percent."""

    step: int = 0  # optimizer steps finished
    phase: int = -1  # index of the phase whose network is built
    growths: int = 0  # networks built so far
    gated: tuple[tuple[bool, ...], ...] = ()  # the network's structure
    decisions: list[Decision] = field(default_factory=list)
    measured: list[dict[Subnet, float]] = field(default_factory=list)  # the present search: losses at each measurement
    step_seconds: dict[Subnet, list[float]] = field(default_factory=dict)  # the present search: rank 0's step times
    timed_on: str = ""  # what they were measured on
    train_seconds: float = 0.0  # forward + backward + optimizer and the search's scoring, as the paper counts
    train_cpu_seconds: float = 0.0  # CPU time of rank 0 during the same
    search_seconds: float = 0.0  # the scoring's part of it
    wall_seconds: float = 0.0
    images: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)  # the last evaluation
    due: list[str] = field(default_factory=list)  # what this step calls for and the run was asked to stop before
    best_step: int = 0  # of the evaluation with the best top-1, of online or EMA weights
    best_top1: float = 0.0

    @property
    def choices(self) -> list[Choice]:
        """The searches' choices so far."""
        return [decision.choice for decision in self.decisions]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into an equal state."""
        return {
            **vars(self),
            "accuracies": dict(self.accuracies),
            "due": list(self.due),
            "gated": [list(group) for group in self.gated],
            "decisions": [decision_to_json(d) for d in self.decisions],
            "measured": [pairs(losses) for losses in self.measured],
            "step_seconds": pairs(self.step_seconds),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        """The inverse of `to_json`."""
        return cls(
            **{
                **values,
                "gated": tuple(tuple(group) for group in values["gated"]),
                "decisions": [decision_from_json(d) for d in values["decisions"]],
                "measured": [unpaired(losses) for losses in values["measured"]],
                "step_seconds": unpaired(values["step_seconds"]),
            }
        )


def summary(state: RunState, schedule: Schedule, steps_per_epoch: int) -> dict[str, Any]:
    """What a finished run amounts to: accuracies in percent, costs in seconds, and what every stage trained."""
    decisions = {decision.stage: decision for decision in state.decisions}
    return {
        **state.accuracies,
        "top1_best": max(state.accuracies["top1"], state.accuracies["top1_ema"]),
        "train_seconds": state.train_seconds,
        "train_cpu_seconds": state.train_cpu_seconds,
        "search_seconds": state.search_seconds,
        "wall_seconds": state.wall_seconds,
        "images": state.images,
        "steps": state.step,
        "speedup": None,
        "stages": [
            _stage(phase, decisions.get(phase.stage), steps_per_epoch)
            for phase in schedule.phases(state.choices)
            if not phase.searched
        ],
    }


def _stage(phase: Phase, decision: Decision | None, steps_per_epoch: int) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "stage": phase.stage,
        "resolution": phase.network.resolution,
        "depth": phase.network.depth,
        "epochs": (phase.stop - phase.start) / steps_per_epoch,
        "searched": decision is not None,
        "alpha": None,
        "complete_from": None,
        "scores": [],
    }
    if decision is not None:
        rows = zip(decision.candidates, decision.losses, decision.times, decision.scores)
        stage["alpha"], stage["complete_from"] = decision.alpha, decision.complete_from
        stage["scores"] = [
            {"resolution": s.resolution, "depth": s.depth, "loss": loss, "time": seconds, "score": score}
            for s, loss, seconds, score in rows
        ]
    return stage


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """Plain values that `decision_from_json` turns back into an equal decision."""
    return {
        **vars(decision),
        "candidates": [[c.resolution, c.depth] for c in decision.candidates],
        "chosen": [decision.chosen.resolution, decision.chosen.depth],
    }


def decision_from_json(values: Mapping[str, Any]) -> Decision:
    """The inverse of `decision_to_json`."""
    return Decision(
        stage=values["stage"],
        candidates=tuple(Subnet(*c) for c in values["candidates"]),
        losses=tuple(values["losses"]),
        times=tuple(values["times"]),
        scores=tuple(values["scores"]),
        chosen=Subnet(*values["chosen"]),
        alpha=values["alpha"],
        complete_from=values.get("complete_from"),  # not in events of runs before budgets
        over=values.get("over"),
    )


def pairs(values: Mapping[Subnet, Any]) -> list[list[Any]]:
    """A mapping from Subnets as JSON has it: [resolution, depth, value] each."""
    return [[subnet.resolution, subnet.depth, value] for subnet, value in values.items()]


def unpaired(pairs: list[list[Any]]) -> dict[Subnet, Any]:
    """The inverse of `pairs`."""
    return {Subnet(resolution, depth): value for resolution, depth, value in pairs}
