"""Freed memory: it stays with the process while it trains, and goes back to the system after a growth."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")

PROGRAM = """
import resource, torch
from scaleprog.ranks.heap import keep_freed_memory, return_freed_memory
from scaleprog.rundir.vitals import memory

def step():
    [torch.ones(2**20) for _ in range(50)]

keep_freed_memory()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = memory(torch.device("cpu"))["host_mib"]
return_freed_memory()
print(faults, held - memory(torch.device("cpu"))["host_mib"])
"""


def measured(**variables: str) -> tuple[int, float]:
    """The page faults of two steps that use 200 MiB, and the MiB that then go back to the system."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | variables, capture_output=True, text=True, check=True
    )
    faults, returned = done.stdout.split()
    return int(faults), float(returned)


def test_a_step_uses_the_memory_of_the_one_before_almost_without_page_faults() -> None:
    for _ in range(3):  # by chance, something else lies at the end of the heap, and glibc returns nothing
        faults, returned = measured()
        assert faults < 5_000  # of 100,000 pages
        assert returned > 150, "a growth returns it"


def test_what_users_tell_glibc_stands() -> None:
    assert measured(MALLOC_MMAP_THRESHOLD_="131072")[0] > 50_000
