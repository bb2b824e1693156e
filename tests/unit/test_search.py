"""The search's arithmetic: the exponent that balances candidates, the choice, and when losses are measured."""

import math
from statistics import linear_regression

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.search import Decision, balancing_exponent, decide, measurement_steps
from scaleprog.growth.space import Subnet
from scaleprog.recipe.keys import SearchSettings

CANDIDATES = [Subnet(r, d) for r in (128, 192, 224) for d in (6, 10, 12)]
positive = st.floats(0.01, 100)


def table(values: list[float]) -> dict[Subnet, float]:
    return dict(zip(CANDIDATES, values))


def fitted(losses: list[float], times: list[float]) -> float:
    """alpha by the standard library's least squares."""
    slope = linear_regression([math.log(t) for t in times], [math.log(loss) for loss in losses]).slope
    return max(-slope, 0.0)


@st.composite
def spread_times(draw: st.DrawFn, size: int = 9) -> list[float]:
    """Step times in seconds that differ by at least 10 %, in any order."""
    steps = draw(st.lists(st.floats(1.1, 3), min_size=size, max_size=size))
    times = [draw(positive)]
    for step in steps[1:]:
        times.append(times[-1] * step)
    return draw(st.permutations(times))


# ---- settings


def test_the_published_method_has_defaults_of_its_own() -> None:
    published = SearchSettings(method="published", subset=512)
    assert (published.candidates, published.measurements, published.weights) == ("window", 5, "ema")
    assert (published.epochs, published.subset) == (2, 512)
    assert SearchSettings(method="published", epochs=None).epochs is None
    assert SearchSettings(**published.model_dump()) == published
    ours = SearchSettings()
    assert (ours.candidates, ours.measurements, ours.weights, ours.epochs) == ("corners", 1, "online", None)


# ---- alpha


@given(positive, st.floats(0, 5), spread_times())
def test_the_exponent_of_a_power_law_is_found(scale: float, exponent: float, times: list[float]) -> None:
    losses = [scale * t**-exponent for t in times]
    assert balancing_exponent(losses, times) == pytest.approx(exponent, rel=1e-6, abs=1e-9)
    scores = decide(1, [table(losses)], table(times)).scores
    assert max(scores) == pytest.approx(min(scores), rel=1e-6), "alpha balances what lies on the law"


@given(positive, st.floats(0.01, 5), spread_times())
def test_losses_that_rise_with_time_leave_time_out(scale: float, exponent: float, times: list[float]) -> None:
    losses = [scale * t**exponent for t in times]
    assert balancing_exponent(losses, times) == 0
    assert decide(1, [table(losses)], table(times)).chosen == CANDIDATES[times.index(min(times))]


@given(st.lists(positive, min_size=9, max_size=9), spread_times())
def test_the_fit_is_least_squares(losses: list[float], times: list[float]) -> None:
    assert balancing_exponent(losses, times) == pytest.approx(fitted(losses, times), rel=1e-6, abs=1e-9)


