"""The growth schedule: phases and positions of every kind of run."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.operators import interpolation
from scaleprog.growth.phase import Phase, Regularization, undivided
from scaleprog.growth.schedule import Schedule, rungs
from scaleprog.growth.space import Choice, Subnet, View, ladder
from scaleprog.recipe.keys import GrowthSettings, SubnetSettings
from tests.unit.schedules import D1, DEIT, OPERATORS, Unrolled, of, published, two_groups, unroll

FULL_STRENGTH = Regularization()


@st.composite
def runs(draw: st.DrawFn, recycle: bool | None = None, full: Subnet = DEIT) -> Unrolled:
    """AutoProg with any number of stages, search length, rule and choices."""
    stages = draw(st.integers(1, 6))
    steps = draw(st.integers(stages * 3, 500))
    schedule = of(
        full,
        steps,
        draw(st.integers(1, max(1, steps // stages - 1))),
        draw(st.sampled_from(("all", "window"))),
        stages=stages,
        smallest=draw(st.sampled_from((0.3, 0.4, 0.5, 1.0))),
        recycle=draw(st.booleans()) if recycle is None else recycle,
        adaptive_regularization=draw(st.booleans()),
    )
    return Unrolled(schedule, *unroll(schedule, lambda phases: Choice(draw(st.sampled_from(phases[-1].candidates)))))


def bounds(schedule: Schedule, stage: int) -> tuple[int, int]:
    return (stage - 1) * schedule.steps // schedule.stages, stage * schedule.steps // schedule.stages


# ---- kinds


def test_original_trains_the_full_network_throughout() -> None:
    schedule = of(schedule="original", adaptive_regularization=True)
    (phase,) = schedule.phases([])
    assert phase == Phase(1, "train", 0, 400, 0, (DEIT,), 12, False, FULL_STRENGTH)
    assert schedule.stages == 1
    assert schedule.full == DEIT


def test_linear_trains_the_ladder_in_equal_parts() -> None:
    phases = of(schedule="linear").phases([])
    sizes = [Subnet(128, 6), Subnet(160, 8), Subnet(192, 10), DEIT]
    assert [(p.kind, p.candidates, p.start, p.stop, p.position) for p in phases] == [
        ("train", (size,), 100 * k, 100 * k + 100, 100 * k) for k, size in enumerate(sizes)
    ]
    assert [p.stage for p in phases] == [1, 2, 3, 4]


def test_resolutions_follow_the_multiple_of_the_recipe_or_else_the_stride() -> None:
    settings = GrowthSettings(schedule="linear")
    own = GrowthSettings(schedule="linear", resolution_multiple=32)
    for growth, resolutions in ((settings, [112, 144, 192, 224]), (own, [128, 160, 192, 224])):
        assert [subnet.resolution for subnet in rungs(growth, DEIT, 16)[1]] == resolutions


def test_a_schedule_by_hand_is_followed() -> None:
    stages = (
        SubnetSettings(resolution=96, depth=3),
        SubnetSettings(resolution=96, depth=12),
        SubnetSettings(resolution=224, depth=12),
    )
    schedule = of(schedule=stages, steps=10, adaptive_regularization=True)
    phases = schedule.phases([])
    assert [p.candidates for p in phases] == [(Subnet(96, 3),), (Subnet(96, 12),), (DEIT,)]
    assert [(p.start, p.stop) for p in phases] == [(0, 3), (3, 6), (6, 10)]
    assert [p.regularization.erase for p in phases] == [0, 0.5, 1]
    assert schedule.full == DEIT


def test_the_supernet_baseline_is_one_phase_without_a_choice() -> None:
    schedule = of(schedule="supernet", adaptive_regularization=True)
    (phase,) = schedule.phases([])
    every = tuple(Subnet(r, d) for r, d in product((128, 160, 192, 224), (6, 8, 10, 12)))
    assert phase == Phase(1, "supernet", 0, 400, 0, every, 6, False, FULL_STRENGTH)
    assert phase.network == schedule.full == DEIT
    assert {phase.subnet(0, step) for step in range(400)} == set(every)
    assert schedule.entry([phase], 0).layer_map.rest == "fresh"


def test_the_published_automatic_run() -> None:
    """DeiT-S, 0.5 Omega, 100 steps a stage, 8 of them searched."""
    schedule = of()
    phases = schedule.phases(published((128, 6), (160, 10), (192, 12)))
    assert [(p.stage, p.kind, p.start, p.stop, p.position, p.base) for p in phases] == [
        (1, "supernet", 0, 8, 0, 6),
        (1, "train", 8, 100, 8, 6),
        (2, "supernet", 100, 108, 100, 6),
        (2, "train", 108, 200, 108, 10),
        (3, "supernet", 200, 208, 200, 10),
        (3, "train", 208, 300, 208, 12),
        (4, "train", 300, 400, 300, 12),
    ]
    assert [p.network for p in phases] == [
        DEIT, Subnet(128, 6), Subnet(160, 12), Subnet(160, 10), Subnet(192, 12), Subnet(192, 12), DEIT
    ]  # fmt: skip
    assert phases[2].candidates == tuple(Subnet(r, d) for r in (128, 160) for d in (8, 10, 12))
    assert phases[4].candidates == (Subnet(160, 12), Subnet(192, 12))


def test_without_recycling_the_searched_epochs_are_repeated() -> None:
    phases = of(recycle=False).phases(published((128, 6), (160, 10), (192, 12)))
    assert [(p.kind, p.start, p.stop, p.position) for p in phases] == [
        ("supernet", 0, 8, 0),
        ("train", 8, 108, 0),
        ("supernet", 108, 116, 100),
        ("train", 116, 216, 100),
        ("supernet", 216, 224, 200),
        ("train", 224, 324, 200),
        ("train", 324, 424, 300),
    ]


# ---- properties of every automatic run


@given(runs(recycle=True))
def test_phases_tile_the_steps(run: Unrolled) -> None:
    assert run.phases[0].start == 0
    assert run.phases[-1].stop == run.schedule.steps
    assert all(left.stop == right.start for left, right in pairwise(run.phases))
    for phase in run.phases:
        assert phase.start < phase.stop
        assert phase.position == phase.start
        assert phase.position_of(phase.stop - 1) == phase.stop - 1


@given(runs(recycle=False))
def test_without_recycling_positions_are_trained_once_and_searched_on_top(run: Unrolled) -> None:
    assert run.phases[0].start == 0
    assert all(left.stop == right.start for left, right in pairwise(run.phases))
    trained = [p.position_of(step) for p in run.phases if p.kind == "train" for step in range(p.start, p.stop)]
    assert trained == list(range(run.schedule.steps))
    assert run.phases[-1].stop == run.schedule.steps + len(run.choices) * run.schedule.search_steps
    for phase, following in pairwise(run.phases):
        if phase.searched:
            assert following.position == phase.position, "the epochs of the search come again"


@given(runs())
def test_stages_are_equal_parts_and_the_last_is_full_and_unsearched(run: Unrolled) -> None:
    schedule = run.schedule
    assert [p.stage for p in run.phases] == sorted(p.stage for p in run.phases)
    for stage in range(1, schedule.stages + 1):
        first, last = bounds(schedule, stage)
        phases = [p for p in run.phases if p.stage == stage]
        assert phases[0].position == first
        assert phases[-1].position + phases[-1].stop - phases[-1].start == last
        assert [p.kind for p in phases] == (["supernet", "train"] if phases[0].searched else ["train"])
    assert phases == [run.phases[-1]]
    assert phases[0].candidates == (DEIT,)


@given(runs())
def test_searches_take_their_time_and_their_choice_is_trained(run: Unrolled) -> None:
    searches = [i for i, p in enumerate(run.phases) if p.searched]
    assert len(searches) == len(run.choices)
    for i, choice in zip(searches, run.choices):
        search, train = run.phases[i : i + 2]
        assert search.stop - search.start == run.schedule.search_steps
        assert search.kind == "supernet"
        assert len(search.candidates) > 1
        assert train.candidates == (choice.subnet,)
    for phase in run.phases:
        assert phase.searched == (phase.kind == "supernet")


@given(runs())
def test_candidates_follow_the_rule_from_the_network_before(run: Unrolled) -> None:
    before = None
    for stage in range(1, run.schedule.stages):
        first, *_, last = [p for p in run.phases if p.stage == stage] * 2
        assert first.candidates == run.schedule.space.candidates(before, run.schedule.policy.rule)
        assert first.base == (before or min(first.candidates, key=lambda s: s.depth)).depth or not first.searched
        before = last.network


@given(runs())
def test_an_open_search_ends_the_list(run: Unrolled) -> None:
    """What is known grows phase by phase and never changes."""
    for known in range(len(run.choices)):
        phases = run.schedule.phases(run.choices[:known])
        assert phases == run.phases[: len(phases)]
        assert phases[-1].searched
        assert sum(p.searched for p in phases) == known + 1


@given(runs())
def test_searches_are_regularised_in_full_and_stages_by_their_place(run: Unrolled) -> None:
    for phase in run.phases:
        ramp = (phase.stage - 1) / max(1, run.schedule.stages - 1)
        if phase.kind == "supernet" or not run.schedule.adaptive_regularization or run.schedule.stages == 1:
            assert phase.regularization == FULL_STRENGTH
        else:
            assert phase.regularization == Regularization(magnitude=(1 + ramp) / 2, erase=ramp, drop_path=ramp)


def test_one_candidate_needs_no_search() -> None:
    phases = of(smallest=1.0).phases([])
    assert [(p.kind, p.candidates) for p in phases] == [("train", (DEIT,))] * 4
    stuck = of().phases([Choice(DEIT)])  # stage 1 chose the full network: nothing is left to choose
    assert [p.kind for p in stuck] == ["supernet", "train", "train", "train", "train"]
    assert [p.candidates for p in stuck[1:]] == [(DEIT,)] * 4


# ---- phases


@given(runs(), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_step_trains_a_candidate(run: Unrolled, seed: int, step: int) -> None:
    for phase in run.phases:
        assert phase.subnet(seed, step) in phase.candidates
        assert phase.network.resolution == max(s.resolution for s in phase.candidates)
        assert phase.network.depth == max(s.depth for s in phase.candidates)


@pytest.mark.parametrize("operator", OPERATORS)
@given(run=runs(full=D1))
def test_active_layers_of_every_phase(operator: str, run: Unrolled) -> None:
    for phase in run.phases:
        for subnet in phase.candidates:
            (active,) = phase.active(subnet, operator, undivided)
            assert len(active) == subnet.depth
            if phase.kind == "train" or operator in ("rand_init", "stacking"):
                assert active == tuple(range(subnet.depth))
            else:
                whole = interpolation(phase.base, phase.network.depth)
                assert tuple(whole[i] for i in active) == interpolation(phase.base, subnet.depth)


def test_active_layers_of_two_groups() -> None:
    search = of(D1).phases([])[0]
    assert search.network == D1
    assert search.base == 9
    # outlookers 2 -> 4: 0 0 1 1; transformers 7 -> 14: every layer twice
    assert search.active(Subnet(128, 9), "mogrow", two_groups) == ((0, 2), (0, 2, 4, 6, 8, 10, 12))
    assert search.active(Subnet(192, 15), "mogrow", two_groups) == ((0, 2), (0, *range(2, 14)))
    assert search.active(D1, "mogrow", two_groups) == (tuple(range(4)), tuple(range(14)))
    assert search.active(Subnet(192, 15), "stacking", two_groups) == ((0, 1), tuple(range(13)))


@pytest.mark.parametrize("kind", ["original", "linear", "automatic", "supernet"])
def test_what_sub_networks_are_shown(kind: str) -> None:
    shown = [of(schedule=kind).view(s) for s in (Subnet(128, 6), Subnet(192, 12), DEIT)]
    assert shown == [View(128), View(192), View(224)]
    stride_32 = [of(schedule=kind, patches="subset").view(s) for s in (Subnet(128, 6), Subnet(192, 12), DEIT)]
    assert stride_32 == [View(224, 16), View(224, 36), View(224)]
    easy = of(schedule=kind, patches="subset", curriculum=True)
    assert [easy.view(s) for s in (Subnet(128, 6), DEIT)] == [View(224, 16, 128), View(224)]
    assert easy.policy.proxy(Subnet(128, 6)) == Subnet(128, 6), "as published: by what it trains on"


def test_within_a_budget_all_are_scored_by_all_patches() -> None:
    within = [of(budget=0.6, patches=patches) for patches in ("resolution", "subset")]
    assert [schedule.policy.proxy(Subnet(128, 6)) for schedule in within] == [Subnet(128, 6), Subnet(224, 6)]


def test_the_ladder_of_a_schedule_is_that_of_the_space() -> None:
    schedule = of(smallest=0.4)
    assert schedule.ladder == ladder(DEIT, 0.4, 4, 32)
    assert schedule.space.resolutions == (96, 128, 192, 224)
    assert schedule.space.depths == (5, 7, 10, 12)
