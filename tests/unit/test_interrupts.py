"""Ctrl-C while a command, or a process that it has started, imports its modules: no traceback, and no success."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.unit.command import WriteRecipe

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
SLOW = """
import os, signal, sys
class Slow:  # Ctrl-C while the module NAME is imported, which a library may turn into another error
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["NAME"] and os.environ["WHO"] in sys.orig_argv:
            os.environ["NAME"] = ""
            os.kill(os.getpid(), signal.SIGINT)
            try:
                for _ in range(10**6): pass
            except KeyboardInterrupt:
                raise ImportError("hidden")
sys.meta_path.insert(0, Slow())
"""


def interrupted(
    command: Iterable[object], during: str, tmp_path: Path, who: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Runs a command; those of its processes that have the word `who` in their command line get SIGINT when they import
    the module `during`."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "NAME": during, "WHO": who}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=120, start_new_session=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under nohup and `&`
    )  # fmt: skip


LAUNCHERS = ["task", "requeue", "snapshot", "world"]


@pytest.mark.parametrize(
    ("command", "during"),
    [
        (["-m", "scaleprog", "keys"], "scaleprog.cli"),
        (["-m", "scaleprog", "keys"], "rich.console"),
        (["-m", "scaleprog", "keys"], "scaleprog.recipe.reference"),
        (["-m", "scaleprog", "plan", "RECIPE"], "torch"),
        (["-m", "scaleprog", "plan", "RECIPE"], "numpy.linalg"),
        (["scaleprog", "plan", "RECIPE"], "typer"),
        (["scaleprog", "plan", "RECIPE"], "torch.nn"),
        *((["-m", f"scaleprog.launchers.{name}", "RUN", "0", "1"], "scaleprog.files.atomic") for name in LAUNCHERS),
        (["-m", "scaleprog.launchers.task", "RUN"], "torch"),
    ],
)
def test_an_interrupt_during_imports_is_quiet(
    command: list[str], during: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    script = tmp_path / "scaleprog"  # as pip writes it
    script.write_text("import sys\nfrom scaleprog.cli import main\nsys.exit(main())\n")
    recipe = write_recipe()
    done = interrupted([recipe if word == "RECIPE" else word for word in command], during, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("during", ["scaleprog.launchers.local", "torch.nn"])
def test_an_interrupt_while_ranks_import_is_quiet(during: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    command = ["-m", "scaleprog", "train", write_recipe(), "--nproc", "2", f"--run-dir={tmp_path / 'run'}"]
    done = interrupted(command, during, tmp_path, who="--multiprocessing-fork")
    assert (done.returncode, "Traceback" in done.stderr) == (75, False), done.stderr


def test_an_interrupt_while_workers_of_shards_import_is_quiet(patterns: Path, tmp_path: Path) -> None:
    command = ["-m", "scaleprog", "shards", "check", patterns, "--workers", "2"]
    done = interrupted(command, "webdataset", tmp_path, who="--multiprocessing-fork")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "a worker died" in done.stderr
