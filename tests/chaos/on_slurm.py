"""Faults that come from outside, to a run that is a Slurm job."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

from scaleprog.recipe import Recipe
from tests.chaos.faults import GO_ON, IN_JOB, STRUCK, Fault
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.job import BOTH, TrainingJob

__all__ = ["BOTH", "run"]
SECONDS = 150.0


def run(cluster: Cluster, fault: Fault, recipe: Recipe, folder: Path, ranks: int) -> None:
    """Trains `recipe` as a job under the fault, to the end. Raises TimeoutError or RuntimeError with what is known."""
    cluster.up(Settings(user_signal=fault.kind != "preemption, TERM"))
    nodes = 1 if fault.kind == "network cut" else ranks  # what is cut off must be able to train on
    os.environ |= {"CHAOS_FAULT": json.dumps(asdict(fault)), "CHAOS_RUN": str(folder)}  # for the hook, by way of sbatch
    by = "submit" if fault.by == "submit" else "sbatch"
    job = TrainingJob(cluster, recipe, folder, by, nodes, ranks // nodes, hooks=("tests.chaos.faults:arm_task",))
    job.submit()
    job.wait(f"at {fault.moment}", (folder / STRUCK).exists, SECONDS)
    there = job.wait("on its nodes", lambda: cluster.job_nodes(job.id), SECONDS)
    first, node = there[0], there[-1]
    if fault.kind.startswith("preemption"):
        cluster.run(["sbatch", "--partition=high", f"--nodes={Settings().nodes}", "--exclusive",
                     "--output=/dev/null", "--wrap", "true"])  # fmt: skip
    elif fault.kind == "scontrol requeue":
        cluster.run(["scontrol", "requeue", job.id])
    elif fault.kind == "time limit":
        cluster.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=2"])
    elif fault.kind == "task killed":
        os.kill(job.processes(fault.rank)[0], signal.SIGKILL)
    elif fault.kind == "parted nodes":
        cluster.part(first, node)
        (folder / GO_ON).touch()
        job.wait("it hangs", lambda: len(list(folder.glob("stacks/*.txt"))) == ranks, SECONDS)
        cluster.part(first, node, undo=True)  # otherwise srun waits for what the task on the other node would say
    elif fault.kind == "power cut":
        cluster.kill_node(node)
    else:
        cluster.cut_net(node)

    if fault.kind == "power cut":
        job.wait_state("RUNNING", "COMPLETED", restarts=1)
    elif fault.kind == "network cut":
        job.wait("started anew", lambda: len(job.events("start")) == 2, SECONDS)
    elif fault.kind in IN_JOB:
        job.wait("started again in the job", lambda: job.repeats == 1, SECONDS)
    else:
        job.wait("signalled", job.signals, SECONDS)
    (folder / GO_ON).touch()
    if fault.kind == "network cut":
        job.wait("refused", lambda: "was superseded by" in job.log(), SECONDS)
    job.wait_state("COMPLETED")
