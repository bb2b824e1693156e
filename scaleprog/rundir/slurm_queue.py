"""Looks up and controls Slurm jobs through Slurm's own commands; works without accounting."""

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import as_text, first_line
from scaleprog.rundir.records import JOB_ID

OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "PREEMPTED",
    "REVOKED",
)
ALSO_RUNNING = ("SIGNALING", "CONFIGURING", "STAGE_OUT")  # what scontrol sometimes reports for a running job
GIVEN_UP = ("down", "drained", "error", "fail", "inval", "power", "reboot", "unk")
"""How sinfo's words begin for the state of a node that has left, or will; a node that does not respond has a `*`."""
REPEAT = "SCALEPROG_REPEAT"
"""The environment variable in which a batch script counts how often it has started its tasks again."""
LOST = "SCALEPROG_LOST"
"""The environment variable in which a batch script keeps the nodes that its job has lost, separated by commas."""
ANSWER_SECONDS = 60.0
ANSWER_BYTES = 2**20  # more than Slurm prints about any job
MOST_HOSTS = 100_000
SPAN = "[0-9]{1,12}(?:-[0-9]{1,12})?"
GROUP = rf"(?:\[{SPAN}(?:,{SPAN})*\]|[^][,])+"  # one item of a node list
LAST_SECOND = 2**33  # in seconds since 1970; anything later is not a time
FIRST_SPECIAL_STEP = 2**32 - 16  # batch, extern, and interactive steps have the last numbers
MOST_WORDS = 32  # how many words of a command are examined


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
    """Exit code of the batch script; 128 + signal number if a signal ended it."""
    preempted: bool = False
    """Whether Slurm has announced that it will take the nodes away."""
    end: float | None = None
    """When its time limit ends it, in seconds since 1970; None if it is not running or has no limit."""
    command: str | None = None
    """Its batch script and the script's arguments, separated by spaces; None if Slurm does not report them."""
    directory: str = ""
    """The working directory of its submission."""
    batch: bool = True
    """Whether it has a batch script, which may start a run again; an allocation of `salloc` has none."""

    @property
    def over(self) -> bool:
        """Whether Slurm considers it finished for good."""
        return self.state in OVER

    def names(self, path: Path) -> bool:
        """Whether its command is a file in the folder `path`, or has that folder as an argument."""
        words, wanted = (self.command or "").split(" ")[:MOST_WORDS], os.path.realpath(path)
        if os.path.realpath(self.command or "/").startswith(f"{wanted}/"):
            return True
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        return any(os.path.realpath(os.path.join(self.directory, span)) == wanted for span in spans if span)


def own_job(variables: Mapping[str, str] = os.environ) -> str | None:
    """The ID of the job in whose environment this process runs; None without one.

    A task of an array has the ID that only it has, as in "17_2": SLURM_JOB_ID of its last task is that of the array.
    """
    array, index = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array and index else variables.get("SLURM_JOB_ID")
    return job if job and re.fullmatch(JOB_ID, job) else None


def own_start(variables: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """How often Slurm had started this process's job again, and how often its batch script the tasks since then."""
    counts = (variables.get(name, "") for name in ("SLURM_RESTART_COUNT", REPEAT))
    restart, repeat = (int(count) if re.fullmatch("[0-9]{1,9}", count) else 0 for count in counts)
    return restart, repeat


def own_node(variables: Mapping[str, str] = os.environ) -> str:
    """The name by which Slurm knows the node of this process."""
    return variables.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]


def find(job: str) -> Job | None:
    """The job with this ID; None if Slurm does not know it, or has forgotten it. Raises NoAnswer."""
    told = _ask("scontrol", "-o", "show", "job", _checked(job))
    if told.code == 0 and told.out.strip():
        return _read(told.out, job)
    # the second answer is for a task of an array that was canceled before it started
    if "Invalid job id" not in told.err and f"Job {job} not found" not in told.out:
        raise NoAnswer(_last_line(told.err))
    return _accounted(job)


def step_is_over(job: str, step: str) -> bool:
    """Whether a numbered step of a running job has ended. Raises NoAnswer."""
    if not re.fullmatch("[0-9]{1,10}", step) or int(step) >= FIRST_SPECIAL_STEP:
        raise NoAnswer(f"{as_text(step, most=60)!r} is not the number of a step that Slurm shows")
    told = _ask("scontrol", "-o", "show", "step", f"{_checked(job)}.{step}")
    if told.code and "not found" not in told.err + told.out:
        raise NoAnswer(_last_line(told.err))
    return told.code != 0 or re.search(rf"\bStepId=\S+\.{step}\s", told.out) is None  # of an array, it shows all steps


