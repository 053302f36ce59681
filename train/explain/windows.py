"""Chooses the windows of text that a pole is explained from, and other windows that the explanation is tested on.

Everything here is decided by the examples alone, through a fixed hash: the same files make the same questions.
"""

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Final

from train.features.readers.folder import WrittenExample, WrittenPole

LENGTH: Final = 20
"""Tokens of a window in a test."""
AFTER: Final = 5
"""Tokens of it behind the firing."""
SHORTEST: Final = 8
"""Tokens of a window without a firing, at least."""
BEST_SHOWN, BAND_SHOWN = 8, 2
"""Windows that are explained: of the strongest, and of each band of drawn firings."""
FEWEST_SHOWN, FEWEST_HELD = 3, 5
"""Windows that a pole must have, to be explained and to be tested."""
STRONG: Final = 0.5
"""A token is marked from this share of the window's strongest value on."""
DOUBTFUL: Final = 0.02
"""Largest chance that the pole fires in a window of which the files do not say it."""


@dataclass(frozen=True)
class TextWindow:
    """Neighbouring tokens, some of them marked."""

    tokens: tuple[int, ...]
    marked: frozenset[int]
    """Indexes in the window."""
    peak: int
    """The index of the token that a test is about; -1 where the test is about the whole window."""
    strength: float
    """The largest |f| of the pole in the window; 0 where it does not matter."""


@dataclass(frozen=True)
class AskedWindow:
    """A window and the right answer about it."""

    window: TextWindow
    fires: bool
    """Detection: whether the pole fires in it. Fuzzing: whether it fires at the mark. Poles: whether it is above."""


@dataclass(frozen=True)
class PoleExamples:
    """The examples of one pole: those that its explanation is made from, and those that are held back for tests. They
    are from different contexts. Of each context, one is held back at most."""

    pole: WrittenPole
    shown: Sequence[WrittenExample]
    held: Sequence[WrittenExample]

    @property
    def lacking(self) -> str:
        """Why there are too few; empty when there are enough."""
        if len(self.shown) < FEWEST_SHOWN or len(self.held) < FEWEST_HELD:
            return f"too few firings: {len(self.shown)} windows to explain and {len(self.held)} others to test on"
        return ""


def split_examples(poles: Sequence[WrittenPole], own: Sequence[WrittenExample]) -> list[PoleExamples]:
    """Splits the examples of a latent's poles. Every second one is shown, at most BEST_SHOWN of the strongest and
    BAND_SHOWN of each band; of the others, those are held back whose context is shown for neither pole: first one of
    each band, then the next of each."""
    groups = {
        pole.sign: [[each for each in own if (each.sign, each.group) == (pole.sign, number)] for number in range(5)]
        for pole in poles
    }
    shown = {
        sign: one_per_context([*best[::2][:BEST_SHOWN], *chain(*(band[::2][:BAND_SHOWN] for band in bands))], set())
        for sign, (best, *bands) in groups.items()
    }
    contexts = {each.context for each in chain(*shown.values())}
    found = []
    for pole in poles:
        best, *bands = groups[pole.sign]
        rest = (each for turn in zip_longest(*bands, best) for each in turn if each is not None)
        found.append(PoleExamples(pole, shown[pole.sign], one_per_context(rest, contexts)))
    return found


def one_per_context(examples: Iterable[WrittenExample], taken: set[int]) -> list[WrittenExample]:
    found, taken = [], set(taken)
    for each in examples:
        if each.context not in taken:
            taken.add(each.context)
            found.append(each)
    return found


def explained_windows(examples: PoleExamples) -> list[TextWindow]:
    """The whole windows that are shown, each with the tokens marked on which the pole fires strongly; the strongest
    window first."""
    found = []
    for each in examples.shown:
        sizes = [value * each.sign for value in each.values]
        strongest = max(*sizes, abs(each.value))
        marked = {at for at, size in enumerate(sizes) if size >= STRONG * strongest} | {each.peak}
        found.append(TextWindow(tuple(each.tokens), frozenset(marked), each.peak, strongest))
    return sorted(found, key=lambda window: -window.strength)


