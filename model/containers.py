"""Is a video file whole? Decoders play a cut file to where it was cut and call that the end; the
container's own sizes know better.

Three containers say where their parts end, and are checked to that end: MP4/MOV (ISO/IEC 14496-12),
Matroska/WebM (RFC 9559), AVI (RIFF). A recording that was written as it was sent (a browser's, DASH)
leaves some of these out; what it does say is checked. Other containers say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple


class StormVideoError(ValueError):
    """A video file that cannot be read in full; the message names the file and says what is wrong and where."""


class Container(NamedTuple):
    """What a file's own sizes say of its frames."""

    kind: str = ""  # "mp4", "matroska", "avi", or "" for one whose sizes say nothing
    fragments: dict[int, int] = {}  # samples of each track in fragments of an MP4, which its header does not count
    blocks: list[int] | None = None  # of each video track of a Matroska file, whose header counts nothing


class Chunk(NamedTuple):
    kind: bytes
    start: int  # first byte of its content
    end: int  # one past the last byte


_MP4_FIRST = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_MP4_TOP = _MP4_FIRST | {b"moof", b"mfra", b"sidx", b"ssix", b"styp", b"prft", b"emsg", b"meta", b"uuid"}
_MP4_PARTS = {b"moov", b"moof", b"mdat", b"mfra", b"sidx"}
_IN_MOOF = {b"mfhd", b"traf", b"pssh", b"meta", b"uuid", b"free", b"skip"}
_IN_TRAF = {b"tfhd", b"tfdt", b"trun", b"sbgp", b"sgpd", b"subs", b"saiz", b"saio", b"senc"} | {
    b"meta",
    b"uuid",
    b"free",
    b"skip",
}
_EBML, _SEGMENT, _TRACKS, _CLUSTER = (bytes.fromhex(i) for i in ("1a45dfa3", "18538067", "1654ae6b", "1f43b675"))
_VOID, _CRC = b"\xec", b"\xbf"
# What a recorder that cannot go back leaves open (RFC 9559, 5.1: unknown size).
_MAY_BE_OPEN = {_SEGMENT, _CLUSTER}
# SeekHead, Info, Cues, Attachments, Chapters, Tags
_IN_SEGMENT = {bytes.fromhex(i) for i in ("114d9b74", "1549a966", "1c53bb6b", "1941a469", "1043a770", "1254c367")} | {
    _TRACKS,
    _CLUSTER,
    _VOID,
    _CRC,
}
# Timestamp, SilentTracks, Position, PrevSize, SimpleBlock, BlockGroup
_IN_CLUSTER = {bytes.fromhex(i) for i in ("e7", "5854", "a7", "ab", "a3", "a0")} | {_VOID, _CRC}


def checked_container(name: str, file: BinaryIO) -> Container:
    """What the file's container says of its frames, after a check that all of it is there.

    Args:
        name: of the file, for messages.
        file: seekable; at its beginning.

    Raises:
        StormVideoError: bytes are missing, by what the container itself says.
    """
    try:
        size = file.seek(0, 2)
        if size == 0:
            raise StormVideoError(f"{name}: the file is empty")
        file.seek(0)
        head = file.read(12)
        if head[4:8] in _MP4_FIRST:
            return Container("mp4", fragments=_check_mp4(name, file, size))
        if head[:4] == _EBML:
            return Container("matroska", blocks=_check_matroska(name, file, size))
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            list(_before_trailer(name, file, size, _riff_header, {b"RIFF", b"LIST", b"idx1"}))
            return Container("avi")
    except OSError as error:
        raise StormVideoError(f"{name}: cannot be read: {error.strerror}") from error
    return Container()


def _before_trailer(name: str, file: BinaryIO, size: int, read_header, kinds: set[bytes]) -> Iterator[Chunk]:
    """The chunks of a file up to a trailer, which cameras and editors append: bytes that are no chunk, and in which
    no name of a chunk of ``kinds`` stands.
    """
    begun = False
    try:
        for chunk in tiles(name, file, 0, size, read_header):
            begun = True
            yield chunk
    except _Cut as cut:
        file.seek(cut.start)
        rest = file.read()
        if not begun or any(kind in rest for kind in kinds):
            raise


