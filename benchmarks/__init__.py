"""Measurements: ``python -m benchmarks`` runs all that this machine can."""
