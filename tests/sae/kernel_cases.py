"""The Triton kernels on CPU tensors. Only Triton's interpreter runs these, which has to be asked for before Triton is
imported: `TRITON_INTERPRET=1 python -m pytest tests/sae/kernel_cases.py`, as `test_kernels.py` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.variants import batch, by_autograd, gated_family, variant, weights
from torch import Tensor

from train.fit.optim import Optimizer
from train.sae.base import StepInputs
from train.sae.sparse import entries, kernels
from train.sae.sparse import gpu as on_gpu
from train.sae.sparse.adam import AdamUpdate, adam_rows_
from train.sae.sparse.open import EntryRoom, UnsummedGradient
from train.sae.sparse.step import sparse_gradients

FEW = settings(max_examples=4, deadline=None, derandomize=True)
SHAPES = {
    "entries": st.sampled_from([0, 1, 2, 17, 60, 131]), "segments": st.sampled_from([1, 2, 9]),
    "height": st.integers(1, 9), "d_in": st.sampled_from([1, 2, 15, 16, 17, 33]), "seed": st.integers(0, 999),
}  # fmt: skip
BLOCKS = [1, 2, 8, 32]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A few entries then are several blocks."""

    def use(many: int) -> None:
        for kernel in (kernels.sum_latent, kernels.decode_token):
            monkeypatch.setattr(kernel, "configs", [triton.Config({"BLOCK_N": many})])

    use(4)
    return use


