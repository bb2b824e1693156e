"""Ranks of these tests start fast."""

from tests.forked import forked  # noqa: F401
