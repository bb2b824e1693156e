"""What a budget lays down before a run begins: how much the run may cost, and how long its searches are."""

import math
from dataclasses import replace

from scaleprog.errors import RecipeError
from scaleprog.growth.policy import Price
from scaleprog.growth.schedule import Schedule
from scaleprog.recipe.keys import SearchSettings

TURNS = 2
"""However short `search.most_cost` makes a search, its supernet trains so many steps for each candidate."""


def budgeted(search: SearchSettings, frugal: Schedule, price: Price) -> Schedule:
    """`frugal`, the schedule of a run that saves as much as it can, with the limit and the searches of its recipe.

    Raises RecipeError if no run can keep to the limit.
    """
    schedule = _shorter(search, frugal, price)
    assert schedule.budget is not None
    policy = replace(schedule.budget, limit=_limit(search.budget, schedule, price))
    return replace(schedule, policy=policy)


def _shorter(search: SearchSettings, frugal: Schedule, price: Price) -> Schedule:
    """`frugal`, with searches as short as `search.most_cost` asks for; those of a fork's parent do not count."""
    if search.most_cost is None or search.epochs is not None:
        return frugal
    limit = search.budget or _prog(frugal, price)
    allowed = search.most_cost * limit * frugal.steps * price(frugal.full)
    while (policy := frugal.budget) is not None:
        run = replace(frugal, policy=replace(policy, limit=limit))
        searches = [phase for phase in run.expected((), price)[len(run.begun) :] if phase.searched]
        supernets = sum((phase.stop - phase.start) * phase.mean(price) for phase in searches)
        scoring = run.cost(searches, price) - supernets
        fewest = TURNS * max((len(phase.candidates) for phase in searches), default=0)
        if supernets + scoring <= allowed or frugal.search_steps <= fewest:
            break
        # shorter searches may leave room for another one
        search_steps = max(fewest, math.floor(frugal.search_steps * (allowed - scoring) / supernets))
        frugal = replace(frugal, search_steps=search_steps, policy=replace(policy, search_steps=search_steps))
    return frugal


def _prog(schedule: Schedule, price: Price) -> float:
    """The cost of the equispaced ladder, without searches, as a fraction of Original's cost."""
    mean = sum(map(price, schedule.ladder)) / price(schedule.full) / len(schedule.ladder)
    cooldown = schedule.policy.cooldown
    return (mean * (schedule.steps - cooldown) + cooldown) / schedule.steps


def _limit(asked: float | None, frugal: Schedule, price: Price) -> float:
    """The most that a run may cost, as a fraction of Original's cost. Raises RecipeError if no run can keep to it."""
    assert frugal.budget is not None
    stages, smallest = len(frugal.ladder), frugal.ladder[0]
    least = frugal.cost(frugal.expected((), price), price) / (price(frugal.full) * frugal.steps)
    if asked is None:
        return min(1.0, max(_prog(frugal, price), least))
    if asked >= min(1.0, least):  # 1 is no promise, as none is
        return asked
    if frugal.budget.short:
        raise RecipeError(
            f"search.budget: {asked} of Original's cost, but {frugal.budget.short}; lower it, or train longer"
        )
    if frugal.begun:
        raise RecipeError(
            f"search.budget: {asked} of Original's cost; with what the run's parent has spent, the cheapest run costs "
            f"{least:.3f}; raise search.budget, or fork an earlier checkpoint"
        )
    raise RecipeError(
        f"search.budget: {asked} of Original's cost; the cheapest run, which trains {smallest} until the last of "
        f"{stages} stages, costs {least:.3f} with its searches; raise search.budget or growth.stages, or lower "
        "growth.smallest or search.complete_steps"
    )
