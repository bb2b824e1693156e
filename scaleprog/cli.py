"""The command line: plan · keys · train · submit · status · cancel · evaluate · export · replay · report · shards.

Each command imports what it needs, so that `scaleprog --help` does not wait for torch, nor training for matplotlib.
"""

import json
import re
import shlex
import signal
import sys
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

import scaleprog
from scaleprog.errors import INTERRUPTED_CODE, Preempted, ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import as_text
from scaleprog.recipe.numbers import MOST_RANKS
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.records import Baseline, Results
from scaleprog.shards.cli import app as shards_app

if TYPE_CHECKING:
    from scaleprog.planning.devices import Device
    from scaleprog.recipe import Recipe

app = typer.Typer(help="Progressive training of Vision Transformers.", no_args_is_help=True, add_completion=False)
app.add_typer(shards_app, name="shards", help="Build and check WebDataset shards.")

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. configs/fashion_mnist/prog.yaml.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=8")]
MOST_HERE = 1024
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, max=MOST_RANKS)] = 1,
    world: Annotated[
        str | None,
        typer.Option(help="Numbers of ranks, e.g. 8,64,512: also show the cost of a step under each engine."),
    ] = None,
    device: Annotated[str, typer.Option(help="The device that --world assumes: h100, a100 or cpu.")] = "h100",
) -> None:
    """Shows stages, parameters, GMACs, memory per rank and predicted speedup, without training."""
    from scaleprog.planning.devices import Device
    from scaleprog.planning.plan import describe
    from scaleprog.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    worlds, described = rank_counts(world) if world is not None else (), Device.named(device)
    prediction = describe(loaded, nproc)
    table = Table("stage", "phase", "px", "layers", "parameters", "GMACs", "memory/rank", "epochs")
    for row in prediction["stages"]:
        table.add_row(
            str(row["stage"]),
            row["phase"],
            str(row["resolution"]),
            str(row["depth"]),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gmacs']:.3g}",
            f"{row['bytes_per_rank'] / 2**20:.0f} MiB",
            f"{row['epochs']:g}",
        )
    console = Console()
    console.print(table)
    console.print(f"predicted speedup by GMACs: {prediction['speedup']:+.1%}; memory: weights, gradients, AdamW, EMA")
    if prediction["short"]:
        console.print(prediction["short"])
    elif prediction["kind"] == "automatic":
        console.print(
            "a search will decide each stage; the table shows the equispaced schedule"
            if prediction["budget"] is None
            else f"a search spends {prediction['budget']:.1%} of Original's cost; the table keeps the smallest "
            "network until the takeover"
        )
    if not prediction["counted"]:
        unseen = f"{as_text(loaded.data.path)}: there are no shards yet, so their images are not counted"
        console.print(unseen, markup=False, soft_wrap=True)
    if worlds:
        show_worlds(loaded, worlds, described, console)


