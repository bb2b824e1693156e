"""The growth schedule Psi (paper 3.1, 4): which network trains from which step to which, as far as it is decided."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import Field

from scaleprog.growth import supernet
from scaleprog.growth.operators import LayerMap, Operator, fresh, grow, keep
from scaleprog.growth.regularization import Regularization, regularization
from scaleprog.growth.space import CandidateRule, GrowthSpace, Subnet, View, ladder
from scaleprog.settings import Settings

Split = Callable[[int], tuple[int, ...]]  # shares a depth out among a model family's layer groups


class SubnetSettings(Settings):
    """One stage of a schedule given by hand: resolution in pixels, depth in layers."""

    resolution: int = Field(ge=1)
    depth: int = Field(ge=1)


class GrowthSettings(Settings):
    """How the network grows.

    `schedule`: `original` (full size throughout), `linear` ("Prog"), `automatic` ("AutoProg"), `supernet` (the
    baseline of Table 8) or a list of stages by hand; `smallest`: the ratio s1 of the growth space ("0.5 Omega");
    `recycle`: whether a stage inherits the weights of its search; `optimizer`: whether AdamW's moments start anew at
    growth or follow their layers; `resolution_multiple`: resolutions are rounded to it (default: the model's stride;
    published: 32 for DeiT/16); `adaptive_regularization`: AdaReg; `patches`: a small network sees few patches because
    images are shown in a low `resolution`, as published, or as a `subset` of the patches at full resolution, drawn anew
    for every image and step (PatchDropout, arXiv 2208.07220), so that nothing changes its scale at growth.
    """

    schedule: Literal["original", "linear", "automatic", "supernet"] | tuple[SubnetSettings, ...] = "automatic"
    operator: Operator = "mogrow"
    stages: int = Field(default=4, ge=1)
    smallest: float = Field(default=0.5, gt=0, le=1)
    recycle: bool = True
    optimizer: Literal["reset", "inherit"] = "reset"
    resolution_multiple: int | None = Field(default=None, ge=1)
    adaptive_regularization: bool = False
    patches: Literal["resolution", "subset"] = "resolution"


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
    """Psi for a run of `steps` schedule positions; `ladder` holds the sub-networks of stages that are not searched,
    `patch` is the side in pixels of the patches that sub-networks see a subset of (None: by resolution)."""

    kind: Literal["fixed", "automatic", "supernet"]
    ladder: tuple[Subnet, ...]
    steps: int
    search_steps: int
    rule: CandidateRule
    recycle: bool
    adaptive_regularization: bool
    patch: int | None = None

    @classmethod
    def of(
        cls, growth: GrowthSettings, full: Subnet, multiple: int, steps: int, search_steps: int, rule: CandidateRule
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
        return cls(kind, rungs, steps, search_steps, rule, growth.recycle, growth.adaptive_regularization, patch)

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
        return View(self.full.resolution, (subnet.resolution // self.patch) ** 2)

    def phases(self, chosen: Sequence[Subnet]) -> list[Phase]:
        """All phases that follow from the searches' choices so far; the last one may end in an open search."""
        return list(self._phases(tuple(chosen)))

    @cache  # noqa: B019 - asked at every step; a schedule and the choices are few and hashable
    def _phases(self, chosen: tuple[Subnet, ...]) -> list[Phase]:
        phases: list[Phase] = []
        undecided, step, previous = list(chosen), 0, None
        for stage in range(1, self.stages + 1):
            first, last = self._bounds(stage)
            candidates = self._candidates(stage, previous)
            full_strength = Regularization()
            if len(candidates) > 1:
                base = previous.depth if previous else min(s.depth for s in candidates)
                searched = self.kind == "automatic"
                length = self.search_steps if searched else last - first
                phases.append(
                    Phase(stage, "supernet", step, step + length, first, candidates, base, searched, full_strength)
                )
                step += length
                if not undecided:
                    return phases
                subnet = undecided.pop(0)
                first += length if self.recycle else 0
            else:
                subnet = candidates[0]
            strength = regularization(self.adaptive_regularization, stage, self.stages)
            phases.append(
                Phase(stage, "train", step, step + last - first, first, (subnet,), subnet.depth, False, strength)
            )
            step += last - first
            previous = subnet
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

    def _bounds(self, stage: int) -> tuple[int, int]:
        """First and past-the-end schedule position of a stage: K equal parts."""
        return (stage - 1) * self.steps // self.stages, stage * self.steps // self.stages

    def _candidates(self, stage: int, previous: Subnet | None) -> tuple[Subnet, ...]:
        if self.kind == "supernet":
            return self.space.candidates(None, "all")
        if self.kind == "fixed" or stage == self.stages:
            return (self.ladder[stage - 1],)
        return self.space.candidates(previous, self.rule)
