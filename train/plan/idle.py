"""Finds the settings that were given and cannot have an effect in a run: it is too short for them, or another setting
turns off what they are about."""

from collections.abc import Iterator

from shared.config import TrainConfig
from shared.saes import FixedL0, Penalised, SAEConfig, Thresholded


def idle(config: TrainConfig, steps: int) -> list[str]:
    """A sentence for each such setting, naming it. `steps` is how many the run has."""
    started = config.warm_start is not None
    each = [sentence for sae in config.saes for sentence in idle_of_sae(sae, steps, steps * config.batch, started)]
    return list(dict.fromkeys([*idle_of_run(config, steps), *each]))


def idle_of_run(config: TrainConfig, steps: int) -> Iterator[str]:
    given, tokens = config.model_fields_set, steps * config.batch
    if "log_every" in given and config.log_every > steps:
        yield f"log_every = {config.log_every:,}: the run has {steps:,} steps; metrics.jsonl gets one line, at its end"
    every = config.checkpoint_every
    if "checkpoint_every" in given and every != "auto" and every > steps:
        yield f"checkpoint_every = {every:,}: the run has {steps:,} steps; the only checkpoint is made at its end"
    if "dead_after_tokens" in given and config.dead_after_tokens > tokens:
        yield f"dead_after_tokens = {config.dead_after_tokens:,}: the run has {tokens:,} tokens; all of them count"
    if "decay_fraction" in given and 0 < config.decay_fraction * steps < 1:
        yield f"decay_fraction = {config.decay_fraction:g}: is less than one of {steps:,} steps; nothing decays"
    if "lr" in given and all(sae.lr is not None for sae in config.saes):
        yield f"lr = {config.lr:g}: is not used, for every autoencoder has a learning rate of its own"


def idle_of_sae(sae: SAEConfig, steps: int, tokens: int, started: bool = False) -> Iterator[str]:
    given = sae.model_fields_set
    if started and "majority_sign" in given and getattr(sae, "majority_sign", False):
        yield "majority_sign: has no effect, since the signs are those of --from"
    for name in sorted(given & {"theta0", "theta0_negative", "negative_rate"}) if started else ():
        resets = isinstance(sae, Thresholded) and sae.reset_every  # after which the negative poles begin again
        if name == "theta0" or not resets:
            yield f"{name}: has no effect, since the first thresholds are those of --from"
    if isinstance(sae, Thresholded):
        if sae.reset_every > steps:
            yield f"reset_every = {sae.reset_every:,}: the run has {steps:,} steps; no latent is reset"
        if "reset_share" in given and not sae.reset_every:
            yield f"reset_share = {sae.reset_share:g}: has no effect without reset_every"
    if isinstance(sae, Penalised) and 0 < sae.sparsity_warmup * steps < 1:
        yield f"sparsity_warmup = {sae.sparsity_warmup:g}: is less than one of {steps:,} steps; λ does not rise slowly"
    if isinstance(sae, FixedL0) and "aux_after" in given:
        if sae.aux_k == 0:
            yield f"aux_after = {sae.aux_after:,}: has no effect with aux_k = 0"
        elif sae.aux_after > tokens:
            yield f"aux_after = {sae.aux_after:,}: the run has {tokens:,} tokens; no latent is revived"
