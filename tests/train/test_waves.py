"""Autoencoders that do not fit into memory together: waves, with the bits of one stack, through any interruption."""

import gc
import json
import re
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Sagsae
from support.folders import contents, rewrite, without
from support.runs import lines_of, weights_of
from support.stores import in_steps

import train.run
from shared.config import EvalConfig, TrainConfig
from shared.errors import Interrupted, UserError
from shared.saes import SAEConfig, sae_config
from shared.store.opened import Store
from train.data.order import share
from train.evaluate import evaluate, last_logged_inactive
from train.fit.member import Member
from train.plan.job import TrainJob, make_job
from train.plan.memory import circumstances, most_streams, needs_of, reader_bytes, together
from train.plan.waves import pack_waves, plan_waves
from train.ranks import Ranks
from train.report.data import read_run
from train.run import train as run_train
from train.runs.folder import RunFolder

Config = Callable[..., TrainConfig]
CPU = torch.device("cpu")

SAES = tuple(
    sae_config(**values)
    for values in (
        {"arch": "sa-gsae", "d_sae": 48, "sparsity": 0.2},
        {"arch": "abs-topk", "d_sae": 40, "k": 6},
        {"arch": "relu", "d_sae": 44, "sparsity": 0.2},
        {"arch": "gated", "d_sae": 32, "sparsity": 0.2, "seed": 3},
    )
)


def room_for(config: TrainConfig, *names: str, ranks: int = 1) -> int:
    """Bytes that the named autoencoders need together."""
    job = make_job(config, CPU)
    at = circumstances(job, ranks > 1, ranks)
    each = needs_of(config, at)
    return together([each[name] for name in names], reader_bytes(job, at.rows, job.streams)).total


def in_two(config: TrainConfig) -> TrainConfig:
    """Sa-gsae and gated together need as much as any wave may."""
    most = max(room_for(config, *pair) for pair in ((NAMES[0], NAMES[3]), (NAMES[1], NAMES[2])))
    return config.model_copy(update={"memory": most})


NAMES = [sae.name for sae in SAES]


