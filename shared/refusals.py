"""Why the activation cache refuses: each with the code that its HTTP answers carry, so that a client raises the same
error again."""

from typing import Any, ClassVar, Final

from shared.errors import UserError


class RefusedError(UserError):
    """The cache understood and does not do it."""

    code: ClassVar[str] = "refused"
    status: ClassVar[int] = 422
    """The HTTP status that carries it."""

    def fields(self) -> dict[str, Any]:
        """Further members of the error's JSON."""
        return {}


class UnknownError(RefusedError):
    """There is no store, job or lease of this id."""

    code: ClassVar[str] = "unknown"
    status: ClassVar[int] = 404


class NotYoursError(RefusedError):
    """The attempt was given to another worker, or has ended."""

    code: ClassVar[str] = "not_yours"
    status: ClassVar[int] = 409


class WrongStateError(RefusedError):
    """A job in this state cannot be cancelled or retried."""

    code: ClassVar[str] = "wrong_state"
    status: ClassVar[int] = 409


class LapsedError(RefusedError):
    """The lease has run out, or was released."""

    code: ClassVar[str] = "lapsed"
    status: ClassVar[int] = 410


class QueueFullError(RefusedError):
    """Too many jobs are open."""

    code: ClassVar[str] = "queue_full"
    status: ClassVar[int] = 429


class HoldersError(RefusedError):
    """Something holds what the request needs."""

    def __init__(self, message: str, held_by: tuple[dict[str, Any], ...] = ()) -> None:
        super().__init__(message)
        self.held_by = held_by
        """What holds the space or the store: `{"store", "bytes", "why": "pin" | "lease" | "job" | …, "name"}`."""

    def fields(self) -> dict[str, Any]:
        return {"held_by": list(self.held_by)}


class HeldError(HoldersError):
    """The store is pinned, leased, read or written."""

    code: ClassVar[str] = "held"
    status: ClassVar[int] = 409


class QuotaError(HoldersError):
    """There is no space, and nothing that may be deleted for it."""

    code: ClassVar[str] = "quota"
    status: ClassVar[int] = 507


REFUSALS: Final[dict[str, type[RefusedError]]] = {
    kind.code: kind
    for kind in (
        RefusedError,
        UnknownError,
        NotYoursError,
        WrongStateError,
        LapsedError,
        QueueFullError,
        HeldError,
        QuotaError,
    )
}
"""By the code of an HTTP answer."""
