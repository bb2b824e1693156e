"""Schedules to test: of a model in one group of layers, and of one in two groups, as VOLO has them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from scaleprog.growth.operators import RULES
from scaleprog.growth.schedule import Phase, Schedule
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


def one_group(depth: int) -> tuple[int, ...]:
    return (depth,)


def two_groups(depth: int) -> tuple[int, ...]:
    """9 -> 2 + 7, 12 -> 2 + 10, 15 -> 2 + 13, 18 -> 4 + 14: as VOLO shares its layers out, roughly."""
    first = max(2, depth // 4 // 2 * 2)
    return first, depth - first


def of(
    full: Subnet = DEIT, steps: int = 400, search_steps: int = 8, rule: str = "window", budget: float | None = None,
    complete_steps: int = 0, **growth: object,
) -> Schedule:  # fmt: skip
    schedule = Schedule.of(GrowthSettings(**growth), full, 32, steps, search_steps, rule)
    return replace(schedule, budget=budget, complete_steps=complete_steps)


def unroll(schedule: Schedule, choose: Callable[[list[Phase]], Choice]) -> tuple[list[Phase], list[Choice]]:
    """All phases of a run, and its searches' choices: what `choose` makes of the phases up to each search."""
    choices: list[Choice] = []
    while (phases := schedule.phases(choices))[-1].searched:
        choices.append(choose(phases))
    return phases, choices


def published(*sizes: tuple[int, int]) -> list[Choice]:
    """Choices of the published method."""
    return [Choice(Subnet(*size)) for size in sizes]
