"""The rooms of the house import what docs/design.md says, and nothing else."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "scaleprog"


def allowed() -> dict[str, set[str]]:
    """By room, in the order of the table: the rooms that it may import."""
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)`[^|]*\|[^|]*\|([^|]*)\|$", (ROOT / "docs/design.md").read_text(), re.M)
    return {room: {name.strip() for name in names.split(",")} - {""} for room, names in rows}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        assert not {name.split(".")[0] for name in names} & {"launchers", "shards"}, f"{path}: they are in scaleprog"
        yield from (name for name in names if name.split(".")[0] == "scaleprog")


def room(module: str) -> str:
    """The room of a module of ours, launchers and shards among them; empty for the version."""
    name = module.partition(".")[2].partition(".")[0]
    return name if (HOUSE / name).is_dir() or (HOUSE / f"{name}.py").is_file() else ""


def test_a_room_imports_only_what_its_row_names() -> None:
    rules = allowed()
    assert rules.pop("cli") == {"all"}
    folders = {path.name for path in HOUSE.iterdir() if (path / "__init__.py").exists() and not path.is_symlink()}
    folders.remove("cli")
    assert rules.keys() == {*folders, "errors", "version", "api"}, "every room has a row"
    for name, may in rules.items():
        files = (HOUSE / name).rglob("*.py") if name in folders else [HOUSE / f"{name}.py"]
        for path in files:
            others = {room(module) for module in imported(path)} - {name, ""}
            assert others <= may, f"{path.relative_to(ROOT)} imports {others - may}; docs/design.md does not let it"


def test_arrows_point_up_the_table() -> None:
    above: set[str] = set()
    for name, may in allowed().items():
        assert may <= above or may == {"all"}, f"{name} imports {may - above}, which is not above it"
        above.add(name)


def test_launchers_and_shards_do_not_know_the_command_line_or_each_other() -> None:
    for package, other in (("launchers", "shards"), ("shards", "launchers")):
        for path in (ROOT / package).glob("*.py"):
            assert not {room(module) for module in imported(path)} & {other, "cli", "__main__"}, path


def test_folders_of_the_top_level_are_linked() -> None:
    """So that a wheel has them in scaleprog, and takes no general name in site-packages."""
    for name in ("launchers", "shards", "configs", "slurm"):
        assert os.readlink(HOUSE / name) == f"../{name}"


def test_the_house_has_few_files_outside_its_rooms() -> None:
    assert {path.name for path in HOUSE.glob("*.py")} == {
        "__init__.py", "__main__.py", "api.py", "errors.py", "version.py",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["recipe", "files", "reporting"])
def test_rooms_that_need_no_torch(name: str) -> None:
    modules = [f"scaleprog.{name}.{path.stem}" for path in (HOUSE / name).glob("[a-z]*.py")]
    check = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
