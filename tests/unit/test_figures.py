"""The pictures of a report: what they name, magnify, and keep apart."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from scaleprog.growth.search import Decision
from scaleprog.growth.space import Subnet
from scaleprog.reporting.figures import Curve, Search, draw_accuracy, draw_searches, draw_verdict

SMALL, MIDDLE, LARGE = Subnet(16, 2), Subnet(16, 4), Subnet(32, 4)
WHY = "its step costs 11% of a complete one, and its loss is as low, within noise"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr("scaleprog.reporting.figures.save", lambda figure, path: figures.append(figure))
    return figures


def curves(*ends: float, finished: bool = True) -> list[Curve]:
    """A run of its own recipe for each final top-1; all begin at 20 %."""
    return [Curve(f"run {i}", (1.0, 2.0), (20.0, end), (), finished) for i, end in enumerate(ends)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("lines", "panels"),
    [
        (curves(90.0, 91.0), 2),
        (curves(90.0, 30.0), 1),
        (curves(90.0), 1),
        (curves(90.0, 91.0, finished=False), 1),
        ([Curve("flat", (1.0, 2.0), (50.0, 50.0), (), True)] * 2, 1),
        ([], 1),
    ],
    ids=["close", "far apart", "one run", "unfinished", "flat", "none"],
)
def test_ends_are_magnified_where_that_shows_more(lines: Sequence[Curve], panels: int, drawn: list[Figure]) -> None:
    draw_accuracy(Path("x.png"), lines)
    assert len(drawn[0].axes) == panels


def test_a_legend_names_all_recipes_or_none(drawn: list[Figure]) -> None:
    draw_accuracy(Path("x.png"), curves(*range(40, 68)))
    assert legend(drawn[0]) == [f"run {i}" for i in range(28)]
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines if len(line.get_xdata()) == 2}
    assert len(looks) == 28, "no two lines look the same"
    draw_accuracy(Path("x.png"), curves(*range(40, 69)))
    assert legend(drawn[1]) == []
    assert drawn[1].axes[0].get_title() == "29 recipes, too many to name; the report's table has all"


def test_a_run_without_evaluations_is_named_and_said_to_have_none(drawn: list[Figure]) -> None:
    draw_accuracy(Path("x.png"), [Curve("new", (), (), (), False)])
    assert legend(drawn[0]) == ["new (unfinished, not evaluated)"]
    assert texts(drawn[0]) == ["no evaluation yet"]


def search(steps: tuple[int, ...], scores: tuple[float | None, ...] = (0.0, 0.0, None)) -> Search:
    """A search whose first two candidates have the same losses."""
    one, other = tuple(2 - step / 100 for step in steps), tuple(1.5 - step / 100 for step in steps)
    losses = {SMALL: one, MIDDLE: one, LARGE: other}
    last = tuple(each[-1] for each in losses.values())
    decision = Decision(2, tuple(losses), last, (1.0, 2.0, 4.0), scores, SMALL, complete_from=78, why=WHY)
    return Search(2, steps, losses, decision)


def test_candidates_that_coincide_are_one_line_with_both_names(drawn: list[Figure]) -> None:
    draw_searches(Path("x.png"), {"run": [search((10, 20, 30))]})
    losses = drawn[0].axes[0]
    assert [len(line.get_xdata()) for line in losses.lines] == [3, 3]
    assert [text.get_text() for text in losses.texts] == ["16x2 = 16x4"]


def test_losses_of_one_moment_have_a_row_for_each_candidate(drawn: list[Figure]) -> None:
    draw_searches(Path("x.png"), {"run": [search((10,), (None, None, None))]})
    losses, scores = drawn[0].axes[:2] if drawn[0].axes[1].texts else drawn[0].axes[::2][:2]
    markers = [line for line in losses.lines if line.get_marker() != "o" or line.get_markerfacecolor() != "none"]
    assert sorted((*line.get_xdata(), *line.get_ydata()) for line in markers) == [(1.4, 2), (1.9, 0), (1.9, 1)]
    assert [label.get_text() for label in losses.get_yticklabels()] == ["16 px x 2", "16 px x 4", "32 px x 4"]
    assert [text.get_text() for text in scores.texts] == ["no scores"]


def outside(figure: Figure) -> list[str]:
    """The texts, but for numbers along an axis, that reach beyond the left or right edge of the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ticks = {label for axes in figure.axes for label in axes.get_xticklabels() + axes.get_yticklabels()}
    names = {label for label in ticks if re.search("[a-z]", label.get_text())}
    shown = [text for text in set(figure.findobj(Text)) - (ticks - names) if text.get_text().strip()]
    width = figure.bbox.width
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]
    return [text for text, box in boxes if box.x0 < -1 or box.x1 > width + 1]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_long_names_and_reasons_fit_into_the_picture(count: int, drawn: list[Figure]) -> None:
    names = [f"vit_small_imagenet_{'long' * 9}_{i}" for i in range(count)]
    draw_searches(Path("x.png"), {"run": [search((10, 20))] * min(count, 4)})
    draw_accuracy(Path("x.png"), [Curve(name, (1.0, 2.0), (20.0, 50.0 + i), (), True) for i, name in enumerate(names)])
    draw_verdict(Path("x.png"), [(name, 100.0 + i, 90.0) for i, name in enumerate(names)])
    assert [outside(figure) for figure in drawn] == [[], [], []]
