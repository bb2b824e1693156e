"""The paper's Tables 2 and 4 to 8 and Figure 4 at micro scale: trains grids/paper.yaml, writes docs/results/paper.md.

    python -m benchmarks.paper [--recipes FILE ...] [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out DIR] [--only-table]

Runs are trained as by `benchmarks.search_lab`, all families of a seed before the next seed. One that was interrupted
resumes, and a finished one is not trained again, on any machine: OUT/paper keeps its record and what the tables read of
its directory. So the command may be stopped and started at any time. With `--only-table`, nothing is trained: the
tables show the runs that have finished.
"""

import argparse
import json
import os
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.search_lab import Case, Grid, Record, Records, Trial, attempt
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.reporting.paper_tables import Energy, write_paper
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.records import EVALUATIONS, EVENTS, METRICS, RESULTS
from scaleprog.training.evaluate_run import Request, evaluate_run

GRID = Path("benchmarks/grids/paper.yaml")
RECIPES = ("configs/micro/deit.yaml", "configs/micro/volo.yaml")
TABLES, FIGURES = (2, 4, 5, 6, 7, 8), (4,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=Path, default=Path("runs/micro"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    options = parser.parse_args()
    cases = [case for recipe in options.recipes for case in Grid.load(GRID, recipe).cases]
    kept = options.out / "paper"
    trials = [PaperTrial(case, seed, options.runs, kept) for seed in options.seeds for case in cases]
    records = Records(kept / "records.jsonl")
    if not options.only_table:
        for record in attempt(trials, records, options.jobs):
            print(
                f"{record.name}, seed {record.seed}: {record.best:.2f} % at a cost of {record.cost:.0f} steps",
                flush=True,
            )
    finished = [trial.kept for trial in trials if trial in records]
    print(write_paper(finished, options.out, TABLES, FIGURES, Energy()))


class PaperTrial(Trial):
    """A trial of which `kept` gets a run directory that is small enough to be committed."""

    def __init__(self, case: Case, seed: int, runs: Path, out: Path) -> None:
        super().__init__(case, seed, runs)
        self.kept = out / self.digest

    def do(self) -> Record:
        """Trains to the end, measures Top-1@288, and keeps what the tables read."""
        record = super().do()
        if not (self.folder / EVALUATIONS).exists():
            evaluate_run(self.folder, Request(enlarged(self)))
        self.kept.mkdir(parents=True, exist_ok=True)
        for name in (RECIPE, EVENTS, EVALUATIONS, RESULTS):
            shutil.copy(self.folder / name, self.kept)
        lines = (json.dumps(row) + "\n" for row in telling(read_rows(self.folder / METRICS)))
        (self.kept / METRICS).write_text("".join(lines))
        return record


def telling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, the steps after which they were made, and the first and last step of each phase."""
    steps = [row for row in rows if "loss" in row]
    shown = {row["step"] for row in rows if "loss" not in row}
    for _, phase in groupby(steps, lambda row: (row["stage"], row["phase"])):
        own = [row["step"] for row in phase]
        shown |= {own[0], own[-1]}
    return [row for row in rows if row["step"] in shown]


def enlarged(trial: Trial) -> int:
    """The side of test images for a run's Top-1@288, in pixels: 9/7 of the full size, rounded to whole patches."""
    model = trial.recipe.model
    assert model.resolution is not None
    assert model.patch is not None
    stride = model.patch * (2 if model.name.startswith("volo") else 1)
    return round(model.resolution * 288 / 224 / stride) * stride


if __name__ == "__main__":
    main()
