"""Shards behind a URL: what arrives is what is there, a fault of a server ends no run, and nothing leads elsewhere."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scaleprog.data import transfer
from scaleprog.data.manifest import NAME, Manifest
from scaleprog.data.packed import OpenFile
from scaleprog.data.shard import ShardReader
from scaleprog.data.source import Remote, Shard, source_of
from scaleprog.data.store import Store
from scaleprog.errors import DataError, RecipeError, Unavailable
from scaleprog.files.location import check_location, local_path
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from tests.compare import differences
from tests.conftest import MakeRecipe, run
from tests.unit.command import Command, WriteRecipe, is_mistake
from tests.unit.faulty_server import FaultyServer, serve

pytestmark = pytest.mark.process
PART = 20_000
"""A shard of the patterns has five or six such parts."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and short pauses."""
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def server(patterns: Path) -> Iterator[FaultyServer]:
    with serve(patterns) as found:
        yield found


def first_shard(server: FaultyServer) -> Shard:
    return Manifest.load(server.url).split("train")[0]


@pytest.mark.parametrize("part", [PART, 2**20])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_arrives_is_what_is_there(
    patterns: Path, ranges: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", part)
    with serve(patterns, ranges) as server:
        manifest = Manifest.load(server.url)
        assert replace(manifest, root=str(patterns)) == Manifest.load(patterns)
        for shard in manifest.split("train"):
            asked = len(server.asked)
            assert Remote(server.url).read(shard, verify=False)[:] == (patterns / shard.name).read_bytes()
            assert (len(server.asked) - asked > 1) == (ranges and part == PART), "in parts, if the server has them"


def test_a_run_over_a_server_with_faults_ends_with_the_weights_of_one_from_disk(
    patterns: Path, server: FaultyServer, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def trained(name: str, **data: object) -> Recipe:
        recipe = make_recipe(
            growth={"schedule": "linear", "stages": 2},
            data={"cache": 0, **data},
            train={"epochs": 1},
            evaluate={"every": 1},
        )
        run(recipe, tmp_path / name)
        return recipe

    recipe = trained("disk")
    server.drops, server.cuts, server.delays = 0.05, 0.05, 0.05
    server.dies[40] = 1.0
    trained("web", path=server.url)
    assert not server.dies
    assert differences(recipe, tmp_path / "web", tmp_path / "disk") == []
    parts = sum(path.stat().st_size for path in patterns.glob("*.tar")) // PART
    assert len(server.asked) > parts + 20, "there were faults"


@pytest.mark.parametrize(
    ("fault", "value", "error", "message"),
    [
        ("dead", True, Unavailable, r"train-000000\.tar: no answer for 0\.05 seconds"),
        ("status", 500, Unavailable, r"train-000000\.tar: no answer for 0\.05 seconds: 500"),
        ("status", 403, DataError, r"train-000000\.tar: the server refuses it \(403.*credentials"),
        ("status", 404, DataError, r"train-000000\.tar: no such file"),
        (
            "redirect",
            "http://localhost:9/secret?key=abc",
            DataError,
            r"redirects to another server, http://localhost:9;",
        ),
        ("drops", 1.0, Unavailable, r"train-000000\.tar: no answer"),
        ("cuts", 1.0, DataError, r"train-000000\.tar: truncated: 10000 bytes in place of 20000; copy"),
    ],
)
def test_a_server_that_does_not_give_the_shard(
    server: FaultyServer, fault: str, value: object, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.05 if error is Unavailable else 30.0)
    shard = first_shard(server)
    setattr(server, fault, value)
    with pytest.raises(error, match=message) as caught:
        Remote(server.url).read(shard, verify=False)
    assert type(caught.value) is error
    assert "abc" not in str(caught.value)


def test_a_shard_that_is_not_the_indexed_one(server: FaultyServer) -> None:
    shard = first_shard(server)
    with pytest.raises(DataError, match=rf"{server.url}/train-000000\.tar: the checksum differs"):
        Remote(server.url).read(replace(shard, sha256="0" * 64), verify=False)
    assert server.asked.count("/train-000000.tar") >= 3, "it may have been damaged on its way"
    with pytest.raises(DataError, match=r"train-000000\.tar: truncated"):
        Remote(server.url).read(replace(shard, bytes=shard.bytes + 10 * PART), verify=False)


def test_a_redirect_within_the_server_is_followed(server: FaultyServer, patterns: Path) -> None:
    shard = first_shard(server)
    server.moved = "/old"
    assert Remote(f"{server.url}/old").read(shard, verify=True)[:] == (patterns / shard.name).read_bytes()


LOCATIONS = ["shards", "/data/shards", "./a:b", "s3://bucket/a", "gs://bucket", "http://host:80/a b", "https://host/a/",
             "hf://datasets/user/name@main/folder", "file:///data"]  # fmt: skip
REFUSED = {
    "pipe:cat a": "does not read pipe: and starts no programs",
    "PIPE:cat": "does not read PIPE:",
    "simplecache::s3://a": "chained",
    "s3://a::pipe:cat b": "chained",
    "ftp://host": "does not read ftp:",
    "github://a:b@c": "does not read github:",
    "memory://a": "does not read memory:",
    "file://host/a": "does not read file:",
    "s3:a": "does not read s3:",
    "https://user:secret@host/a": "may not hold a user or a password",
    "s3://key:secret@bucket": "may not hold a user or a password",
    "https://host/a?signature=secret": "neither . nor #",
    "https://host/a#b": "neither . nor #",
    "http:///a": "has a host or bucket",
    "http://[a": "malformed",
}


def test_locations() -> None:
    assert [check_location(location) for location in LOCATIONS] == LOCATIONS
    assert [local_path(location) for location in LOCATIONS if not location.startswith(("s3", "gs", "h"))] == [
        "shards", "/data/shards", "./a:b", "/data",
    ]  # fmt: skip
    assert local_path("s3://bucket") is None


@pytest.mark.parametrize("location", REFUSED)
def test_other_locations_are_refused_and_no_password_is_repeated(location: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=REFUSED[location]) as caught:
        check_location(location)
    with pytest.raises(RecipeError, match=rf"data\.path: .*{REFUSED[location]}") as refused:
        make_recipe(data={"path": location})
    with pytest.raises(DataError, match=REFUSED[location]):
        Manifest.load(location)
    assert "secret" not in f"{caught.value}{refused.value}"


def test_the_names_in_a_manifest_lead_nowhere_else(server: FaultyServer) -> None:
    for name in ("a?b.tar", "%2e%2e/b.tar", "a#b.tar", "a@b.tar", "http:x.tar", "//host/b.tar"):
        shard = replace(first_shard(server), name=name)
        server.asked.clear()
        with pytest.raises(DataError, match="may have only letters, digits"):
            Remote(server.url).read(shard, verify=False)
        assert server.asked == []


def test_images_one_by_one_from_a_store(server: FaultyServer, patterns: Path, tmp_path: Path) -> None:
    manifest, local = Manifest.load(server.url), ShardReader(Manifest.load(patterns), "train")
    for folder, kept in ((tmp_path / "store", True), (tmp_path / "file", False)):
        (tmp_path / "file").touch()
        reader = ShardReader(replace(manifest, store=Store(folder, 2**30)), "train", on_disk=True)
        for index in (0, 1, 0):
            mine, theirs = reader.load(index), local.load(index)
            assert isinstance(mine.data, OpenFile) == kept, "where nothing can be stored, a shard is held whole"
            assert (mine.keys, mine.labels.tolist()) == (theirs.keys, theirs.labels.tolist())
            assert all(bytes(mine.image(i)[0]) == bytes(theirs.image(i)[0]) for i in range(len(mine.keys)))
            del mine
    assert server.asked.count("/train-000000.tar") > 1


def test_a_server_without_ranges_may_take_longer_than_one_answer(
    patterns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte must come within the limit, not all of them."""
    monkeypatch.setattr(transfer, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 20.0)
    with serve(patterns, ranges=False) as server:
        server.trickles = 3.6
        shard = first_shard(server)
        content = Remote(server.url).read(shard, verify=True)
        assert bytes(content) == (patterns / shard.name).read_bytes()


def test_a_library_without_coroutines(patterns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of huggingface."""
    root = "hf://datasets/user/set"
    files = MemoryFileSystem()
    for path in patterns.iterdir():
        files.pipe_file(f"{root}/{path.name}", path.read_bytes())
    monkeypatch.setattr(fsspec, "filesystem", lambda _: files)
    manifest = Manifest.load(root)
    assert manifest.splits == Manifest.load(patterns).splits
    for shard in manifest.split("train"):
        assert source_of(root).read(shard, verify=True)[:] == (patterns / shard.name).read_bytes()


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"s3://bucket/manifest\.json: .*pip install 'scaleprog\[s3\]'"):
        Manifest.load("s3://bucket")


def test_a_recipe_names_a_manifest_apart_from_the_shards(
    patterns: Path, server: FaultyServer, make_recipe: MakeRecipe, tmp_path: Path, command: Command
) -> None:
    (bare := tmp_path / "bare").mkdir()
    for path in patterns.glob("*.tar"):
        shutil.copy(path, bare)
    server.folder, file = bare, tmp_path / "manifest-of-mine.json"
    with pytest.raises(DataError, match=rf"{server.url}: the folder has no manifest\.json.*--manifest FILE"):
        Manifest.load(server.url)
    assert is_mistake(command("shards", "check", server.url, "--write-manifest"), "add --manifest FILE")
    assert command("shards", "check", server.url, "--write-manifest", "--manifest", file, "--workers", 1).code == 0
    assert Manifest.load(server.url, str(file)).splits == Manifest.load(patterns).splits
    assert command("shards", "check", server.url, "--manifest", file, "--workers", 1).code == 0
    plan = Plan.of(make_recipe(data={"path": server.url, "manifest": str(file), "store": "kept", "store_gib": 3}))
    assert plan.manifest.store == Store(Path("kept"), 3 * 2**30)
    assert (plan.manifest.root, plan.manifest.samples("train")) == (server.url, 160)
    assert not (bare / NAME).exists()


def test_images_one_by_one_need_a_disk(server: FaultyServer, write_recipe: WriteRecipe, command: Command) -> None:
    told = command("plan", write_recipe(data={"path": server.url, "memory": 1}))
    assert is_mistake(told, "data.memory: ", "add data.store: FOLDER")


def test_s3(patterns: Path, monkeypatch: pytest.MonkeyPatch, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Over moto's server: the same weights as from disk."""
    from moto.server import ThreadedMotoServer

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("bucket")
        for path in patterns.iterdir():
            bucket.put_file(str(path), f"bucket/set/{path.name}")
        source = source_of("s3://bucket/set/")
        assert source.files() == sorted(path.name for path in patterns.iterdir())
        assert (
            hashlib.sha256(source.fetch("val-000000.tar")).hexdigest() == Manifest.load(patterns).split("val")[0].sha256
        )
        with pytest.raises(DataError, match=r"s3://bucket/none/manifest\.json|s3://bucket/none: the folder has no"):
            Manifest.load("s3://bucket/none")
        longer = replace(Manifest.load("s3://bucket/set").split("val")[0], bytes=10**6)
        with pytest.raises(DataError, match="truncated"):
            source.read(longer, verify=True)
        recipes = [
            make_recipe(growth={"schedule": "original"}, train={"epochs": 0.5}, evaluate={"every": 1}, data=data)
            for data in ({"cache": 0}, {"cache": 0, "path": "s3://bucket/set"})
        ]
        for recipe, name in zip(recipes, ("disk", "s3")):
            run(recipe, tmp_path / name)
        assert differences(recipes[0], tmp_path / "s3", tmp_path / "disk") == []
    finally:
        server.stop()
