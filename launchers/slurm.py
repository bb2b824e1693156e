"""`scaleprog submit`: makes a Slurm job from a recipe, with submitit. The job requeues itself until the run is done."""

import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaleprog.errors import AbsentWeights, ScaleprogError
from scaleprog.files.display import first_line, say
from scaleprog.launchers import integrity
from scaleprog.launchers.request import JobRequest
from scaleprog.launchers.snapshot import JobFile, check_free, check_name, code_folder, take
from scaleprog.launchers.variables import environment, of_this_job, overriding
from scaleprog.launchers.world import Count, largest, usable
from scaleprog.recipe import Recipe, directories
from scaleprog.recipe.worlds import Worlds
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.lease import check_recipe
from scaleprog.rundir.reading import read_results
from scaleprog.rundir.records import Results

SRUN = ("--kill-on-bad-exit=1", "--wait=60")  # if one task ends, end all: the others would wait for it forever
STEP = (  # srun reads these variables, and starts that many tasks on that many of the job's nodes
    "export SLURM_JOB_NUM_NODES=$NODES SLURM_NNODES=$NODES SLURM_NTASKS_PER_NODE=$TASKS",
    "export SLURM_NTASKS=$((NODES * TASKS)) SLURM_NPROCS=$((NODES * TASKS))",
)
NO_ARRAY = "unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID  # a task of an array that submits a job hands them on"
RANK_CORES = 2  # for a rank's own threads, besides its data workers
SHOWN = 8
"""How many letters of a job's name squeue shows."""


def finished(recipe: Recipe, run: Path) -> Results | None:
    """The results of a run of `recipe` that has finished; None if it has not, or if they are damaged.

    Raises CheckpointError if `run` is the run directory of another recipe.
    """
    check_recipe(run, recipe)
    return read_results(run)


def submit(recipe: Recipe, run: Path, request: JobRequest) -> JobFile:
    """Queues a job that trains `recipe` in the run directory `run`.

    Returns:
        The content of the `job.json` that it writes into `run`.

    Raises:
        ScaleprogError: the recipe, the shards, the number of ranks, the run directory, or the cluster does not fit. The
            subclass says which.
    """
    run = run.absolute()
    check_name(run)
    request = with_cores(recipe, narrow(recipe, request))
    check_cluster(request)
    check(recipe, run, request)
    from scaleprog.launchers.task import task

    new = not run.exists()
    take(recipe, run)
    executor = make_executor(run, request)
    try:
        job = executor.submit(task, run)
    except RuntimeError as error:  # all of submitit's errors are RuntimeErrors
        raise refused(error, "job", [run] if new else []) from error
    code, log = (str(path.relative_to(run)) for path in (code_folder(run), job.paths.stdout))
    file = JobFile(job.job_id, job_name(run), code, log, socket.gethostname(), time.time())
    file.write(run)
    return file


def refused(error: RuntimeError, what: str, new: Sequence[Path]) -> ScaleprogError:
    """The error of a submission that failed. Removes the folders that it made, unless Slurm may have queued the job."""
    from submitit.core.utils import FailedJobError

    if not isinstance(error, FailedJobError):  # submitit found no job ID in what sbatch printed
        return ScaleprogError(f"Slurm may have queued the {what}: {first_line(str(error))}; look at squeue")
    for folder in new:
        shutil.rmtree(folder, ignore_errors=True)
    return ScaleprogError(f"Slurm refuses the {what}: {str(error).strip()}")


