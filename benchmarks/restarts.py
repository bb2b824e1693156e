"""What a run on a real Slurm loses to faults, where its job is requeued or starts its ranks again itself.

    python -m benchmarks.restarts [--steps 900] [--every 120] [--seed 13] [--out docs/results/restarts.md]

Two ranks on two nodes of the development cluster train a small network, whose steps are made a third of a second longer
by sleeping, so that other programs on the machine hardly lengthen them. Faults come at random while the ranks train:
one rank is killed, or the node that does not hold the batch script loses its power, and gets it back a minute later. A
job does not get a lost node back before it is requeued, so spare nodes run out. With the default seed, as many faults
strike as on average: three, after 36, 175, and 313 s of training, in every case.
Wall time is from the first launch of ranks to the last step. The queue is empty, and holds a requeued job for 6 s, not
for 121 s as Slurm's default does; Slurm notices a lost node after some 20 s, not after minutes. So a real cluster's
requeues cost more.

A case that has finished is not run again: its row is in restarts.jsonl beside the table.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import random
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.slurm_queue import OVER
from tests.conftest import draw_patterns, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import own_number
from tests.slurm.job import TrainingJob

SLEEP, REPAIR_SECONDS, SAVE_STEPS, STEPS_PER_EPOCH, POLL_SECONDS = 0.33, 60.0, 25, 20, 0.1


@dataclass(frozen=True)
class Case:
    """What strikes a run (nothing, "rank", or "node"), and how its job is submitted."""

    strikes: str
    options: dict[str, str]


CASES = {
    "no fault": Case("", {}),
    "a rank is killed; requeued": Case("rank", {"restart": "requeue"}),
    "a rank is killed; started again in the job": Case("rank", {}),
    "a node is lost; requeued": Case("node", {}),
    "a node is lost; two spare nodes": Case("node", {"spare_nodes": "2"}),
}


@dataclass(frozen=True)
class Row:
    """What was measured of a case: seconds, and counts.

    Args:
        wall: from the first launch of ranks to the last step.
        steps: of the run.
        faults: that have struck.
        requeues: starts by Slurm after the first.
        detection: from the faults to the end of all ranks.
        waiting: from there to the next launch.
        start_up: from there to the first step, in starts after the first.
        repeated: steps that were trained again.
    """

    wall: float
    steps: int
    faults: int
    requeues: int
    detection: float
    waiting: float
    start_up: float
    repeated: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--every", type=float, default=120.0, help="mean seconds of training between two faults")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--out", type=Path, default=Path("docs/results/restarts.md"))
    options = parser.parse_args()
    kept = options.out.with_suffix(".jsonl")
    with own_number() as number, tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(number)
        recipe = recipe_of(Path(folder), options.steps)
        try:
            for name, case in CASES.items():
                found = {row["case"]: row for row in (read_rows(kept) if kept.exists() else [])}
                if name not in found:
                    row = measure(cluster, recipe, Path(folder) / f"run-{len(found)}", case, options)
                    with kept.open("a") as lines:
                        lines.write(json.dumps({"case": name, **asdict(row)}) + "\n")
                options.out.write_text(page([*(read_rows(kept))], options.every))
        finally:
            cluster.down()
    print(options.out.read_text())


def recipe_of(folder: Path, steps: int) -> Recipe:
    """A run of so many steps that saves often enough for its faults."""
    return short_recipe(
        draw_patterns(folder / "shards"),
        train={"epochs": steps / STEPS_PER_EPOCH, "log_every": 1},
        checkpoint={"every_steps": SAVE_STEPS, "every_minutes": None},
        growth={"schedule": "original"},
        evaluate={"every": 1000},
    )


def measure(cluster: Cluster, recipe: Recipe, folder: Path, case: Case, options: Any) -> Row:
    """Trains the recipe as a job under the faults of a case."""
    cluster.up()
    job = TrainingJob(cluster, recipe, folder, "submit")
    job.control.slow_down(SLEEP)
    job.submit(**case.options)
    rng = random.Random(options.seed)
    struck: list[float] = []
    repairs: list[tuple[float, int]] = []
    due = rng.expovariate(1 / options.every) if case.strikes else None
    trained, looked = 0.0, time.time()
    while (state := job.show()["JobState"]) not in OVER:
        time.sleep(POLL_SECONDS)
        since, looked = time.time() - looked, time.time()
        for repair in [each for each in repairs if each[0] < time.time()]:
            repairs.remove(repair)
            cluster.start_node(repair[1])
        if due is None or not is_training(job, len(struck)):
            continue
        trained += since
        if trained >= due:
            trained, due = 0.0, rng.expovariate(1 / options.every)
            struck.append(time.time())
            if case.strikes == "rank":
                for pid in job.processes(rank=1):
                    os.kill(pid, signal.SIGKILL)
            else:
                node = training_nodes(job)[1]
                cluster.kill_node(node)
                repairs.append((time.time() + REPAIR_SECONDS, node))
    if state != "COMPLETED":
        raise RuntimeError(f"{folder}: {state}\n{job.told()}")
    return row_of(job, [at for at in struck if at < job.events("start")[-1]["time"]])


def is_training(job: TrainingJob, faults: int) -> bool:
    """Whether ranks train that no fault has struck yet."""
    return len(job.events("start")) > faults and len(job.processes(rank=1)) == 1


def training_nodes(job: TrainingJob) -> list[int]:
    """The nodes of the present start, by rank."""
    return [int(host.removeprefix("node")) for host in job.events("start")[-1]["hosts"]]


def row_of(job: TrainingJob, struck: list[float]) -> Row:
    """What the run directory tells of a finished run."""
    starts, rows = job.events("start"), [row for row in read_rows(job.run / "metrics.jsonl") if "loss" in row]
    launched = [start["time"] - start["startup_seconds"] for start in starts]
    ended = [row["time"] for row in job.requeues()]
    ends = [next((at for at in ended if a < at < b), b) for a, b in zip(struck, launched[1:])]
    return Row(
        wall=rows[-1]["time"] - launched[0],
        steps=rows[-1]["step"],
        faults=len(struck),
        requeues=job.restarts,
        detection=sum(end - fault for end, fault in zip(ends, struck)),
        waiting=sum(launch - end for launch, end in zip(launched[1:], ends)),
        start_up=sum(start["startup_seconds"] for start in starts[1:]),
        repeated=sum(start["repeated_steps"] for start in starts),
    )


def page(rows: list[dict[str, Any]], every: float) -> str:
    """The table, with the parts of what each case lost."""
    calm = rows[0]["wall"]
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    head = ("case", "faults", "requeues", "wall s", "of no fault", "detection s", "waiting s", "start-up s",
            "repeated steps")  # fmt: skip
    table = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = (
            row["case"], row["faults"], row["requeues"], f"{row['wall']:.0f}", f"{row['wall'] / calm:.2f}",
            f"{row['detection']:.0f}", f"{row['waiting']:.0f}", f"{row['start_up']:.0f}", row["repeated"],
        )  # fmt: skip
        table.append("| " + " | ".join(map(str, cells)) + " |")
    told = f"{about} A fault strikes after {every:g} s of training on average."
    return "\n\n".join(["Written by `python -m benchmarks.restarts`.", told, "\n".join(table)]) + "\n"


if __name__ == "__main__":
    main()
