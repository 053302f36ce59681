"""`sagsae push` and `sagsae pull` of autoencoders against a stand-in for the hub."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from support.command import Sagsae
from support.runs import weights_of
from support.serving.hub import TOKEN, Hub
from support.serving.hub import hub as hub

from shared.config import EvalConfig, TrainConfig
from shared.errors import BusyError, DamagedError, UserError
from shared.saes import sae_config
from shared.schemas.exchange import PullConfig, PushConfig
from train import load
from train.evaluate import evaluate
from train.hub.card import BEGIN, END
from train.hub.pull import pull
from train.hub.push import push
from train.run import train

# huggingface_hub itself makes requests in a form that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "tester/saes"
HOOK = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def run(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run: a signed autoencoder, a gated and a relu one."""
    out = tmp_path_factory.mktemp("run") / "three"
    saes = tuple(sae_config(arch=arch, d_sae=48, sparsity=0.2) for arch in ("sa-gsae", "gated", "relu"))
    config = TrainConfig(
        store=str(store.root), hook="mlp_out", saes=saes, tokens=20 * 64, batch=64, lr=5e-3, streams=4,
        window_rows=1024, device="cpu", heldout_tokens=320, out=out,
    )  # fmt: skip
    train(config)
    evaluate(EvalConfig(run=out, ce=False, device="cpu"))
    return out


@pytest.fixture
def one(run: Path) -> Path:
    return run / "saes" / "sa-gsae-48-lambda0.2-seed0"


def pushing(source: Path, **more: Any) -> PushConfig:
    return PushConfig(**{"source": str(source), "repo": REPO, "private": True, **more})


def test_a_push_makes_the_repository_with_one_commit_and_a_second_one_sends_nothing(hub: Hub, run: Path) -> None:
    done = push(pushing(run))
    assert (done.commits, hub.n_commits, done.files_there) == (1, 1, 0)
    assert hub.model(REPO).private
    assert done.files_sent == len(hub.model(REPO).files) == 18  # 3 x (3 + 2), card, rows, picture
    puts = hub.puts

    again = push(pushing(run))
    assert (again.files_sent, again.commits, again.files_there) == (0, 0, 18)
    assert (hub.n_commits, hub.puts, again.commit) == (1, puts, done.commit)


def test_the_layout_is_what_the_tools_find(hub: Hub, run: Path) -> None:
    push(pushing(run))
    names = {path.name for path in (run / "saes").iterdir()}
    expected = {
        f"{prefix}{HOOK}/{name}/{file}"
        for prefix in ("", "sagsae/")
        for name in names
        for file in ("cfg.json", "sae_weights.safetensors")
    } | {f"{HOOK}/{name}/sparsity.safetensors" for name in names}
    assert hub.model(REPO).files.keys() == expected | {"README.md", "sagsae/saes.json", f"sagsae/{HOOK}/frontier.svg"}
    push(pushing(run / "saes" / "relu-48-lambda0.2-seed0", repo="tester/sparse", to="sparsify"))
    files = hub.model("tester/sparse").files
    assert {"layers.1.mlp/cfg.json", "layers.1.mlp/sae.safetensors"} <= files.keys()


def test_a_later_push_adds_to_the_table_and_leaves_foreign_files_alone(hub: Hub, run: Path) -> None:
    first, second = (run / "saes" / f"{arch}-48-lambda0.2-seed0" for arch in ("gated", "sa-gsae"))
    push(pushing(first))
    repo = hub.model(REPO)
    own_text = repo.files["README.md"].decode().replace(BEGIN, f"My own words.\n\n{BEGIN}")
    repo.commit({"README.md": own_text.encode(), "notes/mine.txt": b"mine"})
    done = push(pushing(second))
    assert done.commits == 1
    page = repo.files["README.md"].decode()
    assert repo.files["notes/mine.txt"] == b"mine"
    assert "My own words." in page.partition(BEGIN)[0]
    assert f"`{HOOK}/{first.name}`" in page
    assert f"`{HOOK}/{second.name}`" in page
    assert push(pushing(second)).files_sent == 0


