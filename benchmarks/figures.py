"""Pictures of many runs: clouds and frontiers of accuracy over cost."""

from collections.abc import Mapping, Sequence
from math import inf, nan
from pathlib import Path
from typing import Protocol

import matplotlib
from matplotlib.figure import Figure

from scaleprog.files.display import as_label
from scaleprog.reporting.figures import COLORS, COST, LINES, MARKERS, STYLE, WIDTH, save


class Gap(Protocol):
    """A mean difference, and how far it may be off; infinite if nobody knows."""

    @property
    def mean(self) -> float: ...

    @property
    def error(self) -> float: ...


@matplotlib.rc_context(STYLE)
def draw_cloud(path: Path, points: Sequence[tuple[str, float, float]]) -> None:
    """Draws top-1 (percent) against cost of many runs, each (group, cost, top-1). A line joins the runs that no other
    run beats."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    for i, group in enumerate(dict.fromkeys(group for group, _, _ in points)):
        mine = [(cost, top1) for name, cost, top1 in points if name == group]
        axes.plot(
            *zip(*mine),
            MARKERS[i // 7 % len(MARKERS)],
            color=COLORS[i % 7],
            alpha=0.75,
            markersize=6,
            markeredgecolor="white",
            label=f"{as_label(group)} ({len(mine)})",
        )
    best = [p[1:] for p in points if not any(o[1] <= p[1] and o[2] >= p[2] and o[1:] != p[1:] for o in points)]
    axes.plot(*zip(*sorted(best)), color="#999999", linewidth=1, zorder=1)
    axes.set(xlabel=COST, ylabel="top-1 (%), better of online and EMA")
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_frontier(path: Path, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws top-1 (percent) against cost on a logarithmic axis. `points`: method -> (cost, top-1) of each run."""
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    for color, marker, (name, runs) in zip(COLORS, MARKERS, points.items()):
        costs, accuracies = zip(*sorted(runs))
        axes.plot(
            costs,
            accuracies,
            marker,
            color=color,
            alpha=0.6,
            markersize=5,
            markeredgecolor="white",
            label=as_label(name),
        )
    axes.set(xscale="log", xlabel=COST, ylabel="top-1 (%), better of online and EMA")
    axes.xaxis.set_major_formatter("{x:,.0f}")  # not as a power of ten, which would need parsed math
    axes.legend(loc="lower right")
    save(figure, path)


@matplotlib.rc_context(STYLE)
def draw_rivals(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, Gap]]]]) -> None:
    """Draws, in a panel per recipe, each method's distance to Original (points of top-1) over the part of Original's
    cost that it spends, with intervals."""
    methods = list(dict.fromkeys(method for curves in panels.values() for method in curves))
    figure = Figure(figsize=(WIDTH, 3.9 + 0.2 * len(methods) / 3))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (recipe, curves) in zip(grid, panels.items(), strict=True):
        axes.axhline(0, color="#999999", linewidth=1)
        for method, points in curves.items():
            i = methods.index(method)
            axes.errorbar(
                [100 * cost for cost, _ in points],
                [gap.mean for _, gap in points],
                [gap.error if gap.error < inf else nan for _, gap in points],
                fmt=MARKERS[i % len(MARKERS)] + LINES[i // len(MARKERS) % len(LINES)],
                color=COLORS[i % len(COLORS)],
                capsize=3,
                label=as_label(method),
            )
        axes.set(title=recipe, xlabel="cost (% of Original's, by GMACs)")
    grid[0].set_ylabel("top-1 (points, Original = 0)")
    labels = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=3)
    save(figure, path)
