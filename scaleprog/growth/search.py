"""The search's decision: losses and step times of the candidates -> the chosen Subnet, and how long it is trained.

Two methods. `published` (paper 4.1, 4.3) balances loss against time by an exponent that it fits. `budget`, ours, knows
what the run may cost, so that the only question is where it saves: at the candidate that gives up least loss for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from scaleprog.errors import OverBudget
from scaleprog.growth.space import CandidateRule, Choice, Subnet
from scaleprog.settings import Epochs, Few, Part, Settings, Subset

Method = Literal["budget", "published"]

TIE = 1e-6  # relative difference of two scores below which the cheaper candidate wins
NOISE = 2.0  # standard errors by which a loss must exceed the complete model's to count as higher
LEARNED = 0.25  # the part of the loss of guessing that must be gone before anything is saved; docs/LOG.md says why
CLOCKS = 0.01  # the part of a run by which measured times may make it miss a budget that was kept at the search before
WORTHWHILE = 0.9  # a network whose step costs a larger part of a complete one saves nothing worth a growth


PUBLISHED = {"epochs": 2, "subset": 50_000, "candidates": "window", "measurements": 5, "weights": "ema"}
"""What the published method does (paper 5) where a recipe does not say; the defaults below are the budget's."""


class SearchSettings(Settings):
    """How a stage is searched.

    `method`: `budget` or `published`, see docs/search.md; `budget`: the most that the run may cost, searches included,
    as a part of Original's cost (None: about what the equispaced ladder, "Prog", costs); `complete_steps`: how many
    steps a budget leaves the complete model at the end, at least; a run too short for that trains it from the first
    step; `epochs` of supernet training (None: an 80th of the run's); `subset`: training images that score a candidate,
    rounded down to whole batches, at least one (None: a 25th of all); `candidates`: see `GrowthSpace.candidates`;
    `measurements`: how often losses are measured, equispaced from the start to the end of the last search epoch;
    `weights`: of which network they are; `times`: `measured` step times, or `modelled` ones in proportion to GMACs, for
    runs that must make the same choice twice. The published method has defaults of its own, `PUBLISHED`.
    """

    method: Method = "budget"
    budget: Part | None = None
    complete_steps: Annotated[int, Field(ge=0, le=10**9)] = 300
    epochs: Epochs | None = None
    subset: Subset | None = None
    candidates: CandidateRule = "corners"
    measurements: Few = 1
    weights: Literal["ema", "online"] = "online"
    times: Literal["measured", "modelled"] = "measured"

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        published = isinstance(values, dict) and values.get("method") == "published"
        return PUBLISHED | values if published else values


@dataclass(frozen=True)
class Decision:
    """What a search found and chose: per candidate the mean loss, the step time in seconds (or GMACs) and the score.

    Of the published method: `alpha`, and scores whose unit of time is the cheapest candidate's. Of the budget:
    `complete_from`, the schedule position from which on the complete model trains, scores in loss per step saved (None:
    the complete model, and what cannot save enough), and `why` that was chosen, in words.
    """

    stage: int
    candidates: tuple[Subnet, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]
    scores: tuple[float | None, ...]
    chosen: Subnet
    alpha: float | None = None
    complete_from: int | None = None
    why: str | None = None

    @property
    def because(self) -> str:
        """What else was decided, in words."""
        if self.complete_from is None:
            return f"alpha {self.alpha:.4f}"
        return ": ".join(filter(None, (f"complete from schedule step {self.complete_from}", self.why)))

    @property
    def choice(self) -> Choice:
        """What the schedule goes by."""
        return Choice(self.chosen, self.complete_from)


