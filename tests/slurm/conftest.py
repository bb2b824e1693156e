"""A real Slurm for the tests of this folder, started once, and anew after a test that broke it or left jobs behind."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.forked import forked  # noqa: F401  # for runs outside of Slurm, with which those inside are compared
from tests.slurm.cluster import CannotRunHere, Cluster


@contextmanager
def own_number() -> Iterator[int]:
    """A cluster number that no other test session of this machine holds; it is free again however this one ends."""
    for number in range(100, 200):
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(Path(f"/tmp/scaleprog-cluster-{number}.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another session's, or another user's
                continue
            yield number
            return
    raise RuntimeError("a hundred test sessions hold a cluster each")


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """The cluster as earlier tests left it; a test usually wants `cluster`."""
    with own_number() as number:
        cluster = Cluster(number)
        try:
            cluster.up()
        except CannotRunHere as reason:
            pytest.skip(str(reason))
        try:
            yield cluster
        finally:
            cluster.down()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """Four idle nodes with the usual settings. For other settings: cluster.up(Settings(...))."""
    yield session_cluster
    print(session_cluster.log())  # pytest shows it where the test failed
    if session_cluster.changed or session_cluster.run(["squeue", "-h"]).stdout:
        session_cluster.up()
