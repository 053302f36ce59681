"""Clients of a real `sagsae serve`, in a process of its own."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.command import ROOT, Sagsae
from support.folders import contents
from support.pages import commands_of
from support.processes import kill
from support.stores import in_steps

from shared.config import TrainConfig
from shared.errors import BusyError, UserError
from shared.files import service_files
from shared.refusals import HeldError, UnknownError
from shared.service import Client, address
from shared.store.opened import Store
from train.data.follow import waiting_text
from train.run import train as run_train

Config = Callable[..., TrainConfig]
TOKEN = "ask-0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (address.SERVICE, address.TOKEN, address.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def server(root: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A server on a port, once it answers."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--root", str(root), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "serving" in process.stdout.readline()
            yield process
        finally:
            process.terminate()
            process.wait(30)


def moved(store: Path) -> Path:
    """A store in a folder of its own, which holds nothing else."""
    root = store.parent / "stores"
    root.mkdir()
    return store.rename(root / store.name)


def weights(run: Path) -> dict[str, bytes]:
    return {path: data for path, data in contents(run / "saes").items() if path.endswith(".safetensors")}


def test_a_server_that_is_killed_while_it_is_read_is_waited_for(
    train_config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of training; the server comes back, and the weights are those of the folder."""
    monkeypatch.setenv("SAGSAE_CACHE_GB", "0")
    monkeypatch.setattr(service_files, "PATIENCE_SECONDS", 120.0)
    here = run_train(train_config(tokens=60 * 64))
    port, result = free_port(), list[Path]()
    url = f"http://127.0.0.1:{port}/v1/stores/s"

    def work() -> None:
        result.append(run_train(train_config(store=url, out=tmp_path / "served", tokens=60 * 64)).run)

    with ExitStack() as servers:
        first = servers.enter_context(server(store.root.parent, port, "--launch", "none"))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not (tmp_path / "served" / "metrics.jsonl").exists():
            assert thread.is_alive()
            time.sleep(0.01)
        kill(first.pid)
        assert first.wait(10) == -signal.SIGKILL
        assert not result
        servers.enter_context(server(store.root.parent, port, "--launch", "none"))
        thread.join(120)
    assert result
    assert weights(result[0]) == weights(here.run)


def test_a_client_speaks_with_a_server(growing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, catalog, pins, leases and following, as the server has them."""
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f"admin:{TOKEN}\n")
    port, root = free_port(), moved(growing).parent
    with server(root, port, "--launch", "none", "--token-file", str(file)):
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match="needs a token"):
            next(Client(url).stores())
        with pytest.raises(UserError, match="does not know the token"):
            next(Client(url, "wrong-0123456789abcdef").stores())
        client = Client(url, TOKEN)
        assert [(row.id, row.state) for row in client.stores()] == [("growing", "writing")]
        with pytest.raises(UnknownError, match="other"):
            client.store("other")
        with monkeypatch.context() as patch:
            patch.setenv(address.SERVICE, url)
            patch.setenv(address.TOKEN, TOKEN)
            look = Store.open(client.store_url("growing"))
            assert look.files.at_work() is False
            assert "No job is writing into it" in waiting_text(look)
        client.pin("growing", "paper")
        assert [row.pins for row in client.stores()] == [("paper",)]
        with pytest.raises(HeldError, match="paper"):
            client.remove("growing")
        client.unpin("growing", "paper")
        with client.lease("growing", "me"):
            assert [row.leases for row in client.stores()] == [1]
        assert [row.leases for row in client.stores()] == [0]
        with pytest.raises(UnknownError):
            client.job(1)
        assert list(client.jobs()) == []
    with pytest.raises(BusyError, match="cannot be reached"):
        client.exchange.ask("GET", "/v1/jobs", again=False)


def test_a_growing_store_is_followed_through_a_server(train_config: Config, store: Store, growing: Path) -> None:
    growing, port = moved(growing), free_port()
    with server(growing.parent, port, "--launch", "none"):
        harvest = in_steps(growing, store, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]], 1.0)
        config = train_config(
            store=f"http://127.0.0.1:{port}/v1/stores/growing", follow=True, tokens=24 * 64, window_rows=1024
        )
        summary = run_train(config)
        harvest.join()
    assert summary.steps == 24


@pytest.mark.slow
def test_the_lab_cache_as_its_page_makes_it(tmp_path: Path, sagsae: Sagsae, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, one after another, with a server and its worker on this machine."""
    box, port = tmp_path / "box", free_port()
    box.mkdir()
    for name, level in (("token", "ask:"), ("mine", "")):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(f"{level}{TOKEN}\n")
    url = f"http://127.0.0.1:{port}"
    commands = commands_of(ROOT / "docs/how-to/lab-cache.md")
    mine = [words for words in commands if words[0] not in ("serve", "work")]
    assert [words[0] for words in mine] == ["request"] * 2 + ["train"] + ["store"] * 4 + ["jobs"] * 2 + ["store"]
    options = ["--token-file", str(tmp_path / "token"), "--device", "cpu"]
    with server(box / "stores", port, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(address.SERVICE, url)
        monkeypatch.setenv(address.TOKEN_FILE, str(tmp_path / "mine"))
        for words in mine:
            done = sagsae(*(word.replace("http://box:8642", url) for word in words))
            assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "runs/lab/evaluation.json").exists()
    assert not list((box / "stores").glob("tiny*")), "the last command deleted the store"
