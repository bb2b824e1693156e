"""Variables of the environment that sbatch and srun obey, or hand on to a job."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLES = {
    "array": ("SBATCH_ARRAY_INX",),
    "mem": ("SBATCH_MEM_PER_NODE",),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "time": ("SBATCH_TIMELIMIT",),
}
"""sbatch's variables for options, where their names are not those of the options."""
CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables of Slurm's programs that say where they find Slurm, and belong to no job."""


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Inside, variables of the environment have these values; None: they are not there."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def overriding(script: str) -> list[str]:
    """The variables by which sbatch would override options that a batch script sets; those of others count."""
    options = re.findall("^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    return [
        name for option in options for name in VARIABLES.get(option, (f"SBATCH_{option.upper().replace('-', '_')}",))
    ]


def of_this_job() -> list[str]:
    """The variables that tell a process of a job about its own job, which sbatch would hand on to another one.

    Its srun would obey them: it would bind the ranks to the cores of this process, and give them its memory.
    """
    if "SLURM_JOB_ID" not in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
        return []  # then such variables are what the user wants of srun
    return [name for name in os.environ if re.match("(SLURM|SLURMD|SRUN|PMIX|PMI)_", name) and name not in CLUSTER]
