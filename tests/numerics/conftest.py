"""Ranks of these tests start fast."""

from collections.abc import Iterator

import pytest

from tests.forked import fork_ranks


@pytest.fixture(scope="package", autouse=True)
def forked() -> Iterator[None]:
    """Before any fixture of a module, which may start ranks, too."""
    with pytest.MonkeyPatch.context() as patch:
        fork_ranks(patch)
        yield
