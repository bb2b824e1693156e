"""The container image: its commands run here, in a fresh virtual environment; the lock file is what the project needs.

`make image-check` installs the whole lock file. `make test` installs nothing that the developer's environment has.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
WHOLE = "SCALEPROG_TEST_IMAGE" in os.environ
HOME = "/opt/scaleprog"
EXTRAS = ("slurm", "deepspeed", "s3", "http")
"""What `make lock` adds to the dependencies."""


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments."""
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#"))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def locked() -> dict[str, tuple[str, int]]:
    """By package of the lock file: its version, and how many hashes it has."""
    blocks = re.findall(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock_text(), re.MULTILINE)
    return {canonicalize_name(name): (version, hashes.count("--hash")) for name, version, hashes in blocks}


def lock_text() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_the_lock_file_has_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    found = locked()
    for requirement in map(Requirement, asked):
        version, _ = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked; run `make lock`"
    pinned = [line for line in lock_text().splitlines() if re.match(r"[\w.-]+==", line)]
    assert len(pinned) == len(found), "a package without a hash"
    assert not re.search(r"://|--(extra-)?index|--find-links|/\w+/", lock_text())


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    told = instructions()
    patterns = (ROOT / ".dockerignore").read_text().split()
    sent = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert patterns[0] == "*"
    assert {name for name in sent if not (ROOT / name).exists()} == set()
    assert sent >= {os.readlink(path)[3:] for path in (ROOT / "scaleprog").iterdir() if path.is_symlink()}
    assert ("USER", "scaleprog") in told[[name for name, _ in told].index("USER") :]
    assert told[-1] == ("ENTRYPOINT", '["scaleprog"]')
    assert not [rest for name, rest in told if name in ("ARG", "ADD", "EXPOSE")]


def context(folder: Path) -> Path:
    """Copies what a build is sent: the files that .dockerignore names."""
    folder.mkdir()
    for pattern in (ROOT / ".dockerignore").read_text().split():
        if pattern.startswith("!"):
            subprocess.run(["cp", "--recursive", "--no-dereference", ROOT / pattern[1:], folder], check=True)
    return folder


def here(command: str, home: Path, system: Path) -> str:
    """A command of the image as it may run on a machine that must not change: no package, no user is added to it."""
    replacements = {
        HOME: str(home),
        "apt-get update": "true",
        "apt-get install": "apt-get install --simulate",
        "rm -rf /var/lib/apt/lists/*": "true",
        "useradd": f"useradd --prefix {system}",
    }
    if not WHOLE:
        replacements["--no-build-isolation --requirement"] = "--no-build-isolation --dry-run --requirement"
    for old, new in replacements.items():
        command = command.replace(old, new)
    return command


@pytest.mark.process
@pytest.mark.skipif(shutil.which("apt-get") is None or os.geteuid() != 0, reason="needs apt-get, and root")
def test_every_command_of_the_image_runs(tmp_path: Path) -> None:
    home, system, source = tmp_path / "scaleprog", tmp_path / "system", context(tmp_path / "source")
    (system / "etc").mkdir(parents=True)
    for name in ("passwd", "group", "shadow"):
        (system / "etc" / name).touch()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PATH"] = f"{home}/bin:{sys.base_prefix}/bin:{os.environ['PATH']}"
    commands = [rest for name, rest in instructions() if name == "RUN"]
    assert len(commands) == 7, "the replacements of `here` fit the Dockerfile"
    for command in commands:
        subprocess.run(here(command, home, system), shell=True, cwd=source, env=variables, check=True, timeout=1200)
        for packages in () if WHOLE else home.glob("lib/*/site-packages"):
            (packages / "developer.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "empty").mkdir()
    for words in (["recipes", "digits"], ["plan", "digits/original"])[: 2 if WHOLE else 1]:
        told = subprocess.run(
            [home / "bin/scaleprog", *words], cwd=tmp_path / "empty", env=variables, capture_output=True, text=True
        )
        assert (told.returncode, told.stderr) == (0, "")
        assert "digits/original" in told.stdout or "predicted speedup by GMACs: +0.0%" in told.stdout
    assert (system / "home/scaleprog").is_dir()