def script(recipe: Recipe, run: Path, request: JobRequest) -> str:
    """The batch script that `submit` would queue.

    Works without Slurm, and imports no torch. So it does not look at the cluster, the model, and the shards; apart from
    that it raises ScaleprogError as `submit` does.
    """
    run = run.absolute()
    check_name(run)
    request = with_cores(recipe, narrow(recipe, request))
    check_quickly(recipe, run, request)
    executor = make_executor(run, request)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def narrow(recipe: Recipe, request: JobRequest) -> JobRequest:
    """Narrows a range of nodes so that both ends can train. Then every start finds a number that can train.

    Prints a message if the range changes.

    Raises:
        ScaleprogError: no number in the range can train.
    """
    if request.nodes.fixed:
        return request
    worlds = Worlds.of(recipe)
    most = largest("--nodes", request.nodes, worlds, request.tasks)
    nodes = Count(usable(request.nodes, worlds, request.tasks)[0], most)
    if nodes != request.nodes:
        end = request.nodes.most if most < request.nodes.most else request.nodes.least
        why = worlds.obstacle(end * request.tasks, request.tasks)
        say(f"--nodes {request.nodes}: requesting {nodes} from Slurm; {why}")
    return replace(request, nodes=nodes)


def with_cores(recipe: Recipe, request: JobRequest) -> JobRequest:
    """Chooses the cores of each task, unless the user has: one per data worker and two for the rank itself.

    Raises:
        ScaleprogError: the user has requested fewer, or must request some.
    """
    workers = recipe.data.workers
    if workers == "auto":
        if request.cpus_per_task is None and "cpus-per-gpu" not in request.further():
            raise ScaleprogError(
                "data.workers: auto starts as many decoding processes as a rank has cores for, and Slurm gives it one "
                "core; add --cpus-per-task, or set data.workers to a number"
            )
        return request
    if request.cpus_per_task is None:
        by_gpu = "cpus-per-gpu" in request.further()  # sbatch takes only one of the two
        return request if by_gpu else replace(request, cpus_per_task=workers + RANK_CORES)
    if workers and request.cpus_per_task < workers + RANK_CORES:
        fits = max(0, request.cpus_per_task - RANK_CORES)
        raise ScaleprogError(
            f"--cpus-per-task {request.cpus_per_task}: each rank has data.workers, {workers}, decoding processes, and "
            f"needs {RANK_CORES} more cores for itself; use --cpus-per-task {workers + RANK_CORES} or more, or "
            f"data.workers={fits}"
        )
    return request


def check_cores(request: JobRequest) -> None:
    """Raises ScaleprogError if no node of the partition has the cores for its tasks."""
    there = slurm_queue.cores(request.partition)
    needed = request.tasks * (request.cpus_per_task or 1)
    if there is not None and needed > there:
        raise ScaleprogError(
            f"{request.tasks} tasks per node with {request.cpus_per_task or 1} cores each (--cpus-per-task; by default "
            f"data.workers + {RANK_CORES}) need {needed} cores, and the largest node of the partition has {there}; "
            "lower data.workers, or put fewer tasks on each node"
        )


def check_size(request: JobRequest) -> None:
    """Raises ScaleprogError if the partition does not have the nodes that train and the spare ones."""
    if not request.spare_nodes:
        return  # Slurm says so itself
    there, needed = slurm_queue.size(request.partition), request.total.least
    if there is not None and needed > there:
        raise ScaleprogError(
            f"--nodes {request.nodes} --spare-nodes {request.spare_nodes}: the job needs {needed} nodes, and the "
            f"partition has {there}; use fewer"
        )


def check(recipe: Recipe, run: Path, request: JobRequest) -> None:
    """Raises ScaleprogError for every error that the job would otherwise meet at its start."""
    check_quickly(recipe, run, request)
    with one_thread():
        from scaleprog.planning.plan import plan_start

        plan_start(recipe.located(directories.to_train(run)), request.world, request.tasks)


def check_quickly(recipe: Recipe, run: Path, request: JobRequest) -> None:
    """Raises ScaleprogError for the errors that can be found without torch, which takes seconds to import."""
    request.check()
    Worlds.of(recipe).check(request.world, request.tasks)
    check_free(recipe, run, sure=True)
    check_weights(recipe, run)


