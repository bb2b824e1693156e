"""One task of a Slurm job, which is one rank.

submitit or slurm/train.sbatch starts `python -m scaleprog.launchers.task RUN`.
"""

import atexit
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from scaleprog.errors import HANG_CODE, Absent, CheckpointError, ScaleprogError, Unavailable
from scaleprog.files.display import as_text, say
from scaleprog.launchers.attempt import Attempt, has_reported, report
from scaleprog.launchers.exits import FINISHED, MISTAKE, STOPPED, exit_by
from scaleprog.launchers.hangs import SETTLE_SECONDS, Guard, said
from scaleprog.launchers.snapshot import JobFile
from scaleprog.ranks.patience import GUARD, LOOK_SECONDS, WRITE_SECONDS, within
from scaleprog.ranks.processes import kill_with_children
from scaleprog.ranks.pulse import PULSE, Pulse, Stand
from scaleprog.ranks.rendezvous import INTERFACES, LOOPBACK, MEET_LIMIT, STORE
from scaleprog.ranks.stop import SIGNALS, ignore_stops
from scaleprog.recipe import Recipe
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.folders import committed_step
from scaleprog.training.loop import train_rank

PORTS = range(15_000, 30_000)  # below the ephemeral ports of Linux
LINGER_SECONDS = 60.0
SIOCGIFADDR = 0x8915


def task(run: Path) -> dict[str, Any]:
    """Trains as one rank of the job. Returns the results of a finished run, or else ends the process (see `leave`)."""
    for number in SIGNALS:
        # Until the run handles signals, ending at once loses nothing, and a Python handler might wait for the
        # rendezvous to finish. This also replaces submitit's handlers, which work on only one rank.
        signal.signal(number, signal.SIG_DFL)
    start, rank = Attempt.current(), int(os.environ["SLURM_PROCID"])
    try:
        os.environ |= rank_variables(os.environ, start) | network_variables(os.environ)
        os.environ[STORE] = f"tcp:{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        guard(run, start, rank)
        if rank == 0:
            tell_time_limit(start)
            print(as_text(describe(os.environ, start)), flush=True)
        results = train_rank(Recipe.of_run(run), run)
    except Exception as error:
        leave(run, start, rank, error)
    atexit.register(_exit, FINISHED)  # without the interpreter's teardown, in which gloo's threads may abort
    return results


def leave(run: Path, start: Attempt, rank: int, error: Exception) -> NoReturn:
    """Ends this process after `error`, and writes a report for the batch script.

    After a stop, ranks other than 0 wait up to LINGER_SECONDS for the report of rank 0 and write none of their own.
    """
    if isinstance(error, Absent):
        error = missing_here(run, error)
        if (start.restart or start.repeat) and committed_step(run):  # it was there before
            error = Unavailable(f"{error}; an earlier start of this job had it")
    end = exit_by(error)
    if end.code == STOPPED and rank > 0:  # the first task to exit ends them all, and rank 0 may still be writing
        give_up = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < give_up and not has_reported(run, start, rank=0):
            time.sleep(0.2)
        _exit(STOPPED)
    if end.code != STOPPED:
        say(f"rank {rank}: {end.text}")
        time.sleep(end.delay)
    report(run, start, rank, end.code, end.cause, end.reason)
    _exit(end.code)


# ---- hangs


def guard(run: Path, start: Attempt, rank: int) -> None:
    """Starts a process that watches this one, and that reports for it if it hangs."""
    descriptor = os.memfd_create("pulse")
    os.environ[PULSE] = f"{descriptor}:0"
    this = os.pidfd_open(os.getpid())
    if child := os.fork():
        os.environ[GUARD] = str(child)
        os.close(this)
        return
    try:
        ignore_stops()  # Slurm signals every process of a job
        watch(Guard(run, [Pulse(descriptor, 0)]), this, partial(report_hang, run, start, rank))
    finally:
        os._exit(0)


def watch(guard: Guard, task: int, tell: Callable[[Stand], object]) -> None:
    """Returns when a task has ended; ends it if it hangs and cannot end itself.

    Args:
        guard: watches the task.
        task: a descriptor of its process.
        tell: called with where the task stands, if it hangs.
    """
    ended = select.poll()
    ended.register(task, select.POLLIN)
    while not ended.poll(1000 * LOOK_SECONDS):
        for stand in guard.look() or ():
            within(WRITE_SECONDS, partial(tell, stand))
            if not ended.poll(1000 * SETTLE_SECONDS):
                kill_with_children(stand.pid)
            return


def report_hang(run: Path, start: Attempt, rank: int, stand: Stand) -> None:
    """Writes the report of a task that hangs."""
    say(said(stand))
    report(run, start, rank, HANG_CODE, said(stand), stand=stand)


def missing_here(run: Path, error: Absent) -> ScaleprogError:
    """The error that something is not there, as this node's, with who has it; unchanged if nobody has looked for it."""
    with suppress(CheckpointError, Unavailable):
        file = JobFile.read(run)
        if file is not None and (seen := file.seen()):
            return ScaleprogError(f"{socket.gethostname()}: {error.what}; {seen}{_elsewhere()}")
    return error