def end_of_job(job: str | None, told: float | None) -> float | None:
    """When Slurm will end the job whose variables this process holds, in seconds since 1970; None: never.

    Asks Slurm, because a shell that outlives its allocation keeps the variables, and a time limit can be changed.

    Args:
        job: the id of the job, from the environment (None: no job).
        told: the end of the job, according to the environment (None: not known); used only if Slurm does not answer.
    """
    if not job:
        return None
    try:
        found = find(job)
        end = None if found is None or found.over else found.end
    except NoAnswer:
        end = told
    return end if end is not None and end > time.time() else None


def requeue(job: str) -> None:
    """Ends a running job and puts it back into the queue. Raises NoAnswer with Slurm's reason if Slurm refuses."""
    told = _ask("scontrol", "requeue", _checked(job))
    if told.code:
        raise NoAnswer(_last_line(told.err))


def cancel(job: str) -> None:
    """Ends a job: Slurm sends its tasks SIGTERM, and SIGKILL after the cluster's KillWait. Raises NoAnswer."""
    told = _ask("scancel", _checked(job))
    if told.code:
        raise NoAnswer(_last_line(told.err))


def partitions() -> list[str]:
    """The names of the partitions, also of hidden ones. Raises NoAnswer."""
    told = _ask("sinfo", "--all", "-h", "-o", "%R")
    if told.code:
        raise NoAnswer(
            f"no Slurm cluster answers here ({_last_line(told.err)}); `scaleprog train` trains on this machine, and "
            "`make cluster` starts a Slurm to try"
        )
    return list(dict.fromkeys(told.out.split()))


def cores(partition: str | None = None) -> int | None:
    """The cores of the largest node of a partition (None: of the default ones); None if Slurm does not say."""
    told = _ask("sinfo", "-h", "-o", "%c %P", *(() if partition is None else (f"--partition={partition}",)))
    rows = [line.split() for line in told.out.splitlines()]
    sizes = [
        int(row[0].rstrip("+"))
        for row in rows
        if len(row) == 2 and re.fullmatch("[0-9]{1,9}[+]?", row[0]) and (partition is not None or row[1].endswith("*"))
    ]
    return None if told.code or not sizes or any(row[0].endswith("+") for row in rows) else max(sizes)


def size(partition: str | None = None) -> int | None:
    """How many nodes a partition has (None: the default one), of several the largest; None if Slurm does not say."""
    told = _ask("sinfo", "-h", "-o", "%D %P", *(() if partition is None else (f"--partition={partition}",)))
    rows = [line.split() for line in told.out.splitlines()]
    numbers = [
        int(row[0])
        for row in rows
        if len(row) == 2 and re.fullmatch("[0-9]{1,9}", row[0]) and (partition is not None or row[1].endswith("*"))
    ]
    return None if told.code or not numbers else max(numbers)


