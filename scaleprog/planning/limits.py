"""Which value of which input alone would break an effective training time that a run needs."""

from dataclasses import dataclass, fields, replace
from typing import Any

from scaleprog.planning.simulation import Scenario, simulate

TARGET = 0.97
"""The effective training time that must not break."""
RUNS, FAULTS, MOST_FAULTS = 50, 100, 1000
DOUBLINGS, HALVINGS = 20, 7
FIRST = {"crash": 0.01, "hang": 0.01, "preemption": 0.01, "node": 0.01}
"""The first value above 0 to try, where an input is 0; 1 s for the others."""
INPUTS = tuple(
    field.name for field in fields(Scenario)
    if field.name not in ("nodes", "training", "spare_nodes", "repair", "in_job", "asynchronous")
)  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """The largest value of one input with which, the others unchanged, runs reach the target.

    `value` is None if no value does (`reached` is false), or if every value does that was tried.
    """

    name: str
    value: float | None
    reached: bool


def limits(scenario: Scenario, seed: int) -> list[Limit]:
    """The limit of every input."""
    return [limit(scenario, name, seed) for name in INPUTS]


def limit(scenario: Scenario, name: str, seed: int, target: float = TARGET) -> Limit:
    """The limit of one input, by bisection; all values meet the same faults, of which a short run sees enough."""
    mtbf = 1 / rate if (rate := scenario.rates.sum()) else scenario.training
    short = replace(scenario, training=min(scenario.training, FAULTS * mtbf))

    def reaches(value: float) -> bool:
        changed: dict[str, Any] = {name: value}
        return simulate(replace(short, **changed), RUNS, seed, MOST_FAULTS).mean >= target

    now, best = getattr(scenario, name), scenario.best_interval if name == "interval" else 0.0
    low = next((value for value in (now, best) if reaches(value)), None)
    if low is None:
        return Limit(name, None, reached=False)
    high = now
    if low >= now:  # no value is known to be too large
        high = 2 * low or FIRST.get(name, 1.0)
        most = high * 2**DOUBLINGS
        while reaches(high):
            if high >= most:
                return Limit(name, None, reached=True)
            low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return Limit(name, low, reached=True)
