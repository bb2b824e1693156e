"""Where the ranks of a run meet, and that nobody but a launcher of ours says so."""

import os
import socket

import pytest
import torch.distributed as dist

from scaleprog.errors import Unavailable
from scaleprog.ranks.coordinator import process_group, ranks_per_node
from scaleprog.ranks.rendezvous import STORE, Place

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


def test_a_group_leaves_nothing_behind_for_what_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    before = dict(os.environ)
    with process_group():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert dict(os.environ) == before