def _elsewhere() -> str:
    """Says that relative paths do not begin where the job was submitted; empty if they do."""
    here, there = os.getcwd(), os.environ.get("SLURM_SUBMIT_DIR", "")
    if not there or os.path.realpath(there) == here:
        return ""
    return f" (relative paths begin at {here} here, and began at {there} there)"


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- torch.distributed's variables from Slurm's


def rank_variables(slurm: Mapping[str, str], start: Attempt) -> dict[str, str]:
    """torch.distributed's variables for this task: its rank, the number of ranks, and the port where they meet.

    Args:
        slurm: the environment that Slurm gives the task.
        start: the start that the task belongs to.
    """
    node = int(slurm.get("SLURM_NODEID", 0))
    counts = tasks_per_node(slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm["SLURM_TASKS_PER_NODE"])
    gpus = slurm.get("CUDA_VISIBLE_DEVICES", "")
    bound = bool(gpus) and "," not in gpus  # Slurm shows each task only its own GPU
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if bound else slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_PORT": str(port(start, slurm.get("SLURM_JOB_ID"))),
    }


def port(start: Attempt, number: str | None = None) -> int:
    """The TCP port where the ranks meet. It differs at each start, so leftover processes cannot interfere.

    Args:
        start: the start.
        number: SLURM_JOB_ID, which also tells the tasks of arrays from all other jobs; default: what `start` says.
    """
    job = int(number) if number else sum(map(int, start.job.split("_")))
    return PORTS[(7 * job + start.restart + 1009 * start.repeat) % len(PORTS)]


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's notation: "2(x3),1" becomes [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts


# ---- network


def network_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """The address of rank 0, and the network interface for gloo and NCCL.

    On one node, both are loopback, whatever the user has set: no other machine needs to reach the ranks. On several
    nodes, the interface is the one that leads to rank 0's node; on that node, it is the one that leads to the next
    node. There, an interface that the user has set takes precedence, unless it is loopback.

    Raises:
        ScaleprogError: the address of rank 0's node is not known.
    """
    names = slurm_queue.hosts(slurm.get("SLURM_STEP_NODELIST") or slurm["SLURM_JOB_NODELIST"])
    if len(names) == 1:
        return {"MASTER_ADDR": "127.0.0.1", **dict.fromkeys(INTERFACES, LOOPBACK)}
    told = slurm.get("SLURM_LAUNCH_NODE_IPADDR", "")
    master = address(names[0]) or ("" if ":" in told else told)
    if not master:
        raise ScaleprogError(
            f"{names[0]}: cannot resolve the address of this node, which runs rank 0; add it to DNS or /etc/hosts (its "
            "IPv4 address: ranks do not meet by IPv6)"
        )
    peer = master
    if slurm.get("SLURM_NODEID") == "0":
        peer = address(names[1])
        if master.startswith("127."):  # /etc/hosts often maps a machine's own name to loopback
            master = address_towards(peer) or master
    chosen = interface(peer)
    variables = {"MASTER_ADDR": master}
    for name in INTERFACES:
        if chosen and slurm.get(name, LOOPBACK) in ("", LOOPBACK):
            variables[name] = chosen
    return variables


def address(host: str) -> str:
    """The IPv4 address of a host; empty if its name cannot be resolved."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def address_towards(peer: str) -> str:
    """This machine's source address for packets to the IPv4 address `peer`; empty if it cannot be determined."""
    if not peer:
        return ""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return probe.getsockname()[0]
    return ""


def interface(peer: str) -> str:
    """The network interface for packets to the IPv4 address `peer`; empty if it cannot be determined."""
    own = address_towards(peer)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return ""


def describe(variables: Mapping[str, str], start: Attempt) -> str:
    """One line that says which ranks run where, and how they meet."""
    nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
    by = [f"{kind} on {variables.get(f'{kind.upper()}_SOCKET_IFNAME', 'its own choice')}" for kind in ("gloo", "NCCL")]
    return (
        f"job {start.job}: {variables['WORLD_SIZE']} ranks on {nodes}, "
        f"meeting at {variables['MASTER_ADDR']}:{variables['MASTER_PORT']} within {MEET_LIMIT.seconds // 60} min; "
        f"{', '.join(by)}"
    )


def tell_time_limit(start: Attempt) -> None:
    """Sets SLURM_JOB_END_TIME (seconds since the epoch), because Slurm before 23.02 does not."""
    if os.environ.get("SLURM_JOB_END_TIME"):
        return
    try:
        job = slurm_queue.find(start.job)
    except slurm_queue.NoAnswer as error:
        say(f"the job's time limit is unknown until Slurm signals it: {error}")
        return
    if job is not None and job.end is not None:
        os.environ["SLURM_JOB_END_TIME"] = str(int(job.end))


if __name__ == "__main__":
    if "SLURM_JOB_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        say("not a task of a Slurm job: srun starts this module; use `scaleprog train`")
        sys.exit(MISTAKE)
    task(Path(sys.argv[1]))
