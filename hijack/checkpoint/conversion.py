"""The conversion of one layer to another dialect, or to another scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.claim import Claim
from hijack.errors import HijackError
from hijack.formats import matching
from hijack.formats.dialect import Dialect, EncodedLayer
from hijack.metrics import QuantizationError, quantization_error
from hijack.quantized import QuantizationConfig, QuantizedTensor, quantize_weight
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.safetensors_io.reader import open_tensors
from hijack.scheme import Scheme
from hijack.text import block_text

Pair = tuple[int, int]
Quantized = tuple[Tensor, Mapping[str, Tensor]]

#: Dtypes that the weight of a layer may have had, which a file does not store.
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Conversion:
    """What a layer was and what it becomes.

    Attributes:
        claim: how it is read.
        scheme: by which scheme.
        source: the dialect it is in.
        shape: of the dense weight.
        result: the scheme it will be in.
        target: the dialect it will be in.
        options: of ``result.quantize``, passed to the target's ``encode``.
        requantized: whether it is dequantized and quantized again.
        inputs: keys of input scales, to their new keys.
        encoded: the layer as the target will store it, once that is planned.
    """

    claim: Claim
    scheme: Scheme
    source: Dialect
    shape: tuple[int, ...]
    result: Scheme
    target: Dialect
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    requantized: bool = False
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    encoded: EncodedLayer | None = None

    @classmethod
    def of(cls, header: Header, claim: Claim, scheme: Scheme) -> Conversion:
        """A layer that becomes what it is, not planned yet, from the header alone.

        Raises:
            HijackError: if its tensors do not fit each other.
        """
        source = matching.dialect_of(scheme, claim.dialect)
        quantized = _decode_meta(header.tensors, claim, scheme)
        shape = claim.shape or scheme.dense_shape(*quantized)
        return cls(claim, scheme, source, shape, scheme, source)

    @property
    def crosses(self) -> bool:
        """Whether it becomes a layer of another scheme."""
        return self.result.name != self.scheme.name

    @property
    def block_size(self) -> Pair | None:
        """The planned block size."""
        return None if self.encoded is None else self.encoded.block_size

    @property
    def planned(self) -> dict[str, TensorInfo]:
        """Key to dtype and shape of what will be written; ``qdata`` is the first."""
        tensors = {} if self.encoded is None else self.encoded.tensors
        return {join(self.claim.layer, name): info for name, info in tensors.items()}

    # -- planning ----------------------------------------------------------------------

    def plan(
        self, header: Header, shared: Mapping[str, Any], requested: Mapping[str, Any]
    ) -> str:
        """Find a block size the target can store; if there is none, return why.

        Args:
            header: of the source.
            shared: options that all layers of the file share.
            requested: options of the user; a block size among them is the only one
                that is tried.

        Raises:
            HijackError: if there are no such options.
        """
        reason, size = "there are no such blocks", self.claim.block_size
        candidates: list[tuple[Pair | None, Any]] = [(None, None)]
        requested_size = self._requested_size(requested) if requested else None
        if size is not None and requested_size and "block_size" in requested:
            candidates = [requested_size]
        elif size is not None:
            sizes = self.target.blocks(self.shape, size, shared)
            whole = shared.get("block_size") == "tensor"
            candidates = [(choice, "tensor" if whole else choice) for choice in sizes]
        for candidate, option in candidates:
            self.options = {**shared, **requested}
            if candidate is not None:
                self.options["block_size"] = option
            try:
                reason = self._try(header, candidate)
            except HijackError as error:
                reason = str(error)
            if not reason:
                return ""
        return reason

    def _requested_size(self, requested: Mapping[str, Any]) -> tuple[Pair | None, Any]:
        """The block size that quantizing with some options gives, and its option."""
        options = self.target.fit_options(self.shape, dict(requested))
        meta = self.scheme.create_params(self.shape, torch.float32, "meta", **options)
        return self.scheme.block_size(*meta), options.get("block_size")

    def _try(self, header: Header, block_size: Pair | None) -> str:
        qdata, params = self._decode(header)
        if block_size is not None and block_size != self.claim.block_size:
            regrouped = self.scheme.reblock(qdata, params, block_size)
            if regrouped is None:
                return (
                    f"{self.claim.layer}: its blocks of "
                    f"{block_text(self.claim.block_size)} do not give blocks of "
                    f"{block_text(block_size)}, which dialect {self.target.name} needs"
                )
            params = regrouped
        self._plan(qdata, params)
        return ""

    def has_format(self, header: Header, requested: Mapping[str, Any]) -> bool:
        """Whether quantizing with some options gives tensors like those there are.

        What decodes a weight is in its tensors, so that they tell.

        Args:
            header: of the source.
            requested: options of the scheme the layer is in.

        Raises:
            HijackError: if there are no such options.
        """
        quantized = _decode_meta(header.tensors, self.claim, self.scheme)
        known = matching.options_of(self.claim, self.scheme, quantized)
        options = {**known, **requested}
        kinds = (
            self.scheme.create_params(self.shape, dtype, "meta", **options)
            for dtype in _WEIGHT_DTYPES
        )
        return any(_layout(kind) == _layout(quantized) for kind in kinds)

    def plan_requantize(self, options: Mapping[str, Any]) -> str:
        """Plan to requantize the layer; if that cannot be stored, return why."""
        self.requantized = True
        self.options = self.target.fit_options(self.shape, dict(options))
        try:
            self._plan(
                *self.result.create_params(
                    self.shape, torch.float32, "meta", **self.options
                )
            )
        except HijackError as error:
            return str(error)
        return ""

    def _plan(self, qdata: Tensor, params: Mapping[str, Tensor]) -> None:
        """Encode the layer without data."""
        meta = {name: tensor.to("meta") for name, tensor in params.items()}
        weight = self._result_weight((qdata.to("meta"), meta))
        tensors = self._encode(weight.qdata, meta)
        encoded = matching.encoded_layer(weight, tensors)
        forward = _forward_options(self.result)
        new = {
            name: text
            for name, text in encoded.options.items()
            if self.requantized or name in forward
        }
        self.encoded = dataclasses.replace(encoded, options={**self._kept, **new})

    def adjusted(self, requested: Mapping[str, Any]) -> tuple[str, str] | None:
        """The requested block size and the planned one, if they are not the same."""
        if not self.requantized or requested.get("block_size") is None:
            return None
        meta = self.result.create_params(self.shape, torch.float32, "meta", **requested)
        size = self.result.block_size(*meta)
        if size == self.block_size:
            return None
        return block_text(size), block_text(self.block_size)

    @property
    def _kept(self) -> dict[str, str]:
        """What the file says of the layer that holds in the result, as texts."""
        if not self.crosses:
            return dict(self.claim.options)
        names = _forward_options(self.scheme) & _forward_options(self.result)
        return {n: text for n, text in self.claim.options.items() if n in names}

    @property
    def lost(self) -> tuple[str, ...]:
        """What the file says of the layer beside its weight, and the target cannot."""
        stores = self.target.stores
        options = _forward_options(self.scheme).intersection(self.claim.options)
        kept = set(self._kept)
        stored = kept if stores is None else kept.intersection(stores)
        return (*self.claim.unread, *sorted(options - stored))

    # -- converting --------------------------------------------------------------------

    def read(self, header: Header) -> tuple[Quantized, QuantizationError | None]:
        """The quantized data and parameters of the result.

        Returns:
            These, and the error against what the source decodes to, if the layer is
            requantized.
        """
        quantized = self._decode(header)
        if self.requantized:
            return self._requantize(quantized)
        if self.block_size is None or self.block_size == self.claim.block_size:
            return quantized, None
        regrouped = self.scheme.reblock(*quantized, self.block_size)
        return (quantized[0], quantized[1] if regrouped is None else regrouped), None

    def _requantize(self, quantized: Quantized) -> tuple[Quantized, QuantizationError]:
        dense = self._source_weight(quantized).dense(torch.float32)
        new = quantize_weight(self.result, dense, self.options, self.claim.layer)
        error = quantization_error(dense, self._result_weight(new).dense(torch.float32))
        return new, error

    def encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the result by full key; ``qdata`` is the first."""
        tensors = self._encode(qdata, params)
        return {join(self.claim.layer, name): t for name, t in tensors.items()}

    def _encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        claim = dataclasses.replace(self.claim, options=self._kept)
        try:
            declared = matching.declared_options(claim, self.result)
            told = self.result.options_of(qdata, params)  # tensors outrank a marker
            kept = {name: v for name, v in declared.items() if name not in told}
            return self.target.encode(qdata, params, {**kept, **self.options})
        except HijackError as error:
            raise type(error)(f"{self.claim.layer}: {error}") from error

    def _source_weight(self, quantized: Quantized) -> QuantizedTensor:
        qdata, params = quantized[0], dict(quantized[1])
        options = matching.options_of(self.claim, self.scheme, (qdata, params))
        config = QuantizationConfig.of(self.scheme, options)
        return QuantizedTensor(qdata, params, config, self.shape)

    def _result_weight(self, quantized: Quantized) -> QuantizedTensor:
        config = QuantizationConfig.of(self.result, self.options)
        return QuantizedTensor(*quantized, config, self.shape)

    def _decode(self, header: Header) -> Quantized:
        # mapped again each time, so that the pages read do not add up
        return matching.decode(self.scheme, self.claim, open_tensors(header))


