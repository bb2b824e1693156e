"""Ranks of these tests start fast."""

import pytest

from tests.forked import fork_ranks


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
