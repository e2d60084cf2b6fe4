"""What the processes of ``test_same_layers`` share: files, layers, inputs, outputs."""

from __future__ import annotations

import zlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hijack

#: Scheme to its options.
SCHEMES = {"blockwise_fp8": {"block_size": "1x64"}, "int8": {}, "nvfp4": {}}


def write_files(dense, folder):
    """A file of each scheme, from a state dict."""
    source = folder / "dense.safetensors"
    save_file(dense, source)
    for scheme, options in SCHEMES.items():
        hijack.quantize_file(
            source, folder / f"{scheme}.safetensors", scheme, **options
        )


def layers_of(path):
    """Linears that are quantized in a file: name to (rows, columns, has a bias)."""
    with safe_open(path.with_name("dense.safetensors"), "pt") as file:
        keys = set(file.keys())
        shapes = {
            layer: (
                *file.get_slice(f"{layer}.weight").get_shape(),
                f"{layer}.bias" in keys,
            )
            for layer in sorted(hijack.identify(path).claims())
        }
    return {layer: shape for layer, shape in shapes.items() if len(shape) == 3}


def is_quantized(module):
    """Whether a module has a quantized weight."""
    return isinstance(module.weight, hijack.QuantizedTensor)


def save_outputs(model, folder, host, scheme, is_quantized=is_quantized):
    """What the layers of a model give for inputs that depend on their names alone."""
    found = {}
    for layer, (_, columns, _) in layers_of(folder / f"{scheme}.safetensors").items():
        module = model.get_submodule(layer)
        assert is_quantized(module), layer
        generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
        with torch.inference_mode():
            output = module(torch.randn(3, columns, generator=generator))
        found[layer] = output.float().clone()
    save_file(found, folder / f"{host}-{scheme}.outputs")


def build(layers, root):
    """Add the layers to a module, under their names; nothing else."""
    for layer, (rows, columns, bias) in layers.items():
        *path, name = layer.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(name, nn.Linear(columns, rows, bias=bias))
    return root
