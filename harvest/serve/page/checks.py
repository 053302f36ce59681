"""Checks of stores that people start from the page. Each reads a whole store, so one runs at a time, in a thread."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harvest.serve.page.words import ago, percent
from shared.errors import BusyError, DamagedError, Interrupted, UserError
from shared.store.opened import Store
from shared.store.verify import verify

KEPT: Final = 64
"""Results that are remembered."""
SAID_S: Final = 1.0
"""Seconds between two reports of progress."""
LINES: Final = 50
"""Damaged files that are listed."""


@dataclass
class StoreCheck:
    """One check of one store, while it runs and after it."""

    store: str
    total: int = 0
    read: int = 0
    """Bytes that were checked."""
    ended: float | None = None
    damage: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class CheckView:
    """A check as the page shows it."""

    text: str
    percent: float | None
    damage: tuple[str, ...]
    state: str
    """running, good or bad."""


class StoreChecks:
    """The check that runs, and the results of the last ones. Used from many threads.

    `tell` is called when something new can be shown."""

    def __init__(self, now: Callable[[], float], tell: Callable[[], None]) -> None:
        self.now, self.tell = now, tell
        self.lock = threading.Lock()
        self.checks: OrderedDict[str, StoreCheck] = OrderedDict()
        self.running: StoreCheck | None = None
        self.stopping = False

    def start(self, store: str, folder: Path) -> None:
        """Begins to check a store. A store that is being checked is
        not checked twice. Raises BusyError while another one is."""
        with self.lock:
            if self.running is not None:
                if self.running.store == store:
                    return
                raise BusyError(f"store {self.running.store} is being checked. Try again when that has ended")
            check = self.running = self.checks[store] = StoreCheck(store)
            self.checks.move_to_end(store)
            while len(self.checks) > KEPT:
                self.checks.popitem(last=False)
        threading.Thread(target=self.run, args=(check, folder), name=f"check {store}", daemon=True).start()

    def run(self, check: StoreCheck, folder: Path) -> None:
        said = self.now()

        def advance(count: int, _: str) -> None:
            nonlocal said
            check.read += count
            if self.stopping:
                raise Interrupted("the server stops")
            if not 0 <= self.now() - said < SAID_S:
                said = self.now()
                self.tell()

        try:
            store = Store.open(folder, lenient=True)
            check.total = store.commits.n_bytes
            with store.files.reading():
                check.damage = verify(store, full=False, advance=advance).lines
        except (UserError, DamagedError, Interrupted, OSError) as error:
            check.error = str(error)
        except Exception as error:
            check.error = f"the check met a fault of its own ({type(error).__name__})"
            raise
        finally:
            check.ended = self.now()
            with self.lock:
                self.running = None
            self.tell()

    def close(self) -> None:
        """Stops the check that runs; it changes nothing on the disk."""
        self.stopping = True

    def view(self, store: str) -> CheckView | None:
        """The check of a store as it is now; None where there was none."""
        with self.lock:
            check = self.checks.get(store)
        return None if check is None else check_view(check, self.now())


def check_view(check: StoreCheck, now: float) -> CheckView:
    if check.ended is None:
        return CheckView("Every file is being read.", percent(check.read, check.total) or 0.0, (), "running")
    when = ago(check.ended, now)
    if check.error:
        return CheckView(f"The check ended early ({when}): {check.error}", None, (), "bad")
    if not check.damage:
        return CheckView(f"Every file is as it was written ({when}).", None, (), "good")
    many = len(check.damage)
    text = f"{many} damaged {'file' if many == 1 else 'files'} ({when}). To repair: sagsae store verify --repair"
    return CheckView(text, None, tuple(check.damage[:LINES]), "bad")
