"""Headers are read strictly: every malformed one is refused by name."""

import gc
import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hijack
from hijack.errors import HeaderError, HijackError
from hijack.formats.identification import identify
from hijack.safetensors_io import files
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.safetensors_io.writer import write_checkpoint


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


@pytest.mark.parametrize("length", [640, 1152, 1408])
def test_a_length_that_looks_like_a_pickle_is_a_length(path, length):
    """Headers of 640, 1152 and 1408 bytes begin with the bytes of three pickles."""
    text = json.dumps({"a": entry()}).encode().ljust(length)
    assert list(read_header(write(path, text)).tensors) == ["a"]


def test_4_bit_tensors_have_torchs_shape_in_memory_and_safetensors_on_disk(path):
    """Two numbers are one element of torch; the file counts numbers, as it should."""
    packed = torch.arange(8, dtype=torch.uint8).view(2, 4)
    tensor = packed.view(torch.float4_e2m1fn_x2)
    write_checkpoint(path, {"a": tensor})
    header = read_header(path)
    assert header.tensors["a"].shape == (2, 8)
    mapped, loaded = open_tensors(header)["a"], load_file(path)["a"]
    assert mapped.shape == loaded.shape == (2, 4)
    assert torch.equal(mapped.view(torch.uint8), packed)
    assert torch.equal(loaded.view(torch.uint8), packed)


def test_a_key_that_ends_like_a_weight_is_no_layer(path):
    """The key ".weight" belongs to nobody, and to no error."""
    header = read_header(write(path, {".weight": entry()}))
    assert list(header.layers()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_devices_are_refused_without_waiting(path):
    """Opening a pipe that nobody writes to would never return."""
    os.mkfifo(path)
    with pytest.raises(HeaderError, match="is a pipe or a device"):
        read_header(path)


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
    r"header length 999 exceeds the file size": (b"{}", {"length": 999}),
    r"header length 18446744073709551615 exceeds": (b"{}", {"length": 2**64 - 1}),
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
    r"a: shape \[4611686018427387904, 4611686018427387904, 0\].*too large": (
        {"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))},
        {"data": b""},
    ),
    r"a: shape \[3\] of F4 .*not a whole number": (
        {"a": entry("F4", (3,), (0, 1))},
        {"data": b"\0"},
    ),
    r"is not valid UTF-8": ({"\ud800": entry()}, {}),
    r"not JSON; Exceeds the limit": (b'{"a": ' + b"9" * 5000 + b"}", {}),
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
    with pytest.raises(HeaderError, match="is not a valid file name"):
        read_header("a\0b")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names the shard '../x"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the shard '/etc"),
        ('{"weight_map": {"a": "x\\u0000"}}', r"names the shard 'x\\x00'"),
        ('{"weight_map": {"a": 7}}', "names the shard 7"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "cannot be read"),
        ('{"weight_map": {"a": "x", "a": "s.safetensors"}}', "has the key 'a' twice"),
        ('{"weight_map": {"a": "%s"}}' % ("x" * 5000), "cannot be read"),
        ("[" * 100_000, r"index\.json: is nested too deeply"),
    ],
)
def test_index_files_cannot_lead_astray(tmp_path, index, message):
    """An index may only name files in its own folder."""
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(HeaderError, match=message):
        read_header(path)


def test_an_index_whose_shards_lack_a_tensor_is_refused(tmp_path):
    """Shards of another checkpoint, or of half of one, are noticed."""
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    path = tmp_path / "m.safetensors.index.json"
    names = dict.fromkeys(["a", "b"], "s.safetensors")
    path.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(HeaderError, match="names 'b' and 0 other tensors"):
        read_header(path)


