"""`scaleprog submit`: makes a Slurm job from a recipe, with submitit. The job requeues itself until the run is done."""

import math
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaleprog.errors import ScaleprogError
from scaleprog.launchers import integrity
from scaleprog.launchers.snapshot import JobFile, check_free, check_name, code_folder, take
from scaleprog.launchers.world import Count, largest, usable
from scaleprog.recipe import Recipe
from scaleprog.recipe.worlds import Worlds
from scaleprog.rundir import slurm_queue

CHECKPOINT_SECONDS = 60  # least time between the end of a job's startup and the signal that stops the job
SRUN = ("--kill-on-bad-exit=1", "--wait=60")  # if one task ends, end all: the others would wait for it forever
STEP = (  # srun reads these variables, and starts that many tasks on that many of the job's nodes
    "export SLURM_JOB_NUM_NODES=$NODES SLURM_NNODES=$NODES SLURM_NTASKS_PER_NODE=$TASKS",
    "export SLURM_NTASKS=$((NODES * TASKS)) SLURM_NPROCS=$((NODES * TASKS))",
)
NO_ARRAY = "unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID  # a task of an array that submits a job hands them on"
OWN_OPTIONS = {
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "time": "--time",
    "cpus-per-task": "--cpus-per-task",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "signal": "--signal-before",
    "job-name": "--run-dir",
}
ONE = Count(1, 1)
RANK_CORES = 2  # for a rank's own threads, besides its data workers
RESERVED = ("ntasks", "array", "requeue", "no-requeue", "open-mode", "output", "error", "chdir")


