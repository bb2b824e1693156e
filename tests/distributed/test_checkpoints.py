"""Ranks that save together: each writes its own, once, and one that cannot fails the save for all."""

import json
from pathlib import Path

from scaleprog.launchers.local import launch
from tests.distributed import ranks


def test_a_rank_whose_disk_is_full_fails_the_save_of_all_and_the_older_one_stays(tmp_path: Path) -> None:
    launch(3, ranks.save_and_fail_on_one, tmp_path)
    errors, newest, found = json.loads((tmp_path / "out.json").read_text())
    assert errors[:3] == [[None]] * 3
    [told] = {error for [error] in errors[3:]}
    assert "step-00000002.0.writing: not written (rank 2: [Errno 28] No space left on device)" in told
    assert newest == "step-00000001"
    assert found == {"stretch": [float(i + 1) for i in range(12)], "everywhere": [7.0] * 3}
    files = sorted(p.name for p in (tmp_path / "checkpoints" / newest).glob("rank-*"))
    assert files == [f"rank-{rank:05d}.safetensors" for rank in range(3)]
