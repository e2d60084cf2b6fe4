"""The demo: what the first command of the README shows."""

import torch

import hijack
from hijack.cli import demo_steps as demo


def test_the_demo_shows_every_format_and_draws_it(tmp_path, capsys, monkeypatch):
    """A smaller model: a table of layers, a table of formats, a picture."""
    monkeypatch.setattr(demo, "WIDTH", 128)
    monkeypatch.setattr(demo, "BLOCKS", 1)
    demo.run_demo(tmp_path)
    out = capsys.readouterr().out
    for expected in ("0.qkv", "0.down", "per tensor", "per row", "128x128", "1x64"):
        assert expected in out
    assert (tmp_path / "error-per-layer.png").read_bytes().startswith(b"\x89PNG")
    found = hijack.identify(tmp_path / "model-1x64.safetensors")
    assert len(found.layers) == 4


def test_smaller_blocks_show_less_error(monkeypatch):
    """The comparison sees what block-wise scales are for."""
    monkeypatch.setattr(demo, "BLOCKS", 1)
    model = demo.make_model()
    x = torch.randn(1, 4, demo.WIDTH, dtype=torch.bfloat16)
    errors = {}
    for size in ("tensor", (1, 64)):
        twin = demo.make_model()
        hijack.wrap_model(twin, "blockwise_fp8", block_size=size)
        rows = demo.compare(model, twin, x)
        assert len(rows) == 4
        errors[size] = sum(row.weight_db for row in rows) / 4
    assert errors[(1, 64)] > errors["tensor"] + 1 > 31
