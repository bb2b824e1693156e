"""The two policies of a schedule: what each stage may train, and when it ends. The schedule itself only tiles.

`EqualStages` is the paper's: K stages of equal length. `Budget` trains the smallest network until a search's choice
hands over to the complete model, as early as the budget allows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scaleprog.growth.phase import Phase
from scaleprog.growth.search import BudgetState
from scaleprog.growth.space import Choice, GrowthSpace, Subnet
from scaleprog.recipe.keys import CandidateRule
from scaleprog.recipe.numbers import ceil_div

PROBED_PARTS = 10
"""The smallest network trains this part of a run before it is probed."""

Price = Callable[[Subnet], float]
"""The cost of a step on a Subnet, in any unit."""


@dataclass(frozen=True)
class EqualStages:
    """K stages of equal length (paper 3.1, 4.1). Each trains its Subnet on the ladder or, with a rule, a search's.

    Args:
        ladder: the Subnet of every stage that is not searched; the last one is the complete model.
        steps: schedule positions of the run.
        rule: which Subnets are the candidates of a search (None: no stage is searched).
        cooldown: positions at the end that only the last stage trains, besides its equal part.
    """

    ladder: tuple[Subnet, ...]
    steps: int
    rule: CandidateRule | None = None
    cooldown: int = 0

    def candidates(self, stage: int, position: float, before: Choice | None) -> tuple[Subnet, ...]:
        """The Subnets that the stage beginning at `position` may train; `before`: the choice of the stage before."""
        if self.rule is None or stage == len(self.ladder):
            return (self.ladder[stage - 1],)
        return GrowthSpace.of(self.ladder).candidates(before.subnet if before else None, self.rule)

    def join(self, position: int, present: Subnet) -> tuple[int, tuple[Subnet, ...]]:
        """The stage at `position`, and what a run that joins the schedule there, with the network `present`, may train.

        Within a stage that is searched, that is `present`: its search would have been at the beginning.
        """
        stage = self._at(position)
        if self.rule is None or stage == len(self.ladder) or position == self._ends(stage - 1):
            return stage, self.candidates(stage, position, Choice(present))
        return stage, (present,)

    @property
    def bounds(self) -> list[int]:
        """The positions between which the stages lie: one more than stages."""
        return [*map(self._ends, range(len(self.ladder))), self.steps]

    def _ends(self, stage: int) -> int:
        """The position at which a stage before the last one ends; 0 for stage 0."""
        return stage * (self.steps - self.cooldown) // len(self.ladder)

    def _at(self, position: float) -> int:
        """The stage at `position`."""
        stages = len(self.ladder)
        return next((stage for stage in range(1, stages) if position < self._ends(stage)), stages)

    def end(self, stage: int, position: float, choice: Choice) -> int:
        """The position at which a stage ends, if its choice begins to train at `position`."""
        return self.steps if stage == len(self.ladder) else self._ends(stage)

    def ramp(self, stage: int, position: float, subnet: Subnet) -> float:
        """The growth progress, 0 to 1, of a stage that begins to train `subnet` at `position`."""
        return (stage - 1) / (len(self.ladder) - 1) if len(self.ladder) > 1 else 1.0

    def expected(self, search: Phase, position: float, spent: float, price: Price) -> Choice:
        """The choice of a future search, in the absence of anything better: the ladder's."""
        return Choice(self.ladder[self._at(search.progress_of(search.start)) - 1].at_least(search.candidates[0]))

    def fails(self, search: Phase, choice: Choice) -> bool:
        """Whether `choice` means that the network before `search` has learned nothing; the next one starts afresh."""
        return False

    def proxy(self, subnet: Subnet) -> Subnet:
        """The Subnet whose loss a search uses to score `subnet`: itself."""
        return subnet