def test_an_index_that_leaves_a_shard_out_is_refused(tmp_path):
    """The scales may be in it; shards of other sets in the folder do not count."""
    for name in ("m-00001-of-00002", "m-00002-of-00002", "n-00001-of-00002", "m"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    path = tmp_path / "m.safetensors.index.json"
    shards = {f"m-0000{i}-of-00002": f"m-0000{i}-of-00002.safetensors" for i in (1, 2)}
    path.write_text(json.dumps({"weight_map": shards}))
    assert len(read_header(path).tensors) == 2
    del shards["m-00002-of-00002"]
    path.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(HeaderError, match="does not name m-00002-of-00002"):
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


@pytest.mark.parametrize("blobs", [True, False])
def test_a_hub_s_cache_links_to_its_blobs_and_nowhere_else(tmp_path, blobs):
    """A folder that is called as those of a cache are gives no other rights."""
    target = tmp_path / ("blobs" if blobs else "private") / "1234"
    target.parent.mkdir()
    save_file({"a": torch.ones(1)}, target)
    folder = tmp_path / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    (folder / "s.safetensors").symlink_to(target)
    index = folder / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "s.safetensors"}}')
    if blobs:
        assert list(read_header(index).tensors) == ["a"]
    else:
        with pytest.raises(HeaderError, match="is a link out of its folder"):
            read_header(index)


def test_an_index_that_is_a_pipe_or_endless_is_refused(tmp_path, monkeypatch):
    """No more of it is read than any index has."""
    index = tmp_path / "m.safetensors.index.json"
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    index.write_text(" " * 1001)
    with pytest.raises(HeaderError, match="is longer than 1,000 bytes"):
        read_header(index)
    if hasattr(os, "mkfifo"):
        index.unlink()
        os.mkfifo(index)
        with pytest.raises(HeaderError, match=r"json: is a pipe or a device"):
            read_header(index)


def test_a_config_of_any_size_is_no_obstacle(path, monkeypatch):
    """Another program's file: what cannot be read of it is left unread."""
    write(path, {"a": entry()})
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    path.with_name("config.json").write_text('{"a": "%s"}' % ("x" * 1000))
    assert read_header(path).config is None


@pytest.mark.parametrize("name", ["a\x1b[31m\nerror: b", "a\u202eb", "a" * 1_000_000])
def test_messages_are_one_short_line_that_can_be_printed(path, name):
    """Whatever a key is, it moves no cursor, turns no text and fills no screen."""
    write(path, {name: entry(shape=(3,))})
    with pytest.raises(HeaderError, match=r"8 bytes for shape \[3\]") as caught:
        read_header(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5000


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
SIZES = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**63, 2**64]) | JSON
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F4", "F6_E2M3", "BOOL", "C64"]) | JSON,
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES, max_size=3) | JSON,
    },
)
KEYS = st.sampled_from(["a.weight", "a.weight_scale", ".weight", "weight", ""])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(KEYS | st.text(max_size=3), ENTRIES | JSON, max_size=3) | JSON,
    st.none() | st.dictionaries(st.text(max_size=3), JSON, max_size=2),
    st.binary(max_size=9),
)
def test_any_json_is_read_or_refused(tmp_path_factory, table, metadata, data):
    """Whatever a header says, it ends in tensors of that shape, or a HijackError."""
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    if isinstance(table, dict) and metadata is not None:
        table["__metadata__"] = metadata
    try:
        header = read_header(write(path, table, data))
        tensors = open_tensors(header)
        for key, info in header.tensors.items():
            assert info.torch_dtype is None or tensors[key].shape == info.torch_shape
    except HijackError:
        return
    identify(header)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path, enabled):
    """It is paused while a header is read, whether that succeeds or not."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.ones(2)}, path)
    (gc.enable if enabled else gc.disable)()
    try:
        read_header(path)
        assert gc.isenabled() == enabled
        with pytest.raises(HeaderError):
            read_header(tmp_path / "none.safetensors")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_metadata_of_null_is_none(tmp_path):
    """safetensors reads it so, and with it every program that uses it."""
    text = json.dumps({"__metadata__": None, "a": entry()}).encode()
    path = tmp_path / "null.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    assert read_header(path).metadata == {}


def test_a_layer_at_the_root_is_called_nothing():
    """Its weight's key has no dot; a key that begins with a dot is of no layer."""
    tensors = {key: torch.ones(1) for key in ("weight", "a.weight", ".weight", "bias")}
    assert list(hijack.Header.from_state_dict(tensors).layers()) == ["", "a"]
