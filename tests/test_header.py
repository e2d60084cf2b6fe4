"""Headers are read strictly: every malformed one is refused by name."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hijack.checkpoint.reader import open_tensors, read_header
from hijack.errors import HeaderError, HijackError


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=b"\0" * 8, length=None):
    """A file with that header, which may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return path


@pytest.fixture
def path(tmp_path):
    """Where a test writes."""
    return tmp_path / "x.safetensors"


def test_a_header_gives_dtypes_shapes_and_places(path):
    """Names, dtypes, shapes, metadata and the config beside the file."""
    save_file(
        {"a.weight": torch.ones(2, 3).half(), "b": torch.ones(4)}, path, {"k": "v"}
    )
    (path.parent / "config.json").write_text('{"quantization_config": {}}')
    header = read_header(path)
    assert header.tensors["a.weight"].dtype == "F16"
    assert header.tensors["a.weight"].shape == (2, 3)
    assert header.tensors["b"].file == path
    assert header.metadata == {"k": "v"}
    assert header.config == {"quantization_config": {}}
    assert list(header.layers()) == ["a"]


def test_tensors_are_mapped_and_equal_what_safetensors_reads(path):
    """Values of every dtype come back, and writing to one leaves the file alone."""
    tensors = {
        "e4": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "bf": torch.randn(7).bfloat16(),
        "empty": torch.empty(4, 0),
        "scalar": torch.tensor(2.5),
        "i8": torch.arange(5, dtype=torch.int8),
    }
    save_file(tensors, path)
    before = path.read_bytes()
    mapped = open_tensors(read_header(path))
    for key, tensor in tensors.items():
        assert mapped[key].dtype == tensor.dtype
        assert mapped[key].shape == tensor.shape
        assert torch.equal(mapped[key].float(), tensor.float()), key
    mapped["bf"].zero_()
    assert path.read_bytes() == before


MALFORMED = {
    "is 0 bytes long": b"",
    "is 3 bytes long": b"abc",
    "is a GGUF file": b"GGUF\x03\0\0\0rest",
    "never unpickles": b"\x80\x02}q\x00.....",
    "zip archive": b"PK\x03\x04........",
}


@pytest.mark.parametrize("message", MALFORMED)
def test_files_of_another_kind_are_named(path, message):
    """The message says what the file is instead."""
    path.write_bytes(MALFORMED[message])
    with pytest.raises(HeaderError, match=message):
        read_header(path)


HEADERS = {
    r"said to be 999 bytes": (b"{}", {"length": 999}),
    r"said to be 18446744073709551615 bytes": (b"{}", {"length": 2**64 - 1}),
    r"not UTF-8": (b'{"a\xff": 1}', {}),
    r"not JSON": (b"{,}", {}),
    r"nested too deeply": (b"[" * 100_000, {}),
    r"key 'a' twice": (b'{"a": 1, "a": 2}', {}),
    r"the header is list": (b"[]", {}),
    r"a: expected dtype, shape": ({"a": {"dtype": "F32"}}, {}),
    r"a: unknown dtype 'F33'": ({"a": entry("F33")}, {}),
    r"a: unknown dtype \[\]": ({"a": entry([])}, {}),
    r"a: shape \[-2\]": ({"a": entry(shape=(-2,))}, {}),
    r"a: shape \[True\]": ({"a": entry(shape=(True,))}, {}),
    r"a: 8 bytes for shape \[3\]": ({"a": entry(shape=(3,))}, {}),
    r"b: begins at byte 4.*overlaps": (
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"data": b"\0" * 12},
    ),
    r"a: begins at byte 4.*hole": (
        {"a": entry(offsets=(4, 12))},
        {"data": b"\0" * 12},
    ),
    r"take 8 bytes, the file has 4": ({"a": entry()}, {"data": b"\0" * 4}),
    r"take 8 bytes, the file has 9": ({"a": entry()}, {"data": b"\0" * 9}),
    r"__metadata__ must map": ({"__metadata__": {"a": 1}, "a": entry()}, {}),
}


@pytest.mark.parametrize("message", HEADERS)
def test_malformed_headers_are_refused_by_name(path, message):
    """Each defect has its own message, with the file's name in it."""
    header, options = HEADERS[message]
    write(path, header, **options)
    with pytest.raises(HeaderError, match=rf"x\.safetensors.*{message}"):
        read_header(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    """A path that cannot be read says why."""
    with pytest.raises(HeaderError, match="cannot be read; No such file"):
        read_header(tmp_path / "nothing")
    with pytest.raises(HeaderError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(HeaderError, match="empty list of shards"):
        read_header([])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names the shard '../x"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the shard '/etc"),
        ('{"weight_map": {"a": 7}}', "names the shard 7"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot be read"),
    ],
)
def test_index_files_cannot_lead_astray(tmp_path, index, message):
    """An index may only name files in its own folder."""
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(HeaderError, match=message):
        read_header(path)


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path):
    """A symbolic link to elsewhere is not followed."""
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "s.safetensors").symlink_to(outside)
    index = folder / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "s.safetensors"}}')
    with pytest.raises(HeaderError, match="is a link out of its folder"):
        read_header(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """Shards must not overlap."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({"w": torch.ones(1)}, path)
    with pytest.raises(HeaderError, match="holds 'w', as another shard does"):
        read_header(paths)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    """Any change to a file's bytes ends in a header or a HijackError."""
    path = tmp_path_factory.mktemp("mutated") / "x.safetensors"
    save_file({"a.weight": torch.ones(4, 4), "b": torch.ones(2)}, path, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[: cut if data.draw(st.booleans()) else None])
    try:
        header = read_header(path)
        tensors = open_tensors(header)
        shapes = {key: tuple(tensors[key].shape) for key in tensors}
    except HijackError:
        return
    assert shapes == {key: info.shape for key, info in header.tensors.items()}
