"""Is a video file whole? Decoders play a cut file to where it was cut and call that the end; the
container's own sizes know better.

Three containers say where they end, and are checked to that end: MP4/MOV (ISO/IEC 14496-12),
Matroska/WebM (RFC 9559), AVI (RIFF).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple


class StormVideoError(ValueError):
    """A video file that cannot be read in full; the message names the file and says what is wrong and where."""


class Container(NamedTuple):
    demuxer: str  # FFmpeg's name
    fragments: dict[
        int, int
    ] = {}  # samples of each track that lie in fragments of an MP4, which its header does not count
    blocks: list[int] | None = None  # of each video track of a Matroska file, whose header counts nothing


class Chunk(NamedTuple):
    kind: bytes
    start: int  # first byte of its content
    end: int  # one past the last byte


_REMUX = "remux it, if it is whole: ffmpeg -i IN -c copy OUT.mp4"
_MP4_FIRST = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_MP4_TOP = _MP4_FIRST | {b"moof", b"mfra", b"sidx", b"ssix", b"styp", b"prft", b"emsg", b"meta", b"uuid"}
_IN_MOOF = {b"mfhd", b"traf", b"pssh", b"meta", b"uuid", b"free", b"skip"}
_IN_TRAF = {
    b"tfhd",
    b"tfdt",
    b"trun",
    b"sbgp",
    b"sgpd",
    b"subs",
    b"saiz",
    b"saio",
    b"senc",
    b"meta",
    b"uuid",
    b"free",
    b"skip",
}
_EBML, _SEGMENT, _TRACKS, _CLUSTER = (bytes.fromhex(i) for i in ("1a45dfa3", "18538067", "1654ae6b", "1f43b675"))
_VOID, _CRC = b"\xec", b"\xbf"
# SeekHead, Info, Cues, Attachments, Chapters, Tags
_IN_SEGMENT = {bytes.fromhex(i) for i in ("114d9b74", "1549a966", "1c53bb6b", "1941a469", "1043a770", "1254c367")} | {
    _TRACKS,
    _CLUSTER,
    _VOID,
    _CRC,
}
# Timestamp, SilentTracks, Position, PrevSize, SimpleBlock, BlockGroup
_IN_CLUSTER = {bytes.fromhex(i) for i in ("e7", "5854", "a7", "ab", "a3", "a0")} | {_VOID, _CRC}


def checked_container(path: Path) -> Container:
    """What container the file at ``path`` is, after a check that all of it is there; a StormVideoError otherwise."""
    try:
        if not path.is_file():
            raise StormVideoError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
        size = path.stat().st_size
        if size == 0:
            raise StormVideoError(f"{path}: the file is empty")
        with path.open("rb") as file:
            head = file.read(12)
            if head[4:8] in _MP4_FIRST:
                return Container("mov", fragments=_check_mp4(path, file, size))
            if head[:4] == _EBML:
                return Container("matroska", blocks=_check_matroska(path, file, size))
            if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
                list(_tiles(path, file, 0, size, _riff_header))
                return Container("avi")
    except OSError as error:
        raise StormVideoError(f"{path}: cannot be read: {error.strerror}") from error
    raise StormVideoError(
        f"{path}: not an MP4, MOV, Matroska, WebM or AVI file (it begins with {head.hex(' ')}); "
        "other video formats do not say where they end, "
        f"so a truncated file could not be told from a whole one: {_REMUX}"
    )


def _check_mp4(path: Path, file: BinaryIO, size: int) -> dict[int, int]:
    """Samples of each track in movie fragments; none unless it is fragmented."""
    boxes = list(_tiles(path, file, 0, size, _box_header))
    movie = next((box for box in boxes if box.kind == b"moov"), None)
    if movie is None:
        raise StormVideoError(
            f"{path}: no moov box in {size} bytes, so nothing says what the file holds; "
            "it is truncated or was never finished"
        )
    if all(box.kind != b"mvex" for box in _tiles(path, file, movie.start, movie.end, _box_header)):
        return {}
    if boxes[-1].kind != b"mfra":
        raise StormVideoError(
            f"{path}: a fragmented MP4 that ends at byte {size} with a {_text(boxes[-1].kind)} box instead of the "
            "mfra index; "
            f"it cannot be told from a truncated file: {_REMUX}"
        )
    samples: Counter[int] = Counter()
    for fragment in (box for box in _known(path, boxes, _MP4_TOP) if box.kind == b"moof"):
        for part in _known(path, _tiles(path, file, fragment.start, fragment.end, _box_header), _IN_MOOF):
            if part.kind == b"traf":
                track, count = _track_fragment(path, file, part)
                samples[track] += count
    return dict(samples)


def _track_fragment(path: Path, file: BinaryIO, fragment: Chunk) -> tuple[int, int]:
    """A traf box's track and number of samples (ISO/IEC 14496-12, 8.8.7 and 8.8.8)."""
    track, samples = None, 0
    for box in _known(path, _tiles(path, file, fragment.start, fragment.end, _box_header), _IN_TRAF):
        file.seek(box.start)
        flags, number = (int.from_bytes(file.read(4)) for _ in range(2))
        if box.kind == b"tfhd":
            track = number
        elif box.kind == b"trun":
            per_sample = (flags >> 8 & 0xF).bit_count()
            if box.end - box.start != 4 * (2 + (flags & 1) + (flags >> 2 & 1) + number * per_sample):
                raise StormVideoError(
                    f"{path}: corrupt, the trun box at byte {box.start} is not as long as its {number} samples"
                )
            samples += number
    if track is None:
        raise StormVideoError(f"{path}: corrupt, the traf box at byte {fragment.start} names no track")
    return track, samples


