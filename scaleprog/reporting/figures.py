"""The pictures of a report, drawn without a display: accuracy over time, growth schedules, searches."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from scaleprog.files.atomic import replaced
from scaleprog.files.display import as_label
from scaleprog.growth.search import Decision
from scaleprog.growth.space import Subnet

T = TypeVar("T")
# Okabe and Ito's colors: people with any common kind of color blindness can tell them apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
BLUE, VERMILION, GREEN, ORANGE, BLACK = (COLORS[i] for i in (0, 1, 2, 4, 6))
COST = "cost (steps of the complete model)"
LONG = 32  # characters of a name beside a bar; the rest follows on further lines
MAGNIFIED = 0.3  # a panel magnifies the ends of lines if these take up at most this part of the height
LETTERS = 11  # that fit into an inch
HANDLE = 8  # letters in whose place a legend has a sample of a line
WIDTH, DPI = 8.4, 160  # inches; readable at the 800 to 1000 pixels of a README
MOST_PIXELS = 2**15  # of a picture's height; matplotlib cannot draw more than twice as many
POINTS, BARS, COLUMNS, SHADES, RECIPES = 2000, 500, 8, 12, len(COLORS) * len(LINES)
"""How many things of a kind a picture shows; more of them would be unreadable and slow to draw."""
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "legend.frameon": False, "hatch.linewidth": 0.7,
    "hatch.color": "white", "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,  # a name with dollar signs is not a formula
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One run's top-1 (percent) against training time (seconds). `begins`: when each stage after the first begins."""

    recipe: str
    seconds: tuple[float, ...]
    top1: tuple[float, ...]
    begins: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Segment:
    """The trained part of a phase: optimizer steps `start` to `stop`, its largest network, and `seconds`, the training
    time before it. `waiting`: the fraction of its time in which it waited for data; None if that was not recorded."""

    stage: int
    phase: str
    start: int
    stop: int
    network: Subnet
    seconds: float
    waiting: float | None = None


@dataclass(frozen=True)
class Search:
    """One stage's search: every candidate's loss after each of `steps`, and the decision (None: not decided yet)."""

    stage: int
    steps: tuple[int, ...]
    losses: Mapping[Subnet, tuple[float, ...]]
    decision: Decision | None


