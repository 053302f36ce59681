"""The service behind a real port of this machine, in a thread of the test's process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from harvest.serve.app import ListeningServer, make_app
from harvest.serve.rest.endpoint import Service
from harvest.serve.rest.security import Tokens


@contextmanager
def running(service: Service, tokens: Tokens | None = None, port: int = 0) -> Iterator[str]:
    """The service's address, while the block runs. Then open streams end, as they do when `sagsae serve` ends."""
    listener = socket.create_server(("127.0.0.1", port))
    service.tokens = tokens
    config = uvicorn.Config(make_app(service), log_level="warning", ws="none", timeout_graceful_shutdown=2)
    server = ListeningServer(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        service.announcer.closing = True
        service.announcer.heard(0)
        server.should_exit = True
        thread.join()
        listener.close()
