"""scaleprog from Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import scaleprog
from scaleprog.errors import RecipeError
from scaleprog.models.bare import grow_model
from scaleprog.shards.digits import build

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def test_public_names_are_those_of_the_api() -> None:
    from scaleprog import api

    assert api.__all__ == scaleprog.__all__
    assert all(getattr(scaleprog, name) is getattr(api, name) for name in scaleprog.__all__)
    assert set(scaleprog.__all__) <= set(dir(scaleprog))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = scaleprog.trian  # type: ignore[attr-defined]


def test_no_module_bears_a_public_name() -> None:
    """Importing it would put the module in the place of the function."""
    there = {path.stem for path in (ROOT / "scaleprog").iterdir()}
    assert not there & set(scaleprog.__all__)


def test_the_package_itself_imports_no_torch() -> None:
    check = "import scaleprog, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    build(tmp_path / "data/digits", seed=0)
    names: dict[str, object] = {}
    exec(example, names)  # our own text
    assert names["found"].top1 > 15  # type: ignore[attr-defined]
    assert (tmp_path / "runs/notebook.safetensors").exists()


@pytest.fixture
def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=32, num_heads=2, img_size=32, num_classes=4)


def test_identity_computes_the_same(small: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    grown = grow_model(small, 7, "identity").eval()
    assert len(grown.blocks) == 7
    assert torch.allclose(grown(images), small.eval()(images), atol=1e-6)


@pytest.mark.parametrize(("operator", "sources"), [("stacking", [0, 1, 2, 0, 1]), ("interpolation", [0, 1, 1, 2, 2])])
def test_layers_are_copies_of_their_sources(small: torch.nn.Module, operator: str, sources: list[int]) -> None:
    grown = grow_model(small, 5, operator)  # type: ignore[arg-type]
    for layer, source in zip(grown.blocks, sources):
        old, new = small.blocks[source].state_dict(), layer.state_dict()  # type: ignore[index]
        assert all(torch.equal(old[key], new[key]) for key in old)
    weight = grown.blocks[0].mlp.fc1.weight
    assert weight.data_ptr() != small.blocks[0].mlp.fc1.weight.data_ptr()  # type: ignore[index]


@pytest.mark.parametrize("operator", ["interpolation", "stacking", "rand_init"])
def test_stochastic_depth_is_that_of_timms_own_model_of_that_depth(operator: str) -> None:
    few, many = (
        timm.create_model(
            "vit_tiny_patch16_224", depth=depth, embed_dim=32, num_heads=2, img_size=32, drop_path_rate=0.2
        )
        for depth in (3, 7)
    )
    grown = grow_model(few, 7, operator)  # type: ignore[arg-type]
    rates = [[getattr(b.drop_path2, "drop_prob", 0.0) for b in net.blocks] for net in (grown, many)]
    assert rates[0] == pytest.approx(rates[1])


def test_fresh_layers_are_those_on_top(small: torch.nn.Module) -> None:
    grown = grow_model(small, 4, "rand_init")
    assert torch.equal(grown.blocks[2].mlp.fc1.weight, small.blocks[2].mlp.fc1.weight)  # type: ignore[index]
    fresh = grown.blocks[3].mlp.fc1
    assert not torch.equal(fresh.weight, small.blocks[0].mlp.fc1.weight)  # type: ignore[index]
    assert 0.015 < fresh.weight.detach().std() < 0.025  # timm's truncated normal
    assert not fresh.bias.any()


def test_timm_saves_and_loads_what_has_grown(small: torch.nn.Module, tmp_path: Path) -> None:
    grown = grow_model(small, 5).eval()
    assert [info["module"] for info in grown.feature_info] == [f"blocks.{place}" for place in range(5)]
    save_for_hf(grown, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), grown(images))
    assert len(small.feature_info) == 3


def test_what_cannot_be_grown(small: torch.nn.Module) -> None:
    with pytest.raises(RecipeError, match="cannot grow Linear"):
        grow_model(torch.nn.Linear(2, 2), 3)
    with torch.device("meta"):
        differential = timm.create_model("vit_dwee_patch16_reg1_gap_256")
    with pytest.raises(RecipeError, match="only a timm VisionTransformer of plain blocks"):
        grow_model(differential, 13)  # a number in each layer follows from its position
    with pytest.raises(ValueError, match="cannot grow 3 layers into 2"):
        grow_model(small, 2)
