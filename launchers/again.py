"""Decides whether the batch script starts the tasks again inside its job, after some of them have crashed.

That takes seconds, where a requeue costs the job its place in the queue.

`python -m scaleprog.launchers.again RUN CODE MAX_RESTARTS SIGNAL_BEFORE`, where CODE is srun's exit code, exits with 0
if the tasks shall start again. Otherwise it exits with 1, and leaves the decision about the job to `requeue.py`, which
the batch script runs at its end.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.launchers.request import CHECKPOINT_SECONDS
from scaleprog.launchers.requeue import Attempt, End, Remains, Verdict, decide, refused
from scaleprog.rundir import slurm_queue


def again(run: Path, code: int, limit: int, notice: int) -> bool:
    """Decides whether the tasks start again inside their job; if so, adds a line to `requeues.jsonl`.

    Args:
        run: the run directory.
        code: srun's exit code.
        limit: the most restarts after crashes.
        notice: how many seconds before its time limit Slurm signals the job.

    Raises:
        ScaleprogError: Slurm does not answer, or the job has lost a node.
    """
    start = Attempt.current()
    job = slurm_queue.find(start.job)
    if job is None or refused(run, start):
        return False
    remains = Remains.by(run, start, code, notice)
    end = remains.end(job)
    verdict = decide(end, start, job, remains.earlier, remains.progress, limit)
    if not verdict.requeue or not may_stay(end, start, job, remains.earlier, remains.progress, notice):
        return False
    if lost := slurm_queue.lost(slurm_queue.hosts(job.nodes)):
        raise ScaleprogError(f"Slurm does not reach {', '.join(lost)}")
    remains.record(end, Verdict(False, here=True), preempted=False, outcome="starts its tasks again")
    return True


def may_stay(
    end: End,
    start: Attempt,
    job: slurm_queue.Job,
    earlier: Sequence[Mapping[str, Any]],
    progress: tuple[int, int],
    notice: int,
) -> bool:
    """Whether a job that would be requeued can as well start its tasks again itself.

    Not after a stop, because Slurm may want the nodes; not if too little time is left; and not if the tasks that
    crashed had started like that and committed nothing: then the nodes may be the cause.

    Args:
        end: how the start ended.
        start: the start.
        job: Slurm's current record of the job.
        earlier: the lines of `requeues.jsonl`.
        progress: the result of `requeue.progress_of` for the run.
        notice: how many seconds before its time limit Slurm signals the job.
    """
    if end.kind != "crash" or job.preempted:
        return False
    if job.end is not None and job.end - time.time() < notice + CHECKPOINT_SECONDS:
        return False
    if start.repeat == 0:
        return True
    last = earlier[-1] if earlier else {}
    if (last.get("job"), last.get("restart"), last.get("repeat", 0)) != (start.job, start.restart, start.repeat - 1):
        return False  # nobody could write down why the tasks have started again
    return (last.get("step"), last.get("measured", 0)) != progress


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)  # they are for the tasks
    folder, *numbers = sys.argv[1:]
    try:
        sys.exit(0 if again(Path(folder), *map(int, numbers)) else 1)
    except (ScaleprogError, OSError, ValueError) as error:
        print(f"scaleprog: the tasks do not start again inside the job: {as_text(error)}", file=sys.stderr)
        sys.exit(1)
