"""Atomic replacement of files, and the one rule for what may be replaced.

A file is written in a folder ``.NAME.xxxxxxxx.part`` beside its destination, synced to
disk, and renamed. A writing process holds a lock, ``.NAME.lock``, which the system
releases when the process ends. So whoever holds the lock knows that any such folder was
left by a killed process, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# a requirement of torch, so always installed
from filelock import FileLock, Timeout

from hijack.errors import CheckpointError
from hijack.text import logger

log = logger(__name__)


def refuse_replacing(
    targets: Iterable[Path], sources: Iterable[Path] = (), *, overwrite: bool
) -> None:
    """Refuse to replace a source, or any other file that nobody agreed to lose.

    Every path that hijack writes passes here.

    Args:
        targets: paths to write or delete; they need not exist.
        sources: files that what is written is made from.
        overwrite: whether files other than the sources may be replaced.

    Raises:
        CheckpointError: naming the first file that must not be replaced.
    """
    existing = [path for path in sources if path.exists()]
    for target in filter(Path.exists, targets):
        if any(os.path.samefile(path, target) for path in existing):
            raise CheckpointError(
                f"{target}: is the source itself; expected another file to write to"
            )
        if not overwrite:
            raise CheckpointError(
                f"{target}: exists; pass --force (in Python overwrite=True) to "
                "replace it, or write elsewhere"
            )


@contextlib.contextmanager
def new_file(
    target: Path, sources: Iterable[Path] = (), *, overwrite: bool
) -> Iterator[Path]:
    """A path to write a small file to, which then becomes the target.

    Args:
        target: the file that appears, whole, at the end; a link is followed.
        sources: as for `refuse_replacing`.
        overwrite: as for `refuse_replacing`.

    Raises:
        CheckpointError: if the target is no file or must not be replaced, or cannot be
            written.
    """
    if target.exists() and not target.is_file():
        raise CheckpointError(
            f"{target}: is a folder, a pipe or a device; expected a file name"
        )
    refuse_replacing([target], sources, overwrite=overwrite)
    real = Path(os.path.realpath(target))
    try:
        with temp_dir(real) as folder:
            part = folder / "part"
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            refuse_replacing([target], sources, overwrite=overwrite)
            replace(part, real)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: cannot be written; {reason}") from error


@contextlib.contextmanager
def temp_dir(
    target: Path, clean: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """A temporary folder beside a destination; it is removed at the end.

    No other process writes to the destination meanwhile. On file systems without locks
    others may; each has its own folder, and those of killed processes stay.

    Args:
        target: the destination.
        clean: called with each folder before it is removed: first those of killed
            processes, at the end this one.

    Raises:
        OSError: if the folder cannot be created.
    """
    prefix = f".{_short_name(target)}."
    with _exclusive(target.with_name(f"{prefix}lock")) as locked:
        for stale in _temp_dirs(target.parent, prefix) if locked else ():
            _remove(stale, clean)
        folder = Path(tempfile.mkdtemp(".part", prefix, target.parent))
        try:
            yield folder
        finally:
            _remove(folder, clean)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock file, waiting if necessary; yields whether locks work here.

    The file is deleted at the end. A process that waited for a file that is deleted by
    then tries again.
    """
    if _is_foreign(path):
        yield False
        return
    lock = FileLock(path, thread_local=False)
    while True:
        try:
            # open, so that the system does not reuse its inode number
            with path.open("ab") as file:
                _acquire(lock, path)
                if _is_file(path, os.fstat(file.fileno())):
                    break
                lock.release()
        except (OSError, NotImplementedError):  # no locks, or no permission
            yield False
            return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):  # on Windows, release deletes it
            os.unlink(path)
        lock.release()


def _is_foreign(path: Path) -> bool:
    """Whether it is a link, a pipe or the like of another program."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # there is none, or its last holder has just deleted it
        return False


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: waiting for another process that writes the file", path)
        lock.acquire()


def _is_file(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), opened)
    except OSError:
        return False


def _temp_dirs(parent: Path, prefix: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}\.part")
    return [
        Path(entry.path)
        for entry in os.scandir(parent)
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _remove(folder: Path, clean: Callable[[Path], None]) -> None:
    clean(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _short_name(target: Path) -> str:
    """A name, truncated so that prefix and suffix fit into 255 bytes."""
    return os.fsencode(target.name)[:200].decode("utf-8", "ignore")


# -- durability ------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and sync it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, target: Path) -> None:
    """Rename a finished file, with the permissions of the one it replaces."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(path, target.stat().st_mode & 0o777)
    os.replace(path, target)
    sync_folder(target.parent)
