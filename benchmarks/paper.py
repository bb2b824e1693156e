"""The paper's Tables 2 to 8 and Figure 4 at micro scale: trains grids/paper.yaml, writes docs/results/paper.md.

    python -m benchmarks.paper [--recipes FILE ...] [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out DIR] [--only-table]

Runs are trained as by `benchmarks.search_lab`, all families of a seed before the next seed. One that was interrupted
resumes, and a finished one is not trained again, on any machine: OUT/paper keeps its record and what the tables read of
its directory. So the command may be stopped and started at any time. For Table 3, weights are fine-tuned on the digits
right after their own run. With `--only-table`, nothing is trained: the tables show the runs that have finished.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.prices import pooled
from benchmarks.search_lab import Case, Grid, Record, Records, Trial, attempt
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.reporting.figures import COST
from scaleprog.reporting.paper_tables import Costs, Energy, write_paper
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.records import EVALUATIONS, EVENTS, METRICS, RESULTS
from scaleprog.training.evaluate_run import Request, evaluate_run
from scaleprog.training.finetune import transfer_recipe
from scaleprog.training.loop import train_rank

GRID = Path("benchmarks/grids/paper.yaml")
RECIPES = ("configs/micro/deit.yaml", "configs/micro/volo.yaml")
TABLES, FIGURES = (2, 3, 4, 5, 6, 7, 8), (4,)
TRANSFERRED = "Original", "AutoProg 0.5 Ω as published", "AutoProg 0.5 Ω within a budget"
"""The cases whose weights Table 3 fine-tunes."""
DIGITS = Path("data/digits")
FINE_TUNING = (
    "train.epochs=30", "train.batch=64", "optimizer.lr=3e-3", "optimizer.min_lr=3e-5", "optimizer.warmup_epochs=2",
    "evaluate.every=30", "augment.color_jitter=0", "augment.randaugment=null", "augment.mixup=0", "augment.cutmix=0",
    "augment.smoothing=0", "augment.repeats=1", "augment.crop=padded", "augment.padding=2", "augment.flip=0",
    "sharding.precision=fp32", "sharding.engine=replicated", "data.lanes=8", "data.workers=1",
)  # fmt: skip
"""How this differs from `scaleprog finetune`: the digits are 897 small gray images, and a mirrored one is no digit."""


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
    finished = [trial for trial in trials if trial in records]
    folders = [folder for trial in whole_seeds(trials, records) or finished for folder in trial.kept_runs]
    spent = pooled(finished, records)
    print(write_paper(folders, options.out, TABLES, FIGURES, Energy(), Costs(COST, spent)))


class PaperTrial(Trial):
    """A trial of which `kept` gets a run directory that is small enough to be committed."""

    def __init__(self, case: Case, seed: int, runs: Path, out: Path) -> None:
        super().__init__(case, seed, runs)
        self.kept_runs = [out / self.digest]
        if case.name in TRANSFERRED:
            self.kept_runs.append(out / f"{self.digest}-digits")

    def do(self) -> Record:
        """Trains to the end, measures Top-1@288, fine-tunes where Table 3 wants it, and keeps what the tables read."""
        record = super().do()
        if not (self.folder / EVALUATIONS).exists():
            evaluate_run(self.folder, Request(enlarged(self)))
        keep(self.folder, self.kept_runs[0])
        for kept in self.kept_runs[1:]:
            tuned = self.fine_tune()
            keep(tuned, kept)
            recipe = (tuned / RECIPE).read_text().replace(str(self.folder), str(self.kept_runs[0]))
            (kept / RECIPE).write_text(recipe)  # names what is kept of the run whose weights it took
        return record

    def fine_tune(self) -> Path:
        """Trains its weights on the digits; returns the run directory."""
        folder = self.folder.with_name(f"{self.digest}-digits")
        with open(f"{folder}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            train_rank(transfer_recipe(self.folder, DIGITS, [*FINE_TUNING, f"seed={self.seed}"]), folder)
        return folder


def whole_seeds(trials: Sequence[PaperTrial], records: Records) -> list[PaperTrial]:
    """The trials of the seeds of which every row of a recipe has finished, so that rows have the same seeds."""
    begun = {(trial.case.recipe, trial.seed) for trial in trials if trial not in records}
    return [trial for trial in trials if (trial.case.recipe, trial.seed) not in begun]


def keep(run: Path, kept: Path) -> None:
    """Copies what the tables read of a run directory."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in (RECIPE, EVENTS, EVALUATIONS, RESULTS):
        if (run / name).exists():
            shutil.copy(run / name, kept)
    lines = (json.dumps(row) + "\n" for row in telling(read_rows(run / METRICS)))
    (kept / METRICS).write_text("".join(lines))


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
