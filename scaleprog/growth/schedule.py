"""The growth schedule Psi (paper 3.1, 4): which network trains from which step to which, as far as it is decided."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import Field

from scaleprog.growth import supernet
from scaleprog.growth.operators import LayerMap, Operator, fresh, grow, keep
from scaleprog.growth.regularization import Regularization, regularization
from scaleprog.growth.search import Funds
from scaleprog.growth.space import CandidateRule, Choice, GrowthSpace, Subnet, View, ladder
from scaleprog.settings import Layers, Part, Pixels, Settings, Stages

Price = Callable[[Subnet], float]  # what a step of a sub-network costs, in any unit
Split = Callable[[int], tuple[int, ...]]  # shares a depth out among a model family's layer groups


class SubnetSettings(Settings):
    """One stage of a schedule given by hand: resolution in pixels, depth in layers."""

    resolution: Pixels
    depth: Layers


ByHand = Annotated[tuple[SubnetSettings, ...], Field(max_length=100)]


class GrowthSettings(Settings):
    """How the network grows.

    `schedule`: `original` (full size throughout), `linear` ("Prog"), `automatic` ("AutoProg"), `supernet` (the
    baseline of Table 8) or a list of stages by hand; `smallest`: the ratio s1 of the growth space ("0.5 Omega");
    `recycle`: whether a stage inherits the weights of its search; `optimizer`: whether AdamW's moments start anew at
    growth or follow their layers; `resolution_multiple`: resolutions are rounded to it (default: the model's stride;
    published: 32 for DeiT/16); `adaptive_regularization`: AdaReg; `patches`: a small network sees few patches because
    images are shown in a low `resolution`, as published, or as a `subset` of the patches at full resolution, drawn anew
    for every image and step (PatchDropout, arXiv 2208.07220), so that nothing changes its scale at growth;
    `curriculum`: where it sees a subset, that holds only the frequencies that its `resolution` could show: what is
    easy first (EfficientTrain++, arXiv 2405.08768).
    """

    schedule: Literal["original", "linear", "automatic", "supernet"] | ByHand = "automatic"
    operator: Operator = "mogrow"
    stages: Stages = 4
    smallest: Part = 0.5
    recycle: bool = True
    optimizer: Literal["reset", "inherit"] = "reset"
    resolution_multiple: Pixels | None = None
    adaptive_regularization: bool = False
    patches: Literal["resolution", "subset"] = "resolution"
    curriculum: bool = False


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that trains one network: a supernet (with several candidates) or a chosen sub-network.

    `start` and `stop` count optimizer steps; `position` is where `start` stands in the data order and in the learning
    rate's schedule: the same number, unless `growth.recycle: false` went back to repeat the epochs of a search.
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

    @property
    def network(self) -> Subnet:
        """The network that holds all candidates."""
        return Subnet(max(s.resolution for s in self.candidates), max(s.depth for s in self.candidates))

    def subnet(self, seed: int, step: int) -> Subnet:
        """What step `step` trains."""
        return self.candidates[0] if self.kind == "train" else supernet.sample(self.candidates, seed, step)

    def active(self, subnet: Subnet, operator: Operator, split: Split) -> tuple[tuple[int, ...], ...]:
        """Positions of the layers that `subnet` runs in each group of this phase's network."""
        if self.kind == "train":
            return tuple(tuple(range(depth)) for depth in split(subnet.depth))
        sizes = zip(split(self.base), split(self.network.depth), split(subnet.depth), strict=True)
        return tuple(supernet.active_layers(operator, *size) for size in sizes)

    def position_of(self, step: int) -> int:
        """Where step `step` stands in the data order and the learning-rate schedule."""
        return self.position + step - self.start


