"""The command line: what it prints, and how it tells a mistake: plainly, once, with an exit code that is not 0."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from scaleprog import cli
from scaleprog.errors import DataError, Preempted, ScaleprogError, Unavailable, WorkerDied
from scaleprog.launchers.local import RankFailed
from scaleprog.rundir.storage import committed
from tests import forked
from tests.conftest import step_rows
from tests.unit.command import Command, WriteRecipe, is_mistake, rows_of
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

# ---- plan


def test_plan_prints_stages_and_the_predicted_speedup(command: Command, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(growth={"schedule": "linear", "stages": 3}, data={"path": "not/there"})
    told = command("plan", recipe)
    assert (told.code, told.err) == (0, "")
    assert [row[:4] for row in rows_of(told.out)] == [
        ["1", "train", "16", "2"],
        ["2", "train", "24", "3"],
        ["3", "train", "32", "4"],
    ]
    assert re.search(r"predicted speedup by GMACs: \+\d+\.\d%", told.out)
    assert "a search decides" not in told.out
    assert "a search will decide each stage" in command("plan", recipe, "growth.schedule=automatic").out


def test_plan_says_what_a_search_may_spend_and_what_the_table_costs(command: Command) -> None:
    told = " ".join(command("plan", "digits/autoprog", "search.budget=0.95").out.split())
    spends = r"a search spends at most 95\.0% of Original's cost; the table, (\d+\.\d)% of it by GMACs, keeps"
    assert 50 < float(re.search(spends, told)[1]) < 95


@pytest.mark.parametrize(
    ("setting", "doubt"),
    [
        (
            "train.epochs=3",
            "optimizer.warmup_epochs, 8, is no less than train.epochs, 3: the learning rate never falls",
        ),
        ("optimizer.min_lr=1", "optimizer.min_lr, 1, is more than optimizer.lr, 0.0025"),
        ("optimizer.warmup_lr=1", "optimizer.warmup_lr, 1, is more than optimizer.lr, 0.0025"),
    ],
)
def test_plan_doubts_learning_rates_that_hardly_anybody_wants(setting: str, doubt: str, command: Command) -> None:
    assert doubt in command("plan", "digits/base", setting).out
    assert "optimizer." not in command("plan", "digits/base").out


def test_plan_doubts_a_patience_that_is_short_for_the_steps(command: Command) -> None:
    planned = "plan", "imagenet/deit_small_original_100", "--device=cpu", "train.patience=0.01"
    assert "train.patience, 0.01 min, is less than three times the longest step" in command(*planned).out
    assert "train.patience" not in command(*planned, "--world=512").out, "fewer images for each rank"
    assert "train.patience" not in command(*planned[:-1]).out


def test_plan_shares_memory_out_over_ranks(command: Command, write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(model={"width": 384, "heads": 6}, sharding={"engine": "fsdp"})
    one, four = (int(re.findall(r"(\d+) MiB", command("plan", recipe, "--nproc", n).out)[-1]) for n in (1, 4))
    assert one == pytest.approx(4 * four, abs=4)


def test_plan_refuses_ranks_that_cannot_train(command: Command, write_recipe: WriteRecipe) -> None:
    assert is_mistake(command("plan", write_recipe(), "--nproc=3"), "--nproc 3: 3 ranks do not divide data.lanes, 4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "scaleprog", "keys"]
        told = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (told.returncode, told.stderr) == (2, "scaleprog: cannot print the rest: no space left\n")


def test_plan_prints_worlds_and_engines(
    command: Command, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = command("plan", write_recipe(sharding={"engine": "fsdp"}), "--world=2,3,4", "--device=cpu")
    assert max(map(len, told.out.splitlines())) <= 80
    heads = [re.split(" {2,}", line.strip()) for line in told.out.splitlines() if "hsdp/2" in line]
    assert heads == [["replicated", "fsdp *", "hsdp/2", "zero 1", "zero 2", "zero 3"]] * 2
    assert [len(row) for row in rows_of(told.out) if row[0] == "peak of run, MiB"] == [7, 7]
    parts = (
        "2 ranks, 4 images each",
        "3 ranks: cannot run: 3 ranks do not divide data.lanes,",
        "Nothing here was timed",
    )
    assert [part for part in parts if part not in told.out] == []


@pytest.mark.parametrize("text", ["8,x", "0", "", "8,,64", "-1", "8;64", "²"])
def test_worlds_and_devices_that_are_none(text: str, command: Command, write_recipe: WriteRecipe) -> None:
    assert is_mistake(command("plan", write_recipe(), f"--world={text}"), repr(text), "such as 8,64,512")
    assert is_mistake(command("plan", write_recipe(), "--device", "b200"), "unknown device 'b200'; ", "h100, a100, cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "recipe.yaml:\n  train.epoch: unknown key; did you mean train.epochs?"),
        (["growht.stages=3"], "growht: unknown key; did you mean growth?"),
        (["train.batch=0"], "train.batch: Input should be greater than or equal to 1, got 0"),
        (["train.batch=many"], "train.batch: Input should be a valid integer"),
        (["train.batch"], "override 'train.batch' is not of the form key=value"),
        (["model.name=vit_tiny_patch16_225"], "model.name: timm has no model 'vit_tiny_patch16_225'; did you mean "),
        (["model.name=resnet18", "model.patch=null"], "model.name: resnet18 is not in an elastic family"),
        (["model.resolution=30"], "model.resolution: 30 is not a multiple of the model's stride, 8 pixels"),
        (["growth.schedule=[{resolution: 32, depth: 3}]"], "growth.schedule: the last stage must be the complete"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe(arguments: list[str], message: str, command: Command, write_recipe: WriteRecipe) -> None:
    assert is_mistake(command("plan", write_recipe(), *arguments), message)


def test_a_missing_recipe_is_told_by_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "scaleprog", "plan", str(tmp_path / "nowhere.yaml")]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"scaleprog: {tmp_path}/nowhere.yaml: no such recipe\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("trian", "recipe.yaml"), ("train",),
        ("train", "recipe.yaml", "--ranks", "2"), ("evaluate", "run", "--weights", "worst"),
        ("evaluate", "run", "--resolution", "large"), ("export", "run"), ("report", "run"), ("shards", "chekc", "x"),
    ],
)  # fmt: skip
def test_what_is_no_command_says_how_to_find_out(arguments: tuple[str, ...], command: Command) -> None:
    told = command(*arguments)
    assert told.code == 2
    assert "--help" in told.err
    assert "Traceback" not in told.err


def test_help_names_the_commands(command: Command) -> None:
    told = command("--help")
    assert told.code == 0
    assert all(name in told.out for name in ("plan", "train", "finetune", "evaluate", "export", "report", "shards"))


def test_help_is_shown_as_it_is_written() -> None:
    """typer reads help as rich's markup, which swallows [words] and draws :b: as a picture."""
    texts = [text for command in commands(typer.main.get_command(cli.app)) for text in help_texts(command)]
    assert len(texts) > 100
    assert [text for text in texts if Text.from_markup(text).plain != text] == []


