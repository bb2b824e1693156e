"""The search's decision (paper 4.1, 4.3): losses and step times of the candidates -> alpha -> the chosen Subnet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from scaleprog.growth.space import CandidateRule, Subnet
from scaleprog.settings import Settings

TIE = 1e-6  # relative difference of two scores below which the cheaper candidate wins


class SearchSettings(Settings):
    """How a stage is searched.

    `epochs` of supernet training; `subset`: training images that score a candidate (rounded down to whole batches, at
    least one); `candidates`: see `GrowthSpace.candidates`; `measurements`: how often the losses are measured,
    equispaced from the start to the end of the last search epoch; `times`: `measured` step times, or `modelled` ones in
    proportion to GMACs, for runs that must make the same choice twice.
    """

    epochs: float = Field(default=2, gt=0)
    subset: int = Field(default=50_000, ge=1)
    candidates: CandidateRule = "window"
    measurements: int = Field(default=5, ge=1)
    times: Literal["measured", "modelled"] = "measured"


@dataclass(frozen=True)
class Decision:
    """What a search found and chose: per candidate the mean loss, the step time in seconds (or GMACs) and the
    score, whose unit of time is the cheapest candidate's."""

    stage: int
    candidates: tuple[Subnet, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]
    alpha: float
    scores: tuple[float, ...]
    chosen: Subnet


def measurement_steps(start: int, stop: int, epoch: int, measurements: int) -> tuple[int, ...]:
    """After how many optimizer steps losses are measured: equispaced over the last `epoch` steps before `stop`."""
    if measurements == 1:
        return (stop,)
    first = max(start, stop - epoch)
    return tuple(first + (stop - first) * i // (measurements - 1) for i in range(measurements))


def balancing_exponent(losses: Sequence[float], times: Sequence[float]) -> float:
    """alpha >= 0 that balances the candidates' scores: with loss ~ a * T^b fitted in log-log, alpha = max(-b, 0)."""
    x, y = np.log(np.asarray(times, np.float64)), np.log(np.asarray(losses, np.float64))
    x = x - x.mean()
    spread = float(x @ x)
    return max(-float(x @ (y - y.mean())) / spread, 0.0) if spread > 1e-12 else 0.0


def decide(stage: int, measured: Sequence[Mapping[Subnet, float]], times: Mapping[Subnet, float]) -> Decision:
    """Chooses argmin loss * T^alpha over the candidates; scores that tie go to the cheaper one.

    `measured` holds the losses of every candidate at each measurement; their mean counts.
    """
    candidates = tuple(sorted(times))
    losses = [float(np.mean([losses[c] for losses in measured])) for c in candidates]
    seconds = [times[c] for c in candidates]
    if not (np.isfinite([*losses, *seconds]).all() and min(losses) > 0 and min(seconds) > 0):
        raise ValueError(f"stage {stage}: losses and times must be finite and positive, got {losses} and {seconds}")
    alpha = balancing_exponent(losses, seconds)
    cheapest = min(seconds)  # in its units the scores neither overflow nor depend on the clock's
    scores = [loss * (time / cheapest) ** alpha for loss, time in zip(losses, seconds)]
    best = min(scores)
    tied = [i for i, score in enumerate(scores) if score <= best * (1 + TIE)]
    winner = min(tied, key=lambda i: (seconds[i], candidates[i]))
    return Decision(stage, candidates, tuple(losses), tuple(seconds), alpha, tuple(scores), candidates[winner])