def _check_matroska(path: Path, file: BinaryIO, size: int) -> list[int]:
    """Frames of each video track, by its blocks."""
    segment = next((part for part in _tiles(path, file, 0, size, _ebml_header) if part.kind == _SEGMENT), None)
    if segment is None:
        raise StormVideoError(f"{path}: no Segment in {size} bytes; the file is truncated")
    types: dict[int, int] = {}
    frames: Counter[int] = Counter()
    for part in _known(path, _tiles(path, file, segment.start, segment.end, _ebml_header), _IN_SEGMENT):
        if part.kind == _TRACKS:
            types.update(_tracks(path, file, part))
        elif part.kind == _CLUSTER:
            for block in _blocks(path, file, part):
                track, count = _block_frames(file, block)
                if track not in types:
                    raise StormVideoError(
                        f"{path}: corrupt, the block at byte {block.start} is of track {track}; "
                        f"there are {sorted(types)}"
                    )
                frames[track] += count
    if 1 not in types.values():
        raise StormVideoError(f"{path}: no video stream; it holds {len(types)} other tracks")
    return [frames[track] for track, kind in types.items() if kind == 1]


def _tracks(path: Path, file: BinaryIO, tracks: Chunk) -> Iterator[tuple[int, int]]:
    """Number and type (1 is video) of each track (RFC 9559, 5.1.4.1)."""
    for entry in _tiles(path, file, tracks.start, tracks.end, _ebml_header):
        if entry.kind == b"\xae":
            values = {}
            for item in _tiles(path, file, entry.start, entry.end, _ebml_header):
                file.seek(item.start)
                values[item.kind] = int.from_bytes(file.read(min(item.end - item.start, 8)))
            yield values.get(b"\xd7", 0), values.get(b"\x83", 0)


def _blocks(path: Path, file: BinaryIO, cluster: Chunk) -> Iterator[Chunk]:
    for part in _known(path, _tiles(path, file, cluster.start, cluster.end, _ebml_header), _IN_CLUSTER):
        if part.kind == b"\xa3":
            yield part
        elif part.kind == b"\xa0":
            yield from (item for item in _tiles(path, file, part.start, part.end, _ebml_header) if item.kind == b"\xa1")


