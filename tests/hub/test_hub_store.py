"""Stores as datasets of the hub: `sagsae push STORE`, and `--store hf://…` for reading by ranges."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.folders import contents
from support.runs import weights_of
from support.serving.hub import Hub
from support.serving.hub import hub as hub
from support.stores import unfinished

from shared.config import EvalConfig, TrainConfig
from shared.errors import BusyError, DamagedError, UserError
from shared.files.base import parent_of
from shared.files.open import open_files
from shared.hub.place import parse_place
from shared.schemas.exchange import PullConfig, PushConfig
from shared.store.listing import describe_store, list_stores
from shared.store.opened import Store, find_hookpoint
from shared.store.verify import verify
from train.evaluate import evaluate
from train.hub.pull import pull
from train.hub.push import push
from train.run import train

# huggingface_hub itself makes requests in a form that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "tester/acts"
URL = f"hf://{REPO}"


def pushing(source: Path, **more: Any) -> PushConfig:
    return PushConfig(**{"source": str(source), "repo": REPO, "private": True, **more})


@pytest.fixture
def served(hub: Hub, store: Store) -> Hub:
    """The hub with the session's store."""
    push(pushing(store.root))
    return hub


def digests(run: Path) -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in weights_of(run).items()}


# Push


def test_a_store_is_pushed_with_one_commit_and_a_second_push_sends_nothing(hub: Hub, store: Store) -> None:
    done = push(pushing(store.root))
    assert (done.kind, done.commits, hub.n_commits, done.private) == ("dataset", 1, 1, True)
    there = hub.dataset(REPO).files
    ours = {path: data for path, data in contents(store.root).items() if not path.startswith(".sagsae")}
    ours["record.json"] = (store.root / "record.json").read_bytes()
    assert there.keys() == {*ours, "README.md"}
    assert all(there[path] == data for path, data in ours.items())
    puts = hub.puts
    again = push(pushing(store.root))
    assert (again.files_sent, again.commits, again.files_there) == (0, 0, len(there))
    assert (hub.puts, hub.n_commits) == (puts, 1)


