"""Whose turn it is to read a window, and how far ahead; tests/train/test_order.py has it with real windows."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from support.processes import until

from train.data.read_ahead import Priority, ReadAhead


@pytest.fixture
def pace() -> ReadAhead:
    return ReadAhead()


@pytest.fixture
def threads(pace: ReadAhead) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(10) as pool:
        yield pool
        pace.close()  # nobody waits for ever


def test_what_is_needed_first_is_read_first_and_alone(pace: ReadAhead, threads: ThreadPoolExecutor) -> None:
    read, reading = [], threading.Lock()

    def wait(needed: Priority) -> None:
        with pace.turn(needed):
            assert reading.acquire(blocking=False), "two windows are read at once"
            read.append(needed)
            reading.release()

    needed = [(rows, stream) for stream, rows in enumerate([70, 30, 30, 0, 90, 20, 50, 10])]
    random.Random(3).shuffle(needed)
    with pace.turn((0, 9)):
        done = [threads.submit(wait, each) for each in needed]
        until(lambda: len(pace.waiting) == len(needed))
    for each in done:
        each.result()
    assert read == sorted(needed)


def reading_without_room(pace: ReadAhead, threads: ThreadPoolExecutor) -> Future[int]:
    """In the middle of a window that is needed after 100 rows."""
    pace.limit(8)
    pace.add(9)

    def read() -> int:
        with pace.turn((100, 1)):
            return pace.wait_for_rows(2, 4)

    found = threads.submit(read)
    until(lambda: pace.reading == (100, 1))
    return found


def ask(pace: ReadAhead, needed: Priority) -> None:
    with pace.turn(needed):
        pass


def test_keeping_pace_is_over_when_another_window_is_needed_sooner(
    pace: ReadAhead, threads: ThreadPoolExecutor
) -> None:
    held = reading_without_room(pace, threads)
    later = threads.submit(ask, pace, (200, 2))
    until(lambda: pace.waiting == [(200, 2)])
    with pytest.raises(TimeoutError):
        held.result(timeout=0.1)
    sooner = threads.submit(ask, pace, (50, 3))
    assert held.result(timeout=10) == 4
    sooner.result(timeout=10)
    later.result(timeout=10)


def test_there_is_room_for_what_was_given_out(pace: ReadAhead, threads: ThreadPoolExecutor) -> None:
    held = reading_without_room(pace, threads)
    pace.take(2)
    with pytest.raises(TimeoutError):
        held.result(timeout=0.1)
    pace.take(3)
    assert held.result(timeout=10) == 3


def test_nobody_waits_for_a_turn_or_room_when_all_is_over(pace: ReadAhead, threads: ThreadPoolExecutor) -> None:
    held = reading_without_room(pace, threads)
    later = threads.submit(ask, pace, (200, 2))
    until(lambda: bool(pace.waiting))
    pace.close()
    for each in (held, later, threads.submit(ask, pace, (0, 0))):
        with pytest.raises(CancelledError):
            each.result(timeout=10)
