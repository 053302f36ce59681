"""sagsae: harvest a language model's activations, train sparse autoencoders on them, look at what they learned.

Every command parses its options, calls one function and prints what it returned: a short text, or with --json one
document on stdout. Progress goes to stderr. Options are made from the schemas of shared/config.py (shared/command/).
What a command needs is imported when it runs.
"""

import dataclasses
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import typer

from shared.command import tables
from shared.command.commands import command, command_group
from shared.command.main import agrees, run_app, show
from shared.command.options import OptionsFrom, resolve, told_settings, typed_saes, typed_settings
from shared.command.parameters import (
    DryRun,
    Every,
    Follow,
    Force,
    Full,
    Hidden,
    JobNumber,
    JobStates,
    Json,
    Names,
    OutFolder,
    Pages,
    PinName,
    PlanOnly,
    Processes,
    Repair,
    Rounds,
    RunFolders,
    RunOrNone,
    Scratch,
    Service,
    Source,
    StoreFolder,
    StoreId,
    StorePlace,
    Target,
    Version,
    Wait,
    Yes,
)
from shared.command.start import in_processes, start_light
from shared.launch import is_helper, launched
from train.exchange.commands import add_commands as add_exchange
from train.features.commands import add_commands as add_features
from train.steer.commands import add_commands as add_steer
from train.view.commands import add_commands as add_view

app, store_app, jobs_app, bench_app = (command_group() for _ in range(4))
SCRIPT: Final = str(Path(__file__).resolve())
STAGES, CACHE, LOOK, MEASURE = "Stages", "The cache", "Look around", "Check and measure"
BENCH_HARVEST: Final = "model corpus tokens context layers hooks codec device"
SMALL: Final = {"model": "tiny", "tokens": 262_144}


@app.callback()
def options(version: Version = False) -> None:
    """Harvest a language model's activations into a store, train sparse autoencoders on it, look at what they learned.

    Every command takes --help, and --json to print one JSON document. Repeat a command to resume it; a finished one
    says that it is complete. `sagsae settings COMMAND` explains every setting."""


