"""Read safetensors files: validate headers, map tensors into memory."""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import platform
import re
import reprlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hijack.errors import CheckpointError, HeaderError
from hijack.safetensors_io.files import (
    open_file,
    parse_json,
    read_configs,
    read_json,
)
from hijack.safetensors_io.header import (
    FileIdentity,
    Header,
    TensorInfo,
    bits_of,
    bytes_of,
    configured_metadata,
    gc_paused,
    merge_metadata,
)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Larger than any real header; beyond it the length is damaged or hostile.
MAX_HEADER = 100_000_000
#: Bytes the system is asked to read ahead at a time.
_AHEAD = 1 << 25
#: First bytes of files that are mistaken for safetensors, and what they are.
_MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, such as torch.save writes; hijack never unpickles",
    b"\x80\x02": "a pickle; hijack never unpickles",
    b"\x80\x04": "a pickle; hijack never unpickles",
    b"\x80\x05": "a pickle; hijack never unpickles",
}
#: A name that counts the shards of its set.
_COUNTED = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d+)\.safetensors")
#: Characters that no plain file name has.
_SEPARATORS = frozenset("/\\\0")


@gc_paused()
def read_header(source: Paths) -> Header:
    """Read the header of a checkpoint; no tensor data is read.

    Args:
        source: a safetensors file, a ``*.index.json`` that names shards, or a list of
            shards.

    Returns:
        The merged header of all shards, with the ``config.json`` beside them, if any.

    Raises:
        HeaderError: if a file is missing, not a safetensors file, or inconsistent.
    """
    paths, indexed = _shards(source)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    files: dict[Path, FileIdentity] = {}
    for path in paths:
        infos, shard_metadata, files[path] = _read_file(path)
        duplicates = tensors.keys() & infos.keys()
        if duplicates:
            raise HeaderError(
                f"{path}: holds {min(duplicates)!r}, as another shard does; expected "
                "each tensor in one file; leave one of the files out"
            )
        tensors |= infos
        metadata = merge_metadata(metadata, shard_metadata)
    missing = sorted(indexed - tensors.keys())
    if missing:
        raise HeaderError(
            f"{source}: names {missing[0]!r} and {len(missing) - 1} other tensors that "
            "no shard holds; the shards are of another checkpoint, or incomplete"
        )
    config = read_configs(paths[0].parent)
    metadata = merge_metadata(configured_metadata(config), metadata)
    name = _name(source, paths)
    reader = _MappedTensors(tensors, files).read_bytes
    return Header(tensors, metadata, config, name, reader, files)


