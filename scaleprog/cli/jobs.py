"""Jobs, under Slurm and on this machine: submit · status · cancel."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer

from scaleprog.cli.arguments import Overrides, RecipePath, RunPath, RunPaths, Source, default_folder, in_job
from scaleprog.cli.sweep import Jobs, Sweep, check_no_sweep, sweep_runs, unfinished
from scaleprog.cli.training import show
from scaleprog.errors import INTERRUPTED_CODE, ScaleprogError
from scaleprog.files.display import as_text, counted, say
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.rundir.folders import runs_at

if TYPE_CHECKING:
    from scaleprog.launchers.request import JobRequest
    from scaleprog.launchers.snapshot import JobFile
    from scaleprog.recipe import Recipe
    from scaleprog.rundir.records import Results


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
    partition: Annotated[str | None, typer.Option(help="As for sbatch; so are --account and --qos.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    signal_before: Annotated[
        int, typer.Option(min=1, max=10**6, help="How many seconds before its time limit Slurm asks a job to stop.")
    ] = 120,
    spare_nodes: Annotated[
        int, typer.Option(min=0, max=10**4, help="Further nodes that the job holds, to replace lost ones.")
    ] = 0,
    restart: Annotated[
        str,
        typer.Option(metavar="in-job|requeue", help="Where crashed ranks start again; in the job if they can."),
    ] = "in-job",
    max_restarts: Annotated[int, typer.Option(min=0, max=10**6, help="Most restarts after crashes.")] = 20,
    sbatch: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option for sbatch.")] = None,
    srun: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option for the srun that starts the ranks."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="Runs the ranks: a container's Python, or a script that starts one."),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/RECIPE[-from-RUN]-seedN.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job until it ends, and exit with its exit code.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")] = False,
    source: Source = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job as JSON, and only that on stdout.")] = False,
    sweep: Sweep = None,
    jobs: Jobs = None,
) -> None:
    """Trains a recipe as a Slurm job that restarts by itself until the run is finished."""
    from scaleprog.launchers import slurm
    from scaleprog.launchers.request import JobRequest
    from scaleprog.launchers.snapshot import check_job
    from scaleprog.launchers.world import Count
    from scaleprog.recipe import Recipe

    count = Count.parse(nodes, "--nodes")
    request = JobRequest(
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
        tuple(srun or ()),
        python,
        spare_nodes,
        in_job(restart),
    )
    request.check()
    if sweep:
        if as_json:
            raise ScaleprogError("--json prints one job; leave it out for a sweep, and ask `scaleprog status`")
        folder, runs = sweep_runs(recipe, overrides or (), sweep, run_dir, source)
        submit_sweep(folder, runs, request, jobs, wait, dry_run)
        return
    check_no_sweep(jobs)
    loaded = Recipe.load(recipe, overrides or ())
    folder = run_dir or default_folder(recipe, loaded, source)
    check_job(folder)
    if source is not None or loaded.parent is not None or (folder / RECIPE).exists():
        with slurm.one_thread():
            from scaleprog.training.longer import begin  # imports torch

            loaded = begin(loaded, folder, source, dry_run)
    if dry_run:
        if as_json:
            raise ScaleprogError("--dry-run prints the batch script, which is no JSON; leave out --json")
        print(slurm.script(loaded, folder, request), end="")
        return
    results, job = slurm.finished(loaded, folder), None
    if results is None:
        request = slurm.narrow(loaded, request)
        job = slurm.submit(loaded, folder, request)
    if as_json:
        print(json.dumps(as_values(folder, request, job, results), indent=1), flush=True)
    elif job is not None:
        quoted = as_text(shlex.quote(str(folder)))  # lines to be copied into a shell
        print(
            f"job {job.job}: {request.nodes} x {request.tasks} ranks{spare_words(request)}\n"
            f"  run directory  {as_text(folder)}\n"
            f"  watch          scaleprog status {quoted} --follow; tail -f "
            f"{as_text(shlex.quote(str(folder / job.log)))}\n"
            f"  end            scaleprog cancel {quoted}",
            flush=True,
        )
    if results is not None:
        say(f"{folder} is finished; nothing was queued")
        if not as_json:
            show(results, folder)
    elif job is not None and wait:
        follow(folder, f"job {job.job}", in_place=False, out=sys.stderr if as_json else sys.stdout)


def spare_words(request: "JobRequest") -> str:
    """What a job holds besides the nodes that train."""
    return f", {counted(request.spare_nodes, 'spare node')}" if request.spare_nodes else ""


def as_values(
    run: Path, request: "JobRequest", job: "JobFile | None", results: "Results | None"
) -> dict[str, str | int | object]:
    """A submitted job as values for JSON; `job` is None for a run that has `results` already."""
    return {
        "job": job and job.job,
        "name": job and job.name,
        "run": str(run.absolute()),
        "log": job and str(run.absolute() / job.log),
        "nodes": request.nodes.most,
        "least_nodes": request.nodes.least,
        "ranks": request.world,
        "results": results,
    }


def follow(run: Path, what: str, in_place: bool, out: TextIO) -> NoReturn:
    """Follows a run, which messages call `what`, until it ends, and exits with its exit code; Ctrl-C ends only this."""
    from scaleprog.launchers.following import follow as follow_run

    try:
        code = follow_run(run, in_place, out)
    except KeyboardInterrupt:
        quoted = shlex.quote(str(run))
        say(
            f"{what} continues; to follow it again: scaleprog status {quoted} --follow; to end it: scaleprog cancel "
            f"{quoted}"
        )
        code = INTERRUPTED_CODE
    raise typer.Exit(code)


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
        f"ranks{spare_words(request)}, for {len(files)} of {len(runs)} runs\n  directories    in {as_text(folder)}\n"
        f"  watch          scaleprog status {quoted}\n  end            scaleprog cancel {quoted}",
        flush=True,
    )
    if wait:
        raise typer.Exit(array.follow(files))


def show_status(
    run: RunPaths,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with times in seconds.")] = False,
    until_end: Annotated[
        bool, typer.Option("--follow", help="Refresh it until the run ends, and exit with the run's exit code.")
    ] = False,
) -> None:
    """Shows whether a run is queued, running or ended, its step, restarts, last checkpoint and time left.

    Several runs, or a folder of runs such as a sweep's, become a table.
    """
    one = run[0] if len(run) == 1 and runs_at(run[0]) in ([], run) else None
    if until_end:
        if as_json or one is None:
            raise ScaleprogError("--follow shows one run, for people; leave out --json, and name one run directory")
        follow(one, str(one), in_place=sys.stdout.isatty(), out=sys.stdout)
    from scaleprog.launchers import status
    from scaleprog.launchers.several import statuses, table

    if one is not None:
        only = status.status(one)
        print(json.dumps(asdict(only), indent=1, allow_nan=False) if as_json else only.text())
        return
    found, left_out = statuses(run)
    print(json.dumps([asdict(each) for each in found], indent=1, allow_nan=False) if as_json else table(found))
    folders = {Path(each.run).parent for each in found}
    if len(folders) == 1 and not as_json:
        say(f"the runs are in {folders.pop()}")
    if left_out:
        say(f"left out: {'; '.join(left_out)}")


def cancel(run: RunPath) -> None:
    """Stops a queued or running run, or all of a sweep, under Slurm or on this machine, and reports what remains."""
    from scaleprog.files.plain_yaml import read_run
    from scaleprog.launchers.several import cancel_all
    from scaleprog.launchers.snapshot import JOB
    from scaleprog.launchers.status import cancel as cancel_one
    from scaleprog.rundir.owner import OWNER

    runs = runs_at(run)
    if not runs and not any((run / name).exists() for name in (JOB, OWNER)):
        read_run(run)  # which says that it is no run directory
    print(as_text(cancel_one(run) if runs in ([], [run]) else cancel_all(runs), lines=True))
