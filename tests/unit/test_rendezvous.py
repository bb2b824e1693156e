"""Where the ranks of a run meet, and that nobody but a launcher of ours says so."""

import multiprocessing
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from scaleprog.errors import ScaleprogError, Unavailable
from scaleprog.ranks import coordinator
from scaleprog.ranks.coordinator import process_group, ranks_per_node
from scaleprog.ranks.rendezvous import STORE, Place, launcher, of_another_launcher

STRANGERS = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1",
             "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "none0", "NCCL_SOCKET_IFNAME": "none0"}  # fmt: skip


def test_a_place_is_handed_over_by_the_environment() -> None:
    place = Place(3, 8, 1, 4, "tcp:10.0.0.1:15000")
    assert Place.current(place.variables()) == place
    assert Place.current({**place.variables(), STORE: ""}) == Place.current(STRANGERS) == Place()


@pytest.mark.parametrize(
    ("store", "here"),
    [("", True), ("file:/proc/self/fd/7", True), ("tcp:127.0.0.1:15000", True), ("tcp:10.0.0.1:15000", False)],
)
def test_what_is_on_one_machine_need_not_be_reached(store: str, here: bool) -> None:
    assert Place(store=store).on_one_machine == here


def test_what_somebody_elses_job_has_left_in_the_environment_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STRANGERS, STORE: ""}.items():
        monkeypatch.setenv(name, value)
    with process_group() as (coordinator, _):
        assert (coordinator.rank, coordinator.world, ranks_per_node()) == (0, 1, 1)
        assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed reads it"
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_rank_0_says_where_it_cannot_listen() -> None:
    reasons = {"127.0.0.1": "Address already in use", "192.0.2.99": "Cannot assign requested address"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for address, why in reasons.items():
            place = Place(0, 2, 0, 1, f"tcp:{address}:{port}")
            with (
                pytest.raises(Unavailable, match=rf"rank 0 on .* cannot listen at {address}:{port}: {why}"),
                place.joined("gloo"),
            ):
                pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_waited_for_within_bounds(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleprog.ranks.rendezvous.MEET_LIMIT", timedelta(seconds=2))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    message = rf"rank {rank} on .*: the 3 ranks have not met at 127\.0\.0\.1:{port} within 0 min .*; do all of them run"
    with pytest.raises(Unavailable, match=message), Place(rank, 3, 0, 1, f"tcp:127.0.0.1:{port}").joined("gloo"):
        pass


def test_more_ranks_on_a_node_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in Place(7, 8, 3, 4, "tcp:192.0.2.1:1").variables().items():
        monkeypatch.setenv(name, value)
    message = "rank 7 is number 4 of the 4 ranks on .*; CUDA devices available there: 2; request as many GPUs as ranks"
    with pytest.raises(ScaleprogError, match=message), process_group():
        pass


@pytest.mark.parametrize(("found", "listed"), [(0, "0,1"), (1, "GPU-1f,GPU-2e")])
def test_a_gpu_that_is_gone_may_come_back(found: int, listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the job starts again, and no rank trains on the CPU in place of it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: found > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    for name, value in Place(7, 8, 1, 2, "tcp:192.0.2.1:1").variables().items():
        monkeypatch.setenv(name, value)
    message = rf"rank 7: CUDA finds {found} of the 2 GPUs that CUDA_VISIBLE_DEVICES lists on .*; one may be broken"
    with pytest.raises(Unavailable, match=message), process_group():
        pass


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_none(hidden: str, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert coordinator._listed_gpus() == 0


def test_another_launcher_is_one_that_starts_several() -> None:
    assert of_another_launcher(STRANGERS) == "RANK='3', WORLD_SIZE='8', MASTER_ADDR='192.0.2.1'"
    own = Place(3, 8, 3, 8, "file:/proc/self/fd/7").variables()
    for none in ({}, STRANGERS | {"WORLD_SIZE": "1"}, STRANGERS | {"WORLD_SIZE": "x"}, STRANGERS | own):
        assert of_another_launcher(none) == ""


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network of its own")
@pytest.mark.parametrize("setup", ["true", "ip link set lo up; ip address del 127.0.0.1/8 dev lo"])
def test_a_machine_without_loopback_is_told_how_to_get_it(setup: str) -> None:
    code = "from scaleprog.ranks.coordinator import process_group as p\nwith p(): pass"
    script = f'{setup}; hostname nowhere.invalid; exec "$0" -c "$1"'
    command = ["unshare", "--net", "--uts", "bash", "-c", script, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "the loopback interface 'lo' " in done.stderr.splitlines()[-1], done.stderr
    assert "run `ip link set lo up`" in done.stderr
    up = ["unshare", "--net", "--uts", "bash", "-c", f"ip link set lo up; {script}", sys.executable, code]
    assert "true" not in setup or subprocess.run(up, timeout=100, check=False).returncode == 0, "a name nobody resolves"


def test_a_group_leaves_nothing_behind_for_what_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    before = dict(os.environ)
    with process_group():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("words", "store", "found"),
    [
        (["scaleprog", "train", "recipe.yaml"], "file:/proc/self/fd/3", True),
        (["--multiprocessing-fork"], "file:/proc/self/fd/3", True),  # a run of a sweep
        (["scaleprog", "train", "recipe.yaml"], "", False),
        (["notebook"], "file:/proc/self/fd/3", False),  # which may live on when the run has ended
    ],
)
def test_only_a_process_of_scaleprog_is_the_launcher_of_a_rank(
    words: list[str], store: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE) as parent:
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
        for name, value in Place(0, 1, 0, 1, store).variables().items():
            monkeypatch.setenv(name, value)
        assert launcher() == (parent.pid if found else None)
        parent.kill()
