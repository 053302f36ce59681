"""Hostile blosc buffers between pages that may not be touched: for tests/faults/test_fuzz_stores.py.

As a script (`python guarded.py CODEC SEED CASES`) it decodes buffers with altered headers, block starts, lengths of
streams and bytes. The payload ends where the next page is forbidden, or begins after a forbidden one, and so does the
memory that is decoded into: one byte read or written outside ends the process. What is accepted is decoded twice,
into other memory with other rests in it, and has to be the same: nothing of it was left unwritten.
"""

import ctypes
import json
import mmap
import random
import sys
from typing import Any, cast

import numpy as np

from shared.store.shard import BLOSC_HEADER, CodecName, ShardLayout, encode_chunk, unpack

PROT_NONE, PROT_BOTH, PRIVATE, ANONYMOUS, PERTURB = 0, 3, 2, 32, -6
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory with a forbidden page on either side."""

    def __init__(self, size: int) -> None:
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        base = LIBC.mmap(None, size + 2 * mmap.PAGESIZE, PROT_NONE, PRIVATE | ANONYMOUS, -1, 0)
        assert LIBC.mprotect(base + mmap.PAGESIZE, size, PROT_BOTH) == 0
        self.bytes = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(base + mmap.PAGESIZE))

    def place(self, size: int, end: bool) -> np.ndarray:
        return self.bytes[len(self.bytes) - size :] if end else self.bytes[:size]


def layouts(codec: CodecName) -> list[tuple[ShardLayout, bytes]]:
    """Buffers to begin with: of one block and of several, stored and compressed, of each item size."""
    rng, found = np.random.default_rng(0), []
    for rows, width, dtype in ((64, 8, "<u2"), (3, 1, "<u2"), (32, 7, "<f4"), (1000, 1, "<u4"), (330, 1024, "<u2")):
        for words in (rng.integers(0, 256, (rows, width * 4)), np.arange(rows * width * 4) // 64):
            kind = np.dtype(dtype)
            values = words.astype("u1").reshape(-1)[: rows * width * kind.itemsize].view(kind).reshape(rows, width)
            layout = ShardLayout(rows, 1, (width,), kind, codec, 0)
            found.append((layout, encode_chunk(np.ascontiguousarray(values), codec)))
    return found


def altered(rng: random.Random, data: bytes) -> bytes:
    """One to three changes in one of the places that decoders believe."""
    changed, header = bytearray(data), BLOSC_HEADER.size
    blocks = max(1, -(-int.from_bytes(data[4:8], "little") // max(1, int.from_bytes(data[8:12], "little"))))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if len(changed) < 32:
            break
        start = header + 4 * rng.randrange(min(blocks, 8))
        stream = int.from_bytes(changed[start : start + 4], "little") % (len(changed) - 4)
        at = rng.choice([0, 1, 2, 2, 2, 3, 4, 8, 8, 12, start, start, stream, stream, rng.randrange(len(changed) - 4)])
        size = 1 if at < 4 else rng.choice([1, 4, 4])
        near = int.from_bytes(changed[at : at + 4], "little") + rng.choice([-4, -1, 1, 2, 4, 16])
        word = rng.choice([0, 1, 7, 15, 16, len(data), 2**31 - 1, 2**31, 2**32 - 1, near, rng.getrandbits(32)])
        changed[at : at + size] = (word % 2**32).to_bytes(4, "little")[:size]
    if rng.random() < 0.15:
        del changed[rng.randrange(len(changed)) :]
    if rng.random() < 0.3 and len(changed) >= header:  # the header agrees with the length again
        changed[12:16] = len(changed).to_bytes(4, "little")
    return bytes(changed)


def fuzz(codec: CodecName, seed: int, cases: int) -> dict[str, Any]:
    given = layouts(codec)
    source, targets = Guarded(4 << 20), [Guarded(4 << 20), Guarded(4 << 20)]
    counts = {"refused": 0, "accepted": 0, "unwritten": 0}
    for case in range(cases):
        rng = random.Random(seed * 1_000_003 + case)
        layout, good = rng.choice(given if case % 16 == 0 else given[:-2])
        data = altered(rng, good)
        payload = source.place(len(data), rng.random() < 0.7)
        payload[:] = np.frombuffer(data, np.uint8)
        outs, end = [], rng.random() < 0.7
        size = layout.chunk_rows * layout.row_shape[0] * layout.dtype.itemsize
        try:
            for target, rest in zip(targets, (0x55, 0xAA), strict=True):
                LIBC.mallopt(PERTURB, rest)
                out = target.place(size, end).view(layout.dtype).reshape(layout.chunk_shape)
                out.view(np.uint8)[:] = rest
                unpack(memoryview(payload.data), layout, out)
                outs.append(out)
        except (ValueError, RuntimeError):
            counts["refused"] += 1
            continue
        counts["accepted" if outs[0].tobytes() == outs[1].tobytes() else "unwritten"] += 1
    return counts


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fuzz(cast(CodecName, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
