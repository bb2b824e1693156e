"""The search's decision: losses and step times of the candidates -> the chosen Subnet, and how long it trains.

There are two methods. `published` (paper 4.1, 4.3) balances loss against time with a fitted exponent. `budget`, which
is not in the paper, knows what the run may cost, and chooses the candidate that gives up the least loss per step saved.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from scaleprog.errors import OverBudget
from scaleprog.growth.space import Choice, Subnet

TIE = 1e-6  # relative difference of two scores below which the cheaper candidate wins
NOISE = 2.0  # a loss counts as higher if it exceeds the complete model's by more standard errors than this
LEARNED = 0.25  # saving begins once this part of a uniform guess's loss is gone; docs/LOG.md says why
LEARNED_AT_PROBE = 0.1  # the same at a probe, a tenth into the run
CLOCKS = 0.01  # tolerance for noisy step times, as a part of the run: a promised budget may be missed by this much
WORTHWHILE = 0.9  # a step that costs a larger part of a complete one does not save enough to justify a growth


@dataclass(frozen=True)
class Decision:
    """The choice of a search, with the mean loss, the step time in seconds (or GMACs) and the score of each candidate.

    The published method sets `alpha`; its scores measure time in steps of the cheapest candidate. The budget method
    sets `complete_from`, the schedule position of the takeover, `why`, the reason for the choice as text, and `learned`
    (see `Choice`); its scores are loss per step saved (None: the complete model, and candidates that cannot save
    enough).
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
    learned: bool = False

    @property
    def because(self) -> str:
        """The details of the decision, as text."""
        if self.complete_from is None:
            why = f"alpha {self.alpha:.4f}"
        else:
            why = ": ".join(filter(None, (f"complete from schedule step {self.complete_from}", self.why)))
        return "; ".join(filter(None, (why, self._tie)))

    @property
    def _tie(self) -> str:
        """What is said about candidates that score as well as the chosen one; empty if there are none."""
        best = dict(zip(self.candidates, self.scores))[self.chosen]
        if best is None:
            return ""
        tied = [score for score in self.scores if score is not None and abs(score - best) <= best * TIE]
        if len(tied) < 2:
            return ""
        what = f"{len(tied)} candidates tie" if best else f"nothing is lost by {len(tied)} candidates"
        return f"{what}: the {'cheaper' if len(tied) == 2 else 'cheapest'} one is taken"

    def table(self, unit: str) -> list[dict[str, str]]:
        """A row of text for each candidate, which is named by its pixels x layers.

        `unit`: that of the times, "GMACs" or "step ms".
        """
        scale = 1e3 if unit == "step ms" else 1.0
        return [
            {
                "candidate": subnet.short,
                "loss": f"{loss:.4f}",
                unit: f"{time * scale:.4g}",
                "score": "–" if score is None else f"{score:.4f}",
                "chosen": "chosen" if subnet == self.chosen else "",
            }
            for subnet, loss, time, score in zip(self.candidates, self.losses, self.times, self.scores, strict=True)
        ]

    @property
    def choice(self) -> Choice:
        """The part of the decision that determines the schedule."""
        return Choice(self.chosen, self.complete_from, self.learned)


@dataclass(frozen=True)
class BudgetState:
    """The state of a run's budget at a search. Costs are in steps of the complete model.

    Args:
        position: schedule position at which the search's choice begins to train.
        steps: positions of the whole schedule.
        latest: last position at which the complete model may take over.
        left: cost that the run may still spend.
        promised: whether the recipe names the budget, so that the run must not exceed it.
        probing: whether the search only asks if the smallest network learns at all: it continues, or the complete model
            takes over.
        fixed: whether a run that resumes cannot have another budget.
    """

    position: int
    steps: int
    latest: int
    left: float
    promised: bool = False
    probing: bool = False
    fixed: bool = False

    @property
    def saving(self) -> float:
        """The cost that the rest of the run must save, compared with training only the complete model."""
        return self.steps - self.position - self.left

    def choice(self, small: Subnet, price: float, complete: Subnet) -> Choice:
        """The choice of `small`, whose step costs `price` < 1, until the complete model takes over.

        The takeover comes as early as the budget allows, but no later than `latest`, even if that saves too little. If
        it would come immediately, the choice is `complete` itself. At a probe, `small` counts as having learned.
        """
        takeover = self.position + math.ceil(self.saving / (1 - price) - 1e-9)
        takeover = max(self.position, min(takeover, self.latest))
        early = takeover > self.position
        return Choice(small if early else complete, takeover, learned=self.probing and not early)

    def enough(self, price: float, missed: float = 1e-9) -> bool:
        """Whether a network whose step costs `price` can save enough; `missed` is a tolerance, as a part of the run."""
        return self.saving <= max(0.0, (1 - price) * (self.latest - self.position)) + missed * self.steps


