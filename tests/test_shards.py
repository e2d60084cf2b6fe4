"""Shards: how they are cut and named, and that a set is replaced as a whole or not."""

import contextlib
import json
import os
import re
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from hijack.errors import CheckpointError
from hijack.safetensors_io import files, layout
from hijack.safetensors_io import shards as shard_files
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.safetensors_io.shards import parse_size
from hijack.safetensors_io.writer import open_writer

INDEX = "m.safetensors.index.json"


def write(folder, value, count=3, name=INDEX):
    """A set of tensors of four bytes, all of one value, each in a shard."""
    plan = {f"t{i}": TensorInfo("F32", (1,)) for i in range(count)}
    with open_writer(folder / name, plan, max_shard_size=4, overwrite=True) as writer:
        for key in plan:
            writer.write(key, torch.tensor([float(value)]))


def read(folder, name=INDEX):
    """The values in a set, read by its index."""
    header = read_header(folder / name)
    return [float(tensor) for tensor in open_tensors(header).values()]


def names(folder):
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def shards(count, stem="m"):
    """The names of a set of that many."""
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


# -- what is written -------------------------------------------------------------------


def test_shards_and_index_are_those_of_transformers(tmp_path):
    """Names, weight_map and total_size; each shard is a file of its own."""
    plan = {
        "a": TensorInfo("F32", (2,)),
        "b": TensorInfo("U8", (3,)),
        "c": TensorInfo("F32", (4,)),
    }
    with open_writer(
        tmp_path / "m.safetensors", plan, {"k": "v"}, max_shard_size=11
    ) as w:
        for key, info in plan.items():
            w.write(key, torch.ones(info.shape, dtype=info.torch_dtype))
    assert names(tmp_path) == [*shards(2), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = shards(2)
    assert index == {
        "metadata": {"total_size": 27},
        "weight_map": {"a": first, "b": first, "c": second},
    }
    assert set(load_file(tmp_path / first)) == {"a", "b"}
    assert set(load_file(tmp_path / second)) == {"c"}
    header = read_header(tmp_path / INDEX)
    assert header.metadata == {"k": "v"}
    assert header.tensors.keys() == plan.keys()


def test_messages_call_a_set_by_one_name(tmp_path):
    """By its index, or by the first shard: there may be hundreds."""
    write(tmp_path, 1)
    parts = [tmp_path / name for name in shards(3)]
    assert read_header(tmp_path / INDEX).source == str(tmp_path / INDEX)
    assert read_header(parts).source == f"{parts[0]} and 2 more"
    assert read_header(parts[:1]).source == str(parts[0])


def test_one_shard_is_a_set_too(tmp_path):
    """The destination is an index, however little there is."""
    write(tmp_path, 1, count=1)
    assert names(tmp_path) == [*shards(1), INDEX]
    assert read(tmp_path) == [1]


def test_an_order_is_kept_in_each_shard(tmp_path):
    """As far as its own tensors are named."""
    plan = {key: TensorInfo("U8", (2,)) for key in "abcd"}
    path = tmp_path / INDEX
    with open_writer(path, plan, order="dcba", max_shard_size=4) as writer:
        for key in plan:
            writer.write_bytes(key, [key.encode() * 2])
    assert list(read_header(path).tensors) == ["b", "a", "d", "c"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7B", 7),
        ("5GB", 5 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("3K", 3000),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_numbers_or_text(text, size):
    """Powers of ten, or of two with an i."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        0,
        -1,
        "0GB",
        "",
        "GB",
        "5XB",
        "5GB!",
        1.5,
        None,
        True,
        "\u0665GB",
        "9" * 400 + "B",
    ],
)
def test_other_sizes_are_refused(text):
    """With what was expected."""
    with pytest.raises(
        CheckpointError, match=rf"got {re.escape(repr(text))}, expected"
    ):
        parse_size(text)


def test_too_many_shards_are_refused(tmp_path, monkeypatch):
    """Each is held open."""
    monkeypatch.setattr(layout, "MAX_SHARDS", 2)
    with pytest.raises(
        CheckpointError, match="4 bytes give 3 files, expected at most 2"
    ):
        write(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_single_file_of_the_name_is_in_the_way(tmp_path):
    """Programs would read it, and not the shards."""
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="would read it instead of the shards"):
        write(tmp_path, 1)
    assert names(tmp_path) == ["m.safetensors"]


def test_an_index_is_written_only_with_shards(tmp_path):
    """A file of tensors would be called JSON."""
    with pytest.raises(CheckpointError, match=r"name of an index.*pass max_shard_size"):
        open_writer(tmp_path / INDEX, {}).__enter__()


# -- what is replaced ------------------------------------------------------------------


def test_a_set_is_replaced_and_nothing_of_it_stays(tmp_path):
    """Names in use are not taken again before they are free."""
    write(tmp_path, 1)
    assert names(tmp_path) == [*shards(3), INDEX]
    write(tmp_path, 2)
    assert names(tmp_path) == sorted([*shards(3, "m.2"), INDEX])
    assert read(tmp_path) == [2, 2, 2]
    write(tmp_path, 3, count=2)
    assert names(tmp_path) == [*shards(2), INDEX]
    assert read(tmp_path) == [3, 3]


def test_files_that_are_not_of_the_set_stay(tmp_path):
    """Shards no index names, or that it names but are called otherwise."""
    write(tmp_path, 1, count=1)
    save_file({"x": torch.ones(1)}, tmp_path / "extra.safetensors")
    table = json.loads((tmp_path / INDEX).read_text())
    table["weight_map"]["x"] = "extra.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(table))
    stray = shards(2)[0]
    save_file({"x": torch.ones(1)}, tmp_path / stray)
    write(tmp_path, 2, count=2)
    assert names(tmp_path) == sorted(
        ["extra.safetensors", stray, *shards(2, "m.2"), INDEX]
    )


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_an_index_is_replaced_where_it_leads(tmp_path):
    """And the shards lie there."""
    real = tmp_path / "real"
    real.mkdir()
    write(real, 1)
    (tmp_path / INDEX).symlink_to(real / INDEX)
    write(tmp_path, 2)
    assert (tmp_path / INDEX).is_symlink()
    assert names(real) == sorted([*shards(3, "m.2"), INDEX])
    assert read(real) == [2, 2, 2]


#: What a set is committed with.
STEPS = ("write_durably", "sync_folder", "replace", "rename", "unlink", "rmdir")


def killed_at(step, folder):
    """Replace a set, and be killed before a step; False if there was none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and fork
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def counted(real):
        def call(*words, **more):
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            return real(*words, **more)

        return call

    try:
        for name in STEPS:
            owner = shard_files if hasattr(shard_files, name) else os
            setattr(owner, name, counted(getattr(owner, name)))
        write(folder, 2, count=2)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("old", [True, False])
def test_a_kill_at_any_step_leaves_the_old_set_or_the_new(tmp_path, old):
    """And the next run leaves nothing but its own set, whatever was cut short."""
    found = []
    while True:
        folder = tmp_path / str(len(found) + 1)
        folder.mkdir()
        if old:
            write(folder, 1)
        if not killed_at(len(found) + 1, folder):
            break
        found.append(read(folder) if (folder / INDEX).exists() else None)
        write(folder, 3, count=4)
        assert read(folder) == [3, 3, 3, 3]
        assert len(names(folder)) == 5
    assert read(folder) == [2, 2]
    before = [1, 1, 1] if old else None
    turn = found.index([2, 2])
    assert found == [before] * turn + [[2, 2]] * (len(found) - turn)
    assert turn >= 7


@pytest.mark.parametrize("how", ["rename", "replace"])
def test_a_commit_that_fails_is_undone(tmp_path, monkeypatch, how):
    """The system refuses a rename half-way: the old set, and nothing of the new."""
    write(tmp_path, 1)
    before = names(tmp_path)
    real, calls = getattr(os, how), []

    def refuse(*words):
        calls.append(words)
        if how == "replace" or len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        return real(*words)

    monkeypatch.setattr(os, how, refuse)
    with pytest.raises(CheckpointError, match="cannot be written; Permission denied"):
        write(tmp_path, 2)
    assert names(tmp_path) == before
    assert read(tmp_path) == [1, 1, 1]


def test_two_that_write_one_set_leave_the_set_of_one(tmp_path, monkeypatch):
    """Both would give the same names, one shard each in turn, and mix them."""
    real, both, second = os.rename, threading.Barrier(2), threading.Event()
    first_calls: dict[str, int] = {}

    def rename(old, new):
        me = threading.current_thread().name
        first_calls[me] = first_calls.get(me, 0) + 1
        if first_calls[me] == 1:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.5)  # both have chosen their names, if nothing stops them
        elif me == "one":
            second.wait(0.5)  # and the other gives all of its own in between
        real(old, new)

    monkeypatch.setattr(shard_files.os, "rename", rename)

    def other():
        write(tmp_path, 2)
        second.set()

    threads = [
        threading.Thread(target=write, args=(tmp_path, 1), name="one"),
        threading.Thread(target=other, name="two"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(tmp_path) in ([1.0] * 3, [2.0] * 3)
    assert len(names(tmp_path)) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_an_index_that_is_a_pipe_is_refused_without_waiting(tmp_path):
    """It is looked into before it is replaced."""
    os.mkfifo(tmp_path / INDEX)
    place = shard_files.destination(tmp_path / INDEX, sharded=True)
    assert place.replaced() == [tmp_path / INDEX]
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        write(tmp_path, 1)


@pytest.mark.parametrize("text", ["[" * 100, " " * 200], ids=["deep", "long"])
def test_an_index_that_is_no_index_is_replaced(tmp_path, monkeypatch, text):
    """However deep or long it is, it names no shards."""
    monkeypatch.setattr(files, "MAX_BYTES", 100_000)
    (tmp_path / INDEX).write_text(text * 1000)
    assert shard_files.destination(tmp_path / INDEX, sharded=True).replaced() == [
        tmp_path / INDEX
    ]


def test_nothing_is_deleted_by_an_index_that_cannot_be_read(tmp_path):
    """It may name what looks like a leftover."""
    write(tmp_path, 1)
    before = set(names(tmp_path))
    left = tmp_path / f".{INDEX}.abcdefgh.part"
    left.mkdir()
    note = [name for name in before if name != INDEX]
    (left / "note").write_text(json.dumps(note))
    (tmp_path / INDEX).write_text("damaged")
    write(tmp_path, 2)
    assert before < set(names(tmp_path))
    assert read(tmp_path) == [2, 2, 2]


@pytest.mark.parametrize("kind", ["deep", "number", "pipe"])
def test_a_leftover_that_another_program_made_up_is_removed(tmp_path, kind):
    """Whoever unpacks an archive has whatever was in it; its note is read with care."""
    folder = tmp_path / f".{INDEX}.abcdefgh.part"
    folder.mkdir()
    if kind == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(folder / "note")
    else:
        (folder / "note").write_text("[" * 100_000 if kind == "deep" else "7")
    write(tmp_path, 1)
    assert names(tmp_path) == sorted([*shards(3), INDEX])


def test_a_leftover_deletes_nothing_but_shards_of_the_set(tmp_path):
    """A folder may come from a stranger: its note leads nowhere else."""
    precious = tmp_path / "precious"
    precious.touch()
    folder = tmp_path / "model"
    left = folder / f".{INDEX}.abcdefgh.part"
    left.mkdir(parents=True)
    (folder / "m-config.safetensors").touch()
    note = ["../precious", str(precious), "m-config.safetensors", 7, None]
    (left / "note").write_text(json.dumps(note))
    write(folder, 1)
    assert precious.exists()
    assert names(folder) == sorted([*shards(3), INDEX, "m-config.safetensors"])
