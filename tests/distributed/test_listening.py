"""What a run on one machine listens on while it trains: nothing that can be reached from another."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.launchers.task import interface
from scaleprog.recipe import Recipe
from tests.conftest import step_rows
from tests.listening import Listener, listeners, listeners_until_end

STEPS = 12
OUTSIDE = interface("198.51.100.1") or "lo"
STRANGERS = {
    "MASTER_ADDR": "0.0.0.0", "MASTER_PORT": "29500", "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "7", "GROUP_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "GLOO_SOCKET_IFNAME": OUTSIDE, "NCCL_SOCKET_IFNAME": OUTSIDE,
}  # fmt: skip
"""What a shell may hold that somebody has used for another distributed job."""


def test_listeners_are_found() -> None:
    with socket.create_server(("0.0.0.0", 0)) as tcp, socket.create_server(("::", 0), family=socket.AF_INET6) as tcp6:
        found = listeners([os.getpid()])
        assert Listener("tcp", "0.0.0.0", tcp.getsockname()[1]) in found
        assert Listener("tcp6", "::", tcp6.getsockname()[1]) in found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as abstract:
        udp.bind(("127.0.0.1", 0))
        abstract.bind("\0scaleprog-test")
        abstract.listen()
        found = listeners([os.getpid()])
        assert {Listener("udp", "127.0.0.1", udp.getsockname()[1]), Listener("abstract", "", 0)} <= found
    assert [Listener("tcp", a, 1).local for a in ("0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1")] == [False] * 4
    assert [Listener("tcp", a, 1).local for a in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == [True] * 3


@pytest.mark.parametrize(("ranks", "sharding"), [(2, {"engine": "zero", "stage": 3}), (1, {"engine": "replicated"})])
def test_a_run_on_one_machine_listens_on_loopback_only(
    ranks: int, sharding: dict[str, Any], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(make_recipe(train={"max_steps": STEPS}, data={"workers": 1}, sharding=sharding).dump())
    command = [sys.executable, "-m", "scaleprog", "train", recipe, "--nproc", str(ranks), "--run-dir", folder]
    with subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1", **STRANGERS}) as process:
        found = listeners_until_end(process)
    assert process.returncode == 0
    assert max(step_rows(folder)) >= STEPS - 5
    assert [listener for listener in found if not listener.local] == []
    assert {listener.kind for listener in found} == {"tcp"}, "gloo's, and no abstract Unix socket"
