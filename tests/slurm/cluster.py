"""slurm/dev_cluster.sh as a Python value: a real Slurm whose nodes can lose power, network or daemon."""

import os
import re
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "slurm" / "dev_cluster.sh"
NOT_HERE = 3  # the exit status with which the script refuses a machine, as opposed to failing on it


class CannotRunHere(Exception):
    """This machine cannot hold a cluster: no root, no apt-get, or no unshare."""


@dataclass(frozen=True)
class Settings:
    """What a cluster is brought up with."""

    nodes: int = 4
    cpus: int = 8  # per node
    gpus: int = 0  # per node, to be asked for; none is there
    user_signal: bool = True  # preemption sends the signal of sbatch --signal; otherwise SIGTERM
    grace: int = 10  # seconds from a preemption's first signal to the end
    kill_wait: int = 2  # seconds from the TERM of any end to the KILL
    private_dir: Path | None = None  # where every node has a file system of its own

    def env(self) -> dict[str, str]:
        """As the script reads them."""
        return {
            "NODES": str(self.nodes),
            "CPUS": str(self.cpus),
            "GPUS": str(self.gpus),
            "USERSIG": str(int(self.user_signal)),
            "GRACE": str(self.grace),
            "EXTRA_CONF": f"KillWait={self.kill_wait}" if self.kill_wait != Settings.kill_wait else "",
            "PRIVATE_DIR": str(self.private_dir or ""),
        }


class Cluster:
    """A cluster by its number (1-254), which gives its directory, addresses and ports."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.directory = Path(f"/tmp/scaleprog-cluster-{number}")
        self.changed = False  # since up(): broken somewhere, or not with the usual settings

    @property
    def env(self) -> dict[str, str]:
        """The environment in which sbatch, scontrol and submitit speak to this cluster."""
        return {
            **os.environ,
            "SLURM_CONF": f"{self.directory}/slurm.conf",
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
            "CLUSTER": str(self.number),
            "CLUSTER_DIR": str(self.directory),
        }

    def up(self, settings: Settings | None = None) -> None:
        """Starts it, whole and empty, in place of what ran under its number. Raises CannotRunHere."""
        settings = settings or Settings()
        done = subprocess.run([SCRIPT, "up"], env={**self.env, **settings.env()}, capture_output=True, text=True)
        if done.returncode == NOT_HERE:
            raise CannotRunHere(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"no cluster came up:\n{done.stderr}")
        self.changed = settings != Settings()

    def down(self) -> None:
        self.run([SCRIPT, "down"])

    def run(
        self, command: Sequence[str | Path], check: bool = True, seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command's result as text; one that fails raises RuntimeError with what it said, unless `check` is off."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def kill_node(self, node: int) -> None:
        """A power cut: all its processes end at once. Slurm notices after some 16 s."""
        self._change("kill-node", node)

    def start_node(self, node: int) -> None:
        """Power on; for a node that is on, a reboot."""
        self._change("start-node", node)

    def cut_net(self, node: int) -> None:
        """Unplugs a node: its processes go on, unreachable. Slurm notices after some 16 s."""
        self._change("cut-net", node)

    def heal_net(self, node: int) -> None:
        self._change("heal-net", node)

    def part(self, node: int, other: int, undo: bool = False) -> None:
        """Lets nothing that one node sends reach the other one; both still reach the controller."""
        self.changed = True
        pid = self.run([SCRIPT, "pid", str(node)]).stdout.strip()
        address = next(
            line.split()[0]
            for line in (self.directory / "hosts").read_text().splitlines()
            if line.split()[1] == f"node{other}"
        )
        change = "del" if undo else "add"
        self.run(["nsenter", f"--target={pid}", "--net", "ip", "route", change, "blackhole", f"{address}/32"])

    def kill_slurmd(self, node: int) -> None:
        """Ends the daemon alone: the node's jobs go on, unwatched."""
        self._change("kill-slurmd", node)

    def drain(self, *nodes: int) -> None:
        """Lets no further job start on nodes; those that run there stay."""
        self.changed = True
        names = ",".join(f"node{node}" for node in nodes)
        self.run(["scontrol", "update", f"NodeName={names}", "State=DRAIN", "Reason=test"])

    def undrain(self, *nodes: int) -> None:
        """Takes `drain` back."""
        names = ",".join(f"node{node}" for node in nodes)
        self.run(["scontrol", "update", f"NodeName={names}", "State=RESUME"])

    def _change(self, command: str, node: int) -> None:
        self.changed = True
        self.run([SCRIPT, command, str(node)])

    def show(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` knows of a job, by field."""
        line = self.run(["scontrol", "-o", "show", "job", str(job_id)]).stdout.splitlines()[0]
        return dict(re.findall(r"([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", line))

    def job_state(self, job_id: int | str) -> str:
        return self.show(job_id)["JobState"]

    def job_nodes(self, job_id: int | str) -> list[int]:
        """The numbers of the nodes that a job runs on; none while it waits."""
        nodes = self.run(["squeue", "-h", "-j", str(job_id), "-o", "%N"]).stdout.split()
        hosts = self.run(["scontrol", "show", "hostnames", *nodes]).stdout.split() if nodes else []
        return [int(host.removeprefix("node")) for host in hosts]

    def wait_for(
        self, job_id: int | str, states: str | Collection[str], seconds: float, restarts: int = 0
    ) -> dict[str, str]:
        """Waits until a job, requeued at least `restarts` times, is in one of `states`; returns show(job_id).

        Raises TimeoutError with what the job and the controller say.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + seconds
        while (job := self.show(job_id))["JobState"] not in wanted or int(job["Restarts"]) < restarts:
            if time.monotonic() > end:
                now = {key: job.get(key) for key in ("JobState", "Reason", "Restarts", "ExitCode", "NodeList")}
                raise TimeoutError(f"job {job_id} is not {wanted} after {seconds} s: {now}\n{self.log()}")
            time.sleep(0.2)
        return job

    def cancel_all(self, seconds: float = 30) -> None:
        """Cancels every job and waits until none is left on a node."""
        end = time.monotonic() + seconds
        while jobs := self.run(["squeue", "-h", "-o", "%A"]).stdout.split():
            if time.monotonic() > end:
                raise TimeoutError(f"jobs {jobs} do not end\n{self.log()}")
            self.run(["scancel", *jobs], check=False)  # one may end meanwhile
            time.sleep(0.2)

    def log(self, lines: int = 20) -> str:
        """The end of the controller's log."""
        return "\n".join((self.directory / "log" / "slurmctld.log").read_text().splitlines()[-lines:])
