"""What a quantized checkpoint will hold, and how each tensor of it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.dtypes import DENSE_DTYPES
from hijack.errors import CheckpointError, HijackError, NonFiniteError
from hijack.formats import matching
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.dialect import Dialect, EncodedLayer
from hijack.lora.files import Loras
from hijack.quantized import QuantizationConfig, QuantizedTensor, quantize_weight
from hijack.safetensors_io.header import TensorInfo, join, merge_metadata
from hijack.safetensors_io.reader import open_data
from hijack.safetensors_io.writer import memory_of
from hijack.scheme import Scheme
from hijack.selection import Choice
from hijack.text import block_text


@dataclasses.dataclass(frozen=True)
class Step:
    """How one tensor of the source is processed.

    Attributes:
        key: of the tensor.
        layer: the layer that is quantized, or None.
        copied: whether it is copied byte for byte.
        cost: most bytes of memory it takes.
    """

    key: str
    layer: str | None = None
    copied: bool = True
    cost: int = 0


class QuantizePlan:
    """The plan of a quantized checkpoint, made from the header alone.

    Args:
        scheme: to quantize with.
        dialect: to store the quantized layers in.
        choice: which layers are quantized.
        options: of ``scheme.quantize``; those of a layer's rule outrank them.
        loras: to merge first.

    Attributes:
        steps: one for each tensor of the source, in file order.
        tensors: key to dtype and shape of every tensor of the result.
        encoded: each quantized layer as the dialect stores it.
        format_metadata: of the whole file.
        metadata: header metadata of the result.

    Raises:
        HijackError: naming a layer that cannot be quantized or stored.
    """

    def __init__(
        self,
        scheme: Scheme,
        dialect: Dialect,
        choice: Choice,
        options: Mapping[str, Any],
        loras: Loras,
    ) -> None:
        header = choice.header
        self.header, self.scheme, self.dialect = header, scheme, dialect
        self.choice, self.loras = choice, loras
        self.requested = {
            layer: {**options, **rule} for layer, rule in choice.layers.items()
        }
        self.options = {
            layer: dialect.fit_options(self._shape(layer), requested)
            for layer, requested in self.requested.items()
        }
        self.encoded: dict[str, EncodedLayer] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.steps: list[Step] = []
        self.metadata, removed = self._unmark()
        for key in header.tensors:
            if key not in removed:
                self._plan(key)
        others = {s.key: self.tensors[s.key] for s in self.steps if s.layer is None}
        self.format_metadata = dialect.finish(self.encoded, others)
        self.metadata = merge_metadata(self.metadata, self.format_metadata.metadata)
        for key, tensor in self.format_metadata.tensors.items():
            self._add(key, TensorInfo.of(tensor))

    def _unmark(self) -> tuple[dict[str, str], set[str]]:
        """The source's metadata without entries of the layers; keys of their markers.

        A dense file may have them if it was once quantized.
        """
        metadata = dict(self.header.metadata)
        removed = set(needless_markers(self.header))
        for dialect in matching.dialects_of(self.scheme):
            metadata, keys = dialect.unmark(
                metadata, self.header.tensors.keys(), self.options
            )
            removed |= keys
        return metadata, removed

    def _plan(self, key: str) -> None:
        info, layer = self.header.tensors[key], self._layer(key)
        planned = {key: TensorInfo(info.dtype, info.shape)}
        cast = None if layer is None else self.choice.casts.get(layer)
        if cast is not None:
            planned[key] = TensorInfo.of(
                torch.empty(info.shape, dtype=cast, device="meta")
            )
        if layer not in self.options:
            layer = None
        else:
            planned = self._plan_layer(layer, info)
        for name, written in planned.items():
            self._add(name, written)
        cost = info.nbytes + sum(written.nbytes for written in planned.values())
        if self.loras.touches(key):
            _check_dense(key, info)
            cost += 3 * 4 * math.prod(info.shape)  # float32, and temporaries of merging
        copied = layer is None and cast is None and not self.loras.touches(key)
        self.steps.append(Step(key, layer, copied, 0 if copied else cost))

    def _plan_layer(self, layer: str, info: TensorInfo) -> dict[str, TensorInfo]:
        meta = torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
        qdata, params, tensors = self._encode(layer, meta, self.options[layer])
        infos = {suffix: TensorInfo.of(tensor) for suffix, tensor in tensors.items()}
        config = QuantizationConfig.of(self.scheme, self.options[layer])
        weight = QuantizedTensor(qdata, params, config, info.shape)
        self.encoded[layer] = matching.encoded_layer(weight, tensors)
        return {join(layer, suffix): written for suffix, written in infos.items()}

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.tensors:
            raise CheckpointError(
                f"{key}: the dialect {self.dialect.name} would write it, but the "
                "source has it already; is the source quantized?"
            )
        self.tensors[key] = info

    def _layer(self, key: str) -> str | None:
        """The layer whose weight a key is, or None."""
        layer = key.removesuffix("weight").removesuffix(".")
        return layer if key == join(layer, "weight") else None

    def _encode(
        self, layer: str, weight: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Quantized data, parameters, and the tensors of the file by suffix."""
        qdata, params = quantize_weight(self.scheme, weight, options, layer)
        try:
            tensors = self.dialect.encode(qdata, params, self.options[layer])
        except HijackError as error:
            raise type(error)(f"{layer}: {error}") from error
        return qdata, params, tensors

    # -- computing ---------------------------------------------------------------------

    def compute(self, step: Step, device: torch.device) -> dict[str, Tensor]:
        """The tensors that replace one of the source.

        LoRAs are merged in float32. If the scheme can, it quantizes the float32 weight
        with parameters as for the source's dtype; else the weight is cast to it first.

        Args:
            step: one that is not copied.
            device: where to compute.
        """
        tensor = _read(step.key, self.header.tensors[step.key]).to(device)
        dtype, layer = tensor.dtype, step.layer
        if self.loras.touches(step.key):
            tensor = self.loras.merge(step.key, tensor)
        if layer is None:
            return {step.key: self._dense(step.key, tensor)}
        options = self.options[layer]
        if tensor.dtype != dtype:
            like = self.scheme.options_like(dtype)
            tensor = tensor.to(dtype) if like is None else tensor
            options = {**(like or {}), **options}
        encoded = self._encode(layer, tensor, options)[2]
        return {join(layer, suffix): data for suffix, data in encoded.items()}

    def _dense(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized, in its planned dtype."""
        planned = self.tensors[key].torch_dtype
        dense = tensor if planned is None else tensor.to(planned)
        if not dense.isfinite().all():
            raise NonFiniteError(
                f"{key}: holds inf or NaN as {self.tensors[key].dtype}; expected "
                "finite values; leave it in its own dtype, or repair the checkpoint"
            )
        return dense

    # -- blocks and sizes --------------------------------------------------------------

    @functools.cached_property
    def adjusted_blocks(self) -> dict[str, tuple[str, str]]:
        """Layers with another block size than requested: requested and actual one."""
        adjusted = {}
        for layer, options in self.requested.items():
            size = options.get("block_size")
            if size in (None, self.options[layer].get("block_size")):
                continue
            shape, actual = self._shape(layer), self.encoded[layer].block_size
            meta = self.scheme.create_params(shape, torch.float32, "meta", **options)
            requested = self.scheme.block_size(*meta)
            if requested != actual:
                adjusted[layer] = (block_text(requested), block_text(actual))
        return adjusted

    def _shape(self, layer: str) -> tuple[int, ...]:
        return self.header.tensors[join(layer, "weight")].shape

    @functools.cached_property
    def bytes_before(self) -> int:
        """Size of all tensors of the source."""
        return sum(info.nbytes for info in self.header.tensors.values())

    @functools.cached_property
    def bytes_after(self) -> int:
        """Size of all tensors of the result."""
        return sum(info.nbytes for info in self.tensors.values())


def _check_dense(key: str, info: TensorInfo) -> None:
    if info.torch_dtype not in DENSE_DTYPES:
        raise CheckpointError(
            f"{key}: is {info.dtype}, expected a dense floating tensor to merge a LoRA "
            "into"
        )


def _read(key: str, info: TensorInfo) -> Tensor:
    """A dense tensor, read from its file."""
    if info.torch_dtype is None:
        raise CheckpointError(f"{key}: dtype {info.dtype} is not known to torch")
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    rest = memory_of(data)
    with open_data(info) as file:
        while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
            rest = rest[count:]
    if rest:
        raise CheckpointError(
            f"{key}: got {info.nbytes - len(rest)} bytes, expected {info.nbytes}; did "
            "the source change while it was read?"
        )
    return data.view(info.torch_dtype).view(info.shape)
