"""The kernels' sources: includes put in, and the layout of the structures that carry their
arguments, read from the sources themselves.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).parent / "src"

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^    (?:const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;")


@cache
def text(name: str) -> str:
    """Source ``name`` (as "scan.cu") with each of our headers put in where it is first included."""
    seen: set[str] = set()

    def put_in(match: re.Match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _INCLUDE.sub(put_in, (FOLDER / match[1]).read_text())

    return _INCLUDE.sub(put_in, (FOLDER / name).read_text()).replace("#pragma once\n", "")


@cache
def _structs(name: str) -> dict[str, tuple[tuple[str, str, int], ...]]:
    """Fields of each structure in source ``name``: (nested structure or "", field, count or 0)."""
    found: dict[str, tuple[tuple[str, str, int], ...]] = {}
    for struct, body in _STRUCT.findall(text(name)):
        fields = []
        for kind, pointer, field, count in (m.groups() for m in map(_FIELD.match, body.splitlines()) if m):
            fields.append(("" if pointer or kind == "int64" else kind, field, int(count or 0)))
        found[struct] = tuple(fields)
    return found


def _flatten(structs: dict, struct: str, values: Mapping) -> list[int]:
    words: list[int] = []
    fields = structs[struct]
    if values.keys() != {field for _, field, _ in fields}:
        raise TypeError(f"{struct} has the fields {sorted(f for _, f, _ in fields)}, got {sorted(values)}")
    for nested, field, count in fields:
        items = list(values[field]) if count else [values[field]]
        if count:
            items += [items[0]] * (count - len(items))  # kernels never look at those past the first ones
        for item in items:
            if nested:
                words += _flatten(structs, nested, item)
            else:
                words.append(item.data_ptr() if isinstance(item, Tensor) else int(item or 0))
    return words


def pack(name: str, struct: str, values: Mapping) -> ctypes.Array:
    """``values`` as structure ``struct`` of source ``name``: every field is 8 bytes, a tensor its address, None zero.

    Raises TypeError, naming them, if the fields are not exactly those of the structure.
    """
    words = _flatten(_structs(name), struct, values)
    return (ctypes.c_int64 * len(words))(*words)
