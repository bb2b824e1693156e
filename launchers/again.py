"""Decides whether the batch script starts the tasks again inside its job, after some of them have crashed.

That takes seconds, where a requeue costs the job its place in the queue. If a node is lost, the others must suffice.

`python -m scaleprog.launchers.again RUN CODE MAX_RESTARTS SIGNAL_BEFORE LEAST TASKS`, where CODE is srun's exit code,
prints on how many nodes to start TASKS ranks each, and the lost nodes to leave out, separated by commas; LEAST is the
smallest number of nodes that may train. If the job must not or cannot go on like that, exits with 1, and leaves the
rest to `requeue.py`, which the batch script runs at its end.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.launchers.request import CHECKPOINT_SECONDS
from scaleprog.launchers.requeue import Attempt, End, Remains, Verdict, decide
from scaleprog.launchers.world import nodes_of_job, nodes_to_use
from scaleprog.rundir import slurm_queue


class Nodes(NamedTuple):
    """On how many of its nodes a job starts its tasks, and which nodes must not be among them."""

    number: int
    lost: Sequence[str]


def again(run: Path, code: int, limit: int, notice: int, least: int, each: int) -> Nodes | None:
    """Decides whether and where the tasks start again inside their job; if so, adds a line to `requeues.jsonl`.

    Args:
        run: the run directory.
        code: srun's exit code.
        limit: the most restarts after crashes.
        notice: how many seconds before its time limit Slurm signals the job.
        least: the smallest number of nodes that may train.
        each: ranks per node.

    Raises:
        ScaleprogError: Slurm does not answer, or the nodes that are left cannot train.
    """
    start = Attempt.current()
    job = slurm_queue.find(start.job)
    remains = Remains.by(run, start, code, notice)
    end = remains.end(job)
    if job is None or not decide(end, start, job, remains.earlier, remains.progress, limit).requeue:
        return None
    if not may_go_on(end, start, job, remains.earlier, remains.progress, notice):
        return None
    there = slurm_queue.hosts(job.nodes)
    lost = slurm_queue.lost(there)
    left = [node for node in there if node not in lost]
    nodes = Nodes(nodes_to_use(run, left, least, nodes_of_job(), each), lost)
    without = f", without {', '.join(lost)}" if lost else ""
    remains.record(end, Verdict(False, here=True), preempted=False, told=f"starts its tasks again{without}")
    return nodes


def may_go_on(
    end: End,
    start: Attempt,
    job: slurm_queue.Job,
    earlier: Sequence[Mapping[str, Any]],
    progress: tuple[int, int],
    notice: int,
) -> bool:
    """Whether a job that would be requeued can as well start its tasks again itself.

    Not after a stop, because Slurm may want the nodes; not if too little time is left; and not if it has just done so
    without a checkpoint since: then the nodes may be the cause.

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
    own = [row for row in earlier if row.get("job") == start.job]
    return not own or not own[-1].get("here") or (own[-1].get("step"), own[-1].get("measured", 0)) != progress


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)  # they are for the tasks
    folder, *numbers = sys.argv[1:]
    try:
        found = again(Path(folder), *map(int, numbers))
    except (ScaleprogError, OSError, ValueError) as error:
        print(f"scaleprog: the tasks do not start again inside the job: {as_text(error)}", file=sys.stderr)
        found = None
    if found is None:
        sys.exit(1)
    print(found.number, ",".join(found.lost))
