# ruff: noqa: F401
"""What `tests.forked` forks processes from: all that a rank or a command needs, imported once."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # with torch's compiler, which DeepSpeed imports for its first engine

import scaleprog.cli
import scaleprog.planning.plan
import scaleprog.reporting.figures
import scaleprog.reporting.report
import scaleprog.reporting.timeline_figure
import scaleprog.training.evaluate_run
import scaleprog.training.export
import scaleprog.training.loop
import tests.conftest
import tests.forked

gc.collect()
gc.freeze()  # a rank's collections, one at each growth, need not look at what is here, nor copy its pages
