"""Packs arrays of numbers into a script: sagsae.NAME("…"), with gzip in base64.

The content is a JSON header and the bytes of each array. The header lists every array's name, type and length.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

TYPES: Final = {"<f2", "<f4", "<f8", "<u4", "<u2", "|u1", "|i1", "<i2"}
"""Types that train/features/site/js/data.js reads."""
LEVEL: Final = 7
"""The level of gzip."""


def packed(call: str, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Returns a script that calls `sagsae.<call>` with the header's content and the arrays."""
    parts, listed = [], []
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        kind = flat.dtype.newbyteorder("<").str
        if kind not in TYPES:
            raise TypeError(f"{name}: {kind} cannot be packed")
        listed.append([name, kind[1:], len(flat)])
        parts.append(flat.astype(flat.dtype.newbyteorder("<")).tobytes())
    head = json.dumps({**about, "arrays": listed}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    content = b"".join([len(head).to_bytes(4, "little"), head, *parts])
    text = base64.b64encode(gzip.compress(content, LEVEL, mtime=0)).decode()
    return f'sagsae.{call}("{text}")\n'.encode()


def smallest(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers as u1, u2 or u4, whichever is large enough."""
    most = int(values.max(initial=0))
    kind = np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32
    return values.astype(kind)


def half(values: NDArray[Any]) -> NDArray[np.float16]:
    """Numbers to three digits; those beyond the range of float16 are cut to its ends."""
    halves: NDArray[np.float16] = np.clip(np.nan_to_num(values), -65504, 65504).astype(np.float16)
    return halves
