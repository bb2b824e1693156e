"""A window over the stages: which networks the steps of a run draw, and what they cost."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import RecipeError
from scaleprog.growth.phase import Window
from scaleprog.growth.space import Subnet
from scaleprog.planning.plan import describe, outline
from scaleprog.recipe import Recipe
from scaleprog.rundir.planned import read_plan, write_plan
from tests.conftest import CONFIGS

LADDER = (Subnet(128, 6), Subnet(160, 8), Subnet(192, 10), Subnet(224, 12))
STEPS = 400
windows = st.builds(
    Window,
    st.integers(1, 8).map(lambda count: tuple(Subnet(32 * k, k) for k in range(1, count + 1))),
    st.floats(0, 5),
    st.floats(0, 1),
    st.integers(1, 500),
)


@given(windows, st.floats(0, 1))
def test_shares_are_probabilities_and_the_even_part_is_everyones(window: Window, progress: float) -> None:
    shares = window.shares(progress)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= window.mix / len(shares) - 1e-12
    nearest = round(progress * (len(shares) - 1))
    assert shares[nearest] == pytest.approx(max(shares))


@given(windows)
def test_a_window_begins_with_the_first_and_ends_with_the_last(window: Window) -> None:
    first, last = window.shares(0), window.shares(1)
    assert first == pytest.approx(last[::-1])
    assert first == sorted(first, reverse=True)


def test_by_hand() -> None:
    """In the middle of three, one of spread 1: the neighbors weigh exp(-1/2) = 0.6065; a tenth is drawn evenly."""
    middle = 1 / (1 + 2 * 0.6065306597)
    window = Window(LADDER[:3], 1.0, 0.1, STEPS)
    assert window.shares(0.5) == pytest.approx(
        [0.1 / 3 + 0.9 * share for share in ((1 - middle) / 2, middle, (1 - middle) / 2)]
    )
    assert Window(LADDER, 0.0, 0.0, STEPS).shares(0.4) == [0, 1, 0, 0]
    assert Window(LADDER, 1e-9, 0.0, STEPS).shares(0.4) == pytest.approx([0, 1, 0, 0])


def test_steps_draw_what_the_window_says_and_cost_its_mean() -> None:
    window = Window(LADDER, 0.65, 0.1, 40_000)
    drawn = [window.draw(0, step) for step in range(window.length)]
    for part in range(4):
        own = drawn[part * 10_000 : (part + 1) * 10_000]
        progress = [i / 39_999 for i in range(part * 10_000, (part + 1) * 10_000)]
        expected = [sum(column) / 10_000 for column in zip(*map(window.shares, progress[::10]))]
        found = Counter(own)
        assert [found[network] / 10_000 for network in LADDER] == pytest.approx([10 * e for e in expected], abs=0.02)
    price = {network: float(network.resolution**2 * network.depth) for network in LADDER}
    assert window.mean(price.__getitem__) == pytest.approx(sum(price[network] for network in drawn) / 40_000, rel=0.01)
    rest = sum(price[network] for network in drawn[30_000:]) / 10_000
    assert window.mean(price.__getitem__, 30_000) == pytest.approx(rest, rel=0.01)
    assert replace(window, cooldown=9).mean(price.__getitem__, 40_003) == price[LADDER[-1]]
    assert drawn[:100] != [window.draw(1, step) for step in range(100)]


def prog(*settings: str) -> Recipe:
    return Recipe.load(CONFIGS / "imagenet" / "deit_small_prog_100.yaml", settings)


def test_a_run_is_one_phase_and_its_plan_is_kept(tmp_path: Path) -> None:
    recipe = prog("growth.window.spread=0.65")
    _, schedule = outline(recipe, 10)
    (phase,) = schedule.phases([])
    ladder = outline(prog(), 10)[1].ladder
    assert (phase.kind, phase.start, phase.stop, phase.searched) == ("supernet", 0, 1000, False)
    assert phase.candidates == tuple(sorted(ladder)) == schedule.networks
    assert phase.network == schedule.full == ladder[-1]
    for subnet in phase.candidates:
        assert sum(map(len, schedule.active(phase, subnet))) == subnet.depth
    write_plan(tmp_path, schedule, lambda subnet: float(subnet.depth))
    kept, gmacs = read_plan(tmp_path)
    assert kept.phases([]) == schedule.phases([])
    assert set(gmacs) == set(ladder)
    told = describe(recipe)
    assert 0.5 < told["speedup"] < describe(prog())["speedup"] * 1.2


@pytest.mark.parametrize("schedule", ["original", "automatic", "supernet"])
def test_only_stages_have_a_window(schedule: str) -> None:
    with pytest.raises(RecipeError, match=r"growth\.window: needs stages to draw from"):
        outline(prog("growth.window.spread=0.5", f"growth.schedule={schedule}"), 10)


def test_a_window_does_not_count_compute() -> None:
    with pytest.raises(RecipeError, match=r"growth\.steps: compute needs stages"):
        outline(prog("growth.window.spread=0.5", "growth.steps=compute"), 10)


def test_adareg_follows_stages_that_a_window_has_not() -> None:
    with pytest.raises(RecipeError, match=r"growth\.adaptive_regularization: true follows the stages"):
        outline(prog("growth.window.spread=0.5", "growth.adaptive_regularization=true"), 10)
    with pytest.raises(RecipeError, match=r"growth\.regularization_from: needs growth\.adaptive_regularization"):
        outline(prog("growth.regularization_from.magnitude=0.2"), 10)


def test_the_cooldown_trains_the_last_network_only(tmp_path: Path) -> None:
    recipe = prog("growth.window={spread: 3, mix: 0.5}", "optimizer.cooldown_epochs=20")
    _, schedule = outline(recipe, 10)
    (phase,) = schedule.phases([])
    assert schedule.steps == phase.stop == 1200
    assert {phase.subnet(0, step) for step in range(1000, 1200)} == {schedule.full}
    assert len({phase.subnet(0, step) for step in range(900, 1000)}) > 1
    price = {network: float(network.resolution) for network in phase.candidates}.__getitem__
    drawn = sum(price(phase.subnet(seed, step)) for seed in range(20) for step in range(1200))
    assert phase.mean(price) == pytest.approx(drawn / 20 / 1200, rel=0.01)
    write_plan(tmp_path, schedule, lambda subnet: 1.0)
    assert read_plan(tmp_path)[0].phases([]) == schedule.phases([])


stages = st.lists(st.tuples(st.sampled_from([128, 160, 192, 224]), st.integers(6, 12)), max_size=4)


@given(stages, st.sampled_from([224, 128]))
def test_stages_whose_images_do_not_grow_have_a_window_too(sizes: list[tuple[int, int]], last: int) -> None:
    """All depths of the list can be drawn, and what is evaluated is the complete model."""
    depths = sorted(depth for _, depth in sizes)
    ladder = [*((side, depth) for (side, _), depth in zip(sizes, depths)), (last, 12)]
    by_hand = [{"resolution": side, "depth": depth} for side, depth in ladder]
    patches = "resolution" if last == 224 else "subset"
    values = prog("growth.window.spread=1", f"growth.patches={patches}").model_dump(mode="json", by_alias=True)
    recipe = Recipe.of({**values, "growth": {**values["growth"], "schedule": by_hand}}, "test")
    _, schedule = outline(recipe, 10)
    for phase in schedule.phases([]):
        for subnet in phase.candidates:
            assert sum(map(len, schedule.active(phase, subnet))) == subnet.depth
        assert phase.network.depth == 12, "what is evaluated"
