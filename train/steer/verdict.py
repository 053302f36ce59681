"""What a dial test found, in words and as rows of a table. Pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shared.schemas.steer import FALSE_DISCOVERIES, FEWEST_CONTROLS, GRID, DialLatent

LEVEL = 0.05
"""The level at which contrasts from shuffled signs are counted."""


def verdict(latents: Sequence[DialLatent], controls: int) -> str:
    """Returns the verdict in a few sentences."""
    return " ".join(sentences(latents, controls))


def sentences(latents: Sequence[DialLatent], controls: int) -> list[str]:
    many, right = len(latents), sum(latent.slope > 0 for latent in latents)
    signs = f"{right} of {many} slopes have the predicted sign."
    if any(latent.passes is None for latent in latents):
        return [
            f"No verdict: a verdict needs at least {FEWEST_CONTROLS} control directions, and there are {controls}.",
            signs,
            *cost(latents),
        ]
    passed = sum(bool(latent.passes) for latent in latents)
    found = [
        f"{passed} of {many} latents are a dial: their slopes exceed those of {controls} control directions, at a "
        f"false discovery rate of {FALSE_DISCOVERIES:.0%}.",
        signs,
        strength(latents),
        *shuffles(latents),
        *cost(latents),
        *resolution(many, controls, passed),
    ]
    return [each for each in found if each]


def strength(latents: Sequence[DialLatent]) -> str:
    slopes = [latent.slope for latent in latents]
    others = np.concatenate([latent.controls for latent in latents])
    return (
        f"A unit of dial moves log p(T+) - log p(T-) by {np.mean(slopes):.3f} nats on average; control directions move "
        f"it by {np.sqrt(np.mean(others**2)):.3f} (root mean square)."
    )


def shuffles(latents: Sequence[DialLatent]) -> list[str]:
    """How the same steering does by tokens from shuffled signs."""
    p = [each for latent in latents for each in latent.shuffled_p]
    if not p:
        return []
    slopes, below = [each for latent in latents for each in latent.shuffled], np.mean(np.less(p, LEVEL))
    return [
        f"Judged by tokens from shuffled signs it moves {np.mean(slopes):+.3f} nats, and {below:.0%} of {len(p)} "
        f"slopes have p below {LEVEL}."
    ]


def cost(latents: Sequence[DialLatent]) -> list[str]:
    """What a unit of dial does to all predictions."""
    ends = [GRID.index(-1), GRID.index(1)]
    kl = np.median([latent.kl[end] for latent in latents for end in ends])
    ce = np.median([latent.ce[end] for latent in latents for end in ends])
    return [f"At dial -1 and 1 the median KL to the unsteered model is {kl:.4f} nats, and the loss rises by {ce:+.4f}."]


def resolution(many: int, controls: int, passed: int) -> list[str]:
    """A warning where so few controls cannot let a few latents pass."""
    smallest = 1 / (1 + 2 * controls)
    needed = int(np.ceil(smallest * many / FALSE_DISCOVERIES))
    if needed <= 1 or passed:
        return []
    return [
        f"With {controls} controls p is {smallest:.3f} at the least, so none of {many} can pass unless {needed} do. "
        "Give more --controls."
    ]


def some(tokens: Sequence[int], text: Callable[[int], str], longest: int = 10) -> str:
    """The first tokens of a set that fit on a line with another set."""
    found = text(tokens[0])[:longest]
    for token in tokens[1:]:
        if len(found) + 1 + len(text(token)) > longest:
            break
        found += f" {text(token)}"
    return found


def rows_of(latents: Sequence[DialLatent], text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Returns one row of the table for each latent. `text`: a token id as people read it."""
    low, high = GRID.index(-1), GRID.index(1)
    return [
        {
            "latent": latent.latent,
            "fires - / +": f"{latent.firings[0]} / {latent.firings[1]}",
            "energy": f"{latent.energy:.0%}",
            "m/rms": f"{latent.unit_rms:.2f}",
            "slope": f"{latent.slope:+.3f}",
            "controls": "–" if not latent.controls else f"{np.sqrt(np.mean(np.square(latent.controls))):.3f}",
            "p": "–" if latent.p is None else f"{latent.p:.3f}",
            "dial": {True: "yes", False: "no", None: "–"}[latent.passes],
            "KL": f"{(latent.kl[low] + latent.kl[high]) / 2:.4f}",
            "ΔCE": f"{(latent.ce[low] + latent.ce[high]) / 2:+.4f}",
            "T- | T+": " | ".join(some(part, text) for part in (latent.minus, latent.plus)),
        }
        for latent in latents
    ]
