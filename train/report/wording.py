"""How numbers and architectures are written for people. Absent numbers are an en dash, minus is a real minus sign."""

from collections.abc import Iterable

from shared.saes import ARCHITECTURES
from train.report.sae import FrontierKey, SparsityKnob

ABSENT = "–"


def label(key: FrontierKey) -> str:
    """`Gated 512`, or `SA-GSAE 256 (tie-none)`."""
    return f"{ARCHITECTURES[key.arch].label} {key.d_sae}{special(key)}"


def architecture(key: FrontierKey) -> str:
    return f"{ARCHITECTURES[key.arch].label}{special(key)}"


def special(key: FrontierKey) -> str:
    told = key.variant if key.told is None else key.told
    inside = ", ".join(filter(None, (told, key.origin)))
    return f" ({inside})" if inside else ""


def fixed(value: float | None, digits: int) -> str:
    """1234.5 -> `1,234.50`."""
    return ABSENT if value is None else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """Like `fixed`, with a plus sign; what rounds to zero has neither sign."""
    text = f"{value:+,.{digits}f}"
    return text[1:] if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else fixed(100 * value, digits) + "\N{NO-BREAK SPACE}%"


def knob(setting: SparsityKnob) -> str:
    """`λ 0.2`, `k 32`, or `target 20` where λ was steered to an L0. `λ unknown` where nothing says it."""
    if setting.value is None:
        return "λ unknown"
    return f"{ {'lambda': 'λ', 'l0': 'target'}.get(setting.name, setting.name) } {setting.value:g}"


def l0(value: float | None) -> str:
    """About three significant digits: 3.14, 31.4, 314."""
    if value is None:
        return ABSENT
    return fixed(value, 2 if value < 10 else 1 if value < 100 else 0)


def l0_range(low: float, high: float) -> str:
    return f"L0 {l0(low)}" if l0(low) == l0(high) else f"L0 {l0(low)} to {l0(high)}"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def short(value: int) -> str:
    """1234567 -> `1.23 M`."""
    for unit, size in ((" G", 10**9), (" M", 10**6), (" k", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def span(values: Iterable[int | None]) -> str:
    """One count, or the smallest and the largest of several."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return "not recorded"
    return count(known[0]) if len(known) == 1 else f"{count(known[0])} to {count(known[-1])}"


def tokens(values: Iterable[int | None], kind: str = "tokens") -> str:
    """`98,304 held-out tokens`, for the end of a caption."""
    known = span(values)
    return f"an unrecorded number of {kind}" if known == "not recorded" else f"{known} {kind}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
