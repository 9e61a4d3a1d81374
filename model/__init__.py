"""The complete STORM (arXiv 2503.04130) and its VILA baseline: video file in, next tokens out. Needs the extra ``model``."""