def numbers(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(*shape, generator=generator)


def summed(segment: Tensor, index: Tensor, segments: int, weight: Tensor, rows: Tensor) -> Tensor:
    """By a dense product in float64."""
    dense = torch.zeros(segments, len(rows), dtype=torch.float64)
    return dense.index_put_((segment, index), weight.double(), accumulate=True) @ rows.double()


def sum_of(segment: Tensor, index: Tensor, segments: int, weight: Tensor, rows: Tensor) -> UnsummedGradient:
    return UnsummedGradient(index, segment.int(), torch.searchsorted(segment, torch.arange(segments + 1)), weight, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@FEW
@example(entries=0, segments=3, height=2, d_in=5, seed=0, chunk=4, one_segment=False)
@example(entries=61, segments=3, height=2, d_in=17, seed=0, chunk=4, one_segment=True)
@given(**SHAPES, chunk=st.sampled_from([1, 4, 5, 256]), one_segment=st.booleans())
def test_sums_of_rows(
    dtype: torch.dtype, entries: int, segments: int, height: int, d_in: int, seed: int, chunk: int, one_segment: bool
) -> None:
    """Empty segments, one that holds every entry, chunks of one entry; rows of any length."""
    generator, normal = numbers(seed)
    index = torch.randint(0, height, (entries,), generator=generator)
    segment = torch.randint(0, segments, (entries,), generator=generator).sort().values
    if one_segment:
        segment.fill_(segments - 1)
    rows, factor = normal(height, d_in).to(dtype), normal(entries)
    found = kernels.sum_rows(sum_of(segment, index, segments, factor, rows), chunk)
    assert found.dtype == torch.float32
    size = summed(segment, index, segments, factor.abs(), rows.abs())
    error = (found - summed(segment, index, segments, factor, rows)).abs()
    assert (error <= 1e-6 * size).all(), (error / size).max()


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("lengths", [[0, 0], [5], [0, 130, 0, 1], [64, 65, 63, 128], [3] * 20, [4, 3, 7, 3, 6]])
def test_no_entry_is_left_out_or_taken_twice(lengths: list[int], chunk: int) -> None:
    """Segments that begin and end within, at and across the borders of chunks; the lists are longer than what is in
    them."""
    _, normal = numbers(1)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    factor, rows = normal(len(segment)), normal(len(segment) + 1, 3)
    index = torch.arange(len(segment))
    of = sum_of(segment, index, len(lengths), factor, rows)
    spare = torch.full((5,), 2**30, dtype=torch.int32)
    padded = UnsummedGradient(torch.cat([index, spare]), torch.cat([of.latent, spare]), of.bounds,
                 torch.cat([factor, torch.full((5,), torch.nan)]), rows)  # fmt: skip
    wanted = summed(segment, index, len(lengths), factor, rows)
    for found in (kernels.sum_rows(of, chunk), kernels.sum_rows(padded, chunk)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2])
@FEW
@example(entries=0, segments=3, height=2, d_in=5, seed=0)
@example(entries=61, segments=3, height=2, d_in=17, seed=0)
@given(**SHAPES)
def test_decodings(
    dtype: torch.dtype, count: int, entries: int, segments: int, height: int, d_in: int, seed: int
) -> None:
    """Errors, their squares, and each entry's product in its own place."""
    generator, normal = numbers(seed)
    token = torch.randint(0, segments, (entries,), generator=generator).sort().values
    latent = torch.randint(0, height, (entries,), generator=generator)
    order = torch.randperm(entries, generator=generator)
    codes, W_dec, centred = normal(count, entries), normal(height, d_in).to(dtype), normal(segments, d_in)
    bounds = torch.searchsorted(token, torch.arange(segments + 1))
    found = kernels.decode(latent, order, codes, bounds, W_dec, centred)
    for which, code in enumerate(codes):
        error = summed(token, latent, segments, code, W_dec) - centred
        size = summed(token, latent, segments, code.abs(), W_dec.abs()) + centred.abs()
        if which == 0:
            assert ((found.error - error).abs() <= 1e-6 * size).all()
            # on a GPU to the nearest, in the interpreter towards zero
            torch.testing.assert_close(
                found.low[0].float(), found.error, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0
            )
            error = found.low[0].double()
        torch.testing.assert_close(found.squares[which].double(), error.square().sum(1), rtol=2e-2, atol=1e-5)
        products = error[token] * W_dec[latent].double()
        close = 1e-5 if dtype == torch.float32 else 1e-2
        allowed = close * (products.abs().sum(1) + 1e-3)
        assert ((found.dots[which][order] - products.sum(1)).abs() <= allowed).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_any_block_gives_the_sums(small_blocks: Any, block: int) -> None:
    """Strided rows and weights too; and the same block the same bits."""
    small_blocks(block)
    generator, normal = numbers(3)
    index, token = (torch.randint(0, 7, (40,), generator=generator).sort().values for _ in range(2))
    of = sum_of(token, index, 7, normal(40, 2)[:, 0], normal(20, 7).T)
    once = kernels.sum_rows(of, 4)
    torch.testing.assert_close(once.double(), summed(token, index, 7, of.weight, of.rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(once, kernels.sum_rows(of, 4))


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "no copies"])
@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "free rows"])
@pytest.mark.parametrize("chunk", [2, 256])
def test_an_update_by_a_sum_is_adams_by_that_gradient(chunk: int, unit: bool, copies: bool) -> None:
    """Several updates; latents with no entry, with few, and with more than a chunk."""
    generator, normal = numbers(4)
    both = [torch.nn.functional.normalize(normal(6, 17), dim=1) for _ in range(2)]
    both[1].copy_(both[0])
    (m, v), (other_m, other_v) = ([torch.zeros(6, 17) for _ in range(2)] for _ in both)
    copy = torch.zeros(6, 17, dtype=torch.bfloat16) if copies else None
    for step in range(1, 4):
        segment = torch.randint(1, 6, (30,), generator=generator).sort().values
        index = torch.randint(0, 9, (30,), generator=generator)
        of = sum_of(segment, index, 6, normal(30), normal(9, 17))
        kernels.update_(of, AdamUpdate(both[0], m, v, copy, 0.01, step, unit), chunk)
        adam_rows_(kernels.sum_rows(of, chunk), AdamUpdate(both[1], other_m, other_v, None, 0.01, step, unit))
        for found, wanted in zip([both[0], m, v], [both[1], other_m, other_v], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        if copy is not None:
            torch.testing.assert_close(copy.float(), both[0], rtol=2**-7, atol=0)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sparse step by the kernels, with chunks of five entries; fills with the names of those that were used."""
    used: list[str] = []

    def spy(module: Any, name: str, *defaults: int) -> None:
        function = getattr(module, name)

        def call(*arguments: Any) -> Any:
            used.append(name)
            return function(*arguments, *defaults)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr("train.sae.sparse.step.has_kernels", lambda device, _: device == "cpu")
    monkeypatch.setattr("train.fit.optim.has_kernels", lambda device, _: device == "cpu")
    spy(kernels, "sum_rows", 5)
    spy(kernels, "update_", 5)
    spy(on_gpu, "decode")
    return used


def opened(config: Any, w: Any, x: Tensor, room: int = 10_000) -> Any:
    return on_gpu.open_entries(gated_family(config), w.theta, x - w.b_dec, w.W_enc, room)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02, 0.0])
@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied", "one-sided", "untied, no aux", "gated"])
def test_a_whole_step_equals_autograd(on_kernels: list[str], name: str, share: float) -> None:
    """In float64, from every gate open to none, with odd sizes throughout."""
    config = variant(name, 13)
    w, x = weights(config, 5, 19), batch(5, 11, 19)
    size, _ = gated_family(config).size((x - w.b_dec) @ w.W_enc.T)
    many = round(share * size.numel())
    edge = torch.cat([size.flatten().sort(descending=True).values, size.min()[None] - 1])
    edge = torch.cat([edge[:1] + 1, edge])
    w.theta.fill_(float(edge[many] + edge[many + 1]) / 2)
    assert opened(config, w, x)[1].item() == many
    check_step(config, w, x)
    assert on_kernels == ["decode", "sum_rows", "sum_rows"], "main and auxiliary are decoded at once"


@pytest.mark.parametrize("name", ["sa-gsae", "gated"])
def test_one_latent_that_is_active_on_the_whole_batch(on_kernels: list[str], name: str) -> None:
    config = variant(name, 13)
    w, x = weights(config, 2, 19), batch(2, 23, 19)
    w.theta.fill_(1e3)
    w.theta[:, 11] = 0.0 if name == "sa-gsae" else -1e3
    at, count = opened(config, w, x)
    assert at.latent[: count.item()].tolist() == [11] * 23
    check_step(config, w, x)
    assert on_kernels


@pytest.mark.parametrize("block", [13 * 23, 40], ids=["at once", "in blocks"])
def test_room_for_entries_is_found(on_kernels: list[str], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little of it, and far too much: the same bits, and afterwards there is a little more than needed."""
    monkeypatch.setattr(on_gpu, "GPU_BLOCK", block)
    monkeypatch.setattr("train.sae.sparse.open.SPARE", 3)
    config = variant("untied", 13)
    w, x = weights(config, 2, 19), batch(2, 23, 19)
    w.theta.mul_(8)
    wanted: dict[str, Tensor] = {}
    for before in (10_000, 1, 60, 250):
        room = EntryRoom(before)
        gradients, step = on_gpu.kernel_gradients(gated_family(config), w, x, StepInputs(0.3), (w.W_enc, w.W_dec), room)
        count = opened(config, w, x)[1].item()
        assert 60 < count < 250
        assert room.entries == (250 if before == 250 else count + count // 4 + 3)
        found = {"l0": step.l0, "loss": step.reconstruction}
        for name, part in gradients.items():
            found[name] = kernels.sum_rows(part) if isinstance(part, UnsummedGradient) else part
        wanted = wanted or found
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name
    assert on_kernels


def test_steps_that_write_their_own_copies(on_kernels: list[str]) -> None:
    """Updates from sums not taken, by copies kept from step to step, are those from whole gradients."""
    config = variant("untied", 13)
    x = batch(2, 23, 19)
    ends = []
    for kept in (True, False):
        w = weights(config, 2, 19)
        w.W_dec /= w.W_dec.norm(dim=1, keepdim=True)
        optimizer, room = Optimizer(w, unit_decoder=True), EntryRoom()
        for _ in range(3):
            rounded = optimizer.rounded(torch.float16)  # the interpreter cuts bfloat16 off
            now = StepInputs(0.3, torch.float16)
            gradients, _ = on_gpu.kernel_gradients(gated_family(config), w, x, now, rounded, room)
            if not kept:
                gradients = {
                    k: kernels.sum_rows(v) if isinstance(v, UnsummedGradient) else v for k, v in gradients.items()
                }
                optimizer.copies.clear()
            optimizer.step_(gradients, 0.01)
        ends.append(w)
    for name, value in ends[0].named().items():
        torch.testing.assert_close(value, ends[1].named()[name], rtol=1e-5, atol=1e-6)
    assert on_kernels.count("update_") == 6


def check_step(config: Any, w: Any, x: Tensor) -> None:
    found, step = sparse_gradients(gated_family(config), w, x, StepInputs(0.3))
    expected, loss = by_autograd(config, w, x, StepInputs(0.3))
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for key, grad in found.named().items():
        error = (grad - expected[key]).norm() / (expected[key].norm() + 1e-3 * size + 1e-9)
        assert error < 1e-5, (key, error)
    torch.testing.assert_close((step.reconstruction + 0.3 * step.sparsity + step.auxiliary).double(), loss, rtol=1e-5,
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("unit", [True, False], ids=["unit rows", "free rows"])
@pytest.mark.parametrize("d_in", [1, 17, 300, 1024])
def test_adam_by_rows_equals_torchs(d_in: int, unit: bool) -> None:
    """Several updates, with steps of any size."""
    _, normal = numbers(d_in)
    matrix = normal(5, d_in)
    matrix /= matrix.norm(dim=1, keepdim=True)
    expected = torch.nn.Parameter(matrix.double())
    adam = torch.optim.Adam([expected], betas=(0.9, 0.999))
    m, v = torch.zeros_like(matrix), torch.zeros_like(matrix)
    for step, lr in enumerate([0.01, 0.1, 1e-3, 0.3, 0.0], 1):
        grad = normal(5, d_in) * 10.0 ** (1 - step)
        adam.param_groups[0]["lr"] = lr
        with torch.no_grad():
            expected.grad = grad.double()
            if unit:
                expected.grad -= (expected.grad * expected).sum(1, keepdim=True) * expected
            adam.step()
            if unit:
                expected.div_(expected.norm(dim=1, keepdim=True))
        adam_rows_(grad, AdamUpdate(matrix, m, v, None, lr, step, unit))
        state = adam.state[expected]
        for found, wanted in ((matrix, expected), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
            # one number of a unit row has no tangent: what is left of its gradient is rounding, and Adam enlarges it
            if d_in > 1 or not unit:
                torch.testing.assert_close(found.double(), wanted.detach(), rtol=2e-4, atol=1e-5)
    assert not unit or (matrix.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("poles", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("height", [0.0, 0.7, 9.0])
def test_open_entries_are_found_in_order(
    poles: int, signed: bool, dtype: torch.dtype, height: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks of tokens; theta as a view of some latents' columns."""
    monkeypatch.setattr(entries, "BLOCK_TOKENS", 32)
    _, normal = numbers(2)
    u, theta = normal(9, 75).to(dtype), (normal(poles, 14).abs() * height)[:, 3:12]
    lower = theta[-1][:, None]
    wanted = (u.float() > theta[0][:, None]) | ((u.float() < -lower) & signed)
    bounds, room = torch.zeros(10, dtype=torch.int64), int(wanted.sum())
    bounds[0] = 2  # as after other latents
    latent, token = torch.zeros(room + 2, dtype=torch.int32), torch.zeros(room + 2, dtype=torch.int16)
    value = torch.zeros(room + 2)
    entries.write_entries(u, theta, signed, bounds, (latent, token, value), 50)
    found = torch.zeros_like(wanted).index_put_((latent[2:].long() - 50, token[2:].long()), torch.tensor(True))
    assert torch.equal(found, wanted)
    assert torch.equal(value[2:], u.float()[wanted])
    assert torch.equal(bounds[1:] - 2, wanted.sum(1).cumsum(0))
    assert latent[:2].tolist() == token[:2].tolist() == value[:2].tolist() == [0, 0]
