"""`sagsae steer`: what a language model writes, or predicts on held-out text, while one latent has other values."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.model.source import model_info, read_config
from shared.model.tokenizer import Encoder
from shared.progress import progress, say
from shared.schemas.steer import SteerConfig
from shared.stop import stop_requests
from shared.store.spec import are_special
from train.data.order import excluded_positions
from train.data.row_mask import RowMask
from train.steer.generate import Continuations, Marks, TextWriter
from train.steer.intervene import Intervention
from train.steer.probe import Probe, SteeredContexts, TokenContrasts
from train.steer.subject import SteeringSubject, make_subject
from train.steer.wording import MovedToken, SteeredRow, SteerResult, encoder_of, text_of

TOKENS: int = 8
"""Tokens of a table, by the unsteered probability."""
MOVED: int = 4
"""Tokens listed for a dial value: those that rise most, and those that fall most."""


def steer(config: SteerConfig) -> SteerResult:
    """Steers with one latent. Raises UserError for unusable input."""
    subject = make_subject(config)
    subject.check_latent(config.latent)
    unit = float(subject.counts.units[config.latent])
    amounts = torch.tensor([value * unit for value in config.values])
    change = Intervention.on_latent(subject.sae, config.latent, amounts, config.mode == "add")
    encoder = encoder_of(subject.source, subject.store)
    with subject.store.files.reading():
        if config.prompt is not None:
            result = on_prompt(config, subject, change, encoder, config.prompt)
        else:
            result = on_contexts(config, subject, change, encoder)
    rms = unit * float(change.direction.norm()) / subject.sae.scale
    return replace(result, unit=unit, unit_rms=rms, encoder=encoder)


# a prompt


def on_prompt(
    config: SteerConfig, subject: SteeringSubject, change: Intervention, encoder: Encoder, text: str
) -> SteerResult:
    """Continues a text without and with each value."""
    prompt = prompt_ids(subject, encoder, text)
    info = model_info(read_config(subject.source))
    if len(prompt) + config.new_tokens > info.max_context:
        raise UserError(
            f"--prompt: {len(prompt):,} tokens and {config.new_tokens:,} new ones are too many for "
            f"{subject.source.name}, which was made for {info.max_context:,}. Shorten it, or lower --new-tokens"
        )
    marks = prompt_marks(config, subject, prompt)
    writer = TextWriter(subject.language_model(), subject.hook_name, change, marks, encoder.eos_id)
    found = writer.write(prompt, config.new_tokens, config.temperature, config.seed)
    return SteerResult(
        config, len(prompt), prompt_rows(config, change.amount.tolist(), found, encoder), next_token_table(found)
    )


def prompt_ids(subject: SteeringSubject, encoder: Encoder, text: str) -> list[int]:
    """Returns a prompt's ids, after the BOS token where the store's contexts begin with it. Raises UserError for a text
    without tokens."""
    spec = subject.store.spec
    ids = encoder.ids(text)
    if not ids:
        raise UserError("--prompt: has no token. Give some text")
    if spec.tokenizer.get("blake2b") not in (None, encoder.digest):
        say(f"{subject.source.name}: its tokenizer is another one than that of the store, so prompts differ from it")
    return ids if spec.bos_id is None else [spec.bos_id, *ids]


def prompt_marks(config: SteerConfig, subject: SteeringSubject, prompt: Sequence[int]) -> Marks:
    """Returns the function that marks the positions to change. Raises UserError when the prompt lacks the position."""
    if config.at == "all":
        return lambda ids: trained_positions(subject, ids)
    place = len(prompt) - 1 if config.at == "last" else int(config.at)
    if place >= len(prompt):
        raise UserError(f"--at {config.at}: the prompt has {len(prompt)} tokens, 0 to {len(prompt) - 1}")

    def one(ids: Tensor) -> Tensor:
        found = torch.zeros_like(ids, dtype=torch.bool)
        found[:, place] = True
        return found

    return one


def trained_positions(subject: SteeringSubject, ids: Tensor) -> Tensor:
    """Marks the positions that the run trains on: no excluded ones, and no special tokens where it leaves these out."""
    spec, trained = subject.store.spec, subject.rows.config
    found = torch.ones_like(ids, dtype=torch.bool)
    if trained.exclude_special:
        found = torch.from_numpy(~are_special(ids.cpu().numpy(), spec.special_ids)).to(ids.device)
    found[:, [place for place in excluded_positions(spec, trained) if place < ids.shape[1]]] = False
    return found


def prompt_rows(
    config: SteerConfig, amounts: Sequence[float], found: Continuations, encoder: Encoder
) -> list[SteeredRow]:
    """The unsteered continuation, and one for each value."""
    clean = found.first[0]
    rows = []
    for number, tokens in enumerate(found.tokens):
        kl = torch.nn.functional.kl_div(found.first[number], clean, log_target=True, reduction="sum").item()
        rows.append(
            SteeredRow(
                dial=None if number == 0 else config.values[number - 1],
                value=None if number == 0 else amounts[number - 1],
                kl=kl,
                text=text_of(encoder, tokens),
                tokens=tuple(tokens),
            )
        )
    return rows


def next_token_table(found: Continuations) -> dict[int, list[float]]:
    """Probabilities of the next token, unsteered and with each value, of the most probable tokens unsteered and of
    those that a value makes most probable."""
    p = found.first.exp().double().cpu()
    chosen = dict.fromkeys(p[0].topk(min(TOKENS, p.shape[1])).indices.tolist())
    for row in p[1:]:
        chosen |= dict.fromkeys(row.topk(min(MOVED, p.shape[1])).indices.tolist())
    return {token: p[:, token].tolist() for token in chosen}


# held-out contexts


def on_contexts(config: SteerConfig, subject: SteeringSubject, change: Intervention, encoder: Encoder) -> SteerResult:
    """Measures each value on held-out contexts."""
    assert config.contexts is not None
    _, contexts = subject.contexts(RowMask.of(subject.split().heldout), config.contexts, config.seed)
    contexts = contexts if config.at == "all" else at_one_position(contexts, int(config.at))
    probe = Probe(subject.language_model(), subject.hook_name, contexts, TokenContrasts.of([]), with_means=True)
    changes = [replace(change, amount=change.amount[number : number + 1]) for number in range(len(change.amount))]
    with (
        stop_requests() as stop_asked,
        progress("steer", len(changes) * probe.batch_count, "passes") as advance,
    ):
        clean, *found = probe.measure(changes, lambda n: advance(n, ""), stop_asked)
    rows = []
    for value, amount, response in zip(config.values, change.amount.tolist(), found, strict=True):
        assert response.mean is not None
        assert clean.mean is not None
        moved = response.mean - clean.mean
        rows.append(
            SteeredRow(
                dial=value,
                value=amount,
                kl=float(contexts.mean(response.kl)),
                ce=float(contexts.mean(response.ce) - contexts.mean(clean.ce)),
                rise=moved_tokens(moved, encoder),
                fall=moved_tokens(-moved, encoder, -1),
            )
        )
    return SteerResult(config, int(contexts.predictions.sum()), rows)


def at_one_position(contexts: SteeredContexts, place: int) -> SteeredContexts:
    """Returns the contexts changed at one position, and judged from it on. Raises UserError when there is none left."""
    length = contexts.tokens.shape[1]
    if place >= length:
        raise UserError(f"--at {place}: the store's contexts have {length:,} tokens, 0 to {length - 1}")
    counted = np.zeros_like(contexts.counted)
    counted[:, place] = True
    predicted = contexts.predicted.copy()
    predicted[:, :place] = False
    some = predicted.any(1)
    if not some.any():
        raise UserError(f"--at {place}: no prediction behind it counts. Choose an earlier position")
    return SteeredContexts(contexts.tokens[some], counted[some], predicted[some])


def moved_tokens(moved: NDArray[np.float64], encoder: Encoder, sign: int = 1) -> list[MovedToken]:
    """The tokens whose mean probability moved most."""
    order = [token for token in np.argsort(-moved, kind="stable")[:MOVED] if moved[token] > 0]
    return [MovedToken(int(token), text_of(encoder, [int(token)]), sign * float(moved[token])) for token in order]
