"""What is said of ranks that disagree."""

from scaleprog.ranks.coordinator import NAMED, _camps


def test_two_ranks_are_named_with_their_values() -> None:
    assert _camps(["7", "8"]) == "rank 0 has 7; rank 1 has 8"


def test_a_large_world_takes_one_line() -> None:
    assert _camps(["7"] * 4095 + ["8"]) == "rank 0 has 7, and 4094 more ranks; rank 4095 has 8"
    said = _camps([str(rank) for rank in range(4096)])
    assert said.count("has") == NAMED
    assert said.endswith(f"; {4096 - NAMED} more values")
