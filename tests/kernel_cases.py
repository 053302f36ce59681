"""The Triton kernels on CPU tensors. Only Triton's interpreter runs these, which has to be asked for before Triton is
imported: `TRITON_INTERPRET=1 python -m pytest tests/kernel_cases.py`, as `test_kernels.py` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import batch, by_autograd, variant, weights

from train.sae import entries, family, kernels
from train.sae.adam import adam_rows_
from train.sae.base import Now
from train.sae.sparse import open_entries, sparse_gradients

FEW = settings(max_examples=4, deadline=None, derandomize=True)
SHAPES = {
    "entries": st.sampled_from([0, 1, 2, 17, 60, 131]), "segments": st.sampled_from([1, 2, 9]),
    "height": st.integers(1, 9), "d_in": st.sampled_from([1, 2, 15, 16, 17, 33]), "seed": st.integers(0, 999),
}  # fmt: skip
BLOCKS = [(1, 16), (2, 8), (8, 32), (32, 64)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A row of a few numbers then has several blocks of columns, and a few entries several blocks of entries."""

    def use(entries: int, columns: int) -> None:
        config = triton.Config({"BLOCK_N": entries, "BLOCK_D": columns})
        for kernel in (kernels.sum_pieces, kernels.dot_entries):
            monkeypatch.setattr(kernel, "configs", [config])

    use(4, 16)
    return use


def numbers(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(*shape, generator=generator)


def summed(segment: Tensor, index: Tensor, segments: int, weight: Tensor, rows: Tensor) -> Tensor:
    """By a dense product in float64."""
    dense = torch.zeros(segments, len(rows), dtype=torch.float64)
    return dense.index_put_((segment, index), weight.double(), accumulate=True) @ rows.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tables", ["one", "the same twice", "two"])
@FEW
@example(entries=0, segments=3, height=2, d_in=5, seed=0, chunk=4, one_segment=False)
@example(entries=61, segments=3, height=2, d_in=17, seed=0, chunk=4, one_segment=True)
@given(**SHAPES, chunk=st.sampled_from([1, 4, 5, 256]), one_segment=st.booleans())
def test_sums_of_rows(
    dtype: torch.dtype, tables: str, entries: int, segments: int, height: int, d_in: int, seed: int, chunk: int,
    one_segment: bool,
) -> None:  # fmt: skip
    """Empty segments, one that holds every entry, chunks of one entry; rows of any length."""
    generator, normal = numbers(seed)
    index = torch.randint(0, height, (entries,), generator=generator)
    segment = torch.randint(0, segments, (entries,), generator=generator).sort().values
    if one_segment:
        segment.fill_(segments - 1)
    bounds = torch.searchsorted(segment, torch.arange(segments + 1))
    rows = [normal(height, d_in).to(dtype)] * (1 if tables == "one" else 2)
    if tables == "two":
        rows[1] = normal(height, d_in).to(dtype)
    factors = [normal(entries) for _ in rows]
    found = kernels.sum_rows(index, bounds, factors, rows, chunk)
    assert len(found) == len(rows)
    for out, factor, table in zip(found, factors, rows, strict=True):
        assert out.dtype == torch.float32
        size = summed(segment, index, segments, factor.abs(), table.abs())
        error = (out - summed(segment, index, segments, factor, table)).abs()
        assert (error <= 1e-6 * size).all(), (error / size).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2])
@FEW
@example(entries=0, segments=3, height=2, d_in=5, seed=0)
@example(entries=61, segments=3, height=2, d_in=17, seed=0)
@given(**SHAPES)
def test_dots_of_rows(
    dtype: torch.dtype, count: int, entries: int, segments: int, height: int, d_in: int, seed: int
) -> None:
    """Each in its own entry's place, whatever the order of work."""
    generator, normal = numbers(seed)
    token = torch.randint(0, segments, (entries,), generator=generator)
    latent = torch.randint(0, height, (entries,), generator=generator)
    order = torch.argsort(token, stable=True)
    tokens, latents = [normal(segments, d_in) for _ in range(count)], normal(height, d_in).to(dtype)
    found = kernels.dot_rows(order, token, latent, tokens, latents)
    assert len(found) == count
    for out, table in zip(found, tokens, strict=True):
        products = table[token].double() * latents[latent].double()
        assert ((out - products.sum(1)).abs() <= 1e-6 * products.abs().sum(1)).all()


