"""A sample of what `make fuzz` does, inputs that were accepted or not refused plainly before, and the means."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fuzz import archives, checkpoints, files, records, targets
from tests.fuzz.fixtures import RECIPE, Intact, Told, Work, make
from tests.fuzz.judge import judge, run_case, shares
from tests.fuzz.server import ForkServer, Start
from tests.fuzz.targets import TARGETS, Case, Target
from tests.fuzz.values import BOMB, DEEP, ESCAPES, Change, mutate

SEED, CASES = 15, 80


class Fuzzing(NamedTuple):
    """The process that forks, and valid inputs."""

    server: ForkServer
    intact: Intact

    def faults(self, case: Case, work: Work) -> dict[str, str]:
        return dict(judge(case, work.told(self.server.run(case.start)), work))


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzing]:
    with ForkServer() as server:
        yield Fuzzing(server, make(tmp_path_factory.mktemp("fuzz") / "intact", server))


# ---- a sample


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_sample(target: Target, fuzzing: Fuzzing, tmp_path: Path) -> None:
    count = max(3, shares(CASES)[target.name])
    verdicts = [run_case(target, SEED, n, fuzzing.intact, tmp_path / "case", fuzzing.server) for n in range(count)]
    assert [f"{v.how}: {v.faults}: {v.again}" for v in verdicts if v.faults] == []


# ---- inputs that were not refused, or not plainly


def content(text: bytes) -> Callable[[Path], None]:
    return lambda path: files.replace(path, text)


def place(kind: Callable[[Path], None]) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        files.clear(path)
        kind(path)

    return put


def more(text: bytes) -> Callable[[Path], None]:
    return lambda path: files.replace(path, path.read_bytes() + text)


DEEP_JSON = DEEP["json"][0].encode()
RECORDS: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
    ("status", "events.jsonl", content(b"1\n[]\nnull\n{}\n")),
    ("status", "metrics.jsonl", more(b'{"step": 40, "loss": 1}\n')),
    ("status", "metrics.jsonl", more(b"\xff\xfe\n")),
    ("status", "requeues.jsonl", content(DEEP_JSON + b"\n")),
    ("status", "owner.json", place(files.a_huge_file)),
    ("status", "job.json", place(files.a_fifo)),
    ("status", RECIPE, more(f"unknown: {BOMB}\n".encode())),
    ("report", "requeues.jsonl", more(b'{"time": null, "job": [], "requeue": {}}\n')),
    ("report", "results.json", content(b'{"top1_best": NaN}')),
    ("train", ".lock", place(files.a_fifo)),
    ("train", "owner.json", content(b'{"generation": "x"}')),
    ("train", "metrics.jsonl", content(b'{"step": {}}\n')),
    ("requeue", "events.jsonl", content(b"\xff\n")),
    ("requeue", "measuring.json", content(b"[1e999")),
    ("requeue", "requeues.jsonl", content(b"7\n")),
    ("requeue", "job.json", content(b"null")),
)


@pytest.mark.parametrize(("command", "name", "change"), RECORDS)
def test_a_record_that_is_none(
    command: str, name: str, change: Callable[[Path], None], fuzzing: Fuzzing, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    draw = {"status": targets.status_records, "report": targets.report_records, "train": targets.train_records,
            "requeue": targets.requeue_records}[command]  # fmt: skip
    work = Work(tmp_path / "case", fuzzing.intact, "stopped" if command in ("train", "requeue") else "finished")

    def changed(run: Path, rng: random.Random) -> tuple[str, Path]:
        change(run / name)
        return name, run / name

    monkeypatch.setattr(records, "change", changed)
    monkeypatch.setattr(records, "named_processes", lambda run, rng: changed(run, rng)[0])
    case = draw(work, Chosen(75))
    assert fuzzing.faults(case, work) == {}


class Chosen(random.Random):
    """Takes what a test wants where it is among the choices, and never the rare branch."""

    def __init__(self, wanted: object) -> None:
        super().__init__(0)
        self.wanted = wanted

    def choice(self, seq):
        return self.wanted if self.wanted in seq else super().choice(seq)

    def random(self) -> float:
        return 0.9


ONCE = tuple(dict.fromkeys(checkpoints.CHANGES))


@pytest.mark.parametrize("change", ONCE, ids=lambda change: change.__name__)
def test_a_checkpoint_that_is_none(
    change: Callable[..., checkpoints.Told], fuzzing: Fuzzing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHANGES", (change,))
    work = Work(tmp_path / "case", fuzzing.intact)
    case = targets.evaluate_checkpoint(work, random.Random(SEED))
    assert fuzzing.faults(case, work) == {}, case.how


# ---- the means


def test_what_is_intact_is_accepted(fuzzing: Fuzzing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHANGES", (lambda *_: ("nothing", True),))
    monkeypatch.setattr(records, "change", lambda run, rng: ("nothing", run))
    monkeypatch.setattr(targets, "mutate", lambda tree, rng, form: (json.dumps(tree), Change("add", ())))
    for number, name in enumerate(("evaluate, checkpoint", "train, checkpoint", "train, records", "train, measuring",
                                   "status, records", "report, records", "requeue, records")):  # fmt: skip
        target = next(target for target in TARGETS if target.name == name)
        work = Work(tmp_path / f"case-{number}", fuzzing.intact, target.run)
        case = target.draw(work, Chosen(75))
        told = work.told(fuzzing.server.run(case.start))
        assert dict(judge(case, told, work)) == {}, told.text
        assert told.end.code == (75 if name.startswith("requeue") else 0)


def test_resealing_what_is_intact_changes_nothing(fuzzing: Fuzzing, tmp_path: Path) -> None:
    work = Work(tmp_path / "case", fuzzing.intact)
    one = checkpoints.newest(work.run / "checkpoints")
    before = checkpoints.read(one)
    checkpoints.reseal(one)
    assert checkpoints.read(one) == before
    tar = next(work.shards.glob("val*.tar"))
    before = (work.shards / "manifest.json").read_text()
    archives.reseal(work.shards / "manifest.json", tar.name, tar.read_bytes())
    assert json.loads(before) == json.loads((work.shards / "manifest.json").read_text())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_case_is_known_by_its_number(target: Target, fuzzing: Fuzzing, tmp_path: Path) -> None:
    how = [target.draw(Work(tmp_path / f"{i}", fuzzing.intact, target.run), random.Random("7")).how for i in range(2)]
    assert how[0] == how[1]


def test_every_target_gets_its_share() -> None:
    for total in (0, 1, 150, 5000):
        assert sum(shares(total).values()) == total
    assert min(shares(5000).values()) > 50


def test_a_changed_tree_is_another() -> None:
    tree = {"a": {"b": [1, 2.5, "x"], "c": None}, "d": True}
    for form in ("json", "yaml"):
        texts = {mutate(tree, random.Random(seed), form)[0] for seed in range(300)}
        assert len(texts) > 150
        assert not any("7f3a" in text for text in texts), "a name of a raw text was left"


def run_statement(server: ForkServer, folder: Path, statement: str, **limits: float) -> tuple[Told, Case, Work]:
    work = Work.__new__(Work)
    work.folder, work.work = folder, folder
    said, signals = str(folder / "said"), str(folder / "signals")
    start = Start("timeit", ("-n", "1", "-r", "1", statement), str(folder), said, signals, **limits)
    return work.told(server.run(start)), Case(start, "a statement"), work


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("pass", None),
        ("1 / 0", "traceback"),
        ("import time; time.sleep(60)", "hang"),
        ("while True: pass", "hang"),
        ("x = b'1' * (5 << 29)", "memory"),
        ("import os; os.kill(1, 15)", "wrong data"),
        ("import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 15)", "wrong data"),
        ("open('pwned', 'w')", "wrong data"),
        ("print(open('/etc/os-release').read())", "wrong data"),
        (f"print({ESCAPES!r})", "unplain"),
        ("import os; os._exit(2)", "unplain"),
        ("import os; os._exit(3)", "unplain"),
        ("import os; os.abort()", "unplain"),
    ],
)
def test_a_fault_is_seen(statement: str, fault: str | None, fuzzing: Fuzzing, tmp_path: Path) -> None:
    seconds = {"seconds": 0.5} if fault == "hang" else {}
    told, case, work = run_statement(fuzzing.server, tmp_path, statement, **seconds)
    assert list(judge(case, told, work))[:1] == [] if fault is None else fault in dict(judge(case, told, work))


def test_a_process_of_the_own_session_may_be_signalled(fuzzing: Fuzzing, tmp_path: Path) -> None:
    statement = "import subprocess; p = subprocess.Popen(['sleep', '60']); p.kill(); assert p.wait() == -9"
    told, _, _ = run_statement(fuzzing.server, tmp_path, statement)
    assert (told.end.code, told.signals) == (0, "")
