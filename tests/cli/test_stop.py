"""Signals: the first is a question, the second has its usual effect, and an echo of the first is neither."""

import signal
from collections.abc import Iterator

import pytest

from shared.stop import stop_requests


@pytest.fixture
def before() -> Iterator[list[int]]:
    """Signals that had the effect that they have outside."""
    seen: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _frame: seen.append(number))
    yield seen
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_second_signal_has_its_usual_effect(before: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with stop_requests() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert (asked(), before) == (True, [])
        signal.raise_signal(signal.SIGINT)
        assert before == [signal.SIGINT]
    signal.raise_signal(signal.SIGTERM)
    assert before == [signal.SIGINT, signal.SIGTERM], "and all do afterwards"


def test_the_launchers_echo_is_not_a_second_signal(before: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    now = 100.0
    monkeypatch.setattr("shared.stop.time.monotonic", lambda: now)
    with stop_requests() as asked:
        for now in (100.0, 100.1, 104.9):  # noqa: B007 (the clock reads it)
            signal.raise_signal(signal.SIGTERM)
        assert (asked(), before) == (True, [])
        now = 106.0
        signal.raise_signal(signal.SIGTERM)
        assert before == [signal.SIGTERM]
