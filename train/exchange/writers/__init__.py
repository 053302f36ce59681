"""The files of other tools, one module per tool."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import UserError
from shared.files.handles import Buffer
from shared.record import to_json, version
from shared.schemas.exchange import ExportConfig
from train.autoencoder import FOR_SAELENS, Autoencoder
from train.exchange.about import About
from train.exchange.forms import TopKForm

PAIRS = "i, i + d_sae/2"
"""The pairing rule: latents i and i + d_sae/2 of the exported width are the two poles of signed latent i."""


@dataclass(frozen=True)
class Written:
    """One autoencoder in a tool's files, before they are on a disk."""

    files: Mapping[str, Iterable[Buffer]]
    """Their content by path in the autoencoder's folder. The description comes first: it shows whose the files are."""
    form: str
    width: int
    notes: list[str] = field(default_factory=list)
    approximation: TopKForm | None = None
    """What the files compute where that is not the autoencoder's own function."""
    optional: tuple[str, ...] = ()
    """Names of files that an earlier export may have left in the folder. Those that are not in `files` are removed."""


def chosen(sae: Autoencoder, config: ExportConfig, has: Mapping[str, Callable[[Autoencoder], bool]]) -> str:
    """Returns the name of the form to write: the first of the tool's that the autoencoder `has`, or the one that was
    asked for. Raises UserError when it does not have that one."""
    possible = [name for name, has_it in has.items() if has_it(sae)]
    name = sae.config.name
    if not possible:
        raise UserError(f"{name}: {config.to} cannot say {sae.config.arch}. Choose another --to")
    if config.form == "auto":
        return possible[0]
    if config.form not in possible:
        raise UserError(f"--form {config.form}: {name} can be written for {config.to} as {', '.join(possible)}")
    return config.form


def provenance_block(sae: Autoencoder, about: About, width: int, **more: Any) -> dict[str, Any]:
    """Returns what the files keep of sagsae's own description: all of cfg.json, and which latents are a pair."""
    doubled = sae.signed and width == 2 * sae.config.d_sae
    settings = {key: value for key, value in about.settings.items() if value != FOR_SAELENS}
    return {**settings, "sagsae_version": version("sagsae"), "pairs": PAIRS if doubled else None, **more}


def json_file(value: Any) -> list[bytes]:
    return [to_json(value, indent=2).encode() + b"\n"]
