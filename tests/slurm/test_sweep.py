"""A sweep as an array of a real Slurm: its jobs are preempted, start again by themselves, and finish their runs."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scaleprog.launchers.snapshot import JobFile
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.records import REQUEUES
from tests.conftest import short_recipe
from tests.slurm.cluster import Cluster, Settings
from tests.slurm.control import Control
from tests.slurm.job import HOOK, ROOT, SECONDS

STEPS = 40
NAMES = [f"lr={lr}_seed{seed}" for lr in ("1e-3", "2e-3") for seed in range(3)]


def until(what: str, condition: Callable[[], bool], cluster: Cluster) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"not {what}\n{cluster.run(['squeue']).stdout}{cluster.log()}"
        time.sleep(0.3)


def test_six_runs_finish_in_spite_of_two_preemptions(cluster: Cluster, patterns: Path, tmp_path: Path) -> None:
    cluster.up(Settings(grace=60))
    recipe = short_recipe(
        patterns, train={"epochs": 2, "log_every": 1}, growth={"schedule": "original"}, evaluate={"every": 2}
    )
    file, folder, control = tmp_path / "recipe.yaml", tmp_path / "a sweep", Control(tmp_path)
    file.write_text(recipe.dump())
    runs = [folder / name for name in NAMES]
    environment = [f"PYTHONPATH={HOOK}{os.pathsep}{ROOT}", f"CONTROL={tmp_path}"]
    environment += ["TASK_HOOKS=tests.slurm.control:install"]
    sweep = ["--sweep", "optimizer.lr=1e-3,2e-3", "seed=0:3", f"--run-dir={folder}"]

    def scaleprog(*words: str | Path) -> str:
        command = ["env", f"--chdir={ROOT}", *environment, sys.executable, "-m", "scaleprog", *words]
        done = cluster.run(command, seconds=SECONDS)
        return done.stdout + done.stderr

    def leavings() -> list[dict[str, object]]:
        return [row for run in runs for row in read_rows(run / REQUEUES) if row["preempted"]]

    def preempt() -> None:
        """A job of the other partition takes all nodes, after some run has trained steps since its start."""
        before, trained = len(leavings()), [len(read_rows(run / "metrics.jsonl")) for run in runs]
        until(
            "training",
            lambda: any(len(read_rows(run / "metrics.jsonl")) > old for run, old in zip(runs, trained)),
            cluster,
        )
        cluster.run(["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"])
        until("preempted", lambda: len(leavings()) > before, cluster)

    control.slow_down(0.5)
    told = scaleprog("submit", file, *sweep, "--jobs", "3", "--time", "60")
    assert "an array of 6 jobs, each of 1 x 1 ranks, for 6 of 6 runs" in told
    array = told.split()[1].rstrip(":")
    jobs = [JobFile.read(run) for run in runs]
    assert [job and job.job for job in jobs] == [f"{array}_{index}" for index in range(6)]
    preempt()
    preempt()
    control.slow_down(0)
    until("finished", lambda: all((run / "results.json").exists() for run in runs), cluster)

    assert len(leavings()) >= 2
    for run in runs:
        steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
        assert steps == list(range(1, STEPS + 1)), run.name
        assert {row["job"] for row in read_rows(run / REQUEUES)} <= {job.job for job in jobs if job}, run.name
    statuses = json.loads(scaleprog("status", "--json", folder))
    assert [(Path(each["run"]).name, each["state"]) for each in statuses] == [(name, "finished") for name in NAMES]
    assert sum(len(each["restarts"]) for each in statuses) >= 2
    scaleprog("report", folder, "--out", tmp_path / "report")
    means = (tmp_path / "report" / "report.md").read_text().split("## Over the seeds")[1].split("##")[0]
    assert [line.split("|")[1].strip() for line in means.splitlines()[4:6]] == ["lr=1e-3", "lr=2e-3"]
    told = scaleprog("submit", file, *sweep)
    assert "nothing to submit" in told
    assert "finished, so left out: " + ", ".join(NAMES) in told
