"""What a quantized checkpoint will hold, and how each tensor of it is made."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.dtypes import DENSE_DTYPES
from hijack.errors import CheckpointError, HijackError, NonFiniteError
from hijack.formats import matching
from hijack.formats.comfyui_markers import LAYER_MARKER, needless_markers
from hijack.formats.dialect import Dialect, EncodedLayer
from hijack.lora.files import Loras
from hijack.quantized import QuantizationConfig, QuantizedTensor, quantize_weight
from hijack.safetensors_io.header import FRAMEWORK, TensorInfo, join, merge_metadata
from hijack.safetensors_io.reader import open_data
from hijack.safetensors_io.writer import memory_of
from hijack.scheme import Scheme
from hijack.selection import Choice
from hijack.text import block_text

#: Elements of a weight that are quantized at a time, if its rows do not need each
#: other: more than a core's cache, so that little is done twice, and few megabytes.
PART = 3 << 19


@dataclasses.dataclass(frozen=True)
class Step:
    """How one tensor of the source is processed, or some rows of it.

    Attributes:
        key: of the tensor.
        layer: the layer that is quantized, or None.
        copied: whether it is copied byte for byte.
        cost: most bytes of memory it takes.
        part: which rows are quantized; None is the whole weight.
    """

    key: str
    layer: str | None = None
    copied: bool = True
    cost: int = 0
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a weight, which are quantized without the others.

    Attributes:
        start: first row.
        stop: one past the last row.
        offsets: name of each tensor of the scheme that has elements, ``weight`` among
            them, to the key it has in the file, and the first byte of the part in it.
    """

    start: int
    stop: int
    offsets: Mapping[str, tuple[str, int]]


class QuantizePlan:
    """The plan of a quantized checkpoint, made from the header alone.

    Args:
        scheme: to quantize with.
        dialect: to store the quantized layers in.
        choice: which layers are quantized.
        options: of ``scheme.quantize``; those of a layer's rule outrank them.
        loras: to merge first.

    Attributes:
        steps: one for each tensor of the source, in file order, or several for one
            that is quantized in parts.
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
        self._rows: dict[object, _Rows | None] = {}
        self.metadata, removed = self._unmark()
        for key in header.tensors:
            if key not in removed:
                self._plan(key)
        others = {s.key: self.tensors[s.key] for s in self.steps if s.layer is None}
        self.format_metadata = dialect.finish(self.encoded, others)
        self.metadata = merge_metadata(
            FRAMEWORK | self.metadata, self.format_metadata.metadata
        )
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
        rows = None
        if layer is not None and not self.loras.touches(key):
            rows = self._rows_of(layer, info)
        if rows is None:
            self.steps.append(Step(key, layer, copied, 0 if copied else cost))
            return
        n = info.shape[0]
        for start in range(0, n, rows.step):
            stop = min(start + rows.step, n)
            offsets = {
                name: (join(layer or "", suffix), start // rows.step * size)
                for name, (suffix, size) in rows.tensors.items()
            }
            part = Part(start, stop, offsets)
            self.steps.append(Step(key, layer, False, cost * rows.step // n, part))

    def _rows_of(self, layer: str, info: TensorInfo) -> _Rows | None:
        """How a layer is quantized in parts; None if it cannot be, or is small."""
        options = self.options[layer]
        alike = (info.dtype, info.shape, repr(sorted(options.items())))
        if alike not in self._rows:
            try:
                self._rows[alike] = self._find_rows(layer, info)
            except HijackError:  # it refuses weights of so few rows
                self._rows[alike] = None
        return self._rows[alike]

    def _find_rows(self, layer: str, info: TensorInfo) -> _Rows | None:
        options, n = self.options[layer], info.shape[0]
        least = self.scheme.row_step(info.shape, **options)
        if least is None:
            return None
        step = max(PART * n // (math.prod(info.shape) * least), 1) * least
        if step >= n:
            return None

        def quantized(rows: int) -> dict[str, Tensor]:
            shape = (rows, *info.shape[1:])
            meta = torch.empty(shape, dtype=info.torch_dtype, device="meta")
            qdata, params = quantize_weight(self.scheme, meta, options, layer)
            return {"weight": qdata, **params}

        whole, part = quantized(n), quantized(step)
        rest = quantized(n % step) if n % step else None
        params = {name: tensor for name, tensor in whole.items() if name != "weight"}
        encoded = self.dialect.encode(whole["weight"], params, options)
        names = {
            tensor.untyped_storage()._cdata: name for name, tensor in whole.items()
        }
        tensors = {}
        for suffix, tensor in encoded.items():
            if _has_no_rows(suffix, tensor):
                continue
            name = names.get(tensor.untyped_storage()._cdata)
            if name is None or not _same_bytes(tensor, whole[name]):
                return None  # the dialect stores something made of the whole
            pieces = [part[name]] * (n // step)
            pieces += [] if rest is None else [rest[name]]
            if not _are_rows(pieces, whole[name]):
                return None
            tensors[name] = suffix, part[name].numel() * part[name].element_size()
        return _Rows(step, tensors)

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

    def compute_part(
        self, step: Step, device: torch.device, memory: Tensor
    ) -> list[tuple[str, Tensor, int]]:
        """Quantize some rows of a weight.

        Args:
            step: of a part.
            device: where to compute.
            memory: bytes to read the rows into, if there are enough.

        Returns:
            Key, some of its rows, and the first byte of these in the file's tensor.

        Raises:
            HijackError: as for the whole weight.
        """
        layer, part, info = step.layer, step.part, self.header.tensors[step.key]
        if layer is None or part is None:
            raise CheckpointError(f"{step.key}: is not quantized in parts")
        rows = _read(step.key, info, (part.start, part.stop), memory).to(device)
        try:
            qdata, params = quantize_weight(
                self.scheme, rows, self.options[layer], layer
            )
        except HijackError:
            self.compute(dataclasses.replace(step, part=None), device)
            raise  # the whole weight should have failed, and says more
        tensors = {"weight": qdata, **params}
        written = [
            (key, tensors[name], begin) for name, (key, begin) in part.offsets.items()
        ]
        if part.start == 0:
            others = self._without_rows(layer, info)
            written += [(join(layer, name), t, 0) for name, t in others.items()]
        return written

    def _without_rows(self, layer: str, info: TensorInfo) -> dict[str, Tensor]:
        """What the dialect stores of a layer beside its rows, by suffix.

        It is made of dtypes, shapes and options. So the dialect gets the whole weight
        in memory that nobody writes to, which the system does not provide until then.
        """
        meta = torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
        qdata, params = quantize_weight(self.scheme, meta, self.options[layer], layer)
        blank = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in {"weight": qdata, **params}.items()
        }
        encoded = self.dialect.encode(blank.pop("weight"), blank, self.options[layer])
        return {name: t for name, t in encoded.items() if _has_no_rows(name, t)}

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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How weights of a shape are quantized in parts.

    Attributes:
        step: rows of a part, but for the last.
        tensors: name of each tensor of the scheme that has elements to its suffix in
            the file, and its bytes in a part.
    """

    step: int
    tensors: Mapping[str, tuple[str, int]]


