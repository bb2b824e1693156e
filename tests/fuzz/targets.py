"""What is fuzzed: a command on a kind of input, how the input is changed, and what must not come of it."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.fuzz import archives, checkpoints, files, records
from tests.fuzz.fixtures import GOAL, RECIPE, RUN, SEARCHED, SHARDS, Told, Work
from tests.fuzz.recipes import change_recipe
from tests.fuzz.server import Start
from tests.fuzz.values import mutate

MANIFEST = "manifest.json"
REQUEUED = re.compile(r"^requeue", re.MULTILINE)
ACCURACY = re.compile(r"top-1 [\d.]+ %")
Outcome = Literal["anything", "refused", "same"]


@dataclass(frozen=True)
class Case:
    """A start on changed input. `expected`: that it is refused, or refused unless it says the `same` as on the input
    before the change (`same` tells); `anything` may be said, but plainly. `how`: what was changed."""

    start: Start
    how: str
    expected: Outcome = "anything"
    same: Callable[[Told], bool] = lambda told: True
    codes: frozenset[int] = frozenset({0, 2, 75})


@dataclass(frozen=True)
class Target:
    """`run`: which of the valid runs a case starts from; `share`: of all cases, in relation to the other targets'."""

    name: str
    share: int
    draw: Callable[[Work, random.Random], Case]
    run: str = "stopped"


# ---- recipes


def plan_recipe(work: Work, rng: random.Random) -> Case:
    how, expected = change_recipe(work.recipe, rng)
    return Case(work.start("scaleprog", "plan", RECIPE), how, expected)


def train_recipe(work: Work, rng: random.Random) -> Case:
    how, expected = change_recipe(work.recipe, rng)
    return Case(work.start("scaleprog", "train", RECIPE, "train.max_steps=1", "--run-dir", "new"), how, expected)


def evaluate_recipe(work: Work, rng: random.Random) -> Case:
    how, expected = change_recipe(work.run / RECIPE, rng, of_a_run=True)
    return Case(work.start("scaleprog", "evaluate", RUN), how, expected)


# ---- manifests


def change_manifest(work: Work, rng: random.Random) -> str:
    path = work.shards / MANIFEST
    kind = rng.choice((*["value"] * 8, "bytes", "place", "shell"))
    if kind == "bytes":
        return f"manifest: {files.damage(path, rng)}"
    if kind == "place":
        return f"manifest: {files.displace(path, rng)}"
    tree = json.loads(path.read_text())
    if kind == "shell":
        shard = rng.choice([shard for shards in tree["splits"].values() for shard in shards])
        shard["name"] = name = rng.choice(
            (
                "pipe:touch pwned; cat x.tar",
                "pipe:touch${IFS}pwned;.tar",
                "../shards/train-000000.tar",
                "file:x.tar",
                "http:x.tar",
                "-.tar",
                "/etc/os-release",
                "fifo.tar",
                "zero.tar",
            )
        )
        if name == "fifo.tar":
            files.a_fifo(work.shards / name)
        elif name == "zero.tar":
            (work.shards / name).symlink_to("/dev/zero")
        files.replace(path, json.dumps(tree).encode())
        return f"manifest: a shard named {name!r}"
    text, change = mutate(tree, rng, "json")
    files.replace(path, text.encode(errors="surrogatepass"))
    return f"manifest: {change.kind} {'.'.join(map(str, change.path))[:60]}"