@app.command()
def keys(
    group: Annotated[str | None, typer.Argument(help="A group of keys, e.g. search; default: all groups.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema, for editors.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The text of docs/recipe.md.")] = False,
) -> None:
    """Lists every key of a recipe: its values, default and meaning."""
    from scaleprog.recipe import reference

    if schema or markdown:
        print(json.dumps(reference.schema(), indent=1) if schema else reference.markdown(), end="\n" if schema else "")
        return
    console = Console()
    for name, (about, rows) in (reference.groups() if group is None else {group: reference.group(group)}).items():
        table = Table("key", "takes", "default", "meaning", title=f"{name}: {about}", title_justify="left")
        for key in rows:
            table.add_row(key.name, key.takes, "required" if key.default is None else key.default, key.meaning)
        console.print(table, markup=False)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Annotated[
        str,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="Ranks on this machine. With a range, each start uses one per GPU or, without GPUs, one per CPU core.",
        ),
    ] = "1",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE-seedN.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run directory of the baseline, to compute the speedup.")
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(min=0, max=10**6, help="Consecutive crashes to tolerate; default 3, or 0 for one rank."),
    ] = None,
) -> None:
    """Trains a recipe, or resumes a run directory that exists.

    On TERM, INT or USR2 it writes a checkpoint and exits with code 75; the same command resumes from it.
    """
    from scaleprog.launchers.local import check_devices, launch, ranks_to_start
    from scaleprog.launchers.snapshot import check_job
    from scaleprog.launchers.world import Count
    from scaleprog.planning.plan import plan_start
    from scaleprog.ranks.rendezvous import of_another_launcher
    from scaleprog.recipe import Recipe
    from scaleprog.recipe.worlds import Worlds
    from scaleprog.rundir.storage import committed
    from scaleprog.training.loop import train_rank

    ranks = Count.parse(nproc, "--nproc")
    if ranks.least > MOST_HERE:
        raise ScaleprogError(f"--nproc {ranks}: scaleprog starts at most {MOST_HERE} ranks on one machine")
    restarts = (3 if ranks.most > 1 else 0) if restarts is None else restarts
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or Path("runs") / f"{recipe.stem}-seed{loaded.seed}"
    baseline_seconds = None if baseline is None else train_seconds(baseline)
    check_job(folder)
    if strangers := of_another_launcher():
        _say(
            f"another launcher has set {strangers}; scaleprog ignores that and starts all ranks itself: {ranks} on "
            "this machine (--nproc). For several machines, use `scaleprog submit`"
        )
    if ranks.fixed:
        check_devices(ranks.most)
        plan_start(loaded, ranks.most, ranks.most)  # before any process is started
    if ranks.most == 1 and restarts == 0:
        train_rank(loaded, folder)
    else:
        number = ranks.most if ranks.fixed else partial(ranks_to_start, ranks, Worlds.of(loaded))
        launch(
            number,
            train_rank,
            loaded,
            folder,
            restarts=restarts,
            progress=lambda: committed(folder / "checkpoints")[-1:],
        )
    results = read_object(folder / "results.json", Results)
    if results is not None:
        if baseline_seconds is not None:
            results = write_speedup(folder / "results.json", results, baseline_seconds)
        show(results, folder)


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="Nodes. With a range, each start uses as many as Slurm has free.",
        ),
    ] = "1",
    gpus_per_node: Annotated[int | None, typer.Option(min=1, max=1024, help="GPUs per node, one rank each.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, max=1024, help="Ranks per node without GPUs.")] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU cores per rank; default data.workers + 2.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one start: minutes, HH:MM:SS or D-HH:MM:SS.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    signal_before: Annotated[
        int, typer.Option(min=1, max=10**6, help="How many seconds before its time limit Slurm asks a job to stop.")
    ] = 120,
    max_restarts: Annotated[int, typer.Option(min=0, max=10**6, help="Most restarts after crashes.")] = 20,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option for sbatch.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE-seedN.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it ends, and exit with its exit code.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")] = False,
) -> None:
    """Trains a recipe as a Slurm job that restarts by itself until the run is finished."""
    from scaleprog.launchers import slurm, status
    from scaleprog.launchers.world import Count
    from scaleprog.recipe import Recipe

    count = Count.parse(nodes, "--nodes")
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or Path("runs") / f"{recipe.stem}-seed{loaded.seed}"
    request = slurm.JobRequest(
        count,
        gpus_per_node,
        tasks_per_node,
        cpus_per_task,
        time,
        partition,
        account,
        qos,
        signal_before,
        max_restarts,
        tuple(sbatch or ()),
    )
    if dry_run:
        print(slurm.script(loaded, folder, request), end="")
        return
    job = slurm.submit(loaded, folder, request)
    quoted = as_text(shlex.quote(str(folder)))  # lines to be copied into a shell
    print(
        f"job {job.job}: {count} x {request.tasks} ranks\n  run directory  {as_text(folder)}\n"
        f"  watch          scaleprog status {quoted}; tail -f {as_text(shlex.quote(str(folder / job.log)))}\n"
        f"  end            scaleprog cancel {quoted}",
        flush=True,
    )
    if wait:
        raise typer.Exit(status.follow(folder, job))


@app.command(name="status")
def show_status(
    run: RunPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with times in seconds.")] = False
) -> None:
    """Shows whether a run is queued, running or ended, its step, restarts, last checkpoint and time left."""
    from scaleprog.launchers import status

    found = status.status(run)
    print(json.dumps(asdict(found), indent=1, allow_nan=False) if as_json else found.text())


@app.command()
def cancel(run: RunPath) -> None:
    """Stops a queued or running run, under Slurm or on this machine, and reports what remains."""
    from scaleprog.launchers import status

    print(as_text(status.cancel(run)))


@app.command()
def evaluate(
    run: RunPath,
    resolution: Annotated[int | None, typer.Option(help="Pixels; default: the model's full size.")] = None,
    weights: Annotated[Literal["ema", "online", "best"], typer.Option()] = "best",
) -> None:
    """Measures the top-1 accuracy of a run's newest checkpoint on the validation split."""
    from scaleprog.training.export import evaluate_run

    accuracy, chosen = evaluate_run(run, resolution, weights)
    print(f"{as_text(run)}: top-1 {accuracy:.2f} % ({chosen} weights)")


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    weights: Annotated[
        Literal["best", "online", "ema"], typer.Option(help="best: the better ones in the last evaluation.")
    ] = "best",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the numbers in the file.")
    ] = "float32",
) -> None:
    """Writes a run's weights as a file that plain timm loads, with the mean, std and crop of its images."""
    from scaleprog.training.export import export_run

    print(as_text(export_run(run, out, weights, dtype), lines=True))


