"""What ranks of tests are forked from: a process that has imported all that a rank needs, once (`fork_ranks`)."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # with torch's compiler, which DeepSpeed imports for its first engine

import scaleprog.reporting.figures
import scaleprog.reporting.timeline_figure
import scaleprog.training.loop
import tests.conftest  # noqa: F401

gc.collect()
gc.freeze()  # a rank's collections, one at each growth, need not look at what is here, nor copy its pages
