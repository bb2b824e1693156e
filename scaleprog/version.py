"""The version of scaleprog, and that of what it computes; checkpoints name both."""

VERSION = "0.1.0"

ARITHMETIC = 4
"""Grows whenever the same recipe would compute other numbers, beyond rounding; `training/resume.py` lists what has
changed."""
