"""Jobs, under Slurm and on this machine: submit · status · cancel."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scaleprog.cli.arguments import Overrides, RecipePath, RunPath, Source, default_folder
from scaleprog.files.display import as_text


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
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE[-from-RUN]-seedN.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it ends, and exit with its exit code.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")] = False,
    source: Source = None,
) -> None:
    """Trains a recipe as a Slurm job that restarts by itself until the run is finished."""
    from scaleprog.launchers import slurm, status
    from scaleprog.launchers.snapshot import check_job
    from scaleprog.launchers.world import Count
    from scaleprog.recipe import Recipe
    from scaleprog.training.longer import begin

    count = Count.parse(nodes, "--nodes")
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or default_folder(recipe, loaded, source)
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
    request.check()
    check_job(folder)
    loaded = begin(loaded, folder, source, dry_run)
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


def show_status(
    run: RunPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with times in seconds.")] = False
) -> None:
    """Shows whether a run is queued, running or ended, its step, restarts, last checkpoint and time left."""
    from scaleprog.launchers import status

    found = status.status(run)
    print(json.dumps(asdict(found), indent=1, allow_nan=False) if as_json else found.text())


def cancel(run: RunPath) -> None:
    """Stops a queued or running run, under Slurm or on this machine, and reports what remains."""
    from scaleprog.launchers import status

    print(as_text(status.cancel(run)))
