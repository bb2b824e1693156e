"""The growth schedule Psi (paper 3.1, 4): which network trains in which steps, as far as that has been decided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Literal

from scaleprog.growth.operators import LayerMap, fresh, grow, keep
from scaleprog.growth.phase import Course, Phase, Regularization, Split, Window, undivided
from scaleprog.growth.policy import Budget, Policy, Price
from scaleprog.growth.search import BudgetState
from scaleprog.growth.space import Choice, GrowthSpace, Subnet, View, ladder
from scaleprog.recipe.keys import GrowthSettings, Operator

ScheduleKind = Literal["fixed", "automatic", "supernet"]


@dataclass(frozen=True)
class Entry:
    """How the network of a phase comes about.

    Args:
        layer_map: builds it from the network before.
        rewind_to: the step at which that network was saved (None: the present network is the one).
    """

    layer_map: LayerMap
    rewind_to: int | None = None


@dataclass(frozen=True)
class Compute:
    """Costs for a schedule that counts compute.

    Args:
        prices: of a step on every network, in steps of the complete model.
        unit: the cost of a schedule position.
    """

    prices: tuple[tuple[Subnet, float], ...]
    unit: float

    @classmethod
    def of(cls, schedule: "Schedule", price: Price) -> "Compute":
        """The costs for `schedule` with which the whole run costs as much as if it counted steps.

        `price`: of a step on a Subnet, in any unit.
        """
        prices = {subnet: price(subnet) / price(schedule.full) for subnet in schedule.networks}
        policy = schedule.policy
        if isinstance(policy, Budget):
            unit = policy.limit
        else:
            lengths = zip(policy.ladder, pairwise(policy.bounds), strict=True)
            unit = sum((end - begin) * prices[subnet] for subnet, (begin, end) in lengths) / schedule.steps
        return cls(tuple(prices.items()), unit)

    def pace(self, candidates: Sequence[Subnet]) -> float:
        """How many positions a step on one of `candidates`, which take turns, is worth."""
        prices = dict(self.prices)
        return sum(prices[subnet] for subnet in candidates) / len(candidates) / self.unit


@dataclass(frozen=True)
class Schedule:
    """Psi for a run of `steps` schedule positions: `policy` decides about stages, and the schedule tiles them.

    Args:
        kind: `fixed`: the stages train the ladder; `automatic`: searches choose; `supernet`: one supernet throughout.
        ladder: the Subnet of every stage that is not searched; the last one is the complete model.
        steps: schedule positions of the run.
        search_steps: optimizer steps of a search.
        scoring: cost of measuring one network's loss in a search, in training steps of that network.
        policy: what a stage may train, and when it ends.
        recycle: whether a search's steps advance the schedule, and its weights are kept.
        adaptive_regularization: whether the strengths of regularization grow with the network (paper 5.3).
        patch: side of a patch in pixels, if Subnets see a subset of the patches (None: they see smaller images).
        curriculum: whether such a subset shows only low frequencies.
        operator: how a network grows.
        split: how the model family divides a depth among its layer groups.
        begun: phases that are trained already, if the run is a fork whose parent had another schedule. The policy
            decides from their end on, and no network is smaller than their last one.
        whole: the complete model, if even the last stage sees only some of its patches (None: the last of `ladder`).
        window: what a supernet throughout trains when (None: all that the growth space holds, evenly).
        first: the strengths of regularization with which growth begins, if they grow (None: the paper's).
        compute: what the positions of the schedule cost, if they count compute (None: they count steps). Equal stages
            then cost the same each. A budget hands out steps by itself; the learning rate follows what they cost.
    """

    kind: ScheduleKind
    ladder: tuple[Subnet, ...]
    steps: int
    search_steps: int
    scoring: float
    policy: Policy
    recycle: bool = True
    adaptive_regularization: bool = True
    patch: int | None = None
    curriculum: bool = False
    operator: Operator = "mogrow"
    split: Split = undivided
    begun: tuple[Phase, ...] = ()
    whole: Subnet | None = None
    window: Window | None = None
    first: Regularization | None = None
    compute: Compute | None = None

    @property
    def budget(self) -> Budget | None:
        """The policy, if it is a budget."""
        return self.policy if isinstance(self.policy, Budget) else None

    @property
    def stages(self) -> int:
        """K, the number of stages."""
        return 1 if self.kind == "supernet" else len(self.ladder)

    @property
    def space(self) -> GrowthSpace:
        """Omega, the growth space."""
        return GrowthSpace.of(self.ladder)

    @property
    def full(self) -> Subnet:
        """The complete model, which the last stage trains."""
        return self.whole or self.ladder[-1]

    @property
    def networks(self) -> tuple[Subnet, ...]:
        """Every Subnet that the run may train, and perhaps others, ascending."""
        known = {*self.ladder, self.full, *(subnet for phase in self.begun for subnet in phase.candidates)}
        if (self.kind == "fixed" or self.window is not None) and not self.begun:
            return tuple(sorted(known))
        return GrowthSpace.of(list(known)).candidates(None, "all")

    def view(self, subnet: Subnet) -> View:
        """The part of an image that `subnet` sees."""
        if self.patch is None or subnet.resolution == self.full.resolution:
            return View(subnet.resolution)
        cutoff = subnet.resolution if self.curriculum else None
        return View(self.full.resolution, (subnet.resolution // self.patch) ** 2, cutoff)

    @property
    def pixels(self) -> tuple[int, ...]:
        """Sides of the images that steps of this run may see, ascending."""
        return tuple(sorted({self.view(subnet).pixels for subnet in self.networks}))

    def scoring_targets(self, search: Phase) -> list[Subnet]:
        """The Subnets whose losses a search measures, ascending."""
        return sorted({self.policy.proxy(subnet) for subnet in search.candidates})

    # ---- phases

    @property
    def settled(self) -> list[Choice]:
        """The choices of the searches in `begun`, by which phases no longer change."""
        return [Choice(after.network) for search, after in pairwise(self.begun) if search.searched]

    def phases(self, choices: Sequence[Choice]) -> list[Phase]:
        """All phases that follow from the searches' choices so far, those in `begun` included; the last phase may be an
        undecided search."""
        return list(self._phases(tuple(choices)))

    def takeover(self, choices: Sequence[Choice]) -> float:
        """The schedule position from which the last network trains; infinite if a search has yet to decide it."""
        *before, last = self.phases(choices)
        if last.searched:
            return math.inf
        for phase in reversed(before):
            if phase.candidates != last.candidates:
                break
            last = phase
        return last.progress_of(last.start)

    @cache  # noqa: B019 - called at every step; schedules and choices are few and hashable
    def _phases(self, choices: tuple[Choice, ...]) -> list[Phase]:
        phases, undecided = list(self.begun), list(choices[len(self.settled) :])
        least, choice, offered = Subnet(1, 1), None, None
        number, stage, step, position, began = 0, 1, 0, 0, 0
        progress, progress_began = 0.0, 0.0  # only known to schedules that count compute
        if phases:
            last = phases[-1]
            least, choice = last.network, Choice(last.network)
            number, step, position, began = last.stage, last.stop, last.position_of(last.stop), last.began
        everything = self._at_least(least, self.space.candidates(None, "all"))
        if self.window is not None:
            everything = tuple(sorted(set(self.window.networks)))
        if self.kind == "supernet" and len(everything) > 1:
            stop, base = step + self.steps - position, min(subnet.depth for subnet in everything)
            supernet = Phase(
                number + 1, "supernet", step, stop, position, everything, base, began=began, window=self.window
            )
            return [*phases, supernet]
        if choice is not None:
            stage, offered = self.policy.join(position, choice.subnet)
        number += 1 - stage  # of stage 0, so that a fork's stages follow those of `begun`
        while (now := progress if self._tiles_compute else position) < self.steps:
            offered = offered or self.policy.candidates(stage, now, choice)
            candidates, offered, failed = self._at_least(least, offered), None, False
            if len(candidates) > 1:
                base = choice.subnet.depth if choice else min(s.depth for s in candidates)
                stop = step + self.search_steps
                course = None if self.compute is None else Course(progress, self._pace(candidates), progress_began)
                search = Phase(
                    number + stage,
                    "supernet",
                    step,
                    stop,
                    position,
                    candidates,
                    base,
                    searched=True,
                    began=began,
                    course=course,
                )
                phases.append(search)
                if not undecided:
                    return phases
                choice = undecided.pop(0)
                step, position = search.stop, search.position_of(search.stop if self.recycle else search.start)
                now, progress = self.position_after(search), search.progress_of(search.stop)
                failed = self.policy.fails(search, choice)
            else:
                choice = Choice(candidates[0])
            end, subnet = self.policy.end(stage, now, choice), choice.subnet
            strength = Regularization()
            if self.adaptive_regularization:
                strength = Regularization.at(self.policy.ramp(stage, now, subnet), self.first)
            if failed:
                began, progress_began = position, progress
            count, course = self._tile(subnet, now, end, progress, progress_began)
            stop = step + count
            phases.append(
                Phase(
                    number + stage,
                    "train",
                    step,
                    stop,
                    position,
                    (subnet,),
                    subnet.depth,
                    regularization=strength,
                    began=began,
                    course=course,
                )
            )
            step, position, stage = stop, position + count, stage + 1
            # not what the phase's own sum gives, which may be rounded to just before the end
            progress = float(end) if self._tiles_compute else phases[-1].progress_of(stop)
        return phases

    @property
    def _tiles_compute(self) -> bool:
        """Whether the policy's positions are of equal compute; a budget's are steps in any case."""
        return self.compute is not None and self.budget is None

    def _pace(self, candidates: Sequence[Subnet]) -> float:
        """The progress of a step on one of `candidates`, which take turns."""
        assert self.compute is not None
        pace = self.compute.pace(candidates)
        return pace if self._tiles_compute else min(1.0, pace)  # so that the progress is never ahead of the steps

    def _tile(self, subnet: Subnet, now: float, end: int, progress: float, began: float) -> tuple[int, Course | None]:
        """The steps that train `subnet` from the policy's position `now` to `end`, and their part of the schedule."""
        if self.compute is None:
            return int(end - now), None
        pace = self._pace((subnet,))
        count = max(1, math.ceil((end - now) / pace - 1e-9)) if self._tiles_compute else int(end - now)
        if self._tiles_compute or end == self.steps:
            pace = (end - progress) / count  # ends exactly there
        return count, Course(progress, pace, began)

    @staticmethod
    def _at_least(least: Subnet, subnets: Sequence[Subnet]) -> tuple[Subnet, ...]:
        """`subnets`, none of them smaller than `least`."""
        return tuple(sorted({subnet.at_least(least) for subnet in subnets}))

    def position_after(self, search: Phase) -> float:
        """The schedule position at which a search's choice begins to train."""
        if self._tiles_compute:
            return search.progress_of(search.stop)
        return search.position + (search.stop - search.start if self.recycle else 0)

    def active(self, phase: Phase, subnet: Subnet) -> tuple[tuple[int, ...], ...]:
        """For each layer group of the network of `phase`, the positions of the layers that `subnet` runs, ascending."""
        return phase.active(subnet, self.operator, self.split)

    def entry(self, phases: Sequence[Phase], index: int) -> Entry | None:
        """How the network of phase `index` comes about (None: the previous phase's network continues).

        Without recycling, the network from before the search grows. In the first stage, and after a probe that found
        nothing learned, the network is fresh.
        """
        phase = phases[index]
        depths = self.split(phase.network.depth)
        continues = self.begun and index <= len(self.begun)  # a position may be rounded to where growth began
        if phase.position == phase.began and not continues:
            return Entry(fresh(depths))
        before, rewind_to = phases[index - 1], None
        if before.searched:
            if self.recycle:
                return Entry(keep(self.active(before, phase.network)))
            before, rewind_to = phases[index - 2], before.start
        elif phase.candidates == before.candidates:
            return None
        return Entry(grow(self.operator, self.split(before.network.depth), depths), rewind_to)

    def rewinds_to(self, choices: Sequence[Choice], phase: Phase) -> int | None:
        """The step whose checkpoint a run needs during `phase`; None if it needs none.

        Without recycling, the network after a search grows from the one before it. While that trains, too, a run that
        falls back to an older checkpoint may need it once more.
        """
        if self.recycle:
            return None
        if phase.searched:
            return phase.start
        return next(
            (before.start for before, at in pairwise(self.phases(choices)) if at == phase and before.searched), None
        )

    # ---- cost

    def cost(self, phases: Sequence[Phase], price: Price, step: int = 0) -> float:
        """The cost of `phases` in the unit of `price`: that of their steps and of the scoring in their searches.

        `step`: how many steps of them, counted as in `Phase.start`, are left out.
        """
        begun = [max(0, step - phase.start) for phase in phases]
        steps = sum((p.stop - p.start - done) * p.mean(price, done) for p, done in zip(phases, begun, strict=True))
        return steps + self.scoring * sum(sum(map(price, self.scoring_targets(p))) for p in phases if p.searched)

    def budget_state(self, phases: Sequence[Phase], price: Price, planned: Price | None = None) -> BudgetState:
        """The state of a run's budget after `phases`, the last of which is a search; see `Budget.state`."""
        assert self.budget is not None
        state = self.budget.state(phases[-1], *self._after(phases, price), price, planned)
        return replace(state, fixed=self.compute is not None)

    def expected(self, choices: Sequence[Choice], price: Price) -> list[Phase]:
        """All phases, if each future search makes the choice that the policy expects."""
        choices = list(choices or self.settled)
        while (phases := self.phases(choices))[-1].searched:
            choices.append(self.policy.expected(phases[-1], *self._after(phases, price), price))
        return phases

    def _after(self, phases: Sequence[Phase], price: Price) -> tuple[float, float]:
        """The position after `phases`, the last of which is a search, and their cost in steps of the complete model."""
        return self.position_after(phases[-1]), self.cost(phases, price) / price(self.full)


def rungs(growth: GrowthSettings, full: Subnet, multiple: int) -> tuple[ScheduleKind, tuple[Subnet, ...]]:
    """The kind and the ladder of the schedule that a recipe asks for.

    Args:
        growth: the recipe's growth settings.
        full: the complete model.
        multiple: the model's stride in pixels; resolutions are multiples of it, unless the recipe sets another.
    """
    if growth.schedule == "original":
        return "fixed", (full,)
    in_turn: ScheduleKind = "fixed" if growth.window is None else "supernet"
    if isinstance(growth.schedule, tuple):
        return in_turn, tuple(Subnet(s.resolution, s.depth) for s in growth.schedule)
    kind: ScheduleKind = in_turn if growth.schedule == "linear" else growth.schedule
    return kind, ladder(full, growth.smallest, growth.stages, growth.resolution_multiple or multiple)
