"""Decides whether the batch script starts the tasks again inside its job, after some of them have crashed.

That takes seconds, where a requeue costs the job its place in the queue.

`python -m scaleprog.launchers.again RUN CODE MAX_RESTARTS SIGNAL_BEFORE`, where CODE is srun's exit code, exits with 0
if the tasks shall start again. Otherwise it exits with 1, and leaves the decision about the job to `requeue.py`, which
the batch script runs at its end.

For a job with spare nodes, LEAST and TASKS follow: the smallest number of nodes that may train, and the ranks of each.
Then it prints on how many nodes to start the tasks, and which nodes the job has lost, separated by commas.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import say
from scaleprog.launchers.attempt import Attempt, refused
from scaleprog.launchers.exits import UNHEARD
from scaleprog.launchers.request import CHECKPOINT_SECONDS
from scaleprog.launchers.requeue import End, Remains, Verdict, decide
from scaleprog.launchers.world import nodes_of_job, nodes_to_use
from scaleprog.ranks.stop import ignore_stops
from scaleprog.rundir import slurm_queue


class Need(NamedTuple):
    """What a job with spare nodes needs: at least so many nodes, and `each` ranks on each."""

    least: int
    each: int


class Place(NamedTuple):
    """Where the tasks start again: on how many of the job's nodes, and without which of those that it began with."""

    nodes: int
    lost: Sequence[str]


def again(run: Path, code: int, limit: int, notice: int, need: Need | None = None) -> Place | None:
    """Decides whether the tasks start again inside their job; if so, adds a line to `requeues.jsonl`.

    Args:
        run: the run directory.
        code: srun's exit code.
        limit: the most restarts after crashes.
        notice: how many seconds before its time limit Slurm signals the job.
        need: what the job needs if it has spare nodes; None: all of its nodes.

    Raises:
        ScaleprogError: Slurm does not answer, or the nodes that are left cannot train.
    """
    start = Attempt.current()
    job = slurm_queue.find(start.job)
    if job is None or refused(run, start):
        return None
    remains = Remains.by(run, start, code, notice)
    end = remains.end(job)
    if not decide(end, start, job, remains.earlier, remains.progress, limit).requeue:
        return None
    there = slurm_queue.hosts(job.nodes)
    gone = [] if need is None else lost_nodes(there)
    replaced = not set(gone).issubset(os.environ.get(slurm_queue.LOST, "").split(","))
    if not may_stay(end, start, job, remains.earlier, remains.progress, notice, replaced):
        return None
    if need is None:
        if unreachable := slurm_queue.lost(there):
            raise ScaleprogError(f"Slurm does not reach {', '.join(unreachable)}")
        place = Place(len(there), ())
    else:
        left = [node for node in there if node not in gone]
        if len(left) < need.least:
            raise ScaleprogError(f"the job has lost {', '.join(gone)}, and needs {need.least} nodes")
        place = Place(nodes_to_use(run, left, need.least, nodes_of_job(), need.each), gone)
    without = f", without {', '.join(place.lost)}" if place.lost else ""
    remains.record(end, Verdict(False, here=True), preempted=False, outcome=f"starts its tasks again{without}")
    return place


def lost_nodes(there: Sequence[str]) -> list[str]:
    """The nodes that this job began with, and that have left it, or that Slurm does not reach.

    Args:
        there: the nodes that Slurm still counts as the job's.

    Raises:
        ScaleprogError: Slurm does not answer, or the node of the batch script is among them.
    """
    began = slurm_queue.hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
    left = set(there).difference(slurm_queue.lost(there))
    gone = [node for node in began if node not in left]
    if (here := slurm_queue.own_node()) in gone:
        raise ScaleprogError(f"Slurm has given up {here}, the node of the batch script")
    return gone


def may_stay(
    end: End,
    start: Attempt,
    job: slurm_queue.Job,
    earlier: Sequence[Mapping[str, Any]],
    progress: tuple[int, int],
    notice: int,
    replaced: bool = False,
) -> bool:
    """Whether a job that would be requeued can as well start its tasks again itself.

    Not after a stop, because Slurm may want the nodes; not if its nodes do not hear each other; not if too little time
    is left; and not if the tasks that crashed had started like that and committed nothing: then the nodes may be the
    cause, unless others replace them.

    Args:
        end: how the start ended.
        start: the start.
        job: Slurm's current record of the job.
        earlier: the lines of `requeues.jsonl`.
        progress: the result of `requeue.progress_of` for the run.
        notice: how many seconds before its time limit Slurm signals the job.
        replaced: whether the job has lost nodes since this start, and the tasks would start on others.
    """
    if end.kind != "crash" or end.code == UNHEARD or job.preempted:
        return False
    if job.end is not None and job.end - time.time() < notice + CHECKPOINT_SECONDS:
        return False
    if start.repeat == 0 or replaced:
        return True
    last = earlier[-1] if earlier else {}
    if (last.get("job"), last.get("restart"), last.get("repeat", 0)) != (start.job, start.restart, start.repeat - 1):
        return False  # nobody could write down why the tasks have started again
    return (last.get("step"), last.get("measured", 0)) != progress


if __name__ == "__main__":
    ignore_stops()  # they are for the tasks
    folder, *texts = sys.argv[1:]
    try:
        code, limit, notice, *needed = map(int, texts)
        place = again(Path(folder), code, limit, notice, Need(*needed) if needed else None)
    except (ScaleprogError, OSError, ValueError) as error:
        say(f"the tasks do not start again inside the job: {error}")
        place = None
    if place is None:
        sys.exit(1)
    if needed:
        print(place.nodes, ",".join(place.lost))
