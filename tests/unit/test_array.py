"""`scaleprog submit --sweep`: what sbatch gets, which runs are left out, and what the run directories hold."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from scaleprog.errors import ScaleprogError
from scaleprog.launchers import array, slurm
from scaleprog.launchers.attempt import Attempt
from scaleprog.launchers.request import JobRequest
from scaleprog.launchers.snapshot import JobFile
from scaleprog.launchers.world import Count
from scaleprog.recipe import Recipe
from scaleprog.rundir import slurm_queue
from tests.conftest import MakeRecipe
from tests.unit.command import Command, WriteRecipe, is_mistake
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

TASK = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
NOT_FOUND = "Job 7_1 not found"
RESULTS = {
    "stages": [],
    **dict.fromkeys(("top1", "top1_ema", "top1_best"), 9.0),
    **dict.fromkeys(("train_seconds", "train_cpu_seconds", "search_seconds", "wall_seconds"), 1.0),
}


def show_only(fake: FakeSlurm, job: str) -> None:
    """Makes Slurm know one job of an array, which is the sweep's; it has forgotten the others."""
    known = f"sed s/scaleprog-a.b/{slurm.job_name(Path('sweep'))}/ {fake.folder}/shown"
    fake.command("scontrol", f'case "$*" in *{job}) {known};; *) echo "Job ${{@: -1}} not found"; exit 1;; esac')


def test_a_task_of_an_array_has_an_id_of_its_own() -> None:
    assert Attempt.current(TASK) == Attempt("17_2", 1)
    assert slurm_queue.own_job({"SLURM_JOB_ID": "17"}) == "17"
    assert slurm_queue.own_job({**TASK, "SLURM_ARRAY_TASK_ID": "-o"}) is None
    assert slurm_queue.own_job({}) is None


def test_slurm_is_asked_about_one_task(fake: FakeSlurm) -> None:
    fake.show(state="PENDING")  # its JobId is 7, that of the array
    job = slurm_queue.find("7_1")
    assert job is not None
    assert (job.id, job.state) == ("7_1", "PENDING")
    fake.command("scontrol", f"echo '{NOT_FOUND}'; exit 1")  # canceled before it started
    assert slurm_queue.find("7_1") is None
    fake.command("scontrol", "echo 'StepId=7_1.batch State=RUNNING'; echo 'StepId=7_1.0 State=RUNNING'")
    assert [slurm_queue.step_is_over("7_1", step) for step in "01"] == [False, True]


def test_the_array(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "a sweep's"
    runs = {folder / f"lr={i}_seed0": make_recipe(seed=i) for i in (1, 2, 3)}
    files = array.submit(runs, folder, JobRequest(nodes=Count(1, 2), time="10"), at_once=2)
    for index, (run, recipe) in enumerate(runs.items()):
        assert JobFile.read(run) == files[run]
        assert (files[run].job, Recipe.of_run(run)) == (f"7_{index}", recipe)
        assert (run / files[run].code / "scaleprog" / "launchers" / "task.py").is_file()
        assert (run / files[run].log).parent.is_dir()
    assert len(list(folder.glob("code/*"))) == 1, "one copy of the code for all"
    (script,) = folder.glob("jobs/*/7_submission.sh")
    text = script.read_text()
    assert "#SBATCH --array=0-2%2\n" in text
    assert "#SBATCH --nodes=1-2\n" in text
    lines = "\n".join(line for line in text.splitlines() if line.startswith(("RUNS=", "RUN=")))
    told = subprocess.run(["bash", "-c", f"{lines}; echo $RUN"], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True)
    assert told.stdout.decode().strip() == str(folder / "lr=2_seed0")
    (srun,) = (line for line in text.splitlines() if line.startswith("srun"))
    assert shlex.split(srun)[-3:] == ["-m", "scaleprog.launchers.task", "$RUN"]
    assert text.count('scaleprog.launchers.requeue "$RUN" "$1" 20 120') == 1


def test_jobs_of_an_array_are_alike(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = {tmp_path / "s" / str(workers): make_recipe(data={"workers": workers}) for workers in (0, 2)}
    with pytest.raises(ScaleprogError, match=r"jobs of an array are alike, .* 2 cores .* 4 cores|4 cores .* 2 cores"):
        array.submit(runs, tmp_path / "s", JobRequest())
    assert "#SBATCH --cpus-per-task=4\n" in array.script(runs, tmp_path / "s", JobRequest(cpus_per_task=4))
    fake.command("sbatch", "echo 'sbatch: error: Invalid job array specification' >&2; exit 1")
    with pytest.raises(ScaleprogError, match="Slurm refuses the jobs: sbatch: error: Invalid job array"):
        array.submit(runs, tmp_path / "s", JobRequest(cpus_per_task=4))
    assert not (tmp_path / "s").exists()


def test_what_is_left_of_a_sweep_is_submitted(
    fake: FakeSlurm, command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = ("submit", write_recipe(), "--run-dir", folder, "--sweep", "seed=0:3")
    told = command(*words)
    assert (told.code, told.out.splitlines()[0]) == (
        0, "job 7: an array of 3 jobs, each of 1 x 1 ranks, for 3 of 3 runs"
    )  # fmt: skip
    show_only(fake, "7_0")
    (folder / "seed2" / "results.json").write_text(json.dumps(RESULTS))
    told = command(*words, "--dry-run")
    assert "queued or in training, so left out: seed0\n" in told.err
    assert "finished, so left out: seed2\n" in told.err
    assert "RUNS=(seed1)\n" in told.out
    told = command("status", folder, fake.folder, folder / "seed0")
    assert [line.split()[:2] for line in told.out.splitlines()[1:]] == [
        ["sweep/seed0", "running"], ["sweep/seed1", "stopped"], ["sweep/seed2", "finished"],
    ]  # fmt: skip
    assert f"left out: no run in {fake.folder}\n" in told.err
    assert is_mistake(command("cancel", folder), "seed0: ", "does not name this run directory")
    (script,) = folder.glob("jobs/*/7_submission.sh")
    fake.show(command=f" Command={script} WorkDir=/ StdErr=/x")
    show_only(fake, "7_0")
    told = command("cancel", folder)
    assert told.out.startswith("seed0: canceled job 7_0, which was RUNNING"), told
    assert fake.calls("scancel") == ["scancel 7_0"]
    assert is_mistake(command("submit", write_recipe(), "--jobs", "2"), "--jobs 2: only a sweep")
