"""Ways to damage a checkpoint: what a disk, a careless tool or an enemy would do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.case import MODEL, WIDTHS, Case, Entry, Parts, join_pairs, resize

#: Values that programs forget: of the wrong type, out of range, or text no one expects.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**53,
    2**63,
    2**64,
    10**400,
    0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    ".",
    "\0",
    "\ud800",
    "é" * 5,
    "128x128",
    "F8_E4M3",
    "1" * 5000,
    [],
    {},
    [[]],
    [1, 2],
    [128, 128],
    [0, 0],
    [-1, 4],
    [1, 2, 3],
    ["a", None],
    {"a": {"b": None}},
)
#: What parts of files are called, in all formats: renaming leads into their code.
WORDS = (
    "weight",
    "bias",
    "scale_weight",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "input_scale",
    "scale_input",
    "comfy_quant",
    "scaled_fp8",
    "weight_block_size",
    "weight_packed",
    "weight_scalar",
    "weight._data",
    "weight._scale",
    "weight_qdata",
    "weight_qdata_scale",
    "qscale_weight",
    "scale",
    "absmax",
    "quant_map",
    "SCB",
    "zero_point",
    "weight_shape",
    "weight_rotation",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "pre_quant_scale",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "lora_down.weight",
    "lora_up.weight",
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "lokr_w1",
    "hada_t1",
)
METADATA = (
    "hijack",
    "_quantization_metadata",
    "quantization_config",
    "tensor_names",
    "lora_adapter_metadata",
    "a.weight",
    "format",
    "fp8r",
)
SIZES = (0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 128, 2**31, 2**62)
LONG = (3, 128, 2**22 + 1, 2**31, 2**62)
BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\x7f\xc0", b"\x80\x7f", b"\x00\x00\xc0")
FLOATS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\0\0\x80\xbf", b"\xff" * 4)
NAMES = ("../x", "/etc/passwd", "..", ".", "", "a\\b", "C:x", "\0", "x" * 300, "absent")


def mutate(case: Case, random: Random) -> Case:
    """A damaged copy; a case and a state of the generator give the same each time."""
    case = copy.deepcopy(case)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        names = [name for name in case.files if name.endswith(".json")]
        if names and random.random() < 0.3:
            _json_file(case, random.choice(names), random)
        elif random.random() < 0.08:
            _folder(case, random)
        else:
            models = [name for name in case.files if name.endswith(".safetensors")]
            if models:
                _file(case, random.choice(models), random)
    return case


# -- one file ----------------------------------------------------------------------


def _file(case: Case, name: str, random: Random) -> None:
    content = case.files[name]
    if isinstance(content, str):
        return
    parts = Parts.attempt(content)
    if parts is None or random.random() < 0.12:
        case.files[name] = _bytes(content, random)
    elif random.random() < 0.25:
        case.files[name] = parts.pack(_header(parts, random))
    else:
        random.choice(_STRUCTURAL)(parts, random)
        try:
            case.files[name] = parts.pack()
        except (ValueError, RecursionError):
            case.files[name] = _bytes(content, random)


def _bytes(content: bytes, random: Random) -> bytes:
    """Flipped, cut, longer, or with another length before the header."""
    way, raw = random.randrange(7), bytearray(content)
    at = random.randrange(len(raw) + 1)
    if way == 0 and raw:
        for _ in range(random.choice((1, 1, 4))):
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    elif way == 1:
        del raw[at:]
    elif way == 2:
        raw += random.randbytes(random.choice((1, 8, 64)))
    elif way == 3:
        length = int.from_bytes(raw[:8], "little") + random.choice((-9, -1, 1, 8, 99))
        wild = random.choice((length % 2**64, 0, 1, 2**63, 2**64 - 1, 10**8))
        raw[:8] = random.choice((length % 2**64, wild)).to_bytes(8, "little")
    elif way == 4:
        raw[at : at + random.choice((0, 1, 4))] = random.choice(BYTES)
    elif way == 5:
        raw[:4] = random.choice((b"GGUF", b"PK\x03\x04", b"\x80\x02", b"{"))
    else:
        end = random.randrange(len(raw) + 1)
        raw[at:at] = raw[min(at, end) : max(at, end)][:512]
    return bytes(raw)


def _header(parts: Parts, random: Random) -> bytes:
    """A header that may contradict the data, or is none at all."""
    way, pairs = random.randrange(6), parts.table()
    if way == 0:
        random.shuffle(pairs)
        pairs.append(random.choice(pairs or [("a", {})]))
    elif way == 1:
        nested = random.choice(("[", '{"a":')) * random.choice((50, 1500))
        return f'{{"a.weight": {nested}'.encode()
    elif way == 2:
        text = bytearray(join_pairs(pairs))
        text[random.randrange(len(text))] = random.choice((0x80, 0xFF, 0, 0x22))
        return bytes(text)
    elif way == 3:
        return join_pairs(pairs).ljust(random.choice((1, 1500)), b" ")
    else:
        table = json.loads(json.dumps(dict(pairs)))
        return json.dumps(change(table, random)).encode()
    return join_pairs(pairs)


# -- tensors -------------------------------------------------------------------------


def _pick(parts: Parts, random: Random) -> Entry:
    if not parts.entries:
        parts.entries.append(Entry("a.weight", "F8_E4M3", [4, 4], b"8" * 16))
    return random.choice(parts.entries)


def _drop(parts: Parts, random: Random) -> None:
    parts.entries.remove(_pick(parts, random))


def _rename(parts: Parts, random: Random) -> None:
    entry = _pick(parts, random)
    layer = entry.key.rpartition(".")[0]
    odd = ("", ".", "..weight", "\0", "__metadata__", "weight", "a" * 300, "\ud800")
    entry.key = random.choice(
        (
            f"{layer}.{random.choice(WORDS)}",
            f"{random.choice(WORDS)}",
            f"model.{entry.key}",
            random.choice(odd),
        )
    )


def _copy(parts: Parts, random: Random) -> None:
    entry = copy.copy(_pick(parts, random))
    layer = entry.key.rpartition(".")[0]
    entry.key = random.choice(
        (entry.key, f"{layer}.{random.choice(WORDS)}", "c.weight")
    )
    parts.entries.append(entry)


def _retype(parts: Parts, random: Random) -> None:
    entry = _pick(parts, random)
    entry.dtype = random.choice(list(WIDTHS))
    resize(entry)


def _reshape(parts: Parts, random: Random) -> None:
    """Other sides, one more, one less; the data follow where they are not too many."""
    entry, way = _pick(parts, random), random.randrange(6)
    if way == 0:
        entry.shape = [random.choice(SIZES) for _ in range(random.randrange(5))]
    elif way == 1:
        entry.shape.insert(random.randrange(len(entry.shape) + 1), random.choice(SIZES))
    elif way == 2 and entry.shape:
        entry.shape.pop(random.randrange(len(entry.shape)))
    elif way == 3 and entry.shape:
        entry.shape[random.randrange(len(entry.shape))] = random.choice(SIZES)
    elif way == 4:
        entry.shape = [1] * random.choice((1, 3, 70)) + entry.shape
    else:
        entry.shape = list(_pick(parts, random).shape)
    resize(entry)


def _empty(parts: Parts, random: Random) -> None:
    """A layer without elements, one of whose sides is long: it takes no bytes."""
    layer, long = _pick(parts, random).key.rpartition(".")[0], random.choice(LONG)
    for entry in parts.entries:
        if entry.key.rpartition(".")[0] == layer and len(entry.shape) > 1:
            entry.shape = [long // (1 + ("scale" in entry.key)), 0]
            entry.data = b""
    if random.random() < 0.5:
        block = [random.choice((1, 2)), random.choice((1, long)), 0]
        parts.entries.append(Entry(f"{layer}.weight_block_size", "U8", block, b""))


def _payload(parts: Parts, random: Random) -> None:
    """NaN, infinities, zeros, negative numbers, exponents of 0xFF."""
    entry = _pick(parts, random)
    filler = random.choice((*BYTES, *FLOATS))
    size = len(entry.data)
    whole = (filler * (size // len(filler) + 1))[:size]
    at = random.randrange(size + 1)
    entry.data = random.choice((whole, (entry.data[:at] + whole[at:])))


def _swap(parts: Parts, random: Random) -> None:
    one, two = _pick(parts, random), _pick(parts, random)
    one.key, two.key = two.key, one.key


def _marker(parts: Parts, random: Random) -> None:
    """JSON in bytes, beside a layer."""
    markers = [e for e in parts.entries if e.key.endswith("comfy_quant")]
    if markers:
        entry = random.choice(markers)
        try:
            table = json.loads(entry.data)
        except (ValueError, RecursionError):
            table = {"format": "float8_e4m3fn"}
    else:
        layer = _pick(parts, random).key.rpartition(".")[0]
        entry, table = (
            Entry(f"{layer}.comfy_quant", "U8", [0], b""),
            {"format": "mxfp8"},
        )
        parts.entries.append(entry)
    formats = ("float8_e5m2", "mxfp8", "hybrid_mxfp8", "nvfp4")
    formats += ("int8_tensorwise", "int8_blockwise")
    table = change(table, random)
    if isinstance(table, dict) and random.random() < 0.4:
        table["format"] = random.choice(formats)
    entry.data = json.dumps(table).encode()
    entry.shape = [len(entry.data)]


def _metadata(parts: Parts, random: Random) -> None:
    """A table in the metadata, damaged or added."""
    known = [*parts.metadata, random.choice(METADATA)]
    key = random.choice(known)
    try:
        table = json.loads(parts.metadata[key])
    except (KeyError, ValueError, RecursionError):
        entry = {"scheme": "blockwise_fp8", "params": ["weight_scale"], "format": "x"}
        layers = {_pick(parts, random).key.rpartition(".")[0]: entry}
        table = random.choice(
            (
                {"version": 1, "layers": layers},
                {"format_version": "1.0", "layers": layers},
                {"quant_method": "fp8", "weight_block_size": [8, 8]},
                {"quant_method": "compressed-tensors", "config_groups": layers},
                {"_type": "Float8Tensor", "_data": entry},
                [e.key for e in parts.entries],
            )
        )
    text = json.dumps(change(table, random))
    if random.random() < 0.1:
        text = text[: random.randrange(len(text) + 1)]
    parts.metadata[key] = "[" * 3000 if random.random() < 0.02 else text


_STRUCTURAL: tuple[Callable[[Parts, Random], None], ...] = (
    _drop,
    _rename,
    _copy,
    _retype,
    _reshape,
    _reshape,
    _payload,
    _empty,
    _swap,
    _marker,
    _metadata,
    _metadata,
)


# -- JSON ------------------------------------------------------------------------------


def change(table: Any, random: Random) -> Any:
    """A JSON value with something in it dropped, renamed or replaced."""
    places = list(_places(table))
    if not places:
        return random.choice(VALUES)
    owner, key = random.choice(places)
    way = random.randrange(5)
    if way == 0:
        del owner[key]
    elif way == 1 and isinstance(owner, dict):
        owner[random.choice((*WORDS, "layers", "a", "", "\0"))] = owner.pop(key)
    elif way == 2:
        owner[key] = _near(owner[key], random)
    elif way == 3:
        other, name = random.choice(places)
        owner[key] = copy.deepcopy(other[name])
    else:
        owner[key] = random.choice(VALUES)
    return table


def _near(value: Any, random: Random) -> Any:
    """Another value of the same type."""
    if type(value) is int:
        return value + random.choice((-1, 1, 7, -value, value, 2**40))
    if isinstance(value, str):
        return random.choice(
            (value.upper(), value[:-1], value + "_2", [value], value * 9)
        )
    if isinstance(value, list):
        return value + value[:1]
    return [value]


def _places(value: Any) -> Any:
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from _places(inner)


# -- what lies beside ------------------------------------------------------------------


def _json_file(case: Case, name: str, random: Random) -> None:
    content = case.files[name]
    if isinstance(content, str):
        return
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        case.files[name] = _bytes(content, random)
        return
    where = table.get("weight_map") if isinstance(table, dict) else None
    if isinstance(where, dict) and where and random.random() < 0.5:
        key = random.choice(list(where))
        where[key] = random.choice((*NAMES, *case.files))
    else:
        table = change(table, random)
    case.files[name] = json.dumps(table).encode()
    if random.random() < 0.15:
        case.files[name] = _bytes(case.files[name], random)


def _folder(case: Case, random: Random) -> None:
    """A file that is missing, empty, a link, or an index of it."""
    name, way = random.choice(list(case.files)), random.randrange(5)
    if way == 0 and name != case.main:
        del case.files[name]
    elif way == 1:
        case.files[name] = b""
    elif way == 2:
        targets = ("../outside", "/dev/zero", "absent", name, case.main, "/etc")
        case.files[name] = random.choice(targets)
    elif way == 3 and MODEL in case.files:
        content = case.files[MODEL]
        parts = Parts.attempt(content) if isinstance(content, bytes) else None
        keys = [entry.key for entry in parts.entries] if parts else ["a.weight"]
        table = {"weight_map": dict.fromkeys(keys, MODEL), "metadata": {}}
        case.main = "model.safetensors.index.json"
        case.files[case.main] = json.dumps(change(table, random)).encode()
    else:
        config = {"quantization_config": {"quant_method": "fp8"}}
        case.files["config.json"] = json.dumps(change(config, random)).encode()