def _check_mp4(name: str, file: BinaryIO, size: int) -> dict[int, int]:
    """Samples of each track in movie fragments; none unless it is fragmented."""
    boxes = list(_before_trailer(name, file, size, box_header, _MP4_PARTS))
    movie = next((box for box in boxes if box.kind == b"moov"), None)
    if movie is None:
        raise StormVideoError(
            f"{name}: no moov box in {size} bytes, so nothing says what the file holds; "
            "it is truncated or was never finished"
        )
    if all(box.kind != b"mvex" for box in tiles(name, file, movie.start, movie.end, box_header)):
        return {}
    while boxes[-1].kind not in _MP4_TOP:
        boxes.pop()  # a trailer that has the form of a box
    samples: Counter[int] = Counter()
    for box in _known(name, boxes, _MP4_TOP):
        if box.kind == b"sidx":
            _check_index(name, file, box, size)
        for part in (
            _known(name, tiles(name, file, box.start, box.end, box_header), _IN_MOOF) if box.kind == b"moof" else ()
        ):
            if part.kind == b"traf":
                track, count = _track_fragment(name, file, part)
                samples[track] += count
    return dict(samples)


def _check_index(name: str, file: BinaryIO, index: Chunk, size: int) -> None:
    """The bytes that a segment index (sidx) declares are there (ISO/IEC 14496-12, 8.16.3)."""
    file.seek(index.start)
    content = file.read(index.end - index.start)
    wide = 8 if content[:1] == b"\1" else 4
    first, count = 12 + 2 * wide, int.from_bytes(content[14 + 2 * wide : 16 + 2 * wide])
    sizes = [int.from_bytes(content[at : at + 4]) & 0x7FFFFFFF for at in range(first + 4, first + 4 + 12 * count, 12)]
    end = index.end + int.from_bytes(content[12 + wide : first]) + sum(sizes)
    if end > size:
        raise StormVideoError(
            f"{name}: truncated, the index at byte {index.start} declares parts up to byte {end}, "
            f"but there are only {size}"
        )


def _track_fragment(name: str, file: BinaryIO, fragment: Chunk) -> tuple[int, int]:
    """A traf box's track and number of samples (ISO/IEC 14496-12, 8.8.7 and 8.8.8)."""
    track, samples = None, 0
    for box in _known(name, tiles(name, file, fragment.start, fragment.end, box_header), _IN_TRAF):
        file.seek(box.start)
        flags, number = (int.from_bytes(file.read(4)) for _ in range(2))
        if box.kind == b"tfhd":
            track = number
        elif box.kind == b"trun":
            per_sample = (flags >> 8 & 0xF).bit_count()
            if box.end - box.start != 4 * (2 + (flags & 1) + (flags >> 2 & 1) + number * per_sample):
                raise StormVideoError(
                    f"{name}: corrupt, the trun box at byte {box.start} is not as long as its {number} samples"
                )
            samples += number
    if track is None:
        raise StormVideoError(f"{name}: corrupt, the traf box at byte {fragment.start} names no track")
    return track, samples


def _check_matroska(name: str, file: BinaryIO, size: int) -> list[int]:
    """Frames of each video track, by its blocks."""
    segment = next((part for part in tiles(name, file, 0, size, _ebml_header) if part.kind == _SEGMENT), None)
    if segment is None:
        raise StormVideoError(f"{name}: no Segment in {size} bytes; the file is truncated")
    types: dict[int, int] = {}
    frames: Counter[int] = Counter()
    end = size if segment.end == segment.start else segment.end
    parts = tiles(name, file, segment.start, end, _ebml_header)
    # What follows a cluster of unknown size is its content, up to the next element of the segment.
    for part in _known(name, parts, _IN_SEGMENT | _IN_CLUSTER):
        if part.kind == _TRACKS:
            types.update(_tracks(name, file, part))
        for block in _blocks(name, file, part):
            track, count = _block_frames(file, block)
            if track not in types:
                raise StormVideoError(
                    f"{name}: corrupt, the block at byte {block.start} is of track {track}; there are {sorted(types)}"
                )
            frames[track] += count
    if 1 not in types.values():
        raise StormVideoError(f"{name}: no video stream; it holds {len(types)} other tracks")
    return [frames[track] for track, kind in types.items() if kind == 1]