def lost(nodes: Sequence[str]) -> list[str]:
    """Those of some nodes, by name, that do not respond, or that Slurm has given up. Raises NoAnswer."""
    told = _ask("sinfo", "--all", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    states = dict(re.findall(r"^(\S+) (\S+)$", told.out, re.MULTILINE))
    if told.code or states.keys().isdisjoint(nodes):
        raise NoAnswer(_last_line(told.err) if told.code else "sinfo: shows none of the job's nodes")
    return [node for node in nodes if states.get(node, "*").endswith("*") or states[node].startswith(GIVEN_UP)]


def hosts(nodelist: str) -> list[str]:
    """Expands a node list: "gpu[08-10,12],login" is gpu08, gpu09, gpu10, gpu12, login. Raises ScaleprogError."""
    names: list[str] = []
    if len(nodelist) < ANSWER_BYTES and re.fullmatch(f"{GROUP}(?:,{GROUP})*", nodelist):
        with suppress(RecursionError):
            names = list(islice(_hosts(nodelist), MOST_HOSTS + 1))
    if not 1 <= len(names) <= MOST_HOSTS:
        raise ScaleprogError(f"{as_text(nodelist, most=200)!r} is not a list of nodes such as gpu[08-10,12],login")
    return names


def _hosts(nodelist: str) -> Iterator[str]:
    for group in re.findall(GROUP, nodelist):
        prefix, _, rest = group.partition("[")
        numbers, _, suffix = rest.partition("]")
        if not rest:
            yield group
            continue
        for span in numbers.split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from _hosts(f"{prefix}{number:0{len(first)}}{suffix}")


@dataclass(frozen=True)
class _Answer:
    """The exit code of a command and its output, decoded as text."""

    code: int
    out: str
    err: str


def _ask(*command: str) -> _Answer:
    """Runs one of Slurm's commands. Raises NoAnswer if the command is missing, or if it or a child that outlives it
    prints too much or takes too long."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SINFO_")}  # a user's filters
    environment |= {"SLURM_TIME_FORMAT": "%s"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NoAnswer(f"no Slurm on {os.uname().nodename}: {command[0]} not found") from None
    except (OSError, ValueError) as error:
        raise NoAnswer(f"{command[0]}: {error}") from error
    with _ended(process):
        told = _read_all(process, command[0])
        try:
            code = process.wait(timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"{command[0]}: did not end within {ANSWER_SECONDS:.0f} s") from None
    return _Answer(code, *(part.decode("utf-8", "replace") for part in told))


def _read_all(process: subprocess.Popen[bytes], name: str) -> list[bytearray]:
    """Reads stdout and stderr until both close, or until the process has ended and is silent. Raises NoAnswer."""
    assert process.stdout is not None
    assert process.stderr is not None
    told = [bytearray(), bytearray()]
    give_up = time.monotonic() + ANSWER_SECONDS
    with selectors.DefaultSelector() as open_ends:
        for number, pipe in enumerate((process.stdout, process.stderr)):
            open_ends.register(pipe, selectors.EVENT_READ, number)
        while open_ends.get_map():
            ready = open_ends.select(timeout=0.2)
            for key, _ in ready:
                part = os.read(key.fd, 2**16)
                told[key.data] += part
                if not part:
                    open_ends.unregister(key.fileobj)
            if max(map(len, told)) > ANSWER_BYTES:
                raise NoAnswer(f"{name}: printed more than {ANSWER_BYTES} bytes")
            if time.monotonic() > give_up:
                raise NoAnswer(f"{name}: no answer within {ANSWER_SECONDS:.0f} s")
            if not ready and process.poll() is not None:
                break
    return told


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills a process and its children if the block raises; always closes its pipes."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _checked(job: str) -> str:
    """Checks a job ID that may come from an untrusted file: no Slurm command may take it for an option. Raises
    NoAnswer."""
    if not isinstance(job, str) or not re.fullmatch(JOB_ID, job):
        raise NoAnswer(f"{as_text(str(job), most=60)!r} is not the number of a Slurm job")
    return job


def _read(told: str, job: str) -> Job:
    """Parses the first line of `scontrol -o show job` for a job. Raises NoAnswer if it is cut off or describes none.

    Its JobId does not identify a task of an array: until they start, all tasks have that of the array.
    """
    line, end_of_line, _ = told.partition("\n")

    def value(key: str) -> str:
        found = re.search(rf"(?:^| ){key}=(\S*)", line)
        return "" if found is None or found[1] in ("(null)", "None") else found[1]

    def number(key: str) -> int | None:
        return _number(value(key))

    name = re.search(r"JobName=(.*?) UserId=", line)
    command = re.search(r" Command=(.*?) WorkDir=(.*?) StdErr=", line)
    state, end, restarts = value("JobState"), number("EndTime"), number("Restarts")
    if not end_of_line or not re.fullmatch("[A-Z_]{4,40}", state) or (restarts is None and value("Restarts")):
        raise NoAnswer(f"scontrol: cannot parse its answer {as_text(first_line(line), most=100)!r}")
    return Job(
        id=job,
        name=name[1] if name else "",
        state="RUNNING" if state in ALSO_RUNNING else state,
        reason=value("Reason"),
        nodes=value("NodeList"),
        restarts=restarts or 0,
        exit_code=_exit_code(value("ExitCode")),
        preempted=number("PreemptTime") is not None,
        end=float(end) if end is not None and end < LAST_SECOND else None,
        command=None if command is None else command[1],
        directory="" if command is None else command[2],
        batch=value("BatchFlag") != "0",
    )


def _accounted(job: str) -> Job | None:
    """The finished job as Slurm's accounting remembers it; None if it does not, or if there is no accounting."""
    try:
        told = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "JobName,State,ExitCode,NodeList")
    except NoAnswer:
        return None
    rows = [line.split("|") for line in told.out.splitlines()]
    if told.code or not rows or len(rows[-1]) != 4 or not rows[-1][1].strip():
        return None
    name, state, code, nodes = rows[-1]
    state = state.split()[0]  # "CANCELLED by 1000"
    if state not in OVER:
        return None  # accounting missed the end of the job
    return Job(id=job, name=name, state=state, nodes=nodes, exit_code=_exit_code(code))


def _exit_code(text: str) -> int:
    """Parses Slurm's "code:signal" into one exit code."""
    code, _, ended_by = text.partition(":")
    number = _number(ended_by)
    return 128 + number if number else _number(code) or 0


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,12}", text) else None


def _last_line(text: str) -> str:
    return first_line((text.strip().splitlines() or ["Slurm does not answer"])[-1])