def open_tensors(header: Header) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's files, mapped into memory.

    Args:
        header: as `read_header` returned it.

    Returns:
        Key to tensor on the CPU. Tensors share pages with the files: data is read when
        it is used, and writing to a tensor does not change the file. Asking for one
        raises CheckpointError if its file was replaced since the header was read. A
        file that is written to or cut short while it is mapped changes the tensors, or
        ends the process: move a new file into its place instead.
    """
    return _MappedTensors(header.tensors, header.files)


class _MappedTensors(Mapping[str, Tensor]):
    """Tensors as private copy-on-write maps of their files.

    `safetensors.safe_open` does not serve: it parses the header again for every file,
    lacks some dtypes, and refuses unaligned tensors.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], files: Mapping[Path, FileIdentity]
    ) -> None:
        self._tensors, self._expected = tensors, files
        self._files: dict[Path, tuple[mmap.mmap, Tensor, int]] = {}

    def __getitem__(self, key: str) -> Tensor:
        info = self._tensors[key]
        dtype = info.torch_dtype
        if dtype is None or info.file is None:
            raise CheckpointError(
                f"{key}: dtype {info.dtype} is not known to torch {torch.__version__}; "
                "install a newer torch"
            )
        _, data, start = self._map(info.file)
        raw = data[start + info.begin : start + info.end]
        shape = info.torch_shape
        if raw.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        if raw.numel() != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{key}: {info.dtype} of shape {list(info.shape)} has rows that end "
                "within a byte; expected rows of an even length, as in torch; store it "
                "as U8"
            )
        if raw.storage_offset() % dtype.itemsize:  # a writer that does not align
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def read_bytes(self, key: str) -> bytes | None:
        """The bytes of a tensor in a file, whatever its dtype."""
        info = self._tensors[key]
        if info.file is None:
            return None
        pages, _, start = self._map(info.file)
        return pages[start + info.begin : start + info.end]

    def _map(self, path: Path) -> tuple[mmap.mmap, Tensor, int]:
        """A file as a map, the map as a tensor, and the offset of its data section."""
        if path not in self._files:
            with open_file(path) as file:
                _check_identity(path, file, self._expected)
                start = _data_start(file)
                pages = _private_map(file.fileno())
            data = torch.frombuffer(pages, dtype=torch.uint8)
            self._files[path] = pages, data, start
        return self._files[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def prefetch(header: Header) -> None:
    """Have the system read a checkpoint's files into its cache, in the background.

    Mapped tensors are then there when they are used, instead of being read page by page
    at that time. It takes no memory of the process. Where the system cannot be asked to
    read ahead, as on Windows and macOS, nothing happens.

    Args:
        header: as `read_header` returned it.
    """
    if not header.files or not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(RuntimeError):  # no more threads: it is only a hint
        threading.Thread(
            target=_read_ahead, args=(tuple(header.files),), daemon=True
        ).start()


def _read_ahead(paths: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in paths:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for begin in range(0, size, _AHEAD):  # it waits for a full queue
                    os.posix_fadvise(
                        file.fileno(), begin, _AHEAD, os.POSIX_FADV_WILLNEED
                    )


def _private_map(descriptor: int) -> mmap.mmap:
    """A whole file as memory that may be written to, for this process alone.

    torch takes nothing else. Linux reserves memory for all of it, as if all were to be
    written to, and refuses files that are larger than what there is, unless it is told.
    """
    if platform.system() != "Linux":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | 0x4000  # MAP_NORESERVE, nameless before Python 3.13
    return mmap.mmap(descriptor, 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)


@contextlib.contextmanager
def open_data(info: TensorInfo) -> Iterator[BinaryIO]:
    """Open the file of a tensor unbuffered, at the tensor's first byte.

    Raises:
        CheckpointError: if the file cannot be read, or the tensor is in memory.
    """
    if info.file is None:
        raise CheckpointError("got a tensor in memory, expected one in a file")
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(_data_start(file) + info.begin)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: cannot be read; {error.strerror}"
        ) from error


def identity_of(stat: os.stat_result) -> FileIdentity:
    """What tells a file from another that has its name."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_identity(
    path: Path, file: BinaryIO, expected: Mapping[Path, FileIdentity]
) -> None:
    """Refuse a file that took the place of the one whose header was read."""
    known = expected.get(path)
    if known is not None and identity_of(os.fstat(file.fileno())) != known:
        raise CheckpointError(
            f"{path}: changed while it was read; expected it to stay unchanged; start "
            "again"
        )


def _data_start(file: BinaryIO | io.FileIO) -> int:
    return 8 + int.from_bytes(file.read(8), "little")


# -- which files -----------------------------------------------------------------------


def _shards(source: Paths) -> tuple[list[Path], set[str]]:
    """The files to read, and the keys of an index that must be in them."""
    if not isinstance(source, str | os.PathLike):
        paths = [Path(part) for part in source]
        if not paths:
            raise HeaderError("checkpoint: got an empty list of shards, expected files")
        return paths, set()
    path = Path(source)
    return _indexed(path) if path.name.endswith(".index.json") else ([path], set())


def _name(source: Paths, shards: Sequence[Path]) -> str:
    """A short name for a checkpoint, which may have hundreds of shards."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more}"


def _indexed(path: Path) -> tuple[list[Path], set[str]]:
    """The shards an index names, which must be in its own folder."""
    table = read_json(path)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{path}: has no weight_map, expected key to file name")
    names = list(weight_map.values())
    for name in names:
        if not _is_plain(name):
            raise HeaderError(
                f"{path}: names the shard {name!r}, expected a file in the same folder"
            )
    shards = [path.parent / name for name in dict.fromkeys(names)]
    for shard in shards:
        if _points_outside(shard):
            raise HeaderError(
                f"{path}: the shard {shard.name!r} is a link out of its folder; "
                "replace it with the file"
            )
    left_out = _unnamed(shards)
    if left_out is not None:
        raise HeaderError(
            f"{path}: does not name {left_out.name}, which is of the same set of "
            "shards; the index is of another checkpoint, or incomplete"
        )
    return shards, set(weight_map)


def _unnamed(shards: Collection[Path]) -> Path | None:
    """A shard that is there, is counted in the names of others, and is not named."""
    matches = [match for shard in shards if (match := _COUNTED.fullmatch(shard.name))]
    sets = {match.group("stem", "count") for match in matches}
    if not sets:
        return None
    with contextlib.suppress(OSError):  # whoever opens the shards will say it
        for sibling in sorted(next(iter(shards)).parent.iterdir()):
            found = _COUNTED.fullmatch(sibling.name)
            if found and found.group("stem", "count") in sets and sibling not in shards:
                return sibling
    return None


def _is_plain(name: object) -> bool:
    """Whether a value is a file name without folders."""
    if not isinstance(name, str) or not _is_text(name):
        return False
    return name not in ("", ".", "..") and not set(name) & _SEPARATORS


def _points_outside(shard: Path) -> bool:
    """Whether a shard is a link out of its folder, other than to a hub's blobs.

    Raises:
        HeaderError: if it cannot be resolved, for example because of a long name.
    """
    folder = shard.parent.absolute()
    try:
        if not shard.is_symlink():  # resolving thousands takes long
            return False
        inside = {folder.resolve(), *(root.resolve() for root in _blobs(folder))}
        return shard.resolve().parent not in inside
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before 3.13
        raise HeaderError(
            f"{folder}: the shard {reprlib.repr(shard.name)} cannot be read; "
            f"{getattr(error, 'strerror', error)}"
        ) from error


def _blobs(folder: Path) -> Iterator[Path]:
    """The folders of a hub's cache that files in ``snapshots/REVISION`` link to."""
    for parent in folder.parents:
        if parent.name == "snapshots":
            yield parent.with_name("blobs")


# -- one file --------------------------------------------------------------------------


def _read_file(
    path: Path,
) -> tuple[dict[str, TensorInfo], dict[str, str], FileIdentity]:
    with open_file(path) as file:
        stat = os.fstat(file.fileno())
        size = stat.st_size
        text = _header_bytes(path, file, size)
    table = _parse(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    infos = {key: _tensor_info(path, key, entry) for key, entry in table.items()}
    _check_layout(path, infos, size - 8 - len(text))
    return infos, metadata, identity_of(stat)


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    # the first bytes are a length: 80 02 may be a pickle, or a header of 640 bytes
    if head[8:] != b"{" or length > MAX_HEADER:
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                raise HeaderError(f"{path}: is {what}; expected a safetensors file")
    if len(head) < 8:
        raise HeaderError(f"{path}: is {size} bytes long, expected a safetensors file")
    if length > min(size - 8, MAX_HEADER):
        raise HeaderError(
            f"{path}: header length {length} exceeds the file size, {size}; it is "
            "truncated or not a safetensors file; download it again"
        )
    return head[8:] + file.read(length - 1) if length else b""


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    table = parse_json(text, f"{path}: the header")
    if not isinstance(table, dict):
        raise HeaderError(
            f"{path}: the header is {type(table).__name__}, expected a table"
        )
    for key in table:
        if not _is_text(key):
            raise HeaderError(f"{path}: the key {key!r} is not valid UTF-8")
    return table


def _is_text(text: str) -> bool:
    """Whether a string is free of lone surrogates, which JSON can escape."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _metadata(path: Path, table: Any) -> dict[str, str]:
    if table is None:  # safetensors reads null as no metadata
        return {}
    if not isinstance(table, dict) or not all(
        isinstance(value, str) and _is_text(key + value) for key, value in table.items()
    ):
        raise HeaderError(f"{path}: __metadata__ must map strings to strings")
    return table


def _tensor_info(path: Path, key: str, entry: Any) -> TensorInfo:
    where = f"{path}: {key}"
    needed = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or not needed <= entry.keys():
        raise HeaderError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = bits_of(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise HeaderError(f"{where}: unknown dtype {reprlib.repr(dtype)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise HeaderError(
            f"{where}: shape {reprlib.repr(shape)} or data_offsets "
            f"{reprlib.repr(offsets)} are malformed"
        )
    begin, end = offsets
    size = bytes_of(dtype, tuple(shape))
    if size is None:
        raise HeaderError(
            f"{where}: shape {shape} of {dtype} is too large, or not a whole number of "
            "bytes"
        )
    if end - begin != size:
        raise HeaderError(
            f"{where}: {end - begin} bytes for shape {shape} of {dtype}, "
            f"expected {size}"
        )
    return TensorInfo(dtype, tuple(shape), path, begin, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_layout(path: Path, infos: Mapping[str, TensorInfo], size: int) -> None:
    """Tensors must fill the data section without holes or overlaps."""
    ordered = sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end))
    end = 0
    for key, info in ordered:
        if info.begin != end:
            what = (
                "overlaps the tensor before it" if info.begin < end else "leaves a hole"
            )
            raise HeaderError(
                f"{path}: {key}: begins at byte {info.begin}, expected {end}; it {what}"
            )
        end = info.end
    if end != size:
        raise HeaderError(
            f"{path}: tensors take {end} bytes, the file has {size}; it is truncated "
            "or damaged; download it again"
        )
