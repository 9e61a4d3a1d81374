"""The sample tables of an MP4 or MOV file (ISO/IEC 14496-12, 8.6 and 8.7): when each frame is decoded and shown.

They stand together in the file's header, so that an hour of film is indexed without a pass over its
packets. Only tables that say all of it plainly are taken. Nothing here is believed by itself: what
FFmpeg says of the same frames is held beside it (index.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .containers import Chunk, StormVideoError, box_header, tiles

# The box whose content starts with version and flags, 4 bytes, and a 32-bit number of entries.
_HEAD = 8

# Times of showing that are farther than this from those of decoding are errors, and FFmpeg leaves them all out.
_LARGE = 1 << 28


class Samples(NamedTuple):
    """Frames of one track in the order of decoding; times in the track's unit, from any zero."""

    dts: NDArray[np.int64]
    pts: NDArray[np.int64]
    key: NDArray[np.bool_]
    last: int  # how long the one that is shown last is shown


def samples(name: str, file: BinaryIO, track: int, count: int) -> Samples | None:
    """Of the track whose number is ``track``; None if it is not there, if its header does not list ``count`` frames,
    if some are empty or past the end of the file, if an edit list does more than shift it, or if times run backwards.
    """
    try:
        for box in _inside(name, file, Chunk(b"", 0, file.seek(0, 2)), b"moov"):
            for trak in _inside(name, file, box, b"trak"):
                if _number(name, file, trak) == track:
                    return _samples(name, file, trak, count)
    except (StormVideoError, OSError, ValueError, IndexError):
        return None  # FFmpeg may read it all the same, packet by packet
    return None


def _samples(name: str, file: BinaryIO, trak: Chunk, count: int) -> Samples | None:
    if not _edits_only_shift(name, file, trak):
        return None
    boxes = {}
    for kind in (b"stsz", b"stts", b"ctts", b"stss", b"stsc", b"stco", b"co64"):
        table = next(_inside(name, file, trak, b"mdia", b"minf", b"stbl", kind), None)
        boxes[kind] = None if table is None else _content(file, table)
    sizes, steps = boxes[b"stsz"], boxes[b"stts"]
    if sizes is None or steps is None:
        return None
    same, listed = np.frombuffer(sizes[4:12], ">u4").tolist()
    if listed != count:
        return None
    lengths = np.full(count, same) if same else np.frombuffer(sizes[12:], ">u4", count).astype(np.int64)
    if not lengths.all() or not _are_there(boxes, lengths, file.seek(0, 2)):
        return None
    durations = _runs(steps, count)
    offsets = np.zeros(count, np.int64) if boxes[b"ctts"] is None else _runs(boxes[b"ctts"], count)
    if durations is None or offsets is None or (durations <= 0).any() or (np.abs(offsets) > _LARGE).any():
        return None
    dts = np.cumsum(durations) - durations
    key = np.ones(count, bool)
    if boxes[b"stss"] is not None:
        numbers = np.frombuffer(boxes[b"stss"][_HEAD:], ">u4").astype(np.int64) - 1
        if not numbers.size or numbers.min() < 0 or numbers.max() >= count:
            return None
        key = np.zeros(count, bool)
        key[numbers] = True
    pts = dts + offsets
    return Samples(dts, pts, key, int(durations[pts.argmax()]))


def _are_there(boxes: dict[bytes, bytes | None], lengths: NDArray[np.int64], end: int) -> bool:
    """Whether the frames, of so many bytes each, lie within a file of ``end`` bytes: chunk by chunk (stsc, 8.7.4)."""
    narrow, wide, runs = boxes[b"stco"], boxes[b"co64"], boxes[b"stsc"]
    if runs is None or (narrow is None) == (wide is None):
        return False
    offsets = np.frombuffer(narrow[_HEAD:], ">u4") if wide is None else np.frombuffer(wide[_HEAD:], ">i8")
    first, held, _ = np.frombuffer(runs[_HEAD:], ">u4").astype(np.int64).reshape(-1, 3).T
    chunks = np.diff(first, append=len(offsets) + 1)
    if first[0] != 1 or (chunks <= 0).any() or (held == 0).any() or (chunks * held).sum() != len(lengths):
        return False
    begins = held.repeat(chunks).cumsum() - held.repeat(chunks)
    return bool((offsets + np.add.reduceat(lengths, begins) <= end).all())


def _runs(content: bytes, count: int) -> NDArray[np.int64] | None:
    """A table of (number of samples, value) pairs as a value for each sample; None if they are not ``count``."""
    pairs = np.frombuffer(content[_HEAD : len(content) - (len(content) - _HEAD) % 8], ">i4").reshape(-1, 2)
    lengths, values = pairs.astype(np.int64).T
    if (lengths < 0).any() or lengths.sum() != count:
        return None
    return values.repeat(lengths)


def _edits_only_shift(name: str, file: BinaryIO, trak: Chunk) -> bool:
    """Whether the edit list (8.6.6) is at most one part of the film at its own speed, with a pause before it."""
    table = next(_inside(name, file, trak, b"edts", b"elst"), None)
    if table is None:
        return True
    content = _content(file, table)
    entry = np.dtype([("length", ">i8"), ("begin", ">i8"), ("rate", ">i4")])
    if content[0] == 0:
        entry = np.dtype([("length", ">i4"), ("begin", ">i4"), ("rate", ">i4")])
    count = int.from_bytes(content[4:_HEAD])
    parts = np.frombuffer(content[_HEAD:], entry, count=min(count, 3))
    return count <= 2 and (parts["begin"] >= 0).sum() <= 1 and bool((parts["rate"] == 1 << 16).all())


def _number(name: str, file: BinaryIO, trak: Chunk) -> int:
    """The track's number (tkhd, 8.3.2); after two times of 4 bytes, or of 8 in version 1."""
    content = b"".join(_content(file, box) for box in _inside(name, file, trak, b"tkhd"))
    at = 20 if content[:1] == b"\1" else 12
    return int.from_bytes(content[at : at + 4])


def _inside(name: str, file: BinaryIO, box: Chunk, *path: bytes) -> Iterator[Chunk]:
    """The boxes at ``path`` within ``box``."""
    for part in tiles(name, file, box.start, box.end, box_header):
        if part.kind == path[0]:
            yield from _inside(name, file, part, *path[1:]) if path[1:] else [part]


def _content(file: BinaryIO, box: Chunk) -> bytes:
    file.seek(box.start)
    return file.read(box.end - box.start)
