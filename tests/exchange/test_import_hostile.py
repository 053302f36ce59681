"""Files of weights that somebody made to harm: each is one UserError, in little memory, and none of its code runs."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.command import ROOT
from support.exchange import SCALE, check_equal, rows, saelens_says, save
from support.foreign import saes as foreign
from support.variants import D_SAE

import train
from shared.errors import UserError
from shared.schemas.exchange import ExportConfig, ImportConfig
from train.exchange import tensors
from train.exchange.bring import bring
from train.exchange.export import export
from train.exchange.readers.saelens import VECTORS
from train.exchange.tensors import read_json, read_npz, read_pickled, read_safetensors

NOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500
    return message


def read_or_refused(source: Path) -> None:
    """Imports it; a UserError is one line. Anything else fails."""
    message = ""
    try:
        bring(ImportConfig(source=source, out=source.parent / "out", overwrite=True))
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 700


# safetensors


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 63).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        header(w=entry([1 << 39, 1 << 39], 0, 8)) + b"\0" * 8,
        header(w=entry([2], 0, 8)) + b"\0" * 4,
        header(w=entry([2], 0, 8)) + b"\0" * 12,
        header(w=entry([2], 4, 12)) + b"\0" * 12,
        header(w=entry([2], 0, 8), v=entry([2], 4, 12)) + b"\0" * 12,
        header(w=entry([-2], 0, 8)) + b"\0" * 8,
        header(w=entry([2.0], 0, 8)) + b"\0" * 8,
        header(w=entry([True, 2], 0, 8)) + b"\0" * 8,
        header(w=entry([1] * 5, 0, 4)) + b"\0" * 4,
        header(w=entry([2], 0, 8, "F8_E4M3")) + b"\0" * 8,
        header(w={"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(w=[]),
        (2).to_bytes(8, "little") + b"[]",
        (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20),
        (9).to_bytes(8, "little") + b'{"a":NaN}',
    ],
    ids=range(19),
)
def test_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    refusal(read_safetensors, tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["gated", "bijumprelu"])
@NOW
@given(data=st.data())
def test_a_damaged_folder_is_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Bytes of the weights changed, or the end cut off."""
    folder = tmp_path / "theirs"
    if kind == "gated":
        foreign.saelens(folder, kind)
    else:
        save(tmp_path / "sae", "untied")
        config = {"source": tmp_path / "sae", "to": "saelens", "form": kind, "out": folder, "overwrite": True}
        export(ExportConfig.model_validate(config))
    path = folder / "sae_weights.safetensors"
    good = path.read_bytes()
    changed = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for place in data.draw(st.lists(st.integers(0, 600), max_size=4)):
        if place < len(changed):
            changed[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(changed))
    read_or_refused(folder)


def test_any_bijumprelu_is_refused_or_computes_what_its_file_says(tmp_path: Path) -> None:
    """Numbers of any size and sign, which no autoencoder of ours would have."""
    save(tmp_path / "sae", "untied")
    export(ExportConfig(source=tmp_path / "sae", to="saelens", form="bijumprelu", out=tmp_path / "theirs"))
    path, x, refused = tmp_path / "theirs/sae_weights.safetensors", rows(256), list[str]()
    good = load_file(path)
    for seed in range(D_SAE):
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: SCALE * torch.randn(D_SAE, generator=generator) for name in VECTORS["bijumprelu"]}
        drawn |= {name: 3 * drawn[name].abs() for name in ("threshold_pos", "threshold_neg")}
        drawn["slope_neg"] = torch.exp(drawn["slope_neg"] / SCALE) - 0.1
        changed = {name: torch.where(torch.arange(D_SAE) == seed, drawn[name], good[name]) for name in drawn}
        save_file({**good, **changed}, path)
        try:
            bring(ImportConfig(source=path.parent, out=tmp_path / "out", overwrite=True))
        except UserError as error:
            refused.append(str(error))
        else:
            check_equal(train.load(tmp_path / "out"), x, saelens_says(path.parent, x.double().numpy()))
    assert 10 <= len(refused) <= 30
    assert all(re.search("slope_neg from|a pole would|both poles", message) for message in refused)


