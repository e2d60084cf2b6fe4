"""Checkpoint files: headers, dialects, identification, streaming in and out."""
