"""Drop-in modules: subclasses of the reference that change ``forward`` only."""

from .mixer import BiMambaMixer
from .projector import TemporalProjector

__all__ = ["BiMambaMixer", "TemporalProjector"]
