"""What comes with scaleprog: recipes by name, copies of them; the version; what a shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaleprog import cli
from scaleprog.cli.completion import group_words, key_words, recipe_words, run_words, shipped_words
from scaleprog.errors import RecipeError
from scaleprog.recipe import Recipe, shipped
from tests.conftest import CONFIGS, RECIPES
from tests.unit.command import Command, is_mistake

DEIT = "imagenet/deit_small_autoprog_100"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_every_recipe_has_a_name_and_says_what_it_is() -> None:
    assert {path.resolve() for path in shipped.recipes().values()} == set(RECIPES)
    for path in (*shipped.recipes().values(), *shipped.scripts().values()):
        assert 20 < len(shipped.about(path)) < 200
        assert shipped.about(path).endswith(".")


@pytest.mark.parametrize("name", [DEIT, f"{DEIT}.yaml", f"configs/{DEIT}.yaml", f"./{DEIT}"])
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    assert Recipe.load(name) == Recipe.load(CONFIGS / f"{DEIT}.yaml")


def test_a_file_here_comes_before_the_shipped_one(elsewhere: Path) -> None:
    mine = elsewhere / f"{DEIT}.yaml"
    mine.parent.mkdir()
    mine.write_text(f"base: {CONFIGS / DEIT}.yaml\nseed: 7\n")
    assert [Recipe.load(name).seed for name in (DEIT, f"{DEIT}.yaml", f"configs/{DEIT}.yaml")] == [7, 7, 0]


def test_a_name_with_a_slip_is_told() -> None:
    with pytest.raises(RecipeError, match=f"deit_smal_autoprog_100: no such recipe; did you mean {DEIT}"):
        Recipe.load("imagenet/deit_smal_autoprog_100")


def test_all_that_is_shipped_is_listed(command: Command) -> None:
    told = command("recipes")
    assert (told.code, told.err) == (0, "")
    assert max(map(len, told.out.splitlines())) <= 80
    names = {line.split()[0] for line in told.out.splitlines() if line.strip() and not line.startswith(" ")}
    assert names == {*shipped.recipes(), *shipped.scripts()}
    assert {"slurm/train.sbatch", "slurm/dev_cluster.sh"} < names
    chosen = command("recipes", "digits", "configs/fashion_mnist/prog.yaml").out
    assert ("digits/original" in chosen, "fashion_mnist/prog" in chosen, DEIT in chosen) == (True, True, False)
    assert is_mistake(command("recipes", "digits/autoprg"), "'digits/autoprg'", "did you mean digits/autoprog")


def test_copies_run(command: Command, elsewhere: Path) -> None:
    name = "ablations/imagenet/deit_small_autoprog_adareg"
    told = command("recipes", name, "slurm", "--to", "my files")
    copies = elsewhere / "my files"
    assert told.code == 0
    assert f"my files/{name}.yaml" in told.out.splitlines()
    assert Recipe.load(copies / f"{name}.yaml") == Recipe.load(CONFIGS / f"{name}.yaml")
    assert {str(elsewhere / line) for line in told.out.splitlines()} == {
        str(path) for path in copies.rglob("*") if path.is_file()
    }
    assert os.access(copies / "slurm/train.sbatch", os.X_OK)


def test_a_copy_overwrites_nothing_that_was_edited(command: Command, elsewhere: Path) -> None:
    assert command("recipes", "digits", "--to", ".").code == 0
    assert command("recipes", "digits", "--to", ".").code == 0
    (elsewhere / "digits/base.yaml").write_text("seed: 1\n")
    (elsewhere / "digits/original.yaml").unlink()
    assert is_mistake(command("recipes", "digits", "--to", "."), "digits/base.yaml: exists and differs")
    assert not (elsewhere / "digits/original.yaml").exists()
    assert (elsewhere / "digits/base.yaml").read_text() == "seed: 1\n"
    assert is_mistake(command("recipes", "digits", "--to", "digits/base.yaml"), "--to digits/base.yaml: cannot copy")


def test_a_shell_completes_recipes_keys_and_runs(elsewhere: Path) -> None:
    assert recipe_words("digits/") == ["digits/autoprog", "digits/base", "digits/original"]
    assert recipe_words("configs/") == []  # file names, then
    (elsewhere / "mine.yaml").touch()
    assert recipe_words("mi") == ["mine.yaml", "micro/deit", "micro/volo"]
    assert shipped_words("slurm/t") == ["slurm/train.sbatch"]
    assert key_words("optimizer.l") == ["optimizer.lr="]
    assert group_words("se") == ["search"]
    assert run_words("") == []
    for run in ("runs/a", "runs/sweep/b", "other/c"):
        (elsewhere / run).mkdir(parents=True)
        (elsewhere / run / "recipe.yaml").touch()
    assert run_words("") == run_words("ru") == run_words("runs/") == ["runs/a", "runs/sweep/b"]
    assert run_words("runs/s") == ["runs/sweep/b"]
    assert run_words("oth") == ["other/c"]
    assert run_words("[") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("scaleprog train digits/a", ["digits/autoprog"]),
        ("scaleprog submit digits/autoprog optimizer.l", ["optimizer.lr="]),
        ("scaleprog keys sea", ["search"]),
    ],
)
def test_bash_asks_for_completions(
    line: str, words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SCALEPROG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert command().out.split() == words


@pytest.mark.process
def test_the_versions_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['scaleprog', '--version']; from scaleprog import cli\n"
        "try: cli.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == f"{cli.versions()}\n"
    assert cli.versions().startswith("scaleprog ")
    assert f"Python {sys.version.split()[0]}" in told.stdout
