"""FSDP2 with fewer empty tensors, which on 4,096 ranks took most of the seconds of a growth."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_param

from scaleprog.sharding.fsdp import _one_empty_chunk


@given(rows=st.integers(1, 40), ranks=st.integers(1, 64), dim=st.integers(0, 1))
def test_the_chunks_are_those_of_fsdp2(rows: int, ranks: int, dim: int) -> None:
    tensor = torch.arange(rows * 6.0).view(rows, 6)
    theirs = _fsdp_common._chunk_with_empty(tensor, ranks, dim)
    with _one_empty_chunk():
        ours = _fsdp_param._chunk_with_empty(tensor, ranks, dim)
    assert len(ours) == ranks
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert len({id(chunk) for chunk in ours if not chunk.numel()}) <= 1


def test_fsdp2_has_its_own_again_afterwards() -> None:
    with _one_empty_chunk():
        assert _fsdp_param._chunk_with_empty is not _fsdp_common._chunk_with_empty
    assert _fsdp_param._chunk_with_empty is _fsdp_common._chunk_with_empty
