"""Which layers ComfyUI's nodes quantize: patterns, and the word for the usual ones."""

from hijack.hosts.comfyui.selection import choose

LAYERS = ("blocks.0.attn.q", "blocks.0.norm_q", "blocks.0.mod", "head")


def chosen(config, include="", exclude=""):
    return [layer for layer in LAYERS if choose(config, include, exclude)(layer)]


def test_patterns_replace_what_is_usual_unless_it_is_named():
    """Without patterns the model's own count; with them, only beside ``default``."""
    assert chosen("Flux") == chosen("Flux", exclude="default") == ["blocks.0.attn.q"]
    assert chosen("Flux", exclude="*attn*") == ["blocks.0.norm_q", "blocks.0.mod"]
    assert chosen("Flux", exclude="default\n*attn*") == []
    assert chosen("Flux", include="head", exclude="default") == ["head"]
    assert chosen("Unheard", include="*") == ["blocks.0.attn.q"]