@given(st.lists(positive, min_size=9, max_size=9), spread_times(), st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(losses: list[float], times: list[float], unit: float) -> None:
    alpha = balancing_exponent(losses, times)
    assert balancing_exponent(losses, [t * unit for t in times]) == pytest.approx(alpha, rel=1e-6, abs=1e-9)
    here = decide(1, [table(losses)], table(times))
    ranked = sorted(here.scores)
    if ranked[1] > ranked[0] * (1 + 1e-4):
        assert decide(1, [table(losses)], table([t * unit for t in times])).chosen == here.chosen


@given(st.lists(positive, min_size=2, max_size=9), positive)
def test_equal_times_say_nothing_about_alpha(losses: list[float], time: float) -> None:
    assert balancing_exponent(losses, [time] * len(losses)) == 0


# ---- the choice


@given(st.lists(st.lists(positive, min_size=9, max_size=9), min_size=1, max_size=5), spread_times())
def test_the_choice_is_the_smallest_balanced_mean_loss(measured: list[list[float]], times: list[float]) -> None:
    decision = decide(3, [table(losses) for losses in measured], table(times))
    means = [math.fsum(column) / len(column) for column in zip(*measured)]
    alpha = fitted(means, times)
    scores = [loss * time**alpha for loss, time in zip(means, times)]
    assert decision.stage == 3
    assert decision.candidates == tuple(CANDIDATES)
    assert decision.losses == pytest.approx(means)
    assert decision.times == tuple(times)
    assert decision.alpha == pytest.approx(alpha, rel=1e-6, abs=1e-9)
    assert [s / decision.scores[0] for s in decision.scores] == pytest.approx([s / scores[0] for s in scores], rel=1e-4)
    if sorted(scores)[1] > min(scores) * (1 + 1e-4):
        assert decision.chosen == CANDIDATES[scores.index(min(scores))]


def test_a_choice_by_hand() -> None:
    """Times 1, 2, 4 and losses 4, 2, 2: slope -1/2 in log-log, scores 4, 2 * sqrt 2, 4."""
    sizes = [Subnet(128, 6), Subnet(160, 8), Subnet(192, 10)]
    measured = [dict(zip(sizes, losses)) for losses in ((5, 2, 1), (3, 2, 3))]
    decision = decide(2, measured, dict(zip(sizes, (1.0, 2.0, 4.0))))
    assert decision == Decision(
        2, tuple(sizes), (4, 2, 2), (1, 2, 4), pytest.approx((4, 2 * 2**0.5, 4)), sizes[1], alpha=pytest.approx(0.5)
    )


@given(st.lists(positive, min_size=9, max_size=9), spread_times(), st.randoms())
def test_the_order_of_the_candidates_does_not_matter(losses: list, times: list, random: object) -> None:
    entries = list(zip(CANDIDATES, losses, times))
    here = decide(1, [{c: loss for c, loss, _ in entries}], {c: time for c, _, time in entries})
    random.shuffle(entries)
    there = decide(1, [{c: loss for c, loss, _ in entries}], {c: time for c, _, time in entries})
    assert there == here


@pytest.mark.parametrize("cheap", [0, 1])
@pytest.mark.parametrize(("difference", "tied"), [(0, True), (0.5e-6, True), (-0.5e-6, True), (2e-6, False)])
def test_ties_go_to_the_cheaper(cheap: int, difference: float, tied: bool) -> None:
    """The third candidate, slow and bad, makes losses rise with time: alpha is 0 and scores are losses."""
    times, losses = [2.0, 2.0, 9.0], [1.0, 1.0, 5.0]
    times[cheap], losses[cheap] = 1.0, 1 + difference
    sizes = CANDIDATES[:3]
    decision = decide(1, [dict(zip(sizes, losses))], dict(zip(sizes, times)))
    assert decision.alpha == 0
    assert decision.chosen == sizes[cheap if tied else 1 - cheap]


def test_ties_in_time_too_go_to_the_smaller() -> None:
    times = dict.fromkeys(reversed(CANDIDATES), 1.0)
    assert decide(1, [dict.fromkeys(CANDIDATES, 2.0)], times).chosen == CANDIDATES[0]


@given(positive, positive, st.tuples(positive, positive).filter(lambda t: abs(t[0] / t[1] - 1) > 0.01))
def test_of_two_candidates_the_cheaper_is_chosen(first: float, second: float, times: tuple[float, float]) -> None:
    """A line through two points leaves no residual: where more time pays, the two tie."""
    sizes = CANDIDATES[:2]
    decision = decide(1, [dict(zip(sizes, (first, second)))], dict(zip(sizes, times)))
    assert decision.chosen == sizes[times.index(min(times))]


@pytest.mark.parametrize("unit", [0.01, 1.0, 100.0])
def test_step_times_that_hardly_differ(unit: float) -> None:
    """alpha is about 1,300 then, and T^alpha on its own is beyond floating point."""
    sizes, losses = CANDIDATES[:4], [2.0, 1.6, 1.7, 1.3]
    times = [unit * (1 + 1e-4 * i) for i in range(4)]
    alpha = fitted(losses, times)
    assert alpha > 1000
    logs = [math.log(loss) + alpha * math.log(time / unit) for loss, time in zip(losses, times)]
    decision = decide(1, [dict(zip(sizes, losses))], dict(zip(sizes, times)))
    assert decision.chosen == sizes[logs.index(min(logs))]
    assert decision.chosen == sizes[1]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("where", ["losses", "times"])
def test_losses_and_times_that_cannot_be_are_refused(where: str, bad: float, position: int) -> None:
    values = {"losses": [1.0, 2.0, 3.0], "times": [1.0, 2.0, 3.0]}
    values[where][position] = bad
    sizes = CANDIDATES[:3]
    with pytest.raises(ValueError, match="stage 7: losses and times must be finite and positive"):
        decide(7, [dict(zip(sizes, values["losses"]))], dict(zip(sizes, values["times"])))


def test_one_bad_measurement_of_several_is_refused() -> None:
    good, bad = table([1.0] * 9), table([1.0] * 8 + [math.nan])
    with pytest.raises(ValueError, match="finite and positive"):
        decide(1, [good, bad, good], table([1.0] * 9))


# ---- when losses are measured


def test_five_measurements_are_the_start_and_the_quarters_of_the_last_epoch() -> None:
    assert measurement_steps(0, 200, 100, 5) == (100, 125, 150, 175, 200)
    assert measurement_steps(1000, 1200, 100, 5) == (1100, 1125, 1150, 1175, 1200)


def test_one_measurement_is_at_the_end() -> None:
    assert measurement_steps(300, 500, 100, 1) == (500,)


def test_a_search_of_less_than_an_epoch_is_measured_throughout() -> None:
    assert measurement_steps(50, 90, 100, 5) == (50, 60, 70, 80, 90)


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 10**4), st.integers(2, 12))
def test_measurements_are_equispaced_and_inside_the_search(start: int, length: int, epoch: int, count: int) -> None:
    stop = start + length
    steps = measurement_steps(start, stop, epoch, count)
    first = max(start, stop - epoch)
    assert len(steps) == count
    assert steps[0] == first
    assert steps[-1] == stop
    for i, step in enumerate(steps):
        assert abs(step - (first + (stop - first) * i / (count - 1))) < 1


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.0, 0.0, None), "; nothing is lost by 2 candidates: the cheaper one is taken"),
        ((0.0, 0.0, 0.0), "; nothing is lost by 3 candidates: the cheapest one is taken"),
        ((1.5, 1.5 + 1e-7, 2.0), "; 2 candidates tie: the cheaper one is taken"),
        ((1.5, 1.6, None), ""),
        ((None, 1.5, 1.5), ""),
    ],
)
def test_a_decision_says_which_candidates_tie(scores: tuple[float | None, ...], said: str) -> None:
    candidates = Subnet(16, 2), Subnet(16, 4), Subnet(32, 4)
    decision = Decision(2, candidates, (1.0,) * 3, (1.0, 2.0, 4.0), scores, candidates[0], complete_from=7, why="cheap")
    assert decision.because == f"complete from schedule step 7: cheap{said}"