@matplotlib.rc_context(STYLE)
def draw_accuracy(path: Path, curves: Sequence[Curve], spent: str = "training time (s)") -> None:
    """Draws the paper's Fig. 4: one line per run, one color per recipe. If the ends of the lines lie close together, a
    second panel magnifies them.

    `spent` labels the axis; needed if the curves' `seconds` hold another quantity.
    """
    recipes = list(dict.fromkeys(curve.recipe for curve in curves))
    labels = {recipe: _legend(recipe, [curve for curve in curves if curve.recipe == recipe]) for recipe in recipes}
    columns = min(4, int(WIDTH * LETTERS) // (max(map(len, labels.values()), default=0) + HANDLE)) or 1
    named = 0 < len(recipes) <= RECIPES
    rows = math.ceil((len(recipes) + 1) / columns) if named else 0
    close = _are_close(curves)
    figure = Figure(figsize=(WIDTH, 4.0 + 0.22 * rows))
    axes = figure.subplots(1, 2 if close else 1, squeeze=False, width_ratios=(2, 1) if close else (1,))[0]
    for i, recipe in enumerate(recipes):
        members = [curve for curve in curves if curve.recipe == recipe]
        color, marker, line = COLORS[i % 7], MARKERS[(i + i // 7) % 7], LINES[i // 7 % len(LINES)]
        for curve in members:
            seen = some(list(zip(curve.seconds, curve.top1)))
            axes[0].plot(*np.reshape(seen, (-1, 2)).T, line, color=color, linewidth=1.2 if len(members) > 1 else 1.8)
            if curve.top1:
                begins = some(curve.begins)
                heights = np.interp(begins, curve.seconds, curve.top1)
                axes[0].plot(begins, heights, "|", color=color, markersize=11, markeredgewidth=1.6)
                if not curve.finished:
                    axes[0].plot(
                        curve.seconds[-1], curve.top1[-1], marker, color=color, markerfacecolor="white", zorder=4
                    )
        _ends(axes, [(c.seconds[-1], c.top1[-1]) for c in members if c.finished and c.top1], color, marker)
        axes[0].plot([], [], line + marker, color=color, markeredgecolor="white", markersize=8, label=labels[recipe])
    if any(curve.begins for curve in curves):
        axes[0].plot([], [], "|", color="#555555", markersize=11, markeredgewidth=1.6, label="a stage begins")
    axes[0].set(xlabel=spent, ylabel="top-1 (%), better of online and EMA", xlim=(0, None))
    if close:
        axes[1].set(title="the ends, magnified", xlabel=spent)
        axes[1].margins(0.18)
        axes[1].xaxis.set_major_locator(MaxNLocator(4))
    if not any(curve.top1 for curve in curves):
        axes[0].set_yticks([])
        axes[0].text(0.5, 0.5, "no evaluation yet", ha="center", transform=axes[0].transAxes)
    if named:
        figure.legend(loc="outside lower center", ncols=min(len(recipes) + 1, columns))
    elif recipes:
        axes[0].set_title(f"{len(recipes)} recipes, too many to name; the report's table has all")
    save(figure, path)


def _legend(recipe: str, members: Sequence[Curve]) -> str:
    """The name of a recipe, with how many seeds it has and how many are unfinished or were never evaluated."""
    notes = [f"{len(members)} seeds"] if len(members) > 1 else []
    missing = {
        "unfinished": sum(not curve.finished for curve in members),
        "not evaluated": sum(not curve.top1 for curve in members),
    }
    notes += [f"{count} {what}" if len(members) > 1 else what for what, count in missing.items() if count]
    return f"{as_label(recipe)} ({', '.join(notes)})" if notes else as_label(recipe)


def _are_close(curves: Sequence[Curve]) -> bool:
    """Whether several lines end, and so close together that a magnified picture of their ends shows more."""
    ends = [curve.top1[-1] for curve in curves if curve.finished and curve.top1]
    every = [top1 for curve in curves for top1 in curve.top1]
    return bool(ends) and 0 < max(ends) - min(ends) < MAGNIFIED * (max(every) - min(every))


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, at a lower resolution if it would be too tall to draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the font lacks, labels that leave no room
        with replaced(path) as temporary:
            figure.savefig(temporary, dpi=min(DPI, MOST_PIXELS / figure.get_figheight()), format=path.suffix[1:])


def some(points: Sequence[T]) -> Sequence[T]:
    """As many of the points as a picture can show, always including the last one."""
    step = math.ceil(len(points) / POINTS)
    return points if step < 2 else [*points[:-1:step], points[-1]]


def _ends(axes: Sequence[Axes], ends: Sequence[tuple[float, float]], color: str, marker: str) -> None:
    """Marks the mean of a recipe's ends in all axes. The last one also shows each end and the deviations."""
    if not ends:
        return
    seconds, top1 = zip(*ends)
    for axis in axes:
        axis.plot(mean(seconds), mean(top1), marker, color=color, markersize=8, markeredgecolor="white", zorder=4)
    if len(ends) > 1:
        axes[-1].plot(seconds, top1, ".", color=color, markersize=5, alpha=0.6)
        axes[-1].errorbar(
            mean(seconds), mean(top1), xerr=stdev(seconds), yerr=stdev(top1), color=color, linewidth=1.1, capsize=2
        )


@matplotlib.rc_context(STYLE)
def draw_schedules(path: Path, timelines: Sequence[tuple[str, Sequence[Segment]]]) -> None:
    """Draws which network trained when. A taller bar is a deeper network, a darker one has larger images; supernets are
    hatched."""
    timelines = [(_beside(label), segments[-BARS:]) for label, segments in timelines]
    every = [segment for _, segments in timelines for segment in segments]
    deepest = max((s.network.depth for s in every), default=1)
    resolutions = sorted({s.network.resolution for s in every})
    last = max((s.stop for s in every), default=1) or 1
    shades = shades_of(resolutions)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.72 * len(timelines)))
    axes = figure.subplots()
    for row, (_, segments) in enumerate(timelines):
        for segment in segments:
            size, height = segment.stop - segment.start, 0.86 * segment.network.depth / deepest
            shade = shades[segment.network.resolution]
            axes.bar(
                segment.start,
                height,
                size,
                bottom=-row,
                align="edge",
                color=shade,
                edgecolor="white",
                linewidth=0.8,
                hatch="////" if segment.phase == "supernet" else None,
            )
            axes.text(
                segment.start + size / 2,
                height / 2 - row,
                _segment_text(segment, size / last),
                color=ink(shade),
                ha="center",
                va="center",
                fontsize=8,
                linespacing=0.95,
                bbox={"facecolor": shade, "edgecolor": "none", "pad": 1.5},
            )
    axes.set(xlabel="optimizer steps", xlim=(0, last), ylim=(0.05 - len(timelines) + 0.9, 1))
    axes.set_title("height: depth in layers; color: resolution", loc="left", fontsize=9, color="#555555")
    axes.set_yticks([0.4 - row for row in range(len(timelines))], [label for label, _ in timelines])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    legend = [Patch(color=shade, label=f"{resolution} px") for resolution, shade in legend_shades(shades)]
    legend.append(Patch(facecolor="#999999", hatch="////", label="supernet"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 7), handlelength=1.4)
    save(figure, path)


def _beside(name: str) -> str:
    """A name that stands beside a bar."""
    return "\n".join(fill(line, LONG) for line in as_label(name).splitlines())


def shades_of(resolutions: Sequence[int]) -> dict[int, Any]:
    """A color for each resolution; a larger one is darker."""
    return dict(zip(resolutions, matplotlib.colormaps["cividis_r"](np.linspace(0.1, 0.9, len(resolutions)))))


def legend_shades(shades: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """As many of the shades as fit into a legend."""
    step = math.ceil(len(shades) / SHADES) or 1
    return list(shades.items())[::step]


def ink(shade: Any) -> str:
    """The text color that is readable on a shade."""
    return "white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.52 else "black"


def _segment_text(segment: Segment, share: float) -> str:
    """The label that fits into a bar of this share of the axis; empty if the bar is too narrow."""
    size = f"{segment.network.resolution} px x {segment.network.depth}"
    if segment.phase == "supernet":
        return f"up to {size}" if share > 0.25 else ""
    return size if share > 0.11 else size.replace(" x", "\nx") if share > 0.055 else ""


@matplotlib.rc_context(STYLE)
def draw_searches(path: Path, searches: Mapping[str, Sequence[Search]]) -> None:
    """Draws one column for each searched stage of each run: the candidates' losses above, their scores below. A ring
    marks the chosen candidate."""
    columns = min(COLUMNS, max(len(stages) for stages in searches.values()))
    shown = {run: stages[-columns:] for run, stages in searches.items()}
    heights = [4.9 if any(map(_scored, stages)) else 3.0 for stages in shown.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)))
    blocks = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (run, stages), block in zip(shown.items(), blocks, strict=True):
        block.suptitle(as_label(run), fontweight="bold", fontsize=11)
        _draw_run(block, stages, max(columns, 2))
    save(figure, path)