@dataclass(frozen=True)
class Funds:
    """Where a run with a budget stands. Costs are in steps of the complete model.

    `position`: the schedule position from which on the search's choice is trained; `steps`: those of the whole
    schedule; `latest`: the last position at which the complete model may take over; `left`: what may still be spent;
    `promised`: whether the recipe names the budget, so that it must not be exceeded.
    """

    position: int
    steps: int
    latest: int
    left: float
    promised: bool = False

    @property
    def saving(self) -> float:
        """What has to be saved on the way, against training the complete model from here on."""
        return self.steps - self.position - self.left

    def choice(self, small: Subnet, price: float, complete: Subnet) -> Choice:
        """`small`, whose step costs `price` < 1, until the complete model takes over: as early as may be, at `latest`
        even where that saves too little. The complete model itself where that is at once."""
        takeover = self.position + math.ceil(self.saving / (1 - price) - 1e-9)
        takeover = max(self.position, min(takeover, self.latest))
        return Choice(small if takeover > self.position else complete, takeover)

    def enough(self, price: float, missed: float = 1e-9) -> bool:
        """Whether a network whose step costs `price` can save what has to be saved, but a part `missed` of the run."""
        return self.saving <= max(0.0, (1 - price) * (self.latest - self.position)) + missed * self.steps


