"""What a quantized checkpoint will hold, and how each tensor of it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.quantize_choice import Choice
from hijack.errors import CheckpointError, HijackError, NonFiniteError
from hijack.formats.dialect import Dialect, Spelled
from hijack.layers import DENSE_DTYPES, quantize_weight
from hijack.lora.files import Loras
from hijack.safetensors_io.header import TensorInfo, join
from hijack.safetensors_io.reader import data_start
from hijack.safetensors_io.writer import memory_of
from hijack.scheme import Scheme
from hijack.text import block_text


@dataclasses.dataclass(frozen=True)
class Step:
    """What takes the place of one tensor of the source.

    Attributes:
        key: of the tensor.
        names: keys of what is written.
        layer: the layer that is quantized, or None.
        copied: whether it stays as it is, byte for byte.
        cost: bytes in memory while it is done, at most.
    """

    key: str
    names: tuple[str, ...]
    layer: str | None = None
    copied: bool = True
    cost: int = 0


class QuantizePlan:
    """A quantized checkpoint before anything of it is made.

    Args:
        scheme: to quantize with.
        dialect: to spell the quantized layers in.
        choice: what becomes of each layer.
        options: of ``scheme.quantize``; those of a layer's rule outweigh them.
        loras: to merge first.

    Attributes:
        steps: one for each tensor of the source, in file order.
        tensors: key to dtype and shape of every tensor of the result.
        spelled: what the dialect made of each quantized layer.
        marks: what the file says as a whole.
        metadata: of the result.

    Raises:
        HijackError: naming a layer that cannot be quantized or spelled.
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
        self.asked = {layer: {**options, **own} for layer, own in choice.layers.items()}
        self.options = {
            layer: dialect.fit_options(self._shape(layer), asked)
            for layer, asked in self.asked.items()
        }
        self.spelled: dict[str, Spelled] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.steps: list[Step] = []
        self.metadata, left = self._unmark()
        for key in header.tensors:
            if key not in left:
                self._plan(key)
        loose = [step.key for step in self.steps if step.layer is None]
        others = {key: self.tensors[key] for key in loose}
        self.marks = dialect.finish(self.spelled, others)
        self.metadata |= self.marks.metadata
        for key, tensor in self.marks.tensors.items():
            self._add(key, TensorInfo.of(tensor))

    def _unmark(self) -> tuple[dict[str, str], set[str]]:
        """Metadata and markers without what was said of the layers until now.

        A dense file may have them, if it was quantized once.
        """
        metadata, left = dict(self.header.metadata), set[str]()
        for dialect in self.scheme.all_dialects():
            metadata, keys = dialect.unmark(
                metadata, self.header.tensors.keys(), self.options
            )
            left |= keys
        return metadata, left

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
            cost += 3 * 4 * math.prod(info.shape)  # float32, and what a merge makes
        copied = layer is None and cast is None and not self.loras.touches(key)
        self.steps.append(
            Step(key, tuple(planned), layer, copied, 0 if copied else cost)
        )

    def _plan_layer(self, layer: str, info: TensorInfo) -> dict[str, TensorInfo]:
        meta = torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
        qdata, params, tensors = self._encode(layer, meta, self.options[layer])
        infos = {suffix: TensorInfo.of(tensor) for suffix, tensor in tensors.items()}
        self.spelled[layer] = Spelled(
            self.scheme.name,
            tuple(params),
            info.shape,
            self.scheme.block_size(qdata, params),
            infos,
        )
        return {join(layer, suffix): written for suffix, written in infos.items()}

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.tensors:
            raise CheckpointError(
                f"{key}: the dialect {self.dialect.name} would write it, and the "
                "source holds it already; is the source quantized?"
            )
        self.tensors[key] = info

    def _layer(self, key: str) -> str | None:
        """The layer whose weight a key is, or None."""
        layer = key.removesuffix("weight").removesuffix(".")
        return layer if key == join(layer, "weight") else None

    def _encode(
        self, layer: str, weight: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Codes, parameters, and the tensors of the file by suffix."""
        qdata, params = quantize_weight(self.scheme, weight, options, layer)
        try:
            tensors = self.dialect.encode(qdata, params, self.options[layer])
        except HijackError as error:
            raise type(error)(f"{layer}: {error}") from error
        return qdata, params, tensors

    # -- making ------------------------------------------------------------------------

    def make(self, step: Step, device: torch.device) -> dict[str, Tensor]:
        """The tensors that take the place of one of the source.

        LoRAs are merged in float32. If the scheme can, it quantizes the float32 weight,
        with parameters such as the source's dtype gives; else that dtype comes between.

        Args:
            step: which is not copied.
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
        made = self._encode(layer, tensor, options)[2]
        return {join(layer, suffix): data for suffix, data in made.items()}

    def _dense(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized, in the dtype planned for it."""
        planned = self.tensors[key].torch_dtype
        made = tensor if planned is None else tensor.to(planned)
        if not made.isfinite().all():
            raise NonFiniteError(
                f"{key}: holds inf or NaN as {self.tensors[key].dtype}; expected "
                "finite values; leave it in its own dtype, or repair the checkpoint"
            )
        return made

    # -- blocks and sizes --------------------------------------------------------------

    @functools.cached_property
    def refitted(self) -> dict[str, tuple[str, str]]:
        """Layers with other blocks than those asked for: to these, and to theirs."""
        found = {}
        for layer, asked in self.asked.items():
            size = asked.get("block_size")
            if size in (None, self.options[layer].get("block_size")):
                continue
            shape, given = self._shape(layer), self.spelled[layer].block_size
            made = self.scheme.create_params(shape, torch.float32, "meta", **asked)
            wanted = self.scheme.block_size(*made)
            if wanted != given:
                found[layer] = (block_text(wanted), block_text(given))
        return found

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
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    if info.file is None or info.torch_dtype is None:
        raise CheckpointError(f"{key}: got a tensor in memory, expected one in a file")
    left = memory_of(data)
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(data_start(info.file) + info.begin)
            while left and (count := file.readinto(left)):
                left = left[count:]
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: cannot be read; {error.strerror}"
        ) from error
    if left:
        raise CheckpointError(
            f"{key}: got {info.nbytes - len(left)} bytes, expected {info.nbytes}; was "
            "the source changed while it was read?"
        )
    return data.view(info.torch_dtype).view(info.shape)
