"""A lease that a thread renews while its holder reads a store."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shared.errors import UserError
from shared.progress import say
from shared.refusals import LapsedError, UnknownError
from shared.request import LeaseGrant

RENEW_SECONDS: Final = 60.0
AGAIN_SECONDS: Final = 5.0
"""Seconds between two tries to get a lease."""
REPORTED: Final = 2
"""Failures in a row after which one is printed."""
END_SECONDS: Final = 5.0
"""Seconds that the end of the block waits for the thread."""


class Lease:
    """A lease of a store for the time of a `with` block. A service that is away does not end the block: the thread
    tries again, and takes a new lease when the old one has lapsed."""

    def __init__(
        self,
        store: str,
        take: Callable[[], LeaseGrant],
        renew: Callable[[str], None],
        release: Callable[[str], None],
        every: float = RENEW_SECONDS,
    ) -> None:
        self.store, self.take, self.renew, self.release, self.every = store, take, renew, release, every
        self.grant: LeaseGrant | None = None
        self.failures = 0
        """How often in a row it could not be had."""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.keep, name=f"lease of {store}", daemon=True)

    def __enter__(self) -> "Lease":
        self.look_after()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(END_SECONDS)
        if self.grant is not None and not self.thread.is_alive():
            with suppress(UserError):  # it lapses without this, too
                self.release(self.grant.id)

    def keep(self) -> None:
        while not self.ended.wait(self.every if self.grant is not None else min(self.every, AGAIN_SECONDS)):
            self.look_after()

    def look_after(self) -> None:
        """Renews the lease, or takes one where there is none. Prints a failure once, when it comes a second time. A
        store that is not in the catalog yet is being written, and its job keeps it."""
        try:
            self.renewed()
        except UnknownError:
            self.failures = 0
        except UserError as error:
            self.failures += 1
            if self.failures == REPORTED:
                say(f"{self.store}: has no lease at the moment. {error}. The work continues, and a lease is asked for")
        else:
            self.failures = 0

    def renewed(self) -> None:
        if self.grant is not None:
            try:
                self.renew(self.grant.id)
                return
            except (LapsedError, UnknownError):
                self.grant = None
        self.grant = self.take()
