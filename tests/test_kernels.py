"""The sparse step's Triton kernels without a GPU: run in Triton's interpreter, compiled but not run for an H100."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from train.member import say_no_triton
from train.sae.sparse import has_kernels

MISSING = importlib.util.find_spec("triton") is None
OLD = not MISSING and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
needs_triton = [
    pytest.mark.skipif(MISSING, reason="triton is not installed; there are wheels for Linux x86_64 only"),
    pytest.mark.skipif(OLD, reason="the interpreter of triton before 3.7 does not work with numpy 2.4"),
]
SIXTEEN_BYTES = r"ld\.global\S*\.v4\.b32"


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not step and not whole_batch", marks=needs_triton, id="sums and dots"),
        pytest.param("step or whole_batch", marks=[*needs_triton, pytest.mark.slow, pytest.mark.deep], id="steps"),
    ],
)
def test_in_the_interpreter(which: str) -> None:
    """tests/kernel_cases.py in a process of its own: the interpreter is all or nothing in one."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_cases.py", "-k", which]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout[-500:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("name", "rows", "own"),
    [
        pytest.param(*case, marks=needs_triton)
        for case in (("sum_pieces", "fp32", True), ("sum_pieces", "bf16", False), ("dot_entries", "fp32", None))
    ],
)
def test_compiles_for_an_h100(
    name: str, rows: str, own: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its largest block: 16-byte loads, no atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that its default will change
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from train.sae import kernels

    kernel = getattr(kernels, name)
    config = kernel.configs[-1]
    constants: dict[str, Any] = {"TWO": True, **config.kwargs}
    constants |= {"CHUNK": kernels.CHUNK, "OWN": own} if own is not None else {}
    tables = dict.fromkeys(("rows", "second_rows", "latents"), f"*{rows}")
    lists = dict.fromkeys(("index", "bounds", "segment", "first", "slot", "order", "token", "latent"), "*i64")
    sizes = dict.fromkeys(("segments", "entries", "d_in"), "i32")
    types = {**tables, **lists, **sizes, **dict.fromkeys(constants, "constexpr")}
    names = kernel.fn.arg_names
    source = ASTSource(
        fn=kernel.fn,
        signature={argument: types.get(argument, "*fp32") for argument in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, key in enumerate(names) if types.get(key) != "constexpr"},
    )
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps})
    code = compiled.asm["ptx"]
    assert ".target sm_90" in code
    assert re.search(SIXTEEN_BYTES, code)
    assert not re.search(r"\b(atom|red)\.", code), "the same blocks give the same bits"
    assert len(compiled.asm["cubin"]) > 1000


TOKENS = {"SIGNED": True, "TWO": True, "BLOCK": 512}
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("adam", "adam_row", {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "UNIT": True, "BLOCK": 2048}),
    ("entries", "count_open", TOKENS),
    ("entries", "write_open", TOKENS),
    ("entries", "read_open", {"BLOCK": 512}),
    ("entries", "code_entries", {**TOKENS, "TWO_R": True}),
    ("entries", "subtract_rows", {"TWO": True, "BLOCK": 1024}),
    ("entries", "finish_latents", {**TOKENS, "AUX": True, "TWO_R": True, "BLOCK": 32}),
    ("kernels", "count_pieces", {"CHUNK": 256, "BLOCK": 256}),
    ("kernels", "place_pieces", {"BLOCK": 256}),
]
INT64 = ("bounds", "order", "count", "kept", "ends", "kept_ends", "segment", "first", "slot")
INT32 = ("counts", "latent", "latents", "tokens", "ordered_latent")


@pytest.mark.parametrize(("module", "name", "constants"), [pytest.param(*case, marks=needs_triton) for case in OTHERS])
def test_the_other_kernels_compile_for_an_h100(
    module: str, name: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the interpreter accepts and the compiler does not: a variable that changes its type."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"train.sae.{module}"), name)
    types = {
        **dict.fromkeys(INT64, "*i64"), **dict.fromkeys(INT32, "*i32"), **dict.fromkeys(("pace", "widen"), "fp32"),
        **dict.fromkeys(("batch", "stride", "entries", "d_sae", "d_in", "segments"), "i32"),
        **dict.fromkeys(("low", "second_low"), "*bf16"), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    if "open" in name:
        types["u"] = "*bf16"
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "*fp32") for argument in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
    )
    code = triton_compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", code), "the same numbers give the same bits"


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    has_kernels.cache_clear()
    say_no_triton.cache_clear()
    yield
    has_kernels.cache_clear()
    say_no_triton.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_cuda_has_no_kernels_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_kernels("cuda")
    for _ in range(2):
        say_no_triton()
    assert capsys.readouterr().err.count("no triton here") == 1


def test_a_cpu_uses_no_kernels() -> None:
    assert not has_kernels("cpu")