def detection_windows(
    examples: PoleExamples,
    own: Sequence[WrittenExample],
    shown: Set[int],
    others: Sequence[WrittenExample],
    rows: int,
    many: int,
) -> list[AskedWindow]:
    """Windows in which the pole fires, and as many in which it does not: at most `many` together, in mixed order.

    `own`: all examples of the latent, whose files say where it does not fire; those in the contexts that were `shown`
    are left out. `others`: examples of other latents. Half
    of the windows without a firing are from these, unless the pole is so frequent that more than DOUBTFUL of them would
    hold a firing. The two kinds of window have the same lengths."""
    pole = examples.pole
    key = f"{pole.latent} {pole.sign}"
    near = quiet_windows([each for each in own if each.context not in shown], pole.sign, key)
    far = far_windows(pole, own, others, key) if doubt(pole.firings, rows) <= DOUBTFUL else []
    wanted = min(many // 2, len(examples.held), len(near) + len(far))
    from_far = min(len(far), max(wanted // 2, wanted - len(near)))
    quiet = [*far[:from_far], *near[: wanted - from_far]]
    found = [AskedWindow(window, fires=False) for window in quiet]
    for each, window in zip(examples.held, quiet, strict=False):
        found.append(AskedWindow(cut(each, len(window.tokens), peak=-1), fires=True))
    return mixed_order(found, key)


def doubt(firings: int, rows: int) -> float:
    """The chance that a pole fires in a window of LENGTH tokens, were its firings independent."""
    return float(1 - (1 - min(1.0, firings / rows)) ** LENGTH)


def quiet_windows(examples: Sequence[WrittenExample], sign: int, key: str) -> list[TextWindow]:
    """The longest stretch of each context on which the pole does not fire, at most LENGTH tokens of it."""
    found: dict[int, TextWindow] = {}
    for each in sorted(examples, key=lambda each: (each.sign == sign, chance(key, each.context, each.position))):
        low, high = longest_run([value * sign <= 0 for value in each.values])
        if high - low >= SHORTEST and each.context not in found:
            low += int((high - low - LENGTH + 1) * chance(key, "at", each.context)) if high - low > LENGTH else 0
            tokens = tuple(each.tokens[low : min(high, low + LENGTH)])
            found[each.context] = TextWindow(tokens, frozenset(), -1, 0.0)
    return list(found.values())


def far_windows(
    pole: WrittenPole, own: Sequence[WrittenExample], others: Sequence[WrittenExample], key: str
) -> list[TextWindow]:
    """Windows around firings of other latents, in contexts that none of the latent's examples is from. Latents that
    often fire together with the pole are left out."""
    together = {int(each["latent"]) for each in pole.cofire} | {pole.latent}
    taken = {each.context for each in own}
    apart = [each for each in others if each.latent not in together and each.context not in taken]
    apart.sort(key=lambda each: chance(key, each.latent, each.sign, each.context, each.position))
    windows = [cut(each, LENGTH, peak=-1) for each in one_per_context(apart, set())]
    return [window for window in windows if len(window.tokens) >= SHORTEST]


def fuzz_windows(examples: PoleExamples, many: int) -> list[AskedWindow]:
    """Windows with one marked token: in half of them the one that fires, in the others one that does not."""
    pole = examples.pole
    key = f"{pole.latent} {pole.sign} fuzz"
    right: list[AskedWindow] = []
    wrong: list[AskedWindow] = []
    for each in examples.held:
        window, values = cut(each, LENGTH), cut_values(each, LENGTH)
        quiet = [at for at, value in enumerate(values) if value * pole.sign <= 0]
        if quiet and len(wrong) <= len(right) and len(wrong) < many // 2:
            at = quiet[int(len(quiet) * chance(key, each.context, each.position))]
            wrong.append(AskedWindow(TextWindow(window.tokens, frozenset({at}), at, 0.0), fires=False))
        elif len(right) < many // 2:
            right.append(AskedWindow(window, fires=True))
    n = min(len(right), len(wrong))
    return mixed_order([*right[:n], *wrong[:n]], key)


def pole_windows(above: PoleExamples, below: PoleExamples, many: int) -> list[AskedWindow]:
    """Windows with a firing of one of the two poles, marked; as many of the one as of the other."""
    n = min(many // 2, len(above.held), len(below.held))
    both = [AskedWindow(cut(each, LENGTH), fires=True) for each in above.held[:n]]
    both += [AskedWindow(cut(each, LENGTH), fires=False) for each in below.held[:n]]
    return mixed_order(both, f"{above.pole.latent} poles")


def bounds(example: WrittenExample, length: int) -> tuple[int, int]:
    """The part of an example's window that a test shows: `length` tokens, if there are so many, with the firing."""
    behind = min(AFTER, length // 4)
    stop = min(len(example.tokens), max(example.peak + 1 + behind, length))
    return max(0, stop - length), stop


def cut(example: WrittenExample, length: int, peak: int | None = None) -> TextWindow:
    """The window for a test, with the firing marked; `peak` -1: without a mark."""
    low, high = bounds(example, length)
    at = example.peak - low if peak is None else peak
    marked = frozenset({at} if at >= 0 else ())
    return TextWindow(tuple(example.tokens[low:high]), marked, at, abs(example.value))


def cut_values(example: WrittenExample, length: int) -> Sequence[float]:
    low, high = bounds(example, length)
    return example.values[low:high]


def longest_run(marks: Sequence[bool]) -> tuple[int, int]:
    """Begin and end of the longest run of True; of equal ones the first."""
    best, begin = (0, 0), 0
    for at, mark in enumerate([*marks, False]):
        if not mark:
            best = max(best, (begin, at), key=lambda run: run[1] - run[0])
            begin = at + 1
    return best


def chance(*words: object) -> float:
    """A fixed hash of some words, uniform from 0 to 1."""
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2.0**48


def mixed_order(windows: Sequence[AskedWindow], key: str) -> list[AskedWindow]:
    order = sorted(range(len(windows)), key=lambda at: chance(key, "order", at))
    return [windows[at] for at in order]
