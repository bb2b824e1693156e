"""Runs on this machine: train · finetune."""

import json
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaleprog.cli.arguments import MOST_HERE, Overrides, RanksHere, RecipePath, Restarts, Source, default_folder
from scaleprog.cli.sweep import Jobs, Sweep, check_no_sweep, sweep_runs, train_sweep
from scaleprog.errors import ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import as_text, say
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.records import RESULTS, Baseline, Results

if TYPE_CHECKING:
    from scaleprog.recipe import Recipe


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: RanksHere = "1",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE[-from-RUN]-seedN.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run directory of the baseline, to compute the speedup.")
    ] = None,
    restarts: Restarts = None,
    source: Source = None,
    sweep: Sweep = None,
    jobs: Jobs = None,
) -> None:
    """Trains a recipe, or resumes a run directory that exists.

    With --from, the run is a fork: it takes over the state and the records of another run at a kept checkpoint.

    On TERM, INT or USR2 it writes a checkpoint and exits with code 75; the same command resumes from it.
    """
    from scaleprog.recipe import Recipe

    if sweep:
        if baseline is not None:
            train_seconds(baseline)  # refuses a baseline that has not finished, before anything trains
        train_one = partial(run_here, nproc=nproc, restarts=restarts, baseline=baseline)
        train_sweep(sweep_runs(recipe, overrides or (), sweep, run_dir, source)[1], nproc, jobs or 1, train_one)
        return
    check_no_sweep(jobs)
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or default_folder(recipe, loaded, source)
    run_here(loaded, folder, nproc, restarts, baseline, source)


def finetune(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|FILE", help="A run directory, or weights from `scaleprog export`.")
    ],
    data: Annotated[str, typer.Option(help="Folder of the shards to fine-tune on, a path or URL.")],
    overrides: Overrides = None,
    nproc: RanksHere = "1",
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/SOURCE-DATA-seedN.")] = None,
    restarts: Restarts = None,
    show_recipe: Annotated[
        bool, typer.Option("--print", help="Print the recipe, for `train` or `submit`, without training.")
    ] = False,
) -> None:
    """Fine-tunes trained weights on other shards with DeiT's transfer settings, or resumes doing so.

    The recipe lies in the run directory; `scaleprog train` repeats it.
    """
    from scaleprog.rundir.storage import committed
    from scaleprog.training.finetune import transfer_recipe

    recipe = transfer_recipe(source, data, overrides or ())
    if show_recipe:
        print(recipe.dump(), end="")
        return
    if source.is_dir() and not committed(source / "checkpoints"):
        raise ScaleprogError(f"{source}: no checkpoint yet; has the run trained?")
    name = source.resolve().name if source.is_dir() else source.resolve().stem
    folder = run_dir or Path("runs") / f"{name}-{Path(data).resolve().name}-seed{recipe.seed}"
    say(f"fine-tuning in {folder}; to repeat it: scaleprog train {shlex.quote(str(folder / RECIPE))} --run-dir OTHER")
    run_here(recipe, folder, nproc, restarts)


def run_here(
    recipe: "Recipe",
    folder: Path,
    nproc: str,
    restarts: int | None,
    baseline: Path | None = None,
    source: str | None = None,
) -> None:
    """Trains a recipe in a run directory with ranks on this machine, and prints the results.

    `source`: what a new run continues, see `fork`.
    """
    from scaleprog.launchers.local import check_devices, launch, ranks_to_start
    from scaleprog.launchers.snapshot import check_job
    from scaleprog.launchers.world import Count
    from scaleprog.planning.plan import plan_start
    from scaleprog.ranks.rendezvous import of_another_launcher
    from scaleprog.recipe import directories
    from scaleprog.recipe.worlds import Worlds
    from scaleprog.rundir.storage import committed
    from scaleprog.training.longer import begin
    from scaleprog.training.loop import train_rank

    ranks = Count.parse(nproc, "--nproc")
    if ranks.least > MOST_HERE:
        raise ScaleprogError(f"--nproc {ranks}: scaleprog starts at most {MOST_HERE} ranks on one machine")
    restarts = (3 if ranks.most > 1 else 0) if restarts is None else restarts
    baseline_seconds = None if baseline is None else train_seconds(baseline)
    check_job(folder)
    recipe = begin(recipe, folder, source)
    if strangers := of_another_launcher():
        say(
            f"another launcher has set {strangers}; scaleprog ignores that and starts all ranks itself: {ranks} on "
            "this machine (--nproc). For several machines, use `scaleprog submit`"
        )
    if ranks.fixed:
        check_devices(ranks.most)
        plan_start(recipe.located(directories.to_train(folder)), ranks.most, ranks.most)  # before any process
    if ranks.most == 1 and restarts == 0:
        train_rank(recipe, folder)
    else:
        number = ranks.most if ranks.fixed else partial(ranks_to_start, ranks, Worlds.of(recipe))
        launch(
            number,
            train_rank,
            recipe,
            folder,
            restarts=restarts,
            progress=lambda: committed(folder / "checkpoints")[-1:],
            folder=folder,
        )
    results = read_object(folder / RESULTS, Results)
    if results is not None:
        if baseline_seconds is not None:
            results = write_speedup(folder / RESULTS, results, baseline_seconds)
        show(results, folder)


def train_seconds(baseline: Path) -> float:
    """Seconds of training steps that a finished run took, more than 0. Raises ScaleprogError."""
    results = baseline / RESULTS
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
