"""`scaleprog submit`: what is refused, what sbatch gets, and what the batch script says."""

import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaleprog.errors import AbsentWeights, CheckpointError, DataError, ScaleprogError
from scaleprog.launchers import request, slurm
from scaleprog.launchers.request import JobRequest
from scaleprog.launchers.snapshot import JobFile
from scaleprog.launchers.world import Count
from scaleprog.recipe import Recipe
from tests.conftest import RECIPES, MakeRecipe
from tests.unit.command import Command, WriteRecipe, is_mistake
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("1-2", 93600), ("1-2:30", 95400), ("2-0:0:5", 172805)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert request.seconds(limit) == expected


@pytest.mark.parametrize(
    ("run", "shown"),
    [
        ("deit_small_autoprog_100-seed0", "s0dsa100"), ("deit_small_original_100-seed0", "s0dso100"),
        ("deit_small_autoprog_300-seed12", "s12dsa30"), ("autoprog-seed1", "s1autopr"), ("prog-seed1", "s1prog-p"),
        ("volo_d1_operators_identity-seed0", "s0vd1oid"), ("volo_d1_operators_interpolation-seed0", "s0vd1oin"),
        ("lr=1e-3,seed=2", "l1e3s2-l"), ("my run", "myrun-my"), ("-", ""), ("läufe", "läufe-lä"),
    ],
)  # fmt: skip
def test_the_first_letters_of_a_jobs_name_tell_runs_apart(run: str, shown: str) -> None:
    name = slurm.job_name(Path("runs", run))
    assert name[:8] == shown
    assert name.endswith(run.lstrip("-"))


def test_the_recipes_of_a_folder_have_jobs_of_different_names() -> None:
    for folder in {path.parent for path in RECIPES}:
        names = [slurm.job_name(Path(f"{path.stem}-seed0"))[:8] for path in RECIPES if path.parent == folder]
        assert len(set(names)) == len(names), folder


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
        (JobRequest(options=("parsable",)), "--sbatch parsable: scaleprog sets parsable itself"),
        (JobRequest(options=("wait",)), "--sbatch wait: scaleprog sets wait itself"),
        (JobRequest(options=("-N3",)), "--sbatch -N3: write KEY or KEY=VALUE"),
        (JobRequest(options=("comment=a\n#SBATCH --uid=0",)), "write KEY or KEY=VALUE"),
        (JobRequest(qos="a\nb"), "--qos: must be one line"),
        (JobRequest(srun=("ntasks=3",)), "--srun ntasks=3: scaleprog sets ntasks itself"),
        (JobRequest(srun=("cpus_per_task=3",)), "--srun cpus_per_task=3: use --cpus-per-task instead"),
        (JobRequest(srun=("-n3",)), "--srun -n3: write KEY or KEY=VALUE, where KEY is a long option of srun"),
        (JobRequest(python="/opt/nowhere/python"), "--python /opt/nowhere/python: no such program here; .*--srun cont"),
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