def test_frequencies_of_other_weights_do_not_stay(hub: Hub, run: Path, tmp_path: Path) -> None:
    """The later push has none, for its run was not evaluated: those of the earlier one would be of other weights. What
    somebody else put beside an autoencoder stays."""
    again = Path(shutil.copytree(run, tmp_path / "again"))
    (again / "firings.safetensors").unlink()
    first, second = (each / "saes" / "relu-48-lambda0.2-seed0" for each in (run, again))
    frequencies = f"{HOOK}/{first.name}/sparsity.safetensors"
    hub.add(REPO, {frequencies: b"somebody's", f"{HOOK}/{first.name}/notes.txt": b"mine"}).private = True
    assert push(pushing(second)).files_there == 0
    assert hub.model(REPO).files[frequencies] == b"somebody's"
    push(pushing(first))
    assert safetensors.torch.load(hub.model(REPO).files[frequencies])["sparsity"].shape == (48,)
    done = push(pushing(second))
    assert frequencies not in hub.model(REPO).files
    assert hub.model(REPO).files[f"{HOOK}/{first.name}/notes.txt"] == b"mine"
    assert (done.commits, push(pushing(second)).commits) == (1, 0)


def test_a_readme_of_somebody_elses_stays(hub: Hub, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(pushing(one))
    hub.model(REPO).commit({"README.md": b"# Mine\n"})
    push(pushing(one))
    assert hub.model(REPO).files["README.md"] == b"# Mine\n"
    assert BEGIN in hub.model(REPO).files["sagsae/README.md"].decode()
    assert "stays as it is" in capsys.readouterr().err
    assert push(pushing(one)).files_sent == 0


# The card


def test_the_card_says_what_there_is(hub: Hub, run: Path) -> None:
    push(pushing(run, license="mit"))
    page = hub.model(REPO).files["README.md"].decode()
    _, front, text = page.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "saelens"
    assert about["license"] == "mit"
    assert {"sparse-autoencoder", "mechanistic-interpretability", "sagsae"} <= set(about["tags"])
    measured = {sae["name"]: sae for sae in json.loads((run / "evaluation.json").read_text())["saes"]}
    for name, sae in measured.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{HOOK}/{name}`")]
        assert f"{sae['r2']:.4f}".replace("-", "−") in line
        assert "λ 0.2" in line
        assert "1,280" in line
    assert "i + d_sae/2" in text
    assert f"sagsae/{HOOK}/frontier.svg" in text
    assert hub.model(REPO).files[f"sagsae/{HOOK}/frontier.svg"].startswith(b"<svg")
    assert END in page


def test_no_folder_of_this_machine_is_published(hub: Hub, run: Path, store: Any) -> None:
    push(pushing(run))
    folders = {str(run), str(store.root), store.spec.model["name"], str(Path.home())}
    assert store.spec.model["local"]
    for path, data in hub.model(REPO).files.items():
        assert not [folder for folder in folders if folder.encode() in data], path


# Cuts, and others


def test_a_push_that_was_cut_shows_nothing_and_goes_on_where_it_was(hub: Hub, run: Path) -> None:
    hub.cut = lambda number: number >= 3
    with pytest.raises(BusyError, match=r"^tester/saes: the hub cannot be reached while uploading") as failure:
        push(pushing(run))
    assert failure.value.exit_code == 75
    assert hub.model(REPO).files == {}
    arrived = len(hub.storage)
    assert 0 < arrived < 9

    hub.cut = lambda _: False
    before = hub.puts
    assert push(pushing(run)).commits == 1
    assert hub.puts - before == 9 - arrived  # what has arrived is not sent again
    assert hub.n_commits == 1


def test_somebody_elses_commit_in_between_is_never_overwritten(hub: Hub, one: Path) -> None:
    push(pushing(one))
    repo = hub.model(REPO)
    repo.commit({"README.md": b""})

    def intrude() -> None:
        hub.before_commit = lambda: None
        repo.commit({"README.md": b"# Somebody else's\n"})

    hub.before_commit = intrude
    with pytest.raises(BusyError, match="somebody else changed it meanwhile"):
        push(pushing(one))
    assert repo.files["README.md"] == b"# Somebody else's\n"
    push(pushing(one))
    assert repo.files["README.md"] == b"# Somebody else's\n"


@pytest.mark.slow
def test_a_killed_push_resumes(hub: Hub, run: Path, sagsae: Sagsae) -> None:
    """The process ends while contents are uploaded."""
    hub.cut = lambda number: number > 2
    arguments = ("push", run, "--repo", REPO, "--private")
    died = sagsae(*arguments, stop=(signal.SIGKILL, lambda: hub.puts > 2))
    assert died.returncode == -signal.SIGKILL
    hub.cut = lambda _: False
    done = sagsae(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commits"] == 1
    assert hub.n_commits == 1


def test_a_server_that_lists_no_digests_is_asked_file_by_file(hub: Hub, run: Path, tmp_path: Path) -> None:
    hub.plain = True
    push(pushing(run))
    again = push(pushing(run))
    assert (again.files_sent, again.commits, hub.n_commits) == (0, 0, 1)
    done = pull(PullConfig(source=REPO, out=tmp_path / "all"))
    assert len(done) == 3
    hub.answers[r"HEAD .*sae_weights"] = (200, {"ETag": '"' + "0" * 64 + '"'}, b"")
    with pytest.raises(DamagedError, match="other bytes came than the hub lists"):
        pull(PullConfig(source=REPO, out=tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "is \\[\\] instead of an object. Delete it on the hub"),
        (b'{"version": 1, "saes": [{}]}', "lacks arch"),
        (b'{"version": 9, "saes": []}', "was written by another version of sagsae"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_list_of_autoencoders_that_is_none(hub: Hub, one: Path, content: bytes, said: str) -> None:
    push(pushing(one))
    hub.model(REPO).commit({"sagsae/saes.json": content})
    with pytest.raises((UserError, DamagedError), match=said):
        push(pushing(one))
    assert hub.model(REPO).files["sagsae/saes.json"] == content


# Public and private


def test_nothing_becomes_public_without_a_question(hub: Hub, one: Path) -> None:
    asked: list[str] = []

    def answer(yes: bool) -> Callable[[str], bool]:
        def say(question: str) -> bool:
            asked.append(question)
            return yes

        return say

    with pytest.raises(UserError, match="there is no terminal to ask on"):
        push(pushing(one, private=False))
    with pytest.raises(UserError, match="nothing was sent"):
        push(pushing(one, private=False), answer(False))
    assert hub.repos == {}
    push(pushing(one, private=False), answer(True))
    assert not hub.model(REPO).private
    assert "PUBLIC" in asked[0]
    n = len(asked)
    push(pushing(one, private=False))  # nothing to send, nothing to ask
    hub.model(REPO).commit({"README.md": b"", f"{HOOK}/{one.name}/cfg.json": b"{}"})
    with pytest.raises(UserError, match="kept public"):
        push(pushing(one, private=False))
    push(pushing(one, private=False, yes=True))
    assert len(asked) == n


def test_private_does_not_pretend_for_a_public_repository(hub: Hub, one: Path) -> None:
    push(pushing(one, private=False, yes=True))
    hub.model(REPO).commit({"sagsae/saes.json": b'{"version": 1, "saes": []}'})
    with pytest.raises(UserError, match=r"is public on the hub, and --private does not change that"):
        push(pushing(one))


# Wrong input


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("saes", "is no repository of the Hugging Face hub. Expected OWNER/NAME"),
        ("a/b/c", "Expected OWNER/NAME"),
        ("tester/..", "Expected OWNER/NAME"),
        ("tester/x.git", "Expected OWNER/NAME"),
        ("stranger/saes", r"this token may not do that \(status 403\)"),
    ],
)
def test_a_wrong_repository_is_one_sentence(hub: Hub, one: Path, repo: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as failure:
        push(pushing(one, repo=repo))
    assert failure.value.exit_code == 2
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"to": "sparsify", "fold_b_dec": True}, "fold_b_dec"),
        ({"to": "sparsify"}, "approximate-topk K"),
        ({"form": "topk"}, "--form topk"),
    ],
)
def test_a_form_that_there_is_none_of(hub: Hub, one: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        push(pushing(one, **more))
    assert hub.repos == {}


@pytest.mark.usefixtures("hub")
def test_no_token_and_a_wrong_token(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="pushing needs a token of the hub"):
        push(pushing(one))
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(UserError, match="refuses the token") as failure:
        push(pushing(one))
    assert "wrongwrong" not in str(failure.value)


@pytest.mark.usefixtures("hub")
def test_no_network(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.hub.client.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for action in (lambda: push(pushing(one)), lambda: pull(PullConfig(source=REPO, out=one.parent / "x"))):
        with pytest.raises(BusyError, match="the hub cannot be reached"):
            action()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(pushing(one))


def test_a_gated_repository_says_what_to_do(hub: Hub, one: Path, tmp_path: Path) -> None:
    hub.answers[r"GET /api/models/"] = (403, {"X-Error-Code": "GatedRepo"}, {"error": "gated"})
    for action in (lambda: push(pushing(one)), lambda: pull(PullConfig(source=REPO, out=tmp_path / "x"))):
        with pytest.raises(UserError, match="Accept its terms on its page"):
            action()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_75(hub: Hub, one: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("shared.hub.client.PAUSE_SECONDS", 0.01)
    hub.answers[r"GET /api/models/"] = (status, {}, {"error": "busy"})
    with pytest.raises(BusyError, match="busy or broken"):
        push(pushing(one))


def test_a_source_that_is_none(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a run nor the folder of an autoencoder"):
        push(pushing(tmp_path / "nothing"))
    assert hub.repos == {}


# Pull


def test_what_was_pushed_comes_back_byte_for_byte(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(pushing(run))
    done = pull(PullConfig(source=REPO, out=tmp_path / "all"))
    assert [each.name for each in done] == sorted(path.name for path in (run / "saes").iterdir())
    for each in done:
        weights = "sae_weights.safetensors"
        assert (each.folder / weights).read_bytes() == (run / "saes" / each.name / weights).read_bytes()
        theirs, ours = load(each.folder), load(run / "saes" / each.name)
        x = torch.randn(32, ours.d_in, generator=torch.Generator().manual_seed(0))
        assert torch.equal(theirs(x), ours(x))
    sent = hub.bytes_sent
    again = pull(PullConfig(source=REPO, out=tmp_path / "all"))
    assert [each.bytes for each in again] == [0, 0, 0]
    assert hub.bytes_sent == sent


@pytest.mark.parametrize("name", ["gated-48-lambda0.2-seed0", f"{HOOK}/gated-48-lambda0.2-seed0"])
def test_one_is_pulled_by_its_name_and_nothing_else_is_downloaded(
    hub: Hub, run: Path, tmp_path: Path, name: str
) -> None:
    push(pushing(run))
    before = hub.bytes_sent
    (done,) = pull(PullConfig(source=f"{REPO}/{name}", out=tmp_path / "sae"))
    assert done.folder == tmp_path / "sae"
    assert hub.bytes_sent - before == done.bytes == sum(path.stat().st_size for path in done.folder.iterdir())
    assert load(done.folder).config.d_sae == 48


def test_large_weights_are_pulled_by_ranges(
    hub: Hub, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.hub.pull.WHOLE_BYTES", 0)
    monkeypatch.setattr("train.hub.pull.PART_BYTES", 5000)
    push(pushing(one))
    (done,) = pull(PullConfig(source=REPO, out=tmp_path / "sae"))
    weights = "sae_weights.safetensors"
    assert (done.folder / weights).read_bytes() == (one / weights).read_bytes()
    assert len([line for line in hub.requests if line.startswith("STORAGE GET")]) > 2


def test_a_revision_is_pulled_as_it_was(hub: Hub, one: Path, tmp_path: Path) -> None:
    first = push(pushing(one)).commit
    hub.model(REPO).commit({f"sagsae/{HOOK}/{one.name}/cfg.json": b"{}"})
    (done,) = pull(PullConfig(source=REPO, out=tmp_path / "sae", revision=first))
    assert done.commit == first
    with pytest.raises(UserError, match="describes no autoencoder of sagsae"):
        pull(PullConfig(source=REPO, out=tmp_path / "other"))
    with pytest.raises(UserError, match="has no such branch, tag or commit"):
        pull(PullConfig(source=REPO, out=tmp_path / "other", revision="v9"))


@pytest.mark.usefixtures("hub")
def test_a_pull_replaces_nothing(run: Path, one: Path, tmp_path: Path) -> None:
    push(pushing(run))
    place = Path(shutil.copytree(run / "saes" / "gated-48-lambda0.2-seed0", tmp_path / "sae"))
    before = weights_of(run)
    with pytest.raises(UserError, match="of something else already"):
        pull(PullConfig(source=f"{REPO}/{one.name}", out=place))
    assert load(place).config.arch == "gated"
    assert weights_of(run) == before


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("tester/none", "the hub has no model of that name"),
        (f"{REPO}/none", "has no autoencoder and no folder none. It has blocks"),
        (f"{REPO}/../x", "does not stay in its folder"),
        ("x", "Expected OWNER/NAME"),
    ],
)
def test_a_pull_of_what_is_not_there(one: Path, tmp_path: Path, source: str, said: str) -> None:
    push(pushing(one))
    with pytest.raises(UserError, match=said):
        pull(PullConfig(source=source, out=tmp_path / "sae"))
    assert not (tmp_path / "sae").exists()


# Other tools' autoencoders


def somebodys(hub: Hub, run: Path, name: str, **more: Any) -> str:
    """The folder of an autoencoder in another tool's files alone, in a repository of somebody else."""
    push(pushing(run / "saes" / name, repo="tester/source", **more))
    files = hub.model("tester/source").files
    row = json.loads(files["sagsae/saes.json"])["saes"][0]
    hub.add("other/saes", {path: data for path, data in files.items() if path.startswith(row["folder"])})
    return f"other/saes/{row['folder']}"


@pytest.mark.parametrize(
    ("arch", "tool"),
    [("sa-gsae", "saelens"), ("relu", "sparsify"), ("gated", "gemma-scope"), ("relu", "dictionary-learning")],
)
def test_another_tools_autoencoder_is_imported(hub: Hub, run: Path, tmp_path: Path, arch: str, tool: str) -> None:
    name = f"{arch}-48-lambda0.2-seed0"
    source = somebodys(hub, run, name, to=tool, force=tool == "dictionary-learning")
    (done,) = pull(PullConfig(source=source, out=tmp_path / "sae"))
    assert "imported from" in done.notes[0]
    theirs, ours = load(done.folder), load(run / "saes" / name)
    x = torch.randn(64, ours.d_in, generator=torch.Generator().manual_seed(2)) * ours.scale
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5 * float(x.abs().max()))

    push(pushing(done.folder, repo="tester/again"))
    (again,) = pull(PullConfig(source="tester/again", out=tmp_path / "again"))
    assert torch.equal(load(again.folder)(x), theirs(x))


def test_a_folder_that_is_no_single_autoencoder_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add("other/many", {f"all/{number}.safetensors": b"x" for number in range(40)})
    with pytest.raises(UserError, match=r"has 40 files .* Name the folder of one autoencoder"):
        pull(PullConfig(source="other/many/all", out=tmp_path / "sae"))
    with pytest.raises(UserError, match="has no autoencoder that sagsae pushed"):
        pull(PullConfig(source="other/many", out=tmp_path / "sae"))
    hub.add("other/text", {"notes/readme.txt": b"hello"})
    with pytest.raises(UserError):
        pull(PullConfig(source="other/text/notes", out=tmp_path / "sae"))
    assert not (tmp_path / "sae").exists()
    assert not hub.storage_saw


# A hostile hub


def lying(hub: Hub, file: str, changes: dict[str, Any]) -> None:
    """The hub lists one file otherwise than it is."""
    from support.serving.hub import listed

    repo = hub.model(REPO)
    entries = [listed(repo, name, data) for name, data in sorted(repo.files.items())]
    for entry in entries:
        if entry["path"].endswith(file):
            entry |= changes
    hub.answers[r"/tree/"] = (200, {}, [each for each in entries if not each["path"].startswith("blocks")])


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("sae_weights.safetensors", {"size": 1 << 45}, "the hub lists 35,184,372,088,832 bytes; cfg.json describes"),
        ("sae_weights.safetensors", {"size": -1}, "the hub's answer cannot be used"),
        ("sae_weights.safetensors", {"size": "many"}, "the hub's answer cannot be used"),
        ("sae_weights.safetensors", {"lfs": {"oid": "0" * 64}}, "other bytes came than the hub lists"),
        ("sae_weights.safetensors", {"lfs": {"oid": "zz"}}, "the hub's answer cannot be used"),
        ("sae_weights.safetensors", {"path": "sagsae/a/../../x/cfg.json"}, "the hub's answer cannot be used"),
        ("sae_weights.safetensors", {"path": "/etc/passwd"}, "the hub's answer cannot be used"),
        ("cfg.json", {"size": 1 << 30}, "at most 16,777,216 are ours"),
        ("cfg.json", {"oid": "0" * 40}, "other bytes came than the hub lists"),
    ],
)  # fmt: skip
def test_a_listing_that_lies_writes_nothing(
    hub: Hub, one: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    push(pushing(one))
    lying(hub, file, changes)
    with pytest.raises(DamagedError, match=said):
        pull(PullConfig(source=REPO, out=tmp_path / "sae"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts] == []


@pytest.mark.parametrize("body", [b"x" * (17 << 20), b"[", b"{}", b'[{"type": "file"}]', b"[" * 100_000])
def test_an_answer_that_is_none_is_refused(hub: Hub, one: Path, tmp_path: Path, body: bytes) -> None:
    push(pushing(one))
    hub.answers[r"/tree/"] = (200, {}, body)
    with pytest.raises(DamagedError, match="the hub's answer cannot be used"):
        pull(PullConfig(source=REPO, out=tmp_path / "sae"))


def test_the_token_goes_to_the_hub_alone(hub: Hub, one: Path, tmp_path: Path) -> None:
    push(pushing(one))
    pull(PullConfig(source=REPO, out=tmp_path / "sae"))
    assert len(hub.storage_saw) >= 3
    assert set(hub.storage_saw) == {""}
    elsewhere = {"Location": f"{hub.cdn_url}/elsewhere"}
    hub.answers[r"/api/models/"] = (307, elsewhere, b"")
    with pytest.raises(UserError, match="leads to another address"):
        pull(PullConfig(source=REPO, out=tmp_path / "other"))
    hub.answers = {r"/tree/": (200, {"Link": f'<{hub.cdn_url}/elsewhere>; rel="next"'}, [])}
    with pytest.raises(UserError, match="leads to another address"):
        pull(PullConfig(source=REPO, out=tmp_path / "other"))
    assert set(hub.storage_saw) == {""}


# The command line, and the token


@pytest.mark.slow
def test_the_token_is_in_no_file_and_no_output(hub: Hub, run: Path, tmp_path: Path, sagsae: Sagsae) -> None:
    outputs = []
    home = tmp_path / "work"
    home.mkdir()
    copied = Path(shutil.copytree(run, home / "run"))
    for arguments in (
        ("push", copied, "--repo", REPO),
        ("push", copied, "--repo", REPO, "--private", "--json"),
        ("push", copied, "--repo", "stranger/x", "--private"),
        ("pull", REPO, "--out", home / "all"),
    ):
        done = sagsae(*arguments)
        outputs.append((done.returncode, done.stdout + done.stderr))
    assert [code for code, _ in outputs] == [2, 0, 2, 0], outputs
    for code, text in outputs:
        assert TOKEN not in text
        assert "Traceback" not in text
        assert code == 0 or len(text.strip().splitlines()) == 1, text
    for path in [*tmp_path.rglob("*")]:
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in data for data in hub.model(REPO).files.values())