# JSON


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = {
    "saelens": "architecture d_in d_sae apply_b_dec_to_input normalize_activations metadata activation_fn_str k "
    "finetuning_scaling_factor rescale_acts_by_decoder_norm model_name hook_name context_size prepend_bos sagsae",
    "dictionary_learning": "trainer buffer sagsae",
    "sparsify": "transcode skip_connection activation k d_in num_latents signed",
    "llamascopium": "sae_type hook_point_in hook_point_out use_glu_encoder norm_activation act_fn top_k "
    "use_decoder_bias sparsity_include_decoder_norm",
}


@pytest.mark.parametrize("tool", MEMBERS)
@NOW
@given(data=st.data())
def test_settings_of_any_shape(tmp_path: Path, tool: str, data: st.DataObject) -> None:
    """Every member may be anything: it is read or refused by name."""
    folder = tmp_path / "theirs"
    kinds = {"saelens": ("topk",), "dictionary_learning": ("AutoEncoder",), "sparsify": (), "llamascopium": ("topk",)}
    getattr(foreign, tool)(folder, *kinds[tool])
    path = folder / ("config.json" if tool in ("dictionary_learning", "llamascopium") else "cfg.json")
    cfg = json.loads(path.read_text())
    for name in data.draw(st.lists(st.sampled_from(MEMBERS[tool].split()), min_size=1, max_size=3)):
        metadata = cfg.get("metadata")
        inside = metadata if name == "sagsae" and isinstance(metadata, dict) else cfg
        inside[name] = data.draw(JSON)
    path.write_text(json.dumps(cfg))
    read_or_refused(folder)


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)
def test_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "cfg.json").write_text(text)
    refusal(read_json, tmp_path / "cfg.json")


# .npz


