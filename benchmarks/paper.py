"""The paper's Tables 2 and 4 to 8 and Figure 4 at micro scale: trains grids/paper.yaml, writes docs/results/paper.md.

    python -m benchmarks.paper [--recipes FILE ...] [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out DIR] [--only-table]

Runs are trained as by `benchmarks.search_lab`, all families of a seed before the next seed. One that was interrupted
resumes, and a finished one is not trained again, so the command may be stopped and started at any time. With
`--only-table`, nothing is trained: the tables show the runs that have finished.
"""

import argparse
import os
from pathlib import Path

from benchmarks.search_lab import Grid, Records, Trial, attempt
from scaleprog.reporting.paper_tables import Energy, write_paper
from scaleprog.rundir.records import EVALUATIONS
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
    trials = [Trial(case, seed, options.runs) for seed in options.seeds for case in cases]
    records = Records(options.runs / "records.jsonl")
    if not options.only_table:
        for record in attempt(trials, records, options.jobs):
            print(
                f"{record.name}, seed {record.seed}: {record.best:.2f} % at a cost of {record.cost:.0f} steps",
                flush=True,
            )
        for trial in trials:
            if trial in records and not (trial.folder / EVALUATIONS).exists():
                evaluate_run(trial.folder, Request(enlarged(trial)))
    print(write_paper([trial.folder for trial in trials if trial in records], options.out, TABLES, FIGURES, Energy()))


def enlarged(trial: Trial) -> int:
    """The side of test images for a run's Top-1@288, in pixels: 9/7 of the full size, rounded to whole patches."""
    model = trial.recipe.model
    assert model.resolution is not None
    assert model.patch is not None
    stride = model.patch * (2 if model.name.startswith("volo") else 1)
    return round(model.resolution * 288 / 224 / stride) * stride


if __name__ == "__main__":
    main()