def measurement_steps(start: int, stop: int, epoch: int, measurements: int) -> tuple[int, ...]:
    """The optimizer steps after which losses are measured, equispaced over the last `epoch` steps before `stop`."""
    if measurements == 1:
        return (stop,)
    first = max(start, stop - epoch)
    return tuple(first + (stop - first) * i // (measurements - 1) for i in range(measurements))


def step_time(samples: Sequence[float]) -> float:
    """The duration of a step: the lower median of one or more `samples`, because outliers are mostly slow.

    Ignores the first of several samples, because that step may have compiled or allocated.
    """
    return median_low(samples[1:] or samples)


def candidate_times(measured: Mapping[Subnet, float], costs: Mapping[Subnet, float]) -> dict[Subnet, float]:
    """The step time of every candidate in `costs` (GMACs).

    The time of a candidate that no step happened to sample is estimated from its cost. If nothing was measured, the
    times are the costs.
    """
    known = [measured[subnet] / cost for subnet, cost in costs.items() if measured.get(subnet)]
    rate = median(known) if known else 1.0
    return {subnet: measured.get(subnet) or cost * rate for subnet, cost in costs.items()}


def balancing_exponent(losses: Sequence[float], times: Sequence[float]) -> float:
    """alpha >= 0, which balances the candidates' scores: fits loss ~ a * T^b in log-log space; alpha = max(-b, 0)."""
    import numpy as np  # starts a thread per core, which `status` on a login node must not

    x, y = np.log(np.asarray(times, np.float64)), np.log(np.asarray(losses, np.float64))
    x = x - x.mean()
    spread = float(x @ x)
    return max(-float(x @ (y - y.mean())) / spread, 0.0) if spread > 1e-12 else 0.0


def decide(stage: int, measured: Sequence[Mapping[Subnet, float]], times: Mapping[Subnet, float]) -> Decision:
    """The published choice: argmin loss * T^alpha over the candidates; on a tie, the cheapest one wins.

    `measured` holds the losses of every candidate at each measurement, which are averaged. Raises ValueError if a loss
    or a time is not finite and positive.
    """
    candidates, losses, seconds = _found(stage, measured, times)
    alpha = balancing_exponent(losses, seconds)
    cheapest = min(seconds)  # as the unit of time, it avoids overflow and makes scores independent of the clock's unit
    scores = [loss * (time / cheapest) ** alpha for loss, time in zip(losses, seconds)]
    best = min(scores)
    tied = [i for i, score in enumerate(scores) if score <= best * (1 + TIE)]
    winner = min(tied, key=lambda i: (seconds[i], candidates[i]))
    return Decision(stage, candidates, losses, seconds, tuple(scores), candidates[winner], alpha=alpha)


def decide_within(
    budget: BudgetState,
    stage: int,
    measured: Sequence[Mapping[Subnet, float]],
    times: Mapping[Subnet, float],
    errors: Mapping[Subnet, float] | None = None,
    guessing: float | None = None,
) -> Decision:
    """The budget's choice: the complete model if the budget pays for it to the end, else the least loss per step saved.

    A Subnet that trains in place of the complete model (the largest candidate) gives up the difference of their losses
    and saves the difference of their times. The budget fixes how much to save before the takeover, so a candidate's
    score is the loss that it gives up per step saved: the cheaper a Subnet, the sooner the takeover. In the plane of
    time and loss, the lowest score is the tangent from the complete model to the candidates.

    - A difference of losses within twice its standard error is noise and counts as 0.
    - All candidates that give up nothing tie, and so do scores within a factor of 1 + 1e-6; then the cheapest one wins.
    - A candidate that cannot save enough in the rest of the run is left out, if another one can.
    - A probe has only the smallest Subnet to choose, or the complete model.
    - If the budget is not promised, the complete model also wins if no candidate's step is noticeably cheaper, or if
      even the best loss is near `guessing`: the network has learned so little that cheap steps would be wasted.

    Args:
        budget: state of the budget.
        stage: number of the stage.
        measured: losses of every candidate at each measurement, which are averaged.
        times: step time of every candidate, in any unit.
        errors: standard error of each candidate's difference of losses from the complete model (None: all 0).
        guessing: loss of a uniform guess (None: not checked).

    Raises:
        OverBudget: no choice keeps a promised budget.
        ValueError: a loss or a time is not finite and positive.
    """
    candidates, losses, seconds = _found(stage, measured, times)
    complete = max(range(len(candidates)), key=lambda i: (candidates[i].resolution, candidates[i].depth))
    prices = [time / seconds[complete] for time in seconds]
    learned = 1.0 if guessing is None else 1 - min(losses) / guessing
    needed = LEARNED_AT_PROBE if budget.probing else LEARNED
    early = learned < needed and not budget.promised
    dearest = 1.0 if budget.promised else WORTHWHILE
    smaller = [0] if budget.probing else [i for i in range(len(candidates)) if i != complete]
    cheaper = [i for i in smaller if prices[i] < dearest and not early]
    open_to = [i for i in cheaper if budget.enough(prices[i])]
    cheapest = min(smaller, key=lambda i: prices[i])
    if budget.promised and not any(budget.enough(prices[i], CLOCKS) for i in cheaper or [cheapest]):
        spent = (
            budget.steps - budget.position - max(0.0, 1 - prices[cheapest]) * max(0, budget.latest - budget.position)
        )
        way = "to resume, run the same command with a larger search.budget, below 1"
        if budget.fixed:
            way = "growth.steps: compute cannot change its budget; begin again with a larger search.budget"
        elif prices[cheapest] >= 1:
            way = "no budget below 1 pays for that; begin again with growth.schedule: original"
        raise OverBudget(
            f"search.budget: a step on {candidates[cheapest]} costs {prices[cheapest]:.0%} of a complete one as "
            f"measured here, so the rest of the run takes at least {spent:.0f} complete steps, but {budget.left:.0f} "
            f"are left; {way}"
        )
    noise = errors or {}
    gaps = [
        max(0.0, loss - losses[complete] - NOISE * noise.get(candidate, 0.0))
        for candidate, loss in zip(candidates, losses)
    ]
    scores = {i: gaps[i] / (1 - prices[i]) for i in open_to or [i for i in cheaper if i == cheapest]}
    choice = Choice(candidates[complete], budget.position, learned=budget.probing and not early)
    if scores:
        tied = [i for i, score in scores.items() if score <= min(scores.values()) * (1 + TIE)]
        small = min(tied, key=lambda i: (prices[i], candidates[i]))
        choice = budget.choice(candidates[small], prices[small], candidates[complete])
    if choice.subnet != candidates[complete]:
        loses = (
            f"its loss is {gaps[small]:.3g} higher than noise explains"
            if gaps[small]
            else "its loss is as low, within noise"
        )
        why = f"its step costs {prices[small]:.0%} of a complete one, and {loses}"
    elif budget.saving <= 0:
        why = "the budget covers it to the end"
    elif early:
        gone = min(max(0.0, learned), needed - 0.01)  # 9.8 % are not "10%, not yet 10%"
        why = f"too early to save: the loss is {gone:.0%} below a uniform guess's, not yet {needed:.0%}"
    elif not cheaper:
        why = f"nothing to save: a step on {candidates[cheapest]} costs {prices[cheapest]:.0%} of a complete one"
    else:
        why = "it needs the rest of the budget"
    shown = tuple(scores.get(i) for i in range(len(candidates)))
    return Decision(
        stage,
        candidates,
        losses,
        seconds,
        shown,
        choice.subnet,
        complete_from=choice.complete_from,
        why=why,
        learned=choice.learned,
    )


def _found(
    stage: int, measured: Sequence[Mapping[Subnet, float]], times: Mapping[Subnet, float]
) -> tuple[tuple[Subnet, ...], tuple[float, ...], tuple[float, ...]]:
    """The candidates in ascending order, their mean losses and their times. Raises ValueError."""
    import numpy as np

    candidates = tuple(sorted(times))
    losses = tuple(float(np.mean([losses[c] for losses in measured])) for c in candidates)
    seconds = tuple(times[c] for c in candidates)
    if not (np.isfinite([*losses, *seconds]).all() and min(losses) > 0 and min(seconds) > 0):
        raise ValueError(f"stage {stage}: losses and times must be finite and positive, got {losses} and {seconds}")
    return candidates, losses, seconds
