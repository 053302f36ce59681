"""What failures of the hub and of its library become: one sentence each, without a token."""

import pytest
from support.serving.hub import TOKEN

from shared.errors import BusyError, DamagedError, Interrupted, UserError
from shared.gate import BadData
from shared.hub.client import checked, explained, harmless
from shared.hub.place import HubRepo

REPO = HubRepo("tester/saes", "model")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ConnectionResetError("x"), BusyError, "cannot be reached while uploading, or broke off"),
        (TimeoutError("x"), BusyError, "cannot be reached"),
        (caused(RuntimeError("uploading"), BrokenPipeError()), BusyError, "cannot be reached"),
        (RuntimeError("CAS: connection lost"), BusyError, r"broke off while uploading .CAS: connection lost"),
        (caused(RuntimeError("uploading"), FileNotFoundError(2, "gone", "a/b")), UserError, "a/b: cannot be read"),
        (KeyError("actions"), UserError, "the hub's answer while uploading cannot be used .KeyError: 'actions'"),
        (ValueError(f"bad {TOKEN} at https://x/y?X-Amz-Signature=abc"), UserError, r"bad \*\*\* at https://x/y\*\*\*"),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence(error: Exception, kind: type[UserError], said: str) -> None:
    with pytest.raises(kind, match=said) as failure, explained(REPO, "uploading"):
        raise error
    assert type(failure.value) is kind
    assert TOKEN not in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("error", [Interrupted("stopped"), UserError("x"), DamagedError("x"), MemoryError()])
def test_what_is_clear_already_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as failure, explained(REPO):
        raise error
    assert failure.value is error


def test_a_bad_answer_is_named() -> None:
    with pytest.raises(DamagedError, match="tester/saes: the hub's answer cannot be used: it lacks sha"), checked(REPO):
        raise BadData("lacks sha")


def test_words_of_others_are_harmless() -> None:
    assert harmless(f"a\x1b[31m {TOKEN}\nBearer abc.def\n hf_otherToken123") == r"a\x1b[31m *** *** ***"
    assert len(harmless("x" * 10_000)) == 200