def dense_shape(
    tensors: Mapping[str, TensorInfo], claim: Claim, scheme: Scheme
) -> tuple[int, ...]:
    """Shape of a layer's dense weight, from the header alone.

    Args:
        tensors: full key to dtype and shape.
        claim: how the layer is read.
        scheme: of the claim.

    Raises:
        HijackError: if its tensors do not fit each other.
    """
    if claim.shape is not None:
        return claim.shape
    return scheme.dense_shape(*_decode_meta(tensors, claim, scheme))


def _decode_meta(
    tensors: Mapping[str, TensorInfo], claim: Claim, scheme: Scheme
) -> tuple[Tensor, dict[str, Tensor]]:
    """The quantized data and parameters of a layer, without their values."""
    meta = {
        claim.keys[role]: tensor
        for role, tensor in matching.meta_tensors(tensors, claim).items()
    }
    return matching.decode(scheme, claim, meta)


def _layout(quantized: Quantized) -> dict[str, TensorInfo]:
    """Name to dtype and shape of the tensors of a weight."""
    qdata, params = quantized
    tensors = {"weight": qdata, **params}
    return {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}


def _forward_options(scheme: Scheme) -> set[str]:
    """Names of a scheme's options that say how a layer computes."""
    return {option.name for option in scheme.declared_options() if option.forward}
