"""What the same command can succeed at later has an exit code of its own: a queue may repeat it, and must not repeat
a wrong request."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import errors as hub_errors
from support import servers
from support.command import ROOT
from support.servers import Server

import shared.store.create
from harvest.disk_space import DiskNeed, check_fits
from harvest.synth import synth
from harvest.team import Team
from shared.config import SynthConfig
from shared.errors import BusyError, DamagedError, Interrupted, LostError, UserError
from shared.files.local import TEMPORARY, LocalFiles, error_kind, explained
from shared.files.locks import check_unread, folder_lock, held_for_reading
from shared.files.open import open_files
from shared.launch import ProcessPlace, meeting
from shared.model.source import hub_error
from shared.store.create import all_commits, remove_store
from shared.store.opened import Store, write_state
from shared.store.verify import verify

server, alone = (getattr(servers, n) for n in ("server", "alone"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    config = SynthConfig(d_in=8, features=12, tokens=1500, shard_rows=512, chunk_rows=256, out=str(tmp_path))
    return Path(synth(config).store)


def dead() -> int:
    with subprocess.Popen(["true"]) as gone:
        pass
    return gone.pid


def locked(store: Path) -> None:
    with folder_lock(store), folder_lock(store):
        pass


def locked_without_flock(store: Path) -> None:
    (store / ".lock.held").write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    with folder_lock(store):
        pass


def read_elsewhere(store: Path) -> None:
    with LocalFiles(store).reading():
        remove_store(LocalFiles(store))


def deleted_elsewhere(store: Path) -> None:
    with check_unread(store), held_for_reading(store):
        pass


def full(store: Path) -> None:
    with explained(store):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_small(store: Path) -> None:
    check_fits(str(store), DiskNeed({"all": 2 << 20}, 0, 0, 1 << 20))


def nobody_comes(_: Path) -> None:
    with meeting(ProcessPlace(0, 2)):
        raise RuntimeError("nobody came")


def gone(*_: Any) -> Any:
    raise RuntimeError("connection reset")


def launcher_gone(_: Path) -> None:
    Team(1, 2, keys=SimpleNamespace(check=gone)).check_launcher()


def not_yet_visible(store: Path) -> None:
    files = LocalFiles(store)
    spec = Store.open(files).spec
    write_state(files, spec, "writing")
    (store / "manifest" / "index.jsonl").unlink()
    all_commits(files, spec)


KINDS = [
    locked,
    locked_without_flock,
    read_elsewhere,
    deleted_elsewhere,
    full,
    too_small,
    nobody_comes,
    launcher_gone,
    not_yet_visible,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_passes(kind: Callable[[Path], None], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.create, "SECONDS_BEHIND", 0)
    with pytest.raises(BusyError) as found:
        kind(store)
    assert found.value.exit_code == 75


def test_the_exit_codes() -> None:
    assert [kind.exit_code for kind in (UserError, BusyError, DamagedError, LostError, Interrupted)] == [
        2, 75, 3, 75, 130,
    ]  # fmt: skip


def test_a_disk_that_can_never_hold_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"about .* are needed, the whole disk has .* GB") as found:
        check_fits(str(tmp_path), DiskNeed({"all": 1 << 60}, 0, 0, 1 << 20))
    assert found.value.exit_code == 2


def test_a_disk_that_is_full_for_now(tmp_path: Path) -> None:
    with pytest.raises(BusyError, match=r"about 2e-06 GB are needed, 1e-06 GB are free") as found:
        check_fits(str(tmp_path), DiskNeed({"all": 2000}, 0, 0, 1000))
    assert found.value.exit_code == 75


def test_another_process_of_a_harvest_failed() -> None:
    keys = SimpleNamespace(check=lambda keys: keys == ["failed"])
    with pytest.raises(LostError, match=r"its message says why\. Run the same command again"):
        Team(0, 2, keys=keys).await_others(lambda: None)


def test_a_lock_that_nobody_holds_does_not_pass(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flock the lock of a killed process stays until somebody deletes it."""
    here = {"host": "here", "processes": ""}
    monkeypatch.setattr("shared.files.locks.socket.gethostname", lambda: here["host"])
    monkeypatch.setattr("shared.files.locks.process_space", lambda: here["processes"])
    (store / ".lock.held").write_text(json.dumps(here | {"pid": dead()}))
    with pytest.raises(UserError, match="was killed") as found:
        folder_lock(store).__enter__()
    assert found.value.exit_code == 2


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_errors_of_the_system(number: int) -> None:
    assert error_kind(OSError(number, "")).exit_code == (75 if number in TEMPORARY else 2)


def test_which_errors_of_the_system_pass() -> None:
    passing = "ENOSPC EDQUOT EIO ESTALE ETIMEDOUT ECONNRESET ECONNREFUSED EHOSTUNREACH EAGAIN ENOMEM"
    asked = "ENOENT EACCES EPERM EROFS EISDIR ENAMETOOLONG EINVAL EFBIG EMFILE ELOOP EXDEV ENOSYS"
    assert {getattr(errno, name) for name in passing.split()} <= TEMPORARY
    assert not {getattr(errno, name) for name in asked.split()} & TEMPORARY


@pytest.mark.parametrize(
    ("answer", "code"),
    [("500", 75), ("503", 75), ("429", 75), ("408", 75), ("refuse", 75), ("kill", 75),
     ("400", 2), ("401", 2), ("403", 2)],
)  # fmt: skip
def test_answers_of_a_server(server: Server, answer: str, code: int) -> None:
    server.always = answer
    files = open_files(server.url + "/bucket")
    with pytest.raises(UserError) as found:
        files.read("file")
    assert found.value.exit_code == code
    with pytest.raises(UserError) as told, files.explained():
        files.read("file")
    assert type(told.value) is type(found.value), "what is added to the message does not change its kind"


def test_a_server_that_is_away_damages_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` listed it as damage."""

    def away(*_: Any) -> Any:
        raise BusyError("the server cannot be reached")

    monkeypatch.setattr("shared.store.verify.check_token_ids", away)
    with pytest.raises(BusyError):
        verify(Store.open(store), full=True)


def http_error(status: int) -> hub_errors.HfHubHTTPError:
    response: Any = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return hub_errors.HfHubHTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx.ConnectTimeout("slow"), 75),
        (TimeoutError(), 75),
        (ConnectionResetError(), 75),
        (http_error(502), 75),
        (http_error(429), 75),
        (http_error(403), 2),
        (hub_errors.OfflineModeIsEnabled("offline"), 2),
        (ValueError("not a configuration"), 2),
    ],
)
def test_answers_of_the_hub(error: Exception, code: int) -> None:
    assert hub_error(error).exit_code == code
    wrapped = OSError("cannot be loaded")
    wrapped.__cause__ = error
    assert hub_error(wrapped).exit_code == code


@pytest.mark.parametrize(("offline", "code"), [("0", 75), ("1", 2)])
def test_a_hub_that_nobody_answers_at(tmp_path: Path, offline: str, code: int) -> None:
    """No server listens at the port. With HF_HUB_OFFLINE=1 the command sends no request, so it cannot succeed later."""
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    told = {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    command = [sys.executable, str(ROOT / "cli.py"), "harvest", "--model", "owner/name", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Hugging Face cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
