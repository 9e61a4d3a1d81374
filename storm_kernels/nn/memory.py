"""What a mixer's call needs of memory, and when it is cut into blocks of channels for it (docs/scaling.md)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..ops.autograd import forward_mode, transformed
from ..reference import ReferenceMixer
from ..tokens import TokenGrid, TokenReduction, described, integer
from .channels import why_not

# A call that needs less than this is made whole, and nobody asks what is free.
_SMALL_BYTES = 2**30

# Of the free memory, what a call may take: it is not alone, and allocators round up.
_SHARE = 0.8

# Blocks are whole multiples of this many channels, and at least as many: vectors and warps are filled.
_STEP = 64


def peak_bytes(
    mixer: ReferenceMixer,
    tokens: int,
    cells: int | None = None,
    *,
    block: int | None = None,
    itemsize: int = 4,
    training: bool = False,
) -> int:
    """Bytes that a mixer's call needs at the most, its result among them, beside its input and its parameters.

    With E channels, S states, R the rank of dt, d directions, c channels at a time (a block, or E), L tokens, L' of
    the result and b bytes an element, a whole call holds x, z, and of each direction the convolved x and delta:
    ``b L ((2 + 2d) E + d (R + 2S)) + b L' E``. One in blocks holds that of a block, and the sums: ``b L ((2 + 2d) c +
    d (R + 2S)) + b L' c + 4 L' D``, or during its first sweep ``b L (1 + d) c + 4 L d (R + 2S)``; at the end ``(4 + b)
    L' D``; and ``b L D / 2`` where frames are left out, for those that are not. To train takes twice as much, and the
    states that the scans save. Half precisions on a CPU without matrix products for them take float32's besides.

    Args:
        mixer: of which sizes are read.
        tokens: L, of all the batch.
        cells: L', tokens of the result; None for all.
        block: channels of a block; None for a whole call.
        itemsize: b, 2 for half precisions, 4 for float32, 8 for float64.
        training: whether gradients are to follow. Default: not.

    Example:
        >>> from storm_kernels import BiMambaMixer
        >>> mixer = BiMambaMixer(640)
        >>> whole, cut = (peak_bytes(mixer, 2**20, block=block) / 2**30 for block in (None, 128))
        >>> round(whole, 1), round(cut, 1)
        (35.6, 6.6)
    """
    cells, d = tokens if cells is None else cells, len(mixer.suffixes)
    columns = d * (mixer.dt_rank + 2 * mixer.d_state)
    channels = mixer.d_inner if block is None else min(block, mixer.d_inner)
    accumulator = max(itemsize, 4)
    held = itemsize * (tokens * ((2 + 2 * d) * channels + columns) + cells * channels)
    if training:
        held = 2 * held + 4 * d * channels * mixer.d_state * -(-tokens // _CHECKPOINT_TOKENS)
    if block is None:
        return held
    first = itemsize * tokens * (1 + d) * channels + accumulator * tokens * columns
    if cells < tokens:
        held += itemsize * tokens * mixer.d_model // 2
    last = cells * mixer.d_model * (accumulator + itemsize) + itemsize * tokens * columns
    return max(first, held + accumulator * cells * mixer.d_model, last)


# Tokens of a checkpoint's interval, the least of all backends'.
_CHECKPOINT_TOKENS = 64


def block_for(
    mixer: ReferenceMixer, wanted: int | str | None, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None
) -> int | None:
    """Channels of a block in which ``mixer`` works through x, or None: whole.

    ``wanted`` is the mixer's ``channel_block``. "auto" is the largest multiple of 64 with which the call fits into 80 %
    of what is free on the device, if it does not fit whole; whole too where a child has to be called as a module, where
    the program is traced or recorded as a CUDA graph, and where nothing tells what is free.
    """
    if wanted is None:
        return None
    if wanted != "auto":
        reason = why_not(mixer)
        if reason is not None:
            raise ValueError(f"channel_block must be None or 'auto' here, got {wanted}: {reason}")
        return int(wanted)
    tokens = x.shape[0] * x.shape[1]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(tokens, int):
        return None
    cells = tokens if grid is None or reduction is None else x.shape[0] * reduction.reduced(grid).tokens
    sizes = {"itemsize": x.element_size(), "training": torch.is_grad_enabled()}
    needed = peak_bytes(mixer, tokens, cells, **sizes)  # type: ignore[arg-type]  # a mapping of two types
    if needed < _SMALL_BYTES or transformed() or forward_mode(x):
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    free = free_bytes(x.device)
    if free is None or needed <= _SHARE * free or why_not(mixer) is not None:
        return None
    block = mixer.d_inner // _STEP * _STEP
    while block > _STEP and peak_bytes(mixer, tokens, cells, block=block, **sizes) > _SHARE * free:  # type: ignore[arg-type]
        block -= _STEP
    return max(block, min(_STEP, mixer.d_inner))


def checked_block(value: object, channels: int) -> int | str | None:
    """``channel_block`` as a user gives it; raise, by name, where it is none."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, str):
        raise ValueError(f"channel_block must be 'auto', None or a number of channels, got {described(value)}")
    wanted = integer("channel_block", value)
    if not 1 <= wanted <= channels:
        raise ValueError(f"channel_block must be between 1 and the mixer's {channels} channels, got {wanted}")
    return wanted


def free_bytes(device: torch.device) -> int | None:
    """What a call can have of the device's memory; None where nothing tells."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    within, lines = _left_in_container(), said.splitlines()
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return available if within is None or available is None else min(available, within)


def _left_in_container() -> int | None:
    """What the control group of this process may still take (Linux, version 2); None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        most, used = ((root / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return max(0, int(most) - int(used))
    except (OSError, ValueError):  # not there; or "max"
        return None
