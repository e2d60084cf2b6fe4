"""The conversion of one layer from one dialect to another."""

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
from hijack.quantized import QuantizationConfig, QuantizedTensor
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.safetensors_io.reader import open_tensors
from hijack.scheme import Scheme
from hijack.text import block_text

Pair = tuple[int, int]
Quantized = tuple[Tensor, Mapping[str, Tensor]]


@dataclasses.dataclass
class Conversion:
    """What a layer was and what it becomes.

    Attributes:
        claim: how it is read.
        scheme: by which scheme.
        source: the dialect it is in.
        target: the dialect it will be in.
        shape: of the dense weight.
        options: passed to the target's ``encode``.
        requantized: whether it is dequantized and quantized again.
        inputs: keys of input scales, to their new keys.
        encoded: the layer as the target will store it, once that is planned.
    """

    claim: Claim
    scheme: Scheme
    source: Dialect
    target: Dialect
    shape: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    requantized: bool = False
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    encoded: EncodedLayer | None = None

    @classmethod
    def of(
        cls, header: Header, claim: Claim, dialect: str, scheme: Scheme
    ) -> Conversion:
        """A conversion that is not planned yet, from the header alone.

        Raises:
            CheckpointError: if the scheme has no such dialect, or cannot write it.
            HijackError: if its tensors do not fit each other.
        """
        source = matching.dialect_of(scheme, claim.dialect)
        target = matching.written_dialect(scheme, dialect)
        infos = {key: header.tensors[key] for key in claim.keys.values()}
        meta = {
            key: torch.empty(info.torch_shape, dtype=info.torch_dtype, device="meta")
            for key, info in infos.items()
        }
        qdata, params = matching.decode(scheme, claim, meta)
        shape = claim.shape or scheme.dense_shape(qdata, params)
        return cls(claim, scheme, source, target, shape)

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

    def plan_requantize(self, options: Mapping[str, Any]) -> str:
        """Plan to requantize the layer; if that cannot be stored, return why."""
        self.requantized = True
        self.options = self.target.fit_options(self.shape, dict(options))
        try:
            self._plan(
                *self.scheme.create_params(
                    self.shape, torch.float32, "meta", **self.options
                )
            )
        except HijackError as error:
            return str(error)
        return ""

    def _plan(self, qdata: Tensor, params: Mapping[str, Tensor]) -> None:
        """Encode the layer without data."""
        meta = {name: tensor.to("meta") for name, tensor in params.items()}
        weight = self._weight((qdata.to("meta"), meta))
        tensors = self._encode(weight.qdata, meta)
        encoded = matching.encoded_layer(weight, tensors)
        new = encoded.options if self.requantized else {}
        options = {**self.claim.options, **new}
        self.encoded = dataclasses.replace(encoded, options=options)

    @property
    def lost(self) -> tuple[str, ...]:
        """What the file says of the layer beside its weight, and the target cannot."""
        stores = self.target.stores
        forward = {o.name for o in self.scheme.declared_options() if o.forward}
        options = forward.intersection(self.claim.options)
        return (
            *self.claim.unread,
            *sorted(options - set(options if stores is None else stores)),
        )

    # -- converting --------------------------------------------------------------------

    def read(self, header: Header) -> Quantized:
        """The quantized data and parameters of the result."""
        qdata, params = self._decode(header)
        if self.requantized:
            dense = self._weight((qdata, params)).dense(torch.float32)
            return self.scheme.quantize(dense, **self.options)
        if self.block_size is None or self.block_size == self.claim.block_size:
            return qdata, params
        regrouped = self.scheme.reblock(qdata, params, self.block_size)
        return qdata, params if regrouped is None else regrouped

    def encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the result by full key; ``qdata`` is the first."""
        tensors = self._encode(qdata, params)
        return {join(self.claim.layer, name): t for name, t in tensors.items()}

    def error(self, header: Header, converted: Quantized) -> QuantizationError:
        """The error of requantizing, against what the source decodes to."""
        reference, other = map(self._weight, (self._decode(header), converted))
        return quantization_error(
            reference.dense(torch.float32), other.dense(torch.float32)
        )

    def _encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            declared = matching.declared_options(self.claim, self.scheme)
            return self.target.encode(qdata, params, {**declared, **self.options})
        except HijackError as error:
            raise type(error)(f"{self.claim.layer}: {error}") from error

    def _weight(self, quantized: Quantized) -> QuantizedTensor:
        config = QuantizationConfig.of(self.scheme, self.options)
        return QuantizedTensor(*quantized, config, self.shape)

    def _decode(self, header: Header) -> Quantized:
        # mapped again each time, so that the pages read do not add up
        return matching.decode(self.scheme, self.claim, open_tensors(header))
