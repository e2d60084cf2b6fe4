"""Read safetensors files: headers strictly, tensors without copying."""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hijack.errors import CheckpointError, HeaderError
from hijack.safetensors_io.files import (
    DuplicateError,
    open_file,
    read_configs,
    read_json,
    without_duplicates,
)
from hijack.safetensors_io.gc_paused import uncollected
from hijack.safetensors_io.header import (
    Header,
    TensorInfo,
    bits_of,
    bytes_of,
    joined,
)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: No real header comes near; larger ones are a damaged or hostile length.
MAX_HEADER = 100_000_000
#: First bytes of files people take for safetensors, and what they are.
_MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, such as torch.save writes; hijack never unpickles",
    b"\x80\x02": "a pickle; hijack never unpickles",
    b"\x80\x04": "a pickle; hijack never unpickles",
    b"\x80\x05": "a pickle; hijack never unpickles",
}
#: What no plain file name holds.
_APART = frozenset("/\\\0")


@uncollected()
def read_header(source: Paths) -> Header:
    """Read what a checkpoint says about itself; no tensor data is read.

    Args:
        source: a safetensors file, a ``*.index.json`` that names shards, or a list of
            shards.

    Returns:
        The header of all shards together, with ``config.json`` if it lies beside them.

    Raises:
        HeaderError: if a file is missing, no safetensors file, or contradicts itself.
    """
    paths, named = _shards(source)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, extra = _read_one(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise HeaderError(
                f"{path}: holds {min(twice)!r}, as another shard does; expected "
                "each tensor in one file; leave one of the files out"
            )
        tensors |= found
        metadata = joined(metadata, extra)
    absent = sorted(named - tensors.keys())
    if absent:
        raise HeaderError(
            f"{source}: names {absent[0]!r} and {len(absent) - 1} other tensors that "
            "no shard holds; the shards are of another checkpoint, or incomplete"
        )
    config = read_configs(paths[0].parent)
    name = _name(source, paths)
    return Header(tensors, metadata, config, name, _SmallTensors(tensors))


def open_tensors(header: Header) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's files, mapped into memory.

    Args:
        header: as `read_header` gave it.

    Returns:
        Key to tensor on the CPU. Tensors share pages with the files: nothing is read
        before it is used, and writing to one does not change the file.
    """
    return _MappedTensors(header)


class _SmallTensors:
    """Reads the bytes of a few small tensors, without a mapping for each."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._data: dict[Path, tuple[mmap.mmap, int]] = {}

    def __call__(self, key: str) -> bytes | None:
        info = self._tensors[key]
        if info.file is None:
            return None
        if info.file not in self._data:
            with open_file(info.file) as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data[info.file] = pages, start
        pages, start = self._data[info.file]
        return pages[start + info.begin : start + info.end]


class _MappedTensors(Mapping[str, Tensor]):
    """Tensors as private copy-on-write maps of their files."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._data: dict[Path, tuple[Tensor, int]] = {}

    def __getitem__(self, key: str) -> Tensor:
        info = self._header.tensors[key]
        dtype = info.torch_dtype
        if dtype is None or info.file is None:
            raise CheckpointError(
                f"{key}: dtype {info.dtype} is not known to torch {torch.__version__}; "
                "install a newer torch"
            )
        data, start = self._map(info.file)
        raw = data[start + info.begin : start + info.end]
        shape = info.torch_shape
        if raw.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        if raw.numel() != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{key}: {info.dtype} of shape {list(info.shape)} has rows that end "
                "within a byte; expected rows of an even length, as torch holds them; "
                "store it as U8"
            )
        if raw.storage_offset() % dtype.itemsize:  # a writer that does not align
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def _map(self, path: Path) -> tuple[Tensor, int]:
        if path not in self._data:
            with open_file(path) as file:
                length = int.from_bytes(file.read(8), "little")
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._data[path] = torch.frombuffer(pages, dtype=torch.uint8), 8 + length
        return self._data[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.tensors)

    def __len__(self) -> int:
        return len(self._header.tensors)


def data_start(path: Path) -> int:
    """Offset of the data section of a file whose header was read."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# -- which files -----------------------------------------------------------------------


def _shards(source: Paths) -> tuple[list[Path], set[str]]:
    """The files to read, and the tensors that must be in them."""
    if not isinstance(source, str | os.PathLike):
        paths = [Path(part) for part in source]
        if not paths:
            raise HeaderError("checkpoint: got an empty list of shards, expected files")
        return paths, set()
    path = Path(source)
    return _indexed(path) if path.name.endswith(".index.json") else ([path], set())


def _name(source: Paths, shards: Sequence[Path]) -> str:
    """What to call a checkpoint; it may have hundreds of shards."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more}"


def _indexed(path: Path) -> tuple[list[Path], set[str]]:
    """The shards an index names, all of them plain names in its own folder."""
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
        if _leads_out(shard):
            raise HeaderError(
                f"{path}: the shard {shard.name!r} is a link out of its folder; "
                "replace it by the file"
            )
    return shards, set(weight_map)


def _is_plain(name: object) -> bool:
    """Whether a name is one that a file in some folder may have, and no path."""
    if not isinstance(name, str) or not _is_text(name):
        return False
    return name not in ("", ".", "..") and not set(name) & _APART


def _leads_out(shard: Path) -> bool:
    """Whether a shard is a link, and leads to neither its folder nor a hub's blobs.

    Raises:
        HeaderError: if nobody can tell, such as of a name that is too long.
    """
    folder = shard.parent.absolute()
    try:
        if not shard.is_symlink():  # to resolve each of thousands takes long
            return False
        inside = {folder.resolve(), *(root.resolve() for root in _blobs(folder))}
        return shard.resolve().parent not in inside
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before 3.13
        raise HeaderError(
            f"{folder}: the shard {reprlib.repr(shard.name)} cannot be read; "
            f"{getattr(error, 'strerror', error)}"
        ) from error


def _blobs(folder: Path) -> Iterator[Path]:
    """Where a hub's cache has what files in ``snapshots/REVISION`` link to."""
    for parent in folder.parents:
        if parent.name == "snapshots":
            yield parent.with_name("blobs")


# -- one file --------------------------------------------------------------------------


def _read_one(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = _header_bytes(path, file, size)
    table = _parse(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    infos = {key: _tensor_info(path, key, entry) for key, entry in table.items()}
    _check_layout(path, infos, size - 8 - len(text))
    return infos, metadata


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
            f"{path}: the header is said to be {length} bytes, in a file of {size}; "
            "the file is truncated or no safetensors file; download it again"
        )
    return head[8:] + file.read(length - 1) if length else b""


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode(), object_pairs_hook=without_duplicates)
    except DuplicateError as error:
        raise HeaderError(f"{path}: the header has the key {error} twice") from error
    except UnicodeDecodeError as error:
        raise HeaderError(f"{path}: the header is not UTF-8; {error.reason}") from error
    except RecursionError as error:
        raise HeaderError(f"{path}: the header is nested too deeply") from error
    except ValueError as error:
        raise HeaderError(f"{path}: the header is not JSON; {error}") from error
    if not isinstance(table, dict):
        raise HeaderError(
            f"{path}: the header is {type(table).__name__}, expected a table"
        )
    for key in table:
        if not _is_text(key):
            raise HeaderError(f"{path}: the key {key!r} is no text UTF-8 could hold")
    return table


def _is_text(text: str) -> bool:
    """Whether a string is free of lone surrogates, which JSON can escape."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _metadata(path: Path, table: Any) -> dict[str, str]:
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
            f"{where}: shape {shape} of {dtype} is too large, or no whole number of "
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
