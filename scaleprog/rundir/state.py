"""RunState: everything except tensors that must survive a preemption."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from scaleprog.errors import CheckpointError
from scaleprog.growth.phase import Phase
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.search import Decision
from scaleprog.growth.space import Choice, Subnet
from scaleprog.rundir.accuracies import Accuracies, is_percentage
from scaleprog.rundir.old_names import FIRST_STATE, OLD_STATE, renamed
from scaleprog.version import ARITHMETIC


@dataclass
class RunState:
    """Where a run stands. Times in seconds; accuracies in percent."""

    step: int = 0  # optimizer steps finished
    phase: int = -1  # index of the phase whose network is built
    growths: int = 0  # networks built so far
    gated: tuple[tuple[bool, ...], ...] = ()  # the network's structure
    decisions: list[Decision] = field(default_factory=list)
    last_search: tuple[int, int] = (0, 0)  # the steps from which and until which the last search that began lasts
    measured: list[dict[Subnet, float]] = field(default_factory=list)  # losses at each measurement of this search
    errors: dict[Subnet, float] = field(default_factory=dict)  # of the last measurement: see `decide_within`
    step_seconds: dict[Subnet, list[float]] = field(default_factory=dict)  # of this rank, for the search
    timed_on: str = ""  # the machines and settings of `step_seconds`
    train_seconds: float = 0.0  # forward, backward, optimizer and the search's scoring, as in the paper
    train_cpu_seconds: float = 0.0  # CPU time of rank 0 in the same periods
    search_seconds: float = 0.0  # the part of `train_seconds` for scoring
    wall_seconds: float = 0.0
    images: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)  # what the last evaluation found
    pending: list[str] = field(default_factory=list)  # due after this step, but postponed by a stop
    best_step: int = 0  # step with the best top-1 of online or EMA weights
    best_top1: float = 0.0
    skipped: list[int] = field(default_factory=list)  # steps whose update was not finite
    damaged: list[str] = field(default_factory=list)  # names of the damaged samples that were replaced, sorted
    arithmetic: int = ARITHMETIC  # version of what the run computes
    weights: str = ""  # SHA-256 of the given weights that it began with; empty: random ones
    data: dict[str, str] = field(default_factory=dict)  # `Manifest.identity` of what it trains on; empty: not known

    @property
    def choices(self) -> list[Choice]:
        """The searches' choices so far."""
        return [decision.choice for decision in self.decisions]

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` turns back into an equal state."""
        return {
            **vars(self),
            "accuracies": dict(self.accuracies),
            "data": dict(self.data),
            "pending": list(self.pending),
            "skipped": list(self.skipped),
            "damaged": list(self.damaged),
            "gated": [list(group) for group in self.gated],
            "last_search": list(self.last_search),
            "decisions": [decision_to_json(d) for d in self.decisions],
            "measured": [pairs(losses) for losses in self.measured],
            "errors": pairs(self.errors),
            "step_seconds": pairs(self.step_seconds),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        """The inverse of `to_json`, for untrusted values. Raises CheckpointError."""
        values = FIRST_STATE | renamed(values, OLD_STATE)
        _check(values)
        return cls(
            **{
                **values,
                "gated": tuple(tuple(group) for group in values["gated"]),
                "last_search": tuple(values["last_search"]),
                "decisions": [decision_from_json(d) for d in values["decisions"]],
                "measured": [unpaired(losses) for losses in values["measured"]],
                "errors": unpaired(values["errors"]),
                "step_seconds": unpaired(values["step_seconds"]),
            }
        )


def summary(state: RunState, schedule: Schedule, steps_per_epoch: int) -> dict[str, Any]:
    """The results of a finished run: accuracies in percent, losses, costs in seconds, and what every stage trained."""
    decisions = {decision.stage: decision for decision in state.decisions}
    return {
        **state.accuracies,
        "top1_best": Accuracies(state.accuracies).best,
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
        **{key: value for key, value in vars(decision).items() if value or key != "learned"},
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
        complete_from=values.get("complete_from"),  # missing in events of runs before budgets existed
        why=values.get("why"),
        learned=values.get("learned", False),  # only there if it is true
    )


def pairs(values: Mapping[Subnet, Any]) -> list[list[Any]]:
    """A mapping from Subnets as a JSON list; each item is [resolution, depth, value]."""
    return [[subnet.resolution, subnet.depth, value] for subnet, value in values.items()]


def unpaired(pairs: list[list[Any]]) -> dict[Subnet, Any]:
    """The inverse of `pairs`."""
    return {Subnet(resolution, depth): value for resolution, depth, value in pairs}


# ---- the schema of a state in a checkpoint

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, le=2**60)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Amount = Annotated[float, Field(ge=0, le=1e12)]
Percent = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]
Some = Annotated[list[T], Field(max_length=2**14, fail_fast=True)]  # the first of a million errors is enough
Many = Annotated[list[T], Field(max_length=2**20, fail_fast=True)]
Sized = Annotated[tuple[Size, Size, T], Field(strict=False)]  # JSON has lists instead of tuples


Text = Annotated[str, Field(max_length=100)]


class _DecisionValues(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    stage: Count
    candidates: Some[Annotated[tuple[Size, Size], Field(strict=False)]]
    losses: Some[Positive]
    times: Some[Positive]
    scores: Some[float | None]
    chosen: Annotated[tuple[Size, Size], Field(strict=False)]
    alpha: Annotated[float, Field(ge=0)] | None
    complete_from: Count | None
    why: Annotated[str, Field(max_length=2**14)] | None
    learned: bool = False


class _StateValues(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Count
    phase: Annotated[int, Field(ge=-1, le=2**20)]
    growths: Count
    gated: Some[Some[bool]]
    decisions: Some[_DecisionValues]
    last_search: Annotated[tuple[Count, Count], Field(strict=False)]
    measured: Some[Some[Sized[Positive]]]
    errors: Some[Sized[Amount]]
    step_seconds: Some[Sized[Many[Amount]]]
    timed_on: Annotated[str, Field(max_length=2**14)]
    train_seconds: Amount
    train_cpu_seconds: Amount
    search_seconds: Amount
    wall_seconds: Amount
    images: Count
    accuracies: dict[str, Annotated[float, Field(ge=0)]]
    pending: Some[str]
    best_step: Count
    best_top1: Percent
    skipped: Some[Count]
    damaged: Some[Annotated[str, Field(min_length=1, max_length=256)]]
    arithmetic: Annotated[int, Field(ge=1, le=10**6)]
    weights: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    data: Annotated[dict[Text, Text], Field(max_length=4)]


def _check(values: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless `values` have the keys, types and ranges of a state."""
    expected = _StateValues.model_fields.keys()
    if unlike := expected ^ values.keys():
        name = min(unlike)
        raise CheckpointError(f"state: {name!r} is {'missing' if name in expected else 'unknown'}")
    if isinstance(values["accuracies"], dict) and len(values["accuracies"]) > ACCURACIES:
        raise CheckpointError(f"state: more than {ACCURACIES} accuracies")
    try:
        state = _STATE.validate_python(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where, found = ".".join(map(str, problem["loc"])), reprlib.repr(problem["input"])
        raise CheckpointError(f"state: {where[:100]!r}: {problem['msg']}, got {found}") from None
    if wrong := next((n for n, value in state.accuracies.items() if is_percentage(n) and value > 100), None):
        raise CheckpointError(f"state: 'accuracies.{wrong[:100]}' is more than 100 %")
    for number, decision in enumerate(state.decisions):
        if len({len(getattr(decision, key)) for key in ("candidates", "losses", "times", "scores")}) != 1:
            raise CheckpointError(f"state: decision {number} does not have one loss, time and score per candidate")
    named = [[row[:2] for row in rows] for rows in (*state.measured, state.errors)]
    named.append([row[:2] for row in state.step_seconds])
    if any(len(set(subnets)) < len(subnets) for subnets in named):
        raise CheckpointError("state: 'measured', 'errors' or 'step_seconds' have a Subnet twice")
    if not all(seconds for _, _, seconds in state.step_seconds):
        raise CheckpointError("state: 'step_seconds' has a Subnet without times")


ACCURACIES = 1000
_STATE = TypeAdapter(_StateValues)
