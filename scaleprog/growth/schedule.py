"""The growth schedule Psi (paper 3.1, 4): which network trains in which steps, as far as that has been decided."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from scaleprog.growth import supernet
from scaleprog.growth.operators import LayerMap, fresh, grow, keep
from scaleprog.growth.regularization import Regularization, regularization
from scaleprog.growth.search import BudgetState
from scaleprog.growth.space import Choice, GrowthSpace, Subnet, View, ladder
from scaleprog.recipe.keys import CandidateRule, GrowthSettings, Operator
from scaleprog.recipe.numbers import ceil_div

PROBED_PARTS = 10  # the smallest network trains this part of a run before it is probed
Price = Callable[[Subnet], float]  # the cost of a step on a Subnet, in any unit
Split = Callable[[int], tuple[int, ...]]  # divides a depth among a model family's layer groups


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trains one network: a supernet (with several candidates) or a chosen Subnet.

    Args:
        stage: number of the stage, from 1.
        kind: whether the phase trains a supernet, or a Subnet.
        start, stop: optimizer steps finished when the phase begins and ends.
        position: position of `start` in the data order and in the learning-rate schedule. It equals `start`, unless
            `growth.recycle: false` went back to repeat the epochs of a search.
        candidates: the Subnets to train.
        base: depth of the network from which a supernet grows.
        searched: whether the phase is a search.
        regularization: strengths in this phase.
    """

    stage: int
    kind: Literal["supernet", "train"]
    start: int
    stop: int
    position: int
    candidates: tuple[Subnet, ...]
    base: int
    searched: bool
    regularization: Regularization
    began: int = 0
    """Schedule position at which its weights were initialized: not 0 after a probe found that nothing was learned."""

    @property
    def network(self) -> Subnet:
        """The network that holds all candidates."""
        return Subnet(max(s.resolution for s in self.candidates), max(s.depth for s in self.candidates))

    def subnet(self, seed: int, step: int) -> Subnet:
        """The Subnet that step `step` trains."""
        return self.candidates[0] if self.kind == "train" else supernet.sample(self.candidates, seed, step)

    def active(self, subnet: Subnet, operator: Operator, split: Split) -> tuple[tuple[int, ...], ...]:
        """Positions of the layers that `subnet` runs in each group of this phase's network."""
        if self.kind == "train":
            return tuple(tuple(range(depth)) for depth in split(subnet.depth))
        sizes = zip(split(self.base), split(self.network.depth), split(subnet.depth), strict=True)
        return tuple(supernet.active_layers(operator, *size) for size in sizes)

    def position_of(self, step: int) -> int:
        """The position of step `step` in the data order and the learning-rate schedule."""
        return self.position + step - self.start