def _scored(search: Search) -> bool:
    """Whether some candidate of a search has a score."""
    return search.decision is not None and any(score is not None for score in search.decision.scores)


def _draw_run(block: SubFigure, stages: Sequence[Search], columns: int) -> None:
    grid = block.subplots(2, columns, squeeze=False, height_ratios=(1, 1.15 if any(map(_scored, stages)) else 0.1))
    candidates = {subnet for search in stages for subnet in search.losses}
    colors = dict(zip(sorted({s.resolution for s in candidates}), cycle(COLORS)))
    markers = dict(zip(sorted({s.depth for s in candidates}), cycle(MARKERS)))
    looks = {subnet: (colors[subnet.resolution], markers[subnet.depth]) for subnet in candidates}
    for search, (above, below) in zip(stages, grid.T):
        decision = search.decision
        outcome = f"chose {decision.chosen.short}" if decision else "is not decided yet"
        above.set_title(fill(f"stage {search.stage} {outcome}", int(LETTERS * WIDTH / columns) - 4))
        chosen = decision.chosen if decision else None
        if len(search.steps) == 1:
            _draw_rows(above, {subnet: losses[0] for subnet, losses in search.losses.items()}, looks, chosen)
            above.set_xlabel(f"loss, step {search.steps[0]}")
        else:
            _draw_losses(above, search, looks, chosen)
        if decision is not None and _scored(search):
            _draw_rows(below, dict(zip(decision.candidates, decision.scores)), looks, chosen)
            below.set_xlabel("score")
        else:
            below.set_axis_off()
            below.text(0.5, 0.5, "no scores" if decision else "", ha="center", transform=below.transAxes)
    for empty in grid[:, len(stages) :].flat:
        empty.set_axis_off()


