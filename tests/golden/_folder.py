"""Write one golden folder: a checkpoint, what it decodes to, and what it is.

The container is written here, so that the same tensors give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

HERE = Path(__file__).parent
#: Most bytes that everything in a folder may have.
MOST = 20_000
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
SCHEME = "blockwise_fp8"


def said(dialect, **layers):
    """What is expected of layers of one dialect, by layer; dots are two underscores."""
    return said_by(SCHEME, dialect, **layers)


def said_by(scheme, dialect, **layers):
    """As `said`, of any scheme."""
    return {
        name.replace("__", "."): {
            "scheme": scheme,
            "dialect": dialect,
            "block_size": list(size),
        }
        for name, size in layers.items()
    }


def write(name, tensors, *, program, about, metadata=None, config=None, **expected):
    """Write ``tests/golden/<name>``, one file.

    Args:
        name: of the folder.
        tensors: key to tensor.
        program: name and version of what wrote the tensors.
        about: what is special about it.
        metadata: of the header.
        config: ``quantization_config`` of a ``config.json`` beside it.
        expected: ``dense``, layer to tensor, goes to ``dense.safetensors``; the rest
            to ``expected.json``, as the README has it.
    """
    folder = start(name, program=program, about=about, config=config, **expected)
    write_tensors(folder / "model.safetensors", tensors, metadata)
    check(folder)


def start(name, *, program, about, config=None, dense=None, **expected):
    """Make the folder with everything but the checkpoint."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    said = {"written_by": program, "about": about, **expected}
    (folder / "expected.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    if config is not None:
        text = json.dumps({"quantization_config": config}, indent=1, default=str)
        (folder / "config.json").write_text(text + "\n", "utf-8")
    if dense:
        write_tensors(folder / "dense.safetensors", dense)
    return folder


def check(folder):
    """Refuse a folder that is too large."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size >= MOST:
        raise ValueError(f"{folder.name}: {size} bytes, expected under {MOST}")
    print(f"{folder.name}: {size} bytes")


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file, the widest dtypes first, then by name."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = dict(metadata)
    for key in order:
        raw = as_bytes(tensors[key])
        header[key] = {
            "dtype": NAMES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def as_bytes(tensor):
    """The elements of a tensor as they are stored."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def digest(tensor):
    """SHA-256 of the float32 elements, for what is too large to keep."""
    return hashlib.sha256(as_bytes(tensor.float())).hexdigest()


def comfy_marker(**entry):
    """The value of ``X.comfy_quant``: JSON in bytes."""
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def randn(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, the same each time; rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(shape, generator=generator) * rows).to(dtype)