@dataclass(frozen=True)
class Schedule:
    """Psi for a run of `steps` schedule positions.

    With a budget, the first stage trains the smallest network, a search's choice sets the takeover, and the stages
    before the takeover are about equally long.

    Args:
        kind: `fixed`: the stages train the ladder; `automatic`: searches choose; `supernet`: one supernet throughout.
        ladder: the Subnet of every stage that is not searched; the last one is the complete model.
        steps: schedule positions of the run.
        search_steps: optimizer steps of a search.
        rule: which Subnets are the candidates of a search.
        recycle: whether a search's steps advance the schedule, and its weights are kept.
        adaptive_regularization: whether the strengths of regularization grow with the network (paper 5.3).
        budget: most that the run may cost, as a part of Original's cost (None: no budget).
        promised: whether the recipe asks for this budget, and for less than Original's cost.
        complete_steps: fewest steps that the complete model trains.
        patch: side of a patch in pixels, if Subnets see a subset of the patches (None: they see smaller images).
        curriculum: whether such a subset shows only low frequencies.
        scoring: cost of measuring one network's loss in a search, in training steps of that network.
    """

    kind: Literal["fixed", "automatic", "supernet"]
    ladder: tuple[Subnet, ...]
    steps: int
    search_steps: int
    rule: CandidateRule
    recycle: bool
    adaptive_regularization: bool
    budget: float | None = None
    promised: bool = False
    complete_steps: int = 0
    patch: int | None = None
    curriculum: bool = False
    scoring: float = 0.0

    @classmethod
    def of(
        cls,
        growth: GrowthSettings,
        full: Subnet,
        multiple: int,
        steps: int,
        search_steps: int,
        rule: CandidateRule,
    ) -> "Schedule":
        """The schedule of a recipe.

        Args:
            growth: the recipe's growth settings.
            full: the complete model.
            multiple: the model's stride in pixels; resolutions are multiples of it, unless the recipe sets another.
            steps: schedule positions of the run.
            search_steps: optimizer steps of a search.
            rule: which Subnets are the candidates of a search.
        """
        kind: Literal["fixed", "automatic", "supernet"] = "fixed"
        if growth.schedule == "original":
            rungs: tuple[Subnet, ...] = (full,)
        elif isinstance(growth.schedule, tuple):
            rungs = tuple(Subnet(s.resolution, s.depth) for s in growth.schedule)
        else:
            rungs = ladder(full, growth.smallest, growth.stages, growth.resolution_multiple or multiple)
            kind = "fixed" if growth.schedule == "linear" else growth.schedule
        patch = multiple if growth.patches == "subset" else None
        return cls(
            kind, rungs, steps, search_steps, rule, growth.recycle, growth.adaptive_regularization,
            patch=patch, curriculum=growth.curriculum,
        )  # fmt: skip

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
        return self.ladder[-1]

    def view(self, subnet: Subnet) -> View:
        """The part of an image that `subnet` sees."""
        if self.patch is None or subnet.resolution == self.full.resolution:
            return View(subnet.resolution)
        cutoff = subnet.resolution if self.curriculum else None
        return View(self.full.resolution, (subnet.resolution // self.patch) ** 2, cutoff)

    def proxy(self, subnet: Subnet) -> Subnet:
        """The Subnet whose loss a search uses to score `subnet`.

        That is `subnet` itself or, within a budget, if `subnet` sees only some patches, the Subnet of the same depth
        that sees all of them. A subset shows less of an image, but that does not mean that training on it teaches less.
        So the cheapest of several networks of one depth wins, and the loss decides only about depth.
        """
        return subnet if self.budget is None or self.patch is None else Subnet(self.full.resolution, subnet.depth)

    def scoring_targets(self, search: Phase) -> list[Subnet]:
        """The Subnets whose losses a search measures, ascending."""
        return sorted({self.proxy(subnet) for subnet in search.candidates})

    @property
    def latest(self) -> int:
        """The last position at which the complete model may take over.

        From there on, the complete model gets at least the last of the equal parts and `complete_steps` steps. 0 if
        that leaves no room for a first search: the complete model then trains throughout.
        """
        by_parts, by_steps = (self.stages - 1) * self.steps // self.stages, self.steps - self.complete_steps
        if by_steps >= by_parts:
            return by_parts
        return by_steps if by_steps >= self.steps // self.stages + self.search_steps else 0

    @property
    def probe(self) -> int:
        """The position of a first search that only asks whether the smallest network learns at all; 0: there is none.

        A promised budget has to be saved in any case, so it is not probed.
        """
        if self.budget is None or self.promised or self.stages == 1 or self.latest == 0:
            return 0
        position = self.steps // PROBED_PARTS
        return position if position + 2 * self.search_steps <= self.steps // self.stages else 0

    @property
    def short(self) -> str:
        """Why the complete model trains from the start, as text; empty if the run can save steps."""
        if self.budget is None or self.stages == 1 or self.latest > 0:
            return ""
        return (
            f"a run of {self.steps} steps is too short to save any: the complete model trains all of them, as it needs "
            f"{self.complete_steps} after it has grown (search.complete_steps)"
        )

    def phases(self, choices: Sequence[Choice]) -> list[Phase]:
        """All phases that follow from the searches' choices so far; the last one may be an undecided search."""
        return list(self._phases(tuple(choices)))

    @cache  # noqa: B019 - called at every step; schedules and choices are few and hashable
    def _phases(self, choices: tuple[Choice, ...]) -> list[Phase]:
        phases: list[Phase] = []
        choice: Choice | None = None
        undecided, step, position, stage = list(choices), 0, 0, 1
        while position < self.steps:
            candidates = self._candidates(stage, position, choice)
            if len(candidates) > 1:
                base = choice.subnet.depth if choice else min(s.depth for s in candidates)
                searched = self.kind == "automatic"
                length = self.search_steps if searched else self.steps
                phases.append(
                    Phase(
                        stage, "supernet", step, step + length, position, candidates, base, searched, Regularization()
                    )
                )
                step += length
                if not undecided:
                    return phases
                choice = undecided.pop(0)
                position += length if self.recycle else 0
            else:
                choice = Choice(candidates[0])
            last, subnet = self._end(stage, position, choice), choice.subnet
            strength = self._regularization(stage, position, subnet)
            failed = subnet == self.full and self._probes(phases[-1:])
            phases.append(
                Phase(
                    stage, "train", step, step + last - position, position, (subnet,), subnet.depth, False, strength,
                    began=position if failed else 0,
                )
            )  # fmt: skip
            step, position, stage = step + last - position, last, stage + 1
        return phases

    def _probes(self, phases: Sequence[Phase]) -> bool:
        """Whether the last phase is the search of a probe."""
        return bool(phases) and phases[-1].searched and 0 < phases[-1].position == self.probe

    def cost(self, phases: Sequence[Phase], price: Price) -> float:
        """The cost of `phases` in the unit of `price`: that of their steps and of the scoring in their searches."""
        steps = sum((p.stop - p.start) * sum(map(price, p.candidates)) / len(p.candidates) for p in phases)
        return steps + self.scoring * sum(sum(map(price, self.scoring_targets(p))) for p in phases if p.searched)

    def budget_state(self, phases: Sequence[Phase], price: Price, planned: Price | None = None) -> BudgetState:
        """The state of a run's budget after `phases`, the last of which is a search.

        If the budget is not promised, it was planned with the prices `planned`. At the prices `price`, measured here,
        its saving shrinks by the same factor as the saving of a step on the cheapest candidate.
        """
        assert self.budget is not None
        search, budget = phases[-1], self.budget
        if planned is not None and not self.promised:
            small = min(search.candidates, key=planned)
            here, there = (1 - of(small) / of(self.full) for of in (price, planned))
            budget = 1 - (1 - budget) * here / there
        position = search.position + (search.stop - search.start if self.recycle else 0)
        spent = self.cost(phases, price) / price(self.full)
        return BudgetState(
            position, self.steps, self.latest, budget * self.steps - spent, self.promised, self._probes(phases)
        )

    def expected(self, choices: Sequence[Choice], price: Price) -> list[Phase]:
        """All phases, if each future search chooses its stage's Subnet on the ladder or, within a budget, the cheapest
        candidate."""
        choices = list(choices)
        while (phases := self.phases(choices))[-1].searched:
            search = phases[-1]
            if self.budget is None:
                choices.append(Choice(self.ladder[search.stage - 1]))
            else:
                small = min(search.candidates, key=price)
                choices.append(
                    self.budget_state(phases, price).choice(small, price(small) / price(self.full), self.full)
                )
        return phases

    def entry(self, phases: Sequence[Phase], index: int, operator: Operator, split: Split) -> LayerMap | None:
        """The layer map that builds the network of phase `index` (None: the previous phase's network continues).

        Without recycling, it applies to the network from before the search. In the first stage, and after a probe that
        found nothing learned, the network is fresh.
        """
        phase = phases[index]
        depths = split(phase.network.depth)
        if phase.position == phase.began:
            return fresh(depths)
        before = phases[index - 1]
        if before.searched:
            if self.recycle:
                return keep(before.active(phase.network, operator, split))
            before = phases[index - 2]
        elif phase.candidates == before.candidates:
            return None
        return grow(operator, split(before.network.depth), depths)

    def _candidates(self, stage: int, position: int, before: Choice | None) -> tuple[Subnet, ...]:
        """The Subnets that the stage beginning at `position` may train."""
        if self.kind == "supernet":
            return self.space.candidates(None, "all")
        if self.kind == "fixed":
            return (self.ladder[stage - 1],)
        if self.budget is None:
            complete, searched = stage == self.stages, True
        else:
            decided = before is not None and before.complete_from is not None and position >= before.complete_from
            complete, searched = decided or position >= self.latest, before is not None
        if complete:
            return (self.full,)
        previous = None if before is None else before.subnet
        return self.space.candidates(previous, self.rule) if searched else self.ladder[:1]

    def _end(self, stage: int, position: int, choice: Choice) -> int:
        """The position at which a stage ends, if its choice begins to train at `position`."""
        if self.budget is not None and choice.subnet == self.full:
            return self.steps
        if self.probe and position < self.steps // self.stages:
            return self.probe if stage == 1 else min(self.steps // self.stages, choice.complete_from or self.steps)
        if choice.complete_from is None:
            return stage * self.steps // self.stages
        # another search, which scores at most three networks, would delay the takeover by its cost
        later = choice.complete_from + self.search_steps + math.ceil(3 * self.scoring)
        if self.proxy(choice.subnet) == self.full or later > self.latest:
            return choice.complete_from  # another search could not tell the two apart, or would come too late
        before = choice.complete_from - position
        return position + ceil_div(before, max(1, round(before * self.stages / self.steps)))

    def _regularization(self, stage: int, position: int, subnet: Subnet) -> Regularization:
        """The strengths of regularization in a stage that begins to train `subnet` at `position`."""
        if not self.adaptive_regularization or self.stages == 1:
            return Regularization()
        if self.budget is None:
            return regularization((stage - 1) / (self.stages - 1))
        return regularization(1.0 if subnet == self.full else position / self.latest)