def _draw_losses(axes: Axes, search: Search, looks: Mapping[Subnet, tuple[str, str]], chosen: Subnet | None) -> None:
    """Draws the candidates' losses over the steps. A line that belongs to several candidates names them."""
    lines: dict[tuple[float, ...], list[Subnet]] = {}
    for subnet, losses in search.losses.items():
        lines.setdefault(losses, []).append(subnet)
    for losses, subnets in lines.items():
        color, marker = looks[chosen if chosen in subnets else subnets[0]]
        axes.plot(
            some(search.steps),
            some(losses),
            color=color,
            marker=marker,
            markersize=5,
            linewidth=2.6 if chosen in subnets else 1.0,
            zorder=3 if chosen in subnets else 2,
            markeredgecolor="white",
        )
        if len(subnets) > 1:
            names = " = ".join(subnet.short for subnet in subnets)
            axes.annotate(
                names, (search.steps[-1], losses[-1]), (-2, 3), textcoords="offset points", ha="right", fontsize=7
            )
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.ticklabel_format(useOffset=False)


def _draw_rows(
    axes: Axes,
    values: Mapping[Subnet, float | None],
    looks: Mapping[Subnet, tuple[str, str]],
    chosen: Subnet | None,
) -> None:
    """Draws one value of each candidate, in a row of its own."""
    for row, (subnet, value) in enumerate(values.items()):
        color, marker = looks.get(subnet, ("black", "o"))
        if value is None:
            continue
        if subnet == chosen:
            axes.plot(value, row, "o", markersize=15, markerfacecolor="none", color="black", markeredgewidth=1.4)
        axes.plot(value, row, marker, color=color, markersize=7)
    labels = [f"{subnet.resolution} px x {subnet.depth}" for subnet in values]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for subnet, label in zip(values, axes.get_yticklabels()):
        label.set_fontweight("bold" if subnet == chosen else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.ticklabel_format(axis="x", useOffset=False)


@matplotlib.rc_context(STYLE)
def draw_verdict(path: Path, ends: Sequence[tuple[str, float, float]]) -> None:
    """Draws a bar per recipe, each (name, training seconds, top-1 in percent): its length is the time."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.62 * len(ends[:BARS])))
    axes = figure.subplots()
    names, seconds, top1 = zip(*ends[:BARS])
    bars = axes.barh([_beside(name) for name in names], seconds, color=[COLORS[i % 7] for i in range(len(names))])
    axes.bar_label(bars, [f"{a:.1f} % top-1 in {s:.0f} s" for s, a in zip(seconds, top1)], padding=6, fontsize=12)
    axes.invert_yaxis()
    axes.tick_params("y", labelsize=11, length=0)
    axes.set(xlabel="training time (s)", xlim=(0, 1.45 * max(seconds)))
    axes.grid(axis="y", visible=False)
    save(figure, path)
