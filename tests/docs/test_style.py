"""The rules of docs/contributing/style.md that a machine can hold."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
STYLE_PAGE = ROOT / "docs" / "contributing" / "style.md"
"""Quotes the sentences and words that the project does not use."""
LINE, CELL, SENTENCE = 120, 160, 25
"""Characters of a line and of a table cell; words of a sentence, on average over a page."""
RIDDLE = re.compile(r"(Of|That|Whose)\b")
WORDS = {
    r"(go|goes|going|went|gone) on\b": "resumes, continues",
    r"(take|takes|took|taken) up again": "resumes",
    r"afresh": "from the start",
    r"anew": "again; rewrite",
    r"interpreter's lock": "GIL",
    r"one after another and then averaged": "micro-batches, gradient accumulation",
    r"(no|a) number any more": "NaN",
    r"any more": "no longer",
    r"(is|are|was|be) told": "receives; is logged",
    r"(does|do|did) not suffice": "is too small; not enough",
    r"nobody": "no thread, no process",
    r"whoever": "the caller, the thread that",
    r"data[ -]sets?\b": "dataset",
    r"room (on|for|left|in)\b": "space, capacity",
    r"of its own accord": "automatically",
}
"""What must not stand in prose or messages -> what to write."""
SENTENCE_WORDS = {r"(^|[.:;] )Gives?\b": "Returns, Yields"}
"""What no sentence of a docstring begins with."""


def product() -> list[Path]:
    files = [path for top in ("shared", "harvest", "train") for path in (ROOT / top).rglob("*.py")]
    return sorted([*files, ROOT / "cli.py"])


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings of modules, classes, functions and attributes: line number, text on one line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, " ".join(node.value.value.split())


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Strings of more than one word that are no docstrings; the values in an f-string are left out."""
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            skipped |= {id(part) for part in node.values}
            yield node.lineno, " ".join("{}".join(map(str, parts)).split())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = " ".join(node.value.split())
            yield from [(node.lineno, text)] if " " in text else []


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def without_code(text: str) -> list[tuple[int, str]]:
    """The lines of a page outside fenced code, with their numbers."""
    lines, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


def words_in(text: str, words: dict[str, str]) -> list[str]:
    """The words of a list that stand in a text, each with what to write."""
    found = ((re.search(rf"(?:\b|(?=\())(?:{word})", text, re.IGNORECASE), better) for word, better in words.items())
    return [f"{match.group().strip()!r} ({better})" for match, better in found if match]


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence of a page: no code, no tables, no headings; a list item ends its sentence."""
    blocks, block = [], ""
    for _, line in [*without_code(text), (0, "")]:
        bare = line.strip()
        if not bare or bare.startswith(("#", "|", "<", "* ", "- ")) or re.match(r"\d+\. ", bare):
            blocks.append(block)
            block = ""
        if not bare.startswith(("#", "|", "<")):
            block += " " + re.sub(r"^([*-]|\d+\.) ", "", bare)
    prose = [re.sub(r"\]\([^)]*\)|[*`\[]", "", block) for block in blocks if block.strip()]
    sentences = [sentence for block in prose for sentence in re.split(r"(?<=[.!?])\s+", block.strip())]
    return [len(sentence.split()) for sentence in sentences if sentence]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_docstring_begins_with_of_that_or_whose() -> None:
    wrong = [
        f"{name(path)}:{line}: {text[:80]}"
        for path in product()
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if RIDDLE.match(text)
    ]
    assert not wrong, "say what the thing is or does (docs/contributing/style.md):\n" + "\n".join(wrong)


def test_prose_of_the_product_uses_the_terms_of_the_field() -> None:
    wrong = []
    for path in product():
        source = path.read_text(encoding="utf-8")
        prose = [*docstrings(source), *comments(source), *messages(source)]
        wrong += [f"{name(path)}:{line}: {word}" for line, text in prose for word in words_in(text, WORDS)]
        wrong += [
            f"{name(path)}:{line}: {word}"
            for line, text in docstrings(source)
            for word in words_in(text, SENTENCE_WORDS)
        ]
    assert not wrong, "docs/contributing/style.md, Words:\n" + "\n".join(sorted(wrong))


def test_pages_use_the_terms_of_the_field() -> None:
    wrong = [
        f"{name(path)}:{number}: {word}"
        for path in pages()
        if path != STYLE_PAGE
        for number, line in without_code(path.read_text(encoding="utf-8"))
        for word in words_in(line, WORDS)
    ]
    assert not wrong, "docs/contributing/style.md, Words:\n" + "\n".join(wrong)


def test_lines_of_pages_are_short() -> None:
    wrong = [
        f"{name(path)}:{number}: {len(line)} characters"
        for path in pages()
        for number, line in without_code(path.read_text(encoding="utf-8"))
        if len(line) > LINE and not line.lstrip().startswith("|")  # a row of a table cannot be wrapped
    ]
    assert not wrong, f"at most {LINE} characters a line:\n" + "\n".join(wrong)


def test_table_cells_of_pages_are_short() -> None:
    wrong = [
        f"{name(path)}:{number}: a cell of {len(cell.strip())} characters"
        for path in pages()
        for number, line in without_code(path.read_text(encoding="utf-8"))
        if line.lstrip().startswith("|")
        for cell in re.split(r"(?<!\\)\|", line)
        if len(cell.strip()) > CELL
    ]
    assert not wrong, f"at most {CELL} characters a cell:\n" + "\n".join(wrong)


def test_sentences_of_a_page_are_short_on_average() -> None:
    means = {}
    for path in pages():
        lengths = sentence_lengths(path.read_text(encoding="utf-8"))
        means[name(path)] = sum(lengths) / max(1, len(lengths))
    wrong = [f"{page}: {mean:.1f} words" for page, mean in means.items() if mean > SENTENCE]
    assert not wrong, f"at most {SENTENCE} words a sentence, on average over a page:\n" + "\n".join(wrong)


def test_the_checks_find_what_they_look_for() -> None:
    source = '"""Of a thing."""\nBYTES = 1\n"""Whose it is."""\nx = f"it goes on {BYTES} anew"  # nobody\n'
    assert [text for _, text in docstrings(source) if RIDDLE.match(text)] == ["Of a thing.", "Whose it is."]
    assert [len(words_in(text, WORDS)) for _, text in messages(source)] == [2]
    assert [len(words_in(text, WORDS)) for _, text in comments(source)] == [1]
    assert words_in("Waits. Gives a row.", SENTENCE_WORDS)
    assert not words_in("Offers a thing; thawed", WORDS)
    assert without_code("a\n```\nb\n```\nc") == [(1, "a"), (5, "c")]
    assert sentence_lengths("# Title\n\nOne two. Three\nfour five!\n* six\n\n| a | b |\n") == [2, 3, 1]
