"""Find the layers of a checkpoint by the names in LoRA files.

A name is looked up unchanged, then with every dot as an underscore, because kohya's
keys do not distinguish them, then by the tables of `hijack.lora.names`; each time with
prefixes removed one by one. Text encoders are numbered; see `hijack.lora.encoders`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from hijack.errors import CheckpointError
from hijack.lora.encoders import encoder_layers, numbered
from hijack.lora.names import TABLES
from hijack.safetensors_io.header import join

#: Prefixes of layers in checkpoints.
BASE_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "net.",
)
#: Prefixes of layers in LoRA files, one or several; longer ones first.
LORA_PREFIXES = (
    "base_model.model.",
    *BASE_PREFIXES,
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lora_prior_unet_",
    "lycoris_",
)

Spans = list[tuple[int, int]]
#: Word of `hijack.lora.names` to the rows of a fused (N, K) weight, in order.
_SPLITS: Mapping[str, Callable[[int, int], Spans]] = {
    "": lambda n, k: [(0, n)],
    "q": lambda n, k: [(0, k)],
    "k": lambda n, k: [(k, (n + k) // 2)],
    "v": lambda n, k: [((n + k) // 2, n)],
    "first": lambda n, k: [(0, k)],
    "second": lambda n, k: [(k, 2 * k)],
    "third": lambda n, k: [(2 * k, 3 * k)],
    "remainder": lambda n, k: [(3 * k, n)],
    "qkv": lambda n, k: [(0, 3 * k)],
    "first_half": lambda n, k: [(0, n // 2)],
    "second_half": lambda n, k: [(n // 2, n)],
    "swap_halves": lambda n, k: [(k, n), (0, k)] if n == 2 * k else [(0, n)],
    "transposed": lambda n, k: [(0, n)],
}
#: Splits for which names are translated in both directions.
_SYMMETRIC = ("", "swap_halves")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a LoRA changes: a layer, some of its rows, or a single parameter.

    Attributes:
        name: of the layer or parameter.
        key: of the weight or parameter.
        split: which part of a fused weight; see `hijack.lora.names`.
    """

    name: str
    key: str
    split: str = ""

    @property
    def bias(self) -> str:
        """Key of the bias that belongs to the weight."""
        if self.name.endswith("in_proj_weight"):  # torch's attention has a fused one
            return f"{self.name.removesuffix('weight')}bias"
        return join(self.name, "bias")

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint has the transpose of the LoRA's weight."""
        return self.split == "transposed"

    def rows(self, n: int, k: int) -> tuple[slice, ...]:
        """The rows of a (n, k) weight that, concatenated, are the target."""
        return tuple(slice(a, b) for a, b in _SPLITS[self.split](n, k))


@dataclasses.dataclass(frozen=True)
class _Alias:
    """A pattern of names, and the template of the checkpoint's name."""

    pattern: re.Pattern[str]
    template: str
    split: str


