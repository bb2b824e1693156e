"""The arguments that several commands take, and how commands speak to the user."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from scaleprog.files.display import as_text

MOST_HERE = 1024
"""The most ranks that scaleprog starts on one machine."""
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. configs/fashion_mnist/prog.yaml.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=8")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of some.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
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


def say(message: str) -> None:
    """Prints a message that is no result."""
    print(f"scaleprog: {as_text(message, lines=True)}", file=sys.stderr)