@app.command()
def replay(
    run: RunPath,
    step: Annotated[int, typer.Argument(min=1, help="Number of the step, as in metrics.jsonl.")],
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
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


def rank_counts(text: str) -> tuple[int, ...]:
    """Numbers of ranks from `8,64,512`. Raises ScaleprogError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 32 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise ScaleprogError(
            f"--world: {text[:100]!r} is not a list of at most 32 numbers of ranks from 1 to 999999, such as 8,64,512"
        )
    return tuple(map(int, parts))


def show_worlds(recipe: "Recipe", worlds: tuple[int, ...], device: "Device", console: Console) -> None:
    """What a step of the complete model costs a rank, a table for every number of ranks; then what it rests on."""
    from scaleprog.errors import RecipeError
    from scaleprog.planning.cost_model import assumptions
    from scaleprog.planning.plan import forecast

    console.print(
        f"\none step of {as_text(recipe.model.name)} at full size on {device.name}, per rank: memory and the run's "
        "peak in MiB; collectives, MiB sent, MiB sent outside the node; modeled ms and efficiency",
        markup=False,
        highlight=False,
    )
    for world in worlds:
        try:
            found = forecast(recipe, world, device)
        except RecipeError as error:
            console.print(
                as_text(f"\n{world} ranks: cannot run: {error}", lines=True),
                soft_wrap=True,
                markup=False,
                highlight=False,
            )
            continue
        console.print(f"\n{world} ranks, {next(iter(found.values()))[0].images} images each", highlight=False)
        hosts = any(prediction.memory.host for prediction, _ in found.values())
        titles = ["engine", "weights", "grads", "AdamW", "EMA", "activ.", "buffers", *(["host"] if hosts else [])]
        titles += ["peak", "coll.", "sent", "outside", "step ms", "effic."]
        table = Table(*titles, padding=(0, 0, 0, 1))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, (prediction, peak) in found.items():
            memory, traffic = prediction.memory, prediction.traffic
            held = [memory.parameters, memory.gradients, memory.optimizer, memory.ema, memory.activations]
            held += [memory.buffers, memory.host] if hosts else [memory.buffers]
            mark = "!" if peak > device.memory else ""
            table.add_row(
                name,
                *(f"{size / 2**20:.1f}" for size in held),
                f"{peak / 2**20:.0f}{mark}",
                str(traffic.count()),
                f"{traffic.sent() / 2**20:.1f}",
                f"{traffic.between_nodes(device) / 2**20:.1f}",
                f"{1000 * prediction.step:.2f}",
                f"{prediction.efficiency:.0%}",
            )
        console.print(table)
    console.print("\n* the recipe's engine; ! more memory than the device has. Assumptions:")
    for line in assumptions(recipe, device):
        console.print(as_text(f"- {line}"), soft_wrap=True, markup=False, highlight=False)


def train_seconds(baseline: Path) -> float:
    """Seconds of training steps that a finished run took, more than 0. Raises ScaleprogError."""
    results = baseline / "results.json"
    try:
        found = read_object(results, Baseline)
    except ScaleprogError as error:
        raise ScaleprogError(f"--baseline: {results} is not a run's results.json: {error}") from None
    if found is None:
        raise ScaleprogError(f"--baseline: {results} does not exist; has that run finished?")
    return found["train_seconds"]


def write_speedup(path: Path, results: Results, baseline_seconds: float) -> Results:
    """Adds the paper's speedup against another run to `results.json`; None if the run trained in no time."""
    own = results["train_seconds"]
    results = {**results, "speedup": baseline_seconds / own - 1 if own else None}
    try:
        write_whole(path, json.dumps(results, indent=1))
    except OSError as error:
        raise ScaleprogError(f"{path}: cannot write the speedup: {error}") from error
    return results


def show(results: Results, folder: Path) -> None:
    """One line of results."""
    ratio = results.get("speedup")
    speedup = "" if ratio is None else f", speedup {ratio:+.1%}"
    print(
        f"{as_text(folder)}: top-1 {results['top1_best']:.2f} %, {results['train_seconds']:.1f} s of training steps, "
        f"{results['wall_seconds']:.1f} s in all{speedup}"
    )


def main() -> None:
    """Entry point: reports a known error in plain words, and exits with the error's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal's alphabet lacks a letter
    before = signal.getsignal(signal.SIGINT)
    if before is scaleprog._leave_quietly:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except Preempted as error:
        _say(f"{error}; the same command resumes from the last checkpoint")
        sys.exit(error.exit_code)
    except ScaleprogError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_CODE)
    finally:
        if before is scaleprog._leave_quietly:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, except during an import, which may hide it, print it or change it."""
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            scaleprog._leave_quietly(number, frame)
        at = at.f_back
    raise KeyboardInterrupt


def _say(message: str) -> None:
    print(f"scaleprog: {as_text(message, lines=True)}", file=sys.stderr)