class LayerNames:
    """The layers of a checkpoint, by the names in LoRA files.

    Args:
        keys: of its tensors.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._dotted: dict[str, Target | None] = {}
        self._flat: dict[str, Target | None] = {}
        keys = list(keys)
        for alias, key in encoder_layers(keys):
            target = Target(key.removesuffix(".weight"), key)
            self._add(alias.removesuffix(".weight"), target)
        for key in keys:
            name = key.removesuffix(".weight")
            target = Target(name, key)
            # Flux calls the weight of a norm its scale
            for alias in dict.fromkeys((name, name.removesuffix(".scale"))):
                for prefix in ("", *BASE_PREFIXES):
                    if alias.startswith(prefix):
                        self._add(alias[len(prefix) :], target)

    def _add(self, name: str, target: Target) -> None:
        for table, key in ((self._dotted, name), (self._flat, _flat(name))):
            known = table.get(key, target)
            table[key] = target if known == target else None

    def find(self, module: str) -> Target | None:
        """The target of a name in a LoRA file, or None.

        Raises:
            CheckpointError: if it may be one of two layers.
        """
        for name in _without_prefixes(module):
            for variant in _variants(name):
                if (target := self._find(variant)) is not None:
                    return target
        return None

    def _find(self, name: str) -> Target | None:
        for table, key in ((self._dotted, name), (self._flat, _flat(name))):
            if key in table:
                return self._only(table, key)
        flat = _flat(name)
        for alias in (*_aliases().get(_word(flat), ()), *_aliases()["{"]):
            match = alias.pattern.fullmatch(flat)
            known = match and match.expand(alias.template)
            if known in self._flat:
                target = self._only(self._flat, known)
                return dataclasses.replace(target, split=alias.split)
        return None

    def _only(self, table: Mapping[str, Target | None], name: str) -> Target:
        target = table[name]
        if target is None:
            raise CheckpointError(
                f"{name}: may be one of two layers of the checkpoint; expected names "
                "that differ in more than prefixes, dots and underscores"
            )
        return target


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _word(flat: str) -> str:
    return flat.partition("_")[0]


def _without_prefixes(name: str) -> Iterator[str]:
    """A name, and what is left as prefixes are removed one by one."""
    yield name
    if (encoder_name := numbered(name)) is not None:
        yield encoder_name
        return
    for prefix in LORA_PREFIXES:
        if name.startswith(prefix):
            yield from _without_prefixes(name[len(prefix) :])
            return


def _variants(name: str) -> Iterator[str]:
    """A name, and its current form if it is of an older version of diffusers."""
    for variant in dict.fromkeys((name, name.replace(".processor.", "."))):
        yield variant
        if variant.endswith("to_out"):
            yield f"{variant}.0"


@functools.cache
def _aliases() -> Mapping[str, list[_Alias]]:
    """Aliases by their first word, "{" if it may be any; in both directions."""
    aliases: dict[str, list[_Alias]] = {"{": []}
    for theirs, ours in (*_rows(), *_unet()):
        ours, _, split = ours.partition(":")
        pairs = [(theirs, ours)]
        if split in _SYMMETRIC:
            pairs.append((ours, theirs))
        for alias, known in pairs:
            word = _word(_flat(alias))
            word = "{" if "{" in word else word
            aliases.setdefault(word, []).append(_alias(alias, known, split))
    return aliases


def _alias(alias: str, known: str, split: str) -> _Alias:
    pattern = re.escape(_flat(alias)).replace(r"\{\}", r"(\d+)")
    pattern, count = pattern.replace(r"\{\*\}", "(.+)"), itertools.count(1)
    template = re.sub(r"\{\*?\}", lambda _: f"\\g<{next(count)}>", _flat(known))
    return _Alias(re.compile(pattern), template, split)


def _rows() -> Iterator[tuple[str, str]]:
    """Pairs of the name in LoRA files and in checkpoints, from the tables."""
    for line in "".join(TABLES).splitlines():
        pair = line.split()
        if pair and not line.startswith(" "):
            blocks = ["" if block == "." else f"{block}." for block in pair]
        elif pair:
            yield blocks[0] + pair[0], blocks[1] + pair[1]


#: Layers of a block of a UNet.
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0.{*}": "middle_block.1.{*}",
}


def _unet() -> Iterator[tuple[str, str]]:
    """The UNet of Stable Diffusion and SDXL, which diffusers counts by levels."""
    yield from _UNET.items()
    blocks = {"mid_block.{}.0": "middle_block.0", "mid_block.{}.1": "middle_block.2"}
    for level in range(4):
        at = 3 * level
        for block in range(3):
            if block < 2:
                theirs = f"down_blocks.{level}.{{}}.{block}"
                blocks[theirs] = f"input_blocks.{at + block + 1}"
            blocks[f"up_blocks.{level}.{{}}.{block}"] = f"output_blocks.{at + block}"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{at + 3}.0.op"
        for after in (1, 2):  # without attention before it, and with it
            ours = f"output_blocks.{at + 2}.{after}.conv"
            yield f"up_blocks.{level}.upsamplers.0.conv", ours
    for theirs, ours in blocks.items():
        resnet = ours if theirs.startswith("mid") else f"{ours}.0"
        for layer, known in _RESNET.items():
            yield f"{theirs.format('resnets')}.{layer}", f"{resnet}.{known}"
        if not theirs.startswith("mid"):
            yield f"{theirs.format('attentions')}.{{*}}", f"{ours}.1.{{*}}"
