"""Jobs, under Slurm and on this machine: submit · status · cancel."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaleprog.cli.arguments import Overrides, RecipePath, RunPath, RunPaths, say
from scaleprog.cli.sweep import Sweep, sweep_runs, unfinished
from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.rundir.folders import runs_at

if TYPE_CHECKING:
    from scaleprog.launchers.slurm import JobRequest
    from scaleprog.recipe import Recipe


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
    sweep: Sweep = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Runs of a sweep that train at the same time; default all.")
    ] = None,
) -> None:
    """Trains a recipe as a Slurm job that restarts by itself until the run is finished."""
    from scaleprog.launchers import slurm, status
    from scaleprog.launchers.world import Count
    from scaleprog.recipe import Recipe

    count = Count.parse(nodes, "--nodes")
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
    if sweep:
        submit_sweep(*sweep_runs(recipe, overrides or (), sweep, run_dir), request, jobs, wait, dry_run)
        return
    if jobs is not None:
        raise ScaleprogError(f"--jobs {jobs}: only a sweep has several runs; add --sweep")
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or Path("runs") / f"{recipe.stem}-seed{loaded.seed}"
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


def submit_sweep(
    folder: Path,
    runs: Mapping[Path, "Recipe"],
    request: "JobRequest",
    at_once: int | None,
    wait: bool,
    dry_run: bool,
) -> None:
    """Submits the runs of a sweep that are not finished as one array. Raises typer.Exit and ScaleprogError."""
    from scaleprog.launchers import array

    left = unfinished(runs)
    if not left:
        print(f"nothing to submit: no run of {as_text(folder)} is left to train")
        return
    if dry_run:
        print(array.script(left, folder, request, at_once), end="")
        return
    files = array.submit(left, folder, request, at_once)
    first, *_ = files.values()
    quoted = as_text(shlex.quote(str(folder)))
    print(
        f"job {first.job.partition('_')[0]}: an array of {len(files)} jobs, each of {request.nodes} x {request.tasks} "
        f"ranks, for {len(files)} of {len(runs)} runs\n  directories    in {as_text(folder)}\n"
        f"  watch          scaleprog status {quoted}\n  end            scaleprog cancel {quoted}",
        flush=True,
    )
    if wait:
        raise typer.Exit(array.follow(files))


def show_status(
    run: RunPaths, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with times in seconds.")] = False
) -> None:
    """Shows whether a run is queued, running or ended, its step, restarts, last checkpoint and time left.

    Several runs, or a folder of runs such as a sweep's, become a table.
    """
    from scaleprog.launchers import status
    from scaleprog.launchers.several import statuses, table

    if len(run) == 1 and runs_at(run[0]) in ([], run):
        only = status.status(run[0])
        print(json.dumps(asdict(only), indent=1, allow_nan=False) if as_json else only.text())
        return
    found, left_out = statuses(run)
    print(json.dumps([asdict(each) for each in found], indent=1, allow_nan=False) if as_json else table(found))
    if left_out:
        say(f"left out: {'; '.join(left_out)}")


def cancel(run: RunPath) -> None:
    """Stops a queued or running run, or all of a sweep, under Slurm or on this machine, and reports what remains."""
    from scaleprog.launchers.several import cancel_all
    from scaleprog.launchers.status import cancel as cancel_one

    runs = runs_at(run)
    print(as_text(cancel_one(run) if runs in ([], [run]) else cancel_all(runs), lines=True))
