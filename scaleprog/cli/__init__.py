"""The command line. Each group of commands has a module.

Each command imports what it needs, so that `scaleprog --help` does not wait for torch, nor training for matplotlib.
"""

import signal
import sys
from io import TextIOWrapper
from types import FrameType

import typer

import scaleprog
from scaleprog.cli.arguments import say
from scaleprog.cli.jobs import cancel, show_status, submit
from scaleprog.cli.planning import keys, plan
from scaleprog.cli.results import evaluate, export, replay, report
from scaleprog.cli.simulating import simulate
from scaleprog.cli.training import finetune, train
from scaleprog.errors import INTERRUPTED_CODE, Preempted, ScaleprogError
from scaleprog.shards.cli import app as shards_app

app = typer.Typer(help="Progressive training of Vision Transformers.", no_args_is_help=True, add_completion=False)
app.add_typer(shards_app, name="shards", help="Build and check WebDataset shards.")
app.command()(plan)
app.command()(keys)
app.command()(simulate)
app.command()(train)
app.command()(finetune)
app.command()(submit)
app.command(name="status")(show_status)
app.command()(cancel)
app.command()(evaluate)
app.command()(export)
app.command()(replay)
app.command()(report)


def main() -> None:
    """Entry point: reports a known error in plain words, and exits with the error's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal's alphabet lacks a letter
    before = signal.getsignal(signal.SIGINT)
    if before is scaleprog._leave_quietly:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except Preempted as error:
        say(f"{error}; the same command resumes from the last checkpoint")
        sys.exit(error.exit_code)
    except ScaleprogError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_CODE)
    finally:
        if before is scaleprog._leave_quietly:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, except during an import, which may hide it, print it or change it."""
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            scaleprog._leave_quietly(number, frame)
        at = at.f_back
    raise KeyboardInterrupt
