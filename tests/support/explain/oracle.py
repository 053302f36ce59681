"""A server that knows the truth: it finds each window in the store and looks at every latent there."""

import re
from dataclasses import dataclass

import numpy as np

from support.exact.runs import AllLatents
from support.explain.endpoint import Body, kind_of
from support.explain.words import SentWindow, places_of, windows_in


@dataclass
class Oracle:
    truth: AllLatents
    unclear: int = 0
    """Windows that stand at several places with different answers."""

    def __call__(self, body: Body) -> str:
        kind, windows = kind_of(body), windows_in(body)
        if kind == "explain":
            return self.explain(windows)
        poles = [(int(latent), int(sign)) for latent, sign in re.findall(r"pole (\d+) (-?1)", spoken(body))]
        return str([int(self.answer(kind, window, *poles[0])) for window in windows])

    def explain(self, windows: list[SentWindow]) -> str:
        """The pole that fires most on all that is marked."""
        least = np.full((self.truth.f.shape[1], 2), np.inf)
        for window in windows:
            for at in self.places(window):
                for mark in window.marked:
                    values = self.truth.f[at + mark]
                    least = np.minimum(least, np.stack([values, -values], 1))
        latent, side = np.unravel_index(int(least.argmax()), least.shape)
        assert least[latent, side] > 0, "no pole fires on all marks"
        return f"pole {latent} {1 - 2 * int(side)}"

    def answer(self, kind: str, window: SentWindow, latent: int, sign: int) -> bool:
        found = set()
        for at in self.places(window):
            values = sign * self.truth.f[at : at + len(window.ids), latent]
            found.add(bool((values > 0).any() if kind == "detection" else values[window.marked[0]] > 0))
        self.unclear += len(found) > 1
        return found.pop()

    def places(self, window: SentWindow) -> list[int]:
        found = places_of(window.ids, self.truth.ids, self.truth.context)
        assert found, "the window does not stand in the store"
        return found


def spoken(body: Body) -> str:
    return str(body["messages"][1]["content"])
