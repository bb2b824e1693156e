"""What Slurm really does to a job: the ground that restarts of training stand on."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import NOT_HERE, SCRIPT, Cluster, Settings


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s until {what}"
        time.sleep(0.2)


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """Submits `script`, run by srun in every task with `folder` as its working directory; returns the job's id."""
    (folder / "task.sh").write_text(script)
    command = ["sbatch", "--parsable", f"--chdir={folder}", *options, "--wrap", "srun bash task.sh"]
    return cluster.run(command).stdout.strip()


def test_two_nodes_have_their_own_names_and_addresses(cluster: Cluster) -> None:
    seen = cluster.run(["srun", "-N2", "bash", "-c", "hostname; ip -4 -o addr show eth0 | awk '{print $4}'"])
    net = f"10.213.{cluster.number}"
    assert sorted(seen.stdout.split()) == [f"{net}.10/24", f"{net}.11/24", "node0", "node1"]


def test_sacct_answers_without_a_database(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "exit 0", "--array=0-1")
    until(lambda: cluster.run(["squeue", "-h"]).stdout == "", 20, "the array is done")
    rows = cluster.run(["sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job]).stdout.split()
    assert rows[0] == "JobID|State|NodeList"
    assert {row.rsplit("|", 1)[0] for row in rows[1:]} == {f"{job}_0|COMPLETED", f"{job}_1|COMPLETED"}


@pytest.mark.parametrize(("user_signal", "signal"), [(True, "USR2"), (False, "TERM")])
def test_preemption_sends_the_jobs_signal_or_term(
    cluster: Cluster, tmp_path: Path, user_signal: bool, signal: str
) -> None:
    cluster.up(Settings(user_signal=user_signal))
    script = """
        log=task.$SLURM_PROCID
        for signal in USR2 TERM CONT; do trap "echo $signal >> $log" $signal; done
        echo started >> $log
        while true; do sleep 0.1; done"""
    job = submit(cluster, tmp_path, script, "--nodes=2", "--exclusive", "--requeue", "--signal=USR2@60")
    logs = [tmp_path / f"task.{task}" for task in range(2)]
    until(lambda: all(log.exists() and log.read_text() for log in logs), 20, "both tasks run")

    cluster.run(["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true"])
    # The grace is 10 s, so no second TERM or KILL mixes in; the order of two traps is bash's choice.
    until(lambda: all(len(log.read_text().split()) == 3 for log in logs), 8, "both tasks get two signals")
    assert [set(log.read_text().split()) for log in logs] == [{"started", "CONT", signal}] * 2
    assert cluster.job_state(job) == "RUNNING"


def test_a_job_goes_on_elsewhere_when_its_node_is_lost_and_a_cut_off_one_is_written_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Both nodes are lost at once, because Slurm takes its time to notice."""
    script = "while true; do date +%s > ${SLURM_RESTART_COUNT:-0}.$(hostname); sleep 0.2; done"
    folders = [tmp_path / "power", tmp_path / "network"]
    for folder in folders:
        folder.mkdir()
    jobs = [submit(cluster, folder, script, "--exclusive", "--requeue") for folder in folders]
    until(lambda: all(list(folder.glob("0.*")) for folder in folders), 20, "both jobs run")
    dark, cut = (cluster.job_nodes(job)[0] for job in jobs)
    cluster.kill_node(dark)
    cluster.cut_net(cut)
    for job in jobs:
        cluster.wait_for(job, "RUNNING", 90, restarts=1)
        assert not {dark, cut} & set(cluster.job_nodes(job))

    def beats(folder: Path, node: int) -> bool:
        """Whether the first incarnation of a job still writes."""
        file = folder / f"0.node{node}"
        before = file.stat().st_mtime_ns
        time.sleep(1.5)
        return file.stat().st_mtime_ns != before

    for folder in folders:
        until(lambda: list(folder.glob("1.*")), 10, "the second incarnation writes")  # noqa: B023
    assert not beats(folders[0], dark)
    assert beats(folders[1], cut)
    cluster.heal_net(cut)
    until(lambda: not beats(folders[1], cut), 60, "Slurm ends the orphan")
    cluster.start_node(dark)
    until(lambda: "idle" in cluster.run(["sinfo", "-h", "-n", f"node{dark}", "-o", "%t"]).stdout, 30, "it is back")
    assert [cluster.job_state(job) for job in jobs] == ["RUNNING"] * 2


def test_a_private_directory_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    cluster.up(Settings(nodes=2, private_dir=tmp_path / "local"))
    look = f"echo $(hostname) > {tmp_path}/local/file; sleep 1; cat {tmp_path}/local/file"
    assert sorted(cluster.run(["srun", "-N2", "bash", "-c", look]).stdout.split()) == ["node0", "node1"]
    assert not list((tmp_path / "local").iterdir())


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [(["unshare", "--user"], "must be root"), (["setpriv", "--bounding-set=-sys_admin"], "unshare is not permitted")],
)
def test_a_machine_that_cannot_hold_a_cluster_is_refused(cluster: Cluster, prefix: list[str], reason: str) -> None:
    refused = cluster.run([*prefix, SCRIPT, "up"], check=False)
    assert refused.returncode == NOT_HERE
    assert reason in refused.stderr
    assert cluster.run(["srun", "hostname"]).stdout == "node0\n"  # the running one is left alone
