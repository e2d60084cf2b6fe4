"""Everything that needs a GPU to be checked or timed: ``python -m benchmarks.gpu``."""
