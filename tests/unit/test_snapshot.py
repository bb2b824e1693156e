"""Jobs run the code and the recipe that were copied into their run directory, not the working tree."""

import errno
import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.launchers import integrity, slurm, snapshot
from scaleprog.launchers.requeue import STOPPED
from scaleprog.launchers.slurm import JobRequest
from scaleprog.launchers.snapshot import JobFile
from scaleprog.recipe import Recipe
from scaleprog.rundir.reading import read_rows
from tests.conftest import MakeRecipe
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def run_batch(
    arguments: list[str | Path], cwd: Path, restart: int = 0, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A batch script as job 7 would run it, in an environment of Slurm's."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "scaleprog", "SLURM_SUBMIT_DIR": str(cwd)}
    if restart:
        environment["SLURM_RESTART_COUNT"] = str(restart)
    environment["SLURM_JOB_NUM_NODES"] = "2"
    environment["PYTHON"] = str(python)
    return subprocess.run(
        ["bash", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_batch_script_requeues_from_its_snapshot(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a b'$(touch ruined);"
    file = slurm.submit(make_recipe(), run, JobRequest())
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
    fake.command("srun", 'exec "${@:3:2}" "${5/..15/..1}" "$RUN/nothing"')  # what is to be asked, asked here
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 2
    assert f"scaleprog: {run}: missing on a node" in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol"))
    fake.command("srun", "echo 'srun: error: Unable to create step' >&2; exit 1")
    done = run_batch([script, recipe, "a run", "seed=3"], tmp_path)
    assert done.returncode == 1
    assert "missing" not in done.stderr, "nobody has looked"
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"
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
    assert arguments[-4:] == ["-u", "-m", "scaleprog.launchers.task", str(run)]
    assert {"--kill-on-bad-exit=1", "--wait=60"} <= set(arguments)

    fake.command("srun", f"{seen}; exit 140")
    assert run_batch([script, recipe, "a run"], tmp_path, restart=1).returncode == STOPPED
    (run / "job.json").write_text('{"job": "6", "name": "", "code": "code/0"}')
    (run / "owner.json").write_text('{"job": "7", "restart": 0, "generation": 1, "pid": 1, "host": "node0"}')
    assert run_batch([script, recipe, "a run", "seed=3"], tmp_path).returncode == STOPPED, "it is its own run directory"

    recipe.write_text("seed: edited while the job was queued again")
    fake.command("srun", "exit 0")
    assert run_batch([script, recipe, "a run"], tmp_path, restart=1).returncode == 0
    assert Recipe.load(run / "recipe.yaml").seed == 3

    calls = len(fake.calls("scontrol"))
    done = run_batch([script, recipe, "another run"], tmp_path)
    assert done.returncode == 2
    assert "scaleprog: " in done.stderr
    assert "requeue" not in " ".join(fake.calls("scontrol")[calls:])
    assert not (tmp_path / "another run" / "recipe.yaml").exists()
    assert run_batch([script, recipe], tmp_path).stderr.startswith("usage: sbatch")


def test_a_restart_of_train_sbatch_does_not_need_the_working_tree(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    script, recipe, run = ROOT / "slurm" / "train.sbatch", tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(make_recipe().dump())
    fake.command("srun", "exit 1")
    fake.show(restarts=1)
    assert run_batch([script, recipe, run], tmp_path, restart=1).returncode == 1
    changed = tmp_path / "python"
    changed.write_text(
        f'#!/bin/bash\n[[ $* != *scaleprog* || $PYTHONPATH == {run}/code/* ]] || exit 1\nexec {sys.executable} "$@"\n'
    )
    changed.chmod(0o755)
    requeued = fake.calls("scontrol requeue")
    done = run_batch([script, recipe, run], tmp_path, restart=1, python=changed)
    assert done.returncode == 1
    assert fake.calls("scontrol requeue") == [*requeued, "scontrol requeue 7"], done.stderr

    job, (code,) = json.loads((run / "job.json").read_text()), (run / "code").iterdir()
    (tmp_path / "elsewhere").symlink_to(code)
    for foreign in ("../elsewhere", "code/evil"):
        (run / "job.json").write_text(json.dumps(job | {"code": foreign}))
        done = run_batch([script, recipe, run], tmp_path, restart=1, python=changed)
        assert (done.returncode, "not the code that this job began with" in done.stderr) == (2, True)
    (run / "job.json").write_text(json.dumps(job))
    (code / "torch").symlink_to(tmp_path)
    assert run_batch([script, recipe, run], tmp_path, restart=1, python=changed).returncode == 2
    (code / "torch").unlink()
    (code / "scaleprog" / "version.py").write_text("print('changed')")
    done = run_batch([script, recipe, run], tmp_path, restart=1, python=changed)
    assert (done.returncode, "changed" in done.stdout) == (2, False)
    assert fake.calls("scontrol requeue") == [*requeued, "scontrol requeue 7"]
    fake.show(restarts=0)
    done = run_batch([script, recipe, tmp_path / "other"], tmp_path, python=changed)
    assert done.returncode == 1
    assert not (tmp_path / "other").exists(), "a first start copies the tree"


def test_the_restarts_of_the_job_that_submits_another_are_not_those_of_the_other(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_CPU_BIND_LIST", "0x1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    fake.command("sbatch", f"env > {tmp_path}/environment; echo Submitted batch job 7")
    slurm.submit(make_recipe(), tmp_path / "submitted", JobRequest())
    handed_on = re.findall("^(SLURM_[A-Z_]+)=", (tmp_path / "environment").read_text(), re.MULTILINE)
    assert handed_on == ["SLURM_CONF"], "neither are the cores to which it is bound"
    assert os.environ["SLURM_RESTART_COUNT"] == "2"
    (tmp_path / "recipe.yaml").write_text(make_recipe().dump())
    fake.command("srun", "exit 1")
    batch = [ROOT / "slurm" / "train.sbatch", tmp_path / "recipe.yaml", tmp_path / "run"]
    done = run_batch(batch, tmp_path, restart=2)  # sbatch itself hands the count on
    assert "job 7 starts again" in done.stderr
    assert [row["restart"] for row in read_rows(tmp_path / "run" / "requeues.jsonl")] == [0]


def hide_pyc(code: Path, ruin: str) -> None:
    """Python loads this in place of the source, whose time and size it names."""
    source = code / "scaleprog" / "launchers" / "requeue.py"
    there = source.stat()
    fake = code.parent / "fake.py"
    fake.write_text(ruin)
    cached = Path(importlib.util.cache_from_source(str(source)))
    py_compile.compile(str(fake), str(cached), doraise=True)
    fake.unlink()
    content = bytearray(cached.read_bytes())
    content[8:16] = int(there.st_mtime).to_bytes(4, "little") + there.st_size.to_bytes(4, "little")
    cached.write_bytes(content)


DOORS: dict[str, Callable[[Path, str], object]] = {
    "a changed file": lambda code, ruin: (code / "scaleprog" / "launchers" / "requeue.py").write_text(ruin),
    "a module that Python imports by itself": lambda code, ruin: (code / "sitecustomize.py").write_text(ruin),
    "a module of the standard library": lambda code, ruin: (code / "json.py").write_text(ruin),
    "an extension": lambda code, ruin: (code / "scaleprog" / "errors.cpython-311-x86_64-linux-gnu.so").touch(),
    "a compiled file": hide_pyc,
    "a missing file": lambda code, ruin: (code / "scaleprog" / "launchers" / "exits.py").unlink(),
    "a link": lambda code, ruin: (code / "yaml").symlink_to(code.parent),
    "a FIFO": lambda code, ruin: os.mkfifo(code / "yaml.py"),
    "all of it a link": lambda code, ruin: (code.rename(code.parent / "0"), code.symlink_to(code.parent / "0")),
}


@pytest.mark.parametrize("door", DOORS)
def test_code_that_is_not_what_was_submitted_never_runs(
    door: str, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Neither when it lay there before the job was submitted, nor when it was changed later."""
    run = tmp_path / "run"
    file = slurm.submit(make_recipe(), run, JobRequest())
    (script,) = run.glob("jobs/*/7_submission.sh")
    ruin = f"open({str(tmp_path / 'ruined')!r}, 'w')\n"
    DOORS[door](run / file.code, ruin)
    fake.command("srun", "exit 1")
    done = run_batch([script], tmp_path)
    assert done.returncode == 2
    assert "scaleprog: the job's code is not the submitted code" in done.stderr
    assert "Traceback" not in done.stderr
    assert fake.calls("srun") == []
    fake.show(state="FAILED")
    with pytest.raises(CheckpointError, match="does not match the digest in its name"):
        slurm.submit(make_recipe(), run, JobRequest())
    batch, recipe = ROOT / "slurm" / "train.sbatch", run / "recipe.yaml"
    for restart in (0, 1) if door == "a changed file" else (1,):
        JobFile("7", "scaleprog", file.code).write(run)
        done = run_batch([batch, recipe, run], tmp_path, restart)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "does not match the digest in its name" in done.stderr
    assert fake.calls("srun") == []
    assert not (tmp_path / "ruined").exists()


def test_code_that_cannot_be_read_now_is_looked_for_again(tmp_path: Path) -> None:
    """Another node may mount its folder late."""
    text = Path(integrity.__file__).read_text()
    pauses = "PAUSES = (1, 5, 15, 40)"
    assert pauses in text
    code = tmp_path / "code"

    def checked(waits: str, digest: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-I", "-S", "-c", text.replace(pauses, f"PAUSES = {waits}"), str(code), digest]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    never = checked("(0, 0)", "x")
    assert "cannot be read on this node: [Errno 2]" in never.communicate()[1]
    assert never.returncode == 1
    late = checked("(0.2,) * 300", integrity.digest({"a.py": b"1"}))
    time.sleep(1)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.py").write_bytes(b"1")
    (tmp_path / "new").rename(code)
    assert (late.communicate()[1], late.returncode) == ("", 0)


def test_a_job_file_that_somebody_else_wrote_names_no_code(
    fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """It may name the next job, and code that is what its own name says."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "scaleprog" / "launchers").mkdir(parents=True)
    (elsewhere / "scaleprog" / "launchers" / "requeue.py").write_text(f"open({str(tmp_path / 'ruined')!r}, 'w')\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe().dump())
    name = integrity.digest(integrity.read(str(elsewhere)))
    shutil.copytree(elsewhere, run / "code" / name)
    fake.command("srun", "exit 1")
    for code in (
        f"code/{name}",
        "code/../../elsewhere",
        str(elsewhere),
        "../elsewhere",
        "code/",
        "",
        7,
        None,
        [],
    ):
        (run / "job.json").write_text(json.dumps({"job": "7", "name": "scaleprog", "code": code}))
        done = run_batch([ROOT / "slurm" / "train.sbatch", recipe, run], tmp_path)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "ruined").exists()


HOSTILE = ["a b'$(touch ruined);", 'a"`touch ruined`&|', "#a>ruined", "-n", "*${HOME}!("]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_of_a_run_directory_reaches_a_shell(
    name: str, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / name
    options = ("comment=$(touch ruined)", "wckey=`touch ruined`'\"")
    file = slurm.submit(make_recipe(), run, JobRequest(account="$(touch ruined)", qos="a'b", options=options))
    (script,) = run.glob("jobs/*/7_submission.sh")
    fake.command("srun", 'echo "$PYTHONPATH" > python-path; exit 137')
    assert run_batch([script], tmp_path).returncode == 137
    assert (tmp_path / "python-path").read_text().split(":")[0].strip() == str(run / file.code)
    assert not (tmp_path / "ruined").exists()


def test_nor_by_plain_sbatch(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    name = "-n " + "".join(HOSTILE)
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(make_recipe().dump())
    fake.command("srun", 'case $* in *bash*) exec "${@:3}" ;; esac; exit 137')
    done = run_batch([ROOT / "slurm" / "train.sbatch", recipe.name, name], tmp_path)
    assert done.returncode == 137, done.stderr
    assert not (tmp_path / "ruined").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\n#SBATCH --uid=0", "a\rb", "a\x1b[31mb", "a\\b", "a:b", "50%"])
def test_names_that_a_batch_script_cannot_say_are_refused(
    name: str, fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe().dump())
    for refused in (slurm.submit, slurm.script):
        with pytest.raises(ScaleprogError, match="--run-dir"):
            refused(make_recipe(), tmp_path / name, JobRequest())
    if name == "a\n#SBATCH --uid=0":
        done = run_batch([ROOT / "slurm" / "train.sbatch", recipe, name], tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert not (tmp_path / name).exists()
    assert fake.calls("sbatch") == fake.calls("srun") == []


@pytest.mark.parametrize(
    "written",
    ["", "[]", "7", "{}", {"job": 7}, {"name": "a\x1b[31m"}, {"job": "7; id"}, {"job": "-1"}, {"log": "/etc/passwd"},
     {"log": "jobs/../../x"}, {"log": []}, {"host": 7}, {"host": "a\x1b[31m"}, {"time": "x"}, {"time": -1.0},
     {"code": ["code/0"]}, "[" * 10**5, "x" * 10**6, "\xff\xfe"],
)  # fmt: skip
def test_a_job_file_of_another_form(written: str | dict, tmp_path: Path) -> None:
    whole = {"job": "7", "name": "a", "code": "code/0", "log": ""}
    text = written if isinstance(written, str) else json.dumps(whole | written)
    (tmp_path / "job.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"job\.json: "):
        JobFile.read(tmp_path)


def test_a_snapshot_does_not_follow_the_working_tree(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, run = tmp_path / "tree", tmp_path / "run"
    shutil.copytree(ROOT / "scaleprog", tree / "scaleprog", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(snapshot.scaleprog, "__file__", str(tree / "scaleprog" / "__init__.py"))
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


def test_a_copy_of_the_code_that_a_full_disk_cuts_off_leaves_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 5

    def write(path: Path, content: bytes) -> int:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, "wb").write(content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(ScaleprogError, match="cannot be used as a run directory"):
        snapshot.take(make_recipe(), tmp_path / "run")
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "run" / "code").iterdir()) == []
