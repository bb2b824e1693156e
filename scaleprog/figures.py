"""The pictures of a report, drawn without a display: accuracy over time, growth schedules, searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from scaleprog.growth.search import Decision
from scaleprog.growth.space import Subnet

# Okabe and Ito's colours, which stay apart under every common kind of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
WIDTH, DPI = 8.4, 160  # inches; readable where a README shows 800 to 1000 pixels
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "legend.frameon": False, "hatch.linewidth": 0.7,
    "hatch.color": "white", "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One run's top-1 (percent) against training time (seconds); `begins`: when its stages after the first begin."""

    recipe: str
    seconds: tuple[float, ...]
    top1: tuple[float, ...]
    begins: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Segment:
    """A phase as far as it was trained: optimizer steps `start` to `stop`, its largest network, and the seconds of
    training before it."""

    stage: int
    phase: str
    start: int
    stop: int
    network: Subnet
    seconds: float


@dataclass(frozen=True)
class Search:
    """One stage's search: every candidate's loss after each of `steps`, and the decision once it is taken."""

    stage: int
    steps: tuple[int, ...]
    losses: Mapping[Subnet, tuple[float, ...]]
    decision: Decision | None


@matplotlib.rc_context(STYLE)
def draw_accuracy(path: Path, curves: Sequence[Curve]) -> None:
    """The paper's Fig. 4: one line per run, one colour per recipe; beside it the ends of finished runs, magnified."""
    ends = any(curve.finished and curve.top1 for curve in curves)
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.subplots(1, 2 if ends else 1, squeeze=False, width_ratios=(2, 1) if ends else (1,))[0]
    recipes = list(dict.fromkeys(curve.recipe for curve in curves))
    for i, recipe in enumerate(recipes):
        members = [curve for curve in curves if curve.recipe == recipe]
        colour, marker, line = COLOURS[i % 7], MARKERS[i % 7], LINES[i // 7 % len(LINES)]
        for curve in members:
            axes[0].plot(curve.seconds, curve.top1, line, color=colour, linewidth=1.2 if len(members) > 1 else 1.8)
            if curve.top1:
                heights = np.interp(curve.begins, curve.seconds, curve.top1)
                axes[0].plot(curve.begins, heights, "|", color=colour, markersize=11, markeredgewidth=1.6)
                if not curve.finished:
                    axes[0].plot(
                        curve.seconds[-1], curve.top1[-1], marker, color=colour, markerfacecolor="white", zorder=4
                    )
        _ends(axes, [(c.seconds[-1], c.top1[-1]) for c in members if c.finished and c.top1], colour, marker)
        unfinished = sum(not curve.finished for curve in members)
        notes = [f"{len(members)} seeds"] * (len(members) > 1) + [
            f"{unfinished} unfinished" if len(members) > 1 else "unfinished"
        ] * (unfinished > 0)
        label = f"{recipe} ({', '.join(notes)})" if notes else recipe
        axes[0].plot([], [], line + marker, color=colour, markeredgecolor="white", markersize=8, label=label)
    axes[0].plot([], [], "|", color="#555555", markersize=11, markeredgewidth=1.6, label="a stage begins")
    axes[0].set(xlabel="training time (s)", ylabel="top-1 (%), better of online and EMA", xlim=(0, None))
    if ends:
        axes[1].set(title="the ends, magnified", xlabel="training time (s)")
        axes[1].margins(0.18)
        axes[1].xaxis.set_major_locator(MaxNLocator(4))
    figure.legend(loc="outside lower center", ncols=min(len(recipes) + 1, 4))
    figure.savefig(path, dpi=DPI)


def _ends(axes: Sequence[Axes], ends: Sequence[tuple[float, float]], colour: str, marker: str) -> None:
    """Marks the mean of a recipe's ends in all axes; in the magnifying one each end and the deviations too."""
    if not ends:
        return
    seconds, top1 = zip(*ends)
    for axis in axes:
        axis.plot(mean(seconds), mean(top1), marker, color=colour, markersize=8, markeredgecolor="white", zorder=4)
    if len(ends) > 1:
        axes[1].plot(seconds, top1, ".", color=colour, markersize=5, alpha=0.6)
        axes[1].errorbar(
            mean(seconds), mean(top1), xerr=stdev(seconds), yerr=stdev(top1), color=colour, linewidth=1.1, capsize=2
        )


@matplotlib.rc_context(STYLE)
def draw_schedules(path: Path, timelines: Sequence[tuple[str, Sequence[Segment]]]) -> None:
    """Which network trained when: bars as high as it is deep and as dark as its images are large, supernets hatched."""
    every = [segment for _, segments in timelines for segment in segments]
    deepest = max((s.network.depth for s in every), default=1)
    resolutions = sorted({s.network.resolution for s in every})
    last = max((s.stop for s in every), default=1)
    shades = dict(zip(resolutions, matplotlib.colormaps["cividis_r"](np.linspace(0.1, 0.9, len(resolutions)))))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.72 * len(timelines)))
    axes = figure.subplots()
    for row, (_, segments) in enumerate(timelines):
        for segment in segments:
            size, height = segment.stop - segment.start, 0.86 * segment.network.depth / deepest
            shade = shades[segment.network.resolution]
            axes.bar(
                segment.start, height, size, bottom=-row, align="edge", color=shade, edgecolor="white", linewidth=0.8,
                hatch="////" if segment.phase == "supernet" else None,
            )  # fmt: skip
            ink = "white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.52 else "black"
            axes.text(
                segment.start + size / 2, height / 2 - row, _segment_text(segment, size / last), color=ink,
                ha="center", va="center", fontsize=8, linespacing=0.95,
                bbox={"facecolor": shade, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    axes.set(xlabel="optimizer steps", xlim=(0, last), ylim=(0.05 - len(timelines) + 0.9, 1))
    axes.set_title("height: depth in layers; colour: resolution", loc="left", fontsize=9, color="#555555")
    axes.set_yticks([0.4 - row for row in range(len(timelines))], [label for label, _ in timelines])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    legend = [Patch(color=shade, label=f"{resolution} px") for resolution, shade in shades.items()]
    legend.append(Patch(facecolor="#999999", hatch="////", label="supernet"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 7), handlelength=1.4)
    figure.savefig(path, dpi=DPI)


def _segment_text(segment: Segment, share: float) -> str:
    """What fits into a bar that takes this share of the axis; nothing into a narrow or a short searched one."""
    size = f"{segment.network.resolution} px x {segment.network.depth}"
    if segment.phase == "supernet":
        return f"up to {size}" if share > 0.25 else ""
    return size if share > 0.11 else size.replace(" x", "\nx") if share > 0.055 else ""


@matplotlib.rc_context(STYLE)
def draw_searches(path: Path, searches: Mapping[str, Sequence[Search]]) -> None:
    """Per run one column for each searched stage: the candidates' losses above, their scores below, the chosen one
    ringed."""
    columns = max(len(stages) for stages in searches.values())
    figure = Figure(figsize=(WIDTH, 4.9 * len(searches)))
    blocks = figure.subfigures(len(searches), 1, squeeze=False)[:, 0]
    for (run, stages), block in zip(searches.items(), blocks, strict=True):
        block.suptitle(run, fontweight="bold", fontsize=11)
        _draw_run(block, stages, max(columns, 2))
    figure.savefig(path, dpi=DPI)


def _draw_run(block: SubFigure, stages: Sequence[Search], columns: int) -> None:
    grid = block.subplots(2, columns, squeeze=False, height_ratios=(1, 1.15))
    candidates = {subnet for search in stages for subnet in search.losses}
    colours = dict(zip(sorted({s.resolution for s in candidates}), cycle(COLOURS)))
    markers = dict(zip(sorted({s.depth for s in candidates}), cycle(MARKERS)))
    for search, (above, below) in zip(stages, grid.T):
        decision = search.decision
        outcome = f"alpha = {decision.alpha:.3g}" if decision else "not decided yet"
        above.set_title(f"stage {search.stage}: {outcome}")
        for subnet, losses in search.losses.items():
            chosen = decision is not None and subnet == decision.chosen
            above.plot(
                search.steps, losses, color=colours[subnet.resolution], marker=markers[subnet.depth], markersize=5,
                linewidth=2.6 if chosen else 1.0, zorder=3 if chosen else 2, markeredgecolor="white",
            )  # fmt: skip
        above.set_xlabel("step")
        above.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if decision is None:
            below.set_axis_off()
            continue
        for row, (subnet, score) in enumerate(zip(decision.candidates, decision.scores)):
            colour, marker = colours.get(subnet.resolution, "black"), markers.get(subnet.depth, "o")
            if subnet == decision.chosen:
                below.plot(score, row, "o", markersize=15, markerfacecolor="none", color="black", markeredgewidth=1.4)
            below.plot(score, row, marker, color=colour, markersize=7)
        labels = [f"{s.resolution} px x {s.depth}" for s in decision.candidates]
        below.set_yticks(range(len(labels)), labels, fontsize=8)
        below.get_yticklabels()[decision.candidates.index(decision.chosen)].set_fontweight("bold")
        below.set_ylim(len(labels) - 0.4, -0.6)
        below.margins(x=0.15)
        below.xaxis.set_major_locator(MaxNLocator(3))
        below.set_xlabel("score (lowest is chosen)")
    for empty in grid[:, len(stages) :].flat:
        empty.set_axis_off()
    grid[0, 0].set_ylabel("loss of the candidates")


def stage_begins(segments: Sequence[Segment]) -> tuple[float, ...]:
    """Training seconds at which the stages after the first begin."""
    return tuple(after.seconds for before, after in pairwise(segments) if after.stage != before.stage)
