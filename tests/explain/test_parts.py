"""Windows, answers and scores, each by itself."""

import pytest

from shared.gate import BadData
from train.explain.prompts import marked_text, read_list, read_sentence
from train.explain.scores import rule_at_mark, rule_detects, rule_tells_poles, score, wilson
from train.explain.windows import (
    AskedWindow,
    TextWindow,
    cut,
    detection_windows,
    doubt,
    explained_windows,
    split_examples,
)
from train.features.readers.folder import WrittenExample, WrittenPole


def pole(latent: int, sign: int, firings: int, together: tuple[int, ...] = ()) -> WrittenPole:
    cofire = [{"latent": other, "sign": 1, "jaccard": 0.1, "lift": 9.0} for other in together]
    return WrittenPole(latent, sign, firings, 1.0, 8.0, 0.5, (), None, (1, 2), (), (), cofire)


def example(
    latent: int, context: int, group: int = 1, rank: int = 0, sign: int = 1, value: float = 4.0, peak: int = 28
) -> WrittenExample:
    """A window of 40 tokens, whose numbers tell the context, with one firing."""
    values = [0.0] * 40
    values[peak] = sign * value
    tokens = [1000 * context + at for at in range(40)]
    return WrittenExample(latent, sign, group, rank, sign * value, context, peak, 0, tokens, values)


def own_examples() -> list[WrittenExample]:
    best = [example(3, context, 0, context, value=8.0 - context / 10) for context in range(16)]
    return best + [
        example(3, 100 * band + rank, band, rank, value=2.0 * band) for band in range(1, 5) for rank in range(8)
    ]


def test_shown_and_held_windows_are_of_different_contexts() -> None:
    (found,) = split_examples([pole(3, 1, 500)], own_examples())
    assert len(found.shown) == 8 + 4 * 2
    assert len(found.held) == 48 - 16
    assert {each.context for each in found.shown}.isdisjoint(each.context for each in found.held)
    assert [each.group for each in found.held[:5]] == [1, 2, 3, 4, 0], "every size comes first"


def test_windows_of_other_latents_are_used_for_a_rare_pole_alone() -> None:
    own = own_examples()
    others = [example(latent, 5000 + latent) for latent in range(10, 60)]
    others += [example(7, 7000 + number) for number in range(50)]  # often fires together with the pole
    others += [example(8, number) for number in range(16)]  # in contexts of the pole's own examples
    for firings, share in ((500, 0.5), (50_000, 0.0)):
        examples = split_examples([pole(3, 1, firings, together=(7,))], own)[0]
        shown = {each.context for each in examples.shown}
        tests = detection_windows(examples, own, shown, [*own, *others], 1_000_000, 20)
        assert sum(each.fires for each in tests) == sum(not each.fires for each in tests) == 10
        contexts = [each.window.tokens[0] // 1000 for each in tests if not each.fires]
        assert sum(5010 <= context < 5060 for context in contexts) == 10 * share
        assert all(5010 <= context < 5060 or context < 500 for context in contexts)
        assert shown.isdisjoint(contexts)
        lengths = {
            kind: sorted(len(each.window.tokens) for each in tests if each.fires is kind) for kind in (True, False)
        }
        assert lengths[True] == lengths[False], "their length does not tell them apart"
    assert doubt(500, 1_000_000) < 0.02 < doubt(50_000, 1_000_000)


def test_a_test_shows_the_firing_wherever_it_is() -> None:
    for peak in (0, 3, 20, 39):
        for length in (8, 20, 60):
            found = cut(example(1, 1, peak=peak), length)
            assert len(found.tokens) == min(length, 40)
            assert found.tokens[found.peak] == 1000 + peak
            assert found.marked == {found.peak}


def test_marks_are_strong_firings_and_the_peak() -> None:
    each = example(1, 1, value=2.0)
    each = WrittenExample(**{**vars(each), "values": [*each.values[:10], 8.0, 3.0, 4.0, *each.values[13:]]})
    examples = split_examples([pole(1, 1, 9)], [each])[0]
    (window,) = explained_windows(examples)
    assert window.marked == {10, 12, 28}
    assert window.strength == 8.0
    text = marked_text(
        TextWindow((1, 2, 3, 4), frozenset({1, 2}), 1, 1.0), lambda ids: "".join(f" t{one}" for one in ids)
    )
    assert text == '" t1<< t2 t3>> t4"'


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("```json\n[1,0,0]\n```", [True, False, False]),
        ("<think>maybe [1, 1, 1]</think> [0, 0, 1]", [False, False, True]),
        ("Window 1 says [x]. My answer: [true, false, 1]", [True, False, True]),
    ],
)
def test_lists_that_are_read(answer: str, found: list[bool]) -> None:
    assert read_list(answer, 3) == found


@pytest.mark.parametrize(
    "answer", ["", "1, 0, 1", "[1, 0]", "[1, 0, 2]", "[1, 0, 0.5]", "[[1], 0, 1]", "[1, 0, null]", "[1, 0, 1"]
)
def test_lists_that_are_not_read(answer: str) -> None:
    with pytest.raises(BadData):
        read_list(answer, 3)


def test_a_sentence_is_one_line_without_control_characters() -> None:
    assert read_sentence("<think>x</think>  Fires on\n\n \x1b[31mnames.") == r"Fires on \x1b[31mnames."
    assert len(read_sentence("word " * 1000)) == 400
    for answer in ("", "  \n", "<think>never ends"):
        with pytest.raises(BadData):
            read_sentence(answer)


def asked(fires: bool, token: int) -> AskedWindow:
    return AskedWindow(TextWindow((9, token), frozenset({1}), 1, 1.0), fires)


def test_scores() -> None:
    tests = [asked(fires, token) for fires, token in ((True, 1), (True, 5), (True, 2), (False, 1))]
    found = score(tests, [True, True, False, False], rule_detects((1, 2), tests))
    assert found is not None
    assert found.accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert found.rule == pytest.approx((2 / 3 + 0) / 2)
    assert score(tests[:3], [True] * 3, [1.0] * 3) is None
    assert wilson(0.5, 20.0) == pytest.approx((0.29930, 0.70070), abs=1e-5)
    assert wilson(1.0, 20.0) == pytest.approx((0.83887, 1.0), abs=1e-5)
    assert rule_at_mark((1, 9), tests) == [1.0, 0.0, 0.0, 1.0], "the other token does not count"
    assert rule_tells_poles((1, 2), (2, 5), tests) == [1.0, 0.0, 0.5, 1.0]
