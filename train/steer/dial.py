"""`sagsae dial`: tests whether the values of latents steer the next tokens, and writes RUN/features/NAME/dial.json.

    y(v) = mean over predictions of [mean log p(T+) - mean log p(T-)] with the latent clamped to v
    slope = (y(m) - y(-m)) / 2                                        m: the latent's dial unit

T+ and T- come from rows that are not steered (contrast.py). They are not the tokens that the direction raises by the
logit lens, because every direction raises its own. A latent passes when its slope is larger than those of control
directions of the same length, judged by the same tokens (controls.py, trial.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import ValidationError

from shared.errors import DamagedError, UserError
from shared.files.local import explained
from shared.gate import BadData
from shared.model.tokenizer import Encoder
from shared.progress import say
from shared.record import provenance
from shared.schemas.steer import GRID, DialConfig, DialFile, DialSettings, SkippedLatent
from shared.stop import stop_requests
from train.data.row_mask import RowMask
from train.data.snapshot import SnapshotWatch, content_of
from train.features.site.build import write_site
from train.runs.folder import read_sealed, write_sealed
from train.steer.contrast import NextTokens, shuffled_sets, token_sets
from train.steer.controls import draw_controls
from train.steer.follow import next_tokens
from train.steer.subject import SteeringSubject, make_subject
from train.steer.trial import DialSubject, DialTest
from train.steer.verdict import verdict
from train.steer.wording import encoder_of

FILE: Final = "dial.json"


@dataclass(frozen=True)
class DialSummary:
    """What a call wrote or found."""

    file: Path
    found: DialFile
    encoder: Encoder
    """Tells what token ids mean."""
    complete: bool
    """Whether it was there before the call."""


def dial(config: DialConfig) -> DialSummary:
    """Tests latents of one autoencoder. Raises UserError for unusable input, Interrupted after a signal."""
    subject = make_subject(config)
    encoder = encoder_of(subject.source, subject.store)
    file, settings = subject.folder / FILE, asked_of(config)
    if file.exists() and not config.overwrite:
        return DialSummary(file, complete(file, subject, settings), encoder, True)
    found = tested(config, subject, settings)
    with explained(subject.folder):
        write_sealed(file, {**provenance(), **found.model_dump(mode="json")})
        write_site(subject.folder)
    return DialSummary(file, found, encoder, False)


def tested(config: DialConfig, subject: SteeringSubject, settings: DialSettings) -> DialFile:
    """Returns the content of dial.json."""
    started, store = time.monotonic(), subject.store
    latents = chosen_latents(config, subject)
    watch, snapshot = SnapshotWatch(store, subject.rows.hook), content_of(store, subject.rows.hook)
    with store.files.reading(), stop_requests() as stop_asked:
        parts = subject.split()
        numbers, contexts = subject.contexts(RowMask.of(parts.heldout), config.contexts, config.seed)
        after = next_tokens(subject, RowMask.of(parts.train), latents, config.tokens, stop_asked)
        able, skipped = able_latents(latents, after, subject, config)
        others = np.setdiff1d(np.flatnonzero(subject.counts.units > 0), latents)
        rng = np.random.default_rng((config.seed, 1))
        controls, rows = draw_controls(subject.sae.weights.W_dec, others, config.controls, rng)
        test = DialTest(subject.language_model(), subject.hook_name, subject.sae, contexts, able, rows)
        judged, sizes = test.run(config.seed, stop_asked)
    watch.check([store], thorough=True)
    return DialFile(
        sae=subject.sae.config.name,
        sha256=subject.sha256,
        snapshot=snapshot,
        hook=subject.rows.hook,
        model=subject.source.name,
        commit=subject.source.commit,
        settings=settings,
        grid=GRID,
        contexts=tuple(numbers.tolist()),
        predictions=int(contexts.predictions.sum()),
        sizes=tuple(sizes),
        controls=tuple(controls),
        latents=tuple(judged),
        skipped=tuple(skipped),
        verdict=verdict(judged, len(controls)),
        seconds=round(time.monotonic() - started, 2),
    )


def asked_of(config: DialConfig) -> DialSettings:
    """The settings that decide the result."""
    return DialSettings(
        latents=None if config.latent else config.latents,
        latent=tuple(sorted(set(config.latent))),
        **{key: getattr(config, key) for key in ("least", "seed", "contexts", "tokens", "controls", "shuffled")},
    )


def complete(file: Path, subject: SteeringSubject, settings: DialSettings) -> DialFile:
    """Returns a result that is there. Raises UserError when it is of something else, DamagedError when it was
    altered."""
    found = read_dial(file)
    hook = subject.rows.hook
    if (found.sha256, found.snapshot) != (subject.sha256, content_of(subject.store, hook)):
        raise UserError(f"{file}: was made from another autoencoder or other rows. Test again with --overwrite")
    there, asked = found.settings.model_dump(), settings.model_dump()
    differ = [f"{key} = {there[key]}, and this asks for {asked[key]}" for key in there if there[key] != asked[key]]
    if differ:
        raise UserError(f"{file}: was made with {differ[0]}. Ask for the same again, or test again with --overwrite")
    say(f"{file} is complete. Nothing to do (--overwrite tests again).")
    return found


def read_dial(file: Path) -> DialFile:
    """Returns the content of a dial.json. Raises DamagedError when it was altered, FileNotFoundError when there is
    none."""
    try:
        return DialFile.model_validate(read_sealed(file))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedError(f"{file}: {where} is not what a dial test writes. Test again with --overwrite") from error
    except BadData as error:
        raise DamagedError(f"{file}: {error}. Test again with --overwrite") from error


def chosen_latents(config: DialConfig, subject: SteeringSubject) -> list[int]:
    """Returns the latents that were named, or draws among those that use both poles (of an autoencoder without signs:
    that fire). Raises UserError when there is none."""
    if config.latent:
        for latent in config.latent:
            subject.check_latent(latent)
        return sorted(set(config.latent))
    counts, signed = subject.counts, subject.sae.signed
    rarer = counts.firings.min(1) if signed else counts.firings[:, 0]
    able = np.flatnonzero((rarer >= config.least) & (counts.two_sided if signed else True))
    if not len(able):
        what = f"has {config.least:,} firings on the rarer of two poles" if signed else f"fires {config.least:,} times"
        raise UserError(f"--least {config.least}: no latent of {subject.sae.config.name} {what}. Lower it")
    if len(able) < config.latents:
        say(f"{len(able):,} latents can be tested, fewer than --latents {config.latents:,}")
    drawn = np.random.default_rng((config.seed, 2)).permutation(able)[: config.latents]
    return sorted(drawn.tolist())


def able_latents(
    latents: Sequence[int], after: NextTokens, subject: SteeringSubject, config: DialConfig
) -> tuple[list[DialSubject], list[SkippedLatent]]:
    """Returns the latents with token sets, and those that lack one. Raises UserError when all lack one."""
    able, skipped, counts = [], [], subject.counts
    special = subject.store.spec.special_ids
    for index, latent in enumerate(latents):
        above, below = after.after(index, False), after.after(index, True)
        sets = token_sets(above, below, after.base, special, counts.poles(latent))
        if not sets.usable:
            why = f"only {len(sets.plus)} tokens follow it more often above zero, and {len(sets.minus)} below"
            skipped.append(SkippedLatent(latent=latent, reason=f"{why}; 2 are needed of each"))
            continue
        rng = np.random.default_rng((config.seed, 3, latent))
        drawn = (shuffled_sets(above, below, after.base, special, rng) for _ in range(config.shuffled))
        able.append(
            DialSubject(
                latent=latent,
                firings=(int(below.sum()), int(above.sum())),
                energy=float(counts.weaker_energy[latent]),
                unit=float(counts.units[latent]),
                sets=sets,
                shuffled=tuple(each for each in drawn if each.usable),
            )
        )
    if not able:
        raise UserError(f"no latent can be tested. Latent {skipped[0].latent}: {skipped[0].reason}")
    for each in skipped:
        say(f"latent {each.latent} is left out: {each.reason}")
    return able, skipped
