"""sagsae: harvest a language model's activations, train sparse autoencoders on them, look at what they learned.

Every command parses its options, calls one function and prints what it returned: a short text, or with --json one
document on stdout. Progress goes to stderr. What a command needs is imported when it runs.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import signal
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from shared.tables import harvest_text, print_peers, print_saes, print_table, trial_text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
store_app = typer.Typer(no_args_is_help=True, help="Look into activation stores.")
app.add_typer(store_app, name="store")
bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine: ratios to its limits and to other tools.")
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]


def at_home(text: str) -> Path:
    """A path, with a `~` that the shell left alone."""
    return Path(os.path.expanduser(text))


ConfigFile = Annotated[
    Path | None, typer.Option("--config", parser=at_home, metavar="PATH", help="TOML file with any of the settings.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as key=value. Repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start afresh instead of going on.")]
Place = Annotated[str, typer.Argument(help="A store: a folder or a URL.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def say_version(asked: bool) -> None:
    if asked:
        from shared.record import version

        names = ("sagsae", "torch", "transformer-lens")
        typer.echo(", ".join(f"{name} {version(name)}" for name in names))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Say which this is, and end.")
    ] = False,
) -> None:
    """Harvest a language model's activations into a store, train sparse autoencoders on it, look at what they learned.

    Every command takes --help; most take --json: one document on stdout. A command that is repeated goes on where it
    was, or says that it is complete.
    """


@app.command()
def harvest(
    model: Annotated[
        str | None, typer.Option(help="Alias (tiny, pythia-1b, gpt2, …), Hugging Face id, folder or GGUF file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face model.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the model's own: folder, GGUF file or Hugging Face id.")
    ] = None,
    eos: Annotated[str | None, typer.Option(help="Id or token that ends a document. Default: the tokenizer's.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Layer number from 0, or mid. Repeatable.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="resid_post, attn_out, mlp_out, … Repeatable.")] = None,
    corpus: Annotated[str | None, typer.Option(help="File, folder or Hugging Face data set.")] = None,
    on_bad_document: Annotated[str | None, typer.Option(help="refuse, or skip and count.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Activation rows wanted, exactly.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What the model computes in: auto, float32, bfloat16.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="sdpa: the model's own. eager: hooks inside it; slower.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="zstd, lz4, none, or int8 (lossy).")] = None,
    skip_positions: Annotated[
        int | None, typer.Option(help="First positions left out of statistics and training. Default: 1.")
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Keep rows with NaN or infinities, marked.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure one batch, say what the whole would take, write nothing.")
    ] = False,
    device: Device = None,
    out: Annotated[str | None, typer.Option(help="The folder (or s3:// prefix) that holds stores.")] = None,
    name: Annotated[str | None, typer.Option(help="The store's folder in --out. Default: the model's name.")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run a language model over a corpus and keep its activations."""
    from shared.config import HarvestConfig

    flags = {
        "model": model, "revision": revision, "hooks": hook, "corpus": corpus, "tokens": tokens, "context": context,
        "layers": [layer_number(text) for text in layer] if layer else None, "dtype": dtype,
        "codec": codec, "device": device, "out": out, "name": name, "overwrite": overwrite or None,
        "skip_positions": skip_positions, "allow_nonfinite": allow_nonfinite or None,
        "on_bad_document": on_bad_document, "attention": attention, "tokenizer": tokenizer, "eos": eos,
    }  # fmt: skip
    resolved = resolve(HarvestConfig, flags, config, settings)
    if dry_run:
        from harvest.dry_run import trial

        found = trial(resolved, processes)
        show(dataclasses.asdict(found), as_json, lambda: typer.echo(trial_text(found)))
        raise typer.Exit
    if processes > 1 and not launched(processes):
        launch(processes)
    from harvest.run import harvest as run

    summary = run(resolved)
    if not is_helper():
        show(dataclasses.asdict(summary), as_json, lambda: typer.echo(harvest_text(summary)))


