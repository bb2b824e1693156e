"""Schedules to test: of a model in one group of layers, and of one in two groups, as VOLO has them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scaleprog.growth.operators import RULES
from scaleprog.growth.phase import Phase, Split, undivided
from scaleprog.growth.policy import Budget, EqualStages
from scaleprog.growth.schedule import Schedule, rungs
from scaleprog.growth.space import Choice, Subnet
from scaleprog.recipe.keys import GrowthSettings

OPERATORS = tuple(RULES)
DEIT = Subnet(224, 12)
D1 = Subnet(224, 18)  # VOLO-D1's depth, 0.5 Omega: 9 12 15 18


@dataclass(frozen=True)
class Unrolled:
    """A schedule with all its phases, and the choices that they follow from."""

    schedule: Schedule
    phases: list[Phase]
    choices: list[Choice]


def two_groups(depth: int) -> tuple[int, ...]:
    """9 -> 2 + 7, 12 -> 2 + 10, 15 -> 2 + 13, 18 -> 4 + 14: as VOLO shares its layers out, roughly."""
    first = max(2, depth // 4 // 2 * 2)
    return first, depth - first


def of(
    full: Subnet = DEIT, steps: int = 400, search_steps: int = 8, rule: str = "window", budget: float | None = None,
    complete_steps: int = 0, promised: bool = False, scoring: float = 0.0, operator: str = "mogrow",
    split: Split = undivided, **growth: object,
) -> Schedule:  # fmt: skip
    """A schedule with the growth settings `growth`; automatic ones keep to `budget`, if there is one."""
    settings = GrowthSettings(**growth)
    kind, ladder = rungs(settings, full, 32)
    patch = 32 if settings.patches == "subset" else None
    policy = EqualStages(ladder, steps, rule if kind == "automatic" else None)
    if budget is not None:
        policy = Budget(
            ladder,
            steps,
            rule,
            search_steps,
            scoring,
            budget,
            promised,
            complete_steps,
            patch is not None,
            recycle=settings.recycle,
        )
    return Schedule(
        kind, ladder, steps, search_steps, scoring, policy, settings.recycle, settings.adaptive_regularization, patch,
        settings.curriculum, operator, split,
    )  # fmt: skip


def budgeted(schedule: Schedule, **changes: object) -> Schedule:
    """A schedule whose budget is changed."""
    return replace(schedule, policy=replace(schedule.policy, **changes))


def unroll(schedule: Schedule, choose: Callable[[list[Phase]], Choice]) -> tuple[list[Phase], list[Choice]]:
    """All phases of a run, and its searches' choices: what `choose` makes of the phases up to each search."""
    choices: list[Choice] = []
    while (phases := schedule.phases(choices))[-1].searched:
        choices.append(choose(phases))
    return phases, choices


def published(*sizes: tuple[int, int]) -> list[Choice]:
    """Choices of the published method."""
    return [Choice(Subnet(*size)) for size in sizes]