def _has_no_rows(suffix: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file says something of a layer, and holds none of it."""
    return suffix == LAYER_MARKER or not tensor.numel()


def _same_bytes(tensor: Tensor, source: Tensor) -> bool:
    """Whether a view has all bytes of a tensor, in the same order."""
    size, other = (t.numel() * t.element_size() for t in (tensor, source))
    return size == other and tensor.is_contiguous() and source.is_contiguous()


def _are_rows(pieces: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether tensors, one after the other, have the shape and dtype of another."""
    alike = all(
        piece.dim() > 0
        and piece.dtype == whole.dtype
        and piece.shape[1:] == whole.shape[1:]
        for piece in pieces
    )
    return alike and sum(piece.shape[0] for piece in pieces) == whole.shape[0]


def _read(
    key: str,
    info: TensorInfo,
    rows: tuple[int, int] | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """A dense tensor of a file, or some rows of it.

    Args:
        key: of the tensor.
        info: of the tensor.
        rows: the first, and one past the last; None is all.
        memory: bytes to read into if there are enough.
    """
    if info.torch_dtype is None:
        raise CheckpointError(f"{key}: dtype {info.dtype} is not known to torch")
    shape, size, skipped = info.shape, info.nbytes, 0
    if rows is not None:
        row = info.nbytes // shape[0]
        shape = (rows[1] - rows[0], *shape[1:])
        size, skipped = shape[0] * row, rows[0] * row
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
    data = memory[:size]
    rest = memory_of(data)
    with open_data(info) as file:
        file.seek(skipped, os.SEEK_CUR)
        while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
            rest = rest[count:]
    if rest:
        raise CheckpointError(
            f"{key}: got {size - len(rest)} bytes, expected {size}; did "
            "the source change while it was read?"
        )
    return data.view(info.torch_dtype).view(shape)
