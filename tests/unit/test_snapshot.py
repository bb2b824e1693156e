"""Jobs run the code and the recipe that were copied into their run directory, not the working tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import slurm, snapshot
from launchers.requeue import STOPPED
from launchers.slurm import Request
from launchers.snapshot import JobFile
from scaleprog.reading import read_rows
from scaleprog.recipe import Recipe
from tests.conftest import MakeRecipe
from tests.unit.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[2]


def run_batch(arguments: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A batch script as job 7 would run it, in an environment of Slurm's."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "scaleprog", "SLURM_SUBMIT_DIR": str(cwd)}
    environment["SLURM_JOB_NUM_NODES"] = "2"
    environment["PYTHON"] = sys.executable
    return subprocess.run(
        ["bash", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_batch_script_requeues_from_its_snapshot(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a b'$(touch ruined);"
    file = slurm.submit(make_recipe(), run, Request())
    (script,) = run.glob("jobs/*/7_submission.sh")
    fake.command("srun", 'echo "$PYTHONPATH" > python-path; exit 137')
    done = run_batch([script], tmp_path)
    assert done.returncode == 137, done.stderr
    assert (tmp_path / "python-path").read_text().split(":")[0].strip() == str(run / file.code)
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    assert "a task was killed, exit code 137" in done.stderr
    assert not (tmp_path / "ruined").exists()
    fake.command("srun", "exit 0")
    assert run_batch([script], tmp_path).returncode == 0
    assert len(read_rows(run / "requeues.jsonl")) == 1
    fake.command("srun", "exit 140")  # by SIGUSR2, before training
    assert run_batch([script], tmp_path).returncode == STOPPED, "not with what srun ended with"


def test_train_sbatch(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    script, recipe, run = ROOT / "slurm" / "train.sbatch", tmp_path / "my recipe.yaml", tmp_path / "a run"
    recipe.write_text(make_recipe().dump())
    fake.command("srun", "exit 1")
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 2
    assert f"scaleprog: {run}: not there on every node" in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol"))
    seen = 'case $* in *bash*) exec "${@:3}" ;; esac'  # what is to be asked on every node, asked here
    fake.command("srun", f'{seen}; printf "%s\\n" "$PYTHONPATH" "$@" > "{tmp_path}/srun-arguments"; exit 1')
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 1, done.stderr
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
    assert Recipe.load(run / "recipe.yaml").seed == 3
    file = JobFile.read(run)
    assert file is not None
    path, *arguments = (tmp_path / "srun-arguments").read_text().splitlines()
    assert path.split(":")[0] == str(run / file.code)
    assert arguments[-4:] == ["-u", "-m", "launchers.task", str(run)]
    assert {"--kill-on-bad-exit=1", "--wait=60"} <= set(arguments)

    fake.command("srun", f"{seen}; exit 140")
    assert run_batch([script, recipe, "a run"], tmp_path).returncode == STOPPED
    (run / "job.json").write_text('{"job": "6", "name": "", "code": "of a job that was refused"}')
    (run / "owner.json").write_text('{"job": "7", "restart": 0, "generation": 1, "pid": 1, "host": "node0"}')
    assert run_batch([script, recipe, "a run", "seed=3"], tmp_path).returncode == STOPPED, "it is its own run directory"

    recipe.write_text("seed: edited while the job was queued again")
    fake.command("srun", "exit 0")
    assert run_batch([script, recipe, "a run"], tmp_path).returncode == 0
    assert Recipe.load(run / "recipe.yaml").seed == 3

    calls = len(fake.calls("scontrol"))
    done = run_batch([script, recipe, "another run"], tmp_path)
    assert done.returncode == 2
    assert "scaleprog: " in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol")[calls:])
    assert not (tmp_path / "another run" / "recipe.yaml").exists()
    assert run_batch([script, recipe], tmp_path).stderr.startswith("usage: sbatch")


def test_a_snapshot_does_not_follow_the_working_tree(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, run = tmp_path / "tree", tmp_path / "run"
    for package in snapshot.PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(snapshot.launchers, "__file__", str(tree / "launchers" / "__init__.py"))
    before = snapshot.take(make_recipe(), run)
    assert snapshot.take(make_recipe(), run) == before == snapshot.code_folder(run)
    (tree / "scaleprog" / "__init__.py").write_text('__version__ = "edited"\n')
    after = snapshot.take(make_recipe(), run)
    versions = []
    for code in (before, after):
        environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        told = subprocess.run(
            [sys.executable, "-c", "import scaleprog; print(scaleprog.__file__, scaleprog.__version__)"],
            cwd=tree, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        file, version = told.stdout.split()
        assert Path(file).is_relative_to(code)
        versions.append(version)
    assert versions[0] != versions[1] == "edited"
