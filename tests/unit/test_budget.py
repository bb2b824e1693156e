"""The budget's search: what it chooses, when the complete model takes over, and what runs of such choices are."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import OverBudget
from scaleprog.growth.phase import Phase
from scaleprog.growth.schedule import Schedule
from scaleprog.growth.search import CLOCKS, BudgetState, Decision, candidate_times, decide_within, step_time
from scaleprog.growth.space import Choice, Subnet
from tests.unit.schedules import DEIT, Unrolled, budgeted, of, unroll

CORNERS = [Subnet(128, 6), Subnet(128, 12), Subnet(224, 6), DEIT]
positive = st.floats(0.01, 100)


def price(subnet: Subnet) -> float:
    """Patches times layers."""
    return subnet.resolution**2 * subnet.depth / (224**2 * 12)


def decide(budget: BudgetState, losses: list[float], times: list[float]) -> Choice:
    return decide_within(budget, 2, [dict(zip(CORNERS, losses))], dict(zip(CORNERS, times))).choice


@st.composite
def budgets(draw: st.DrawFn) -> BudgetState:
    steps = draw(st.integers(10, 1000))
    latest = draw(st.integers(1, steps - 1))
    return BudgetState(draw(st.integers(0, steps - 1)), steps, latest, draw(st.floats(-steps, 2 * steps)))


@st.composite
def times(draw: st.DrawFn) -> list[float]:
    """Step times of the corners, ascending by half and more."""
    first, *growth = draw(st.tuples(positive, *[st.floats(1.5, 4)] * 3))
    found = [first]
    for factor in growth:
        found.append(found[-1] * factor)
    return found


# ---- one decision


def test_a_decision_by_hand() -> None:
    """100 of 400 steps are left to be saved: at prices of 0.2, 0.5 and 0.6 that takes 125, 200 and 250 steps."""
    here = BudgetState(position=100, steps=400, latest=320, left=200)
    assert here.saving == 100
    cheap, deep, wide = (1.0, 0.8, 0.6, 0.5), (0.6, 0.52, 0.9, 0.5), (1.0, 0.8, 0.52, 0.5)
    seconds = [2.0, 5.0, 6.0, 10.0]
    assert decide(here, [0.7, *cheap[1:]], seconds) == Choice(CORNERS[0], 225)  # 0.25, 0.6 and 0.25: tied
    assert decide(here, list(cheap), seconds) == Choice(CORNERS[1], 300)  # 0.625 and 0.6; 250 steps would end at 350
    assert decide(here, list(deep), seconds) == Choice(CORNERS[1], 300)
    assert decide(here, list(wide), seconds) == Choice(CORNERS[1], 300)
    later = BudgetState(position=100, steps=400, latest=360, left=200)
    assert decide(later, list(wide), seconds) == Choice(CORNERS[2], 350)  # 0.625, 0.6 and 0.05
    decision = decide_within(here, 2, [dict(zip(CORNERS, cheap))], dict(zip(CORNERS, seconds)))
    assert decision.scores == (pytest.approx(0.625), pytest.approx(0.6), None, None)
    assert decision.alpha is None


def test_networks_that_lose_nothing_tie_and_the_cheapest_wins() -> None:
    assert decide(BudgetState(0, 400, 300, 200), [0.4, 0.3, 0.5, 0.5], [4.0, 2.0, 5.0, 10.0]).subnet == CORNERS[1]


def test_the_complete_model_trains_where_it_can_be_paid_for() -> None:
    for left in (300, 301.5):
        assert decide(BudgetState(100, 400, 300, left), [9, 9, 9, 0.1], [1, 2, 3, 4]) == Choice(DEIT, 100)
    assert decide(BudgetState(100, 400, 300, 200), [1] * 4, [5, 6, 7, 4]) == Choice(DEIT, 100)  # nothing is cheaper


@given(budgets(), st.lists(positive, min_size=4, max_size=4), times())
def test_every_decision_keeps_to_the_budget_if_any_can(
    here: BudgetState, losses: list[float], seconds: list[float]
) -> None:
    choice = decide(here, losses, seconds)
    prices = dict(zip(CORNERS, (s / seconds[-1] for s in seconds)))
    assert choice.complete_from is not None
    assert here.position <= choice.complete_from <= max(here.position, here.latest)
    small = choice.complete_from - here.position
    assert (choice.subnet == DEIT) == (small == 0)
    cost = small * prices[choice.subnet] + here.steps - choice.complete_from
    if here.enough(min(prices.values())) and here.position < here.latest:
        assert cost <= here.left + 1e-6
        if small:
            assert cost + 1 - prices[choice.subnet] > here.left - 1e-6, "not a step longer than needed"
    elif small:
        assert choice == Choice(min(prices, key=prices.__getitem__), here.latest), "as cheap as can be"


@given(budgets(), st.lists(positive, min_size=4, max_size=4), times(), st.floats(0.01, 100), st.floats(-0.005, 10))
def test_units_do_not_matter(
    here: BudgetState, losses: list[float], seconds: list[float], unit: float, more: float
) -> None:
    """Neither that of time, nor where losses count from."""
    one = decide_within(here, 2, [dict(zip(CORNERS, losses))], dict(zip(CORNERS, seconds)))
    scores = sorted(s for s in one.scores if s is not None)
    if len(scores) < 2 or scores[1] > scores[0] * (1 + 1e-3) + 1e-9:
        moved = [loss + more for loss in losses]
        assert decide(here, moved, [s * unit for s in seconds]).subnet == one.chosen


# ---- runs


@st.composite
def runs(draw: st.DrawFn, recycle: bool | None = None) -> Unrolled:
    """A run with any budget that can be kept, and any losses."""
    stages = draw(st.integers(2, 6))
    steps = draw(st.integers(stages * 10, 1000))
    schedule = of(
        DEIT, steps, draw(st.integers(1, max(1, steps // stages // 4))), draw(st.sampled_from(("corners", "all"))),
        draw(st.floats(0.5, 1)), stages=stages, smallest=draw(st.sampled_from((0.3, 0.5, 0.8))),
        recycle=draw(st.booleans()) if recycle is None else recycle, adaptive_regularization=draw(st.booleans()),
        patches=draw(st.sampled_from(("resolution", "subset"))),
    )  # fmt: skip

    def choose(phases: list[Phase]) -> Choice:
        candidates = phases[-1].candidates
        found = {s: draw(st.floats(0.1, 3)) for s in schedule.scoring_targets(phases[-1])}
        losses = {s: found[schedule.policy.proxy(s)] for s in candidates}
        times = {s: price(s) for s in candidates}
        return decide_within(schedule.budget_state(phases, price), phases[-1].stage, [losses], times).choice

    return Unrolled(schedule, *unroll(schedule, choose))


@given(runs(recycle=True))
def test_phases_tile_the_steps_and_grow_to_the_complete_model(run: Unrolled) -> None:
    schedule = run.schedule
    assert run.phases[0].start == run.phases[0].position == 0
    assert run.phases[-1].stop == schedule.steps
    assert run.phases[-1].candidates == (DEIT,)
    for phase in run.phases:
        assert phase.start < phase.stop
        assert phase.position == phase.start
    for left, right in pairwise(run.phases):
        assert left.stop == right.start
    trained = [p.network for p in run.phases if p.kind == "train"]
    for small, large in pairwise(trained):
        assert small.resolution <= large.resolution or run.schedule.policy.rule == "all", (
            "eq. 8 looks at parameters only"
        )
        assert small.depth <= large.depth
    assert trained.count(DEIT) == 1, "what is complete trains in one stretch, without another search"


@given(runs())
def test_the_first_stage_is_the_smallest_network_and_every_other_search_knows_its_corners(run: Unrolled) -> None:
    first, *rest = run.phases
    assert (first.kind, first.candidates) == ("train", run.schedule.ladder[:1])
    for before, phase in pairwise(run.phases):
        if phase.searched:
            assert phase.candidates == run.schedule.space.candidates(before.network, run.schedule.policy.rule)
            assert {before.network, DEIT} <= set(phase.candidates)
    assert sum(p.searched for p in rest) == len(run.choices)


@given(st.integers(3, 10), st.floats(0.45, 0.9), st.integers(1, 3), st.booleans())
def test_no_more_searches_than_the_recipe_asks_for(stages: int, limit: float, most: int, promised: bool) -> None:
    free = of(DEIT, 2000, 20, "corners", limit, promised=promised, stages=stages, patches="resolution", scoring=5.0)
    capped = budgeted(free, most=most)

    def smallest(schedule: Schedule) -> Callable[[list[Phase]], Choice]:
        return lambda phases: schedule.policy.expected(phases[-1], *schedule._after(phases, price), price)

    (all_phases, many), (phases, few) = (unroll(schedule, smallest(schedule)) for schedule in (free, capped))
    probes = bool(free.budget.probe)
    assert len(few) == min(len(many), probes + most)
    assert phases[-1].candidates == (DEIT,)
    assert capped.cost(phases, price) <= free.cost(all_phases, price) + 1, "what is not measured is not paid for"


@given(runs(recycle=True))
def test_stages_until_the_complete_model_are_about_an_equal_part_each(run: Unrolled) -> None:
    part = run.schedule.steps / run.schedule.stages
    room = run.schedule.budget.latest - run.schedule.search_steps  # a later takeover leaves none for another search
    stages: dict[int, int] = {}
    for phase in run.phases[:-1]:
        if not phase.searched:
            stages[phase.stage] = phase.stop - phase.start
    first = run.schedule.steps // run.schedule.stages
    if probe := run.schedule.budget.probe:
        assert stages.pop(1) == probe
        if len(run.choices) > 1:
            assert stages.pop(2) == first - probe - run.schedule.search_steps
    else:
        assert stages.pop(1) == first
    for stage, length in stages.items():
        choice = run.choices[stage - 2]
        undecided = choice.complete_from is not None and choice.complete_from <= room
        if undecided and run.schedule.policy.proxy(choice.subnet) != DEIT:
            assert length <= 1.5 * part + 1
        else:
            assert run.phases[-2].stage == stage, "goes on until the complete model takes over"
        if run.phases[-2].stage != stage:
            assert length >= part / 2 - 1


@given(runs(recycle=True))
def test_a_run_keeps_to_its_budget_if_its_smallest_network_can(run: Unrolled) -> None:
    schedule, small = run.schedule, run.schedule.ladder[0]
    searching = sum(p.stop - p.start for p in run.phases if p.searched)
    latest, limit = schedule.budget.latest, schedule.budget.limit * schedule.steps
    if price(small) * (latest - searching) + schedule.steps - latest + searching <= limit:
        assert schedule.cost(run.phases, price) <= limit + 1


def test_what_is_scored_is_paid_for_once() -> None:
    """Of one depth all are scored by all patches: two networks, 3 steps each; by resolution four."""
    for patches, networks in (("subset", CORNERS[2:]), ("resolution", CORNERS)):
        free = of(rule="corners", budget=0.5, patches=patches)
        phases = free.phases([])
        paid = of(rule="corners", budget=0.5, patches=patches, scoring=3.0)
        assert free.scoring_targets(phases[-1]) == networks
        assert free.budget_state(phases, price).left - paid.budget_state(phases, price).left == pytest.approx(
            3 * sum(map(price, networks))
        )


def test_a_budget_that_was_asked_for_is_never_exceeded() -> None:
    """300 of 400 steps are to be saved, but the cheapest candidate, at 0.4, saves 120 in the 200 that there are."""
    losses, times = [dict.fromkeys(CORNERS, 1.0)], dict(zip(CORNERS, (4, 6, 8, 10)))
    with pytest.raises(OverBudget, match=r"128 px, 6 layers costs 40% .* at least 180 complete steps, but 0 are left"):
        decide_within(BudgetState(100, 400, 300, 0, promised=True), 2, losses, times)
    with pytest.raises(OverBudget):
        decide_within(BudgetState(350, 400, 300, 0, promised=True), 2, losses, times)
    aimed_at = decide_within(BudgetState(100, 400, 300, 0), 2, losses, times)
    assert aimed_at.choice == Choice(CORNERS[0], 300), "what nobody asked for is come as near to as can be"
    kept = decide_within(BudgetState(100, 400, 300, 300, promised=True), 2, losses, times)
    assert kept.because == "complete from schedule step 100: the budget covers it to the end"


@pytest.mark.parametrize(("recycle", "promised", "another"), [(True, True, 1), (False, False, 1), (False, True, 0)])
def test_no_search_is_made_whose_steps_a_promise_could_not_win_back(
    recycle: bool, promised: bool, another: bool
) -> None:
    """Without recycling, they come on top of those of the schedule."""
    policy = of(rule="corners", budget=0.6, stages=6, recycle=recycle, promised=promised).policy
    end = policy.end(2, 70, Choice(policy.ladder[0], 300))
    assert end < 300 if another else end == 300


@given(budgets(), st.lists(positive, min_size=4, max_size=4), times())
def test_a_promise_is_kept_or_refused(here: BudgetState, losses: list[float], seconds: list[float]) -> None:
    prices = dict(zip(CORNERS, (s / seconds[-1] for s in seconds)))
    try:
        choice = decide(replace(here, promised=True), losses, seconds)
    except OverBudget:
        assert not any(here.enough(price) for subnet, price in prices.items() if subnet != DEIT)
        return
    assert choice.complete_from is not None
    cost = (choice.complete_from - here.position) * prices[choice.subnet] + here.steps - choice.complete_from
    assert cost <= here.left + CLOCKS * here.steps + 1e-6
    if any(here.enough(price) for subnet, price in prices.items() if subnet != DEIT):
        assert cost <= here.left + 1e-6


def test_where_nothing_can_be_saved_the_complete_model_trains() -> None:
    """A step on the smallest network takes 93 % of a complete one."""
    here, times = BudgetState(100, 400, 300, 200), dict(zip(CORNERS, (9.3, 9.5, 9.6, 10)))
    decision = decide_within(here, 2, [dict.fromkeys(CORNERS, 1.0)], times)
    assert decision.choice == Choice(DEIT, 100)
    assert decision.why == "nothing to save: a step on 128 px, 6 layers costs 93% of a complete one"
    with pytest.raises(OverBudget, match="costs 93%"):
        decide_within(replace(here, promised=True), 2, [dict.fromkeys(CORNERS, 1.0)], times)


def test_nothing_is_saved_before_something_is_learned() -> None:
    """Of ten classes, whose guess costs 2.30; a promise has to be kept all the same."""
    here, times = BudgetState(100, 400, 300, 200), dict(zip(CORNERS, (2, 5, 6, 10)))
    for loss, early in ((2.4, True), (1.8, True), (1.7, False)):
        measured = [dict(zip(CORNERS, (2.2, loss, 2.2, loss)))]
        assert (decide_within(here, 2, measured, times, guessing=math.log(10)).chosen == DEIT) == early
        promised = decide_within(replace(here, promised=True), 2, measured, times, guessing=math.log(10))
        assert promised.chosen != DEIT
    measured = [dict.fromkeys(CORNERS, 2.07)]
    decision = decide_within(here, 2, measured, times, guessing=math.log(10))
    assert decision.why == "too early to save: the loss is 10% below a uniform guess's, not yet 25%"


def test_a_difference_of_losses_within_its_noise_is_none() -> None:
    """Two depths that differ by 0.004: by a standard error of 0.003 the cheaper one is taken, by 0.001 it is not."""
    here, seconds = BudgetState(100, 400, 320, 200), [2.0, 5.0, 6.0, 10.0]
    measured, times = [dict(zip(CORNERS, (0.504, 0.5, 0.504, 0.5)))], dict(zip(CORNERS, seconds))
    for error, chosen in ((0.003, CORNERS[0]), (0.001, CORNERS[1])):
        errors = dict(zip(CORNERS, (error, 0.0, error, 0.0)))
        assert decide_within(here, 2, measured, times, errors).chosen == chosen


def test_what_nobody_asked_for_is_saved_as_far_as_steps_are_cheaper_here() -> None:
    """By plan the smallest network costs a quarter, and 40 % are to be saved; at a measured half it saves two thirds of
    that, and at a price of 1 nothing. What was asked for stays."""
    schedule = of(rule="corners", budget=0.6)
    phases = schedule.phases([])
    small = phases[-1].candidates[0]

    def left(at: float, **changes: Any) -> float:
        measured = {s: 1 - (1 - price(s)) * (1 - at) / (1 - price(small)) for s in phases[-1].candidates}
        changed = budgeted(schedule, **changes)
        return changed.budget_state(phases, measured.__getitem__, price).left + changed.cost(
            phases, measured.__getitem__
        )

    assert left(price(small)) == pytest.approx(0.6 * 400)
    assert left(1.0) == pytest.approx(400)
    half = 1 - 0.4 * 0.5 / (1 - price(small))
    assert left(0.5) == pytest.approx(half * 400)
    assert left(0.5, promised=True) == pytest.approx(0.6 * 400)


def test_a_short_run_trains_the_complete_model_and_says_why() -> None:
    short = of(rule="corners", budget=1.0, steps=390, complete_steps=300)
    assert [(p.network, p.start, p.stop) for p in short.phases([])] == [(DEIT, 0, 390)]
    assert "a run of 390 steps is too short to save any" in short.budget.short
    assert of(rule="corners", budget=1.0, steps=408, complete_steps=300).budget.short, "no room for a search"
    longer = of(rule="corners", budget=0.6, steps=420, complete_steps=300)
    assert longer.budget.short == ""
    assert [p.network for p in longer.expected((), price) if p.kind == "train"] == [longer.ladder[0]] * 3 + [DEIT]
    assert longer.budget.latest == 120
    assert of(rule="corners", budget=0.6, steps=4000, complete_steps=300).budget.latest == 3000


def test_a_candidate_that_no_step_sampled_is_timed_by_its_share_of_the_work() -> None:
    costs = dict(zip(CORNERS, (1.0, 2.0, 3.0, 6.0)))
    assert candidate_times({CORNERS[0]: 0.5, CORNERS[1]: 1.2, CORNERS[3]: 3.0}, costs) == {
        CORNERS[0]: 0.5, CORNERS[1]: 1.2, CORNERS[2]: 1.5, CORNERS[3]: 3.0,
    }  # fmt: skip
    assert candidate_times({CORNERS[0]: 0.0}, costs) == costs


def test_nothing_is_searched_that_cannot_be_told_apart() -> None:
    """All patches judge, and the depth is complete: what is left to grow has no loss of its own."""
    for patches, searches in (("subset", 1), ("resolution", 2)):
        schedule = of(rule="corners", budget=0.5, search_steps=8, patches=patches, promised=True)
        choices = [Choice(Subnet(128, 12), 290)]
        phases = schedule.phases(choices)
        assert sum(p.searched for p in phases) == searches
        if patches == "subset":
            assert [(p.stage, p.kind, p.start, p.stop, p.network) for p in phases[2:]] == [
                (2, "train", 108, 290, Subnet(128, 12)), (3, "train", 290, 400, DEIT),
            ]  # fmt: skip


@given(runs(recycle=False))
def test_without_recycling_positions_are_trained_once(run: Unrolled) -> None:
    trained = [p.position_of(step) for p in run.phases if p.kind == "train" for step in range(p.start, p.stop)]
    assert trained == list(range(run.schedule.steps))


@given(runs())
def test_what_is_known_never_changes(run: Unrolled) -> None:
    for known in range(len(run.choices)):
        phases = run.schedule.phases(run.choices[:known])
        assert phases == run.phases[: len(phases)]
        assert phases[-1].searched


@given(runs())
def test_regularisation_rises_to_full_strength(run: Unrolled) -> None:
    strengths = [p.regularization.erase for p in run.phases if p.kind == "train"]
    assert strengths == sorted(strengths)
    assert strengths[-1] == 1
    assert strengths[0] == (0 if run.schedule.adaptive_regularization else 1)


def test_the_expected_run_stays_small_and_keeps_to_its_budget() -> None:
    schedule = of(rule="corners", budget=0.6, search_steps=8)
    phases = schedule.expected((), price)
    assert [(p.kind, p.network) for p in phases if not p.searched] == [
        ("train", Subnet(128, 6)), ("train", Subnet(128, 6)), ("train", Subnet(128, 6)), ("train", DEIT),
    ]  # fmt: skip
    assert [p.position for p in phases if p.searched] == [40, 100]
    assert 0.59 < schedule.cost(phases, price) / 400 <= 0.6
    assert [p.network for p in of().expected((), price) if p.kind == "train"] == list(of().ladder)


def test_the_time_of_a_step_is_the_lower_median_without_the_first() -> None:
    assert step_time([9.0]) == 9.0
    assert step_time([9.0, 2.0]) == 2.0
    assert step_time([9.0, 2.0, 3.0]) == 2.0
    assert step_time([9.0, 4.0, 2.0, 3.0]) == 3.0


def test_a_probe_continues_with_the_smallest_network_or_gives_up() -> None:
    """A tenth into the run; what the other candidates lose or cost does not matter to it."""
    state = BudgetState(48, 400, 300, 200, probing=True)
    times = dict(zip(CORNERS, (3.0, 1.0, 5.0, 10.0)))

    def probe(loss: float, small: float = 3.0) -> Decision:
        losses = dict(zip(CORNERS, (loss, loss / 2, loss / 3, loss / 4)))
        return decide_within(state, 2, [losses], times | {CORNERS[0]: small}, guessing=2.3)

    assert probe(2.3 * 4 * 0.89).choice == Choice(CORNERS[0], 48 + math.ceil(152 / 0.7))
    hopeless = probe(2.3 * 4 * 0.91)
    assert hopeless.choice == Choice(CORNERS[-1], 48)
    text = "too early to save: the loss is 9% below a uniform guess's, not yet 10%"
    assert text in hopeless.because
    assert text in probe(2.3 * 4 * 0.902).because, "9.8 % are not 10 %"
    dear = probe(2.0, small=9.5)
    assert dear.choice == Choice(CORNERS[-1], 48, learned=True)
    assert "nothing to save: a step on 128 px, 6 layers costs 95%" in dear.because


def test_a_budget_that_pays_for_the_complete_model_keeps_what_a_probe_finds_learned() -> None:
    """search.budget: 1 is not promised, because searches may exceed it, so it is probed."""
    whole = of(rule="corners", budget=1.0, search_steps=8)
    price = dict(zip(CORNERS, (0.3, 0.1, 0.5, 1.0))).__getitem__
    state = replace(whole.budget_state(whole.phases([]), price), left=352.0)
    assert state.probing
    losses = dict.fromkeys(CORNERS, 0.5)
    decision = decide_within(state, 2, [losses], dict(zip(CORNERS, (3.0, 1.0, 5.0, 10.0))), guessing=2.3)
    assert "the budget covers it to the end" in decision.because
    for choice in (decision.choice, whole.budget.expected(whole.phases([])[-1], 48, 0.0, price)):
        assert choice.learned
        assert [p.began for p in whole.phases([choice])] == [0, 0, 0]


def test_only_a_budget_that_nobody_has_asked_for_is_probed() -> None:
    free = of(rule="corners", budget=0.5, search_steps=8)
    assert (free.budget.probe, free.stages) == (40, 4)
    assert budgeted(free, promised=True).budget.probe == 0
    assert budgeted(free, search_steps=31).budget.probe == 0, "no room for two searches in the first stage"
    assert budgeted(free, complete_steps=390).budget.probe == 0, "too short to save"
    (first, second) = (p for p in free.phases([Choice(CORNERS[0], 300)]) if p.searched)
    assert (first.position, second.position) == (40, 100)
    hopeless = free.phases([Choice(DEIT, 48)])
    assert [(p.kind, p.start, p.stop, p.began) for p in hopeless[2:]] == [("train", 48, 400, 48)]
    assert [p.age(p.start) for p in hopeless] == [0, 40, 0], "the EMA warms up again, as the learning rate does"
    assert free.entry(hopeless, 2).layer_map.rest == "fresh", "nothing is kept of what has not learned"
    learned = free.phases([Choice(DEIT, 48, learned=True)])
    assert [(p.kind, p.start, p.stop, p.began) for p in learned[2:]] == [("train", 48, 400, 0)]
    assert [p.age(p.start) for p in learned] == [0, 40, 48]
    assert free.entry(learned, 2).layer_map.rest != "fresh", "the network before has learned"
    soon = free.phases([Choice(CORNERS[0], 70)])
    assert [(p.network, p.start, p.stop, p.began) for p in soon[2:]] == [(CORNERS[0], 48, 70, 0), (DEIT, 70, 400, 0)]
    assert free.entry(soon, 3).layer_map.rest == "ema"
