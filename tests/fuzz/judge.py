"""Runs cases and says what was wrong with what came of them."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.fixtures import Intact, Told, Work
from tests.fuzz.server import End, ForkServer, start_process
from tests.fuzz.targets import TARGETS, Case, Target, controls

FAULTS = ("traceback", "hang", "memory", "wrong data", "unplain")
"""`unplain`: an end by a signal, an undocumented exit code, no message or far too long a one, control characters."""
SECRET = 'PRETTY_NAME="'
"""Of /etc/os-release, which inputs name."""
MOST_TEXT = 200_000
MESSAGE = re.compile(r"^scaleprog: |^Usage: |^\S+: |^\+? ?[╭│]", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What became of one case: its faults by kind, each with a word on it."""

    target: str
    seed: int
    number: int
    how: str
    faults: dict[str, str]
    told: Told

    @property
    def again(self) -> str:
        """The command that does it once more."""
        return f"python -m tests.fuzz --seed {self.seed} --target '{self.target}' --only {self.number}"


@dataclass
class Tally:
    """Of one target."""

    cases: int = 0
    refused: int = 0
    real: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict, real: bool = False) -> None:
        self.cases += not real
        self.real += real
        self.refused += verdict.told.end.code != 0 and not real
        self.faults.update(list(verdict.faults))


def shares(total: int, targets: tuple[Target, ...] = TARGETS) -> dict[str, int]:
    """How many of so many cases each target gets."""
    whole = sum(target.share for target in targets)
    ends = [round(total * sum(t.share for t in targets[: i + 1]) / whole) for i in range(len(targets))]
    return {target.name: end - begin for target, end, begin in zip(targets, ends, [0, *ends])}


def draw(target: Target, seed: int, number: int, intact: Intact, folder: Path) -> tuple[Work, Case]:
    """A case, its input laid down in a folder."""
    rng = random.Random(f"{target.name}/{seed}/{number}")
    work = Work(folder, intact, target.run)
    return work, target.draw(work, rng)


def run_case(
    target: Target, seed: int, number: int, intact: Intact, folder: Path, server: ForkServer | float, keep: bool = False
) -> Verdict:
    """Draws a case, starts it and judges what came of it. `server`: or the seconds that a process needs to begin."""
    shutil.rmtree(folder, ignore_errors=True)
    work, case = draw(target, seed, number, intact, folder)
    end = start_process(case.start, server) if isinstance(server, float) else server.run(case.start)
    told = work.told(end)
    verdict = Verdict(target.name, seed, number, case.how, dict(judge(case, told, work)), told)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


def judge(case: Case, told: Told, work: Work) -> Iterator[tuple[str, str]]:
    """The faults of a case."""
    end, text = told.end, told.text
    if end.hung:
        yield "hang", f"{end.seconds:.0f} s"
    if end.swollen:
        yield "memory", f"{end.bytes / 2**30:.1f} GiB"
    if (work.work / "pwned").exists() or "code of a stranger" in text:
        yield "wrong data", "it was executed"
    elif SECRET in text:
        yield "wrong data", "a file outside was shown"
    elif told.signals:
        yield "wrong data", f"signalled {told.signals.splitlines()}"
    elif "scancel" in told.calls:
        yield "wrong data", "cancelled another's job"
    if end.hung or end.swollen:
        return
    if "Traceback" in text or "Error ignored" in text:
        yield "traceback", last_error(text)
        return
    if (wrong := mistaken(case, told)) and not told.signals:
        yield "wrong data", wrong
    if strange := unplain(case, end, text):
        yield "unplain", strange


def mistaken(case: Case, told: Told) -> str:
    """What of wrong data was accepted."""
    if told.end.code:
        return ""
    if case.expected == "refused":
        return "not refused"
    try:
        same = case.same(told)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"no results as before: {error!r}"
    return "" if same or case.expected == "anything" else "other results than before"


def unplain(case: Case, end: End, text: str) -> str:
    if end.code < 0:
        return f"ended by signal {-end.code}"
    if end.code not in case.codes:
        return f"exit code {end.code}"
    if found := controls(text):
        return f"prints {found[0]!r}"
    if len(text) > MOST_TEXT:
        return f"{len(text)} characters of output"
    if end.code and not MESSAGE.search(text):
        return "no message"
    return ""


def last_error(text: str) -> str:
    """The exception of a traceback and where it was raised, as far as in this project."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    error = lines[-1] if lines else ""
    places = re.findall(r'File ".*?/((?:scaleprog|launchers|shards)/[\w/]+\.py)", line (\d+)', text)
    return f"{error[:160]} ({':'.join(places[-1]) if places else '?'})"