def _tracks(name: str, file: BinaryIO, tracks: Chunk) -> Iterator[tuple[int, int]]:
    """Number and type (1 is video) of each track (RFC 9559, 5.1.4.1)."""
    for entry in tiles(name, file, tracks.start, tracks.end, _ebml_header):
        if entry.kind == b"\xae":
            values = {}
            for item in tiles(name, file, entry.start, entry.end, _ebml_header):
                file.seek(item.start)
                values[item.kind] = int.from_bytes(file.read(min(item.end - item.start, 8)))
            yield values.get(b"\xd7", 0), values.get(b"\x83", 0)


def _blocks(name: str, file: BinaryIO, part: Chunk) -> Iterator[Chunk]:
    """The blocks in a cluster, or in a part of one."""
    if part.kind == _CLUSTER:
        for inner in _known(name, tiles(name, file, part.start, part.end, _ebml_header), _IN_CLUSTER):
            yield from _blocks(name, file, inner)
    elif part.kind == b"\xa3":
        yield part
    elif part.kind == b"\xa0":
        yield from (item for item in tiles(name, file, part.start, part.end, _ebml_header) if item.kind == b"\xa1")


def _block_frames(file: BinaryIO, block: Chunk) -> tuple[int, int]:
    """A block's track and number of frames; several are laced together at times (RFC 9559, 10.1 and 10.3)."""
    file.seek(block.start)
    track = _ebml_number(file)
    flags, laced = file.read(4).ljust(4, b"\0")[2:4]
    return (-1 if track is None else track[0]), (laced + 1 if flags & 0x06 else 1)


def _known(name: str, parts: Iterable[Chunk], kinds: set[bytes]) -> Iterator[Chunk]:
    for part in parts:
        if part.kind not in kinds:
            raise StormVideoError(f"{name}: corrupt, unknown element {_text(part.kind)} before byte {part.start}")
        yield part


class _Cut(StormVideoError):
    """A chunk has no valid header or ends behind the end of what it lies in."""

    def __init__(self, message: str, start: int):
        super().__init__(message)
        self.start = start


def tiles(name: str, file: BinaryIO, start: int, end: int, read_header) -> Iterator[Chunk]:
    """The chunks that fill bytes start..end of the file, one after the other; an error if one is
    cut or runs over the end. One that does not say how long it is is given as empty, and what follows is its content.
    """
    while start < end:
        file.seek(start)
        header = read_header(file, end - start)
        if header is None:
            raise _Cut(f"{name}: truncated or corrupt, no valid chunk header at byte {start} of {end}", start)
        kind, header_bytes, content_bytes = header
        if content_bytes is None and kind not in _MAY_BE_OPEN:
            raise StormVideoError(f"{name}: corrupt, {kind.hex()} at byte {start} does not say how long it is")
        chunk = Chunk(kind, start + header_bytes, start + header_bytes + (content_bytes or 0))
        if chunk.end > end:
            raise _Cut(
                f"{name}: truncated, {_text(kind)} at byte {start} should reach byte {chunk.end}, "
                f"but there are only {end}",
                start,
            )
        yield chunk
        start = chunk.end


# Headers: (kind, bytes of the header, bytes of the content, None where left open), or None where
# there is no valid one.


def box_header(file: BinaryIO, room: int) -> tuple[bytes, int, int] | None:
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
