"""A forward-only projector frame by frame: the recurrence is carried on, so pieces equal the whole (docs/streaming.md).

Of each mixer a stream keeps the last K - 1 inputs of the convolution and the scan's state; of an
open temporal pool the sum of its frames. That does not grow with the video.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import reduce_tokens
from ..plain import has_hooks, runs_its_forward_only
from ..profiling import stage
from ..reference import MixerLayer, ReferenceTemporalProjector
from ..reference.mixer import check_input
from ..tokens import TokenGrid, TokenReduction, described, positive_int, reducing
from .core import mixer_core
from .mixer import BiMambaMixer

_TENSORS = ("history", "state", "pending", "empty")
_SETTINGS = ("version", "height", "width", "batch", "reduction")


class ProjectorStream:
    """One video, or a batch of them in step, through a projector frame by frame; made by
    :meth:`storm_kernels.TemporalProjector.stream`, which names the arguments.

    It computes without gradients: a graph would grow with the video.

    Example:
        >>> from storm_kernels import TemporalProjector, TokenReduction
        >>> projector = TemporalProjector(vision_width=8, d_model=16, bidirectional=False)
        >>> stream = projector.stream(height=6, width=6, reduction=TokenReduction(temporal_pool=2))
        >>> stream.push(torch.randn(1, 3, 6, 6, 8)).shape  # the first two frames are final
        torch.Size([1, 9, 16])
        >>> stream.finish().shape  # the mean of the last one
        torch.Size([1, 9, 16])
    """

    def __init__(
        self,
        projector: ReferenceTemporalProjector,
        height: int,
        width: int,
        reduction: TokenReduction | None = None,
        batch: int = 1,
    ) -> None:
        for i, layer in enumerate(projector.layers):
            _check_layer(f"layers.{i}", layer)
        self._projector = projector
        self._frame = (positive_int("height", height), positive_int("width", width))
        self._batch = positive_int("batch", batch)
        self._reduction = reducing(reduction) or TokenReduction()
        self._dtype: torch.dtype | None = None  # of the features: the first push settles it
        self._frames, self._finished = 0, False
        self._history: list[Tensor] = []  # for each layer (batch, E, K - 1)
        self._state: list[Tensor] = []  # for each layer (batch, E, S)
        self._empty: list[Tensor] = []  # (batch, 0, D), no tokens in the results' dtype, once there are results
        self._pending: list[Tensor] = []  # the open pool's sum (batch, tokens of a reduced frame, D), or nothing

    @property
    def frames(self) -> int:
        """The number of frames pushed so far."""
        return self._frames

    @torch.no_grad()
    def push(self, features: Tensor) -> Tensor:
        """Take the next frames, and return the tokens that no later frame can change.

        Args:
            features: (batch, T, height, width, vision_width), one frame or more, of the same dtype at every push.

        Returns:
            (batch, tokens, D) in the projector's dtype; no tokens while the temporal pool is open.

        Raises:
            TypeError: features that are no floating-point tensor, or of another dtype than those before.
            ValueError: features of another shape or device, or of no frame.
            RuntimeError: the stream is finished.
        """
        self._check(features)
        x, grid = self._projector.embed(features)
        history, state = [], []
        layers: list[Any] = list(self._projector.layers)
        for i, layer in enumerate(layers):
            carried = (self._history[i], self._state[i]) if self._state else (None, None)
            x, inputs, states = _advance(layer, x, *carried)
            history.append(inputs)
            state.append(states)
        pending = list(self._pending)
        with stage("reduce"):
            out = x if self._reduction.is_identity else self._reduce(x, grid, pending)
        # Nothing is kept of a push that raised.
        self._history, self._state, self._pending = history, state, pending
        self._dtype, self._frames = features.dtype, self._frames + grid.frames
        self._empty = [x.new_empty(x[:, :0].shape)]
        return out

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End the stream, and return the last tokens: the mean of a temporal pool that is not full.

        Returns:
            (batch, tokens, D) in the projector's dtype; no tokens where all have been returned.

        Raises:
            RuntimeError: the stream is finished already, or has taken no frame.
        """
        if self._finished or not self._frames:
            state = "is finished already" if self._finished else "has taken no frame: push features first"
            raise RuntimeError(f"stream {state}")
        self._finished = True
        (none,) = self._empty
        if not self._pending:
            return none
        (total,), self._pending = self._pending, []
        return (total / (self._frames % self._reduction.temporal_pool)).to(none.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What a stream has to remember, for ``torch.save``: tensors, numbers and lists of them.

        The tensors are the stream's own, not copies; a later push leaves them as they are.
        """
        dtype = None if self._dtype is None else str(self._dtype).removeprefix("torch.")
        progress = {"dtype": dtype, "frames": self._frames, "finished": self._finished}
        tensors = {name: list(getattr(self, f"_{name}")) for name in _TENSORS}
        return {**self._settings(), **progress, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream that ``state`` was taken from stood; the weights are the projector's affair.

        Args:
            state: of :meth:`state_dict`; tensors are brought to the projector's device.

        Raises:
            TypeError: a state that is no dict.
            ValueError: a state of another grid, batch or reduction, or for other layers; named.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {described(state)}")
        settings = self._settings()
        wanted = {*settings, "dtype", "frames", "finished", *_TENSORS}
        if state.keys() != wanted:
            raise ValueError(f"state must have the keys {sorted(wanted)}, got {sorted(map(str, state))}")
        for name, own in settings.items():
            if state[name] != own:
                raise ValueError(f"state[{name!r}] must be the stream's {own}, got {state[name]}")
        self._check_tensors(state)
        device = self._device()
        for name in _TENSORS:
            setattr(self, f"_{name}", [t if device is None else t.to(device) for t in state[name]])
        self._dtype = None if state["dtype"] is None else getattr(torch, state["dtype"])
        self._frames, self._finished = state["frames"], state["finished"]

    def _device(self) -> torch.device | None:
        """Where the projector is; None where it is offloaded, or has no parameters."""
        parameter = next(self._projector.parameters(), None)
        return None if parameter is None or parameter.is_meta else parameter.device

    def _settings(self) -> dict[str, Any]:
        r = self._reduction
        reduction = [r.temporal_pool, r.spatial_pool, r.temporal_stride]
        return dict(zip(_SETTINGS, (1, *self._frame, self._batch, reduction), strict=True))

    def _check_tensors(self, state: dict[str, Any]) -> None:
        mixers: list[Any] = [layer.mixer for layer in self._projector.layers] if state["frames"] else []
        wanted = {
            "history": [(self._batch, m.d_inner, m.d_conv - 1) for m in mixers],
            "state": [(self._batch, m.d_inner, m.d_state) for m in mixers],
            "pending": [],
        }
        r = self._reduction
        pool, within = divmod(state["frames"], r.temporal_pool)
        if within and pool % r.temporal_stride == 0 and not state["finished"]:
            height, width = self._frame
            frame = r.reduced(TokenGrid(1, (height + 1) // 2, (width + 1) // 2))
            width = mixers[0].d_model if mixers else self._projector.proj.out_features
            wanted["pending"] = [(self._batch, frame.tokens, width)]
        for name, shapes in wanted.items():
            got = [tuple(t.shape) for t in state[name]]
            if got != shapes:
                raise ValueError(f"state[{name!r}] must have the shapes {shapes}, got {got}")

    def _check(self, features: Tensor) -> None:
        """Raise, by name, unless these features go on from those before."""
        if self._finished:
            raise RuntimeError("stream is finished: make another for the next video")
        projector = self._projector
        check_input("features", features, ("batch", "frames", "height", "width"), projector.proj, parts=4)
        batch, frames, *frame = features.shape[:4]
        wanted = (self._batch, *self._frame)
        if (batch, *frame) != wanted:
            raise ValueError(
                f"features must have the stream's batch, height and width = {wanted}, got shape {tuple(features.shape)}"
            )
        if frames == 0:
            raise ValueError(f"features must have at least one frame, got shape {tuple(features.shape)}")
        if self._dtype not in (None, features.dtype):
            raise TypeError(f"features must be {self._dtype} as those before, got {features.dtype}")
        device = self._device()
        if device is not None and features.device != device:
            raise ValueError(f"features must be on {device} like the projector, got {features.device}")

    def _reduce(self, x: Tensor, grid: TokenGrid, pending: list[Tensor]) -> Tensor:
        """The tokens of full pools: x (batch, T*N, D) -> (batch, L', D). ``pending`` gets the open one's sum.

        Sums are kept in float32, as the reduction of a whole video keeps them.
        """
        r, wide = self._reduction, x if x.dtype == torch.float64 else x.float()
        spatial = TokenReduction(spatial_pool=r.spatial_pool)
        frames = reduce_tokens(wide, grid, spatial).unflatten(1, (grid.frames, -1))
        out, at = [x[:, :0]], 0
        while at < grid.frames:
            pool, within = divmod(self._frames + at, r.temporal_pool)
            end = min(at + r.temporal_pool - within, grid.frames)
            if pool % r.temporal_stride == 0:
                total = sum(pending, frames[:, at:end].sum(1))
                full = within + end - at == r.temporal_pool
                out += [(total / r.temporal_pool).to(x.dtype)] if full else []
                pending[:] = [] if full else [total]
            at = end
        return torch.cat(out, 1)


def _advance(
    layer: MixerLayer, x: Tensor, history: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer on the next tokens x (batch, L, D): its result, and the history and state after them."""
    mixer: Any = layer.mixer
    with stage("norm"):
        normed = layer.norm(x)
    with stage("in_proj"):
        inner, z = mixer._project(normed, mixer.in_proj).chunk(2, dim=-1)
    if history is None:
        history = inner.new_zeros(x.shape[0], mixer.d_inner, mixer.d_conv - 1)
    y, state = mixer_core(inner, z, mixer._branches(), history=history, initial_state=state, return_final_state=True)
    with stage("out_proj"):
        x = x + mixer._project(y, mixer.out_proj)
    recent = inner[:, max(0, inner.shape[1] - mixer.d_conv + 1) :].transpose(1, 2)
    return x, torch.cat([history, recent], 2)[..., recent.shape[2] :].clone(), state


def _check_layer(name: str, layer: nn.Module) -> None:
    """Raise unless the layer can be run with its states handed on."""
    mixer: Any = getattr(layer, "mixer", None)
    if getattr(mixer, "bidirectional", False):
        raise ValueError(
            "bidirectional must be False for a stream, got True: a token would depend on every later frame; "
            "call the projector on the whole video, or on each stretch of frames as a video of its own"
        )
    runs = type(layer) is MixerLayer and runs_its_forward_only(layer) and not has_hooks(mixer)
    if not runs or type(mixer).forward is not BiMambaMixer.forward or not runs_its_forward_only(mixer):
        kinds = f"{type(layer).__name__} of {type(mixer).__name__}"
        raise ValueError(f"{name} must be a MixerLayer of a BiMambaMixer without hooks for a stream, got {kinds}")
