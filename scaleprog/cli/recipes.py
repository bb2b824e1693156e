"""What comes with scaleprog: recipes."""

import difflib
import shutil
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from scaleprog.cli.completion import shipped_words
from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.recipe import shipped
from scaleprog.recipe.recipe import files_of


def recipes(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Only these, or those in these folders; default: all.",
            autocompletion=shipped_words,
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Copy them into this folder, with the bases of the recipes.")
    ] = None,
) -> None:
    """Lists the recipes and Slurm scripts that come with scaleprog, or copies them."""
    chosen = chosen_of(names or ())
    if to is not None:
        for path in copy(chosen.values(), to):
            print(as_text(path))
        return
    console = Console()
    for _, group in groupby(chosen.items(), key=lambda item: item[0].rpartition("/")[0]):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for name, path in group:
            table.add_row(name, shipped.about(path))
        console.print(table, markup=False, highlight=False)
        console.print()


def chosen_of(names: Iterable[str]) -> Mapping[str, Path]:
    """The files that come with scaleprog by name: all, or those of these names and folders. Raises ScaleprogError."""
    everything = {**shipped.recipes(), **shipped.scripts()}
    chosen: dict[str, Path] = {}
    for name in map(shipped.name_of, names):
        found = {each: path for each, path in everything.items() if f"{each}/".startswith(f"{name.rstrip('/')}/")}
        if not found:
            near = difflib.get_close_matches(name, everything, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`scaleprog recipes` lists all"
            raise ScaleprogError(f"{name[:100]!r}: scaleprog comes with no such recipe or script; {hint}")
        chosen |= found
    return chosen if names else everything


def copy(files: Iterable[Path], folder: Path) -> list[Path]:
    """Copies shipped files, and the bases of recipes, to the same places below a folder; overwrites nothing.

    Returns the paths of the copies. Raises ScaleprogError.
    """
    needed = dict.fromkeys(each for path in files for each in (files_of(path) if path.suffix == ".yaml" else [path]))
    copies = {folder / shipped.place(path): path for path in needed}
    try:
        for target, source in copies.items():
            if target.exists() and target.read_bytes() != source.read_bytes():
                raise ScaleprogError(f"{target}: exists and differs from scaleprog's; choose another --to")
        for target, source in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    except OSError as error:
        raise ScaleprogError(f"--to {folder}: cannot copy there: {error}") from error
    return list(copies)
