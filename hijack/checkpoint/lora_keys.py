"""What trainers call the layers of a model, in the keys of their LoRA files.

Names are compared in one spelling: prefixes cut off, and every dot an underscore, since
kohya's keys do not tell one from the other. Where diffusers divides or names layers in
another way than the checkpoint, `ALIASES` says what its layers are there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from hijack.errors import CheckpointError

#: Prefixes of layers in checkpoints.
BASE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
#: Prefixes of layers in LoRA files, once or one behind the other.
LORA_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a LoRA changes: a layer, or some rows of it.

    Attributes:
        layer: in the checkpoint.
        part: which K rows, counted in K, of the layer's (N, K) weight; None for all.
        rest: whether the part goes on to the end.
    """

    layer: str
    part: int | None = None
    rest: bool = False


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another name of a layer.

    Attributes:
        pattern: of the whole name, in the one spelling.
        name: gives the checkpoint's name.
        part: as for `Target`.
        rest: as for `Target`.
    """

    pattern: re.Pattern[str]
    name: Callable[[re.Match[str]], str]
    part: int | None = None
    rest: bool = False


def _alias(
    pattern: str, template: str, part: int | None = None, rest: bool = False
) -> Alias:
    return Alias(re.compile(pattern), lambda m: m.expand(template), part, rest)


def _unet(pattern: str, template: str, first: int) -> Alias:
    """A block of a UNet, which diffusers counts by level and by block in the level."""

    def name(match: re.Match[str]) -> str:
        level, block = int(match["level"]), int(match["block"])
        return template.format(3 * level + block + first, rest=match["rest"])

    return Alias(re.compile(pattern), name)


def _flux() -> Iterator[Alias]:
    """Flux: diffusers divides what the checkpoint has in one piece."""
    double = r"transformer_blocks_(\d+)_"
    for part, (image, text) in enumerate(
        (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))
    ):
        yield _alias(double + f"attn_{image}", r"double_blocks_\1_img_attn_qkv", part)
        yield _alias(double + f"attn_{text}", r"double_blocks_\1_txt_attn_qkv", part)
        single = rf"single_transformer_blocks_(\d+)_attn_{image}"
        yield _alias(single, r"single_blocks_\1_linear1", part)
    names = {
        "attn_to_out_0": "img_attn_proj",
        "attn_to_add_out": "txt_attn_proj",
        "ff_net_0_proj": "img_mlp_0",
        "ff_net_2": "img_mlp_2",
        "ff_context_net_0_proj": "txt_mlp_0",
        "ff_context_net_2": "txt_mlp_2",
        "norm1_linear": "img_mod_lin",
        "norm1_context_linear": "txt_mod_lin",
    }
    for theirs, ours in names.items():
        yield _alias(double + theirs, rf"double_blocks_\1_{ours}")
    single = r"single_transformer_blocks_(\d+)_"
    yield _alias(single + "proj_mlp", r"single_blocks_\1_linear1", 3, rest=True)
    yield _alias(single + "proj_out", r"single_blocks_\1_linear2")
    yield _alias(single + "norm_linear", r"single_blocks_\1_modulation_lin")
    for theirs, ours in {"x_embedder": "img_in", "context_embedder": "txt_in"}.items():
        yield _alias(theirs, ours)
    embedders = {"timestep": "time", "text": "vector", "guidance": "guidance"}
    for theirs, ours in embedders.items():
        start = f"time_text_embed_{theirs}_embedder_linear_"
        yield _alias(start + "1", f"{ours}_in_in_layer")
        yield _alias(start + "2", f"{ours}_in_out_layer")


def _others() -> Iterator[Alias]:
    """Lumina and Z-Image, Wan, HunyuanVideo, and the UNets of Stable Diffusion."""
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        yield _alias(rf"(.*_attention)_{name}", r"\1_qkv", part)
    yield _alias(r"(.*_attention)_to_out_0", r"\1_out")
    for theirs, ours in {"1": "self", "2": "cross"}.items():
        for letter in "qkv":
            attention = rf"(blocks_\d+)_attn{theirs}_to_{letter}"
            yield _alias(attention, rf"\1_{ours}_attn_{letter}")
        yield _alias(rf"(blocks_\d+)_attn{theirs}_to_out_0", rf"\1_{ours}_attn_o")
    yield _alias(r"(blocks_\d+)_ffn_net_0_proj", r"\1_ffn_0")
    yield _alias(r"(blocks_\d+)_ffn_net_2", r"\1_ffn_2")
    yield _alias(r"(.*_mod)_linear", r"\1_lin")
    yield _alias(r"(.*_modulation)_linear", r"\1_lin")
    yield _alias(r"(.*mlp)_fc1", r"\1_0")
    yield _alias(r"(.*mlp)_fc2", r"\1_2")
    number = r"_(?P<level>\d+)_{}_(?P<block>\d+)_(?P<rest>.*)"
    for kind, at in {"resnets": 0, "attentions": 1}.items():
        down, up = (
            f"input_blocks_{{}}_{at}_{{rest}}",
            f"output_blocks_{{}}_{at}_{{rest}}",
        )
        yield _unet("down_blocks" + number.format(kind), down, 1)
        yield _unet("up_blocks" + number.format(kind), up, 0)
    yield _alias(r"mid_block_attentions_0_(.*)", r"middle_block_1_\1")
    yield _alias(r"mid_block_resnets_0_(.*)", r"middle_block_0_\1")
    yield _alias(r"mid_block_resnets_1_(.*)", r"middle_block_2_\1")


_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
ALIASES = (*_flux(), *_others())


class Names:
    """Finds the layers of a checkpoint by what trainers call them.

    Args:
        layers: names of the checkpoint's layers.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers: dict[str, str] = {}
        self._twice: set[str] = set()
        for layer in layers:
            short = layer
            for prefix in BASE_PREFIXES:
                short = short.removeprefix(prefix)
            flat = short.replace(".", "_")
            if flat in self._layers:
                self._twice.add(flat)
            self._layers[flat] = layer
        self._known: Mapping[str, str] = self._layers

    def find(self, module: str) -> Target | None:
        """The layer that a name in a LoRA file means, or None.

        Raises:
            CheckpointError: if it may mean two.
        """
        flat = module.replace(".", "_").replace("_processor_to_", "_to_")
        for name in _without_prefixes(flat):
            found = self._find(name)
            if found is not None:
                return found
        return None

    def _find(self, name: str) -> Target | None:
        if name in self._twice:
            raise CheckpointError(
                f"{name}: may be one of two layers of the checkpoint; expected names "
                "that differ in more than dots and underscores"
            )
        if name in self._layers:
            return Target(self._layers[name])
        if f"{name}_0" in self._layers and name.endswith("to_out"):
            return Target(self._layers[f"{name}_0"])
        for alias in ALIASES:
            match = alias.pattern.fullmatch(name)
            if match is None:
                continue
            known = _resnet(alias.name(match))
            if known in self._layers:
                return Target(self._layers[known], alias.part, alias.rest)
        return None


def _without_prefixes(name: str) -> Iterator[str]:
    """A name, and what is left of it when prefixes are cut off one after another."""
    yield name
    for prefix in LORA_PREFIXES:
        if name.startswith(prefix):
            yield from _without_prefixes(name[len(prefix) :])
            return


def _resnet(name: str) -> str:
    start, _, last = name.rpartition("_0_")
    return f"{start}_0_{_RESNET[last]}" if last in _RESNET else name
