"""The command line. Each group of commands has a module.

Each command imports what it needs, so that `scaleprog --help` does not wait for torch, nor training for matplotlib.
"""

import errno
import os
import platform
import signal
import sys
from importlib import metadata
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

import scaleprog
from scaleprog.cli.jobs import cancel, show_status, submit
from scaleprog.cli.observing import profile, track
from scaleprog.cli.planning import keys, plan
from scaleprog.cli.recipes import recipes
from scaleprog.cli.results import evaluate, export, replay, report
from scaleprog.cli.simulating import simulate
from scaleprog.cli.sweep import SweepCommand
from scaleprog.cli.training import finetune, train
from scaleprog.errors import INTERRUPTED_CODE, MISTAKE_CODE, Preempted, ScaleprogError
from scaleprog.files.display import say
from scaleprog.shards.cli import app as shards_app
from scaleprog.version import VERSION

UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EIO}
"""What a command says of a path in plain words, where it does not say it better: only the user can mend it."""

app = typer.Typer(no_args_is_help=True)
app.add_typer(shards_app, name="shards", help="Build and check WebDataset shards.")
app.command()(recipes)
app.command()(plan)
app.command()(keys)
app.command()(simulate)
app.command(cls=SweepCommand)(train)
app.command()(finetune)
app.command(cls=SweepCommand)(submit)
app.command(name="status")(show_status)
app.command()(cancel)
app.command()(profile)
app.command()(track)
app.command()(evaluate)
app.command()(export)
app.command()(replay)
app.command()(report)


def _show_version(asked: bool) -> None:
    if asked:
        print(versions())
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions that matter.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Progressive training of Vision Transformers."""


def main() -> None:
    """Entry point: reports a known error in plain words, and exits with the error's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal's alphabet lacks a letter
    before = signal.getsignal(signal.SIGINT)
    if before is scaleprog._leave_quietly:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(prog_name="scaleprog")  # also for python -m scaleprog: completion goes by this name
    except Preempted as error:
        say(f"{error}; the same command resumes from the last checkpoint")
        sys.exit(error.exit_code)
    except ScaleprogError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:  # of what the command prints
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would print the rest when it exits
            say("cannot print the rest: no space left")
            sys.exit(MISTAKE_CODE)
        if error.filename is None or error.errno not in UNUSABLE:
            raise
        say(f"{error.filename}: {error.strerror}")
        sys.exit(MISTAKE_CODE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_CODE)
    finally:
        if before is scaleprog._leave_quietly:
            signal.signal(signal.SIGINT, before)


def versions() -> str:
    """The versions of scaleprog and of what computes, read without importing them."""
    others = []
    for name in ("torch", "timm"):
        try:
            others.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            others.append(f"no {name}")
    return f"scaleprog {VERSION}\n{', '.join(others)}, Python {platform.python_version()}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, except during an import, which may hide it, print it or change it."""
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            scaleprog._leave_quietly(number, frame)
        at = at.f_back
    raise KeyboardInterrupt
