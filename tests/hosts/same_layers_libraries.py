"""Run by tests where diffusers and transformers are: layers of quantized files there.

Usage: same_layers_libraries.py FOLDER
"""

# ruff: noqa: E402 - found through the path set here
from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import diffusers
import same_layers
import transformers

FOLDER = Path(sys.argv[1])


class LayersConfig(transformers.PretrainedConfig):
    """Which layers there are."""

    model_type = "layers"

    def __init__(self, layers=None, **kwargs):
        super().__init__(**kwargs)
        self.layers = layers or {}


class Layers(transformers.PreTrainedModel):
    """Nothing but the layers that are quantized."""

    config_class = LayersConfig

    def __init__(self, config):
        super().__init__(config)
        same_layers.build(config.layers, self)
        self.post_init()


for scheme in same_layers.SCHEMES:
    path = FOLDER / f"{scheme}.safetensors"

    place = FOLDER / f"diffusers-{scheme}"
    place.mkdir()
    diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=192,
    ).save_config(place)
    shutil.copy(path, place / "diffusion_pytorch_model.safetensors")
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(place)
    same_layers.save_outputs(model, FOLDER, "diffusers", scheme)

    place = FOLDER / f"transformers-{scheme}"
    place.mkdir()
    LayersConfig(layers=same_layers.layers_of(path)).save_pretrained(place)
    shutil.copy(path, place / "model.safetensors")
    model = Layers.from_pretrained(place, ignore_mismatched_sizes=False)
    same_layers.save_outputs(model, FOLDER, "transformers", scheme)
