"""The card of a repository of autoencoders: README.md with front matter, a table, and how to load them.

Everything between two marks is sagsae's and is rewritten by each push; the rest of the page is its owner's. A README
without the marks is left alone.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from shared.hub.place import is_part
from shared.saes import ARCHITECTURES
from train.hub.rows import SAERow
from train.report import wording

BEGIN: Final = "<!-- sagsae push writes what follows, up to the end mark; write your own text before or after it -->"
END: Final = "<!-- end of what sagsae push writes -->"
TAGS: Final = ("sparse-autoencoder", "mechanistic-interpretability", "sagsae")


def is_ours(page: str) -> bool:
    """Whether sagsae wrote a part of the page, so that it may be rewritten."""
    return BEGIN in page and END in page.partition(BEGIN)[2]


def card(repo: str, rows: Sequence[SAERow], license: str | None, pictures: Iterable[str], before: str | None) -> str:
    """Returns README.md with the pictures at these paths. `before` is the page that is there and is ours: all of it
    outside the marks is kept."""
    text = body(repo, rows, pictures)
    if before is not None:
        above, _, rest = before.partition(BEGIN)
        return f"{above}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"
    return f"{front_matter(rows, license)}\n{BEGIN}\n{text}{END}\n"


def front_matter(rows: Sequence[SAERow], license: str | None) -> str:
    """Returns what the hub reads: the library, tags, license, models and datasets that are repositories."""
    models = sorted({row.model for row in rows if row.model and not row.local_model and is_id(row.model)})
    datasets = sorted({row.dataset for row in rows if row.dataset and is_id(row.dataset)})
    lines = ["---"]
    lines += ["library_name: saelens"] if any(row.tool == "saelens" for row in rows) else []
    lines += ["tags:", *(f"- {tag}" for tag in TAGS)]
    lines += [f"license: {license}"] if license else []
    for name, values in (("base_model", models), ("datasets", datasets)):
        lines += [f"{name}:", *(f"- {value}" for value in values)] if values else []
    return "\n".join([*lines, "---", ""])


def is_id(name: str) -> bool:
    """Whether a name can be a repository's: OWNER/NAME."""
    return name.count("/") == 1 and all(map(is_part, name.split("/")))


