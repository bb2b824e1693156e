"""The picture of a run's history: its starts, stops, and growths over time."""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from scaleprog.files.display import as_label
from scaleprog.reporting.figures import (
    BARS,
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    STYLE,
    VERMILION,
    WIDTH,
    ink,
    legend_shades,
    save,
    shades_of,
    some,
)
from scaleprog.reporting.timeline import Mark, Start, Timeline, queued_from, span, when

MARKS = {  # kind of mark in a timeline -> marker, color, text for the legend
    "checkpoint": ("|", BLUE, "checkpoint"), "checkpoint_failed": ("X", ORANGE, "checkpoint failed"),
    "growth": ("^", GREEN, "growth"), "choice": ("D", BLACK, "search's choice"), "signal": ("v", ORANGE, "signal"),
    "stop": ("s", BLUE, "stopped cleanly"), "killed": ("X", VERMILION, "ended abnormally"),
    "requeue": (">", BLACK, "requeued"), "finish": ("*", GREEN, "finished"),
}  # fmt: skip
STARTING, DOWN, QUEUE = "#cfe0ee", "#ececec", "#dadada"
STARTS = 250
"""The most starts that a picture shows."""


@matplotlib.rc_context(STYLE)
def draw_timelines(path: Path, timelines: Sequence[Timeline]) -> None:
    """Draws the finished steps and the marks of each run over time; below them, the networks that were trained."""
    resolutions = sorted(
        {s.network.resolution for timeline in timelines for start in timeline.starts for s in start.stretches}
    )
    shades = shades_of(resolutions)
    figure = Figure(figsize=(WIDTH, 1.0 + 3.5 * len(timelines)))
    blocks = figure.subfigures(len(timelines), 1, squeeze=False)[:, 0]
    for timeline, block in zip(timelines, blocks, strict=True):
        block.suptitle(as_label(timeline.name), fontweight="bold", fontsize=11)
        above, below = block.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        _draw_timeline(above, below, timeline, shades)
    used = {mark.kind for timeline in timelines for mark in timeline.marks}
    legend: list[Any] = [
        Line2D([], [], linestyle="", marker=marker, color=color, markersize=8, label=words)
        for kind, (marker, color, words) in MARKS.items()
        if kind in used
    ]
    if any(timeline.lost for timeline in timelines):
        legend.append(Line2D([], [], linestyle=":", color=VERMILION, linewidth=2, label="lost, retrained"))
    legend += [Patch(color=shade, label=f"{resolution} px") for resolution, shade in legend_shades(shades)]
    legend.append(Patch(facecolor="#999999", hatch="////", label="supernet"))
    legend.append(Patch(color=STARTING, label="start-up"))
    figure.legend(handles=legend, loc="outside lower center", ncols=5, handlelength=1.4)
    save(figure, path)


UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
"""Seconds in a unit, and its name, longest first."""