def _block_frames(file: BinaryIO, block: Chunk) -> tuple[int, int]:
    """A block's track and number of frames; several are laced together at times (RFC 9559, 10.1 and 10.3)."""
    file.seek(block.start)
    track = _ebml_number(file)
    flags, laced = file.read(4).ljust(4, b"\0")[2:4]
    return (-1 if track is None else track[0]), (laced + 1 if flags & 0x06 else 1)


def _known(path: Path, parts: Iterable[Chunk], kinds: set[bytes]) -> Iterator[Chunk]:
    for part in parts:
        if part.kind not in kinds:
            raise StormVideoError(f"{path}: corrupt, unknown element {_text(part.kind)} before byte {part.start}")
        yield part


def _tiles(path: Path, file: BinaryIO, start: int, end: int, read_header) -> Iterator[Chunk]:
    """The chunks that fill bytes start..end of the file, one after the other; an error if one is
    cut or runs over the end.
    """
    while start < end:
        file.seek(start)
        header = read_header(file, end - start)
        if header is None:
            raise StormVideoError(f"{path}: truncated or corrupt, no valid chunk header at byte {start} of {end}")
        kind, header_bytes, content_bytes = header
        if content_bytes is None:
            raise StormVideoError(
                f"{path}: {kind.hex()} at byte {start} does not say how long it is; "
                f"it cannot be told from a truncated file: {_REMUX}"
            )
        chunk = Chunk(kind, start + header_bytes, start + header_bytes + content_bytes)
        if chunk.end > end:
            raise StormVideoError(
                f"{path}: truncated, {_text(kind)} at byte {start} should reach byte {chunk.end}, "
                f"but there are only {end}"
            )
        yield chunk
        start = chunk.end


# Headers: (kind, bytes of the header, bytes of the content, None where left open), or None where
# there is no valid one.


def _box_header(file: BinaryIO, room: int) -> tuple[bytes, int, int] | None:
    """ISO/IEC 14496-12, 4.2: 32-bit size and type; size 1: a 64-bit size follows; size 0: to the end."""
    head = file.read(8)
    if len(head) < 8:
        return None
    size, kind, header_bytes = int.from_bytes(head[:4]), head[4:], 8
    if size == 0:
        size = room
    elif size == 1:
        size, header_bytes = int.from_bytes(file.read(8)), 16
    return (kind, header_bytes, size - header_bytes) if size >= header_bytes else None


def _riff_header(file: BinaryIO, room: int) -> tuple[bytes, int, int] | None:
    """FourCC and 32-bit little-endian size; content is padded to even."""
    head = file.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head[4:], "little")
    return head[:4], 8, min(size + size % 2, max(size, room - 8))  # the pad of the last chunk is often left out


def _ebml_header(file: BinaryIO, room: int) -> tuple[bytes, int, int | None] | None:
    """RFC 8794, 4-6: an ID of 1-4 bytes and a size of 1-8, each telling its own length by its
    leading zeros; a size of all ones is "unknown".
    """
    first = file.read(1)
    id_bytes = 9 - first[0].bit_length() if first else 9
    if id_bytes > 4:
        return None
    kind = first + file.read(id_bytes - 1)
    size = _ebml_number(file)
    if len(kind) < id_bytes or size is None:
        return None
    value, size_bytes = size
    return kind, id_bytes + size_bytes, None if value == (1 << 7 * size_bytes) - 1 else value


def _ebml_number(file: BinaryIO) -> tuple[int, int] | None:
    """A variable-size integer and its length in bytes."""
    first = file.read(1)
    length = 9 - first[0].bit_length() if first else 9
    rest = file.read(length - 1) if length <= 8 else b""
    if length > 8 or len(rest) < length - 1:
        return None
    return int.from_bytes(first + rest) & ((1 << 7 * length) - 1), length


def _text(kind: bytes) -> str:
    return repr(kind.decode("ascii")) if kind.isalnum() and kind.isascii() else kind.hex()