@dataclass(frozen=True)
class Budget:
    """The most that a run may cost, and how it spends that.

    The first stage trains the smallest network, a search's choice sets the takeover, and the stages before the takeover
    are about equally long.

    Args:
        ladder: the first is the smallest network, the last the complete model; the others span the growth space.
        steps: schedule positions of the run.
        rule: which Subnets are the candidates of a search.
        search_steps: optimizer steps of a search.
        scoring: cost of measuring one network's loss in a search, in training steps of that network.
        limit: most that the run may cost, as a part of Original's cost.
        promised: whether the recipe asks for this limit, and for less than Original's cost.
        complete_steps: fewest steps that the complete model trains.
        subset: whether Subnets see some of the patches of an image, not smaller images.
        cooldown: positions at the end that only the complete model trains, besides the last of the equal parts.
        recycle: whether a search's steps advance the schedule.
        most: searches, at most, besides the probe; None: one in each stage before the takeover.
    """

    ladder: tuple[Subnet, ...]
    steps: int
    rule: CandidateRule
    search_steps: int
    scoring: float
    limit: float
    promised: bool = False
    complete_steps: int = 0
    subset: bool = False
    cooldown: int = 0
    recycle: bool = True
    most: int | None = None

    @property
    def part(self) -> int:
        """The length of an equal part."""
        return (self.steps - self.cooldown) // len(self.ladder)

    @property
    def latest(self) -> int:
        """The last position at which the complete model may take over.

        From there on, the complete model gets at least the last of the equal parts and `complete_steps` steps. 0 if
        that leaves no room for a first search: the complete model then trains throughout.
        """
        stages = len(self.ladder)
        by_parts = (stages - 1) * (self.steps - self.cooldown) // stages
        by_steps = self.steps - self.complete_steps
        if by_steps >= by_parts:
            return by_parts
        return by_steps if by_steps >= self.part + self.search_steps else 0

    @property
    def probe(self) -> int:
        """The position of a first search that only asks whether the smallest network learns at all; 0: there is none.

        A promised budget has to be saved in any case, so it is not probed.
        """
        if self.promised or self.latest == 0:
            return 0
        position = self.steps // PROBED_PARTS
        return position if position + 2 * self.search_steps <= self.part else 0

    @property
    def short(self) -> str:
        """Why the complete model trains from the start, as text; empty if the run can save steps."""
        if len(self.ladder) == 1 or self.latest > 0:
            return ""
        return (
            f"a run of {self.steps} steps is too short to save any: the complete model needs {self.complete_steps} "
            "after its growth (search.complete_steps), so it trains all of them"
        )

    def state(
        self, search: Phase, position: float, spent: float, price: Price, planned: Price | None = None
    ) -> BudgetState:
        """The state of the budget at `search`, whose choice trains from `position` on.

        If the budget is not promised, it was planned with the prices `planned`. At the prices `price`, measured here,
        its saving shrinks by the same factor as the saving of a step on the cheapest candidate.

        Args:
            search: the search.
            position: the schedule position after it.
            spent: cost of everything so far, in steps of the complete model.
            price: the price of a step.
            planned: the same, as it was when the budget was planned (None: `price`).
        """
        limit, complete = self.limit, self.ladder[-1]
        if planned is not None and not self.promised:
            small = min(search.candidates, key=planned)
            here, there = (1 - of(small) / of(complete) for of in (price, planned))
            limit = 1 - (1 - limit) * here / there
        left = limit * self.steps - spent
        return BudgetState(round(position), self.steps, self.latest, left, self.promised, self._probes(search))

    def candidates(self, stage: int, position: float, before: Choice | None) -> tuple[Subnet, ...]:
        """As `EqualStages.candidates`."""
        if position >= self.latest or (
            before and before.complete_from is not None and position >= before.complete_from
        ):
            return self.ladder[-1:]
        return self.ladder[:1] if before is None else GrowthSpace.of(self.ladder).candidates(before.subnet, self.rule)

    def join(self, position: int, present: Subnet) -> tuple[int, tuple[Subnet, ...]]:
        """As `EqualStages.join`. From the first equal part on, a search decides at once, unless it would end too late.

        The stage is never the first, so nothing is probed.
        """
        if position + self.search_steps > self.latest:
            return 2, self.ladder[-1:]
        return 2, (present,) if position < self.part else self.candidates(2, position, Choice(present))

    def end(self, stage: int, position: float, choice: Choice) -> int:
        """As `EqualStages.end`."""
        if choice.subnet == self.ladder[-1]:
            return self.steps
        if self.probe and position < self.part:
            return self.probe if stage == 1 else min(self.part, choice.complete_from or self.steps)
        if choice.complete_from is None:
            return self.part
        if self.most is not None and stage - 1 - bool(self.probe) >= self.most:  # the first stage has no search
            return choice.complete_from
        # another search would delay the takeover by its cost
        candidates = GrowthSpace.of(self.ladder).candidates(choice.subnet, self.rule)
        scored = max(3, len(set(map(self.proxy, candidates))))
        later = choice.complete_from + self.search_steps + math.ceil(scored * self.scoring)
        costly = self.promised and not self.recycle  # its steps would come on top, and could not be saved again
        if self.proxy(choice.subnet) == self.ladder[-1] or later > self.latest or costly:
            return choice.complete_from  # another search could not tell the two apart, or would come too late
        start = round(position)
        before = choice.complete_from - start
        return start + ceil_div(before, max(1, round(before * len(self.ladder) / (self.steps - self.cooldown))))

    def ramp(self, stage: int, position: float, subnet: Subnet) -> float:
        """As `EqualStages.ramp`."""
        return 1.0 if subnet == self.ladder[-1] else position / self.latest

    def expected(self, search: Phase, position: float, spent: float, price: Price) -> Choice:
        """The choice of a future search, in the absence of anything better: the cheapest candidate."""
        small, complete = min(search.candidates, key=price), self.ladder[-1]
        return self.state(search, position, spent, price).choice(small, price(small) / price(complete), complete)

    def fails(self, search: Phase, choice: Choice) -> bool:
        """As `EqualStages.fails`."""
        return self._probes(search) and choice.subnet == self.ladder[-1] and not choice.learned

    def proxy(self, subnet: Subnet) -> Subnet:
        """The Subnet whose loss a search uses to score `subnet`: if that sees only some patches, the one of its depth
        that sees all of them.

        A subset shows less of an image, but that does not mean that training on it teaches less. So the cheapest of
        several networks of one depth wins, and the loss decides only about depth.
        """
        return Subnet(self.ladder[-1].resolution, subnet.depth) if self.subset else subnet

    def _probes(self, search: Phase) -> bool:
        return 0 < search.position == self.probe


Policy = EqualStages | Budget
