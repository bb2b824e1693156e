"""What a run has learned: evaluate · export · replay · report."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scaleprog.cli.arguments import MOST_HERE, RunPath
from scaleprog.errors import INTERRUPTED_CODE, Preempted, ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.reporting.text_tables import cell, plain_table

if TYPE_CHECKING:
    from scaleprog.training.evaluate_run import Evaluation, Request

MANY = 5
"""With so few classes, the label always has one of the five highest logits."""


def evaluate(
    run: RunPath,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. data.workers=8 augment.eval_crop=0.95")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Folder of other shards, a path or URL; default: the run's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the shards, shown as evaluation shows images.")] = "val",
    resolution: Annotated[int | None, typer.Option(help="Pixels; default: the model's full size.")] = None,
    weights: Annotated[
        Literal["best", "online", "ema"], typer.Option(help="best: those with the higher top-1.")
    ] = "best",
    per_class: Annotated[bool, typer.Option("--per-class", help="Also the accuracy in each class.")] = False,
    nproc: Annotated[int, typer.Option(min=1, max=MOST_HERE, help="Ranks on this machine.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures top-1, top-5, and the loss of a run's newest checkpoint on the validation split."""
    from scaleprog.training.evaluate_run import Request

    found = measured(run, Request(resolution, weights, split, data, tuple(overrides or ())), nproc)
    if as_json:
        values = {"run": str(run), **asdict(found)}
        print(json.dumps({k: v for k, v in values.items() if per_class or k != "classes"}, indent=1))
        return
    if per_class:
        rows = [
            {"class": each.name, "images": str(each.images), "top-1": cell(each.top1, ".2f")} for each in found.classes
        ]
        print(plain_table(rows, list(rows[0])))
    top5 = f"top-5 {found.top5:.2f} %, " if len(found.classes) > MANY else ""
    print(
        f"{found.images} images of {as_text(found.split)} in {as_text(found.data)}, {found.resolution} px, step "
        f"{found.step}: {top5}loss {cell(found.loss, '.4f')}"
    )
    print(f"{as_text(run)}: top-1 {found.top1:.2f} % ({found.weights} weights)")


def measured(run: Path, request: "Request", nproc: int) -> "Evaluation":
    """The evaluation of a run, by `nproc` ranks."""
    from scaleprog.launchers.local import check_devices, launch
    from scaleprog.training.evaluate_run import Evaluation, evaluate_rank, evaluate_run

    if nproc == 1:
        return evaluate_run(run, request)
    check_devices(nproc)
    with TemporaryDirectory(prefix="scaleprog-") as folder:
        out = Path(folder) / "evaluation.json"
        try:
            launch(nproc, evaluate_rank, run, request, out)
        except Preempted:  # there is nothing to resume
            raise typer.Exit(INTERRUPTED_CODE) from None
        return Evaluation.of(json.loads(out.read_text()))


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file, or a folder with --format hf.")],
    weights: Annotated[
        Literal["best", "online", "ema"], typer.Option(help="best: the better ones in the last evaluation.")
    ] = "best",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the numbers in the file.")
    ] = "float32",
    form: Annotated[
        Literal["safetensors", "hf"] | None,
        typer.Option(
            "--format",
            help="safetensors: a file; hf: a Hugging Face folder with a model card. Default: safetensors if OUT ends "
            "in .safetensors, else hf.",
        ),
    ] = None,
) -> None:
    """Writes a run's weights for plain timm, with the mean, std and crop of its images."""
    from scaleprog.api import export

    print(as_text(export(run, out, weights, dtype, form), lines=True))


def replay(
    run: RunPath,
    step: Annotated[int, typer.Argument(min=1, metavar="STEP", help="Number of the step, as in metrics.jsonl.")],
    nproc: Annotated[
        int | None, typer.Option(min=1, max=MOST_HERE, help="Ranks; default: as many as the run had at this step.")
    ] = None,
) -> None:
    """Computes one step of a run again, and says where numbers stopped being finite."""
    from scaleprog.launchers.local import launch
    from scaleprog.training.replay import copied, replay_rank, result, summary

    with copied(run, step) as (recipe, copy, ranks):
        launch(nproc or ranks, replay_rank, recipe, copy)
    print(as_text(summary(result(run, step)), lines=True))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, or folders of some.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md (or paper.md) and its pictures.")],
    table: Annotated[str, typer.Option(help="Instead, fill these tables of the paper, e.g. 2,4,5.")] = "",
    figure: Annotated[str, typer.Option(help="Instead, draw these figures of the paper: 1, 4, or both.")] = "",
    co2: Annotated[float, typer.Option(min=0, help="Table 1: kilograms of CO2e per kWh.")] = 0.429,
    power: Annotated[
        str | None, typer.Option(help="Table 1: the assumed power of a rank, in watts, or a device of `plan`: its TDP.")
    ] = None,
) -> None:
    """Compares runs: accuracy over time, schedules, search scores, a table. The first `original` is the baseline."""
    if not table and not figure:
        from scaleprog.reporting.report import write_report

        print(write_report(runs, out))
        return
    from scaleprog.reporting.paper_tables import Energy, write_paper

    energy = Energy(co2, None if power is None else watts_of(power))
    print(write_paper(runs, out, numbers("--table", table), numbers("--figure", figure), energy))


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers from `2,4,5`; none from an empty text. Raises ScaleprogError."""
    if not re.fullmatch(r"([0-9]{1,3}(,[0-9]{1,3})*)?", text):
        raise ScaleprogError(f"{option}: {text[:100]!r} is not a list of numbers such as 2,4,5")
    return [int(number) for number in text.split(",") if number]


def watts_of(text: str) -> float:
    """A power from `350`, or the thermal design power of a device from `h100`. Raises ScaleprogError."""
    from scaleprog.planning.devices import Device

    return float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) else Device.named(text, "--power").watts
