"""Scans at the end of float32, where a bound relative to the reference's error says nothing:
results are compared as they are.
"""

import torch

import storm_kernels as sk

FINITE = (-3e38, 3e38, -2.3e38)
EXTREMES = (*FINITE, float("-inf"), float("nan"))


def check_enormous_decays(backend: str, extremes: tuple[float, ...] = EXTREMES) -> None:
    """log2(e) A is beyond float32 where |A| is above 2.36e38; results and gradients are the
    reference's, where delta is zero too.
    """
    for extreme in extremes:
        draw = torch.Generator().manual_seed(0)
        u, B, C, G = (torch.randn(1, 70, 3, generator=draw) for _ in range(4))
        delta, A = torch.rand(1, 70, 3, generator=draw), -torch.rand(3, 3, generator=draw)
        A[0, 0], delta[:, ::2, 0] = extreme, 0.0
        if extreme > 0:
            delta[..., 0] = 0.0
        leaves = [t.requires_grad_() for t in (u, delta, A, B, C)]
        results = []
        for name in (backend, "torch"):
            out = sk.selective_scan(*leaves, backend=name)
            results.append((out, *torch.autograd.grad(out, leaves, G)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
