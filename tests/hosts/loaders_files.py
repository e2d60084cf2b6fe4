"""Files and tools for `loaders_case`; ComfyUI is importable once this is imported."""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import itertools
import json
import logging

import torch
from comfy_case import FOLDER, comfy, comfy_models
from safetensors.torch import save_file

# isort: split

import comfy.clip_model
import comfy.taesd.taesd
import comfy.text_encoders.llama
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.t5
from comfy.ldm.modules.attention import attention_pytorch

T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
CLIP_L = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
QWEN = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
#: Sizes of small text encoders, as ComfyUI lets callers set them.
SIZES = {
    "t5xxl_model_config": T5,
    "clip_l_model_config": CLIP_L,
    "model_config": CLIP_L,  # what the one above is made of where a file is loaded
    "qwen25_3b_model_config": QWEN,
}
EMBEDDINGS = ("shared", "embed_tokens", "token_embedding")
#: Of files, none of which is written twice: models may be reading them still.
NUMBERS = itertools.count()
TEXT = "a photo of a (red:1.3) fox"


# -- files -----------------------------------------------------------------------------


def shapes_of(kind, config):
    """Key to shape of one of ComfyUI's classes of text encoders."""
    model = kind(config, torch.bfloat16, "meta", comfy.ops.manual_cast)
    return {key: tuple(t.shape) for key, t in model.state_dict().items()}


def t5_config():
    """The configuration of T5-XXL, with small sizes."""
    path = comfy.text_encoders.t5.__file__.replace("t5.py", "t5_config_xxl.json")
    with open(path) as file:
        return {**json.load(file), **T5}


def clip_config():
    """The configuration of CLIP-L, with small sizes."""
    path = comfy.clip_model.__file__.replace("clip_model.py", "sd1_clip_config.json")
    with open(path) as file:
        return {**json.load(file), **CLIP_L}


def text_encoder(name):
    """Random weights of one small text encoder, bfloat16."""
    kinds = {
        "t5": lambda: shapes_of(comfy.text_encoders.t5.T5, t5_config()),
        "clip_l": lambda: shapes_of(comfy.clip_model.CLIPTextModel, clip_config()),
        "qwen": lambda: shapes_of(comfy.text_encoders.llama.Qwen25_3B, QWEN),
    }
    return comfy_models.make_state_dict(kinds[name]())


def is_layer(key, tensor):
    """Whether a key holds the weight of a Linear or of the main Embedding."""
    return (
        key.endswith(".weight")
        and tensor.ndim == 2
        and "relative" not in key
        and "position" not in key
        and "norm" not in key
    )


def is_linear(key, tensor):
    """Whether a key holds the weight of a Linear."""
    return is_layer(key, tensor) and not any(name in key for name in EMBEDDINGS)


def is_to_k(key, tensor):
    """Whether a key holds the weight of one kind of layer alone."""
    return ".to_k." in key and comfy_models.is_quantized(key, tensor)


def musubi(dense, chosen=is_layer, dtype=torch.float32):
    """The state dict as block-wise FP8, and what that means in float32."""
    quantized_sd, meant = {}, {}
    for index, (key, tensor) in enumerate(dense.items()):
        quantized_sd[key], meant[key] = tensor.to(dtype), tensor.float()
        if chosen(key, tensor):
            kind = ("block", "row", "tensor")[index % 3]
            kind = "row" if tensor.shape[1] % 64 else kind
            scale_key = key.replace(".weight", ".scale_weight")
            quantized_sd[key], quantized_sd[scale_key], meant[key] = (
                comfy_models.quantize(tensor, kind)
            )
    return quantized_sd, meant