@pytest.mark.parametrize(("entries", "columns"), BLOCKS)
def test_any_block_gives_the_sums(small_blocks: Any, entries: int, columns: int) -> None:
    """Strided rows and weights too; and the same block the same bits."""
    small_blocks(entries, columns)
    generator, normal = numbers(3)
    index, token = (torch.randint(0, 7, (40,), generator=generator).sort().values for _ in range(2))
    bounds = torch.searchsorted(token, torch.arange(8))
    rows, factor = normal(20, 7).T, normal(40, 2)[:, 0]
    (once,) = kernels.sum_rows(index, bounds, [factor], [rows], 4)
    torch.testing.assert_close(once.double(), summed(token, index, 7, factor, rows), rtol=1e-5, atol=1e-5)
    (again,) = kernels.sum_rows(index, bounds, [factor], [rows], 4)
    assert torch.equal(once, again)
    (dots,) = kernels.dot_rows(torch.arange(40), token, index, [rows], rows)
    torch.testing.assert_close(
        dots.double(), (rows[token].double() * rows[index].double()).sum(1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("lengths", [[0, 0], [5], [0, 130, 0, 1], [64, 65, 63, 128], [3] * 20])
def test_no_entry_is_left_out_or_taken_twice(lengths: list[int], chunk: int) -> None:
    """By the chunks alone: programs have disjoint entries, sums of chunks places of their own, within what is kept."""
    length = torch.tensor(lengths)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    entries, programs = int(bounds[-1]), len(lengths) + int(bounds[-1]) // chunk
    segment, first, slot = kernels.pieces(bounds, chunk, programs)
    taken: list[int] = []
    kept: list[int] = []
    for program, which in enumerate(segment.tolist()):
        if which == len(lengths):
            continue
        begin = int(bounds[which]) + (program - int(first[which])) * chunk
        taken += range(begin, min(begin + chunk, int(bounds[which + 1])))
        if lengths[which] > chunk:
            kept.append(int(slot[which]) + program - int(first[which]))
    assert taken == list(range(entries))
    assert kept == list(range(len(kept)))
    assert len(kept) <= 2 * entries // chunk
    assert set(segment.tolist()) >= set(range(len(lengths))), "every segment is written, the empty ones too"


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sparse step by the kernels, with chunks of five entries; fills with the names of those that were used."""
    used: list[str] = []

    def spy(name: str, *defaults: int) -> Callable[..., Any]:
        function = getattr(kernels, name)

        def call(*arguments: Any) -> Any:
            used.append(name)
            return function(*arguments, *defaults)

        return call

    monkeypatch.setattr("train.sae.sparse.has_kernels", lambda device: device == "cpu")
    spies = {"sum_rows": spy("sum_rows", 5), "dot_rows": spy("dot_rows")}
    for name, function in spies.items():
        monkeypatch.setattr(kernels, name, function)
    return used


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02, 0.0])
@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied", "one-sided", "untied, no aux", "gated"])
def test_a_whole_step_equals_autograd(on_kernels: list[str], name: str, share: float) -> None:
    """In float64, from every gate open to none, with odd sizes throughout."""
    config = variant(name, 13)
    w, x = weights(config, 5, 19), batch(5, 11, 19)
    size, _ = family(config).size((x - w.b_dec) @ w.W_enc.T)
    opened = round(share * size.numel())
    edge = torch.cat([size.flatten().sort(descending=True).values, size.min()[None] - 1])
    edge = torch.cat([edge[:1] + 1, edge])
    w.theta.fill_(float(edge[opened] + edge[opened + 1]) / 2)
    assert len(open_entries(family(config), w, x - w.b_dec).u) == opened
    check_step(config, w, x)
    assert on_kernels == ["sum_rows", "dot_rows", "sum_rows"], "main and auxiliary, W_enc and W_dec in one launch each"


@pytest.mark.parametrize("name", ["sa-gsae", "gated"])
def test_one_latent_that_is_active_on_the_whole_batch(on_kernels: list[str], name: str) -> None:
    config = variant(name, 13)
    w, x = weights(config, 2, 19), batch(2, 23, 19)
    w.theta.fill_(1e3)
    w.theta[:, 11] = 0.0 if name == "sa-gsae" else -1e3
    latent = open_entries(family(config), w, x - w.b_dec).latent
    assert latent.tolist() == [11] * 23
    check_step(config, w, x)
    assert on_kernels


def check_step(config: Any, w: Any, x: Tensor) -> None:
    found, step = sparse_gradients(family(config), w, x, Now(0.3))
    expected, loss = by_autograd(config, w, x, Now(0.3))
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
                expected /= expected.norm(dim=1, keepdim=True)
        adam_rows_(matrix, grad, m, v, lr, step, unit)
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
    monkeypatch.setattr(entries, "BLOCK_TOKENS", 8)
    _, normal = numbers(2)
    u, theta = normal(9, 21).to(dtype), (normal(poles, 14).abs() * height)[:, 3:12]
    lower = theta[-1][:, None]
    wanted = (u.float() > theta[0][:, None]) | ((u.float() < -lower) & signed)
    latent, token, value = entries.find_open(u, theta, signed)
    found = torch.zeros_like(wanted).index_put_((latent.long(), token.long()), torch.tensor(True))
    assert torch.equal(found, wanted)
    assert torch.equal(value, u.float()[wanted])
    assert latent.dtype == token.dtype == torch.int32
