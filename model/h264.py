"""Which pictures of an H.264 film need not be decoded for another one's sake (Rec. ITU-T H.264, 7.3 and 7.4).

A picture whose ``nal_ref_idc`` is 0 is one that nothing is predicted from. Where pictures are missing it
may serve the decoder all the same, to conceal them; their numbers (``frame_num``) tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import av

# Kinds of units of a stream (table 7-1): pictures, and what describes sequences of them.
_PICTURE, _KEY_PICTURE, _SEQUENCE = 1, 5, 7

# Profiles whose sequence parameters say more of the samples (7.3.2.1.1).
_HIGH = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}

# What stands before each unit of a stream that is not cut into packets by itself.
_START = b"\0\0\1"

# Bytes of a picture's header that are read: three numbers, and `frame_num` of at most 16 bits.
_HEADER = 24


class Picture(NamedTuple):
    """What a packet says of its picture."""

    is_reference: bool
    is_first: bool  # an IDR picture: numbers begin anew
    number: int  # frame_num


class PicturesMissing(Exception):
    """Pictures that others are predicted from are missing before this one."""


class Sequence:
    """What the header of a track says of all its pictures.

    Args:
        unit: the sequence parameter set.
        size_bytes: of the length that stands before each unit of a packet; 0 where start codes do.
        number_bits: of frame_num.
    """

    def __init__(self, unit: bytes, size_bytes: int, number_bits: int):
        self._unit, self._size_bytes, self._number_bits = unit, size_bytes, number_bits

    @classmethod
    def of(cls, description: bytes | None) -> Sequence | None:
        """Of a track's description: avcC (ISO/IEC 14496-15, 5.3.3.1) or units with start codes. None where it is not
        there, where it holds several sequences, or one that is interlaced or leaves numbers out.
        """
        if not description or len(description) < 8:
            return None
        if description[0] == 1:
            sequences = [description[8 : 8 + int.from_bytes(description[6:8])]] * (description[5] & 31)
            size_bytes = (description[4] & 3) + 1
        else:
            sequences = [unit for unit in _units(description, 0) if unit[0] & 31 == _SEQUENCE]
            size_bytes = 0
        if len(sequences) != 1:
            return None
        try:
            number_bits = _number_bits(_Bits(sequences[0][1:]), profile=sequences[0][1])
        except IndexError:
            return None
        return number_bits and cls(sequences[0], size_bytes, number_bits)

    def follow(self) -> Callable[[av.Packet], bool]:
        """A function to be called with every packet from where decoding begins, in its order: whether the picture may
        be left out if nothing is predicted from it. It raises `PicturesMissing`.
        """
        last: int | None = None

        def follows(packet: av.Packet) -> bool:
            nonlocal last
            picture = self._picture(packet)
            if picture is None:
                last = None
                return False
            expected = (0,) if picture.is_first else None if last is None else (last, (last + 1) % self._numbers)
            if expected is not None and picture.number not in expected:  # 7.4.3, frame_num
                raise PicturesMissing
            last = picture.number if picture.is_reference else last
            return True

        return follows

    @property
    def _numbers(self) -> int:
        return 1 << self._number_bits

    def _picture(self, packet: av.Packet) -> Picture | None:
        """Of a packet's first unit that is part of a picture; None where there is none, or parameters of its own."""
        for unit in _units(bytes(packet), self._size_bytes):
            kind = unit[0] & 31
            if kind in (_PICTURE, _KEY_PICTURE):
                bits = _Bits(unit[1 : 1 + _HEADER])
                try:
                    for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id
                        bits.number()
                    return Picture(bool(unit[0] & 96), kind == _KEY_PICTURE, bits.take(self._number_bits))
                except IndexError:
                    return None
            if kind == _SEQUENCE and unit != self._unit:
                return None
        return None


def _units(content: bytes, size_bytes: int) -> Iterator[bytes]:
    """The units of a packet, none of which is empty: each after its length, or after a start code (annex B)."""
    if not size_bytes:
        yield from filter(None, (unit.rstrip(b"\0") for unit in content.split(_START)[1:]))
        return
    at = 0
    while at + size_bytes < len(content):
        begin = at + size_bytes
        at = begin + int.from_bytes(content[at:begin])
        if at > begin:
            yield content[begin:at]


def _number_bits(bits: _Bits, profile: int) -> int | None:
    """Bits of frame_num, by the sequence parameters (7.3.2.1.1); None for films whose pictures cannot be followed."""
    bits.take(24)
    bits.number()
    if profile in _HIGH:
        chroma = bits.number()
        bits.number(), bits.number()  # bit depths
        if chroma > 2 or bits.take(1) or bits.take(1):  # colours apart; no transform; scaling lists
            return None
    number_bits = bits.number() + 4
    order = bits.number()
    if order == 1:
        return None
    if order == 0:
        bits.number()
    bits.number()  # reference pictures
    leaves_out = bits.take(1)
    bits.number(), bits.number()  # width, height
    only_frames = bits.take(1)
    return number_bits if only_frames and not leaves_out else None


class _Bits:
    """Bits of a unit, the first one first, without the bytes that keep start codes out (7.3.1)."""

    def __init__(self, content: bytes):
        content = content.replace(b"\0\0\3", b"\0\0")
        self._bits, self._at = f"{int.from_bytes(content):0{8 * len(content)}b}" if content else "", 0

    def take(self, count: int) -> int:
        """The next ``count`` bits as a number."""
        end = self._at + count
        if end > len(self._bits):
            raise IndexError("no more bits")
        value = int(self._bits[self._at : end], 2)
        self._at = end
        return value

    def number(self) -> int:
        """The next number of Exp-Golomb code (9.1)."""
        end = self._bits.find("1", self._at)
        if end < 0:
            raise IndexError("no more bits")
        zeros, self._at = end - self._at, end
        return self.take(zeros + 1) - 1