def commands(command: Any) -> Iterator[Any]:
    yield command
    for subcommand in getattr(command, "commands", {}).values():
        yield from commands(subcommand)


def help_texts(command: Any) -> list[str]:
    return [text for text in (command.help, *(getattr(each, "help", None) for each in command.params)) if text]


def test_help_need_not_wait_for_torch() -> None:
    check = "import scaleprog.cli, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_run_that_was_copied_in_part_does_not_start_over(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, whole, copy = write_recipe(), tmp_path / "whole", tmp_path / "copy"
    assert command("train", recipe, "train.max_steps=5", "--run-dir", whole).code == 0
    assert command("train", recipe, "train.max_steps=9", "--run-dir", whole).code == 0
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(".*", "rank-*"))
    before = contents(copy)
    assert before.keys() < contents(whole).keys()
    for _ in range(2):
        told = command("train", recipe, "--run-dir", copy)
        assert is_mistake(told, f"{copy}/checkpoints: all checkpoints are damaged (2)", "Copy the run directory again")
        after = contents(copy)
        assert {path for path in after if before.get(path) != after[path]} <= {".lock", "owner.json"}
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    assert command("train", recipe, "train.max_steps=10", "--run-dir", copy).code == 0
    assert max(step_rows(copy)) == 10


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words", [("shards", "image-folder", "LONG", "out"), ("evaluate", "LONG"), ("shards", "check", "LONG")]
)
def test_a_path_that_cannot_be_looked_at_is_named(words: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    path = str(tmp_path / ("a" * 300))
    told = command(*(path if word == "LONG" else word for word in words))
    assert (told.code, "Traceback" in told.err) == (2, False)
    assert "a" * 300 in told.err
    assert "File name too long" in told.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, write_recipe: WriteRecipe) -> None:
    monkeypatch.setattr("scaleprog.planning.plan.describe", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["scaleprog", "plan", str(write_recipe())])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_an_interrupt_is_no_success(
    command: Command, monkeypatch: pytest.MonkeyPatch, write_recipe: WriteRecipe
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scaleprog.training.loop.train_rank", interrupt)
    told = command("train", write_recipe())
    assert told.code == 130
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("damaged"), 2),
        (Unavailable("a decoding worker died"), 1),
        (WorkerDied("a worker died"), 1),
        (RankFailed("rank 1 was killed by SIGKILL", mistake=False), 1),
        (RankFailed("rank 1: a shard is damaged", mistake=True), 2),
        (Preempted("stopped by SIGTERM"), 75),
    ],
)
@pytest.mark.parametrize("arguments", [("train", "RECIPE"), ("evaluate", "RUN"), ("export", "RUN", "OUT.safetensors")])
def test_the_exit_code_says_whether_another_start_may_help(
    arguments: tuple[str, ...], error: ScaleprogError, code: int, command: Command, write_recipe: WriteRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    for name in ("training.loop.train_rank", "training.evaluate_run.evaluate_run", "api.export_run"):
        monkeypatch.setattr(f"scaleprog.{name}", fail)
    told = command(*(write_recipe() if word == "RECIPE" else word for word in arguments))
    assert (told.code, str(error) in told.err, "Traceback" in told.err) == (code, True, False)


def test_a_killed_data_worker_is_a_crash(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = write_recipe(data={"workers": 1}, train={"epochs": 2000}, evaluate={"every": 2000}), tmp_path / "run"
    words = [sys.executable, "-m", "scaleprog", "train", str(recipe), f"--run-dir={run}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        give_up = time.monotonic() + 100
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, "a decoding worker died" in told, "Traceback" in told) == (1, True, False), told


STRANGERS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29", "GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip


def test_variables_of_another_launcher_are_ignored_by_every_command(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Every pod of Kubeflow has them. A command that obeyed would wait for a rank that never comes."""
    recipe, run = write_recipe(train={"epochs": 1}, evaluate={"every": 1}), tmp_path / "run"
    train = ["train", recipe, f"--run-dir={run}"]
    told = "another launcher has set RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1'; scaleprog ignores that"
    for arguments in (
        ["plan", recipe],
        train,
        [*train, "--nproc=1", "seed=1", f"--run-dir={tmp_path / 'one'}"],
        [*train, "--nproc=2", "seed=2", f"--run-dir={tmp_path / 'two'}"],
        ["evaluate", run],
        ["export", run, tmp_path / "weights.safetensors"],
        ["report", run, f"--out={tmp_path / 'report'}"],
        ["status", run],
    ):
        done = forked.run("scaleprog", arguments, tmp_path / "output", 100, STRANGERS)
        assert done.returncode == 0, (arguments, done.stdout)
        assert (told in done.stdout) == (arguments[0] == "train")
    command = [
        sys.executable,
        "-m",
        "scaleprog",
        *map(str, train),
        "--nproc=2",
        "seed=3",
        f"--run-dir={tmp_path / 'new'}",
    ]
    environment = os.environ | STRANGERS  # here, its imports see them, too
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert alone.returncode == 0, alone.stderr
    assert told in alone.stderr


# ---- train, evaluate, export, report


def test_from_training_to_a_report(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = write_recipe(train={"epochs": 1}), tmp_path / "run"
    told = command("train", recipe, "train.max_steps=3", "--run-dir", run)
    assert (told.code, told.out) == (0, "")  # stopped early: no results yet
    assert is_mistake(command("export", run, tmp_path / "early.safetensors"), "step 3 has no evaluation yet")
    assert is_mistake(
        command("train", recipe, "--run-dir", tmp_path / "other", "--baseline", run),
        f"--baseline: {run}/results.json does not exist; has that run finished?",
    )
    assert not (tmp_path / "other").exists()  # told before anything was spent

    told = command("train", recipe, "--run-dir", run)
    assert told.code == 0
    assert re.fullmatch(rf"{run}: top-1 \d+\.\d\d %, \S+ s of training steps, \S+ s in all\n", told.out)
    assert "resuming" in told.err
    top1 = json.loads((run / "results.json").read_text())["top1_best"]
    assert command("evaluate", run).out.splitlines()[-1].startswith(f"{run}: top-1 {top1:.2f} % (")
    assert command("evaluate", run, "--resolution", 16, "--weights", "ema").out.endswith("% (ema weights)\n")
    assert is_mistake(command("evaluate", run, "--resolution", 30), "--resolution: 30 is not a multiple of", "8 pixels")
    assert is_mistake(command("evaluate", run, "--resolution", 0), "--resolution: 0 is not a multiple of")
    evaluated = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["resolution"], max(row["top1"], row["top1_ema"]) == top1) for row in evaluated][:1] == [(32, True)]
    assert evaluated[1]["resolution"] == 16
    told = command("export", run, tmp_path / "model.safetensors")
    assert (told.code, (tmp_path / "model.safetensors").exists()) == (0, True)
    assert "load with: timm.create_model(" in told.out
    told = command("report", run, "--out", tmp_path / "report")
    assert told.code == 0
    assert f"{tmp_path}/report/report.md" in told.out
    told = command("report", run, "--out", tmp_path / "report", "--table", "1,2", "--co2", 0.5, "--power", "cpu")
    assert (told.code, told.out.splitlines()[0]) == (0, f"{tmp_path}/report/paper.md")
    assert "x 350 W" in (tmp_path / "report/paper.md").read_text()


def test_a_baseline_gives_the_speedup(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, baseline, run = write_recipe(train={"epochs": 1}), tmp_path / "baseline", tmp_path / "run"
    baseline.mkdir()
    for text in ("", "{}", "[]", '{"train_seconds": null}'):
        (baseline / "results.json").write_text(text)
        told = command("train", recipe, "--run-dir", run, "--baseline", baseline)
        assert is_mistake(told, f"--baseline: {baseline}/results.json is not a run's results.json")
    (baseline / "results.json").write_text('{"train_seconds": 1000}')
    told = command("train", recipe, "--run-dir", run, "--baseline", baseline)
    results = json.loads((run / "results.json").read_text())
    assert results["speedup"] == pytest.approx(1000 / results["train_seconds"] - 1)
    assert told.out.endswith(f", speedup {results['speedup']:+.1%}\n")


def test_tables_that_are_none(command: Command, tmp_path: Path) -> None:
    report = ("report", tmp_path, "--out", tmp_path / "out")
    assert is_mistake(command(*report, "--table", "2-5"), "--table: '2-5' is not a list of numbers such as 2,4,5")
    assert is_mistake(command(*report, "--table", "9"), "--table: there is no table 9; choose from 1, 2, 3")
    assert is_mistake(command(*report, "--figure", "2"), "--figure: there is no figure 2; choose from 1, 4")
    told = command(*report, "--table", "1", "--power", "h10")
    assert is_mistake(told, "--power: unknown device 'h10'; did you mean h100?")


def test_folders_that_are_no_runs(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    assert is_mistake(command("report", nowhere, "--out", out), f"{nowhere}: no such run directory")
    assert is_mistake(command("evaluate", nowhere), f"{nowhere}: not a run directory")
    assert is_mistake(command("export", nowhere, out), f"{nowhere}: not a run directory")
    write_recipe()  # as a run directory holds it
    assert is_mistake(command("report", tmp_path, "--out", out), "has not recorded anything yet")
    assert is_mistake(command("evaluate", tmp_path), f"{tmp_path}: no checkpoint yet")
    assert is_mistake(command("export", tmp_path, out), f"{tmp_path}: no checkpoint yet")
    assert not out.exists()


def test_a_run_directory_goes_on_with_its_own_recipe_alone(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    assert command("train", recipe, "train.max_steps=1", "--run-dir", run).code == 0
    told = command("train", recipe, "optimizer.lr=0.25", "seed=3", "train.max_steps=7", "--run-dir", run)
    assert is_mistake(
        told,
        f"{run} is the run directory of another recipe:\n  optimizer.lr: 0.25 here, 0.0005 there\n  seed: 3 here, 0 "
        "there\nuse another --run-dir, or that recipe\n",
    )
    free = ["train.max_steps=2", "data.workers=1", "data.cache=0", "sharding.engine=fsdp", "checkpoint.keep=5"]
    assert command("train", recipe, *free, "--run-dir", run).code == 0
    assert [path.name for path in committed(run / "checkpoints")] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_training_is_refused_where_a_queued_job_will_train(
    nproc: str, command: Command, write_recipe: WriteRecipe, fake: FakeSlurm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.json").write_text('{"job": "7", "name": "scaleprog-a b", "code": "code/0"}')
    fake.show(state="PENDING")
    told = command("train", write_recipe(), f"--run-dir={run}", f"--nproc={nproc}")
    assert is_mistake(told, f"{run} belongs to job 7, which is PENDING", "scaleprog cancel")
    assert [path.name for path in run.iterdir()] == ["job.json"]


def test_a_shell_that_outlived_its_allocation_trains_to_the_end(
    command: Command, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795000000")
    told = command("train", write_recipe(), "train.epochs=1", f"--run-dir={tmp_path / 'run'}")
    assert (told.code, (tmp_path / "run" / "results.json").exists()) == (0, True), told


def test_a_range_of_ranks(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nproc in ("0", "4:1"):
        assert is_mistake(command("train", write_recipe(), "--nproc", nproc), f"--nproc {nproc}: must be a number")
    monkeypatch.setattr("scaleprog.launchers.local.room_here", lambda: (3, "CPU cores"))
    recipe = write_recipe(train={"max_steps": 2})
    told = command("train", recipe, "--nproc", "1:4", "--run-dir", tmp_path / "run")
    assert "starting 2 of at most 4 ranks; CPU cores available: 3; 3 ranks do not divide data.lanes, 4; " in told.err
    (start,) = (row for row in map(json.loads, (tmp_path / "run" / "events.jsonl").open()) if row["event"] == "start")
    assert start["world"] == 2


def test_plan_says_that_it_has_not_seen_the_shards(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    seen = "there are no shards yet"
    assert seen not in command("plan", write_recipe()).out
    assert f"shards: {seen}" in command("plan", write_recipe(data={"path": str(tmp_path / "shards")})).out