def body(repo: str, rows: Sequence[SAERow], pictures: Iterable[str]) -> str:
    models = ", ".join(sorted({row.model for row in rows if row.model})) or "a language model that is not recorded"
    first = rows[0]
    parts = [
        f"# Sparse autoencoders of {plain(models)}",
        f"{count(len(rows), 'sparse autoencoder')}, trained with sagsae {versions(rows)} on activations of "
        f"{plain(models)}.",
        *(f"![R² against L0]({path})" for path in pictures),
        "## Autoencoders",
        table(rows),
        measures(rows),
        *([pairing()] if any(row.doubled for row in rows) else []),
        "## Load them",
        *loading(repo, first),
        "## Where they come from",
        origin(rows),
        exactness(rows),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Iterable[SAERow]) -> str:
    header = (
        "folder",
        "hook",
        "architecture",
        "width",
        "form",
        "sparsity",
        "L0",
        "R²",
        "CE recovered",
        "dead",
        "tokens",
    )
    cells = [
        (
            f"`{row.folder}`",
            f"`{row.hook_name or 'not known'}`",
            ARCHITECTURES[row.arch].label if row.arch in ARCHITECTURES else row.arch,
            f"{row.d_sae:,}" + (f" (2 × {row.d_sae:,} = {row.width:,} here)" if row.doubled else ""),
            f"{row.tool} {row.form}",
            row.knob,
            wording.l0(row.l0),
            wording.fixed(row.r2, 4),
            wording.percent(row.ce_recovered),
            wording.percent(row.dead),
            wording.count(row.trained_tokens),
        )
        for row in rows
    ]
    lines = [header, ("---",) * len(header), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measures(rows: Iterable[SAERow]) -> str:
    held_out = wording.tokens((row.heldout_tokens for row in rows if row.heldout_tokens), "held-out tokens")
    return (
        f"L0 is the mean number of active latents per token. L0, R² and the share of dead latents were measured on "
        f"{held_out}. CE recovered compares the language model's loss with reconstructions spliced in: 100 % is the "
        "unchanged model, 0 % the hookpoint set to zero. *tokens* counts training tokens. "
        f"{wording.ABSENT} was not measured."
    )


def pairing() -> str:
    return (
        "**Pairs.** A signed latent is two latents in these files: latent `i` is its positive pole, latent "
        "`i + d_sae/2` its negative one (`d_sae` as in `cfg.json`). The signed code is "
        "`f[:, :d_sae // 2] - f[:, d_sae // 2:]`."
    )


def loading(repo: str, row: SAERow) -> list[str]:
    """How to load one autoencoder: without a library for it, with the tool, with sagsae."""
    parts = []
    if text := snippet(repo, row):
        parts += ["With torch alone, for raw activations `x` of shape `[n, d_in]`:", fenced(text)]
    calls = {
        "saelens": ("SAELens", f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{row.folder}")'),
        "sparsify": (
            "sparsify",
            f'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub("{repo}", hookpoint="{row.folder}")',
        ),
        "dictionary-learning": (
            "dictionary_learning",
            "from dictionary_learning.utils import load_dictionary\nfrom huggingface_hub import snapshot_download\n\n"
            f'folder = snapshot_download("{repo}", allow_patterns="{row.folder}/*")\n'
            f'sae, config = load_dictionary(f"{{folder}}/{row.folder}", device="cpu")',
        ),
    }
    if row.tool in calls:
        name, text = calls[row.tool]
        parts += [f"With {name}:", fenced(text)]
    own = f"sagsae pull {repo}/{row.key} --out sae\npython -c 'import train; print(train.load(\"sae\"))'"
    return [*parts, "With sagsae, from its own files in `sagsae/`:", fenced(own, "bash")]


def snippet(repo: str, row: SAERow) -> str | None:
    """Ten lines that load and run an autoencoder with torch, safetensors and huggingface_hub alone; None for files that
    need their tool."""
    if row.tool != "saelens" or row.form not in CODES:
        return None
    x = 'x - W["b_dec"]' if row.subtracts else "x"
    lines = [
        "import torch",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        f'W = load_file(hf_hub_download("{repo}", "{row.folder}/sae_weights.safetensors"))',
        "def encode(x):",
        f'    z = ({x}) @ W["W_enc"]{BIASES[row.form]}',
        *(f"    {line}" for line in CODES[row.form].format(k=f"{row.setting or 0:g}").splitlines()),
        "def decode(f):",
        '    return f @ W["W_dec"] + W["b_dec"]',
    ]
    return "\n".join(lines)


BIASES: Final = {"gated": "", **dict.fromkeys(("standard", "jumprelu", "topk", "abstopk"), ' + W["b_enc"]')}
CODES: Final = {
    "gated": 'return (z + W["b_gate"] > 0) * torch.relu(W["r_mag"].exp() * z + W["b_mag"])',
    "standard": "return torch.relu(z)",
    "jumprelu": 'return torch.relu(z) * (z > W["threshold"])',
    "topk": "top = z.topk({k})\nreturn torch.zeros_like(z).scatter(-1, top.indices, torch.relu(top.values))",
    "abstopk": "top = z.abs().topk({k}).indices\nreturn torch.zeros_like(z).scatter(-1, top, z.gather(-1, top))",
}
"""The code of each of SAELens' architectures, from the pre-activations z."""


def origin(rows: Sequence[SAERow]) -> str:
    corpora = sorted({row.dataset for row in rows if row.dataset})
    contexts = sorted({row.context for row in rows if row.context})
    corpus = ", ".join(f"`{plain(name)}`" for name in corpora) or "a corpus that is not recorded"
    length = f", in contexts of {' or '.join(f'{n:,}' for n in contexts)} tokens" if contexts else ""
    return f"The activations are those of {corpus}{length}. Weights take raw activations: nothing is to be scaled."


def exactness(rows: Sequence[SAERow]) -> str:
    notes = []
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        folders = [f"`{row.folder}`" for row in rows if note in row.notes]
        whose = "all" if len(folders) == len(rows) else ", ".join(folders)
        notes.append(f"- {whose}: {plain(note)}")
    text = (
        "**Exactness.** The files hold float32 and compute the function of sagsae's own weights, which are beside them "
        "in `sagsae/`. Both agree to 10⁻⁶ of the largest activation; of a million codes at most three switch at their "
        "threshold, from rounding."
    )
    return "\n".join([text, "", *notes]) if notes else text


def versions(rows: Iterable[SAERow]) -> str:
    return ", ".join(sorted({row.version for row in rows if row.version})) or "of an unrecorded version"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def fenced(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def plain(text: str) -> str:
    """A name without what Markdown and HTML would read as their own."""
    return re.sub(r"[<>`\[\]|]", "", text)