def by_name(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What was logged of each autoencoder, line by line, without the wave."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines_of(run):
        for name, values in line["saes"].items():
            about = {key: value for key, value in line.items() if key not in ("saes", "wave")}
            found.setdefault(name, []).append({**about, **values})
    return found


def waves_of(run: Path) -> list[list[str]]:
    waves: list[list[str]] = json.loads((run / "record.json").read_text())["waves"]
    return waves


def test_as_few_waves_as_fit_the_widest_first() -> None:
    saes = tuple(
        sae_config(arch="gated", d_sae=width, seed=seed) for seed, width in enumerate((10, 60, 50, 40, 30, 10))
    )

    def widths(room: int) -> list[list[int]]:
        def fits(some: Sequence[SAEConfig]) -> bool:
            return sum(sae.d_sae for sae in some) <= room

        return [[sae.d_sae for sae in wave] for wave in pack_waves(saes, fits)]

    assert widths(200) == [[10, 60, 50, 40, 30, 10]], "in the order in which they were asked for"
    assert widths(100) == [[10, 50, 30, 10], [60, 40]]
    assert widths(70) == [[10, 60], [50, 10], [40, 30]]
    assert widths(55) == [[10, 40], [60], [50], [30, 10]], "one that fits nowhere is alone"


def test_waves_end_with_the_bits_of_one_stack(train_config: Config, tmp_path: Path, capsys: Any) -> None:
    config = train_config(saes=SAES, out=tmp_path / "whole")
    whole = run_train(config)
    said = capsys.readouterr().err
    assert re.search(
        r"whole: takes [\d.]+ KB of CPU memory; [\d.]+ GB may be used\n +weights .*, moments .*, activations", said
    )
    assert "They do not fit" not in said
    assert waves_of(whole.run) == [NAMES]
    config = in_two(config.model_copy(update={"out": tmp_path / "waves"}))
    summary = run_train(config)
    said = capsys.readouterr().err
    assert "They do not fit together: 2 waves of 2, 2 autoencoders" in said
    assert "waves, wave 2 of 2: 2 autoencoders" in said
    assert weights_of(summary.run) == weights_of(whole.run)
    assert summary.saes == whole.saes, "what training logged of dead latents is known of every wave"
    assert len(lines_of(summary.run)) == 2 * len(lines_of(whole.run)), "each wave in a pass of its own"
    assert by_name(summary.run) == by_name(whole.run)
    waves = waves_of(summary.run)
    assert sorted(name for wave in waves for name in wave) == sorted(NAMES)
    for line in lines_of(summary.run):
        assert list(line["saes"]) == waves[line["wave"] - 1]
    assert read_run(summary.run).curves == read_run(whole.run).curves
    before = contents(summary.run)
    assert run_train(config.model_copy(update={"memory": 1})).saes == summary.saes, "complete: nothing is planned"
    assert contents(summary.run) == before
    assert evaluate(EvalConfig(run=summary.run, ce=False)).results["saes"] == summary.saes


def test_stopped_in_any_wave_it_ends_with_the_same_bits(
    train_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = in_two(train_config(saes=SAES))
    whole = run_train(config.model_copy(update={"out": tmp_path / "whole"})).run
    for stop_after in (13, 20, 21, 33):
        asked = iter(range(1, 100))

        @contextmanager
        def stop_requests(asked: Iterator[int] = asked, at: int = stop_after) -> Iterator[Callable[[], bool]]:
            yield lambda: next(asked) == at

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        here = config.model_copy(update={"out": tmp_path / f"stopped-{stop_after}"})
        with monkeypatch.context() as patch:
            patch.setattr(train.run, "stop_requests", stop_requests)
            if stop_after == 20:  # a stop asked for at the end of a wave is obeyed in the next; this is a kill between
                patch.setattr(train.run, "save_saes", die)
            with pytest.raises((Interrupted, KeyboardInterrupt)) as stopped:
                run_train(here)
        wave, step = (1, stop_after) if stop_after <= 20 else (2, stop_after - 20)
        if stop_after != 20:
            assert f"wave {wave} of 2: stopped after step {step}. To continue" in str(stopped.value)
        run = run_train(here.model_copy(update={"memory": "auto"})).run
        assert f"wave {wave} of 2: resuming after step {step}" in capsys.readouterr().err
        assert waves_of(run) == waves_of(whole), "planned when the run began, whatever there is now"
        assert weights_of(run) == weights_of(whole), stop_after
        assert lines_of(run) == lines_of(whole), stop_after


def test_a_run_goes_on_in_its_waves_or_says_that_they_do_not_fit(
    train_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_two(train_config(saes=SAES))
    with monkeypatch.context() as patch:
        patch.setattr(train.run, "agree", lambda _stop, done, _ranks: done == 7)
        with pytest.raises(Interrupted):
            run_train(config)
    before = contents(config.out or Path())
    with pytest.raises(
        UserError, match=r"wave 1 of sa-gsae-48.*: training takes .* may be used \(memory\).*--set memory"
    ):
        run_train(config.model_copy(update={"memory": 10_000}))
    assert contents(config.out or Path()) == before


def test_one_that_does_not_fit_even_alone(train_config: Config, tmp_path: Path) -> None:
    config = train_config(saes=SAES)
    room = room_for(config, NAMES[0]) - 1
    with pytest.raises(UserError) as refused:
        run_train(config.model_copy(update={"memory": room}))
    assert str(refused.value).startswith(f"{NAMES[0]}: training takes ")
    for part in (
        "weights ",
        "activations ",
        "reader ",
        "may be used (memory)",
        "d_sae",
        "--batch (64)",
        "window_rows (1024)",
    ):
        assert part in str(refused.value)
    assert not (tmp_path / "run").exists(), "before anything is written"


def test_one_that_could_never_learn_is_named_before_the_first_wave(train_config: Config, tmp_path: Path) -> None:
    """Not after hours, when its wave's turn has come."""
    never = sae_config(arch="gated", d_sae=32, sparsity=0.2, theta0=100.0)
    config = train_config(saes=(SAES[0], never))
    config = config.model_copy(update={"memory": room_for(config, NAMES[0])})
    with pytest.raises(UserError, match=r"gated-32.*closes every latent on the first batch"):
        run_train(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]


def test_a_wave_that_diverges_stops_no_other(train_config: Config, tmp_path: Path) -> None:
    wild = sae_config(arch="relu", d_sae=44, sparsity=0.2, lr=1e30)
    config = train_config(saes=(SAES[0], wild))
    config = config.model_copy(update={"memory": room_for(config, NAMES[0])})
    run = run_train(config).run
    record = json.loads((run / "record.json").read_text())
    assert record["waves"] == [[NAMES[0]], [wild.name]]
    assert record["diverged"] == {wild.name: 5}
    both = (wild, sae_config(arch="relu", d_sae=40, sparsity=0.2, lr=1e30))
    config = train_config(saes=both, out=tmp_path / "both")
    config = config.model_copy(update={"memory": room_for(config, wild.name)})
    with pytest.raises(UserError, match=r"relu-44.*, relu-40.*: all losses are NaN or infinite"):
        run_train(config)


def test_a_wave_is_gone_when_the_next_begins(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    before: list[weakref.ref[Member]] = []
    first_weights = Member.__init__

    def watch(self: Member, config: SAEConfig, *rest: Any) -> None:
        alive.append(sum(ref() is not None for ref in before))
        first_weights(self, config, *rest)
        before.append(weakref.ref(self))

    config = in_two(train_config(saes=SAES))
    gc.disable()  # nothing may depend on when cycles are looked for
    try:
        monkeypatch.setattr(Member, "__init__", watch)
        run_train(config)
    finally:
        gc.enable()
    assert alive[-2:] == [0, 1]


def test_gradients_do_not_stay(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted once in a run, not once an autoencoder."""
    step, seen = Member.step_, []

    def watch(self: Member, *arguments: Any) -> Any:
        measured = step(self, *arguments)
        seen.append([parameter.grad for parameter in self.weights.trained().values()])
        return measured

    monkeypatch.setattr(Member, "step_", watch)
    run_train(train_config(tokens=64 * 3))
    assert seen
    assert all(grad is None for grads in seen for grad in grads)


def test_waves_of_a_store_that_is_being_harvested(
    train_config: Config, store: Store, growing: Path, tmp_path: Path
) -> None:
    """Every wave reads the segments that the first one froze."""
    config = train_config(saes=SAES, store=str(growing), follow=True, tokens=None, window_rows=1024)
    room = in_two(config).memory
    harvest = in_steps(growing, store, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]], 0.7)
    waves = run_train(config.model_copy(update={"memory": room, "out": tmp_path / "waves"})).run
    harvest.join()
    assert len(waves_of(waves)) == 2
    whole = tmp_path / "whole"  # a run of one wave with the same segments, that was killed as soon as it had begun
    whole.mkdir()
    for name in ("config.json", "segments.jsonl"):
        (whole / name).write_bytes((waves / name).read_bytes())
    (whole / "record.json").write_bytes((waves / "record.json").read_bytes())
    rewrite(whole / "record.json", lambda record: {**without("finished")(record), "waves": [NAMES]})
    one = run_train(config.model_copy(update={"out": whole})).run
    assert weights_of(waves) == weights_of(one)


@pytest.mark.slow
@pytest.mark.deep
def test_waves_of_two_processes(
    sagsae: Sagsae, store: Store, train_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with autoencoders of its own, the last wave with too few for both; killed, it goes on in one process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    saes = (*SAES[:2], sae_config(arch="abs-topk", d_sae=48, k=6))
    config = train_config(saes=saes, streams=8, window_rows=524_288)
    room = max(room_for(config, sae.name, ranks=2) for sae in saes)
    toml = tmp_path / "run.toml"
    tables = [{key: json.dumps(value) for key, value in sae.model_dump(exclude_none=True).items()} for sae in saes]
    text = "".join("[[saes]]\n" + "".join(f"{key} = {value}\n" for key, value in table.items()) for table in tables)
    toml.write_text(f'store = "{store.root}"\nhook = "mlp_out"\n{text}')
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))

    def command(out: Path, tokens: int, *more: Any) -> list[Any]:
        return ["train", "--config", toml, "--batch", "64", "--tokens", tokens, "--device", "cpu", "--set",
                "checkpoint_every=50", "--set", "log_every=10", "--json", "--out", out, *more]  # fmt: skip

    sweep = ["--processes", "2", "--parallel", "sweep", "--set", f"memory={room}"]
    for done in (sagsae(*command(one, 64 * 120)), sagsae(*command(two, 64 * 120, *sweep))):
        assert done.returncode == 0, done.stderr
    assert [len(wave) for wave in waves_of(two)] == [2, 1]
    assert "of CPU memory per process" in done.stderr
    killed = sagsae(
        *command(both, 64 * 120, *sweep[-2:]),
        stop=(signal.SIGKILL, lambda: any(both.glob("checkpoints/step-00000170"))),
    )
    assert killed.returncode == -signal.SIGKILL
    done = sagsae(*command(both, 64 * 120, "--processes", "2", "--parallel", "sweep"))
    assert done.returncode == 0, done.stderr
    assert len(waves_of(both)) == 3, "planned by one process"
    for run in (two, both):
        assert weights_of(run) == weights_of(one)
        assert by_name(run) == by_name(one)
        assert json.loads((run / "evaluation.json").read_text()) == json.loads((one / "evaluation.json").read_text())


def test_what_was_logged_of_dead_latents(tmp_path: Path) -> None:
    """The last line of each wave; lines of before there were waves count as one."""
    lines = [
        {"wave": wave, "step": step, "tokens": 10 * step, "saes": {name: {"dead_fraction": step / 10}}}
        for wave, name in ((1, "a"), (2, "b"))
        for step in (1, 2)
    ]
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {"fraction": 0.2, "tokens": 15}
    assert last_logged_inactive(folder, 15) == {"a": expected, "b": expected}
    folder.cut_metrics(2, 1)
    assert [json.loads(line)["wave"] for line in folder.metrics.read_text().splitlines()] == [1, 1, 2]
    folder.cut_metrics(1, 1)
    assert len(folder.metrics.read_text().splitlines()) == 1


def test_the_reader_takes_what_it_lays_out(train_config: Config) -> None:
    """Windows of a small store and of a large one. A process that shares batches has those of the streams it reads."""
    for window_rows, ranks in ((256, 1), (1024, 1), (1024, 2), (524_288, 1), (524_288, 4)):
        job = make_job(train_config(window_rows=window_rows), CPU)
        streams = most_streams(64, job.streams, ranks)
        assert streams == job.streams // ranks
        laid = laid_out(job, [stream for stream, _, _ in share(64, job.streams, ranks - 1, ranks)])
        rows = 64 // ranks
        assert reader_bytes(job, rows, streams) - laid == pytest.approx(rows * 32 * 10 + laid / (2 * 32) * 4, rel=0.01)


def laid_out(job: TrainJob, streams: Sequence[int]) -> int:
    from train.data.loader import Loader

    loader = Loader(job.passes, streams, "off", CPU, 1)
    memory = loader.prepare(job.passes.get(0))
    loader.close()
    return memory.data.numel() * memory.data.element_size()


def test_memory_is_kept_only_where_there_is_plenty(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept has holes, of which the estimate knows nothing."""
    kept: list[torch.device] = []
    monkeypatch.setattr("train.plan.waves.reuse_memory", kept.append)
    job = make_job(train_config(), CPU)
    at = circumstances(job, False, 1)
    need = together(needs_of(job.config, at).values(), reader_bytes(job, at.rows, job.streams)).total
    for times, calls in ((1.1, 0), (2.4, 0), (2.6, 1)):
        plan_waves(make_job(train_config(memory=int(times * need)), CPU), Ranks(CPU), False)
        assert len(kept) == calls, times
