"""Other tools' definitions against numbers that came out of their own code (golden/peers.py made golden/peers.json)."""

import json
from pathlib import Path

import pytest
import torch
from golden.peers import inputs

from train.measure.peers import PEERS, PeerMetrics, SAELensMetrics

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_tool_says_what_its_own_code_said(peer: type[PeerMetrics]) -> None:
    measured = peer()
    for x, f, x_hat in inputs():
        measured.add(torch.from_numpy(x), torch.from_numpy(f), torch.from_numpy(x_hat))
    assert measured.result() == pytest.approx(GOLDEN[peer.name], abs=2e-6)


def test_the_tools_disagree_on_one_reconstruction() -> None:
    """The golden input tells the definitions apart: each has its own R², and its own reason to call a latent dead."""
    assert len({round(numbers["r2"], 3) for numbers in GOLDEN.values()}) == 3
    assert [round(GOLDEN[peer.name]["dead"] * 20) for peer in PEERS] == [1, 2, 3]
    assert GOLDEN["SAELens"]["l0"] != GOLDEN["dictionary_learning"]["l0"], "the batches have unequal lengths"


def test_rare_latents_are_dead_to_saelens() -> None:
    f = torch.zeros(200_000, 3)
    f[:, 0], f[5, 1], f[:2, 2] = 1.0, -1.0, 1.0
    peer = SAELensMetrics()
    x = torch.arange(200_000.0)[:, None]
    peer.add(x, f, x)
    assert peer.result()["dead"] == pytest.approx(1 / 3)
