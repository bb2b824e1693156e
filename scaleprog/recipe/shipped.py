"""The recipes that come with scaleprog, and slurm/'s scripts: the name of each, what it is, and where it lies."""

import os
import re
from itertools import dropwhile, takewhile
from pathlib import Path

HOME = Path(__file__).parents[1]
"""Has configs/ and slurm/: links in a checkout, folders in an installation, nothing in a job's copy of the code."""
CONFIGS, SCRIPTS = HOME / "configs", HOME / "slurm"
PARTS = "bases"
"""Folders of files that are only parts of a recipe."""


def files() -> dict[str, Path]:
    """All recipes and parts of recipes by name, such as `digits/autoprog` and `bases/autoprog`, in order."""
    return {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.glob("**/*.yaml"))}


def recipes() -> dict[str, Path]:
    """`files`, but only those that are whole recipes."""
    return {name: path for name, path in files().items() if path.parent.name != PARTS}


def scripts() -> dict[str, Path]:
    """The scripts for Slurm by name, such as `slurm/train.sbatch`."""
    return {str(path.relative_to(HOME)): path for path in sorted(SCRIPTS.glob("*.s[bh]*"))}


def place(file: Path) -> Path:
    """Where a shipped file belongs in a folder of copies: bases of a recipe stay where the recipe expects them."""
    return file.resolve().relative_to(CONFIGS.resolve() if file.suffix == ".yaml" else SCRIPTS.resolve().parent)


def name_of(text: str) -> str:
    """The name that is meant by `digits/autoprog`, `digits/autoprog.yaml`, or `configs/digits/autoprog.yaml`."""
    return text.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")


def locate(path: Path) -> Path:
    """The file of a recipe: `path` where it exists, with or without .yaml; otherwise the shipped one of this name."""
    shipped = recipes().get(name_of(str(path)))
    if shipped is None or os.path.exists(path):
        return path
    here = Path(f"{path}.yaml")
    return here if os.path.exists(here) else shipped


def about(path: Path) -> str:
    """What a recipe or a script is: the first sentence of its first comment."""
    lines = dropwhile(lambda line: line.startswith("#!"), path.read_text().splitlines())
    comment = " ".join(line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines))
    return re.split(r"(?<=\.) ", comment, maxsplit=1)[0]
