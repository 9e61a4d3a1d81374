"""A film decoded from its first packet to its last, as a player does, and what is wrong on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import av
from av.video.frame import PictureType

from .seeking import Opened


class Shown(NamedTuple):
    """One frame of the film, in the order in which they are shown."""

    seconds: float | None  # its time, where it has one
    frame: av.VideoFrame | None  # None where the decoder gives none for a packet, because that is damaged
    fault: str = ""  # what is wrong with it, or with a frame shown before it that it may be predicted from
    both_ways: bool = False  # it may be predicted from the next one too


def played(opened: Opened) -> Iterator[Shown]:
    """Every frame that is shown.

    A frame whose packet is damaged is not left out: it is there without a picture, and those after it up to the next
    key frame have its fault. Pictures that cannot be decoded because the film begins in the middle of a group are not
    shown by a player, and not given here.

    Args:
        opened: a container and its video track, which decodes with one thread: then an error comes with its packet.
    """
    container, stream = opened
    begun, fault = False, ""
    failed: list[tuple[int, Shown]] = []  # damaged packets, with what is shown if no frame comes of them
    for packet in _packets(container, stream):
        if isinstance(packet, str):
            frames, error = [], packet
        else:
            try:
                frames, error = packet.decode(), ""
            except av.FFmpegError as failure:
                frames, error = [], failure.strerror or str(failure)
        if error and (begun or isinstance(packet, str) or packet.is_keyframe):
            begun, fault = True, error
            lost = Shown(_seconds(packet), None, fault)
            if isinstance(packet, str) or packet.pts is None:
                yield lost
            else:
                failed = sorted([*failed, (packet.pts, lost)], key=lambda pair: pair[0])
        for frame in frames:
            begun = True
            own = False
            while failed and frame.pts is not None and failed[0][0] <= frame.pts:
                pts, lost = failed.pop(0)
                own = pts == frame.pts
                if not own:
                    yield lost
            if frame.is_corrupt:
                fault = "the decoder marks it as corrupt"
            elif frame.key_frame and not own and not failed:
                fault = ""
            yield Shown(frame.time, frame, fault, frame.pict_type == PictureType.B)
    yield from (lost for _, lost in failed)


def faults(film: list[Shown]) -> dict[int, str]:
    """What is wrong with each frame, or with one that it may be predicted from, by its number."""
    found = {number: shown.fault for number, shown in enumerate(film) if shown.fault}
    for number in sorted(found, reverse=True):
        while number and film[number - 1].both_ways and number - 1 not in found:
            number -= 1
            found[number] = found[number + 1]
    return found


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | str]:
    """The packets of a track; last, where the container cannot be read on, what the error says."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        yield error.strerror or str(error)


def _seconds(packet: av.Packet | str) -> float | None:
    if isinstance(packet, str):
        return None
    time = packet.dts if packet.pts is None else packet.pts
    return None if time is None else float(time * packet.time_base)
