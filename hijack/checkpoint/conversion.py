"""One layer on its way from one dialect to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.formats.claim import Claim
from hijack.formats.dialect import Dialect, Spelled
from hijack.metrics import Loss, measure
from hijack.registry import default_registry
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
        block_size: the blocks it will have.
        options: what the target is told when it encodes.
        requantized: whether it is quantized anew.
        inputs: keys of scales of inputs, and what they will be called.
        params: names of the scheme's tensors beside the codes.
        planned: key to dtype and shape of what will be written; the codes first.
    """

    claim: Claim
    scheme: Scheme
    source: Dialect
    target: Dialect
    shape: tuple[int, ...]
    block_size: Pair | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    requantized: bool = False
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    params: tuple[str, ...] = ()
    planned: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, header: Header, claim: Claim, dialect: str) -> Conversion:
        """What the header alone tells of a layer.

        Raises:
            CheckpointError: if its scheme has no such dialect, or does not write it.
            HijackError: if its tensors do not fit each other.
        """
        scheme = default_registry().get(claim.scheme)
        source, target = scheme.dialect(claim.dialect), scheme.written(dialect)
        infos = {key: header.tensors[key] for key in claim.keys.values()}
        meta = {
            key: torch.empty(info.torch_shape, dtype=info.torch_dtype, device="meta")
            for key, info in infos.items()
        }
        qdata, params = scheme.decode(claim, meta)
        shape = tuple(scheme.dequantize(qdata, params, torch.float32).shape)
        return cls(claim, scheme, source, target, shape, claim.block_size)

    # -- planning ----------------------------------------------------------------------

    def fit(
        self, header: Header, settled: Mapping[str, Any], asked: Mapping[str, Any]
    ) -> str:
        """Find blocks the target can spell; if there are none, say why.

        Args:
            header: of the source.
            settled: options that all layers of the file share.
            asked: options that were asked for; blocks among them are those to have.

        Raises:
            HijackError: if there are no such options.
        """
        reason, size = "there are no such blocks", self.claim.block_size
        wanted: list[tuple[Pair | None, Any]] = [(None, None)]
        given = self._asked(asked) if asked else None
        if size is not None and given is not None and "block_size" in asked:
            wanted = [given]
        elif size is not None:
            choices = self.target.blocks(self.shape, size, settled)
            whole = settled.get("block_size") == "tensor"
            wanted = [(choice, "tensor" if whole else choice) for choice in choices]
        for choice, spelled in wanted:
            self.options = {**settled, **asked}
            if choice is not None:
                self.options["block_size"] = spelled
            try:
                reason = self._try(header, choice)
            except HijackError as error:
                reason = str(error)
            if not reason:
                return ""
        return reason

    def _asked(self, asked: Mapping[str, Any]) -> tuple[Pair | None, Any]:
        """The blocks that quantizing with some options would give, and their option."""
        options = self.target.fit_options(self.shape, dict(asked))
        made = self.scheme.create_params(self.shape, torch.float32, "meta", **options)
        return self.scheme.block_size(*made), options.get("block_size")

    def _try(self, header: Header, wanted: Pair | None) -> str:
        qdata, params = self._decode(header)
        if wanted is not None and wanted != self.claim.block_size:
            changed = self.scheme.reblock(qdata, params, wanted)
            if changed is None:
                return (
                    f"{self.claim.layer}: its blocks of "
                    f"{block_text(self.claim.block_size)} do not give blocks of "
                    f"{block_text(wanted)}, which dialect {self.target.name} would have"
                )
            params = changed
        self._plan(qdata, params)
        return ""

    def fit_anew(self, options: Mapping[str, Any]) -> str:
        """Plan to quantize the layer anew; if that cannot be spelled, say why."""
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
        """Ask the target for dtypes and shapes of what it will write."""
        meta = {name: tensor.to("meta") for name, tensor in params.items()}
        codes = qdata.to("meta")
        self.params = tuple(meta)
        self.block_size = self.scheme.block_size(codes, meta)
        made = self.encode(codes, meta)
        self.planned = {key: TensorInfo.of(tensor) for key, tensor in made.items()}

    def spelled(self) -> Spelled:
        """For the target to say what the file is."""
        prefix = len(join(self.claim.layer, ""))
        tensors = {key[prefix:]: info for key, info in self.planned.items()}
        return Spelled(
            self.scheme.name, self.params, self.shape, self.block_size, tensors
        )

    # -- doing -------------------------------------------------------------------------

    def read(self, header: Header) -> Quantized:
        """Codes and parameters, as the result will have them."""
        qdata, params = self._decode(header)
        if self.requantized:
            dense = self.scheme.dequantize(qdata, params, torch.float32)
            return self.scheme.quantize(dense, **self.options)
        if self.block_size is None or self.block_size == self.claim.block_size:
            return qdata, params
        changed = self.scheme.reblock(qdata, params, self.block_size)
        return qdata, params if changed is None else changed

    def encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the result, by full key, the codes first."""
        try:
            made = self.target.encode(qdata, params, self.options)
        except HijackError as error:
            raise type(error)(f"{self.claim.layer}: {error}") from error
        return {join(self.claim.layer, name): tensor for name, tensor in made.items()}

    def loss(self, header: Header, made: Quantized) -> Loss:
        """What quantizing anew lost, against what the source decodes to."""
        dense = self.scheme.dequantize(*self._decode(header), torch.float32)
        return measure(dense, self.scheme.dequantize(*made, torch.float32))

    def _decode(self, header: Header) -> Quantized:
        # mapped anew each time, so that the pages read do not add up
        return self.scheme.decode(self.claim, open_tensors(header))