def test_only_what_the_manifest_names_is_sent(hub: Hub, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    (copy / "notes.txt").write_text("mine")
    (copy / "layer_01" / "mlp_out" / "c" / "99").mkdir()
    (copy / "layer_01" / "mlp_out" / "c" / "99" / "0").write_bytes(b"never committed")
    push(pushing(copy))
    assert not {path for path in hub.dataset(REPO).files if "notes" in path or "/99/" in path}


def test_the_card_says_what_the_store_is(hub: Hub, store: Store) -> None:
    push(pushing(store.root, license="cc-by-4.0"))
    _, front, text = hub.dataset(REPO).files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert f"{store.spec.n_tokens:,} tokens" in text
    assert all(f"`{hook}`" in text for hook in store.spec.hookpoints)
    assert f"--store {URL}" in text
    assert store.spec.model["name"] not in text


def test_a_cut_push_leaves_nothing_that_looks_like_a_store(hub: Hub, store: Store) -> None:
    hub.cut = lambda number: number > 5
    with pytest.raises(BusyError, match="the hub cannot be reached while uploading"):
        push(pushing(store.root))
    assert hub.dataset(REPO).files == {}
    with pytest.raises(UserError, match="holds no store"):
        Store.open(URL)
    hub.cut = lambda _: False
    arrived, before = len(hub.storage), hub.puts
    assert push(pushing(store.root)).commits == 1
    assert hub.puts - before == len(hub.storage) - arrived
    assert verify(Store.open(URL), full=True).lines == []


def test_of_several_commits_only_the_last_one_makes_it_a_store(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.hub.upload.COMMIT_FILES", 40)
    done = push(pushing(store.root))
    assert done.commits > 3
    states = [files for _, files in hub.dataset(REPO).commits]
    assert ["zarr.json" in files for files in states] == [False] * (len(states) - 1) + [True]
    assert ["manifest/index.jsonl" in files for files in states] == [False] * (len(states) - 1) + [True]
    assert push(pushing(store.root)).files_sent == 0


def test_damage_is_not_published(hub: Hub, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    shard = next(copy.glob("layer_01/mlp_out/c/3/*"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="nothing was sent"):
        push(pushing(copy))
    assert hub.n_commits == hub.puts == 0


def test_an_unfinished_store_is_refused(hub: Hub, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    unfinished(copy)
    with pytest.raises(UserError, match="is not finished"):
        push(pushing(copy))
    with pytest.raises(UserError, match="only a store in a folder on this machine can be pushed"):
        push(PushConfig(source="s3://bucket/store", repo=REPO, private=True))
    assert hub.repos == {}


def test_a_repository_holds_one_store(served: Hub, store: Store, tmp_path: Path) -> None:
    files = served.dataset(REPO).files
    served.dataset(REPO).commit({"zarr.json": files["zarr.json"] + b"\n"})
    with pytest.raises(UserError, match="holds another store already"):
        push(pushing(store.root))
    with pytest.raises(UserError, match=r"is a dataset. If it is a store, read it with --store hf://tester/acts"):
        pull(PullConfig(source=REPO, out=tmp_path / "x"))


# Read


def test_training_from_the_hub_gives_the_same_weights(
    served: Hub, train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(train_config(out=tmp_path / "here"))
    train(train_config(out=tmp_path / "there", store=URL))
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
    assert len(digests(tmp_path / "here")) == 4
    done = evaluate(EvalConfig(run=tmp_path / "there", ce=False, device="cpu"))
    here = evaluate(EvalConfig(run=tmp_path / "here", ce=False, device="cpu"))
    assert done.results["saes"] == here.results["saes"]
    assert not [header for header in served.storage_saw if header]


@pytest.mark.usefixtures("served")
def test_the_usual_run_chunks_are_a_folders(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """With two chunks per read, as from other servers, a default window would give other batches than a folder does."""
    config = train_config(out=tmp_path / "run", store=URL, window_rows=524_288, keep_checkpoints=False)
    assert '"run_chunks": 1,' in (train(config).run / "config.json").read_text()


@pytest.mark.usefixtures("served")
def test_what_is_said_of_a_store_is_the_same(store: Store) -> None:
    here, there = describe_store(store.root), describe_store(URL)
    for about in (here, there):
        about.pop("store")
        for row in about["hookpoints"]:
            row.pop("store")
    assert here == there
    assert [row["store"] for row in list_stores(URL)] == ["acts"] * 3
    assert verify(Store.open(URL), full=True).lines == []


@pytest.mark.parametrize("place", [f"{URL}/layer_01/mlp_out", f"hf://datasets/{REPO}/layer_01/mlp_out"])
@pytest.mark.usefixtures("served")
def test_an_array_is_named_by_its_url(place: str) -> None:
    assert find_hookpoint(place, None)[1] == "layer_01/mlp_out"


def test_reading_stays_at_the_commit_that_was_opened(served: Hub, store: Store) -> None:
    opened = Store.open(URL)
    commit = served.dataset(REPO).head
    assert opened.name == f"{URL}@{commit}"
    changes = dict.fromkeys(served.dataset(REPO).files, b"changed")
    served.dataset(REPO).commit(changes)
    assert verify(opened, full=True).lines == []
    assert Store.open(f"{URL}@{commit}").snapshot_id == store.snapshot_id
    with pytest.raises(UserError):
        Store.open(URL)
    with pytest.raises(UserError, match="has no such branch, tag or commit"):
        Store.open(f"{URL}@v2")


def test_a_private_dataset_needs_the_token(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = served.dataset(REPO).head
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="the hub has no dataset of that name, or it is private"):
        Store.open(URL)
    with pytest.raises(UserError, match="HF_TOKEN for hf://"):
        Store.open(f"{URL}@{commit}")


def test_offline_nothing_is_read(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(served.requests)
    for place in (URL, f"{URL}@{'0' * 40}"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            Store.open(place)
    assert len(served.requests) == before


@pytest.mark.parametrize(
    "place", ["hf://", "hf://x", "hf://a/b/../c", "hf://a/b@", "hf://a/b@x..y", "hf://-/b", "hf://a/b//c"]
)
def test_what_is_no_place_on_the_hub(place: str) -> None:
    with pytest.raises(UserError, match=r"hf://OWNER/NAME|is no branch, tag or commit"):
        open_files(place)


def test_places_and_their_parents() -> None:
    place = parse_place("hf://datasets/a/b@refs%2Fpr%2F1/c/d/")
    assert (str(place.repo), place.revision, place.path) == ("a/b", "refs/pr/1", "c/d")
    assert place.url == "hf://a/b@refs%2Fpr%2F1/c/d"
    assert parent_of("hf://a/b@x/c/d") == "hf://a/b@x/c"
    assert parent_of("hf://a/b@x/c") == "hf://a/b@x"
    assert parent_of("hf://a/b@x") is None


@pytest.mark.usefixtures("served")
def test_the_hub_is_never_written_to_by_a_harvest() -> None:
    files = open_files(URL)
    with pytest.raises(UserError, match="can only be read"):
        files.write("x", [b"y"])
    with pytest.raises(UserError, match="can only be read"):
        files.remove("zarr.json")
    with pytest.raises(UserError, match="can only be read"):
        files.append("l.jsonl", b"", 0)
