"""On CUDA: the same store, the same mathematics, the same resume. Without a GPU these are skipped, with that reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batches
from support.folders import contents
from support.variants import GATED, VARIANTS, batch, by_autograd, gated_family, silences, variant, weights

import train.fit.step_kind
import train.run
from harvest.recode import recode
from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import Interrupted
from shared.saes import SAEConfig, sae_config
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.shard import as_float32
from train.evaluate import evaluate
from train.fit.optim import Optimizer
from train.run import train as run_train
from train.sae.base import StepInputs
from train.sae.families import family
from train.sae.gated import pole, pre_activations
from train.sae.sparse.cpu import open_entries
from train.sae.sparse.open import EntryRoom, UnsummedGradient, has_kernels
from train.sae.sparse.step import sparse_gradients, summed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


CHOICES = 4
"""Blocks that the kernels of sums and of decodings choose from, each."""


@pytest.fixture(autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One choice of blocks, the first unless a test asks for another: to try out which is fastest takes seconds for
    every new length of rows."""
    if has_kernels("cuda"):
        from train.sae.sparse import kernels

        choice = getattr(request, "param", 0)
        for kernel in (kernels.sum_latent, kernels.decode_token):
            assert len(kernel.configs) == CHOICES
            monkeypatch.setattr(kernel, "configs", [kernel.configs[choice]])


