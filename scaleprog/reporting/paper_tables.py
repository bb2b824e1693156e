"""Fills the paper's tables and figures from run directories: its own numbers beside ours, seeds, and spread."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import as_label, as_markdown, as_text
from scaleprog.reporting.figures import Curve, draw_accuracy
from scaleprog.reporting.grouping import Group, cpu_curve, curve, read_groups
from scaleprog.reporting.history import RunRecord, read_run
from scaleprog.reporting.paper import (
    CO2_PER_KWH,
    EMISSIONS,
    FIGURE_4,
    ORIGINAL,
    POUND,
    SOURCE,
    TRANSFER,
)
from scaleprog.reporting.paper_schemes import (
    Costs,
    Rows,
    Section,
    Setting,
    beside,
    group_settings,
    model_of,
    scheme_section,
    title_of,
)
from scaleprog.reporting.text_tables import cell, markdown_table, spread
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.reading import reason

TABLE_NUMBERS, FIGURE_NUMBERS = range(1, 9), (1, 4)
ABOUT = (
    f"paper: {SOURCE}. top-1: in percent, of the better of online and EMA weights. ±: the sample standard deviation "
    "over the seeds; for Δ, the standard error of the mean difference between runs of the same seed. order: whether Δ "
    "has the sign of the paper's; a Δ within two standard errors is too close to tell. Speedup: the mean {spent} of "
    "Original, searches included, / that of the row - 1."
)
SECONDS = "seconds of training, or of its CPU time for runs on the CPU,"


@dataclass(frozen=True)
class Energy:
    """How energy becomes emissions: kilograms of CO2e per kWh, and the assumed power of a rank in watts, if any."""

    co2: float = CO2_PER_KWH
    watts: float | None = None


def write_paper(
    runs: Sequence[Path],
    out: Path,
    tables: Iterable[int],
    figures: Iterable[int],
    energy: Energy,
    costs: Costs | None = None,
) -> str:
    """Writes some of the paper's tables and figures into `out`, as paper.md with its pictures.

    Args:
        runs: run directories.
        out: folder, created if missing.
        tables: numbers of tables, 1 to 8.
        figures: numbers of figures, 1 or 4.
        energy: what Table 1 assumes.
        costs: what the speedups and figures count; without it seconds of training, of the CPU for runs on the CPU.

    Returns:
        The path of paper.md, and a sentence on each run that is in no table.

    Raises:
        CheckpointError: `runs` is empty, or a directory holds no run.
        ScaleprogError: there is no such table or figure, or the files cannot be written.
    """
    tables, figures = _known("table", tables, TABLE_NUMBERS), _known("figure", figures, FIGURE_NUMBERS)
    told, groups = read_groups(runs)
    finished = [group for group in groups if group.values("top1_best")]
    settings = group_settings([group for group in finished if group.runs[0].says("init.from") is None])
    sections: list[Section] = []
    for number in tables:
        if number == 1:
            sections.append(_emissions(finished, energy))
        elif number == 3:
            sections.append(_transfer(finished))
        else:
            sections.append(scheme_section(number, settings, costs))
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections += [_figure(number, settings, out, costs) for number in figures]
        shown = {run.name for _, members in sections for group in members for run in group.runs if run.finished}
        left_out = [f"{run.name}: {_why_left_out(run)}" for run in told if run.name not in shown]
        about = ABOUT.format(spent=costs.unit if costs else SECONDS)
        parts = [f"# The paper's tables\n\n{about}", *(text for text, _ in sections)]
        if left_out:
            parts.append("\n".join(["## Runs in no table", "", *(f"- {as_markdown(line)}" for line in left_out)]))
        write_whole(out / "paper.md", "\n\n".join(parts) + "\n")
    except OSError as error:
        raise ScaleprogError(f"{error.filename or out}: cannot write the tables: {reason(error)}") from error
    return "\n".join(map(as_text, [out / "paper.md", *left_out]))


def _known(what: str, numbers: Iterable[int], known: Sequence[int]) -> list[int]:
    """The numbers in order, each once. Raises ScaleprogError for one that is not known."""
    chosen = sorted(set(numbers))
    if wrong := [number for number in chosen if number not in known]:
        raise ScaleprogError(f"--{what}: there is no {what} {wrong[0]}; choose from {', '.join(map(str, known))}")
    return chosen


def _why_left_out(run: RunRecord) -> str:
    if not run.finished:
        return "it has not finished"
    if run.says("model.classes") in TRANSFER and isinstance(run.says("init.from"), str) and _pretrained(run) is None:
        return f"{as_text(run.says('init.from'))}, whose weights it began with, is not a run that can be read"
    return f"{run.schedule}; it belongs to no row, or there is nothing to compare it with"


# ---- Tables 1 and 3


def _emissions(groups: list[Group], energy: Energy) -> Section:
    """Table 1: the energy of a run and its emissions, below those that the paper cites."""
    rows: Rows = [
        {
            "run": name,
            "energy from": "the paper",
            "kWh": "–",
            "CO2e kg": f"{pounds * POUND:.3g}",
            "CO2e lbs": f"{pounds}",
            "top-1": cell(top1, ".2f"),
        }
        for name, (pounds, top1) in EMISSIONS.items()
    ]
    for group in groups:
        kwh, source = _kwh([run for run in group.runs if run.finished], energy.watts)
        kilograms = None if kwh is None else kwh * energy.co2
        rows.append(
            {
                "run": f"{group.name}, {group.runs[0].schedule}",
                "energy from": source,
                "kWh": cell(kwh, ".3g"),
                "CO2e kg": cell(kilograms, ".3g"),
                "CO2e lbs": cell(None if kilograms is None else kilograms / POUND, ".3g"),
                "top-1": spread(group.values("top1_best"), ".2f"),
            }
        )
    about = (
        "measured: by the counters of GPUs and CPUs, if zeus read them in every start. modeled: not measured, but the "
        "hours of all ranks, start-up and evaluations included, times an assumed power of a rank (`--power`). Means "
        f"over the seeds; {energy.co2:g} kg of CO2e per kWh."
    )
    return f"## Table 1: energy and emissions\n\n{markdown_table(rows)}\n\n{about}", groups


def _kwh(runs: Sequence[RunRecord], watts: float | None) -> tuple[float | None, str]:
    """The mean energy of runs in kWh, and where the figure comes from; None if it is neither measured nor assumed."""
    own = ", without its parent's" if any(run.says("parent") for run in runs) else ""
    measured = [run.joules for run in runs if run.joules is not None]
    if len(measured) == len(runs):
        only = ", GPUs only" if any(run.without_cpus for run in runs) else ""
        return mean(measured) / 3.6e6, f"measured{only}{own}"
    hours = mean(run.rank_hours for run in runs)
    if watts is None:
        return None, f"not measured: {hours:.3g} rank-hours{own}"
    return hours * watts / 1000, f"modeled: {hours:.3g} rank-hours x {watts:g} W{own}"


def _transfer(groups: Sequence[Group]) -> Section:
    """Table 3: fine-tuned runs, by the scheme that trained the weights they started from."""
    found: dict[tuple[str, int, str, str], list[Group]] = {}
    for group in groups:
        run, source = group.runs[0], _pretrained(group.runs[0])
        for scheme in FIGURE_4:
            if source is not None and run.says("model.classes") in TRANSFER and scheme.fits(source):
                twins = json.dumps([{**json.loads(run.twins), "init": None}, source.twins])
                found.setdefault((title_of(run), run.says("model.classes"), scheme.name, twins), []).append(group)
    rows, schemes = Rows(), {scheme.name: scheme for scheme in FIGURE_4}
    alike = Counter(key[:3] for key in found)
    for (title, classes, name, _), members in sorted(found.items()):
        data, numbers = TRANSFER[classes]
        top1 = [value for group in members for value in group.values("top1_best")]
        label = f"from {name} ({members[0].name})" if alike[title, classes, name] > 1 else f"from {name}"
        row = {"run": f"{title}, beside {data}", "scheme": label, "seeds": str(len(top1))}
        rows.append(row | beside("top-1", schemes[name].of(numbers).top1, top1))
    text = markdown_table(rows) if rows else "No finished run started from another run's weights (`init.from`)."
    return f"## Table 3: transfer\n\n{text}", [group for members in found.values() for group in members]


def _pretrained(run: RunRecord) -> RunRecord | None:
    """The run whose weights a run started from; None if it did not, or if that run is not there."""
    source = run.says("init.from")
    if not isinstance(source, str):
        return None
    for folder in (directory / source for directory in run.directories):
        with suppress(CheckpointError, OSError):
            if folder.is_dir():
                return read_run(folder, source)
    return None


# ---- figures


def _figure(number: int, settings: Sequence[Setting], out: Path, costs: Costs | None) -> Section:
    """Draws a figure: 1, models of several sizes; or 4, schemes in each setting. Raises OSError."""
    pictures: dict[tuple[str, int], list[tuple[str, Group]]] = {}
    for place, setting in enumerate(settings):
        for scheme in (ORIGINAL,) if number == 1 else FIGURE_4:
            for group in setting.of(scheme):
                key = (group.runs[0].data, 0) if number == 1 else (setting.title, place)
                label = as_label(model_of(group.runs[0]) if number == 1 else scheme.name)
                pictures.setdefault(key, []).append((label, group))
    parts = [f"## Figure {number}: accuracy during training"]
    for place, ((title, _), groups) in enumerate(pictures.items(), 1):
        alike = Counter(label for label, _ in groups)
        named = [(f"{group.name}: {label}" if alike[label] > 1 else label, group) for label, group in groups]
        members = [(label, run) for label, group in named for run in group.runs if run.finished]
        name = f"paper_figure_{number}_{place}.png"
        if costs:
            spent, drawn = costs.unit, [_cost_curve(label, run, costs) for label, run in members]
        elif all(run.on_cpu for _, run in members):
            spent, drawn = "CPU time of training (s)", [cpu_curve(label, run) for label, run in members]
        else:
            spent, drawn = "training time (s)", [curve(label, run) for label, run in members]
        draw_accuracy(out / name, drawn, spent)
        parts.append(f"### {as_markdown(title)}\n\n![Top-1 over {spent}]({name})")
    shown = [group for groups in pictures.values() for _, group in groups]
    return "\n\n".join(parts if pictures else [*parts, "No finished run belongs to this figure."]), shown


def _cost_curve(label: str, run: RunRecord, costs: Costs) -> Curve:
    """A run's accuracy over its cost."""
    top1 = tuple(Accuracies(row).best for row in run.evaluations)
    return Curve(label, tuple(costs.of[run.name]), top1, (), run.finished)