def vae_weights():
    """Random weights of the smallest VAE there is; it has convolutions only."""
    model = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
    shapes = {k: tuple(t.shape) for k, t in model.items() if t.ndim}
    made = comfy_models.make_state_dict(shapes)
    made = {k: t / t[0].numel() ** 0.5 if t.ndim > 1 else t for k, t in made.items()}
    return {**made, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


def coded_vae(dense):
    """A VAE's convolutions as FP8 with one scale each, and what that means."""
    quantized_sd, meant = {}, {}
    for key, tensor in dense.items():
        quantized_sd[key] = meant[key] = tensor.float()
        if tensor.ndim == 4 and "decoder" in key:
            qdata, scale, exactly = comfy_models.quantize(tensor.flatten(1), "tensor")
            quantized_sd[key] = qdata.view(tensor.shape)
            quantized_sd[key.replace(".weight", ".scale_weight")] = scale
            meant[key] = exactly.view(tensor.shape)
    return quantized_sd, meant


def native(key, tensor, kind):
    """A layer as ComfyUI itself quantizes it."""
    layer = key.removesuffix(".weight")
    text = json.dumps({"format": kind}).encode()
    made = {f"{layer}.comfy_quant": torch.tensor(list(text)).byte()}
    if kind == "float8_e4m3fn":
        made[key], scale, _ = comfy_models.quantize(tensor.float(), "tensor")
        return {**made, f"{layer}.weight_scale": scale}
    from comfy import quant_ops

    layout = quant_ops.get_layout_class(
        quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    )
    options = {} if kind == "mxfp8" else {"scale": "recalculate"}
    made[key], params = layout.quantize(tensor.float(), **options)
    scale = params.scale
    if kind == "nvfp4":
        made[f"{layer}.weight_scale_2"] = scale
        scale = params.block_scale
    if scale.dtype.itemsize == 1:
        scale = scale.view(torch.uint8)
    return {**made, f"{layer}.weight_scale": scale}


def mixed_files(dense, kind, chosen, native_layers):
    """A file of native and our layers, and one whose layers of ours are exact."""
    mixed, reference = {}, {}
    for key, tensor in dense.items():
        mixed[key] = reference[key] = tensor.float()
        if any(name in key for name in native_layers) and chosen(key, tensor):
            made = native(key, tensor, kind)
            mixed.update(made)
            reference.update(made)
        elif chosen(key, tensor):
            scale_key = key.replace(".weight", ".scale_weight")
            mixed[key], mixed[scale_key], reference[key] = comfy_models.quantize(
                tensor, "block"
            )
    return mixed, reference


# -- tools -----------------------------------------------------------------------------


def load_clip(*state_dicts, kind="FLUX", dtype=torch.float32, **options):
    """What the CLIP loader nodes load, with every weight in float32 by default."""
    paths = []
    for state_dict in state_dicts:
        paths.append(str(FOLDER / f"text-{next(NUMBERS)}.safetensors"))
        save_file(
            {k: t.contiguous() for k, t in state_dict.items()},
            paths[-1],
            options.pop("metadata", None),
        )
    given = {**SIZES, **({} if dtype is None else {"dtype": dtype}), **options}
    return comfy.sd.load_clip(
        paths, clip_type=getattr(comfy.sd.CLIPType, kind), model_options=given
    )


def encode(clip):
    """What the text encode node gives."""
    return clip.encode_from_tokens(clip.tokenize(TEXT))


def pooled(clip):
    """Both outputs; the second one is CLIP-L's."""
    return clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)


def quantized(model):
    """How many layers of a model are quantized."""
    return sum("Quantized" in type(m).__name__ for m in model.modules())


def decode(vae):
    """What the VAE decode node gives."""
    generator = torch.Generator().manual_seed(5)
    return vae.decode(torch.randn(1, 16, 4, 4, generator=generator))


def refusal(function):
    """The error a function ends in, as one string."""
    try:
        function()
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "nothing was refused"


class Log(logging.Handler):
    """What hijack logs while this is open."""

    def __enter__(self):
        self.lines = []
        logging.getLogger("hijack").setLevel(logging.INFO)
        logging.getLogger("hijack").addHandler(self)
        return self

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __exit__(self, *_):
        logging.getLogger("hijack").removeHandler(self)


def detect(state_dict, original=comfy.sd.detect_te_model):
    """ComfyUI tells T5-XXL by its width and depth, which are smaller here."""
    if "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in state_dict:
        return comfy.sd.TEModel.T5_XXL
    return original(state_dict)


def detect_t5(state_dicts):
    """What ComfyUI asks of the T5-XXL among files, told by its depth."""
    for state_dict in state_dicts:
        if "encoder.final_layer_norm.weight" in state_dict:
            return comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict)
    return {}


comfy.sd.detect_te_model, comfy.sd.t5xxl_detect = detect, detect_t5
# On a CPU older releases give NaN with ComfyUI's own attention and a mask.
comfy.text_encoders.llama.optimized_attention_for_device = lambda *_, **__: (
    attention_pytorch
)
