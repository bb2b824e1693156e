"""Runs inside an allocation of `salloc`, whose shell starts plain processes: each of them is a start of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.recipe import Recipe
from scaleprog.rundir.lease import read_owner
from tests.conftest import short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.job import ROOT, SECONDS

LONG = {"train": {"epochs": 2000}, "growth": {"schedule": "original"}, "evaluate": {"every": 2000}}


@pytest.fixture(scope="module")
def recipe(patterns: Path) -> Recipe:
    return short_recipe(patterns, **LONG)


def until(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"not {what}"
        time.sleep(0.2)


def test_a_start_in_a_shell_of_salloc_is_a_process(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(recipe.dump())
    scaleprog = f"{sys.executable} -m scaleprog"
    train = f"{scaleprog} train {file} --run-dir={run}"
    environment = {**cluster.env, "PYTHONPATH": str(ROOT)}
    variables = tmp_path / "variables"

    def told(command: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(command, shell=True, env=environment | more, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    script = f"env > {variables}.new; mv {variables}.new {variables}; setsid {train} & exec sleep 300"
    with subprocess.Popen(["salloc", "-K", "-N1", "bash", "-c", script], env=environment) as allocation:
        try:
            until("training", lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
            slurm = dict(line.split("=", 1) for line in variables.read_text().splitlines() if line.startswith("SLURM_"))
            owner = read_owner(run)
            assert owner is not None
            assert (slurm["SLURM_JOB_ID"].isdigit(), owner.job) == (True, None)
            for shell in (slurm, {}):  # beside it in the same allocation, and outside
                code, text = told(train, **shell)
                assert (code, f"is in use by process {owner.pid}" in text) == (2, True), text
                assert "running (process" in told(f"{scaleprog} status {run}", **shell)[1]
        finally:
            allocation.terminate()
            allocation.wait(timeout=SECONDS)
    until("over", lambda: cluster.show(slurm["SLURM_JOB_ID"])["JobState"] != "RUNNING")
    outlived = {**slurm, "SLURM_JOB_END_TIME": str(int(time.time()) + 5)}
    try:
        code, text = told(train, **outlived)
        assert (code, f"is in use by process {owner.pid}" in text) == (2, True), text
        assert "running (process" in told(f"{scaleprog} status {run}", **outlived)[1]
        code, text = told(f"{scaleprog} cancel {run}", **outlived)
        assert (code, f"asked process {owner.pid}" in text) == (0, True), text
        until("stopped", lambda: "stopped" in told(f"{scaleprog} status {run}")[1])
    finally:
        if Path(f"/proc/{owner.pid}").exists():
            os.kill(owner.pid, signal.SIGKILL)
    code, text = told(f"{scaleprog} train {file} train.epochs=1 --run-dir={tmp_path / 'another'}", **outlived)
    assert (code, "time limit" in text) == (0, False), text