@dataclass(frozen=True)
class Schedule:
    """Psi for a run of `steps` schedule positions.

    `ladder` holds the sub-networks of stages that are not searched. `budget` is what a run whose searches keep to one
    may cost, as a part of Original's cost (None: no budget): there the first stage trains the smallest network, a
    search's choice says where the complete model takes over, and stages until then are about an equal part each;
    `promised`: whether the recipe asks for it, and for less than all; `complete_steps`: how many the complete model
    trains at least. `patch` is the side in pixels of the patches that sub-networks see a subset of (None: by
    resolution); `curriculum`: whether only of low frequencies. `scoring` is what a search pays for the loss of one
    network, in its training steps.
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
        """The schedule of a recipe; `full` is the complete model, `multiple` the pixels resolutions are rounded to."""
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
        """K."""
        return 1 if self.kind == "supernet" else len(self.ladder)

    @property
    def space(self) -> GrowthSpace:
        """Omega."""
        return GrowthSpace.of(self.ladder)

    @property
    def full(self) -> Subnet:
        """The complete model, which the last stage trains."""
        return self.ladder[-1]

    def view(self, subnet: Subnet) -> View:
        """What `subnet` is shown of an image."""
        if self.patch is None or subnet.resolution == self.full.resolution:
            return View(subnet.resolution)
        band = subnet.resolution if self.curriculum else None
        return View(self.full.resolution, (subnet.resolution // self.patch) ** 2, band)

    def judged(self, subnet: Subnet) -> Subnet:
        """The sub-network by whose loss a search scores `subnet`: itself or, within a budget, where it sees a part of
        the patches, the one that sees all of them. That a part tells less about an image says nothing about what is
        learnt from it; so of networks of one depth the cheapest wins, and the loss decides about depth."""
        return subnet if self.budget is None or self.patch is None else Subnet(self.full.resolution, subnet.depth)

    def scored(self, search: Phase) -> list[Subnet]:
        """The sub-networks whose losses a search measures, ascending."""
        return sorted({self.judged(subnet) for subnet in search.candidates})

    @property
    def latest(self) -> int:
        """The last position at which the complete model may take over: the last of the equal parts is its own, and so
        are `complete_steps`. 0, so that it trains all the time, where these leave no room for a first search."""
        by_parts, by_steps = (self.stages - 1) * self.steps // self.stages, self.steps - self.complete_steps
        if by_steps >= by_parts:
            return by_parts
        return by_steps if by_steps >= self.steps // self.stages + self.search_steps else 0

    @property
    def short(self) -> str:
        """Why nothing is saved from the start; empty where something is."""
        if self.budget is None or self.stages == 1 or self.latest > 0:
            return ""
        return (
            f"a run of {self.steps} steps is too short to save any: the complete model trains all of them, as it needs "
            f"{self.complete_steps} after it has grown (search.complete_steps)"
        )

    def phases(self, choices: Sequence[Choice]) -> list[Phase]:
        """All phases that follow from the searches' choices so far; the last one may end in an open search."""
        return list(self._phases(tuple(choices)))

    @cache  # noqa: B019 - asked at every step; a schedule and the choices are few and hashable
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
            phases.append(
                Phase(stage, "train", step, step + last - position, position, (subnet,), subnet.depth, False, strength)
            )
            step, position, stage = step + last - position, last, stage + 1
        return phases

    def cost(self, phases: Sequence[Phase], price: Price) -> float:
        """What `phases` cost: their steps, and what their searches measure."""
        steps = sum((p.stop - p.start) * sum(map(price, p.candidates)) / len(p.candidates) for p in phases)
        return steps + self.scoring * sum(sum(map(price, self.scored(p))) for p in phases if p.searched)

    def funds(self, phases: Sequence[Phase], price: Price, planned: Price | None = None) -> Funds:
        """Where a run stands after `phases`, the last of them a search.

        A budget that nobody has asked for was planned at the prices `planned`; at those measured here it saves as much
        less as a step on the cheapest candidate does.
        """
        assert self.budget is not None
        search, budget = phases[-1], self.budget
        if planned is not None and not self.promised:
            small = min(search.candidates, key=planned)
            here, there = (1 - of(small) / of(self.full) for of in (price, planned))
            budget = 1 - (1 - budget) * here / there
        position = search.position + (search.stop - search.start if self.recycle else 0)
        spent = self.cost(phases, price) / price(self.full)
        return Funds(position, self.steps, self.latest, budget * self.steps - spent, self.promised)

    def expected(self, choices: Sequence[Choice], price: Price) -> list[Phase]:
        """All phases, if the searches to come choose what the equispaced ladder has at their stage or, within a budget,
        stay as small as they may."""
        choices = list(choices)
        while (phases := self.phases(choices))[-1].searched:
            search = phases[-1]
            if self.budget is None:
                choices.append(Choice(self.ladder[search.stage - 1]))
            else:
                small = min(search.candidates, key=price)
                choices.append(self.funds(phases, price).choice(small, price(small) / price(self.full), self.full))
        return phases

    def entry(self, phases: Sequence[Phase], index: int, operator: Operator, split: Split) -> LayerMap | None:
        """The layer map by which phase `index` starts (None: the network of the phase before trains on).

        Without recycling it applies to the network from before the search, and to none in the first stage.
        """
        phase = phases[index]
        depths = split(phase.network.depth)
        before = phases[index - 1] if index else None
        leaves_search = before is not None and before.searched
        if before is not None and before.searched:
            if self.recycle:
                return keep(before.active(phase.network, operator, split))
            before = phases[index - 2] if index > 1 else None
        if before is None:
            return fresh(depths)
        if phase.candidates == before.candidates and not leaves_search:
            return None
        return grow(operator, split(before.network.depth), depths)

    def _candidates(self, stage: int, position: int, before: Choice | None) -> tuple[Subnet, ...]:
        """What the stage that begins at `position` may train."""
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
        """The position at which a stage ends whose choice is trained from `position` on."""
        if self.budget is not None and choice.subnet == self.full:
            return self.steps
        if choice.complete_from is None:
            return stage * self.steps // self.stages
        # what another search costs, three networks' scoring at most, puts the takeover off
        later = choice.complete_from + self.search_steps + math.ceil(3 * self.scoring)
        if self.judged(choice.subnet) == self.full or later > self.latest:
            return choice.complete_from  # another search could not tell it from the complete model, or be paid for
        before = choice.complete_from - position
        return position + -(-before // max(1, round(before * self.stages / self.steps)))

    def _regularization(self, stage: int, position: int, subnet: Subnet) -> Regularization:
        """How strongly a stage is regularised that trains `subnet` from `position` on."""
        if not self.adaptive_regularization or self.stages == 1:
            return Regularization()
        if self.budget is None:
            return regularization((stage - 1) / (self.stages - 1))
        return regularization(1.0 if subnet == self.full else position / self.latest)
