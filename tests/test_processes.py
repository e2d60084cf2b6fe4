"""Quantizing in several processes gives the same bytes, and the same errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import hijack
from hijack.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Shards of a model, with a layer of several parts and one left dense."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    paths = []
    for number in range(3):
        tensors = {
            f"blocks.{number}.a.weight": torch.randn(1024, 2048, dtype=torch.bfloat16),
            f"blocks.{number}.b.weight": torch.randn(64, 192),
            f"blocks.{number}.b.bias": torch.randn(64),
            f"blocks.{number}.norm.weight": torch.ones(192),
        }
        paths.append(folder / f"model-{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("blockwise_fp8", {}),
        ("int8", {"max_shard_size": "2MB"}),
        ("nf4", {"exclude": ["*.b"]}),
    ],
)
def test_processes_write_the_same_bytes(source, tmp_path, scheme, options):
    """Of one file, of shards, and of layers in parts."""
    folders = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        layers = []
        report = hijack.quantize_file(
            source,
            folder / "out.safetensors",
            scheme,
            processes=processes,
            progress=lambda done, total, layer, seen=layers: seen.append((done, layer)),
            **options,
        )
        assert [done for done, _ in layers] == [*range(1, len(report.layers) + 1)]
        assert {layer for _, layer in layers} == set(report.layers)
        folders.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert folders[0] == folders[1]


def test_an_error_of_a_worker_is_the_error(source, tmp_path):
    """Naming the layer; no file is left behind."""
    bad = tmp_path / "bad.safetensors"
    weight = torch.randn(64, 64)
    weight[3, 4] = float("inf")
    save_file({"good.weight": torch.randn(64, 64), "bad.weight": weight}, bad)
    with pytest.raises(hijack.HijackError, match="bad: weight holds inf or NaN"):
        hijack.quantize_file(bad, tmp_path / "out.safetensors", processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


class Local(hijack.Scheme):
    """Made by a test, in no module that a worker could import."""

    name = "local"

    def quantize(self, weight):
        """As float16."""
        return weight.to(torch.float16), {}

    def dequantize(self, qdata, params, dtype):
        """The numbers."""
        return qdata.to(dtype)


def test_a_scheme_that_workers_cannot_import_is_refused(source, tmp_path):
    """With what to do."""
    scheme = type("Nowhere", (Local,), {"__module__": "nowhere"})()
    with pytest.raises(hijack.HijackError, match="processes=1"):
        hijack.quantize_file(source, tmp_path / "out.safetensors", scheme, processes=2)


@pytest.mark.parametrize("processes", [0, -1, 1.5, True])
def test_the_number_of_processes_is_positive(source, tmp_path, processes):
    """As that of threads."""
    with pytest.raises(hijack.HijackError, match="positive number of processes"):
        hijack.quantize_file(source, tmp_path / "out", processes=processes)


def test_the_command_line_has_it(source, tmp_path, capsys):
    """``--processes``."""
    out = tmp_path / "out.safetensors"
    sources = [str(path) for path in source[:1]]
    assert main(["quantize", *sources, str(out), "--processes", "2"]) == 0
    assert out.exists()
