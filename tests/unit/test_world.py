"""How many ranks a start takes where the user leaves it open."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import RecipeError, ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.launchers import slurm
from scaleprog.launchers.slurm import JobRequest
from scaleprog.launchers.world import Count, largest, usable, worlds_of
from scaleprog.recipe.worlds import Worlds
from tests.conftest import MakeRecipe
from tests.unit.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[2]
SHOW = "env | grep -E '^SLURM_(NTASKS|NNODES|JOB_NUM_NODES|NTASKS_PER_NODE|NPROCS)=' | sort > srun-reads; exit 0"


worlds = st.builds(
    lambda lanes, more, pairs, shard: Worlds(lanes, lanes * (2 * pairs + more * (2 if pairs else 1)), pairs, shard),
    st.integers(1, 96), st.integers(1, 8), st.integers(0, 4), st.none() | st.integers(1, 8),
)  # fmt: skip


@given(least=st.integers(1, 12), further=st.integers(0, 40), each=st.integers(1, 8), worlds=worlds)
def test_the_largest_number_that_no_rank_would_refuse_is_taken(
    least: int, further: int, each: int, worlds: Worlds
) -> None:
    count = Count(least, least + further)
    known = [
        n
        for n in range(least, least + further + 1)
        if worlds.lanes % (n * each) == 0 and n * each % (worlds.shard or each) == 0
    ]
    assert usable(count, worlds, each) == known
    if known:
        assert largest("--nodes", count, worlds, each) == known[-1]
    else:
        with pytest.raises(ScaleprogError, match=f"^--nodes {count}.*: cannot train; the number of ranks"):
            largest("--nodes", count, worlds, each)


@given(worlds=worlds, world=st.integers(1, 200), groups=st.integers(1, 6))
def test_the_settings_that_a_refusal_names_work(worlds: Worlds, world: int, groups: int) -> None:
    worlds = replace(worlds, shard=1, groups=None if worlds.lanes % groups else groups)
    if not (obstacle := worlds.obstacle(world)):
        assert worlds.lanes % world == 0
        return
    named = dict(word.rstrip(",").split("=") for word in obstacle.split() if "=" in word)
    changed = replace(worlds, lanes=int(named["data.lanes"]), batch=int(named.get("train.batch", worlds.batch)))
    changed.check(world)
    assert changed.batch >= worlds.batch
    assert ("which changes the training" in obstacle) == (changed.batch != worlds.batch)


def test_lanes_that_cannot_hold_a_batch() -> None:
    with pytest.raises(RecipeError, match=r"^data\.lanes: 1000 images in 64 lanes do not give .* whole .*lanes=50$"):
        Worlds(64, 1000).check(1)
    with pytest.raises(RecipeError, match=r"an even number, as Mixup.*data\.lanes=2$"):
        Worlds(4, 4, pairs=1).check_lanes()
    Worlds(4, 4).check_lanes()
    with pytest.raises(RecipeError, match=r"data\.lanes=3 train\.batch=66 \(which changes the training\)$"):
        Worlds(6, 64, pairs=1, groups=3).check_lanes()


def test_repeats_bound_the_lanes_of_a_batch_that_is_mixed() -> None:
    """1,024 images, each shown 3 times: a lane needs 3 pairs, so at most 170 lanes, and 128 divide the batch."""
    most = Worlds(128, 1024, pairs=3)
    most.check(128)
    with pytest.raises(
        RecipeError, match=r"1024 images in 256 lanes .* of at least 6, as Mixup.*repeats=3; use data\.lanes=128$"
    ):
        Worlds(256, 1024, pairs=3).check_lanes()
    assert most.obstacle(512).endswith("data.lanes=512 train.batch=3072 (which changes the training)")
    assert Worlds(64, 1024, pairs=3).obstacle(128).endswith("data.lanes=128")
    with pytest.raises(RecipeError, match=r"^augment\.mix_groups: 3 does not divide data\.lanes, 64"):
        Worlds(64, 1024, pairs=3, groups=3).check_lanes()


def test_hsdp_shares_a_model_within_a_node_unless_told_otherwise() -> None:
    assert Worlds(64, 64, shard=None).obstacle(8, 4) == ""
    assert Worlds(64, 64, shard=None).obstacle(8) == ""
    message = "sharding.shard: 8 ranks are not a multiple of 3, the ranks that share one copy"
    assert Worlds(64, 64, shard=None).obstacle(8, 3) == message
    assert Worlds(64, 64, shard=3).obstacle(8, 4) == message


def test_a_range_may_end_anywhere() -> None:
    assert largest("--nodes", Count(1, 10**12), Worlds(64, 64), each=8) == 8


def test_what_is_said_where_no_number_can_train() -> None:
    with pytest.raises(ScaleprogError) as caught:
        largest("--nodes", Count(4, 5), Worlds(12, 12, shard=4), each=2)
    assert str(caught.value) == (
        "--nodes 4:5 x 2 ranks: cannot train; the number of ranks must divide data.lanes, 12 (1, 2, 3, 4, 6, 12), "
        "and be a multiple of sharding.shard, 4"
    )


@pytest.mark.parametrize(("text", "known"), [("4", Count(4, 4)), ("2:8", Count(2, 8)), ("3:3", Count(3, 3))])
def test_a_number_or_a_range(text: str, known: Count) -> None:
    assert Count.parse(text, "--nodes") == known
    assert Count.parse(str(known), "--nodes") == known


@pytest.mark.parametrize("text", ["8:2", "0:3", "0", "a:b", "", "2:", ":2", "1:2:3", "2-8", "-1", "1.5", "2 :8", "９",
                                  "9" * 5000, "1:" + "9" * 5000, "\x1b[2J"])  # fmt: skip
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(ScaleprogError) as caught:
        Count.parse(text, "--nproc")
    shown = as_text(text, most=100)
    assert str(caught.value).startswith(f"--nproc {shown}: must be a number such as 4 or a range LEAST:MOST such as")


def ask(run: Path, least: str, tasks: int, nodelist: str, nodes: int) -> subprocess.CompletedProcess[str]:
    """`python -m scaleprog.launchers.world` in a job of so many nodes."""
    environment = os.environ | {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": nodelist}
    return subprocess.run(
        [sys.executable, "-m", "scaleprog.launchers.world", run, least, str(tasks)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_job_says_which_nodes_stay_idle(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(sharding={"engine": "hsdp", "shard": 2}).dump())
    told = ask(tmp_path, "1", 1, "gpu[08-09,11],login", 4)
    assert (told.stdout, told.stderr, told.returncode) == ("4\n", "", 0)
    told = ask(tmp_path, "1", 1, "gpu[08-09,11]", 3)
    assert (told.stdout, told.returncode) == ("2\n", 0)
    assert told.stderr == (
        "scaleprog: 2 of 3 nodes train, idle: gpu11; 3 ranks do not divide data.lanes, 4; "
        "to use them, start a new run with data.lanes=3 train.batch=9 (which changes the training)\n"
    )
    for least, tasks, code, message in (
        ("3", 1, 2, "nodes 3: cannot train; the number of ranks must divide data.lanes, 4 (1, 2, 4), and be"),
        ("4", 1, 2, "the job has 3 nodes, fewer than MIN_NODES, 4"),
        ("two", 1, 2, "MIN_NODES two: must be a number"),
        ("1", 3, 2, "nodes 1:3 x 3 ranks: cannot train; the number of ranks"),
    ):
        told = ask(tmp_path, least, tasks, "gpu[08-09,11]", 3)
        assert (told.stdout, told.returncode) == ("", code)
        assert told.stderr.startswith(f"scaleprog: cannot choose the number of nodes: {message}")
    recipe.write_text("data: 3")
    told = ask(tmp_path, "1", 1, "gpu1", 1)
    assert told.returncode == 2
    assert f"{recipe}: damaged" in told.stderr
    recipe.unlink()
    told = ask(tmp_path, "1", 1, "gpu1", 1)
    assert told.returncode == 1, "the file system may answer next time"
    assert f"{recipe}: missing" in told.stderr


def test_a_job_knows_the_worlds_of_its_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """With a batch of more images than there can be ranks, too, and pairs of images to be mixed."""
    recipe = make_recipe(train={"batch": 2**18}, augment={"mixup": 0.8}, sharding={"engine": "hsdp", "shard": 2})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert worlds_of(tmp_path) == Worlds.of(recipe) == Worlds(4, 2**18, pairs=1, shard=2)


def test_a_start_need_not_wait_for_torch() -> None:
    question = "import scaleprog.launchers.world, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True).stdout == b"False\n"


def test_slurm_is_asked_for_a_range(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    request = JobRequest(nodes=Count(1, 4), tasks_per_node=2, cpus_per_task=3)
    text = slurm.script(make_recipe(data={"lanes": 8}), tmp_path / "run", request)
    lines = text.splitlines()
    assert {"#SBATCH --nodes=1-4", "#SBATCH --mincpus=6", "#SBATCH --cpus-per-task=3"} <= set(lines)
    assert "ntasks-per-node" not in text
    assert capsys.readouterr().err == ""
    shared = {line.strip() for line in (ROOT / "slurm" / "train.sbatch").read_text().splitlines()}
    assert set(slurm.STEP) <= shared & set(lines)
    plain = slurm.script(make_recipe(data={"lanes": 8}), tmp_path / "run", JobRequest(nodes=Count(4, 4)))
    assert "scaleprog.launchers.world" not in plain
    assert not {*slurm.STEP} & {*plain.splitlines()}


def test_a_range_is_narrowed_to_what_can_train(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for asked, given_, why in (
        (Count(1, 3), "1-2", "3 ranks do not divide data.lanes, 4"),
        (Count(2, 999), "2-4", "999 ranks do not divide data.lanes, 4"),
        (Count(3, 4), "4", "3 ranks do not divide data.lanes, 4"),
    ):
        text = slurm.script(make_recipe(), tmp_path / "run", JobRequest(nodes=asked))
        assert f"#SBATCH --nodes={given_}\n" in text
        told = capsys.readouterr().err
        assert told.startswith(f"scaleprog: --nodes {asked}: requesting {given_.replace('-', ':')} from Slurm; {why}; ")
    with pytest.raises(ScaleprogError, match=r"^--nodes 5:9: cannot train; .* 4 \(1, 2, 4\)$"):
        slurm.script(make_recipe(), tmp_path / "run", JobRequest(nodes=Count(5, 9)))


def test_the_step_gets_the_nodes_that_train(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slurm.submit(make_recipe(), run, JobRequest(nodes=Count(1, 4)))
    (script,) = run.glob("jobs/*/7_submission.sh")
    fake.command("srun", SHOW)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[0-2]"}
    done = start(script, tmp_path, job)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 nodes train, idle: node2" in done.stderr
    assert step(tmp_path) == {"NTASKS": 2, "NNODES": 2, "JOB_NUM_NODES": 2, "NTASKS_PER_NODE": 1, "NPROCS": 2}

    (tmp_path / "srun-reads").unlink()
    (run / "recipe.yaml").write_text("data: 3")
    done = start(script, tmp_path, job)
    assert done.returncode == 2
    assert "cannot choose the number of nodes: " in done.stderr
    assert "does not start again: a retry would fail the same way" in done.stderr
    assert not (tmp_path / "srun-reads").exists()


def test_the_step_of_train_sbatch(fake: FakeSlurm, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, script = tmp_path / "recipe.yaml", ROOT / "slurm" / "train.sbatch"
    recipe.write_text(make_recipe().dump())
    fake.command("srun", SHOW)
    job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "scaleprog", "SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": sys.executable,
        "SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[0-2]",
    }  # fmt: skip
    done = start(script, tmp_path, job | {"MIN_NODES": "1", "SLURM_NTASKS_PER_NODE": "2"}, recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 nodes train, idle: node2" in done.stderr
    assert step(tmp_path) == {"NTASKS": 4, "NNODES": 2, "JOB_NUM_NODES": 2, "NTASKS_PER_NODE": 2, "NPROCS": 4}
    done = start(script, tmp_path, job, recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert step(tmp_path) == {"NNODES": 3, "JOB_NUM_NODES": 3}, "as sbatch was told"


def start(script: Path, folder: Path, job: dict[str, str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    """A batch script, run with a job's variables."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | job
    return subprocess.run(
        ["bash", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def step(folder: Path) -> dict[str, int]:
    """What `srun` has read of the size of its step."""
    lines = (folder / "srun-reads").read_text().split()
    return {name.removeprefix("SLURM_"): int(value) for name, value in (line.split("=") for line in lines)}