@command(app, group=STAGES, settings=OptionsFrom("harvest", config=True))
def harvest(context: typer.Context, processes: Processes = 1, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Run a language model over a corpus and keep its activations.

    $ sagsae harvest --model tiny --tokens 200000
    $ sagsae harvest --model pythia-1b --hook mlp_out --corpus texts/ --dry-run
    """
    config = resolve(context)
    if dry_run:
        from harvest.dry_run import trial

        found = trial(config, processes)
        show(dataclasses.asdict(found), as_json, lambda: typer.echo(tables.trial_text(found)))
        raise typer.Exit
    in_processes(processes, SCRIPT)
    from harvest.run import harvest as run

    summary = run(config)
    if not is_helper():
        show(dataclasses.asdict(summary), as_json, lambda: typer.echo(tables.harvest_text(summary)))


@command(app, group=STAGES, settings=OptionsFrom("synth", config=True))
def synth(context: typer.Context, as_json: Json = False) -> None:
    """Write a store of synthetic activations whose true features are known.

    eval then says how many of them were found (docs/explanation/synthetic.md).

    $ sagsae synth --d-in 64 --features 96 --tokens 200000
    """
    config = resolve(context)
    from harvest.synth import synth as run

    summary = run(config)
    show(dataclasses.asdict(summary), as_json, lambda: typer.echo(tables.harvest_text(summary)))


@command(app, group=STAGES, settings=OptionsFrom("train", config=True))
def train(context: typer.Context, processes: Processes = 1, service: Service = None, as_json: Json = False) -> None:
    """Train autoencoders on a store.

    Every architecture, width, sparsity, seed and learning rate is trained in one pass over the activations.

    $ sagsae train --store stores/tiny --hook mlp_out --arch sa-gsae:512
    $ sagsae train --store stores/tiny --hook mlp_out --arch gated:1024 --l0-target 16
    $ sagsae train --config run.toml --lr 3e-3 --out runs/three
    $ sagsae train --request model=tiny --request hook=mlp_out --service http://box:8642 --arch sa-gsae:512
    """
    from shared.command.grid import asked_saes, warn_of_shared_sparsity

    ask_service(service)
    typed = typed_saes(context)
    saes = asked_saes(typed, typed_settings(context))
    if not is_helper() and (processes == 1 or launched(processes)):
        warn_of_shared_sparsity(typed)
    config = resolve(context, saes=saes, **answer_settings(context))
    in_processes(processes, SCRIPT)
    from train.ask import leased
    from train.run import train as run

    with leased(config, leads=not is_helper()):
        summary = run(config)
    if not is_helper():
        show(dataclasses.asdict(summary), as_json, lambda: tables.print_saes(f"{summary.run}", summary.saes))


def ask_service(url: str | None) -> None:
    """Makes a typed --service the service of this process."""
    if url is not None:
        from shared.service.asking import name_service

        name_service(url)


def answer_settings(context: typer.Context) -> dict[str, Any]:
    """What the activation cache answers to --request; {} without one."""
    typed, told = typed_settings(context), told_settings(context)
    if not (typed.get("request") or told.get("request")):
        return {}
    from train.ask import answered

    return answered(typed, told)


@command(app, "eval", group=STAGES, settings=OptionsFrom("eval"))
def evaluate(context: typer.Context, run: RunOrNone = None, as_json: Json = False) -> None:
    """Measure a run's autoencoders on its held-out tokens, or any autoencoder on those of a store.

    $ sagsae eval runs/three
    $ sagsae eval runs/three --no-ce --json
    $ sagsae eval --sae imported/gemma --store stores/gemma --hook resid_post
    $ sagsae eval --sae imported/gemma --rows-of runs/three
    """
    config = resolve(context, run=run)
    from train.evaluate import evaluate as measure

    done = measure(config)
    text = partial(tables.print_evaluation, f"{done.file}", done.results["saes"], config.peer_conventions)
    measured = {"run": config.run} if config.sae is None else {"sae": config.sae, "evaluation": done.file.parent}
    show({**{key: str(path) for key, path in measured.items()}, **done.results}, as_json, text)


@command(app, group=STAGES, settings=OptionsFrom("report"))
def report(context: typer.Context, runs: RunFolders, as_json: Json = False) -> None:
    """Write one self-contained HTML page that compares runs.

    $ sagsae report runs/three runs/four --out report.html
    """
    config = resolve(context, runs=runs)
    from train.report import write_report

    page = write_report(list(config.runs), config.out, config.overwrite)
    show({"report": page}, as_json, lambda: typer.echo(f"{page}"))


add_exchange(app)
add_features(app, SCRIPT, STAGES)
add_steer(app, STAGES)
add_view(app, STAGES)


@command(app, group=CACHE, settings=OptionsFrom("request", config=True))
def request(
    context: typer.Context, plan: PlanOnly = False, wait: Wait = False, service: Service = None, as_json: Json = False
) -> None:
    """Answer a request for activations from a folder of stores, or ask an activation cache.

    What stores there hold already is used; only the rest is harvested. It prints the store's folder or URL. A request
    that a service has queued ends with exit code 75 unless you --wait.

    $ sagsae request --model tiny --layer 1 --hook mlp_out --tokens 200000
    $ sagsae request --model tiny --layer 1 --hook mlp_out --tokens 400000 --plan
    $ sagsae request --model tiny --layer 1 --hook mlp_out --tokens 200000 --service http://box:8642 --wait
    """
    config = resolve(context)
    from shared.command.cache import answer_text, ask_cache, asks_service, is_queued, plan_at_cache

    if asks_service(service, config.root if "root" in config.model_fields_set else None):
        found = plan_at_cache(config) if plan else ask_cache(config, wait)
    else:
        from harvest.reuse.answer import answer_request, plan_answer

        found = plan_answer(config) if plan else answer_request(config)
    show(found.model_dump(mode="json"), as_json, lambda: typer.echo(answer_text(found)))
    if is_queued(found):
        raise typer.Exit(75)


@command(app, group=CACHE, settings=OptionsFrom("serve", config=True))
def serve(context: typer.Context, as_json: Json = False) -> None:
    """Answer requests for activations: from the stores of a folder, or by harvesting once for everybody.

    It serves until SIGTERM or Ctrl-C, and starts a worker of its own.

    $ sagsae serve --root stores --quota 2TB
    $ sagsae serve --host 0.0.0.0 --token-file token --launch none
    """
    config = resolve(context)
    from harvest.serve.app import serve as run

    def started(url: str) -> None:
        show({"url": url, "root": str(config.root)}, as_json, lambda: typer.echo(f"serving {config.root} at {url}"))

    run(config, started)


@command(app, group=CACHE, settings=OptionsFrom("work"))
def work(context: typer.Context, as_json: Json = False) -> None:
    """Run the jobs of an activation cache on this machine, until SIGTERM or Ctrl-C.

    A job that is running then is given back: its store is resumed later, here or elsewhere.

    $ sagsae work --service http://127.0.0.1:8642 --root stores
    $ sagsae work --service http://cache:8642 --root /shared/stores --gpus 0,1
    """
    config = resolve(context)
    from harvest.serve.work.worker import work as run

    def started(about: dict[str, Any]) -> None:
        if as_json:
            show(about, as_json, lambda: None)

    run(config, started)


@command(app, group=MEASURE)
def demo(out: OutFolder = Path("demo"), as_json: Json = False) -> None:
    """Run every stage on the shipped model: harvest, train, eval, features, report.

    It trains SA-GSAE and Gated autoencoders and takes one to four minutes."""
    from harvest.run import harvest as run_harvest
    from shared.config import EvalConfig, demo_harvest, demo_train
    from shared.progress import say
    from shared.schemas.features import FeaturesConfig
    from train.evaluate import evaluate as measure
    from train.features.run import features
    from train.report import write_report
    from train.report.choice import best_of
    from train.report.place import check_demo
    from train.run import train as run_train

    check_demo(out)  # before the work of minutes
    started = time.monotonic()
    say("1 of 5: harvest the shipped language model's activations (the whole demo takes one to four minutes)")
    store = run_harvest(demo_harvest(out)).store
    say("2 of 5: train SA-GSAE and, at twice the width, Gated autoencoders")
    run = run_train(demo_train(out, store)).run
    say("3 of 5: measure them on held-out tokens, inside the language model")
    results = measure(EvalConfig(run=run, ce_tokens=10_000)).results
    best = best_of(run, "sa-gsae")
    say(f"4 of 5: find what the latents of {best} fire on")
    latents = features(FeaturesConfig(run=run, sae=best)).page.resolve()
    say("5 of 5: write the report")
    page = write_report([run], out / "report.html").resolve()
    seconds = round(time.monotonic() - started, 1)
    document = {"store": store, "runs": [run], "report": page, "latents": latents, "seconds": seconds}
    document |= {"saes": results["saes"]}

    def text() -> None:
        tables.print_saes(f"{run}", results["saes"])
        typer.echo(f"\n{seconds:.0f} seconds. The report: {page}\nThe latents of {best}: {latents}")

    show(document, as_json, text)


@command(app, group=MEASURE, settings=OptionsFrom("reproduce"))
def reproduce(context: typer.Context, as_json: Json = False) -> None:
    """Test which of the SA-GSAE paper's claims hold on a model.

    It compares SA-GSAE at widths H and 2H with Gated autoencoders, at every λ and seed."""
    from train.reproduce.preset import make_request

    ask = resolve(context)
    request = make_request(
        ask.preset, ask.models, ask.cells, ask.layer, ask.seeds, ask.tokens, ask.corpus, ask.device, ask.out
    )
    from harvest.run import harvest as run_harvest
    from train.reproduce.run import reproduce as run_all

    found = run_all(request, lambda config: run_harvest(config).store, ask.yes)
    title = f"{ask.out / 'reproduction.md'}, {ask.out / 'report.html'}"
    text = partial(tables.print_findings, title, found.findings)
    show({"out": str(ask.out), **found.key_results()}, as_json, text)


@command(store_app, "ls")
def store_ls(root: StoreFolder = None, service: Service = None, as_json: Json = False) -> None:
    """List the hookpoints in all stores of a folder, or the stores of an activation cache."""
    from shared.command.cache import asks_service, store_rows_at_cache

    if asks_service(service, root):
        rows, title = store_rows_at_cache(), service or os.environ["SAGSAE_SERVICE"]
    else:
        from shared.store.listing import list_stores

        rows, title = list_stores(root or "stores"), root or "stores"
    show(rows, as_json, lambda: tables.print_table(title, rows))


@command(store_app, "info")
def store_info(path: StorePlace, service: Service = None, as_json: Json = False) -> None:
    """Print what a store holds and where it came from."""
    from shared.command.cache import asks_service, describe_at_cache
    from shared.store.listing import describe_store

    about = describe_at_cache(path) if asks_service(service, path) else describe_store(path)
    show(about, as_json, lambda: typer.echo(json.dumps(about, indent=2, default=str)))


@command(store_app, "verify")
def store_verify(path: StorePlace, full: Full = False, mend: Repair = False, as_json: Json = False) -> None:
    """Check every byte of a store and list all damage.

    The exit code is 3 when something is damaged and stays so."""
    start_light()
    from shared.progress import progress
    from shared.store.opened import Store
    from shared.store.verify import repair, verify

    store = Store.open(path, lenient=True)
    size = store.commits.n_bytes
    with store.files.reading(), progress(f"verify {path}", size, "bytes") as advance:
        damage = verify(store, full, advance)
    again = repair(store.files, damage.shards) if mend and damage.lines else []
    document = {"store": path, "full": full, "shards": len(store.commits), "of_shards": store.spec.n_shards}
    document |= {"damage": damage.lines, "damaged_shards": damage.shards, "to_harvest": again}
    show(document, as_json, lambda: typer.echo(tables.verify_text(document)))
    if damage.lasting if mend else damage.lines:
        raise typer.Exit(3)


@command(store_app, "recode", settings=OptionsFrom("store recode"))
def store_recode(context: typer.Context, source: Source, target: Target, as_json: Json = False) -> None:
    """Rewrite a store with another codec.

    Repeat the command to resume it."""
    from harvest.recode import recode

    config = resolve(context, source=source, target=target)
    done = recode(config.source, config.target, config.codec)
    show(dataclasses.asdict(done), as_json, lambda: typer.echo(tables.recode_text(done, source)))


@command(store_app, "tail")
def store_tail(path: StorePlace, every: Every = 2.0, as_json: Json = False) -> None:
    """Follow a running harvest until the store is final."""
    from shared.files.open import open_files
    from shared.store.tail import describe_look, watch_store

    first = last = None
    for last in watch_store(open_files(path), every):
        first = first or last
        typer.echo(describe_look(last, first), err=as_json)
    if as_json and last:
        typer.echo(json.dumps({"store": path, "shards": len(last.store.commits), "tokens": last.store.n_rows}))


@command(store_app, "rm")
def store_rm(
    path: StorePlace, yes: Yes = False, force: Force = False, service: Service = None, as_json: Json = False
) -> None:
    """Delete a store."""
    from shared.command.cache import asks_service, remove_at_cache, what_is_removed
    from shared.errors import UserError
    from shared.files.open import open_files
    from shared.store.create import remove_store, what_is_deleted

    at_service = asks_service(service, path)
    files = None if at_service else open_files(path)
    what = what_is_removed(path) if files is None else what_is_deleted(files)
    if not yes and not agrees(f"Delete {path} ({what})?"):
        raise UserError(f"{path}: was not deleted. Answer y, or add --yes")
    if files is None:
        remove_at_cache(path, force)
    else:
        with files.explained("then run the same command again: it deletes what is left"):
            remove_store(files)
    show({"store": path, "deleted": what}, as_json, lambda: None)


@command(store_app, "pin")
def store_pin(store: StoreId, name: PinName, service: Service = None, as_json: Json = False) -> None:
    """Keep a store of an activation cache from being evicted."""
    ask_service(service)
    from shared.command.cache import set_pin

    text = set_pin(store, name, True)
    show({"store": store, "pin": name}, as_json, lambda: typer.echo(text))


@command(store_app, "unpin")
def store_unpin(store: StoreId, name: PinName, service: Service = None, as_json: Json = False) -> None:
    """Take a pin off a store of an activation cache."""
    ask_service(service)
    from shared.command.cache import set_pin

    text = set_pin(store, name, False)
    show({"store": store, "unpinned": name}, as_json, lambda: typer.echo(text))


@command(jobs_app, "ls")
def jobs_ls(state: JobStates = None, service: Service = None, as_json: Json = False) -> None:
    """List the jobs of an activation cache, newest first."""
    ask_service(service)
    from shared.command.cache import job_rows

    rows = job_rows(state)
    show(rows, as_json, lambda: tables.print_table("jobs", rows))


@command(jobs_app, "log")
def jobs_log(job: JobNumber, follow: Follow = False, service: Service = None, as_json: Json = False) -> None:
    """Print a job's log."""
    ask_service(service)
    from shared.command.cache import job_log

    parts = job_log(job, follow)
    if as_json:
        typer.echo(json.dumps({"job": job, "text": "".join(parts)}))
        return
    for part in parts:
        typer.echo(part, nl=False)


@command(jobs_app, "cancel")
def jobs_cancel(job: JobNumber, service: Service = None, as_json: Json = False) -> None:
    """Cancel a queued or running job. What it has written stays."""
    ask_service(service)
    from shared.command.cache import cancel_job, job_text

    done = cancel_job(job)
    show(done.model_dump(mode="json"), as_json, lambda: typer.echo(job_text(done)))


@command(jobs_app, "retry")
def jobs_retry(job: JobNumber, service: Service = None, as_json: Json = False) -> None:
    """Queue a failed or cancelled job again."""
    ask_service(service)
    from shared.command.cache import job_text, retry_job

    done = retry_job(job)
    show(done.model_dump(mode="json"), as_json, lambda: typer.echo(job_text(done)))


@command(app, group=LOOK)
def models(as_json: Json = False) -> None:
    """List the names that stand for a model."""
    from shared.model.source import list_models

    table = list_models()
    show(table, as_json, lambda: tables.print_table("--model also takes any Hugging Face id or folder", table))


@command(app, group=LOOK, settings=OptionsFrom("harvest", only="model revision layers attention"))
def hooks(context: typer.Context, as_json: Json = False) -> None:
    """List the hookpoints of a model and their widths.

    It reads the model's configuration, no weights."""
    asked = resolve(context)
    from shared.model.hooks import hook_table

    found = hook_table(asked.model, asked.revision, asked.layers, asked.attention)
    table = [dataclasses.asdict(hook) for hook in found]
    show(table, as_json, lambda: tables.print_table(f"{asked.model}, --attention {asked.attention}", table))


@command(app, group=LOOK)
def settings(name: Names = None, as_json: Json = False) -> None:
    """Print every setting with its type, default and meaning."""
    from shared.command.settings import settings_rows

    words = " ".join(name or [])
    rows = settings_rows(words)
    show(rows, as_json, lambda: tables.print_settings(words, rows))


@command(app, hidden=True)
def reference(folder: Pages, as_json: Json = False) -> None:
    """Write the reference pages that are made from the schemas and from --help."""
    from harvest.serve.app import rest_document
    from harvest.serve.rest.openapi import rest_page
    from shared.command.reference import write_reference

    written = write_reference(folder, typer.main.get_command(app), {"rest-api.md": rest_page(rest_document())})
    show({"written": written}, as_json, lambda: typer.echo("\n".join(written)))


app.add_typer(store_app, name="store", help="List, describe, check, rewrite and delete stores.", rich_help_panel=LOOK)
app.add_typer(
    jobs_app, name="jobs", help="List, read, cancel and retry the jobs of an activation cache.", rich_help_panel=CACHE
)
app.add_typer(
    bench_app, name="bench", help="Measure this machine and compare with other tools.", rich_help_panel=MEASURE
)


@command(bench_app, "store", settings=OptionsFrom("bench store"))
def bench_store(context: typer.Context, as_json: Json = False) -> None:
    """Compare reading and writing a store with the codec alone and with other Zarr readers."""
    ask = resolve(context)
    import tempfile

    from harvest.bench.store import WIDE, make_stores, writing
    from shared.bench.timing import TimedFigure, interleaved, store_report
    from shared.progress import progress, say
    from train.bench.store import reading, wait_share

    with tempfile.TemporaryDirectory() as folder:
        place = ask.keep or Path(folder)
        say(f"harvesting {ask.tokens:,} tokens of {ask.model}, and recoding them")
        stores = make_stores(place, ask.model, ask.tokens, ask.width)
        figures: dict[str, TimedFigure] = {}
        with progress("bench", (ask.rounds + 1) * 50, "runs") as advance:
            with writing(stores, place / "written") as (runs, before):
                figures |= interleaved(runs, ask.rounds, advance, before)
            for codec, store in stores.wide.items():  # what is compared is measured in turns, and nothing else then
                figures |= interleaved(reading(store, WIDE, others=codec in ("zstd", "lz4")), ask.rounds, advance)
        report = store_report(stores.narrow, stores.wide, figures, wait_share(stores.wide["zstd"], WIDE))
    text = partial(tables.print_ratios, "Uncompressed, median over the rounds", report["table"], report["ratios"])
    show({**report["ratios"], **report["raw"]}, as_json, text)


@command(bench_app, "remote", settings=OptionsFrom("bench remote"))
def bench_remote(context: typer.Context, as_json: Json = False) -> None:
    """Compare reading a store through an activation cache with reading its folder."""
    ask = resolve(context)
    import tempfile

    from harvest.bench.serve import measured_server
    from harvest.bench.store import WIDE, make_stores
    from shared.files.base import SERVED
    from shared.progress import progress, say
    from shared.store.opened import Store
    from train.bench.remote import SPEEDS, compare

    os.environ |= {"SAGSAE_CACHE_GB": "0", "SAGSAE_SERVICE": ""}
    with tempfile.TemporaryDirectory() as folder:
        place = (ask.keep or Path(folder)).resolve()
        say(f"harvesting {ask.tokens:,} tokens of {ask.model}, and recoding them")
        here = make_stores(place, ask.model, ask.tokens, ask.width).wide["zstd"]
        runs = 2 * ask.rounds + 2 * len(SPEEDS)
        with measured_server([sys.executable, SCRIPT], place) as server, progress("bench", runs, "runs") as done:
            served = Store.open(f"{server.url}{SERVED}{here.root.name}")
            figures = compare(here, served, WIDE, ask.rounds, server.cpu_seconds, done)
    show(figures, as_json, lambda: tables.print_ratios(f"{ask.tokens:,} rows of {ask.width}", [], figures))


@command(bench_app, "harvest", settings=OptionsFrom("harvest", BENCH_HARVEST, defaults=SMALL, sets=True))
def bench_harvest(context: typer.Context, rounds: Rounds = 5, folder: Scratch = None, as_json: Json = False) -> None:
    """Compare a harvest with the bare forward pass and with the codec alone."""
    import tempfile

    from shared.progress import progress

    config = resolve(context)
    from harvest.bench.harvest import bench_harvest as measure

    with tempfile.TemporaryDirectory(dir=folder) as place, progress("bench", (rounds + 1) * 4, "runs") as advance:
        report = measure(config, Path(place), rounds, advance)
    title = f"{config.model}, median over {rounds} rounds"
    document = {**report.ratios, **report.raw}
    show(document, as_json, lambda: tables.print_ratios(title, report.raw["figures"], report.ratios))


@command(bench_app, "train", settings=OptionsFrom("bench train"))
def bench_train(context: typer.Context, as_json: Json = False) -> None:
    """Compare a training step in three forms with other tools.

    It also compares one pass over a store with separate runs, and measures how long training waits for data."""
    ask = resolve(context)
    import tempfile

    from harvest.run import harvest as run_harvest
    from shared.config import HarvestConfig
    from shared.device import pick_device
    from shared.progress import hush, progress
    from train.bench.peers import find_peers
    from train.bench.steps import make_plan
    from train.bench.train import bench_train as measure

    on = pick_device(ask.device)
    peers = find_peers(list(ask.peer_python), ask.precision, on)
    plan = make_plan(ask, on, peers)
    store = ask.store
    with tempfile.TemporaryDirectory() as folder, progress("bench", plan.runs, "runs") as advance:
        if store is None:
            with hush():
                asked = HarvestConfig(model="tiny", hooks=("mlp_out",), tokens=262_144, device=on, out=folder)
                store = str(run_harvest(asked).store)
        report = measure(store, ask.hook, Path(folder) / "runs", plan, [sys.executable, SCRIPT], advance)

    title = f"Median over {ask.rounds} rounds"
    text = partial(tables.print_ratios, title, report.table, report.ratios, peers.left_out)
    show({**report.ratios, **report.raw}, as_json, text)


@command(bench_app, "features", settings=OptionsFrom("bench features"))
def bench_features(context: typer.Context, as_json: Json = False) -> None:
    """Compare what `sagsae features` takes with encoding the same rows alone.

    It prints the ratio of CPU seconds, the size of the result and the memory that was needed."""
    ask = resolve(context)
    import tempfile

    from harvest.run import harvest as run_harvest
    from shared.bench.options import features_harvest, features_train
    from shared.progress import hush, progress
    from train.bench.features import bench_features as measure
    from train.run import train as run_train

    with tempfile.TemporaryDirectory() as folder:
        run = ask.run
        if run is None:
            with hush():
                run = run_train(features_train(Path(folder), run_harvest(features_harvest(Path(folder))).store)).run
        with progress("bench", 2 * (ask.rounds + 1), "runs") as advance:
            report = measure(run, ask.sae, ask.rounds, advance)
    title = f"Median over {ask.rounds} rounds"
    text = partial(tables.print_ratios, title, report["table"], report["ratios"])
    show({**report["ratios"], **report["raw"]}, as_json, text)


@command(bench_app, "scale", settings=OptionsFrom("bench scale"))
def bench_scale(context: typer.Context, one: Hidden = "", place: Hidden = "", as_json: Json = False) -> None:
    """Measure how time and memory grow with the size of a store.

    It opens, describes, checks, trains on and harvests into stores, each in a fresh process."""
    import tempfile

    from harvest.bench.scale import harvest_the_rest, measure_growth, measurements
    from shared.bench.scale import as_json as measured_json
    from shared.bench.scale import measured
    from shared.bench.scale import report as report_on
    from shared.progress import hush, progress
    from train.bench.scale import READING

    ask = resolve(context)
    if one:
        with hush():
            typer.echo(measured_json(measured(lambda: {**READING, "harvest": harvest_the_rest}[one](place))))
        return
    command = [sys.executable, SCRIPT, "bench", "scale", "--one"]
    with (
        tempfile.TemporaryDirectory(dir=ask.folder) as here,
        progress("bench", measurements(ask.quick), "measurements") as advance,
    ):
        found = report_on(measure_growth(Path(here), ask.quick, command, advance))
    show(found, as_json, lambda: tables.print_growth(found))


@command(bench_app, "serve", settings=OptionsFrom("bench serve"))
def bench_serve(context: typer.Context, as_json: Json = False) -> None:
    """Measure the activation cache's server: repeated requests, bytes by ranges, growing catalogs.

    The exit code is 1 when a figure is above its limit."""
    ask = resolve(context)
    import tempfile

    from harvest.bench.serve import measure_server

    with tempfile.TemporaryDirectory(dir=ask.folder) as folder:
        rows = [figure.row() for figure in measure_server(ask, Path(folder), [sys.executable, SCRIPT])]
    show(rows, as_json, lambda: tables.print_table("The server, measured from outside", rows))
    if any(row["holds"] == "NO" for row in rows):
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
