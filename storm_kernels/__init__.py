"""Fused kernels for the temporal projector of STORM (arXiv 2503.04130): bidirectional selective scan and token reduction."""

from .tokens import TokenGrid, TokenReduction

__version__ = "0.1.0"
__all__ = ["TokenGrid", "TokenReduction"]
