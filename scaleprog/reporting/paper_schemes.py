"""The paper's Tables 2 and 4 to 8, which compare schemes of training, from groups of runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scaleprog.files.display import as_markdown
from scaleprog.reporting.grouping import Group
from scaleprog.reporting.history import RunRecord
from scaleprog.reporting.paper import ORIGINAL, SIZES, TABLES, Numbers, Scheme, SchemeTable, counterpart
from scaleprog.reporting.text_tables import cell, markdown_table, spread

Rows = list[dict[str, str]]
Section = tuple[str, list[Group]]
"""Markdown, and the groups that it shows."""
ENLARGED, NEAR = 288 / 224, 0.05
"""The side of a test image over that of the training, and how far a small model's stride may move it."""
AT_GROWTH = "top-1 @growth: after the first epoch of stage 2, whatever trains then."
AT_288 = (
    "top-1 @288: at 288 px without fine-tuning, as `scaleprog evaluate RUN --resolution 288` records it; for a smaller "
    "model at about 9/7 of its size."
)


@dataclass(frozen=True)
class Setting:
    """Finished runs of different schemes and seeds. `paper`: the model and the epochs beside which they stand."""

    title: str
    paper: tuple[str, int]
    groups: Sequence[Group]

    def of(self, scheme: Scheme) -> list[Group]:
        """The groups that belong to a scheme."""
        return [group for group in self.groups if scheme.fits(group.runs[0])]


@dataclass(frozen=True)
class Costs:
    """What runs had cost at each of their evaluations, where it is known better than by their seconds.

    unit: as an axis is labeled; of: by the run's name.
    """

    unit: str
    of: Mapping[str, Sequence[float]]


# ---- settings


def group_settings(groups: Sequence[Group]) -> list[Setting]:
    """Collects the groups that train the same model equally long on the same data."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        run = group.runs[0]
        model = {**run.recipe["model"], "drop_path": None}
        key = [model, run.data, *(run.says(k) for k in ("data.shards", "train.epochs", "train.batch"))]
        found.setdefault(json.dumps(key, sort_keys=True), []).append(group)
    return [
        Setting(title_of(members[0].runs[0]), counterpart(members[0].runs[0]), members) for members in found.values()
    ]


def title_of(run: RunRecord) -> str:
    """What a run trains, and how long on which data."""
    return f"{model_of(run)}, {run.says('train.epochs'):g} epochs of {run.data}"


def model_of(run: RunRecord) -> str:
    """A model's name, and the sizes that the recipe sets."""
    sizes = [f"{key.partition('.')[2]} {run.says(key)}" for key in ("model.resolution", *SIZES) if run.says(key)]
    return f"{run.says('model.name')} ({', '.join(sizes)})" if sizes else str(run.says("model.name"))


# ---- Tables 2 and 4 to 8


def scheme_section(number: int, settings: Sequence[Setting], costs: Costs | None) -> Section:
    """A table that compares schemes, once for each setting with runs for it, in an ablation beside those of Table 2."""
    table, shown = TABLES[number], list[Group]()
    parts = [f"## Table {number}: {table.title}"]
    for setting in settings:
        members = [group for scheme in table.rows for group in setting.of(scheme)]
        if not members or (number != 2 and all(map(_in_table_2, members))):
            continue
        shown += members
        title = f"### {as_markdown(setting.title)}\n\nBeside the paper's {setting.paper[0]}, {setting.paper[1]} epochs."
        parts += [title, markdown_table(_rows(table, setting, costs))]
    if not shown:
        parts.append("No finished run belongs to this table.")
    parts += [AT_GROWTH] if table.at_growth else []
    parts += [AT_288] if table.at_288 else []
    return "\n\n".join(parts), shown


def _in_table_2(group: Group) -> bool:
    return any(scheme.fits(group.runs[0]) for scheme in TABLES[2].rows)