def measurement_steps(start: int, stop: int, epoch: int, measurements: int) -> tuple[int, ...]:
    """After how many optimizer steps losses are measured: equispaced over the last `epoch` steps before `stop`."""
    if measurements == 1:
        return (stop,)
    first = max(start, stop - epoch)
    return tuple(first + (stop - first) * i // (measurements - 1) for i in range(measurements))


def step_time(samples: Sequence[float]) -> float:
    """What a step takes, of at least one that was timed: the lower median, as few samples are more often late than
    early, without the first if there are more, which may have compiled or allocated."""
    return median_low(samples[1:] or samples)


def candidate_times(measured: Mapping[Subnet, float], costs: Mapping[Subnet, float]) -> dict[Subnet, float]:
    """The step time of every candidate in `costs` (GMACs): as measured, or by its share of the work for one that no
    step happened to sample; the costs themselves where nothing was measured."""
    known = [measured[subnet] / cost for subnet, cost in costs.items() if measured.get(subnet)]
    rate = median(known) if known else 1.0
    return {subnet: measured.get(subnet) or cost * rate for subnet, cost in costs.items()}


def balancing_exponent(losses: Sequence[float], times: Sequence[float]) -> float:
    """alpha >= 0 that balances the candidates' scores: with loss ~ a * T^b fitted in log-log, alpha = max(-b, 0)."""
    x, y = np.log(np.asarray(times, np.float64)), np.log(np.asarray(losses, np.float64))
    x = x - x.mean()
    spread = float(x @ x)
    return max(-float(x @ (y - y.mean())) / spread, 0.0) if spread > 1e-12 else 0.0


def decide(stage: int, measured: Sequence[Mapping[Subnet, float]], times: Mapping[Subnet, float]) -> Decision:
    """The published choice: argmin loss * T^alpha over the candidates; scores that tie go to the cheaper one.

    `measured` holds the losses of every candidate at each measurement; their mean counts.
    """
    candidates, losses, seconds = _found(stage, measured, times)
    alpha = balancing_exponent(losses, seconds)
    cheapest = min(seconds)  # in its units the scores neither overflow nor depend on the clock's
    scores = [loss * (time / cheapest) ** alpha for loss, time in zip(losses, seconds)]
    best = min(scores)
    tied = [i for i, score in enumerate(scores) if score <= best * (1 + TIE)]
    winner = min(tied, key=lambda i: (seconds[i], candidates[i]))
    return Decision(stage, candidates, losses, seconds, tuple(scores), candidates[winner], alpha=alpha)


def decide_within(
    funds: Funds,
    stage: int,
    measured: Sequence[Mapping[Subnet, float]],
    times: Mapping[Subnet, float],
    errors: Mapping[Subnet, float] | None = None,
    guessing: float | None = None,
) -> Decision:
    """The budget's choice: the complete model where it can be paid for to the end, else where saving costs least.

    A sub-network that trains in place of the complete model (the largest candidate) gives up the difference of their
    losses and saves that of their times. A budget fixes how much is to be saved until the complete model takes over, so
    the loss per step saved decides: the cheaper a sub-network, the sooner it can be left. In the plane of time and loss
    that is the tangent from the complete model to the candidates. `errors` holds the standard error of each difference
    of losses: what is within twice that is noise and counts as nothing. Those that lose nothing tie, and so do others
    within 1e-6: the cheapest wins. A candidate that cannot save enough in the time that is left is none, if another
    can. Unless the budget is promised, the complete model is chosen, too, where no candidate's step is noticeably
    cheaper, and where so little has been learned that steps on small networks would go on being lost: where even the
    best candidate's loss is near `guessing`, that of a uniform guess.

    Raises:
        OverBudget: no choice keeps to a budget that was promised.
    """
    candidates, losses, seconds = _found(stage, measured, times)
    complete = max(range(len(candidates)), key=lambda i: (candidates[i].resolution, candidates[i].depth))
    prices = [time / seconds[complete] for time in seconds]
    learned = 1.0 if guessing is None else 1 - min(losses) / guessing
    early = learned < LEARNED and not funds.promised
    dearest = 1.0 if funds.promised else WORTHWHILE
    cheaper = [i for i, price in enumerate(prices) if i != complete and price < dearest and not early]
    open_to = [i for i in cheaper if funds.enough(prices[i])]
    cheapest = min((i for i in range(len(candidates)) if i != complete), key=lambda i: prices[i])
    if funds.promised and not any(funds.enough(prices[i], CLOCKS) for i in cheaper or [cheapest]):
        spent = funds.steps - funds.position - max(0.0, 1 - prices[cheapest]) * max(0, funds.latest - funds.position)
        raise OverBudget(
            f"search.budget: a step on {candidates[cheapest]} costs {prices[cheapest]:.0%} of a complete one as "
            f"measured here, so the rest of the run takes at least {spent:.0f} complete steps, {funds.left:.0f} are "
            "left; the same command with a larger search.budget resumes the run"
        )
    noise = errors or {}
    gaps = [
        max(0.0, loss - losses[complete] - NOISE * noise.get(candidate, 0.0))
        for candidate, loss in zip(candidates, losses)
    ]
    scores = {i: gaps[i] / (1 - prices[i]) for i in open_to or [i for i in cheaper if i == cheapest]}
    choice = Choice(candidates[complete], funds.position)
    if scores:
        tied = [i for i, score in scores.items() if score <= min(scores.values()) * (1 + TIE)]
        small = min(tied, key=lambda i: (prices[i], candidates[i]))
        choice = funds.choice(candidates[small], prices[small], candidates[complete])
    if choice.subnet != candidates[complete]:
        loses = f"loses {gaps[small]:.3g} of loss beyond noise" if gaps[small] else "loses nothing beyond noise"
        why = f"a step of it costs {prices[small]:.0%} of a complete one and {loses}"
    elif funds.saving <= 0:
        why = "it can be paid for to the end"
    elif early:
        why = f"too early to save, {max(0.0, learned):.0%} of the loss of guessing is gone, {LEARNED:.0%} is needed"
    elif not cheaper:
        why = f"nothing to save, a step on {candidates[cheapest]} costs {prices[cheapest]:.0%} of a complete one"
    else:
        why = "it needs what is left of the run"
    shown = tuple(scores.get(i) for i in range(len(candidates)))
    return Decision(
        stage, candidates, losses, seconds, shown, choice.subnet, complete_from=choice.complete_from, why=why
    )


def _found(
    stage: int, measured: Sequence[Mapping[Subnet, float]], times: Mapping[Subnet, float]
) -> tuple[tuple[Subnet, ...], tuple[float, ...], tuple[float, ...]]:
    """The candidates, ascending, their mean losses and their times. Raises ValueError."""
    candidates = tuple(sorted(times))
    losses = tuple(float(np.mean([losses[c] for losses in measured])) for c in candidates)
    seconds = tuple(times[c] for c in candidates)
    if not (np.isfinite([*losses, *seconds]).all() and min(losses) > 0 and min(seconds) > 0):
        raise ValueError(f"stage {stage}: losses and times must be finite and positive, got {losses} and {seconds}")
    return candidates, losses, seconds