def listed(path: Path, split: str | None = None) -> Any:
    """What a manifest says of its shards (of one split) and how many classes there are; None if that is unreadable."""
    try:
        tree = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 2**20 else None
        assert isinstance(tree, dict)
        assert set(tree) <= {"kind", "version", "classes", "source", "splits"}
        classes, splits = tree["classes"], tree["splits"]
        assert isinstance(classes, list)
        assert len({str(name) for name in classes}) == len(classes)
        assert all(isinstance(name, str) for name in classes)
        shards = [shard for name, shards in splits.items() if split in (None, name) for shard in shards]
        assert all(set(shard) == {"name", "samples", "bytes", "sha256"} for shard in shards)
        return sorted([meant(shard[key]) for key in sorted(shard)] for shard in shards), len(classes)
    except (AssertionError, ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        return None


def meant(value: Any) -> str:
    """A value as text; 60.0 and "60" mean 60."""
    try:
        return str(int(value)) if float(value) == int(value) and not isinstance(value, bool) else str(value)
    except (ValueError, TypeError, OverflowError):
        return str(value)


def check_manifest(work: Work, rng: random.Random) -> Case:
    intact = listed(work.shards / MANIFEST)
    how = change_manifest(work, rng)
    shards, classes = listed(work.shards / MANIFEST) or (None, 0)
    refused = shards != intact[0] or classes < intact[1]
    return Case(
        work.start("scaleprog", "shards", "check", SHARDS, "--workers", 1), how, "refused" if refused else "anything"
    )


def train_manifest(work: Work, rng: random.Random) -> Case:
    intact = listed(work.shards / MANIFEST, "train")
    how = change_manifest(work, rng)
    now = listed(work.shards / MANIFEST, "train")
    fewer = now is not None and all(shard in intact[0] for shard in now[0]) and now[1] == intact[1]
    refused = now != intact and not fewer
    start = work.start("scaleprog", "train", RECIPE, "train.max_steps=1", "--run-dir", "new")
    return Case(start, how, "refused" if refused else "anything")


def plan_manifest(work: Work, rng: random.Random) -> Case:
    how = change_manifest(work, rng)
    start = work.start("scaleprog", "plan", RECIPE)
    missing = "there are no shards yet" if how == "manifest: gone" else ""
    return Case(start, how, "same", lambda t: missing in t.text if missing else t.text == work.intact.said["plan"])


# ---- tars


def change_tar(work: Work, rng: random.Random, split: str) -> tuple[str, bool, archives.Tampered]:
    """Also tells whether the manifest was resealed."""
    path = rng.choice(sorted(work.shards.glob(f"{split}*.tar")))
    if rng.random() < 0.1:
        how = files.displace(path, rng)
        return f"{path.name}: {how}", False, archives.Tampered(b"", how)
    tampered = archives.tamper(path.read_bytes(), rng)
    unlike = tampered.content != path.read_bytes()
    sealed = rng.random() < 0.75 or not unlike
    files.replace(path, tampered.content)
    if sealed:
        archives.reseal(work.shards / MANIFEST, path.name, tampered.content)
    return f"{path.name}: {tampered.how}{', resealed' if sealed else ''}", sealed, tampered


def check_tar(work: Work, rng: random.Random) -> Case:
    how, sealed, tampered = change_tar(work, rng, "")
    refused = not sealed or tampered.unfit
    start = work.start("scaleprog", "shards", "check", SHARDS, "--workers", 1)
    return Case(start, how, "refused" if refused else "anything")


def train_tar(work: Work, rng: random.Random) -> Case:
    how, sealed, tampered = change_tar(work, rng, "train")
    refused = not sealed or tampered.unfit
    start = work.start("scaleprog", "train", RECIPE, "train.max_steps=1", "--run-dir", "new")
    return Case(start, how, "refused" if refused else "anything")


def evaluate_tar(work: Work, rng: random.Random) -> Case:
    how, sealed, tampered = change_tar(work, rng, "val")
    refused = not sealed or tampered.unfit or tampered.undecodable
    return Case(work.start("scaleprog", "evaluate", RUN), how, "refused" if refused else "anything")


# ---- checkpoints


def change_checkpoint(work: Work, rng: random.Random) -> tuple[str, bool]:
    return rng.choice(checkpoints.CHANGES)(work.run / "checkpoints", work.foreign, rng)


def evaluate_checkpoint(work: Work, rng: random.Random) -> Case:
    """An older checkpoint may be evaluated where the command says that it skips the newest."""
    before = [path.name for path in checkpoints.steps(work.run / "checkpoints")]
    how, same = change_checkpoint(work, rng)

    def as_before(told: Told) -> bool:
        said = ACCURACY.findall(told.text)[-1:]
        newest, *older = [ACCURACY.findall(work.intact.said[f"evaluate {name}"])[-1:] for name in reversed(before)]
        return said == newest or (said in older and "skipped" in told.text)

    return Case(work.start("scaleprog", "evaluate", RUN), how, "same" if same else "anything", as_before)


def trained_as_before(work: Work, steps: range) -> Callable[[Told], bool]:
    """Whether the last steps of a run are those of the undisturbed one, bit for bit."""

    def told(_: Told) -> bool:
        rows: dict[Any, Any] = {}
        for line in (work.run / "metrics.jsonl").read_text(errors="replace").splitlines()[-2 * len(steps) :]:
            row = json.loads(line) if line.endswith("}") else {}
            if isinstance(row, dict) and "loss" in row:
                rows[row["step"]] = (row["loss"], row["grad_norm"], row["lr"])
        intact = work.intact.rows
        return all(rows.get(step) == tuple(intact[step][key] for key in ("loss", "grad_norm", "lr")) for step in steps)

    return told


def train_checkpoint(work: Work, rng: random.Random) -> Case:
    how, same = change_checkpoint(work, rng)
    start = work.start("scaleprog", "train", RECIPE, f"train.max_steps={GOAL}", "--run-dir", RUN)
    return Case(start, how, "same" if same else "anything", trained_as_before(work, range(GOAL - 1, GOAL + 1)))


# ---- records


def train_records(work: Work, rng: random.Random) -> Case:
    """A run goes on as if its records were whole; what a half measurement says nobody can check."""
    how, _ = records.change(work.run, rng)
    start = work.start("scaleprog", "train", RECIPE, f"train.max_steps={GOAL}", "--run-dir", RUN)
    return Case(start, how, "same", trained_as_before(work, range(GOAL - 1, GOAL + 1)))


def train_measuring(work: Work, rng: random.Random) -> Case:
    path = work.run / "measuring.json"
    text, change = mutate(json.loads(path.read_text()), rng, "json")
    files.replace(path, text.encode(errors="surrogatepass"))
    start = work.start("scaleprog", "train", RECIPE, f"train.max_steps={SEARCHED}", "--run-dir", RUN)
    steps = range(SEARCHED - 1, SEARCHED + 1)
    how = f"measuring.json: {change.kind} {'.'.join(map(str, change.path))}"
    return Case(start, how, "same", trained_as_before(work, steps))


def status_records(work: Work, rng: random.Random) -> Case:
    how = records.named_processes(work.run, rng) if rng.random() < 0.1 else records.change(work.run, rng)[0]
    arguments = ["status", RUN, *(["--json"] if rng.random() < 0.5 else [])]
    environment = work.slurm() if rng.random() < 0.5 else {}
    return Case(work.start("scaleprog", *arguments, environment=environment), how, "same", strict_json(arguments))


def strict_json(arguments: list[str]) -> Callable[[Told], bool]:
    """Whether what `--json` prints can be read by every program."""

    def strict(told: Told) -> bool:
        if "--json" not in arguments:
            return True
        try:
            return isinstance(json.loads(told.text, parse_constant=lambda name: 1 / 0), dict)
        except (ValueError, ZeroDivisionError):
            return False

    return strict


def report_records(work: Work, rng: random.Random) -> Case:
    name = RUN
    if rng.random() < 0.15:
        name = rng.choice(records.NAMES).replace("/", "_")
        work.run.rename(work.work / name)
        how = f"run directory named {name!r}"
    elif rng.random() < 0.1:
        how, _ = change_recipe(work.run / RECIPE, rng, of_a_run=True)
    else:
        how, _ = records.change(work.run, rng)
    start = work.start("scaleprog", "report", "--out", "report", "--", name)
    page = work.work / "report" / "report.md"
    return Case(start, how, "same", lambda told: not page.is_file() or is_plain_page(page.read_text(errors="replace")))


def is_plain_page(text: str) -> bool:
    """Whether a page of Markdown holds no HTML of a stranger's, and nothing that moves a terminal's cursor."""
    shown = re.sub(r"(`+).*?\1", "", text, flags=re.DOTALL)
    return not re.search(r"(?<!\\)<(script|img)", shown) and not controls(text)


def controls(text: str) -> list[str]:
    """Characters that a terminal obeys rather than shows, and those that turn text around."""
    return re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def requeue_records(work: Work, rng: random.Random) -> Case:
    """A job that was stopped starts again, whatever became of the run's records; its reports and its earlier requeues
    are what is asked, and may say no."""
    how, path = records.change(work.run, rng)
    code = rng.choice((75, 75, 75, 1, 2, 137, 143, 0))
    environment = {**work.slurm(), "SLURM_JOB_ID": records.JOB, "SLURM_RESTART_COUNT": str(records.RESTART)}
    start = work.start("scaleprog.launchers.requeue", RUN, code, 20, environment=environment)
    asked = path.name == "requeues.jsonl" or path.parent.name == "reports"

    def as_before(told: Told) -> bool:
        requeued = bool(REQUEUED.search(told.calls))
        if code == 0:
            return not requeued
        return requeued or asked or code == 2

    return Case(start, f"{how}, exit code {code}", "same", as_before, frozenset({0, 1, 2, 75, code}))


def cancel_records(work: Work, rng: random.Random) -> Case:
    """Nothing of the run's is alive, so nothing is to be signalled or cancelled."""
    how = records.named_processes(work.run, rng) if rng.random() < 0.6 else records.change(work.run, rng)[0]
    environment = work.slurm(job="another") if rng.random() < 0.5 else {}
    return Case(work.start("scaleprog", "cancel", RUN, environment=environment), how, "refused")


TARGETS: tuple[Target, ...] = (
    Target("plan, recipe", 14, plan_recipe),
    Target("plan, manifest", 2, plan_manifest),
    Target("shards check, manifest", 10, check_manifest),
    Target("shards check, tar", 11, check_tar),
    Target("train, recipe", 8, train_recipe),
    Target("train, manifest", 4, train_manifest),
    Target("train, tar", 5, train_tar),
    Target("train, checkpoint", 8, train_checkpoint),
    Target("train, records", 5, train_records),
    Target("train, measuring", 2, train_measuring, "searching"),
    Target("evaluate, checkpoint", 10, evaluate_checkpoint),
    Target("evaluate, recipe", 4, evaluate_recipe),
    Target("evaluate, tar", 4, evaluate_tar),
    Target("status, records", 10, status_records, "finished"),
    Target("report, records", 5, report_records, "finished"),
    Target("requeue, records", 6, requeue_records),
    Target("cancel, records", 4, cancel_records),
)