def _rows(table: SchemeTable, setting: Setting, costs: Costs | None) -> Rows:
    """A line for each group of each scheme; one without runs is shown where the paper has numbers for it."""
    numbers = table.numbers.get(setting.paper, {})
    schemes = {scheme.name: scheme for scheme in table.rows}
    speedup = _speedup(setting, costs)
    rows = []
    for scheme in table.rows:
        paper, mine = scheme.of(numbers), setting.of(scheme)
        rival = schemes.get(scheme.against or "")
        theirs = setting.of(rival) if rival else []
        gap = _difference(paper.top1, rival.of(numbers).top1 if rival else None)
        for group in mine or ([Group(scheme.name, ())] if paper != Numbers() else []):
            deltas = _paired(group, theirs[0]) if theirs else []
            row = {
                "scheme": f"{scheme.name} ({group.name})" if len(mine) > 1 else scheme.name,
                "seeds": str(len(group.values("top1_best"))),
                "top-1, paper": cell(paper.top1, ".2f"),
                "top-1": spread(group.values("top1_best"), ".2f"),
                "Δ, paper": cell(gap, "+.2f"),
                "Δ": _with_error(deltas),
                "order": _order(gap, deltas),
                "speedup, paper": f"{paper.speedup:+.1f}%" if paper.speedup is not None else "–",
                "speedup": cell(speedup(group), "+.1%"),
            }
            if table.at_growth:
                found = [run.top1_at_growth for run in group.runs if run.finished]
                row |= beside("top-1 @growth", paper.at_growth, found)
            if table.at_288:
                row |= beside("top-1 @288", paper.at_288, [_enlarged(run) for run in group.runs if run.finished])
            rows.append(row)
    return rows


def beside(column: str, paper: float | None, mine: Sequence[float | None]) -> dict[str, str]:
    """Two cells: the paper's accuracy and ours, of the runs that have one."""
    known = [value for value in mine if value is not None]
    return {f"{column}, paper": cell(paper, ".2f"), column: spread(known, ".2f")}


def _speedup(setting: Setting, costs: Costs | None) -> Callable[[Group], float | None]:
    """The speedup of a group over the setting's Original; None for Original itself and without one."""
    baseline = next(iter(setting.of(ORIGINAL)), None)
    on_cpu = all(run.on_cpu for group in setting.groups for run in group.runs)
    key = "train_cpu_seconds" if on_cpu else "train_seconds"

    def spent(group: Group) -> float:
        runs = [run for run in group.runs if run.finished]
        return mean(costs.of[run.name][-1] if costs else run.results[key] for run in runs) if runs else 0.0

    def of(group: Group) -> float | None:
        if baseline is None or group is baseline or not spent(group):
            return None
        return spent(baseline) / spent(group) - 1

    return of


def _enlarged(run: RunRecord) -> float | None:
    """Top-1 at 9/7 of the full size, if it was measured."""
    full = run.results["stages"][-1]["resolution"] if run.results["stages"] else 1
    near = {abs(side / full - ENLARGED): top1 for side, top1 in run.top1_at.items()}
    return near[min(near)] if near and min(near) < NEAR else None


def _paired(mine: Group, theirs: Group) -> list[float]:
    """The differences in top-1 between the runs of two groups with the same seed, in points."""
    other = {run.recipe["seed"]: run.results["top1_best"] for run in theirs.runs if run.finished}
    own = {run.recipe["seed"]: run.results["top1_best"] for run in mine.runs if run.finished}
    return [own[seed] - other[seed] for seed in own if seed in other]


def _error(deltas: Sequence[float]) -> float:
    """The standard error of the mean of at least two values."""
    return stdev(deltas) / len(deltas) ** 0.5


def _with_error(deltas: Sequence[float]) -> str:
    shown = cell(mean(deltas) if deltas else None, "+.2f")
    return f"{shown} ± {_error(deltas):.2f}" if len(deltas) > 1 else shown


def _difference(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else round(mine - theirs, 2)


def _order(paper: float | None, deltas: Sequence[float]) -> str:
    """Whether the paper's order of two rows shows in ours."""
    if paper is None or len(deltas) < 2:
        return "–"
    if abs(mean(deltas)) <= 2 * _error(deltas):
        return "too close to tell"
    return "as in the paper" if paper * mean(deltas) > 0 else "unlike the paper"