def _draw_timeline(above: Axes, below: Axes, timeline: Timeline, shades: Mapping[int, Any]) -> None:
    """Draws one run: the finished steps and marks `above`, and the networks that were trained `below`."""
    size, unit = next(unit for unit in UNITS if timeline.wall >= 2 * unit[0] or unit[0] == 1)
    wall = max(timeline.wall, 1e-9) / size
    shown = timeline.starts[-STARTS:]
    for start in shown:
        below.barh(0, (start.ready - start.began) / size, left=start.began / size, height=1, color=STARTING)
        _draw_networks(below, start, BARS // len(shown), size, wall, shades)
        _draw_steps(above, below, start, size, wall)
    for before, after in pairwise(shown):
        requeued = queued_from(before, after) or after.began
        for begin, end, what, color in (
            (before.end, requeued, "down", DOWN),
            (requeued, after.began, "queued", QUEUE),
        ):
            for axes in (above, below):
                axes.axvspan(begin / size, end / size, color=color, linewidth=0, zorder=0)
            if (end - begin) / size / wall > 0.02:
                style: dict[str, Any] = {
                    "fontsize": 8,
                    "color": "#666666",
                    "rotation": 90,
                    "ha": "center",
                    "va": "bottom",
                }
                words, transform = f"{what} {span(end - begin)}", above.get_xaxis_transform()
                above.text((begin + end) / 2 / size, 0.03, words, transform=transform, **style)
    levels = _draw_marks(above, timeline.marks, size, wall)
    above.set_title(_summary(timeline), loc="left", fontsize=9, color="#555555", pad=16 + 12 * levels)
    above.set(ylabel="optimizer steps", xlim=(0, wall), ylim=(0, None))
    above.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    below.set(xlabel=f"time since the first start ({unit})", ylim=(-0.5, 0.5), yticks=[])
    below.spines["left"].set_visible(False)
    below.grid(visible=False)


def _draw_networks(axes: Axes, start: Start, most: int, size: float, wall: float, shades: Mapping[int, Any]) -> None:
    """Draws a bar for each of the last `most` networks of a start."""
    for stretch in start.stretches[-most:]:
        left, width = stretch.begin / size, (stretch.end - stretch.begin) / size
        shade, hatch = shades[stretch.network.resolution], "////" if stretch.phase == "supernet" else None
        axes.barh(0, width, left=left, height=1, color=shade, edgecolor="white", linewidth=0.5, hatch=hatch)
        text = f"{stretch.network.resolution}x{stretch.network.depth}"
        if width / wall > 0.012 * len(text):
            box = {"facecolor": shade, "edgecolor": "none", "pad": 1}
            axes.text(left + width / 2, 0, text, color=ink(shade), ha="center", va="center", fontsize=8, bbox=box)


def _draw_steps(above: Axes, below: Axes, start: Start, size: float, wall: float) -> None:
    """Draws the steps of a start that were kept and, dotted, those that a later start had to train again."""
    points = [(seconds / size, step) for seconds, step in start.points]
    parting = min(start.kept, points[-1][1])
    at = when(points, parting)
    kept = [point for point in points if point[1] <= parting]
    lost = [(at, parting), *(point for point in points if point[1] > parting)]
    above.plot(*np.reshape(some(kept), (-1, 2)).T, color=BLUE, linewidth=1.8)
    if len(lost) == 1:
        return
    above.plot(*np.reshape(some(lost), (-1, 2)).T, ":", color=VERMILION, linewidth=2)
    (end, last), words = lost[-1], f"{lost[-1][1] - parting} steps lost"
    below.barh(0, end - at, left=at, height=1, color=VERMILION, linewidth=0, hatch="xxxx")
    offset, side = ((-4, 2), "right") if end > 0.15 * wall else ((4, 2), "left")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    style: dict[str, Any] = {"textcoords": "offset points", "ha": side, "fontsize": 8, "color": VERMILION, "bbox": box}
    above.annotate(words, (end, last), offset, **style)


def _summary(timeline: Timeline) -> str:
    """When the run began, how long it took, how many starts it had, and what share of the time went where."""
    starts = f"{len(timeline.starts)} starts" if len(timeline.starts) > 1 else "one start"
    starts += f" (drawn: the last {STARTS})" if len(timeline.starts) > STARTS else ""
    again = [f"{timeline.lost} steps retrained"] if timeline.lost else []
    begun = time.strftime("began %d %b %Y %H:%M:%S", time.localtime(timeline.epoch))
    wall = max(timeline.wall, 1e-9)
    shares = {what: (timeline.costs[what] or 0.0) / wall for what in ("training", "start-up", "queue", "down")}
    spent = ", ".join(f"{share:.0%} {what}" for what, share in shares.items() if share >= 0.005)
    return f"{' · '.join([begun, span(timeline.wall), starts, *again])}\n{spent}"


def _draw_marks(axes: Axes, marks: Sequence[Mark], size: float, wall: float) -> int:
    """Draws marks that have a step on the curve, and the others in a row above it, with as much of their text as three
    lines can hold. Returns the number of lines used."""
    transform, ends = axes.get_xaxis_transform(), [-1.0] * 3
    for mark in some(marks):
        marker, color, _ = MARKS[mark.kind]
        x = mark.seconds / size
        if mark.step is not None:
            look = {"markersize": 11, "markeredgewidth": 1.4} if mark.kind == "checkpoint" else {"markersize": 6}
            axes.plot(x, mark.step, marker, color=color, zorder=4, **look)
        elif mark.kind == "requeue":  # coincides with the end of a start, so it gets another row
            axes.plot(x, 0.95, marker, color=color, markersize=5, transform=transform, zorder=5)
        else:
            top = mark.kind == "signal"  # on top: the end often follows within the width of a mark
            axes.axvline(x, color=color, linewidth=0.8, alpha=0.6, zorder=1)
            look = {"markersize": 5, "zorder": 6} if top else {"markersize": 7.5, "zorder": 5}
            axes.plot(x, 1.05, marker, color=color, markeredgewidth=0, transform=transform, clip_on=False, **look)
        width = 0.0105 * len(mark.text)
        left = min(max(x / wall - width / 2, 0.0), 1 - width)
        level = next((level for level, end in enumerate(ends) if end < left), None)
        if mark.text and level is not None:
            ends[level] = left + width + 0.01
            words = as_label(mark.text)
            axes.text(left * wall, 1.1 + 0.083 * level, words, color=color, fontsize=8, transform=transform)
    return sum(end >= 0 for end in ends)
