"""What is fast, measured: `harness.py` checks, times and records; one file per subject; `e2e/` is the main job."""
