"""What is said of ranks that disagree."""

import pytest

from scaleprog.errors import OverBudget, Preempted, ScaleprogError, Unavailable, of_plain
from scaleprog.ranks.coordinator import NAMED, Coordinator, _camps


def test_two_ranks_are_named_with_their_values() -> None:
    assert _camps(["7", "8"]) == "rank 0 has 7; rank 1 has 8"


def test_a_large_world_takes_one_line() -> None:
    assert _camps(["7"] * 4095 + ["8"]) == "rank 0 and 4094 more ranks have 7; rank 4095 has 8"
    said = _camps([str(rank) for rank in range(4096)])
    assert said.count("has") == NAMED
    assert said.endswith(f"; {4096 - NAMED} more values")


@pytest.mark.parametrize(
    "error", [Preempted("stopped", "SIGTERM"), Preempted("stopped"), OverBudget("too dear"), Unavailable("later")]
)
def test_an_error_of_rank_0_is_the_same_on_every_rank(error: ScaleprogError, one_rank: None) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Coordinator().on_rank_0("a thing", fail)
    assert caught.value is not error
    assert vars(caught.value) == vars(error)
    assert str(caught.value) == str(error)


def test_an_error_of_another_file_keeps_its_message(one_rank: None) -> None:
    class Own(ScaleprogError):
        pass

    def fail() -> None:
        raise Own("why")

    with pytest.raises(ScaleprogError, match="why"):
        Coordinator().on_rank_0("a thing", fail)
    assert type(of_plain({"kind": "dict", "message": "x", "reason": None})) is ScaleprogError
