"""Measure in a process of its own, and see what memory a process takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

#: Memory that is a folder, where there is one: no disk slows it down.
MEMORY = Path("/dev/shm")


def in_process(module: str, words: dict[str, Any]) -> dict[str, float]:
    """Run ``python -m MODULE --child WORDS`` and take the JSON it prints last.

    Raises:
        RuntimeError: if it ends with an error.
    """
    command = [sys.executable, "-m", module, "--child", json.dumps(words)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RuntimeError(f"{words}: {said[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def place_for(size: int, folder: str | None) -> str:
    """Where so many bytes of files go: as the user says, in memory, or on the disk."""
    if folder is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size:
        return str(MEMORY)
    return folder or tempfile.gettempdir()


def status() -> dict[str, int]:
    """What the system says of this process's memory, in bytes; nothing if not Linux."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in pairs}


class Watch:
    """The most anonymous memory there was, as far as is seen every 5 ms.

    Anonymous is what no file backs. What the process had at the beginning does not
    count.
    """

    def __init__(self) -> None:
        self._before = self._most = status().get("RssAnon", 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, status().get("RssAnon", 0))

    def stop(self) -> int:
        """End, and say how much it was, in bytes."""
        self._done.set()
        self._thread.join()
        self._most = max(self._most, status().get("RssAnon", 0))
        return self._most - self._before
