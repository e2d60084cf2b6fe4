"""Progress bars of commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from hijack.errors import printable
from hijack.progress import Progress


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A progress callback: a tqdm bar where tqdm is installed, else plain text."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _plain_progress
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return
    bar = tqdm(total=0, desc=what, unit="layer", disable=None)

    def advance(done: int, total: int, layer: str) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield advance


def _plain_progress(done: int, total: int, layer: str) -> None:
    if sys.stderr.isatty():
        name = printable(layer)[-50:]
        print(f"\r{done}/{total} {name:<50}", end="", file=sys.stderr)
