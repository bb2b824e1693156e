"""The arguments that several commands take, and how commands speak to the user."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaleprog.cli.completion import key_words, recipe_words, run_words
from scaleprog.errors import ScaleprogError

if TYPE_CHECKING:
    from scaleprog.recipe import Recipe

MOST_HERE = 1024
"""The most ranks that scaleprog starts on one machine."""
RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of one that comes with scaleprog (`scaleprog recipes`).",
        autocompletion=recipe_words,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="e.g. train.epochs=8", autocompletion=key_words),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Continue a checkpoint of another run, by default its newest.",
        autocompletion=run_words,
    ),
]
RunPaths = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Run directories, or folders of some.", autocompletion=run_words)
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", autocompletion=run_words)]
RanksHere = Annotated[
    str,
    typer.Option(
        metavar="N|LEAST:MOST",
        help="Ranks on this machine. With a range, each start uses one per GPU or, without GPUs, one per CPU core.",
    ),
]
Restarts = Annotated[
    int | None,
    typer.Option(min=0, max=10**6, help="Consecutive crashes to tolerate; default 3, or 0 for one rank."),
]


def default_folder(path: Path, recipe: "Recipe", source: str | None) -> Path:
    """The run directory of a recipe in the file `path`, of a fork if there is a `source`; equal for equal commands."""
    origin = ""
    if source is not None:
        from scaleprog.training.fork import parse_source

        run, step = parse_source(source)
        origin = f"-from-{run.resolve().name}" + ("" if step is None else f"@{step}")
    return Path("runs") / f"{path.stem}{origin}-seed{recipe.seed}"


def in_job(restart: str) -> bool:
    """Whether the value of `--restart` says that a job starts its ranks again inside it. Raises ScaleprogError."""
    if restart not in ("in-job", "requeue"):
        raise ScaleprogError(f"--restart: {restart[:100]!r} is neither in-job nor requeue")
    return restart == "in-job"