def test_a_store_harvested_on_cuda(harvest_config: Callable[..., HarvestConfig], tmp_path: Path) -> None:
    """The same rows in the same places; the numbers differ from a CPU's by rounding only."""
    exact = {"dtype": "float32", "store_dtype": "float32"}
    stores = [Store.open(run_harvest(harvest_config(tmp_path / d, device=d, **exact)).store) for d in ("cpu", "cuda")]
    for array in stores[0].spec.layouts():
        on_cpu, on_cuda = (np.concatenate([read_shard(open_reader(s, array), k) for k in s.commits]) for s in stores)
        np.testing.assert_allclose(on_cuda, on_cpu, rtol=1e-3, atol=1e-3)
    again = run_harvest(harvest_config(tmp_path / "again", device="cuda", **exact)).store
    assert contents(Path(again)) == contents(stores[1].root), "the pinned buffers are never read before they are full"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no bfloat16"
)
def test_bfloat16_on_cuda(harvest_config: Callable[..., HarvestConfig], tmp_path: Path) -> None:
    store = Store.open(run_harvest(harvest_config(tmp_path, device="cuda")).store)
    assert store.spec.model["dtype"] == "bfloat16"
    rows = as_float32(read_shard(open_reader(store, "layer_01/mlp_out"), 3), "bfloat16")
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("codec", ["zstd", "int8"])
def test_windows_on_cuda_give_the_batches_of_a_cpu(store: Store, train_config: Any, tmp_path: Path, codec: str) -> None:
    """Small windows, so that their memory is written to again while gathers from it may still be under way."""
    if codec == "int8":
        store = Store.open(recode(str(store.root), str(tmp_path / "int8"), "int8").store)
    config = train_config(batch=64, streams=4, window_rows=256)
    on_cpu, on_cuda = (
        [batch.cpu() for batch, _ in batches(store, config, 150, device=torch.device(name))] for name in ("cpu", "cuda")
    )
    for one, other in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if codec == "zstd" else 1e-6, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("matmul", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_gradients_on_cuda(name: str, matmul: torch.dtype, tolerance: float) -> None:
    config = variant(name)
    w = weights(config)
    on_device = type(w)(**{key: tensor.cuda() for key, tensor in w.named().items()})
    now = StepInputs(0.3, matmul, silences().cuda())
    found, _ = family(config).gradients(on_device, batch().cuda(), now)
    expected, _ = by_autograd(config, w, batch(), StepInputs(0.3, matmul, silences()))
    for key in w.trained():
        error = (getattr(found, key).cpu() - expected[key]).norm()
        loose = 3 if config.arch == "jumprelu" and key == "theta" else 1
        assert error <= loose * tolerance * expected[key].norm(), key


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "embedding_bag"])
@pytest.mark.parametrize("height", [0.0, 1.0, 2.0, 1e3])
@pytest.mark.parametrize("name", [name for name in GATED if "free" not in name])
def test_the_sparse_step_on_cuda(name: str, height: float, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every gate open to none: latents active on the whole of a batch that is longer than a chunk, odd sizes. With
    numbers that rounding puts on no other side of a threshold: a gate that opens changes a gradient at once."""
    if kernels and not has_kernels("cuda"):
        pytest.skip("triton is not installed here")
    monkeypatch.setattr("train.sae.sparse.step.has_kernels", lambda device, _: kernels and device == "cuda")
    config = variant(name, 37)
    for seed in range(100):
        w, x = weights(config, seed, 133), batch(seed, 301, 133)
        w.theta.mul_(height)
        if margin(config, w, x) > 1e-5:
            break
    else:
        pytest.fail("no numbers with a margin")
    on_device = type(w)(**{key: tensor.cuda() for key, tensor in w.named().items()})
    found, step = sparse_gradients(gated_family(config), on_device, x.cuda(), StepInputs(0.3))
    again, _ = sparse_gradients(gated_family(config), on_device, x.cuda(), StepInputs(0.3))
    expected, loss = by_autograd(config, w, x, StepInputs(0.3))
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for key, grad in found.named().items():
        error = (grad.cpu() - expected[key]).norm() / (expected[key].norm() + 1e-3 * size + 1e-9)
        assert error < 1e-4, (key, error)
    assert step.reconstruction.item() + 0.3 * step.sparsity.item() + step.auxiliary.item() == pytest.approx(
        loss.item(), rel=1e-5
    )
    assert torch.equal(found.W_dec, again.W_dec), "no atomics"
    assert len(open_entries(gated_family(config), on_device, x.cuda() - on_device.b_dec).u) > 0 or height == 1e3


@pytest.mark.parametrize("blocks", range(CHOICES), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("d_in", [133, 2048])
def test_any_blocks_give_the_sums_on_cuda(d_in: int, dtype: torch.dtype) -> None:
    """Segments of no entry, of a few and of more than a chunk; one table and two."""
    if not has_kernels("cuda"):
        pytest.skip("triton is not installed here")
    from train.sae.sparse import kernels

    check_sums(kernels, "cuda", d_in, dtype, 3 * kernels.CHUNK)


def check_sums(kernels: Any, device: str, d_in: int, dtype: torch.dtype, entries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    segment = torch.randint(1, 40, (entries,), generator=generator).sort().values
    segment[entries // 2 :] = 39
    index = torch.randint(0, 50, (entries,), generator=generator)
    table, centred = torch.randn(50, d_in, generator=generator).to(dtype), torch.randn(41, d_in, generator=generator)
    codes = torch.randn(2, entries, generator=generator)
    bounds = torch.searchsorted(segment, torch.arange(42))
    there = [tensor.to(device) for tensor in (index, segment.int(), bounds, codes[0], table)]
    found = kernels.sum_rows(UnsummedGradient(*there))
    dense = torch.zeros(2, 41, 50, dtype=torch.float64)
    for of, code in zip(dense, codes, strict=True):
        of.index_put_((segment, index), code.double(), accumulate=True)
    size = dense.abs() @ table.double().abs()
    assert ((found.cpu() - dense[0] @ table.double()).abs() <= 1e-6 * size[0]).all()
    order = torch.arange(entries - 1, -1, -1, device=device)
    for count in (1, 2):
        decoded = kernels.decode(there[0], order, codes[:count].to(device), there[2], there[4], centred.to(device))
        errors = dense[:count] @ table.double() - centred
        assert ((decoded.error.cpu() - errors[0]).abs() <= 1e-6 * (size[0] + centred.abs())).all()
        assert torch.equal(decoded.low[0], decoded.error.to(dtype))
        torch.testing.assert_close(decoded.squares.cpu().double(), errors.square().sum(2), rtol=1e-5, atol=1e-5)
        for dots, error in zip(decoded.dots, errors, strict=True):
            products = error[segment] * table.double()[index]
            close = 1e-5 if dtype == torch.float32 else 1e-2
            assert ((dots.cpu().flip(0) - products.sum(1)).abs() <= close * products.abs().sum(1)).all()


@pytest.mark.parametrize("matmul", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recorded_steps_on_cuda(matmul: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of steps that are not recorded, for two autoencoders that take turns in the same memory: with other
    batches, λ and weights in every step, more open entries than there was room for, and far fewer."""
    if not has_kernels("cuda"):
        pytest.skip("triton is not installed here")
    from train.sae.sparse import gpu as on_gpu

    monkeypatch.setattr("train.sae.sparse.open.SPARE", 3)
    members = []
    for name in ("untied", "gated"):
        config = variant(name, 37)
        w = weights(config, 0, 133)
        w = type(w)(**{key: tensor.cuda() for key, tensor in w.named().items()})
        members.append((w, Optimizer(w, unit_decoder=True), on_gpu.SparseSteps(family(config), w)))  # type: ignore[arg-type]
    replays = 0
    for number in range(24):
        x, now = batch(number, 301, 133).cuda(), StepInputs(0.1 + 0.01 * number, matmul)
        if number >= 12:
            now = StepInputs(torch.tensor(now.sparsity, device="cuda"), matmul)
        for w, optimizer, steps in members:
            w.theta.mul_({8: 0.3, 16: 8.0}.get(number, 1.0))
            rounded = optimizer.rounded(matmul)
            plain, plain_step = on_gpu.kernel_gradients(steps.family, w, x, now, rounded, EntryRoom(301 * 37))
            expected = summed(plain)
            gradients, step = steps.gradients(x, now, rounded)
            replays += steps.recorded is not None
            found = summed(dict(gradients))
            for key, tensor in expected.items():
                assert torch.equal(found[key], tensor), (number, key)
            for key in ("reconstruction", "sparsity", "auxiliary", "l0", "fired"):
                assert torch.equal(getattr(step, key), getattr(plain_step, key)), (number, key)
            optimizer.step_({key: gradients[key] for key in w.trained()}, 0.01)
    assert 30 <= replays < 48, "all but those after the first and after a change of room"


def margin(config: SAEConfig, w: Any, x: torch.Tensor) -> float:
    """How far the nearest entry is from where its gate, or its ReLU, turns."""
    wide = type(w)(**{key: tensor.double() for key, tensor in w.named().items()})
    u = pre_activations(wide, x.double())
    a, _ = gated_family(config).size(u)
    gate = a - pole(wide.theta, u)
    magnitude = torch.exp(pole(wide.r, u)) * a + pole(wide.b, u)
    return float(torch.minimum(gate.abs(), magnitude.abs()).min())


def test_a_run_on_cuda_switches_to_the_sparse_step(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernels are; it ends where the dense step does. At a share that a small run reaches."""
    monkeypatch.setitem(train.fit.step_kind.SPARSE_BELOW, "cuda", 0.06)
    sae = sae_config(arch="sa-gsae", d_sae=384, sparsity=0.6)
    ends = {}
    for step in ("auto", "dense"):
        out = tmp_path / step
        config = train_config(saes=[sae], step=step, precision="float32", tokens=64 * 300, device="cuda", out=out)
        ends[step] = run_train(config).saes[0]
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["saes"][sae.name]
        assert last["sparse"] == (step == "auto" and has_kernels("cuda"))
    assert ends["auto"]["r2"] == pytest.approx(ends["dense"]["r2"], abs=0.01)


def test_a_run_on_cuda(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close to the CPU's result in float32; learns in bfloat16; goes on after a stop; is evaluated in the model."""
    runs = [
        run_train(train_config(device=device, precision="float32", out=tmp_path / device)) for device in ("cpu", "cuda")
    ]
    devices = [json.loads((run.run / "record.json").read_text())["device"] for run in runs]
    assert [device.split(",")[0] for device in devices] == ["cpu", torch.cuda.get_device_name()]
    for on_cpu, on_cuda in zip(runs[0].saes, runs[1].saes, strict=True):
        assert on_cuda["r2"] == pytest.approx(on_cpu["r2"], abs=1e-3)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(train.run, "agree", lambda *_: next(calls) == 9)
        with pytest.raises(Interrupted):
            run_train(train_config(device="cuda", precision="float32", out=tmp_path / "stopped"))
    stopped = run_train(train_config(device="cuda", precision="float32", out=tmp_path / "stopped"))
    for one, other in zip(stopped.saes, runs[1].saes, strict=True):
        assert one["r2"] == pytest.approx(other["r2"], abs=1e-4)
    parts = run_train(train_config(device="cuda", precision="float32", parts=2, out=tmp_path / "parts"))
    for one, other in zip(parts.saes, runs[1].saes, strict=True):
        assert one["r2"] == pytest.approx(other["r2"], abs=1e-3)
    learned = run_train(train_config(device="cuda", tokens=64 * 300, out=tmp_path / "bf16"))
    results = evaluate(EvalConfig(run=learned.run, device="cuda")).results
    assert all(sae["r2"] > 0.3 and sae["ce_tokens"] > 0 for sae in results["saes"])


@pytest.mark.parametrize("clip", [None, 0.5], ids=["by rows", "clipped"])
@pytest.mark.parametrize("d_in", [133, 20000], ids=["short rows", "rows too long for one program"])
def test_adam_on_cuda_updates_as_on_a_cpu(d_in: int, clip: float | None) -> None:
    """Through saved moments in between; the state has the same names and types."""
    config = variant("untied", 7)
    w = weights(config, 0, d_in)
    w.W_dec /= w.W_dec.norm(dim=1, keepdim=True)
    placed = type(w)(**{key: tensor.cuda() for key, tensor in w.named().items()})
    here, there = Optimizer(w, unit_decoder=True, clip_norm=clip), Optimizer(placed, unit_decoder=True, clip_norm=clip)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        grads = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in w.trained().items()}
        there.step_({name: grad.cuda() for name, grad in grads.items()}, 0.01)
        here.step_({**grads}, 0.01)
        if step == 2:
            again = Optimizer(placed, unit_decoder=True, clip_norm=clip)
            again.load_({name: tensor.cpu() for name, tensor in there.state().items()})  # as a checkpoint has it
            there = again
    for name, tensor in w.named().items():
        torch.testing.assert_close(placed.named()[name].cpu(), tensor, rtol=1e-4, atol=1e-5)
    mine, theirs = here.state(), there.state()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name].cpu(), tensor, rtol=1e-3, atol=1e-6)