def npz(path: Path, names: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return path


def npy(array: Any, **header: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    data = file.getvalue()
    for old, new in header.items():
        data = data.replace(old.encode(), str(new).encode().ljust(len(old)))
    return data


def with_shape(shape: str) -> bytes:
    """An .npy of 4 numbers that says it has another shape, its header as long as it says."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array([{"a": 1}], dtype=object)), "has Python objects in 'w.npy'"),
        (npy(np.array(["text"])), "in the type '<U4'"),
        (npy(np.ones(3, complex)), "in the type 'complex128'"),
        (npy(np.zeros(3, [("a", "f4")])), "in the type"),
        (with_shape("(1099511627776,)"), "another length than its header says"),
        (with_shape("(1 << 40,)"), "is not an array of NumPy"),
        (with_shape("(-4,)"), "another length"),
        (with_shape("(4, 9223372036854775807)"), "another length"),
        (with_shape("(__import__('os').system('touch ran'),)"), "is not an array of NumPy"),
        (with_shape("(5,)"), "another length"),
        (with_shape("(0,)"), "another length"),
        (b"\x93NUMPY\x03\x00" + b"\0" * 40, "is not an array of NumPy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"\0" * 40, "is not an array of NumPy"),
        (pickle.dumps({"w": 1}), "is not an array of NumPy"),
        (b"", "is not an array of NumPy"),
    ],
)
def test_npz(tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(read_npz, npz(tmp_path / "params.npz", {"w.npy": content}))
    assert not (tmp_path / "ran").exists()


def test_an_npz_that_unpacks_to_much_more_than_it_is(tmp_path: Path) -> None:
    path = npz(tmp_path / "params.npz", {"w.npy": npy(np.zeros(1 << 24, np.float32))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 17
    assert "says that it unpacks to 67,1" in refusal(read_npz, path)


def test_an_npz_whose_directory_lies(tmp_path: Path) -> None:
    """The sizes in the directory decide what is allocated; a stream that is longer or shorter is refused."""
    good = npz(tmp_path / "params.npz", {"w.npy": npy(np.arange(1000, dtype=np.float32))}, zipfile.ZIP_DEFLATED)
    data = bytearray(good.read_bytes())
    place = data.rfind(b"PK\x01\x02") + 24  # the length of the first file, in the directory
    for length in (64, 128, 4000, 5000, 100_000, 0xFFFFFFFE):
        data[place : place + 4] = struct.pack("<I", length)
        good.write_bytes(data)
        refusal(read_npz, good)


@NOW
@given(st.data())
def test_a_damaged_npz_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "resid" / "params.npz"
    foreign.gemma_scope(path)
    good = path.read_bytes()
    changed = bytearray(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        if place < len(changed):
            changed[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(changed))
    read_or_refused(path)


def test_archives_with_too_many_files_or_one_twice(tmp_path: Path) -> None:
    one = npy(np.ones(1, np.float32))
    assert "is an archive of 1,025 files" in refusal(
        read_npz, npz(tmp_path / "a.npz", {f"{number}.npy": one for number in range(1025)})
    )
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("w.npy", one)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("w.npy", one)
    assert "has one of them twice" in refusal(read_npz, tmp_path / "b.npz")


def test_big_endian_and_columns_first_are_numbers_too(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4)).astype(">f8")
    np.savez(tmp_path / "a.npz", w=array, v=array.T)
    found = read_npz(tmp_path / "a.npz").tensors
    assert torch.equal(found["w"], torch.arange(12.0, dtype=torch.float64).view(3, 4))
    assert torch.equal(found["v"], found["w"].T)


# .pt


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


class Evaluates:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def with_pickle(path: Path, content: bytes, method: int = zipfile.ZIP_STORED, more: Any = ()) -> Path:
    """A file as torch.save makes it, with another pickle in it."""
    saved(path, {"w": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    return npz(path, {**parts, pickled: content, **dict(more)}, method)


@pytest.mark.parametrize("value", [Runs(), {"w": Runs()}, {"w": torch.ones(2), "x": [Evaluates()]}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_run_code(tmp_path: Path, value: Any, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "ae.pt", value, pickle_protocol=protocol)
    assert "which could run code; only tensors are read" in refusal(read_pickled, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "opcode", [b"cbuiltins\nbytearray\n", b"c_codecs\nencode\n", b"ctorch\ndevice\n", b"ios\nsystem\n"]
)
def test_pickles_that_ask_for_more_than_tensors(tmp_path: Path, opcode: bytes) -> None:
    """torch itself would make a bytearray of any length from these."""
    path = with_pickle(tmp_path / "ae.pt", b"\x80\x02" + opcode + b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.")
    assert "only tensors are read" in refusal(read_pickled, path)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        [torch.ones(3)],
        {1: torch.ones(3)},
        {"w": torch.ones(1).expand(1 << 40)},
        {"w": torch.ones(4).as_strided((1 << 20, 1 << 20), (0, 0))},
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.empty(3, device="meta")},
    ],
    ids=range(7),
)
def test_pickles_of_anything_but_a_table_of_tensors(tmp_path: Path, value: Any) -> None:
    refusal(read_pickled, saved(tmp_path / "ae.pt", value))


def test_what_is_no_file_of_torch_save(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": 1}))
    assert "is not a whole torch.save file" in refusal(read_pickled, tmp_path / "a.pt")
    saved(tmp_path / "b.pt", {"w": torch.ones(3)}, _use_new_zipfile_serialization=False)
    assert "is not a whole torch.save file" in refusal(read_pickled, tmp_path / "b.pt")
    assert "is compressed" in refusal(read_pickled, with_pickle(tmp_path / "c.pt", b"\x80\x02}.", zipfile.ZIP_DEFLATED))
    assert "has no pickle" in refusal(read_pickled, npz(tmp_path / "d.pt", {"a": b"x"}))
    assert "has no pickle" in refusal(read_pickled, with_pickle(tmp_path / "e.pt", b"", more={"x/data.pkl": b""}))
    assert "has a damaged pickle" in refusal(read_pickled, with_pickle(tmp_path / "f.pt", b"\x80\x02X\xff\xff\xff\x7f"))
    assert "cannot be read as a table" in refusal(read_pickled, with_pickle(tmp_path / "g.pt", b"\x80\x02h\x05."))
    deep = b"\x80\x02" + b"]" + b"]a" * 100_000 + b"."
    refusal(read_pickled, with_pickle(tmp_path / "h.pt", deep))


def test_a_tensor_longer_than_what_is_stored(tmp_path: Path) -> None:
    path = saved(tmp_path / "ae.pt", {"w": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        good = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    for longer in (b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f"):  # one byte, two, four
        changed = good.replace(b"cpuq\x06K\x04", b"cpuq\x06" + longer).replace(b"K\x04\x85q\x08", longer + b"\x85q\x08")
        assert changed != good
        refusal(read_pickled, with_pickle(tmp_path / "long.pt", changed))


@NOW
@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "theirs"
    foreign.dictionary_learning(folder, "BatchTopKSAE")
    path = folder / "ae.pt"
    good = path.read_bytes()
    changed = bytearray(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    for place in data.draw(st.lists(st.integers(0, 1500) | st.integers(0, len(good) - 1), max_size=4)):
        if place < len(changed):
            changed[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(changed))
    read_or_refused(folder)


# what is no file


@pytest.mark.parametrize(
    ("read", "name"), [(read_safetensors, "w.safetensors"), (read_npz, "params.npz"), (read_pickled, "ae.pt")]
)
def test_devices_pipes_folders_and_links(tmp_path: Path, read: Callable[[Path], Any], name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    refusal(read, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    refusal(read, path)
    path.unlink()
    path.mkdir()
    refusal(read, path)
    path.rmdir()
    refusal(read, path)
    path.symlink_to(path)
    refusal(read, path)


def test_links_to_files_are_read(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    found = foreign.saelens(tmp_path / "blobs", "standard")
    (tmp_path / "snapshot").mkdir()
    for path in found.place.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    bring(ImportConfig(source=tmp_path / "snapshot", out=tmp_path / "out"))


def test_more_than_the_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte; and one that the free memory does not hold."""
    path = tmp_path / "w.safetensors"
    path.touch()
    os.truncate(path, 1 << 40)
    assert "is no autoencoder" in refusal(read_safetensors, path)
    os.truncate(path, 1 << 30)
    monkeypatch.setattr(tensors, "host_memory", lambda: 1 << 31)
    assert "which take 4 times that while they are read; 2.15 GB are free" in refusal(read_safetensors, path)


LIMITED = """
import resource, sys
from pathlib import Path
from shared.errors import UserError
from train.exchange.tensors import read_npz, read_pickled, read_safetensors
import torch, numpy
read = {"npz": read_npz, "pt": read_pickled, "safetensors": read_safetensors}
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read[name.rpartition(".")[2]](Path(name))
    except UserError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit)
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """Measured in a process of its own: less than 64 MiB more than its libraries take."""
    zeros = npy(np.zeros(1 << 26, np.float32))
    npz(tmp_path / "a.npz", {"w.npy": zeros}, zipfile.ZIP_DEFLATED)
    npz(tmp_path / "b.npz", {"w.npy": with_shape("(1099511627775,)")})
    saved(tmp_path / "c.pt", {"w": torch.ones(4).as_strided((1 << 20, 1 << 20), (0, 0))})
    with_pickle(tmp_path / "d.pt", b"\x80\x02}.", zipfile.ZIP_DEFLATED, {"x/data/9": b"\0" * (1 << 28)})
    with_pickle(tmp_path / "e.pt", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    (tmp_path / "f.safetensors").write_bytes(header(w=entry([1 << 30], 0, 1 << 32)))
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 64 << 20
