"""What every backend implements: the same few functions, on plain tensors without autograd, as `ops/` calls them.

`ops/` has already checked and normalised the arguments, so a backend may rely on what is written
here. Symbols: batch; L tokens; E channels; S states; G groups (G divides E; channel e belongs to
group e // (E // G)); K taps; n sequences (batch, or len(cu_seqlens) - 1 when sequences are packed
and batch is 1).

Activations (u, delta, B, C, z, x and their gradients) are float32, bfloat16 or float16, each its
own; float64 too in the "torch" backend. Parameters and states (A, D, delta_bias, weights, biases,
states) are float32 (float64 there). Sums and states are kept in float32. Activations have any
strides, unit innermost unless that axis has one element; parameters are contiguous. Offsets can
pass 2^31. Results are contiguous and share no memory with an input. Gradients come back contiguous,
in the shape and dtype of what they are gradients of. Incoming gradients have any strides, zero
included. No axis is empty: ops/ leaves that to the torch backend.

Glossary, which the code of every backend keeps to:
    group: channels that share B and C; never of tokens or frames.
    pool: the frames that a reduction averages together (``temporal_pool`` of them).
    kept: of a token, that sampling keeps its pool; *kept tokens* are counted in their own order.
    cell: a row of a reduced result: the kept tokens that are averaged into one.
    checkpoint: the state before a token that the forward scan saves.
    interval: the tokens from a checkpoint to the next; INTERVAL of them.
    segment: tokens whose inputs are loaded, or whose states are recomputed, together.
    tile: tokens that are prepared together.
    slot: one instruction that one warp issues.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..tokens import TokenGrid, TokenReduction


class ScanInputs(NamedTuple):
    """One direction of a selective scan, in the sequence's own order whatever ``reverse`` says
    (docs/spec.md, Mixer).
    """

    u: Tensor  # (batch, L, E)
    delta: Tensor  # (batch, L, E), before bias and softplus
    A: Tensor  # (E, S)
    B: Tensor  # (batch, L, G, S)
    C: Tensor  # (batch, L, G, S)
    D: Tensor | None  # (E,)
    delta_bias: Tensor | None  # (E,)
    reverse: bool  # scanned from the last token to the first


class ScanCall(NamedTuple):
    """What one call of a scan is about, forward and backward."""

    directions: tuple[ScanInputs, ...]  # one, either order; or two: a forward and a reverse one, over the same L
    z: Tensor | None  # gate, (batch, L, E), or only the tokens of `reduction.kept(grid)`: (batch, kept tokens, E)
    delta_softplus: bool
    initial_state: Tensor | None  # (n, E, S): the state before the first scanned token; None with two directions
    cu_seqlens: (
        Tensor | None
    )  # (n + 1,) int32 or int64, from 0 to L, ascending, on the activations' device; repeats are empty sequences
    grid: TokenGrid | None
    reduction: TokenReduction | None  # never an identity; never with cu_seqlens; grid.tokens == L


Checkpoints = tuple[Tensor, ...]  # what a backend keeps of a scan for its backward pass; its own affair


class ScanResult(NamedTuple):
    out: Tensor  # (batch, L', E) in u's dtype; the directions' sum, gated, reduced
    final_state: Tensor | None  # (n, E, S): the state after the last scanned token; None with two directions
    checkpoints: Checkpoints  # of `checkpoint_shapes`, for `scan_backward`; () unless asked for


class ScanGrads(NamedTuple):
    """Gradients of one direction; None where not in ``needs`` or where the input was None."""

    u: Tensor | None
    delta: Tensor | None
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None


# The gradients of each direction, of z, of initial_state.
ScanBackwardResult = tuple[tuple[ScanGrads, ...], Tensor | None, Tensor | None]


class ConvFilter(NamedTuple):
    """One direction of a depthwise convolution over time; in reverse, tap K-1 meets the token
    itself and tap 0 the (K-1)-th after it.
    """

    weight: Tensor  # (E, K): tap K-1 meets the token itself, tap 0 the (K-1)-th before it
    bias: Tensor | None  # (E,)
    reverse: bool


class ConvCall(NamedTuple):
    """What one call of a convolution is about, forward and backward."""

    x: Tensor  # (batch, L, E)
    filters: tuple[ConvFilter, ...]  # one, either order; or two: a forward and a reverse one, with one K
    silu: bool
    initial_state: (
        Tensor | None
    )  # (n, E, K-1): the inputs before the first, in scan order, oldest first; None with two filters
    cu_seqlens: Tensor | None  # as a scan's


# The gradient of x, (weight, bias) gradients for each filter, the gradient of initial_state.
ConvGrads = tuple[Tensor | None, tuple[tuple[Tensor | None, Tensor | None], ...], Tensor | None]


class Backend(Protocol):
    """The functions a backend module has. ``op`` is "scan", "conv" or "reduce"."""

    NAME: str

    def own_device(self) -> str:
        """The device type whose tensors it is made for, "cpu" or "cuda"."""

    def why_not(self, op: str, *, device: str, dtypes: frozenset[torch.dtype], d_state: int, d_conv: int) -> str | None:
        """None if it can run ``op`` on such tensors here and now; else the reason, one sentence,
        with how to fix it where there is a way.

        ``device`` is a device type ("cpu", "cuda"); ``dtypes`` those of the activations;
        ``d_state``, ``d_conv`` are 0 where they do not apply. Cheap after the first call.
        """

    def checkpoint_shapes(
        self,
        batch: int,
        length: int,
        channels: int,
        states: int,
        *,
        directions: int,
        sequences: int,  # 0 unless packed
        gated: bool,
        grid: TokenGrid | None,
        reduction: TokenReduction | None,
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of a scan's float32 checkpoints, at most three. What they hold is the backend's own affair."""

    def scan(self, call: ScanCall, save_checkpoints: bool) -> ScanResult: ...

    def scan_backward(
        self,
        grad_out: Tensor,  # (batch, L', E)
        grad_final_state: Tensor | None,
        call: ScanCall,
        checkpoints: Checkpoints,  # those that are not empty
        needs: frozenset[
            str
        ],  # of "u delta A B C D delta_bias z initial_state"; the first seven for both directions alike
    ) -> ScanBackwardResult:
        """-> one `ScanGrads` a direction, gradient of z, gradient of initial_state."""

    def conv(self, call: ConvCall) -> tuple[Tensor, ...]:
        """-> (batch, L, E) for each filter, in x's dtype."""

    def conv_backward(
        self,
        grads: tuple[Tensor, ...],  # one a filter
        call: ConvCall,
        needs: frozenset[str],  # of "x weight bias initial_state"
    ) -> ConvGrads:
        """-> gradient of x (summed over the filters), (weight, bias) gradients for each filter,
        gradient of initial_state.
        """

    def reduce(self, x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
        """x (batch, T*H*W, C) -> (batch, T'*H'*W', C), averaged in float32, in x's dtype."""

    def reduce_backward(self, grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
        """grad (batch, T'*H'*W', C) -> (batch, T*H*W, C) in grad's dtype."""
