"""Token labels: where an augmented image comes from, what a teacher says of its tokens, and bad label shards."""

import math
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torchvision.ops import roi_align

from scaleprog.data import token_labels
from scaleprog.data.augment import Augmentation, BatchRequest
from scaleprog.data.manifest import Manifest
from scaleprog.data.operations import Operation, apply
from scaleprog.data.order import Order
from scaleprog.data.origin import FLIP, IDENTITY, MOVES, after, of_crop
from scaleprog.data.reader import DataSet, TrainReader
from scaleprog.data.shard import ShardReader
from scaleprog.data.token_labels import LabelShards, aligned, dense_logits, encode, pack, targets, unpack
from scaleprog.errors import DataError
from scaleprog.planning.plan import Plan
from scaleprog.recipe.keys import AugmentSettings, DataSettings
from scaleprog.shards import token_labels as labels_builder
from scaleprog.shards.build import STAGING
from scaleprog.shards.token_labels import Teacher, build, place_logits
from tests.augmented import train_images_with_origins
from tests.conftest import CLASSES, MakeRecipe, draw_patterns
from tests.unit.command import Command

TEACHER = "test_byobnet"
GRID = (6, 5, 3)


def disk(side: int, x: float, y: float) -> np.ndarray:
    """A white disk around (x, y), in parts of the side, on black; (side, side, 3) uint8."""
    image = np.zeros((side, side, 3), np.uint8)
    cv2.circle(image, (round(x * side), round(y * side)), side // 12, (255, 255, 255), -1)
    return image


def center(image: np.ndarray) -> tuple[float, float]:
    """The center of what is brighter than the rest, in parts of the side."""
    mass = np.maximum(image.astype(float).mean(-1) - np.median(image), 0)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return float((x * mass).sum() / mass.sum() / image.shape[1]), float((y * mass).sum() / mass.sum() / image.shape[0])


def maps(count: int, classes: int, grid: tuple[int, int, int] = GRID, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.empty((count, *grid), token_labels.ENTRY)
    found["logit"] = rng.normal(5, 3, found.shape)
    found["class"] = rng.random((count, *grid[:2], classes)).argsort(-1)[..., : grid[2]]
    return found


@pytest.mark.parametrize(
    ("name", "amount"), [("shear_x", 0.2), ("shear_y", 0.2), ("translate_x", 0.3), ("translate_y", 0.3), ("rotate", 21)]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_origin_of_a_move_finds_the_object_that_it_moved(name: str, amount: float, sign: int) -> None:
    shown = disk(120, 0.55, 0.4)
    moved, origin = apply(shown, Operation(name, sign * amount), (0, 0, 0)), MOVES[name](sign * amount)
    assert origin @ (*center(moved), 1) == pytest.approx(center(shown), abs=0.002)
    assert not np.allclose(origin, IDENTITY)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_the_origin_of_a_whole_augmentation_finds_the_object(device: Literal["cpu", "accelerator"]) -> None:
    chosen = AugmentSettings(scale=(0.5, 1.0), flip=0.5, randaugment="rand-m6-mstd0.5-inc1", device=device)
    shown = cv2.resize(disk(200, 0.55, 0.45), (260, 200))
    png = memoryview(cv2.imencode(".png", shown)[1].tobytes())
    augmentation = Augmentation(chosen, 3, seed=1)
    images, origins = train_images_with_origins(augmentation, [(png, "here")] * 80, BatchRequest(0, 0, 96), 0)
    moved, true = 0, center(shown)
    for image, origin in zip(images, origins):
        pixels = ((image - image.min()) / (image.max() - image.min()) * 255).permute(1, 2, 0).numpy()
        x, y = np.linalg.solve(origin[:, :2], np.array(true) - origin[:, 2])
        if not (0.12 < x < 0.88 and 0.12 < y < 0.88):
            continue
        row, column = int(y * 96), int(x * 96)
        at = pixels.mean(-1)[row - 1 : row + 2, column - 1 : column + 2].mean()
        corner = np.median(pixels.mean(-1))
        moved += abs(at - corner) > 25
    assert moved > 40, "colors may hide the disk (solarize, posterize), places may not"


def test_origins_compose_in_the_order_of_the_operations() -> None:
    crop, turn = after(of_crop((10, 20, 50, 40), 100, 100), FLIP), np.array([[0.0, -1.0, 1.0], [1.0, 0.0, 0.0]])
    point = np.array([0.2, 0.7, 1.0])
    inner = turn @ point
    assert after(crop, turn) @ point == pytest.approx(crop @ (*inner, 1.0))
    assert crop @ (0, 0, 1) == pytest.approx((0.5, 0.2)), "flipped: the left edge was the right one"


@pytest.mark.parametrize(
    ("side", "grid"), [(14, (18, 18, 5)), (7, (9, 9, 5)), (5, (7, 7, 3)), (8, (18, 18, 5)), (1, (9, 9, 2))]
)
@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_is_aligned_as_by_roi_align(side: int, grid: tuple[int, int, int], flipped: bool) -> None:
    classes, rng = 11, np.random.default_rng(side)
    rows = maps(6, classes, grid)
    corners = np.sort(rng.random((6, 2, 2)), axis=1)  # (from, to) x (x, y)
    crops = [(*(round(v * 1000) for v in a), *(round(v * 1000) + 1 for v in b)) for a, b in corners]
    whole = [of_crop(crop, 1000, 1000) for crop in crops]
    origins = torch.from_numpy(np.stack([after(crop, FLIP) if flipped else crop for crop in whole])).float()
    logits = dense_logits(unpack(pack(list(rows), origins), grid)[0], classes)
    scattered = torch.zeros(6, classes, *grid[:2])
    for i, y, x, k in np.ndindex(rows.shape):
        scattered[i, int(rows["class"][i, y, x, k]), y, x] = float(rows["logit"][i, y, x, k])
    assert torch.equal(logits.permute(0, 3, 1, 2), scattered)
    boxes = torch.tensor([[i, *(v / 1000 * grid[0] for v in crop)] for i, crop in enumerate(crops)])
    points = math.ceil(max(grid[:2]) / side)
    expected = roi_align(scattered, boxes, side, sampling_ratio=points, aligned=True)
    expected = expected.flip(3) if flipped else expected
    assert torch.allclose(aligned(logits, origins, side), expected.flatten(2).mT, atol=1e-4)


def test_the_transposed_crop_is_that_of_token_labelings_code() -> None:
    """x1, y1, x2, y2 = top, left, bottom, right, half a cell back, with an operator that is not aligned."""
    rows, grid, classes = maps(4, 9, (10, 10, 4)), (10, 10, 4), 9
    boxes = [(100, 300, 500, 450), (0, 0, 1000, 1000), (600, 100, 990, 900), (400, 500, 800, 1000)]
    origins = torch.from_numpy(np.stack([of_crop(box, 1000, 1000, transposed=True) for box in boxes])).float()
    logits = dense_logits(unpack(pack(list(rows), origins), grid)[0], classes)
    theirs = torch.tensor([
        [i, *(v / 1000 * grid[0] - 0.5 for v in (top, left, bottom, right))]
        for i, (left, top, right, bottom) in enumerate(boxes)
    ])  # fmt: skip
    expected = roi_align(logits.permute(0, 3, 1, 2), theirs, 5, sampling_ratio=2, aligned=False)
    assert torch.allclose(aligned(logits, origins, 5), expected.flatten(2).mT, atol=1e-4)


def test_an_object_at_the_top_right_tells_the_two_crops_apart() -> None:
    """A crop of the right side has the object; the transposed one, of the bottom, does not."""
    found = np.zeros((1, 8, 8, 2), token_labels.ENTRY)
    found["class"] = (0, 1)
    found["logit"][0, :3, 5:, 1] = 30
    for transposed, share in ((False, 1.0), (True, 0.0)):
        origin = torch.from_numpy(of_crop((125, 0, 200, 75), 200, 200, transposed)).float()[None]
        whole, dense = targets(*unpack(pack(list(found), origin), (8, 8, 2)), 3, 2, 0.0)
        assert float(dense[0, :, 1].mean()) == pytest.approx(share if share else 0.5, abs=0.02), "0.5: no logits at all"
        assert (float(whole[0, 1]) > 0.99) == (not transposed)


def test_targets_are_smoothed_softmax_over_all_classes() -> None:
    rows, origins = maps(2, 7), torch.from_numpy(np.stack([IDENTITY, of_crop((0, 0, 5, 6), 10, 10)])).float()
    logits = dense_logits(unpack(pack(list(rows), origins), GRID)[0], 7)
    whole, dense = targets(*unpack(pack(list(rows), origins), GRID), 3, 7, 0.1)
    assert whole.shape == (2, 7)
    assert dense.shape == (2, 9, 7)
    assert torch.allclose(whole, aligned(logits, origins, 1)[:, 0].softmax(-1) * 0.9 + 0.1 / 7)
    assert torch.allclose(dense.sum(-1), torch.ones(2, 9))
    beyond = torch.from_numpy(np.array([[[1, 0, 2.0], [0, 1, 0]]])).float()
    assert torch.allclose(
        targets(*unpack(pack(list(rows[:1]), beyond), GRID), 3, 7, 0.1)[1], torch.full((1, 9, 7), 1 / 7)
    )


# ---- the teacher


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.load(draw_patterns(tmp_path_factory.mktemp("patterns")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(timm.create_model(TEACHER, num_classes=CLASSES).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def labels(images: Manifest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("token-labels") / "labels"
    build(Path(images.root), out, TEACHER, weights, 96, 3, 8, 1)
    return out


@pytest.mark.parametrize("name", ["test_byobnet", "test_convnext", "test_nfnet", "resnet18"])
def test_the_mean_of_a_linear_teachers_places_is_what_it_says_of_the_image(name: str) -> None:
    net, shown = timm.create_model(name, num_classes=6).eval(), torch.randn(2, 3, 96, 128)
    places = place_logits(net, shown)
    features = net.forward_features(shown)
    assert places.shape == (2, *features.shape[2:], 6)
    for y, x in ((0, 0), (1, 2)):
        alone = net.forward_head(features[:, :, y : y + 1, x : x + 1])
        assert torch.allclose(places[:, y, x], alone, atol=1e-5)
    if name in ("resnet18", "test_byobnet"):
        assert torch.allclose(places.mean((1, 2)), net(shown), atol=1e-4)


@pytest.mark.parametrize("state", [{0: torch.zeros(1)}, {"state_dict": {0: torch.zeros(1)}}, {"fc": 3}])
def test_what_is_no_state_dict_is_refused(state: dict, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(DataError, match=r"file\.pth: not the weights of a model: (0|'fc') is no tensor with a name"):
        Teacher(TEACHER, CLASSES, tmp_path / "file.pth").load(torch.device("cpu"))


def test_label_shards_hold_what_the_teacher_says_of_the_whole_image(
    images: Manifest, labels: Path, weights: Path
) -> None:
    net = Teacher(TEACHER, CLASSES, weights).load(torch.device("cpu"))
    config = timm.data.resolve_model_data_config(net)
    shards, found = ShardReader(images, "train"), LabelShards.of(str(labels), images)
    for index in (0, 4):
        shard = shards.load(index)
        stored = found.load(index, shard.keys, True)
        assert len(stored) == len(shard.keys)
        for row in (0, len(shard.keys) - 1):
            data, _ = shard.image(row)
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            whole = torch.ops.aten._upsample_bicubic2d_aa(whole, [96, 96], False, None, None).float() / 255
            mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
            top = place_logits(net, (whole - mean) / std)[0].topk(3, -1)
            assert np.array_equal(stored["class"][row], top.indices.numpy())
            assert stored["logit"][row] == pytest.approx(top.values.numpy(), rel=2e-3, abs=2e-3)


def test_an_image_that_cannot_be_labeled_costs_no_finished_shard(
    images: Manifest, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = labels_builder.place_logits, []

    def overflow(net: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return original(net, pixels) / (len(seen) <= 10)

    with monkeypatch.context() as patch:
        patch.setattr(labels_builder, "place_logits", overflow)
        with pytest.raises(DataError, match="not finite in half precision"):
            build(Path(images.root), tmp_path / "labels", TEACHER, weights, 96, 3, 8, 1)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels" / STAGING).glob("*.tar")}
    assert len(kept) >= 2
    build(Path(images.root), tmp_path / "labels", TEACHER, weights, 96, 3, 8, 1)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("*.tar")}
    assert len(kept.items() & done.items()) >= 2


def test_labels_do_not_depend_on_the_number_of_workers_and_are_built_once(
    images: Manifest, labels: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(Path(images.root), tmp_path / "two", TEACHER, weights, 96, 3, 8, 2)
    assert Manifest.load(tmp_path / "two").splits == Manifest.load(labels).splits
    build(Path(images.root), tmp_path / "two", TEACHER, weights, 96, 3, 8, 2)
    assert "already built, nothing to do" in capsys.readouterr().out


def test_the_size_of_a_label_map_is_as_documented() -> None:
    """18 x 18 places with 5 classes each, as NFNet-F6 gives of 576 px."""
    assert len(encode(np.zeros((18, 18, 5)), np.zeros((18, 18, 5)))) == 18 * 18 * 5 * 4 + 128


def test_the_reader_joins_labels_by_key(images: Manifest, labels: Path, tmp_path: Path) -> None:
    found = LabelShards.of(str(labels), images)
    settings = DataSettings(path="", workers=0)
    order = Order(tuple(s.samples for s in images.split("train")), 3, 4, 16)
    data = DataSet(images, settings, AugmentSettings(), 3, found)
    for workers in (0, 2):
        reader = TrainReader(
            DataSet(images, DataSettings(path="", workers=workers), data.augment, 3, found), order, 1, 0, 1
        )
        with reader.stream([BatchRequest(1, 0, 16), BatchRequest(1, 1, 32)], 32) as stream:
            for batch in stream:
                stored, origins = unpack(batch.token_labels, found.grid)
                for row, sample in enumerate(batch.ids.tolist()):
                    shard, index = np.searchsorted(np.cumsum(order.counts), sample, "right"), sample
                    index -= sum(order.counts[:shard])
                    theirs = found.load(int(shard), ShardReader(images, "train").load(int(shard)).keys, False)[index]
                    assert np.array_equal(stored[row, 1].numpy(), theirs["class"].astype(np.float32))
                    assert np.array_equal(stored[row, 0].numpy(), theirs["logit"].astype(np.float32))
                assert (origins[:, 0, 0].abs() <= 1).all()
    assert reader.memory(32) > TrainReader(DataSet(images, settings, data.augment, 3), order, 1, 0, 1).memory(32)


# ---- bad input


def rewritten(labels: Path, out: Path, change: Any) -> Path:
    """A copy of label shards whose first tar has changed samples, with a manifest that knows it."""
    from webdataset.writer import TarWriter

    from scaleprog.data.manifest import Shard
    from scaleprog.shards.samples import read_members

    shutil.copytree(labels, out)
    manifest = Manifest.load(out)
    path = out / manifest.split("train")[0].name
    kept = list(read_members(path))
    path.unlink()
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        count = 0
        for key, members in kept:
            for name, content in change(key, members):
                writer.write({"__key__": name, **content})
                count += 1
    shards = (Shard.measure(path, manifest.split("train")[0].samples), *manifest.split("train")[1:])
    Manifest(str(out), manifest.classes, {"train": shards}, manifest.source).save()
    return out


def headed(header: str) -> bytes:
    """A file of numpy's form with this header and no content."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda key, files: [(key, files)] if key != "train00003" else [],
            "no token labels of 1 samples, such as 'train00003'",
        ),
        (lambda key, files: [(key + "x", files)], "'train00000x' is not in the training shard"),
        (lambda key, files: [(key, files)] * 2, "'train00000.topk.npy' occurs twice"),
        (
            lambda key, files: [(key, {"topk.npy": encode(np.zeros((2, 2, 3)), np.zeros((2, 2, 3)))})],
            "'train00000': a label map of (2, 2, 3)",
        ),
        (lambda key, files: [(key, {"topk.npy": files["topk.npy"][:-3]})], "'train00000': no label map"),
        (lambda key, files: [(key, {"topk.npy": headed("{'descr': (")})], "'train00000': no label map"),
        (lambda key, files: [(key, {"topk.npy": headed("\n  x\n y")})], "'train00000': no label map"),
        (
            lambda key, files: [
                (key, {"topk.npy": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,)}")})
            ],
            "'train00000': no label map",
        ),
        (
            lambda key, files: [(key, {"topk.npy": encode(np.zeros((3, 3, 3)), np.full((3, 3, 3), 9))})],
            "'train00000': a label map with a class that does not exist",
        ),
    ],
)  # fmt: skip
def test_bad_label_maps_are_named(change: Any, told: str, images: Manifest, labels: Path, tmp_path: Path) -> None:
    found = LabelShards.of(str(rewritten(labels, tmp_path / "bad", change)), images)
    reader = ShardReader(images, "train", 0, found.load)
    with pytest.raises(DataError, match=rf"bad/train-000000.tar: .*{re.escape(told)}"):
        reader.load(0)


def test_labels_of_other_images_or_classes_are_refused(
    images: Manifest, labels: Path, weights: Path, tmp_path: Path
) -> None:
    more = Manifest(images.root, (*images.classes, "more"), images.splits)
    with pytest.raises(DataError, match=r"the teacher has other classes \(4\) than .* \(5\)"):
        LabelShards.of(str(labels), more)
    fewer = Manifest(str(labels), images.classes, {"train": images.split("train")[1:]}, Manifest.load(labels).source)
    with pytest.raises(DataError, match=r"token labels of 160 images in 5 shards, but .* has 124 in 4"):
        LabelShards.of(str(labels), fewer)
    with pytest.raises(DataError, match=r"no token labels; build them with `scaleprog shards token-labels`"):
        LabelShards.of(images.root, images)
    assert not LabelShards.of(str(labels), images).other_images
    other = draw_patterns(tmp_path / "other", seed=9)
    assert LabelShards.of(str(labels), Manifest.load(other)).other_images, "only their keys are the same"
    for whole, expected in ((images, False), (Manifest.load(other), True)):
        few = whole.first("train", 1)
        assert LabelShards.of(str(labels), few, whole).other_images == expected, "whether or not all shards are used"
    with pytest.raises(DataError, match=r"another build \(images: "):
        build(other, labels, TEACHER, weights, 96, 3, 8, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--teacher", "resnet1"), "timm has no model 'resnet1'"),
        (("--teacher", "hf-hub:timm/resnet18"), "timm has no model 'hf-hub:timm/resnet18'"),
        (("--teacher", "resnet18.nonsense"), "timm cannot build resnet18.nonsense (Invalid pretrained tag"),
        (("--teacher", "deit_tiny_patch16_224"), "it ends in tokens, not in a grid of features"),
        (("--teacher", TEACHER, "--weights", "missing.pth"), "missing.pth: cannot read the weights"),
        (("--teacher", "resnet18", "--weights", "WEIGHTS"), "not weights of resnet18 for the 4 classes"),
        (("--teacher", TEACHER, "--top", "5"), "with 5 of 4 classes"),
        (("--teacher", "resnet18"), "resnet18 knows 1000 classes, but the shards have 4"),
        (("--teacher", TEACHER, "--weights", "MORE"), "holds more than tensors, which could run code when read"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    options: tuple[str, ...], told: str, images: Manifest, weights: Path, tmp_path: Path, command: Command
) -> None:
    torch.save({"state_dict": {}, "args": Namespace(lr=1)}, tmp_path / "more.pth")
    places = {"WEIGHTS": str(weights), "MORE": str(tmp_path / "more.pth")}
    chosen = [places.get(option, option) for option in options]
    ended = command("shards", "token-labels", images.root, tmp_path / "out", "--top", "3", *chosen)
    assert ended.code == 2
    assert told in ended.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_recipe_with_token_labels_needs_a_family_that_has_a_head_for_them(
    make_recipe: MakeRecipe, images: Manifest, labels: Path
) -> None:
    with pytest.raises(Exception, match=r"data.token_labels: vit_tiny_patch16_224 has no head for its tokens"):
        Plan.of(make_recipe(data={"path": images.root, "token_labels": str(labels)}))


def test_the_loss_of_volo_is_the_published_one() -> None:
    from scaleprog.models.elastic import Targets
    from scaleprog.models.volo import ElasticVolo

    torch.manual_seed(0)
    whole, dense = torch.randn(4, 7), torch.randn(4, 9, 7)
    mixed, own, tokens = (torch.rand(*shape).softmax(-1) for shape in ((4, 7), (4, 7), (4, 9, 7)))

    def soft(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    found = ElasticVolo.loss((whole, dense), Targets(mixed, own, tokens))
    assert float(found) == pytest.approx(float(soft(whole, mixed) + 0.5 * soft(dense, tokens)), rel=1e-6)
    assert torch.allclose(ElasticVolo.loss((whole, dense), Targets(mixed, own, tokens).of(slice(0, 4))), found)
