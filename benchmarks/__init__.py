"""Ours beside the peers: one runnable module per claim (`python -m benchmarks.NAME --json`); see README.md
here."""
