"""Python runs this when it starts: in a job's training tasks, and only there, it calls what TASK_HOOKS names.

TASK_HOOKS is a list of module:function, separated by blanks; see tests/slurm/job.py.
"""

import os
import sys
import traceback
from importlib import import_module

if "TASK_HOOKS" in os.environ and {"scaleprog.launchers.task", "submitit.core._submit"} & set(sys.orig_argv):
    try:
        for hook in os.environ["TASK_HOOKS"].split():
            module, _, function = hook.partition(":")
            getattr(import_module(module), function)()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # Python itself would go on without
