"""Starts of the program on input that was changed at random.

    python -m tests.fuzz [--n 5000] [--seed 0] [--real 200] [--out docs/results/fuzz.md] [--target NAME [--only NUMBER]]

Cases run in children of one process that has imported everything; `--real` of them once more as processes of their own,
two at a time. A case is known by target, seed and number. Ends with 1 if there was any fault.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scaleprog.files.atomic import write_whole
from tests.fuzz.fixtures import Intact, make
from tests.fuzz.judge import FAULTS, Tally, Verdict, run_case, shares
from tests.fuzz.server import ForkServer, start_process
from tests.fuzz.targets import TARGETS

AT_ONCE = 2
STARTS_TO_TIME = 2
ABOUT = """\
A start may take 10 s and 2 GiB more than the process that it was forked from.

- Wrong data: it ended well on input that no longer says what it said, with other results than before; or it ran, read,
  signaled or canceled what the input has no right to.
- Unplain: it ended by a signal or an undocumented exit code, or without a message; it printed control characters or a
  flood.
- Other weights under checksums that fit are another checkpoint. Nothing can tell, so that is not counted.
"""
HEAD = ("command, input", "cases", "refused", "real starts", *FAULTS)


def memory_folder() -> str | None:
    """Where temporary files cost no disk, if there is such a place."""
    place = "/dev/shm"
    return place if os.path.isdir(place) and shutil.disk_usage(place).free > 2**32 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000, help="cases in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, default=200, help="of them, also as processes of their own")
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    parser.add_argument("--only", type=int, help="one case of a target, whose folder and output are shown")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    targets = tuple(target for target in TARGETS if not options.target or target.name in options.target)
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as folder, ForkServer() as server:
        place = Path(folder)
        intact = make(place / "intact", server)
        if options.only is not None:
            kept = Path(tempfile.mkdtemp(prefix="fuzz-case-", dir=memory_folder())) / "case"
            verdict = run_case(targets[0], options.seed, options.only, intact, kept, server, keep=True)
            print(
                verdict.how, verdict.told.text[-5000:], verdict.told.end, kept, verdict.faults or "no fault", sep="\n"
            )
            sys.exit(bool(verdict.faults))
        cases = [(target, number) for target in targets for number in range(shares(options.n, targets)[target.name])]
        tallies = {target.name: Tally() for target in targets}
        failed = []
        for target, number in cases:
            verdict = run_case(target, options.seed, number, intact, place / "case", server)
            tallies[target.name].add(verdict)
            failed += [verdict] if verdict.faults else []
            tell(verdict)
        forked = time.monotonic() - began
        sample = random.Random(options.seed).sample(cases, min(options.real, len(cases)))
        for verdict in really_started(sample, options.seed, intact, place):
            tallies[verdict.target].add(verdict, real=True)
            failed += [verdict] if verdict.faults else []
            tell(verdict, "really started, ")
    minutes = [forked / 60, (time.monotonic() - began - forked) / 60]
    text = page(options.n, options.seed, options.real, tallies, minutes)
    print(f"{text}\n{kinds(failed)}")
    if options.out:
        write_whole(options.out, text)
    sys.exit(bool(failed))


def really_started(cases: list, seed: int, intact: Intact, place: Path) -> Iterable[Verdict]:
    """Cases as processes of their own, AT_ONCE at a time."""
    if not cases:
        return []
    seconds = seconds_to_begin(intact)

    def one(numbered: tuple) -> Verdict:
        index, (target, number) = numbered
        return run_case(target, seed, number, intact, place / f"real-{index}", seconds)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, enumerate(cases)))


def seconds_to_begin(intact: Intact) -> float:
    """How long the imports of a start take, as many at once as cases."""
    from tests.fuzz.fixtures import Work

    def one(number: int) -> float:
        work = Work(intact.folder.parent / f"timed-{number}", intact)
        return start_process(work.start("scaleprog", "evaluate", "run"), 60.0).seconds

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return 2 * max(pool.map(one, range(STARTS_TO_TIME)))


def tell(verdict: Verdict, how: str = "") -> None:
    for kind, what in verdict.faults.items():
        print(f"{kind.upper()}: {how}{verdict.target}: {verdict.how[:200]!r}: {what}\n    {verdict.again}", flush=True)


def kinds(failed: list[Verdict]) -> str:
    """The faults that were found, those of one kind at one place together, with a case of each."""
    alike: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in failed:
        for kind, what in verdict.faults.items():
            place = re.sub(r"^(\w+).*(\([\w/.:]+\))$", r"\1 \2", what) if kind == "traceback" else what
            alike.setdefault((kind, verdict.target, re.sub(r"[\d.]+ (s|GiB)$", r"\1", place)), []).append(verdict)
    return "\n".join(
        f"- {kind} ({len(verdicts)}): {target}: {place}; e.g. {verdicts[0].how[:160]!r}: "
        f"`--target '{target}' --only {verdicts[0].number}`"
        for (kind, target, place), verdicts in sorted(alike.items())
    )


def page(n: int, seed: int, real: int, tallies: dict[str, Tally], minutes: list[float]) -> str:
    """The table of all targets."""
    rows = [(name, t.cases, t.refused, t.real, *(t.faults[fault] for fault in FAULTS)) for name, t in tallies.items()]
    total = ("in all", *(sum(row[column] for row in rows) for column in range(1, len(HEAD))))
    lines = [f"| {' | '.join(map(str, row))} |" for row in (HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *rows, total)]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    made = f"`make fuzz N={n} SEED={seed}` of commit {commit or 'unknown'}"
    table = "\n".join(lines)
    return (
        f"# Fuzzing\n\n{made}: {total[1]} cases in children of one process ({minutes[0]:.0f} min), {total[3]} of them "
        f"again as processes of their own ({minutes[1]:.0f} min).\n\n{table}\n\n{ABOUT}\n"
    )


if __name__ == "__main__":
    main()