def test_a_run_directory_stays_if_the_job_may_be_queued(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    fake.command("sbatch", "echo something unheard of")
    with pytest.raises(ScaleprogError, match=r"Slurm may have queued the job: .*; look at squeue"):
        slurm.submit(make_recipe(), tmp_path / "run", JobRequest())
    assert (tmp_path / "run" / "recipe.yaml").exists()


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
    assert (file.job, file.name, file.host) == ("7", "run-run", socket.gethostname())
    assert JobFile.read(run) == file
    assert Recipe.load(run / "recipe.yaml") == recipe
    copied = run / file.code / "scaleprog" / "launchers" / "task.py"
    assert copied.read_text() == (ROOT / "launchers" / "task.py").read_text()
    assert list(run.glob("jobs/*/7_submitted.pkl"))
    assert not list(run.glob("jobs/*/*result*"))

    fake.show(state="PENDING")
    fake.command("scontrol", f"sed s/scaleprog-a.b/run-run/ {fake.folder}/shown")
    with pytest.raises(CheckpointError, match="belongs to job 7, which is PENDING; follow it with `scaleprog status"):
        slurm.submit(recipe, run, JobRequest())
    fake.show(state="FAILED")
    with pytest.raises(CheckpointError, match=r"run directory of another recipe:\n  seed: 1 here, 0 there"):
        slurm.submit(make_recipe(seed=1), run, JobRequest())
    assert Recipe.load(run / "recipe.yaml") == recipe
    assert slurm.submit(recipe, run, JobRequest()).job == "7"


def test_variables_of_sbatch_win_over_no_option(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch script they would; others count as they do for sbatch."""
    for given in ("PARTITION=low", "TIMELIMIT=1", "NO_REQUEUE=", "JOB_NAME=x", "ACCOUNT=mine", "EXPORT=NONE"):
        monkeypatch.setenv(*f"SBATCH_{given}".split("="))
    fake.command("sbatch", f"env | grep ^SBATCH_ > {tmp_path}/told; echo Submitted batch job 7")
    slurm.submit(make_recipe(), tmp_path / "run", JobRequest(partition="high", time="10"))
    assert set((tmp_path / "told").read_text().splitlines()) == {"SBATCH_ACCOUNT=mine", "SBATCH_EXPORT=NONE"}
    assert os.environ["SBATCH_PARTITION"] == "low"


def test_a_run_whose_job_may_still_live_is_not_submitted(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    slurm.submit(make_recipe(), tmp_path / "run", JobRequest())
    fake.command("scontrol", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(ScaleprogError, match="Slurm does not say whether job 7 is over: Socket timed out"):
        slurm.submit(make_recipe(), tmp_path / "run", JobRequest())


def test_script(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    request = JobRequest(
        nodes=Count(2, 2), gpus_per_node=2, cpus_per_task=3, time="2:00:00", account="me", qos="long", signal_before=90,
        options=("mem=4G", "exclusive", "constraint=a&b"), max_restarts=5,
        srun=("container-image=a b.sqsh", "container_writable"), python="/opt/a b/python",
    )  # fmt: skip
    text = slurm.script(make_recipe(), tmp_path / "run", request)
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    log = options & {o for o in options if o.startswith("output=")}
    assert options - log == {
        "nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=3", "time=2:00:00", "account=me", "qos=long",
        "signal=USR2@90", "mem=4G", "exclusive", "constraint='a&b'", "requeue", "open-mode=append",
        "job-name=run-run",
    }  # fmt: skip
    (srun,) = (shlex.split(line) for line in text.splitlines() if line.startswith("srun"))
    assert {"--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=3"} <= set(srun)
    assert srun[srun.index("--container-image=a b.sqsh") + 1 :][:3] == ["--container-writable", "/opt/a b/python", "-u"]
    assert ' "$1" 5 90; exit' in text
    assert "time=" not in slurm.script(make_recipe(), tmp_path / "run", JobRequest())  # the partition's own
    (export,) = (line for line in text.splitlines() if "SLURM_EXPORT_ENV" in line)
    assert export in (ROOT / "slurm" / "train.sbatch").read_text().splitlines()
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


RESULTS = {
    "stages": [], "top1": 50.0, "top1_ema": 51.0, "top1_best": 51.0, "train_seconds": 3.0, "train_cpu_seconds": 3.0,
    "search_seconds": 0.0, "wall_seconds": 4.0,
}  # fmt: skip


def test_a_finished_run_is_not_queued(
    command: Command, fake: FakeSlurm, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, run = write_recipe(), tmp_path / "a run"
    run.mkdir()
    (run / "recipe.yaml").write_text(Recipe.load(recipe).dump())
    (run / "results.json").write_text(json.dumps(RESULTS))
    told = command("submit", recipe, "--run-dir", run, "--wait")
    assert (told.code, told.out) == (0, f"{run}: top-1 51.00 %, 3.0 s of training steps, 4.0 s in all\n")
    assert told.err == f"scaleprog: {run} is finished; nothing was queued\n"
    told = command("submit", recipe, "--run-dir", run, "--json")
    found = json.loads(told.out)
    assert (told.code, found["job"], found["results"]["top1_best"]) == (0, None, 51.0)
    assert is_mistake(command("submit", recipe, "seed=1", "--run-dir", run), "is the run directory of another recipe")
    assert fake.calls("sbatch") == []

    (run / "results.json").write_text("{")  # the run writes it again
    assert json.loads(command("submit", recipe, "--run-dir", run, "--json").out)["job"] == "7"


def test_json_is_all_that_stdout_gets(
    command: Command, fake: FakeSlurm, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.command("sbatch", "echo 'sbatch: a warning' >&2; echo Submitted batch job 7")
    monkeypatch.chdir(tmp_path)
    told = command("submit", write_recipe(), "--nodes", "1:3", "--run-dir", "a run", "--json")
    found = json.loads(told.out)
    log = found.pop("log")
    assert found == {
        "job": "7", "name": "arun-a run", "run": str(tmp_path / "a run"), "nodes": 2, "least_nodes": 1, "ranks": 2,
        "results": None,
    }  # fmt: skip
    assert Path(log).is_relative_to(tmp_path / "a run" / "jobs")
    assert "requesting 1:2 from Slurm" in told.err
    assert is_mistake(command("submit", write_recipe(), "--dry-run", "--json"), "leave out --json")


def test_given_weights_must_be_there_unless_the_run_has_begun(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, run = make_recipe(init={"from": str(tmp_path / "gone.safetensors")}), tmp_path / "run"
    with pytest.raises(AbsentWeights, match=r"init\.from: .*gone\.safetensors: no such file of weights"):
        slurm.submit(recipe, run, JobRequest())
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert slurm.submit(recipe, run, JobRequest()).job == "7"


def test_submit_computes_with_one_thread_and_does_not_tell_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with slurm.one_thread():
        assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("1", "1")
    assert (os.environ["OMP_NUM_THREADS"], os.environ.get("OPENBLAS_NUM_THREADS")) == ("5", None)


def test_a_dry_run_imports_no_torch(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    argv = ["scaleprog", "submit", str(write_recipe()), "--dry-run", "--run-dir", str(tmp_path / "run")]
    check = f"""
import sys
from scaleprog.cli import main
sys.argv = {argv!r}
try:
    main()
finally:
    print({{"torch", "numpy"}} & set(sys.modules))
"""
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("#!/bin/bash\n")
    assert told.stdout.endswith("\nset()\n")
