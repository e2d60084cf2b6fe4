"""Where files are while they are written: a folder of their own beside the destination.

It is called ``.NAME.xxxxxxxx.part``. The process that writes holds a lock on it, which
ends with the process however that ends; so the next one can tell what a killed one left
from what another is busy with. Nothing in it has its final name before it is complete
and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

fcntl: Any = None  # as on Windows, where a file that is open cannot be deleted
with contextlib.suppress(ImportError):
    fcntl = importlib.import_module("fcntl")

_LOCK = "lock"
_JOURNAL = "journal"
#: Bytes written between two entries of a journal.
SYNC_EVERY = 1 << 26


class Partial:
    """A folder that this process holds."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def create(cls, target: Path) -> Partial:
        """Make one beside a destination.

        Raises:
            OSError: if it cannot be made.
        """
        while True:
            prefix = f".{_short(target)}."
            folder = Path(tempfile.mkdtemp(".part", prefix, target.parent))
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                lock = _new_lock(folder)
                if _hold(lock, folder, needed=False):
                    return cls(folder, lock)
                os.close(lock)
            # another process took it for a leftover before it was locked

    def open(self, name: str) -> int:
        """A descriptor of a file in it, to be read and written."""
        flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | flags, 0o666)

    def release(self) -> None:
        """Leave it to whoever comes next."""
        os.close(self._lock)

    def remove(self) -> None:
        """Delete it with everything in it; the lock goes last."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                if name != _LOCK:
                    with contextlib.suppress(OSError):
                        os.unlink(self.folder / name)
        if fcntl is None:
            self.release()  # what is open cannot be deleted
        with contextlib.suppress(OSError):
            os.unlink(self.folder / _LOCK)
            os.rmdir(self.folder)
        if fcntl is not None:
            self.release()


def part_name(number: int) -> str:
    """What the files of a checkpoint are called in a partial folder."""
    return f"{number + 1:05d}"


def leftovers(target: Path) -> Iterator[Partial]:
    """Take hold of what killed processes left beside a destination, one by one.

    What another process holds is passed over. The caller releases or removes each.
    """
    pattern = re.compile(rf"\.{re.escape(_short(target))}\.[a-z0-9_]{{8}}\.part")
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(filter(pattern.fullmatch, os.listdir(target.parent)))
    for folder in (target.parent / name for name in names):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # killed before it was locked
        lock = _take(folder)
        if lock is not None:
            yield Partial(folder, lock)


def _new_lock(folder: Path) -> int:
    """The lock of a new folder; without one the folder is of no use."""
    try:
        return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        raise


def _short(target: Path) -> str:
    """As much of a name as leaves room for the rest in the 255 bytes there are."""
    return os.fsencode(target.name)[:200].decode("utf-8", "ignore")


def _take(folder: Path) -> int | None:
    """Lock a folder that exists; None if another process holds it."""
    path = folder / _LOCK
    try:
        if fcntl is None:
            os.unlink(path)  # fails while another process has it open
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        lock = os.open(path, os.O_RDWR)
    except OSError:
        return None
    if _hold(lock, folder, needed=True):
        return lock
    os.close(lock)
    return None


def _hold(lock: int, folder: Path, *, needed: bool) -> bool:
    """Whether the lock is this process's, and still the folder's.

    Where a file system has no locks nobody can take a folder from its maker, who needs
    none.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not needed and error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK))
    except OSError:
        return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process gives names in a folder, where a system can."""
    descriptor = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


# -- what can be relied on after a power cut -------------------------------------------


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where a system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, target: Path) -> None:
    """Give a finished file its name, with the permissions of the one it replaces."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(path, target.stat().st_mode & 0o777)
    os.replace(path, target)
    sync_folder(target.parent)


class Journal:
    """Which tensors of a partial file are on disk, so that another run can go on.

    The first line says what the file is made of; each further line is a key. A key is
    added only after its bytes, and everything before it, have been synced.
    """

    def __init__(self, partial: Partial, job: str, sync: Callable[[], None]) -> None:
        """Go on with a journal, or begin one.

        Args:
            partial: where it lies.
            job: what the file is made of; a journal of another job is not believed.
            sync: waits until everything written so far is on disk.
        """
        path, self._sync = partial.folder / _JOURNAL, sync
        self.done, end = _read_journal(path, job)
        self._file = path.open("r+b" if end else "wb")
        if not end:
            self._append([job])
        else:
            self._file.seek(end)
            self._file.truncate()  # a line that a kill cut short
        self._waiting: list[str] = []
        self._bytes = 0
        self._lock, self._writing = threading.Lock(), threading.Lock()

    @staticmethod
    def fits(partial: Partial, job: str) -> bool:
        """Whether a leftover is of the same job."""
        return _read_journal(partial.folder / _JOURNAL, job)[1] > 0

    def add(self, key: str, size: int) -> None:
        """Note that a tensor of some bytes was written; any thread may."""
        with self._lock:
            self._waiting.append(key)
            self._bytes += size
            enough = self._bytes >= SYNC_EVERY
        if enough:
            self.flush()

    def flush(self) -> None:
        """Sync what was written, then say so."""
        with self._writing:
            with self._lock:
                keys, self._waiting, self._bytes = self._waiting, [], 0
            if keys:
                self._sync()
                self._append(keys)

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _append(self, lines: list[str]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _read_journal(path: Path, job: str) -> tuple[frozenset[str], int]:
    """The keys in a journal of that job, and how much of it is whole; else nothing."""
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        said, *keys = map(json.loads, data[:end].splitlines())
    except (OSError, ValueError, RecursionError):
        return frozenset(), 0
    return (frozenset(keys), end) if said == job else (frozenset(), 0)
