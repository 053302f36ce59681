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
from support.command import ROOT

from train.fit.step_kind import say_no_triton
from train.sae.sparse.open import has_kernels

MISSING = importlib.util.find_spec("triton") is None
OLD = not MISSING and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
needs_triton = [
    pytest.mark.skipif(MISSING, reason="triton is not installed; there are wheels for Linux x86_64 only"),
    pytest.mark.skipif(OLD, reason="the interpreter of triton before 3.7 does not work with numpy 2.4"),
]
SIXTEEN_BYTES = r"ld\.global\S*\.v4\.b32"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not step and not whole_batch", marks=[*needs_triton, pytest.mark.slow], id="sums and dots"),
        pytest.param("step or whole_batch", marks=[*needs_triton, pytest.mark.slow, pytest.mark.deep], id="steps"),
    ],
)
def test_in_the_interpreter(which: str) -> None:
    """tests/sae/kernel_cases.py in a process of its own: the interpreter is all or nothing in one."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/sae/kernel_cases.py",
        "-k",
        which,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=890)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout[-500:]
    assert "skipped" not in done.stdout


ROW = {"BLOCK_N": 8, "BLOCK_D": 2048}
UPDATE = {"CHUNK": 256, "UPDATE": True, "UNIT": True, "COPY": True, "BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8}
TOKENS = {"SIGNED": True, "TWO": True, "BLOCK": 512}
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("adam", "adam_row", {**{k: v for k, v in UPDATE.items() if k not in ("CHUNK", "UPDATE")}, "BLOCK": 2048}),
    ("entries", "count_open", TOKENS),
    ("entries", "write_open", {"BLOCK": 32}),
    ("entries", "read_open", {"BLOCK": 512}),
    ("entries", "code_entries", {**TOKENS, "TWO_R": True}),
    ("entries", "finish_latents", {**TOKENS, "AUX": True, "TWO_R": True, "BLOCK": 32}),
    ("kernels", "decode_token", {**ROW, "TWO": True, "WIDEN": False}),
    ("kernels", "sum_latent", {**ROW, **UPDATE}),
    ("kernels", "sum_latent", {**ROW, **UPDATE, "UPDATE": False, "UNIT": False, "COPY": False}),
    ("kernels", "sum_chunk", {**ROW, "CHUNK": 256}),
    ("kernels", "sum_parts", {**UPDATE, "BLOCK_D": 2048}),
]
INT64 = ("bounds", "order", "longest_first")
INT32 = ("counts", "marks", "latent", "latents", "ordered_latent")
INT16 = ("tokens", "index")


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

    kernel = getattr(importlib.import_module(f"train.sae.sparse.{module}"), name)
    types = {
        **dict.fromkeys(INT64, "*i64"), **dict.fromkeys(INT32, "*i32"), **dict.fromkeys(INT16, "*i16"),
        **dict.fromkeys(("pace", "widen"), "fp32"),
        **dict.fromkeys(("batch", "stride", "d_sae", "d_in", "room", "offset", "height", "words"), "i32"),
        **dict.fromkeys(("low", "copy", "rows", "W_dec"), "*bf16"), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    if "open" in name:
        types["u"] = "*bf16"
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    names = kernel.arg_names
    whole = [at for at, key in enumerate(names) if types.get(key) != "constexpr"] if "BLOCK_D" in constants else []
    source = ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "*fp32") for argument in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at in whole},
    )
    code = triton_compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", code), "the same numbers give the same bits"
    assert not whole or re.search(SIXTEEN_BYTES, code)


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
