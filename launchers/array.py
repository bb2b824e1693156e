"""`scaleprog submit --sweep`: one Slurm array, each of whose tasks trains a run of the sweep and requeues itself."""

import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text, clock
from scaleprog.launchers import slurm
from scaleprog.launchers.request import JobRequest
from scaleprog.launchers.snapshot import JobFile, check_name, code_folder, take_code, write_recipe
from scaleprog.launchers.status import standing
from scaleprog.recipe import Recipe
from scaleprog.recipe.worlds import Worlds
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.records import RESULTS

POLL_SECONDS = 3.0


def submit(
    runs: Mapping[Path, Recipe], folder: Path, request: JobRequest, at_once: int | None = None
) -> dict[Path, JobFile]:
    """Queues an array of jobs, one for each of `runs`, which are directories in `folder`.

    Args:
        runs: run directories and their recipes, at least one.
        folder: the folder of the sweep; it gets the code of the jobs and their logs.
        request: what each job asks for.
        at_once: the most jobs that Slurm starts at the same time; None: no limit.

    Returns:
        The content of the `job.json` that it writes into each run directory.

    Raises:
        ScaleprogError: a recipe, a run directory, or the cluster does not fit.
    """
    folder = folder.absolute()
    check_name(folder)
    request = one_request(runs, request)
    slurm.check_cluster(request)
    for run, recipe in runs.items():
        slurm.check(recipe, run, request)
    new = [path for path in (folder, *runs) if not path.exists()]
    code = take_code(folder)
    for run, recipe in runs.items():
        write_recipe(recipe, run)
    executor = make_executor(list(runs), folder, request, at_once)
    try:
        executor.folder.mkdir(parents=True, exist_ok=True)
        job = executor._submit_command(_command(executor))
    except RuntimeError as error:  # all of submitit's errors are RuntimeErrors
        raise slurm.refused(error, "jobs", new) from error
    files = {}
    for index, run in enumerate(runs):
        id_ = f"{job.job_id}_{index}"
        log = executor.folder / f"{id_}_0_log.out"
        code_here, log_here = (os.path.relpath(path, run.absolute()) for path in (code, log))
        files[run] = JobFile(id_, slurm.job_name(folder), code_here, log_here, socket.gethostname(), time.time())
        files[run].write(run)
    return files


def script(runs: Mapping[Path, Recipe], folder: Path, request: JobRequest, at_once: int | None = None) -> str:
    """The batch script that `submit` would queue; raises ScaleprogError as `slurm.script` does."""
    folder = folder.absolute()
    check_name(folder)
    request = one_request(runs, request)
    for run, recipe in runs.items():
        slurm.check_quickly(recipe, run, request)
    executor = make_executor(list(runs), folder, request, at_once)
    return executor._make_submission_file_text(_command(executor), "")


def one_request(runs: Mapping[Path, Recipe], request: JobRequest) -> JobRequest:
    """Chooses the nodes and cores of each job. Raises ScaleprogError if the runs need different ones."""
    alike = {(Worlds.of(recipe), recipe.data.workers): recipe for recipe in runs.values()}
    requests = {slurm.with_cores(recipe, slurm.narrow(recipe, request)) for recipe in alike.values()}
    if len(requests) > 1:
        needs = " or ".join(f"{each.nodes} nodes with {each.cpus_per_task} cores per rank" for each in requests)
        raise ScaleprogError(
            f"--sweep: the jobs of an array are alike, but these runs need {needs}; set --nodes to one number and "
            "--cpus-per-task, or submit them as several sweeps"
        )
    return requests.pop()


def make_executor(runs: Sequence[Path], folder: Path, request: JobRequest, at_once: int | None) -> Any:
    """submitit's executor for the array. Raises ScaleprogError as `slurm.make_executor` does."""
    executor = slurm.make_executor(folder, request)
    names = shlex.join(run.name for run in runs)
    executor.update_parameters(
        array_parallelism=at_once or len(runs),
        setup=[
            f"RUNS=({names})",
            f"RUN={shlex.quote(str(folder))}/${{RUNS[SLURM_ARRAY_TASK_ID]}}",
            *slurm.setup('"$RUN"', code_folder(folder), request),
        ],
    )
    executor.parameters["map_count"] = len(runs)
    return executor


def _command(executor: Any) -> str:
    return f'{executor.python} -u -m scaleprog.launchers.task "$RUN"'


def follow(files: Mapping[Path, JobFile]) -> int:
    """Prints how the jobs' states change until all have ended. Returns 0 if all runs have finished, else 1."""
    said: dict[Path, str] = {}
    ended = dict.fromkeys(files, 0)  # how often in a row Slurm has called a job over: it may requeue one
    while left := [run for run in files if ended[run] < 2]:
        for run in left:
            try:
                job = files[run].ask()
                ended[run] = ended[run] + 1 if job is None or job.over else 0
                state, detail, _ = standing(run)
                now = f"{state}{detail and f' ({detail})'}"
            except slurm_queue.NoAnswer as error:
                now = str(error)
            if said.get(run) != now:
                said[run] = now
                print(f"{clock(time.time())} {as_text(f'{run.name}: {now}')}", flush=True)
        time.sleep(POLL_SECONDS)
    return 0 if all((run / RESULTS).exists() for run in files) else 1