def check_weights(recipe: Recipe, run: Path) -> None:
    """Raises AbsentWeights if the run has not begun, and the file or the run that `init.from` names is not there."""
    source = recipe.located(directories.to_train(run)).init.source
    if source not in (None, "timm") and not committed_step(run) and not os.path.exists(source):
        raise AbsentWeights(f"init.from: {source}: no such file of weights, and no such run")


@contextmanager
def one_thread() -> Iterator[None]:
    """Libraries that are imported inside start no threads for computations: a login node may forbid so many.

    The environment is as before afterwards, because sbatch passes it on to the job.
    """
    with environment(**dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")):
        yield


def check_cluster(request: JobRequest) -> None:
    """Raises ScaleprogError unless this machine has Slurm, and Slurm has the requested partitions and cores."""
    if shutil.which("sbatch") is None:
        raise ScaleprogError(
            "no Slurm on this machine: sbatch not found; submit from a cluster's login node, or train on this machine "
            "with `scaleprog train --nproc`"
        )
    known = slurm_queue.partitions()
    for name in (request.partition or "").split(","):
        if name and name not in known:
            raise ScaleprogError(f"--partition {name}: no such partition; available: {', '.join(known)}")
    check_cores(request)
    check_size(request)


def make_executor(run: Path, request: JobRequest) -> Any:
    """submitit's executor for one job. Its files, including logs, go into a new folder for this submission.

    Raises:
        ScaleprogError: submitit is not installed, or an sbatch option is refused.
    """
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError:
        raise ScaleprogError("submitit is not installed; run pip install 'scaleprog[slurm]'") from None

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # so that `script` works on a machine without Slurm

        def _num_tasks(self) -> int:
            return request.world  # submitit's own method cannot handle a range of nodes

        def _submit_command(self, command: str) -> Any:
            names = [*overriding(self._make_submission_file_text(command, "")), *of_this_job()]
            with environment(SBATCH_WAIT=None, **dict.fromkeys(names)):
                return super()._submit_command(command)

    python = None if request.python is None else shlex.quote(_program(request.python))
    executor = Executor(run / "jobs" / time.strftime("%Y%m%d-%H%M%S"), python=python)
    nodes = request.total
    further: dict[str, Any] = {"signal": f"USR2@{request.signal_before}", "requeue": True, **request.further()}
    if not nodes.fixed:  # with ntasks-per-node, Slurm would limit the range of nodes (docs/slurm.md)
        further = {"mincpus": request.tasks * (request.cpus_per_task or 1), **further}
    if request.spare_nodes:
        further = {"no-kill": True, **further}  # see watch.py
    cpus = () if request.cpus_per_task is None else (f"--cpus-per-task={request.cpus_per_task}",)  # srun needs it again
    executor.update_parameters(
        job_name=job_name(run),
        nodes=nodes.most if nodes.fixed else f"{nodes.least}-{nodes.most}",
        ntasks_per_node=request.tasks if nodes.fixed else None,
        gpus_per_node=request.gpus_per_node,
        cpus_per_task=request.cpus_per_task,
        time=request.time,
        partition=request.partition,
        account=request.account,
        qos=request.qos,
        wckey=None,
        stderr_to_stdout=True,
        setup=[NO_ARRAY, *setup(shlex.quote(str(run)), code_folder(run), request)],
        srun_args=[*SRUN, *cpus, *request.step()],
        additional_parameters=further,
    )
    return executor


def setup(run: str, code: Path, request: JobRequest) -> list[str]:
    """The lines of the batch script before it starts the tasks; slurm/train.sbatch has the same commands.

    Args:
        run: the run directory, as a word of the shell.
        code: the folder of the job's code, named by its digest.
        request: the job's request.
    """
    python = f"{shlex.quote(sys.executable)} -m"
    limits = f"{request.max_restarts} {request.signal_before}"
    requeue = f'{python} scaleprog.launchers.requeue {run} "$1" {limits}'
    leave = "set -- $?; kill -HUP $WATCH 2> /dev/null; exit $1" if request.spare_nodes else "exit $?"
    text = Path(integrity.__file__).read_text(encoding="utf-8")
    lines = [
        # before any code in the run directory runs, and before the trap that would requeue the job
        f"{shlex.join([sys.executable, '-I', '-S', '-c', text, str(code), code.name])} || exit 2",
        "export PYTHONDONTWRITEBYTECODE=1  # no .pyc files in the copied code",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export SLURM_EXPORT_ENV=ALL  # the tasks get all variables, also after sbatch --export=NONE",
        "export SUBMITIT_PREEMPT_SIGNAL=USR2",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        f"export {slurm_queue.REPEAT}=0 {slurm_queue.LOST}=",
        f"after() {{ trap '' TERM INT USR2; {requeue}; {leave}; }}",
        "trap : TERM INT USR2  # the tasks get these signals too; this shell waits for the tasks",
        "trap 'after $?' EXIT",
    ]
    again = f"{python} scaleprog.launchers.again {run} $code {limits}"
    world = f'{python} scaleprog.launchers.world {run} {request.nodes.least} "$TASKS"'
    if request.spare_nodes:
        again += f' {request.nodes.least} "$TASKS"'
        world += f" {request.spare_nodes}"
        lines += [f"{python} scaleprog.launchers.watch {run} &", "WATCH=$!"]
    srun = f"env -u SLURM_PROCID {python} scaleprog.launchers.srun {run} srun"  # only a rank has that variable
    if request.in_job:
        lines += srun_again(srun, again, request.spare_nodes > 0)
    else:
        lines.append(f'function srun {{ {srun} "$@"; }}')
    if request.nodes.fixed and not request.spare_nodes:
        return lines
    return [*lines, f"TASKS={request.tasks}", f"NODES=$({world}) || exit", *STEP]


def srun_again(srun: str, again: str, spare: bool) -> list[str]:
    """Lines of the batch script by which srun starts the tasks, again and again where that is enough.

    Args:
        srun: the command that starts them.
        again: the command that decides, for the exit code in `$code`.
        spare: whether it also says where, because other nodes may take the place of lost ones.
    """
    decide = [f"{again} || return $code"]
    if spare:
        place = [f"place=$({again}) || return $code", f'read -r NODES {slurm_queue.LOST} <<< "$place"']
        decide = [*place, f"export {slurm_queue.LOST}", *STEP]
    return [
        "function srun {  # starts the tasks, again and again where that is enough",
        "  local code place",
        "  while :; do",
        f'    {srun} "$@" && return',
        "    code=$?",
        *(f"    {line}" for line in decide),
        f"    export {slurm_queue.REPEAT}=$(({slurm_queue.REPEAT} + 1))",
        "  done",
        "}",
    ]


def _program(python: str) -> str:
    """A program as the job finds it, wherever it starts; a name without a folder stays one."""
    return os.path.abspath(python) if os.sep in python else python


def job_name(run: Path) -> str:
    """The name of a run's job: its seed, the beginning of each word and all numbers of the run's name, then that name.

    squeue shows only the first letters, and names of runs often begin alike: deit_small_autoprog_100-seed0 is s0dsa100.
    """
    found = re.fullmatch("(.*)-seed([0-9]+)", run.name)
    name, seed = (found[1], f"s{found[2]}") if found else (run.name, "")
    parts = re.findall("[0-9]+|[^\\W0-9_]+", name)
    words = sum(not part.isdigit() for part in parts)
    room = SHOWN - len(seed) - sum(len(part) for part in parts if part.isdigit())
    each = max(1, room // max(1, words))
    last = max(each, room - each * (words - 1))
    letters = [each] * (len(parts) - 1) + [last]
    short = "".join(part if part.isdigit() else part[:most] for part, most in zip(parts, letters))
    return f"{seed}{short}-{run.name}".lstrip("-")
