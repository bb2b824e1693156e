"""Schedules that count compute: stages of equal cost, and a learning rate that follows the cost."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import OverBudget, RecipeError
from scaleprog.growth.phase import Phase, Regularization
from scaleprog.growth.schedule import Compute, Schedule
from scaleprog.growth.search import decide_within
from scaleprog.growth.space import Choice, Subnet
from scaleprog.planning.plan import describe, outline
from scaleprog.recipe import Recipe
from scaleprog.rundir.planned import read_plan, write_plan
from scaleprog.sharding.optimizer import learning_rate
from tests.conftest import CONFIGS, MakeRecipe
from tests.unit.schedules import DEIT, Unrolled, of, unroll


def price(subnet: Subnet) -> float:
    """Patches times layers, and something for starting them."""
    return 0.05 + subnet.resolution**2 * subnet.depth / (224**2 * 12)


def counted(schedule: Schedule) -> Schedule:
    return replace(schedule, compute=Compute.of(schedule, price))


def cost(phases: list[Phase]) -> float:
    """In steps of the complete model."""
    means = [sum(map(price, phase.candidates)) / len(phase.candidates) for phase in phases]
    return sum((phase.stop - phase.start) * mean for phase, mean in zip(phases, means, strict=True)) / price(DEIT)


@st.composite
def runs(draw: st.DrawFn, budget: bool = False) -> Unrolled:
    """Runs of equal stages, by a ladder or by searches, or of a budget; long enough for the searches to fit."""
    stages = draw(st.integers(2, 6))
    steps = draw(st.integers(stages * 40, 2000))
    schedule = of(
        steps=steps,
        search_steps=draw(st.integers(1, steps // stages // 8)),
        rule=draw(st.sampled_from(("all", "corners" if budget else "window"))),
        budget=draw(st.floats(0.3, 0.9)) if budget else None,
        promised=draw(st.booleans()),
        stages=stages,
        smallest=draw(st.sampled_from((0.3, 0.5, 1.0))),
        schedule="automatic" if budget else draw(st.sampled_from(("linear", "automatic", "original"))),
    )
    schedule = counted(schedule)

    def choose(phases: list[Phase]) -> Choice:
        subnet = draw(st.sampled_from(phases[-1].candidates))
        if not budget:
            return Choice(subnet)
        after, latest = schedule.position_after(phases[-1]), schedule.budget.latest
        takeover = draw(st.integers(math.ceil(after), max(math.ceil(after), latest)))
        return Choice(subnet if takeover > after else DEIT, takeover)

    return Unrolled(schedule, *unroll(schedule, choose))


@given(st.one_of(runs(), runs(budget=True)))
def test_phases_tile_the_steps_and_the_progress(run: Unrolled) -> None:
    schedule, phases = run.schedule, run.phases
    assert (phases[0].start, phases[0].position, phases[0].progress_of(0)) == (0, 0, 0)
    for before, after in pairwise(phases):
        assert (after.start, after.position) == (before.stop, before.position_of(before.stop))
        assert after.progress_of(after.start) == pytest.approx(before.progress_of(before.stop))
    assert phases[-1].progress_of(phases[-1].stop) == pytest.approx(schedule.steps)
    assert all(phase.stop > phase.start and phase.course.pace > 0 for phase in phases)


@given(runs())
def test_equal_stages_cost_the_same_each_and_together_what_the_ladder_costs(run: Unrolled) -> None:
    schedule = run.schedule
    ladder = of(steps=schedule.steps, schedule="linear", stages=schedule.stages, smallest=0.5)
    ladder = replace(ladder, ladder=schedule.ladder, policy=replace(ladder.policy, ladder=schedule.ladder))
    whole = cost(ladder.phases([]))
    spent = [cost([p for p in run.phases if p.stage == k + 1]) for k in range(schedule.stages)]
    assert sum(spent) == pytest.approx(whole, abs=schedule.stages)  # each stage ends with a whole step
    for part in spent:
        assert part == pytest.approx(whole / schedule.stages, abs=2)


@given(runs(budget=True))
def test_a_budget_hands_out_the_same_steps_and_its_progress_is_never_ahead_of_them(run: Unrolled) -> None:
    by_steps = replace(run.schedule, compute=None).phases(run.choices)
    assert [replace(phase, course=None) for phase in run.phases] == by_steps
    for phase in run.phases:
        for step in (phase.start, phase.stop - 1):
            assert phase.progress_of(step) <= phase.position_of(step) + 1e-6


def test_networks_of_one_price_train_as_if_steps_were_counted() -> None:
    plain = of(schedule="linear", smallest=1.0)
    counting = replace(plain, compute=Compute.of(plain, price))
    assert [replace(phase, course=None) for phase in counting.phases([])] == plain.phases([])
    assert [phase.course.pace for phase in counting.phases([])] == [1.0] * len(plain.phases([]))


def test_by_hand() -> None:
    """Prices 1/4 and 1: a position costs 5/8, so the small network takes 2.5 steps for each, the complete one 0.625."""
    stages = [{"resolution": 112, "depth": 12}, {"resolution": 224, "depth": 12}]
    plain = of(schedule=stages, steps=80)
    schedule = replace(plain, compute=Compute.of(plain, lambda subnet: subnet.resolution**2 * subnet.depth))
    first, last = schedule.phases([])
    assert (first.start, first.stop, last.stop) == (0, 100, 125)
    assert [first.progress_of(step) for step in (0, 50, 100)] == [0, 20, 40]
    assert [last.progress_of(step) for step in (100, 110, 125)] == [40, 56, 80]


def test_the_learning_rate_falls_by_what_was_spent(make_recipe: MakeRecipe) -> None:
    recipe = Recipe.load(CONFIGS / "fashion_mnist" / "prog.yaml", ["growth.steps=compute", "optimizer.warmup_epochs=0"])
    _, schedule = outline(recipe, 100)
    phases = schedule.phases([])
    rates = [
        learning_rate(recipe.optimizer, phase.progress_of(step), schedule.steps, 100, phase.progress_began)
        for phase in phases
        for step in range(phase.start, phase.stop)
    ]
    assert len(rates) == phases[-1].stop > schedule.steps  # more steps at the same cost
    assert all(before >= after for before, after in pairwise(rates))
    middle = phases[2].start
    assert rates[middle] == pytest.approx((recipe.optimizer.lr + recipe.optimizer.min_lr) / 2, rel=0.01)


def test_after_a_failed_probe_the_rest_is_a_run_of_its_own() -> None:
    schedule = counted(of(budget=0.6, steps=1000, search_steps=10, schedule="automatic", rule="corners"))
    probe = schedule.phases([])[-1]
    assert probe.searched
    assert probe.start == 100
    last = schedule.phases([Choice(DEIT, round(schedule.position_after(probe)))])[-1]
    assert last.candidates == (DEIT,)
    assert last.progress_began == last.progress_of(last.start) == probe.progress_of(probe.stop)
    assert last.progress_of(last.stop) == pytest.approx(1000)


@pytest.mark.parametrize("name", ["prog", "autoprog", "autoprog_published"])
def test_a_recipe_costs_the_same_and_its_plan_is_kept(name: str, tmp_path: Path) -> None:
    by_steps, by_cost = (
        Recipe.load(CONFIGS / "imagenet" / f"deit_small_{name}_100.yaml", [f"growth.steps={steps}"])
        for steps in ("epochs", "compute")
    )
    before, after = describe(by_steps), describe(by_cost)
    if (
        name != "autoprog_published"
    ):  # whose searches cost something besides; its stages are paid for together with them
        assert after["speedup"] == pytest.approx(before["speedup"], rel=0.01)
    recipe = by_cost
    _, schedule = outline(recipe, 1000)
    gmacs = {subnet: price(subnet) * schedule.compute.unit for subnet in schedule.networks}
    schedule = replace(schedule, compute=Compute.of(schedule, gmacs.__getitem__))
    write_plan(tmp_path, schedule, gmacs.__getitem__)
    kept, _ = read_plan(tmp_path)
    assert kept.expected((), price) == schedule.expected((), price)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["growth.schedule=supernet"], "growth.steps: compute needs stages"),
        (["growth.recycle=false"], "no search may be repeated"),
        (["search.method=published", "search.epochs=1.9"], "shorter searches or fewer growth.stages"),
    ],
)
def test_what_cannot_count_compute_is_refused(settings: list[str], words: str) -> None:
    recipe = Recipe.load(CONFIGS / "fashion_mnist" / "autoprog.yaml", ["growth.steps=compute", *settings])
    with pytest.raises(RecipeError, match=words):
        outline(recipe, 100)


# ---- the schedules of others


def test_stages_end_where_they_end_whatever_their_steps_sum_up_to() -> None:
    """The sums of these are rounded to just before the end."""
    recipe = Recipe.load(
        CONFIGS / "imagenet" / "deit_small_original_300.yaml",
        ["growth.steps=compute", "optimizer.schedule=smooth", "train.epochs=10", "optimizer.cooldown_epochs=20",
         "growth.schedule=[{resolution: 112, depth: 6}, {resolution: 224, depth: 12}]"],
    )  # fmt: skip
    assert [phase.stage for phase in outline(recipe, 1251)[1].phases([])] == [1, 2]
    recipe = Recipe.load(
        CONFIGS / "imagenet" / "deit_small_autoprog_published_100.yaml", ["growth.stages=3", "train.epochs=50"]
    )
    networks = [
        [phase.network for phase in outline(counting, 937)[1].expected([], price) if phase.kind == "train"]
        for counting in (recipe, by_compute(recipe))
    ]
    assert networks[0] == networks[1]


def by_compute(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"growth": recipe.growth.model_copy(update={"steps": "compute"})})


def test_a_run_that_counts_compute_keeps_its_budget() -> None:
    """Its learning rates so far depend on it."""
    one, other = (
        Recipe.load(CONFIGS / "fashion_mnist" / "autoprog.yaml", [f"search.budget={budget}"]) for budget in (0.45, 0.8)
    )
    assert one.differences(other) == []
    assert by_compute(one).differences(by_compute(other)) == ["search.budget: 0.45 here, 0.8 there"]
    _, schedule = outline(by_compute(one), 937)
    (search,) = [phase for phase in schedule.phases([]) if phase.searched]
    state = schedule.budget_state([search], price)
    losses, times = dict.fromkeys(search.candidates, 1.0), dict.fromkeys(search.candidates, 1.0)
    with pytest.raises(OverBudget, match="compute cannot change its budget; begin again with a larger"):
        decide_within(state, 2, [losses], times)


def test_a_budget_may_search_for_as_long_as_it_does_otherwise() -> None:
    path = CONFIGS / "fashion_mnist" / "autoprog.yaml"
    outline(Recipe.load(path, ["growth.steps=compute", "search.budget=0.5", "search.epochs=1"]), 937)


def test_efficienttrain_is_the_schedule_of_its_authors() -> None:
    """Their code: part i of ten costs a tenth of 200 whole-size epochs, by the area of its images, with the magnitude
    i; a fifth of the run is warm-up."""
    recipe = Recipe.load(CONFIGS / "others" / "imagenet" / "deit_small_efficienttrain.yaml")
    _, schedule = outline(recipe, 1000)
    phases = schedule.phases([])
    sides = [96, 96, 160, 160, 160, 160, 192, 192, 224, 224]
    assert [phase.network for phase in phases] == [Subnet(side, 12) for side in sides]
    for phase, side in zip(phases, sides, strict=True):
        theirs = 200 * (224 / side) ** 2 / 10
        assert (phase.stop - phase.start) / 1000 == pytest.approx(theirs, rel=0.06)  # by GMACs, attention included
    assert [phase.regularization for phase in phases] == [Regularization(i / 9, 1, 1) for i in range(10)]
    cosine = recipe.optimizer
    tenth = schedule.steps // 10
    rates = [learning_rate(cosine, i * tenth, schedule.steps, 1000) for i in range(10)]
    assert rates[0] == 0
    assert rates[2] == max(rates) == 4e-3
    assert rates[6] == pytest.approx((4e-3 + 1e-6) / 2)
    assert schedule.phases([])[2].progress_of(phases[2].start) == 2 * tenth


def test_progressive_resizing_has_half_the_size_for_half_of_the_run() -> None:
    recipe = Recipe.load(CONFIGS / "others" / "imagenet" / "deit_small_progressive_resizing.yaml")
    _, schedule = outline(recipe, 1000)
    phases = schedule.phases([])
    assert phases[4].stop == schedule.steps // 2
    assert {phase.network for phase in phases[:5]} == {Subnet(112, 12)}
    assert [phase.network.resolution for phase in phases[5:]] == [128, 160, 208, 224, 224]
