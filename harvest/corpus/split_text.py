"""Splits long texts into pieces that a tokenizer can take one by one, so that no text has to be in memory whole.

A text of up to LONGEST characters is one piece. A longer one is cut at white space, where the tokenizer returns the
same ids for the two sides as for both together; this is tried on NEAR characters around every cut. Some tokenizers put
a space in front of their input; then the space at the cut is dropped. The pieces depend on the text and the tokenizer
alone, not on how the text was read.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from shared.errors import UserError

LONGEST: Final = 1 << 18
"""Characters of a piece. A tokenizer needs about 140 bytes of memory for each."""
NEAR: Final = 128
"""Characters on either side of a cut that are tokenised to try it."""
BACK: Final = 1 << 14
"""Characters before the latest possible cut in which a better place is looked for."""
TRIES: Final = 8
"""Places of each kind that are tried."""
BETWEEN_WORDS: Final = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
AT_WHITE_SPACE: Final = re.compile(r"(?<=\S)\s")

IdsOf = Callable[[list[str]], list[list[int]]]
"""Tokenises texts: returns the ids of each."""


def blocks_of(text: str) -> Iterator[str]:
    return (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))


def pieces(
    blocks: Iterable[str], ids_of: IdsOf, on_rough: Callable[[], None], longest: int = LONGEST, near: int = NEAR
) -> Iterator[str]:
    """Yields the pieces of one text, at most `longest + near` characters each. `on_rough` is called at every cut that
    changes ids near it, because no place was found that keeps them."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > longest + near:
            end, start = place_to_cut(held[: longest + near], longest, near, ids_of, on_rough)
            yield held[:end]
            held = held[start:]
    if held:
        yield held


def place_to_cut(text: str, latest: int, near: int, ids_of: IdsOf, on_rough: Callable[[], None]) -> tuple[int, int]:
    """Where the piece at the beginning of `text` ends, and where the next one begins: there, or one space later."""
    for end in places(text, latest):
        window = text[max(0, end - near) : end], text[end : end + near]
        starts = (end, end + 1) if text[end] == " " else (end,)
        before, together, *after = ids_of([window[0], "".join(window), *(text[start : end + near] for start in starts)])
        for start, ids in zip(starts, after, strict=True):
            if before + ids == together:
                return end, start
    on_rough()
    end = next(iter(places(text, latest)))
    return end, end


def places(text: str, latest: int) -> Iterator[int]:
    """Yields the places at which to try a cut, the best first: between words, at other white space, anywhere."""
    first = max(1, latest - BACK)
    near = text[first - 1 : latest + 2]  # with one character on either side
    for kind in (BETWEEN_WORDS, AT_WHITE_SPACE):
        found = [first - 1 + match.start() for match in kind.finditer(near, 1)]
        yield from reversed([place for place in found if place <= latest][-TRIES:])
    yield from range(latest, max(0, latest - TRIES), -1)


def tokenise_texts(texts: list[str], tokenizer: Callable[..., Any] | None) -> list[list[int]]:
    """The ids of each text, without special tokens around it. Raises UserError when the tokenizer fails, or when there
    is none."""
    if tokenizer is None:
        raise UserError(
            "the corpus has texts, and the model has no tokenizer. Give one, or a corpus of token ids: documents that "
            "are lists of ids, or an array (docs/reference/corpora.md)"
        )
    try:
        encoded = tokenizer(  # not verbose: it would warn of documents longer than the model's context
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the tokenizers library raises it; it is no subclass of Exception
            raise
        start = texts[0][:40]
        raise UserError(
            f"the model's tokenizer fails on the text that begins {start!r} ({error}). Remove that text, or correct "
            "tokenizer.json"
        ) from error
    ids: list[list[int]] = encoded["input_ids"]
    return ids