@dataclass(frozen=True)
class JobRequest:
    """What a job asks Slurm for.

    Attributes:
        nodes: number of nodes, or a range of it.
        gpus_per_node: GPUs on each node, one task per GPU; None on nodes without GPUs.
        tasks_per_node: tasks on each node without GPUs.
        cpus_per_task: CPU cores for each task; None until `with_cores` has chosen it.
        time: time limit of one start, in sbatch's format (see `seconds`).
        partition: as in sbatch.
        account: as in sbatch.
        qos: as in sbatch.
        signal_before: seconds before the time limit at which Slurm asks the job to stop.
        max_restarts: the most restarts after crashes; requested stops do not count.
        options: other options of sbatch, each KEY=VALUE or KEY.
    """

    nodes: Count = ONE
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_before: int = 120
    max_restarts: int = 20
    options: tuple[str, ...] = ()

    @property
    def tasks(self) -> int:
        """Tasks on each node; one per GPU if the nodes have GPUs."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world(self) -> int:
        """The largest number of ranks."""
        return self.nodes.most * self.tasks

    def further(self) -> dict[str, Any]:
        """`options` in the form that submitit takes.

        Raises:
            ScaleprogError: an option is malformed, or scaleprog sets it itself.
        """
        found: dict[str, Any] = {}
        for option in self.options:
            key, equals, value = option.lstrip("-").partition("=")
            key = key.replace("_", "-")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or not value.isprintable() or "\\" in value:
                raise ScaleprogError(f"--sbatch {option}: write KEY or KEY=VALUE, where KEY is a long option of sbatch")
            if key in OWN_OPTIONS:
                raise ScaleprogError(f"--sbatch {option}: use {OWN_OPTIONS[key]} instead")
            if key in RESERVED:
                raise ScaleprogError(
                    f"--sbatch {option}: scaleprog sets {key} itself, to what the job needs; leave it out"
                )
            found[key] = value if equals else True
        return found

    def check(self) -> None:
        """Raises ScaleprogError for a request that cannot work, as far as this can be seen without Slurm."""
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ScaleprogError(
                f"--tasks-per-node {self.tasks_per_node}: each GPU gets one task, and --gpus-per-node is "
                f"{self.gpus_per_node}; leave --tasks-per-node out"
            )
        for name in ("partition", "account", "qos"):
            value = getattr(self, name) or ""
            if "\n" in value:
                raise ScaleprogError(f"--{name}: must be one line")
            if not value.isprintable() or "\\" in value:
                raise ScaleprogError(f"--{name} {value!r}: not a name that Slurm can read")
        self.further()
        if self.time is None:
            return
        least = self.signal_before + CHECKPOINT_SECONDS
        if seconds(self.time) <= least:
            raise ScaleprogError(
                f"--time {self.time} leaves no time for training: Slurm asks the job to stop {self.signal_before} s "
                "before its end (--signal-before), and a checkpoint takes time; request "
                f"{math.ceil(least / 60) + 1} min or more, or lower --signal-before"
            )


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
        if new:
            shutil.rmtree(run)
        raise ScaleprogError(f"Slurm refuses the job: {str(error).strip()}") from error
    code, log = (str(path.relative_to(run)) for path in (code_folder(run), job.paths.stdout))
    file = JobFile(job.job_id, job_name(run), code, log)
    file.write(run)
    return file


def script(recipe: Recipe, run: Path, request: JobRequest) -> str:
    """The batch script that `submit` would queue. Raises ScaleprogError as `submit` does, but works without Slurm."""
    run = run.absolute()
    check_name(run)
    request = with_cores(recipe, narrow(recipe, request))
    check(recipe, run, request)
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
        print(f"scaleprog: --nodes {request.nodes}: requesting {nodes} from Slurm; {why}", file=sys.stderr)
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


def check(recipe: Recipe, run: Path, request: JobRequest) -> None:
    """Raises ScaleprogError for every error that the job would otherwise meet at its start."""
    request.check()
    check_free(recipe, run)
    from scaleprog.planning.plan import plan_start  # imports torch, so only after the quick checks

    plan_start(recipe, request.world, request.tasks)


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

    executor = Executor(run / "jobs" / time.strftime("%Y%m%d-%H%M%S"))
    nodes = request.nodes
    further: dict[str, Any] = {"signal": f"USR2@{request.signal_before}", "requeue": True, **request.further()}
    if not nodes.fixed:  # with ntasks-per-node, Slurm would limit the range of nodes (docs/slurm.md)
        further = {"mincpus": request.tasks * (request.cpus_per_task or 1), **further}
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
        srun_args=[*SRUN, *cpus],
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
    requeue = f'{python} scaleprog.launchers.requeue {run} "$1" {request.max_restarts}'
    text = Path(integrity.__file__).read_text(encoding="utf-8")
    lines = [
        # before any code in the run directory runs, and before the trap that would requeue the job
        f"{shlex.join([sys.executable, '-I', '-S', '-c', text, str(code), code.name])} || exit 2",
        "export PYTHONDONTWRITEBYTECODE=1  # no .pyc files in the copied code",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export SUBMITIT_PREEMPT_SIGNAL=USR2",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        f"after() {{ trap '' TERM INT USR2; {requeue}; exit $?; }}",
        "trap : TERM INT USR2  # the tasks get these signals too; this shell waits for the tasks",
        "trap 'after $?' EXIT",
    ]
    if request.nodes.fixed:
        return lines
    world = f'{python} scaleprog.launchers.world {run} {request.nodes.least} "$TASKS"'
    return [*lines, f"TASKS={request.tasks}", f"NODES=$({world}) || exit", *STEP]


def job_name(run: Path) -> str:
    """The name that identifies this run's job in the queue."""
    return f"scaleprog-{run.name}"


def seconds(limit: str) -> int:
    """Converts a time limit of sbatch to seconds.

    Args:
        limit: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, or D-HH:MM:SS.

    Raises:
        ScaleprogError: `limit` has another form.
    """
    number = "([0-9]{1,9})"
    found = re.fullmatch(f"(?:{number}-)?{number}(?::{number})?(?::{number})?", limit)
    if found is None:
        raise ScaleprogError(f"--time {limit}: not a time; write minutes, HH:MM:SS, or D-HH:MM:SS")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    if days is None and parts[2] is None:  # the first number is minutes
        parts = [0, *parts[:2]]
    hours, minutes, rest = (part or 0 for part in parts)
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + rest
