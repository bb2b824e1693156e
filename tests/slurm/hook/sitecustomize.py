"""Python runs this when it starts: in a job's training tasks, and only there, it calls what TASK_HOOKS names.

TASK_HOOKS is a list of module:function, separated by blanks; see tests/slurm/job.py.
"""

import os
import sys
import traceback
from importlib import import_module

TASKS = ("scaleprog.launchers.task", "submitit.core._submit")

# The module that Python runs: what watches srun has that of its tasks among its arguments.
_, _, module = " ".join(sys.orig_argv).partition(" -m ")
if "TASK_HOOKS" in os.environ and module.startswith(TASKS):
    try:
        for hook in os.environ["TASK_HOOKS"].split():
            module, _, function = hook.partition(":")
            getattr(import_module(module), function)()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # Python itself would go on without
