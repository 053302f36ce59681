"""The documents of a corpus: each is a text, or the ids of a text that was tokenised before. Also what makes one bad.

A bad document cannot be used, although those after it can. The reader of a corpus passes its error to a callback, which
decides: `refuse` raises it, `harvest.corpus.pack.skipping` counts it. Damage to more than one document is raised at
once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from shared.errors import UserError

Ids = Int64[np.ndarray, " _ids"]
StopCheck = Callable[[], None]
"""Called regularly during long work. It may raise, to end the work."""


@dataclass(frozen=True)
class LongText:
    """A text too long to be held whole. It is not empty, and it is valid UTF-8 from end to end."""

    blocks: Callable[[], Iterator[str]]
    """Reads the text once more, block by block."""


Document = str | LongText | Ids
"""A text, or ids without the EOS that joins them to the next document."""


class BadDocument(UserError):
    """One document that cannot be used. The message begins with its place."""


OnBad = Callable[[BadDocument], None]
"""Receives every bad document; when it returns, the document is skipped."""


def refuse(error: BadDocument) -> None:
    raise error


def never_stop() -> None:
    """Never raises: the work is not interrupted."""


@dataclass(frozen=True)
class Corpus:
    """A source of documents."""

    description: dict[str, Any]
    """JSON-able identity: equal descriptions promise equal documents. It holds no absolute path."""
    read: Callable[[OnBad, StopCheck], Iterator[Document]]
    """Makes a new pass over the documents, in source order. Raises UserError where the source cannot be read."""

    def documents(self, on_bad: OnBad = refuse, check_stop: StopCheck = never_stop) -> Iterator[Document]:
        """Yields the documents. `check_stop` is called before every document, and more often in long ones."""
        for document in self.read(on_bad, check_stop):
            check_stop()
            yield document


@dataclass(frozen=True)
class JoinedIds:
    """Ids that are already joined: nothing is shuffled and no EOS is added."""

    description: dict[str, Any]
    """JSON-able identity, as in a Corpus."""
    blocks: Callable[[], Iterator[Ids]]
    """Makes a new pass over the ids. Raises UserError at an id that the model does not know."""
    width: int | None
    """Ids per row, if the ids are rows that are used as they are; None: one stream, to be cut into rows."""


@dataclass(frozen=True)
class DocumentField:
    """The field of a record that holds the document, and the ids that the model knows."""

    name: str
    vocab_size: int

    def document(self, record: Mapping[str, Any], where: str) -> Document:
        """The document of one record. Raises BadDocument when the record has none that a model can take."""
        value = self._value(record, where)
        if isinstance(value, list):
            return self._ids(value, where)
        if isinstance(value, bytes):
            value = self._text(value, where)
        if not isinstance(value, str):
            raise BadDocument(
                f"{where}: {self.name!r} is of type {type(value).__name__}, not a string or a list of ids. "
                "Choose another: --set text_field=NAME"
            )
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, tokenizers cannot take it
            raise BadDocument(
                f"{where}: {self.name!r} is not Unicode text ({error.reason}); correct or remove it"
            ) from error
        return value

    def is_among(self, names: Iterable[str]) -> bool:
        """Whether a table with columns of these names may have the field."""
        return bool({self.name, self.name.split(".")[0]} & set(names))

    def _value(self, record: Mapping[str, Any], where: str) -> Any:
        """The value of the field: a key of the record, or else keys joined by dots, from the outside in."""
        if self.name in record:
            return record[self.name]
        value: Any = record
        for depth, part in enumerate(parts := self.name.split(".")):
            if not isinstance(value, Mapping) or part not in value:
                there = [".".join([*parts[:depth], str(name)]) for name in value] if isinstance(value, Mapping) else []
                raise BadDocument(missing_field(self.name, there or list(record), where))
            value = value[part]
        return value

    def _text(self, value: bytes, where: str) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadDocument(f"{where}: {self.name!r} is not UTF-8 ({error.reason}); write it again") from error

    def _ids(self, value: list[Any], where: str) -> Ids:
        strange = {type(one).__name__ for one in value} - {"int"}
        if strange:
            kinds = " and ".join(sorted(strange))
            raise BadDocument(f"{where}: {self.name!r} is a list of {kinds}; a text or a list of ids is expected")
        if value and not 0 <= min(value) <= max(value) < self.vocab_size:
            place = next(place for place, one in enumerate(value) if not 0 <= one < self.vocab_size)
            raise BadDocument(unknown_id(value[place], f"{where}: {self.name!r}[{place}]", self.vocab_size))
        return np.array(value, dtype=np.int64)


def unknown_id(number: int, where: str, vocab_size: int) -> str:
    """The message for an id that the model has no embedding for."""
    return (
        f"{where}: is id {number}, outside 0 to {vocab_size - 1}: a tokenizer that does not match the model's "
        "vocabulary. Tokenise the corpus with the model's own tokenizer, or give its text"
    )


def missing_field(field: str, there: list[str], where: str) -> str:
    """The message for a record, a file or a dataset without the field."""
    fields = ", ".join(map(str, there[:100])) or "none"
    return f"{where}: has no field {field!r}; there are: {fields}. Choose one: --set text_field=NAME"


def cause(error: Exception) -> str:
    """The first line of a library's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