@app.command()
def synth(
    d_in: Annotated[int | None, typer.Option(help="Width of a row.")] = None,
    features: Annotated[int | None, typer.Option(help="True features.")] = None,
    p_bipolar: Annotated[float | None, typer.Option(help="Share of them that are active with either sign.")] = None,
    l0: Annotated[float | None, typer.Option(help="Active features a row, on average.")] = None,
    zipf: Annotated[float | None, typer.Option(help="Exponent of their frequencies.")] = None,
    noise: Annotated[float | None, typer.Option(help="Standard deviation in each dimension.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Rows.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of features and rows.")] = None,
    codec: Annotated[str | None, typer.Option(help="zstd, lz4, none, or int8 (lossy).")] = None,
    out: Annotated[str | None, typer.Option(help="The folder (or s3:// prefix) that holds stores.")] = None,
    name: Annotated[str | None, typer.Option(help="The store's folder in --out. Default: synthetic.")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Write a store of synthetic activations, whose true features are known: eval then says how many were found."""
    from shared.config import SynthConfig

    flags = {
        "d_in": d_in, "features": features, "p_bipolar": p_bipolar, "l0": l0, "zipf": zipf, "noise": noise,
        "tokens": tokens, "seed": seed, "codec": codec, "out": out, "name": name, "overwrite": overwrite or None,
    }  # fmt: skip
    resolved = resolve(SynthConfig, flags, config, settings)
    from harvest.synth import synth as run

    summary = run(resolved)
    show(dataclasses.asdict(summary), as_json, lambda: typer.echo(harvest_text(summary)))


@app.command()
def train(
    store: Annotated[str | None, typer.Option(help="A store, or one hookpoint in it: a folder or a URL.")] = None,
    hook: Annotated[str | None, typer.Option(help="Which hookpoint of the store.")] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="sa-gsae, gated, relu, jumprelu, batch-topk, abs-topk; or with a width: gated:8192. Repeatable."
        ),
    ] = None,
    d_sae: Annotated[list[int] | None, typer.Option(help="Latents. Repeatable.")] = None,
    expansion: Annotated[
        list[float] | None, typer.Option(help="Latents, as a multiple of d_in; needs --store. Repeatable.")
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="λ, the weight of the penalty. Repeatable.")] = None,
    l0_target: Annotated[
        list[float] | None, typer.Option(help="Active latents that λ is steered to. Repeatable.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Active latents of batch-topk and abs-topk. Repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the initial weights. Repeatable.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens. Default: one epoch.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens in a step, over all processes.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Peak learning rate. Repeatable.")] = None,
    theta0: Annotated[float | None, typer.Option(help="Initial threshold, in units of 1/sqrt(d_in).")] = None,
    tie: Annotated[str | None, typer.Option(help="What the poles share: symmetric, magnitude (r alone), none.")] = None,
    one_sided: Annotated[bool, typer.Option("--one-sided", help="Ablation: no negative poles.")] = False,
    no_aux: Annotated[bool, typer.Option("--no-aux", help="Ablation: no auxiliary reconstruction.")] = False,
    reset_every: Annotated[
        int | None, typer.Option(help="Steps after which silent latents get a new threshold. 0: never.")
    ] = None,
    device: Device = None,
    follow: Annotated[bool, typer.Option("--follow", help="Train while the store is being harvested.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU.")] = 1,
    parallel: Annotated[
        str | None, typer.Option(help="What processes share: data (each batch), sweep (the autoencoders), or auto.")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb (offline unless WANDB_MODE is set). Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=at_home, metavar="PATH", help="The run's folder.")] = None,
    overwrite: Overwrite = False,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Train autoencoders on a store: every architecture, width, sparsity and seed in one pass."""
    from shared.config import TrainConfig
    from shared.progress import say
    from shared.saes import sae_grid, shared_sparsity

    widths = [*(d_sae or []), *(multiples_of_d_in(store, hook, expansion) if expansion else [])]
    rates = lr if lr and len(lr) > 1 else None
    axes = {"d_sae": widths, "sparsity": sparsity, "l0_target": l0_target, "k": k, "seed": seed, "lr": rates}
    options = {
        "theta0": theta0, "tie": tie, "one_sided": one_sided or None, "aux": False if no_aux else None,
        "reset_every": reset_every,
    }  # fmt: skip
    saes = sae_grid(arch or [], given(axes), given(options)) if arch or any(axes.values()) else None
    warning = shared_sparsity(arch or [], sparsity or [])
    if warning and not is_helper() and (processes == 1 or launched(processes)):
        say(warning)
    flags = {
        "store": store, "hook": hook, "saes": saes, "tokens": tokens, "batch": batch, "parallel": parallel,
        "lr": lr[0] if lr and not rates else None, "device": device, "out": out, "overwrite": overwrite or None,
        "follow": follow or None, "track": track,
    }  # fmt: skip
    resolved = resolve(TrainConfig, flags, config, settings)
    if processes > 1 and not launched(processes):
        launch(processes)
    from train.run import train as run

    summary = run(resolved)
    if not is_helper():
        show(dataclasses.asdict(summary), as_json, lambda: print_saes(f"{summary.run}", summary.saes))


def multiples_of_d_in(store: str | None, hook: str | None, expansion: list[float]) -> list[int]:
    from shared.errors import UserError
    from shared.store.opened import find_hookpoint

    if store is None:
        raise UserError("--expansion: is a multiple of the activations' width; say which with --store")
    for times in expansion:
        if not (math.isfinite(times) and times > 0):
            raise UserError(f"--expansion {times}: expected a number above 0, such as 8")
    found, path = find_hookpoint(store, hook)
    return [round(times * found.spec.hookpoints[path].d_in) for times in expansion]


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(parser=at_home, metavar="RUN", help="A training run's folder.")],
    store: Annotated[str | None, typer.Option(help="Where its store is now, if it moved.")] = None,
    model: Annotated[str | None, typer.Option(help="Its language model, if it moved.")] = None,
    ce: Annotated[
        bool | None,
        typer.Option(
            "--ce/--no-ce", help="Measure the language model's loss with reconstructions spliced in. Or keep the last."
        ),
    ] = None,
    ce_tokens: Annotated[int | None, typer.Option(help="Predictions to average over, at most.")] = None,
    peer_conventions: Annotated[
        bool, typer.Option("--peer-conventions", help="R², L0 and dead as other tools define them, too.")
    ] = False,
    directions: Annotated[
        bool, typer.Option("--directions/--no-directions", help="Set the decoder's directions against each other.")
    ] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a run's autoencoders on its held-out tokens."""
    from shared.config import EvalConfig

    flags = {
        "run": run, "store": store, "model": model, "ce": ce, "ce_tokens": ce_tokens, "device": device,
        "peer_conventions": peer_conventions, "directions": directions,
    }  # fmt: skip
    resolved = resolve(EvalConfig, flags, None, None)
    from train.evaluate import evaluate as measure

    done = measure(resolved)

    def text() -> None:
        print_saes(f"{done.file}", done.results["saes"])
        if peer_conventions:
            print_peers("\nThe same by other tools' definitions", done.results["saes"])

    show({"run": str(run), **done.results}, as_json, text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(parser=at_home, metavar="RUN", help="Folders of evaluated runs.")],
    out: Annotated[Path, typer.Option(parser=at_home, metavar="PATH", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is no report, too.")] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page that compares runs."""
    from train.report import write_report

    page = write_report(runs, out, overwrite)
    show({"report": page}, as_json, lambda: typer.echo(f"{page}"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(parser=at_home, metavar="PATH", help="One folder for everything.")] = Path(
        "demo"
    ),
    as_json: Json = False,
) -> None:
    """The whole way on the shipped model: harvest, SA-GSAE against Gated, evaluation, report."""
    from harvest.run import harvest as run_harvest
    from shared.config import EvalConfig, demo_harvest, demo_train
    from shared.progress import say
    from train.evaluate import evaluate as measure
    from train.report import write_report
    from train.report.place import check_demo
    from train.run import train as run_train

    check_demo(out)  # before the work of minutes
    started = time.monotonic()
    say("1 of 4: harvest the shipped language model's activations (the whole demo takes one to four minutes)")
    store = run_harvest(demo_harvest(out)).store
    say("2 of 4: train SA-GSAE and, at twice the width, Gated autoencoders")
    run = run_train(demo_train(out, store)).run
    say("3 of 4: measure them on held-out tokens, inside the language model")
    results = measure(EvalConfig(run=run, ce_tokens=10_000)).results
    say("4 of 4: write the report")
    page = write_report([run], out / "report.html").resolve()
    seconds = round(time.monotonic() - started, 1)
    document = {"store": store, "runs": [run], "report": page, "seconds": seconds, "saes": results["saes"]}

    def text() -> None:
        print_saes(f"{run}", results["saes"])
        typer.echo(f"\n{seconds:.0f} seconds. The report: {page}")

    show(document, as_json, text)


@app.command()
def reproduce(
    model: Annotated[
        list[str] | None, typer.Option(help="Alias, Hugging Face id or folder. Repeatable. Default: the preset's.")
    ] = None,
    preset: Annotated[str, typer.Option(help="smoke (minutes), tiny (under an hour) or paper (GPU-days).")] = "tiny",
    cells: Annotated[
        str | None, typer.Option(help="Hookpoints, with commas. Default: resid_post,attn_out,mlp_out.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of the two arms that are compared.")] = None,
    layer: Annotated[str, typer.Option(help="Layer number from 0, or mid.")] = "mid",
    tokens: Annotated[int | None, typer.Option(help="Training tokens of every autoencoder.")] = None,
    corpus: Annotated[str | None, typer.Option(help="File, folder or Hugging Face data set.")] = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(parser=at_home, metavar="PATH", help="One folder for everything.")] = Path(
        "reproduction"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Start a job that takes hours or tens of GB.")] = False,
    as_json: Json = False,
) -> None:
    """Which of the SA-GSAE paper's claims hold on a model: SA-GSAE at H and 2H against Gated, every λ and seed."""
    from train.reproduce.preset import make_request

    place = layer_number(layer)
    request = make_request(preset, tuple(model or ()), cells, place, seeds, tokens, corpus, device or "auto", out)
    from harvest.run import harvest as run_harvest
    from train.reproduce.run import reproduce as run_all

    found = run_all(request, lambda config: run_harvest(config).store, yes)

    def text() -> None:
        rows = [{"mark": finding.mark, "claim": finding.claim, "paper": finding.paper} for finding in found.findings]
        print_table(f"{out / 'reproduction.md'}, {out / 'report.html'}", rows)

    show({"out": str(out), **found.key_results()}, as_json, text)


@store_app.command("ls")
def store_ls(
    root: Annotated[str, typer.Argument(help="A folder (or URL) that holds stores.")] = "stores", as_json: Json = False
) -> None:
    """List the hookpoints in all stores of a folder."""
    from shared.store.listing import list_stores

    rows = list_stores(root)
    show(rows, as_json, lambda: print_table(root, rows))


@store_app.command("info")
def store_info(path: Place, as_json: Json = False) -> None:
    """What a store holds and where it came from."""
    from shared.store.listing import describe_store

    about = describe_store(path)
    show(about, as_json, lambda: typer.echo(json.dumps(about, indent=2, default=str)))


@store_app.command("verify")
def store_verify(
    path: Place,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Decode every chunk, or only checksum the files.")
    ] = False,
    mend: Annotated[
        bool, typer.Option("--repair", help="Take damaged shards back to the harvest, by removing their commits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a store and list all that is damaged. Exit code 3 when something is and stays so."""
    from shared.progress import progress
    from shared.store.opened import Store
    from shared.store.verify import repair, verify

    store = Store.open(path, lenient=True)
    size = store.commits.n_bytes
    with store.files.reading(), progress(f"verify {path}", size, "bytes") as advance:
        damage = verify(store, full, advance)
    again = repair(store.files, damage.shards) if mend and damage.lines else []

    def text() -> None:
        for line in damage.lines:
            typer.echo(line)
        found = f"{len(damage.lines)} damaged files" if damage.lines else "no damage"
        typer.echo(f"{path}: {len(store.commits)} of {store.spec.n_shards} shards committed, {found}")
        if again:
            typer.echo(f"shards {again} are to be written again: run the same sagsae harvest command once more")

    document = {
        "store": path, "full": full, "shards": len(store.commits), "damage": damage.lines,
        "damaged_shards": damage.shards, "to_harvest": again,
    }  # fmt: skip
    show(document, as_json, text)
    if damage.lasting if mend else damage.lines:
        raise typer.Exit(3)


@store_app.command("recode")
def store_recode(
    source: Annotated[str, typer.Argument(help="A finished store.")],
    target: Annotated[str, typer.Argument(help="The new store: a folder or an s3:// URL.")],
    codec: Annotated[str, typer.Option(help="zstd, lz4, none, or int8 (lossy).")],
    as_json: Json = False,
) -> None:
    """Write a store anew with another codec. The same command again goes on where it was."""
    from harvest.recode import recode
    from shared.config import RecodeConfig

    config = resolve(RecodeConfig, {"source": source, "target": target, "codec": codec}, None, None)
    done = recode(config.source, config.target, config.codec)

    def text() -> None:
        ratio = done.bytes_after / max(1, done.bytes_before)
        typer.echo(f"{done.store}: {done.tokens:,} tokens, {done.codec}, {ratio:.3f} times the size of {source}")

    show(dataclasses.asdict(done), as_json, text)


@store_app.command("tail")
def store_tail(
    path: Place,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Follow a running harvest: a line for whatever is committed, until the store is final."""
    from shared.files.open import open_files
    from shared.store.tail import describe, looks

    first = last = None
    for last in looks(open_files(path), every):
        first = first or last
        typer.echo(describe(last, first), err=as_json)
    if as_json and last:
        typer.echo(json.dumps({"store": path, "shards": len(last.store.commits), "tokens": last.store.n_rows}))


@store_app.command("rm")
def store_rm(
    path: Place,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a store."""
    from shared.files.open import open_files
    from shared.store.create import remove_store, what_is_deleted

    files = open_files(path)
    what = what_is_deleted(files)
    if not yes:
        typer.confirm(f"Delete {path} ({what})?", abort=True)
    with files.explained("then run the same command again: it deletes what is left"):
        remove_store(files)


@app.command()
def models(as_json: Json = False) -> None:
    """List the names that stand for a model."""
    from shared.model.source import list_models

    table = list_models()
    show(table, as_json, lambda: print_table("--model also takes any Hugging Face id or folder", table))


@app.command()
def hooks(
    model: Annotated[str, typer.Option(help="Alias (tiny, pythia-1b, gpt2, …), Hugging Face id or folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face model.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Layer number from 0, or mid. Repeatable.")] = None,
    attention: Annotated[str, typer.Option(help="sdpa, or eager, which has hooks inside attention.")] = "sdpa",
    as_json: Json = False,
) -> None:
    """List what can be harvested from a model: hookpoints and their widths. Reads its configuration, no weights."""
    from shared.config import HarvestConfig

    layers = [layer_number(text) for text in layer] if layer else None
    asked = resolve(HarvestConfig, {"model": model, "layers": layers, "attention": attention}, None, None)
    from shared.model.hooks import hook_table

    table = [dataclasses.asdict(hook) for hook in hook_table(model, revision, asked.layers, asked.attention)]
    show(table, as_json, lambda: print_table(f"{model}, --attention {attention}", table))


@bench_app.command("store")
def bench_store(
    model: Annotated[str, typer.Option(help="Whose activations: real ones, harvested first.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=32_768)] = 65_536,
    width: Annotated[
        int, typer.Option(min=1, help="Of the rows read: hookpoints of a small model side by side.")
    ] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many.")] = 15,
    keep: Annotated[
        Path | None,
        typer.Option(parser=at_home, metavar="PATH", help="Keep the stores here, and use them when they are there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Reading and writing a store against the codec alone, and against other Zarr readers, in one run."""
    import tempfile

    from harvest.bench.store import WIDE, make_stores, writing
    from shared.bench.timing import TimedFigure, interleaved, store_report
    from shared.progress import progress, say
    from train.bench.store import reading, wait_share

    with tempfile.TemporaryDirectory() as folder:
        place = keep or Path(folder)
        say(f"harvesting {tokens:,} tokens of {model}, and recoding them")
        stores = make_stores(place, model, tokens, width)
        figures: dict[str, TimedFigure] = {}
        with progress("bench", (rounds + 1) * 50, "runs") as advance:
            with writing(stores, place / "written") as (runs, before):
                figures |= interleaved(runs, rounds, advance, before)
            for codec, store in stores.wide.items():  # what is compared is measured in turns, and nothing else then
                figures |= interleaved(reading(store, WIDE, others=codec in ("zstd", "lz4")), rounds, advance)
        report = store_report(stores.narrow, stores.wide, figures, wait_share(stores.wide["zstd"], WIDE))

    def text() -> None:
        print_table("Uncompressed, median over the rounds", report["table"])
        for name, value in report["ratios"].items():
            typer.echo(f"{name:24} {value}")

    show({**report["ratios"], **report["raw"]}, as_json, text)


@bench_app.command("harvest")
def bench_harvest(
    model: Annotated[str, typer.Option(help="Alias, Hugging Face id or folder.")] = "tiny",
    corpus: Annotated[str | None, typer.Option(help="Default: the corpus beside a local model.")] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 262_144,
    context: Annotated[int | None, typer.Option(help="Default: the model's longest, at most 1024.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: mid.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: resid_post, attn_out, mlp_out.")] = None,
    codec: Annotated[str | None, typer.Option(help="zstd, lz4 or none.")] = None,
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(parser=at_home, metavar="PATH", help="Where to write. Default: a temporary folder.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """A harvest against the bare forward pass and against the codec alone, in one run."""
    import tempfile

    from shared.config import HarvestConfig
    from shared.progress import progress

    flags = {
        "model": model, "corpus": corpus, "tokens": tokens, "context": context, "hooks": hook, "codec": codec,
        "layers": [layer_number(text) for text in layer] if layer else None, "device": device,
    }  # fmt: skip
    config = resolve(HarvestConfig, flags, None, settings)
    from harvest.bench.harvest import bench_harvest as measure

    with tempfile.TemporaryDirectory(dir=folder) as place, progress("bench", (rounds + 1) * 4, "runs") as advance:
        report = measure(config, Path(place), rounds, advance)

    def text() -> None:
        print_table(f"{model}, median over {rounds} rounds", report.raw["figures"])
        for name, value in report.ratios.items():
            typer.echo(f"{name:24} {value}")

    show({**report.ratios, **report.raw}, as_json, text)


@bench_app.command("train")
def bench_train(
    store: Annotated[
        str | None, typer.Option(help="A store with rows to train on. Default: one of the shipped model's mlp_out.")
    ] = None,
    hook: Annotated[str, typer.Option(help="Which hookpoint of it.")] = "mlp_out",
    width: Annotated[list[int] | None, typer.Option(help="d_sae. Repeatable. Default: 4096 and 16384.")] = None,
    batch: Annotated[int, typer.Option(min=8)] = 2048,
    l0: Annotated[int, typer.Option(min=1, help="Active latents a token.")] = 32,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many steps.")] = 5,
    device: Device = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled/--no-compiled", help="The compiled dense step, too. Default: on a GPU.")
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="Python of an environment with sae-lens, dictionary-learning or both. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """A training step in three forms and by other tools, one pass against separate runs, waiting for data."""
    import tempfile

    from harvest.run import harvest as run_harvest
    from shared.config import HarvestConfig
    from shared.device import pick_device
    from shared.errors import UserError
    from shared.progress import hush, progress
    from train.bench.peers import find_peers
    from train.bench.steps import StepBenchPlan
    from train.bench.train import bench_train as measure

    if precision not in ("float32", "bfloat16"):
        raise UserError(f"--precision {precision}: expected float32 or bfloat16")
    on = pick_device(device or "auto")
    peers = find_peers(peer_python or [], precision, on)
    plan = StepBenchPlan(
        width or [4096, 16384], batch, l0, precision, rounds, together=8, tokens=200_000, device=on, peers=peers,
        compiled=on != "cpu" if compiled is None else compiled,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, progress("bench", plan.runs, "runs") as advance:
        if store is None:
            with hush():
                asked = HarvestConfig(model="tiny", hooks=("mlp_out",), tokens=262_144, device=on, out=folder)
                store = str(run_harvest(asked).store)
        command = [sys.executable, str(Path(__file__).resolve())]
        report = measure(store, hook, Path(folder) / "runs", plan, command, advance)

    def text() -> None:
        print_table(f"Median over {rounds} rounds", report.table)
        for name, value in report.ratios.items():
            if value is not None:
                typer.echo(f"{name:40} {value}")
        for name, why in peers.left_out.items():
            typer.echo(f"{name} was not measured: {why}")

    show({**report.ratios, **report.raw}, as_json, text)


@bench_app.command("scale")
def bench_scale(
    quick: Annotated[bool, typer.Option("--quick", help="Small stores: to see that it works.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where the stores are made: about 3 GB and 2 million files. Default: temporary.")
    ] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    place: Annotated[str, typer.Option(hidden=True)] = "",
    as_json: Json = False,
) -> None:
    """Seconds and memory to open, describe, check, train on and harvest into stores of growing size."""
    import tempfile

    from harvest.bench.scale import LARGE_SHARDS, SHARD_ROWS, SMALL_SHARDS, harvest_the_rest, make_manifest, make_store
    from shared.bench.scale import ScalePoint, in_a_process, measured, report
    from shared.bench.scale import as_json as measured_json
    from shared.progress import hush, progress
    from train.bench.scale import READING

    if one is not None:
        with hush():
            typer.echo(measured_json(measured(lambda: {**READING, "harvest": harvest_the_rest}[one](place))))
        return
    shards = [10, 100, 400] if quick else [10, 100, 1000, 10_000, 100_000]
    rows = [10**5, 10**6] if quick else [10**5, 10**6, 10**7, 10**8, 10**9]
    command = [sys.executable, str(Path(__file__).resolve()), "bench", "scale", "--one"]
    points = []
    with (
        tempfile.TemporaryDirectory(dir=folder) as here,
        progress("bench", 4 * len(shards) + 5 * len(rows), "measures") as advance,
    ):

        def measure(axis: str, size: int, store: Path, what: str) -> None:
            points.append(ScalePoint(axis, what, size, in_a_process([*command, what, "--place", str(store)])))
            advance(1, f"{what}, {size:,} {axis}")

        for size in shards:
            make_manifest(Path(here) / "manifest" / str(size), size)
            measure("shards", size, Path(here) / "manifest" / str(size), "open")
            make_store(Path(here) / "shards" / str(size), size, SMALL_SHARDS)
            for what in ("info", "verify", "train"):
                measure("shards", size, Path(here) / "shards" / str(size), what)
        for size in rows:
            make_store(Path(here) / "rows" / str(size), max(1, size // SHARD_ROWS), LARGE_SHARDS)
            for what in ("open", "info", "verify", "train", "harvest"):
                measure("rows", size, Path(here) / "rows" / str(size), what)
    found = report(points)

    def text() -> None:
        print_table("Each in a fresh process; MB of memory that is no file's, beyond the process's own", found["table"])
        print_table("Growth: exponent of the size, bytes a shard or row between the two largest", found["growth"])
        for line in found["failed"]:
            typer.echo(line)
        typer.echo("nothing grows faster than the store" if found["holds"] else "more than is promised: see above")

    show(found, as_json, text)


def layer_number(text: str) -> int | str:
    if text != "mid" and not re.fullmatch("-?[0-9]+", text):
        raise typer.BadParameter(f"{text}: expected a layer number from 0, or mid", param_hint="--layer")
    return text if text == "mid" else int(text)


def resolve(schema: Any, flags: dict[str, Any], file: Path | None, settings: list[str] | None) -> Any:
    """The configuration: the file, over it the options, over them --set."""
    from shared.schema import build, parse_set, read_toml

    return build(schema, {**(read_toml(file) if file else {}), **given(flags), **parse_set(settings or [])})


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def launched(processes: int) -> bool:
    """Whether this is one of several processes already. Raises UserError when they are not as many as asked for."""
    from shared.errors import UserError
    from shared.launch import number, settle

    size = number(os.environ, "WORLD_SIZE", 1, at_least=1)
    if size not in (1, processes):
        raise UserError(f"--processes {processes}: was started as one of {size}. Leave --processes to the launcher")
    return settle().size > 1


def launch(processes: int) -> None:
    """Runs this same command in several processes and ends with the exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from shared.device import share_cores
    from shared.errors import Interrupted

    share_cores(processes)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save in after a signal
    for name in (name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    try:
        torchrun([*on_this_machine(), f"--nproc-per-node={processes}", __file__, *sys.argv[1:]])
    except ChildFailedError as error:
        raise typer.Exit(max(1, error.get_first_failure()[1].exitcode)) from error
    except SignalException as error:
        raise Interrupted("stopped. To continue, run the same command again") from error
    raise typer.Exit(0)


def on_this_machine() -> list[str]:
    """torchrun's --standalone, without asking for the machine's own name: it need not resolve."""
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}"]
    return ["--nnodes=1", *meeting, "--local-addr=127.0.0.1"]


def is_helper() -> bool:
    """Whether another process of this command does the talking."""
    return os.environ.get("RANK", "0") != "0"


def show(document: Any, as_json: bool, text: Any) -> None:
    if as_json:
        from shared.record import to_json

        typer.echo(to_json(document, default=str))
    else:
        text()


def wait_briefly() -> None:
    """Threads of a matrix product that wait for one another keep their core busy for milliseconds, while the writer or
    another program could use it. Here for a hundredth of that (docs/experiments.md). Read when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def end_now(code: int) -> None:
    """Ends a process that may have been stopped in the middle of anything. Python would wait for threads first, and the
    libraries' own, which then meet what is gone already, would abort it. On disk everything is whole or absent."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Entry point: every error that a person can mend becomes one message and its exit code."""
    from shared.device import heed_quota
    from shared.errors import DamagedError, Interrupted, LostError, UserError
    from shared.gate import printable
    from shared.streams import settle_streams

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
        raise Interrupted("stopped. To continue, run the same command again")

    signal.signal(signal.SIGINT, stop)  # what works on something has a gentler way: shared/stop.py
    settle_streams()
    wait_briefly()
    heed_quota()
    try:
        app()
    except (UserError, DamagedError, Interrupted, LostError) as error:
        if isinstance(error, Interrupted):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more changes nothing now
        if isinstance(error, LostError):
            time.sleep(1)  # the launcher takes the exit code of who ended first
        if not (isinstance(error, Interrupted | LostError) and is_helper()):
            word = "stopped" if isinstance(error, Interrupted) else "error"
            typer.echo(f"{word}: {printable(str(error))}", err=True)
        if isinstance(error, Interrupted) and "RANK" not in os.environ:
            end_now(error.exit_code)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # none of the operating system's: a fault of ours
            raise
        from shared.files.local import in_words

        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        typer.echo(f"error: {f'{printable(where)}: ' if where else ''}{in_words(error)}", err=True)
        sys.exit(UserError.exit_code)
    except MemoryError as error:
        typer.echo(f"error: there is not enough memory ({error}). Give less at once, or use a larger machine", err=True)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
