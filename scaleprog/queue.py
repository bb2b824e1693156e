"""What Slurm knows about a job and can be asked to do with it, through its own commands; no accounting is needed."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scaleprog.errors import ScaleprogError

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
        "PREEMPTED", "REVOKED")  # fmt: skip
ALSO_RUNNING = ("SIGNALING", "CONFIGURING", "STAGE_OUT")  # what scontrol says of a running job at times
ANSWER_SECONDS = 60.0
MOST_WORDS = 32  # of a command, which are looked at
JOB_ID = r"[0-9]{1,10}(_[0-9]{1,10})?"
"""What Slurm's commands are asked about; anything else, an option say, they are not to see."""


class NoAnswer(ScaleprogError):
    """Slurm is not on this machine, or its controller does not answer."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it."""

    id: str
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int = 0
    """Of the batch script; 128 + number if a signal ended it."""
    preempted: bool = False
    """Whether Slurm has announced that it takes the nodes away."""
    end: float | None = None
    """When its time limit ends it, in seconds since the epoch; None if it does not run or has no limit."""
    command: str | None = None
    """Its batch script and that one's arguments, with blanks between; None where Slurm does not tell."""
    directory: str = ""
    """In which it was submitted."""

    @property
    def over(self) -> bool:
        """Whether it has ended for good, as far as Slurm itself is concerned."""
        return self.state in OVER

    def names(self, path: Path) -> bool:
        """Whether its command is a file in the folder `path`, or has that folder as an argument."""
        words, wanted = (self.command or "").split(" ")[:MOST_WORDS], os.path.realpath(path)
        if os.path.realpath(self.command or "/").startswith(f"{wanted}/"):
            return True
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        return any(os.path.realpath(os.path.join(self.directory, span)) == wanted for span in spans if span)


def find(job: str) -> Job | None:
    """The job of this id; None if Slurm knows none (any more). Raises NoAnswer."""
    told = _ask("scontrol", "-o", "show", "job", _checked(job))
    if told.returncode == 0 and told.stdout.strip():
        return _read(told.stdout.splitlines()[0])
    if "Invalid job id" not in told.stderr:
        raise NoAnswer(_last_line(told.stderr))
    return _accounted(job)


def requeue(job: str) -> None:
    """Ends a running job and puts it into the queue again. Raises NoAnswer with what Slurm says against it."""
    told = _ask("scontrol", "requeue", _checked(job))
    if told.returncode:
        raise NoAnswer(_last_line(told.stderr))


def cancel(job: str) -> None:
    """Ends a job: its tasks get TERM, and KILL after the cluster's KillWait. Raises NoAnswer."""
    told = _ask("scancel", _checked(job))
    if told.returncode:
        raise NoAnswer(_last_line(told.stderr))


def partitions() -> list[str]:
    """The partitions' names. Raises NoAnswer."""
    told = _ask("sinfo", "-h", "-o", "%R")
    if told.returncode:
        raise NoAnswer(_last_line(told.stderr))
    return list(dict.fromkeys(told.stdout.split()))


def hosts(nodelist: str) -> list[str]:
    """The names behind Slurm's "gpu[08-10,12],login": gpu08, gpu09, gpu10, gpu12, login."""
    names = []
    for group in re.findall(r"(?:\[[^]]*\]|[^,[])+", nodelist):
        prefix, _, rest = group.partition("[")
        numbers, _, suffix = rest.partition("]")
        if not rest:
            names.append(group)
            continue
        for span in numbers.split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names += hosts(f"{prefix}{number:0{len(first)}}{suffix}")
    return names


def _checked(job: str) -> str:
    if not isinstance(job, str) or re.fullmatch(JOB_ID, job) is None:
        raise NoAnswer(f"{job!r} is not the number of a Slurm job")
    return job


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment, check=False
        )
    except FileNotFoundError:
        raise NoAnswer(f"no Slurm on {os.uname().nodename}: {command[0]} is not there") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]}: {error}") from error


def _read(line: str) -> Job:
    """A line of `scontrol -o show job`."""

    def value(key: str) -> str:
        found = re.search(rf"(?:^| ){key}=(\S*)", line)
        return "" if found is None or found[1] in ("(null)", "None") else found[1]

    name = re.search(r"JobName=(.*?) UserId=", line)
    command = re.search(r" Command=(.*?) WorkDir=(.*?) StdErr=", line)
    state, end = value("JobState"), value("EndTime")
    code, _, number = (value("ExitCode") or "0:0").partition(":")
    return Job(
        id=value("JobId"),
        name=name[1] if name else "",
        state="RUNNING" if state in ALSO_RUNNING else state,
        reason=value("Reason"),
        nodes=value("NodeList"),
        restarts=int(value("Restarts") or 0),
        exit_code=128 + int(number) if int(number or 0) else int(code),
        preempted=value("PreemptTime").isdigit(),
        end=float(end) if end.isdigit() else None,
        command=None if command is None else command[1],
        directory="" if command is None else command[2],
    )


def _accounted(job: str) -> Job | None:
    """The job as accounting remembers it, where there is accounting."""
    try:
        told = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "JobName,State,ExitCode,NodeList")
    except NoAnswer:
        return None
    rows = [line.split("|") for line in told.stdout.splitlines()]
    if told.returncode or not rows or len(rows[-1]) != 4 or not rows[-1][1]:
        return None
    name, state, code, nodes = rows[-1]
    state = state.split()[0]  # "CANCELLED by 1000"
    if state not in OVER:
        return None  # accounting has missed its end
    number = int(code.partition(":")[2] or 0)
    return Job(
        id=job,
        name=name,
        state=state,
        nodes=nodes,
        exit_code=128 + number if number else int(code.partition(":")[0] or 0),
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["Slurm does not answer"])[-1]
