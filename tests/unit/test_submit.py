"""`scaleprog submit`: what is refused, what sbatch gets, and what the batch script says."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaleprog.errors import CheckpointError, DataError, ScaleprogError
from scaleprog.launchers import slurm
from scaleprog.launchers.slurm import JobRequest
from scaleprog.launchers.snapshot import JobFile
from scaleprog.launchers.world import Count
from scaleprog.recipe import Recipe
from tests.conftest import MakeRecipe
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("2-0:0:5", 172805)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert slurm.seconds(limit) == expected


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (JobRequest(time="soon"), "--time soon: not a time"),
        (JobRequest(time="3"), "--time 3 leaves no time for training.* request 4 min or more"),
        (JobRequest(time="5", signal_before=300), "--time 5 leaves no time for training"),
        (JobRequest(gpus_per_node=2, tasks_per_node=4), "--tasks-per-node 4: each GPU gets one task"),
        (JobRequest(options=("nodes=3",)), "--sbatch nodes=3: use --nodes instead"),
        (JobRequest(options=("cpus_per_task=3",)), "--sbatch cpus_per_task=3: use --cpus-per-task instead"),
        (JobRequest(options=("array=1-3",)), "--sbatch array=1-3: scaleprog sets array itself"),
        (JobRequest(options=("-N3",)), "--sbatch -N3: write KEY or KEY=VALUE"),
        (JobRequest(options=("comment=a\n#SBATCH --uid=0",)), "write KEY or KEY=VALUE"),
        (JobRequest(qos="a\nb"), "--qos: must be one line"),
        (JobRequest(nodes=Count(3, 3)), "3 ranks do not divide data.lanes, 4"),
        (JobRequest(nodes=Count(2, 2), gpus_per_node=4), "8 ranks do not divide data.lanes, 4"),
    ],
)
def test_what_cannot_work_is_refused(
    request_: JobRequest, message: str, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(ScaleprogError, match=message):
        slurm.submit(make_recipe(), tmp_path / "run", request_)
    assert not (tmp_path / "run").exists()
    assert fake.calls("sbatch") == []


def test_the_cluster_is_asked(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    with pytest.raises(ScaleprogError, match="--partition hgih: no such partition; available: low, high"):
        slurm.submit(recipe, run, JobRequest(partition="low,hgih"))
    with pytest.raises(DataError):
        slurm.submit(make_recipe(data={"path": str(tmp_path / "gone")}), run, JobRequest())
    with pytest.raises(ScaleprogError, match="Slurm would replace the %"):
        slurm.submit(recipe, tmp_path / "50%", JobRequest())
    fake.command("sbatch", "echo 'sbatch: error: invalid account or qos' >&2; exit 1")
    with pytest.raises(ScaleprogError, match="Slurm refuses the job: sbatch: error: invalid account or qos"):
        slurm.submit(recipe, run, JobRequest(qos="mine"))
    assert not run.exists()


def test_no_slurm(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ScaleprogError, match="no Slurm on this machine: sbatch not found"):
        slurm.submit(make_recipe(), tmp_path / "run", JobRequest())
    assert "#SBATCH --nodes=2\n" in slurm.script(make_recipe(), tmp_path / "run", JobRequest(nodes=Count(2, 2)))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(ScaleprogError, match=r"submitit is not installed; run pip install 'scaleprog\[slurm\]'"):
        slurm.script(make_recipe(), tmp_path / "run", JobRequest())


def test_submit(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    file = slurm.submit(recipe, run, JobRequest(nodes=Count(2, 2), time="10", partition="high"))
    assert (file.job, file.name) == ("7", "scaleprog-run")
    assert JobFile.read(run) == file
    assert Recipe.load(run / "recipe.yaml") == recipe
    copied = run / file.code / "scaleprog" / "launchers" / "task.py"
    assert copied.read_text() == (ROOT / "launchers" / "task.py").read_text()
    assert list(run.glob("jobs/*/7_submitted.pkl"))
    assert not list(run.glob("jobs/*/*result*"))

    fake.show(state="PENDING")
    fake.command("scontrol", f"sed s/scaleprog-a.b/scaleprog-run/ {fake.folder}/shown")
    with pytest.raises(CheckpointError, match="belongs to job 7, which is PENDING; cancel it with `scaleprog cancel"):
        slurm.submit(recipe, run, JobRequest())
    fake.show(state="FAILED")
    with pytest.raises(CheckpointError, match=r"run directory of another recipe:\n  seed: 1 here, 0 there"):
        slurm.submit(make_recipe(seed=1), run, JobRequest())
    assert Recipe.load(run / "recipe.yaml") == recipe
    assert slurm.submit(recipe, run, JobRequest()).job == "7"


def test_script(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    request = JobRequest(
        nodes=Count(2, 2), gpus_per_node=2, cpus_per_task=3, time="2:00:00", account="me", qos="long", signal_before=90,
        options=("mem=4G", "exclusive", "constraint=a&b"), max_restarts=5,
    )  # fmt: skip
    text = slurm.script(make_recipe(), tmp_path / "run", request)
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    log = options & {o for o in options if o.startswith("output=")}
    assert options - log == {
        "nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=3", "time=2:00:00", "account=me", "qos=long",
        "signal=USR2@90", "mem=4G", "exclusive", "constraint='a&b'", "requeue", "open-mode=append",
        "job-name=scaleprog-run",
    }  # fmt: skip
    (srun,) = (shlex.split(line) for line in text.splitlines() if line.startswith("srun"))
    assert {"--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=3"} <= set(srun)
    assert "time=" not in slurm.script(make_recipe(), tmp_path / "run", JobRequest())  # the partition's own
    (threads,) = (line for line in text.splitlines() if "OMP_NUM_THREADS" in line)
    assert threads in (ROOT / "slurm" / "train.sbatch").read_text().splitlines()
    for given, expected in (({}, "1"), ({"SLURM_CPUS_PER_TASK": "3"}, "3"), ({"OMP_NUM_THREADS": "2"}, "2")):
        told = subprocess.run(["bash", "-c", f"{threads}; echo $OMP_NUM_THREADS"], env=given, capture_output=True)
        assert told.stdout.decode().strip() == expected


@pytest.mark.parametrize(
    ("workers", "given", "cores"),
    [(4, None, 6), (0, None, 2), (4, 6, 6), (4, 9, 9), (0, 1, 1), (4, 5, None), (1, 1, None)],
)
def test_each_rank_has_cores_for_its_workers_and_itself(
    workers: int, given: int | None, cores: int | None, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, request = make_recipe(data={"workers": workers}), JobRequest(cpus_per_task=given)
    if cores is None:
        message = f"--cpus-per-task {given}: .* data.workers, {workers}, .* use --cpus-per-task {workers + 2} or more"
        with pytest.raises(ScaleprogError, match=message):
            slurm.script(recipe, tmp_path / "run", request)
        return
    lines = slurm.script(recipe, tmp_path / "run", request).splitlines()
    assert f"#SBATCH --cpus-per-task={cores}" in lines
    by_gpu = slurm.script(recipe, tmp_path / "run", JobRequest(options=("cpus-per-gpu=3",)))
    assert "cpus-per-task" not in by_gpu, "sbatch takes only one of the two"


def test_as_many_workers_as_cores_need_a_number_of_cores(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(data={"workers": "auto"})
    with pytest.raises(ScaleprogError, match=r"data\.workers: auto .*add --cpus-per-task"):
        slurm.script(recipe, tmp_path / "run", JobRequest())
    assert "#SBATCH --cpus-per-task=9" in slurm.script(recipe, tmp_path / "run", JobRequest(cpus_per_task=9))
    assert "cpus-per-task" not in slurm.script(recipe, tmp_path / "run", JobRequest(options=("cpus-per-gpu=3",)))


def test_a_node_without_the_cores_is_named_before_the_queue(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    fake.command("sinfo", 'case "$*" in *%c*) echo "8 low*"; echo "16 high";; *) echo low; echo high;; esac')
    recipe, request = make_recipe(data={"workers": 4}), JobRequest(tasks_per_node=2)
    with pytest.raises(
        ScaleprogError, match=r"2 tasks per node with 6 cores each .* need 12 cores, .* has 8; lower data"
    ):
        slurm.submit(recipe, tmp_path / "run", request)
    fake.command("sinfo", 'case "$*" in *%c*) echo "16 high";; *) echo low; echo high;; esac')
    assert slurm.submit(recipe, tmp_path / "run", replace(request, partition="high")).job == "7"
