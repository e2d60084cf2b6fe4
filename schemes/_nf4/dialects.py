"""bitsandbytes' 4-bit weights in files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.formats.comfyui_markers import read_marker
from hijack.formats.configured import ConfiguredFiles
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.formats.tensor_dialect import Reading, TensorDialect
from hijack.safetensors_io.header import Header, TensorInfo, join
from schemes._kernels.tables import table_on
from schemes._nf4.tensors import (
    DTYPES,
    NESTED,
    TABLES,
    block_size_of,
    shape_of,
)

_STATE = "weight.quant_state.bitsandbytes__"
_STATES = {kind: f"{_STATE}{kind}" for kind in ("nf4", "fp4")}
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
#: Bytes of the text of a float, so that the state's length does not depend on it.
_FLOAT = 24
#: Largest number that a scale may be.
_LARGEST = torch.finfo(torch.float32).max


class BitsAndBytesDialect(ConfiguredFiles, TensorDialect):
    """``X.weight.absmax`` and others, and JSON of the rest in ``X.weight.quant_state``.

    ``quant_map`` is the table, which the name of ``quant_state`` tells. Codes are
    bytes, or, as ``quant_storage`` has it, of another dtype with the same bytes.
    """

    name = "bitsandbytes"
    writes = True
    names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("weight",),
        "absmax": ("weight.absmax",),
        "quant_map": ("weight.quant_map",),
        "quant_state": tuple(_STATES.values()),
        "nested_absmax": ("weight.nested_absmax",),
        "nested_quant_map": ("weight.nested_quant_map",),
    }
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("U8", "F32", "F16", "BF16"),
        "absmax": ("F32", "U8"),
        "quant_map": ("F32",),
        "quant_state": ("U8",),
        "nested_absmax": ("F32",),
        "nested_quant_map": ("F32",),
    }
    optional = ("nested_absmax", "nested_quant_map")

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the state says, if all tensors agree with it."""
        keys = {kind: join(layer, end) for kind, end in _STATES.items()}
        kinds = [kind for kind, key in keys.items() if key in header.tensors]
        state = header.marker(keys[kinds[0]]) or {}
        if len(kinds) != 1 or not _fits(state, kinds[0], infos):
            return
        evidence = f"quant_state says {kinds[0]}"
        if header.quantization.get("quant_method") == "bitsandbytes":
            evidence += ", config says bitsandbytes"
        yield Reading(
            Certainty.MARKED,
            evidence,
            options={"quant_type": kinds[0], "dtype": state["dtype"]},
            shape=tuple(state["shape"]),
        )

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes as bytes; an empty tensor and the offset say what the state says."""
        kind, shape = claim.options["quant_type"], claim.shape or ()
        qdata, state = tensors["weight"], tensors["quant_state"]
        dtype = getattr(torch, claim.options["dtype"])
        params = {
            "absmax": tensors["absmax"],
            f"{kind}_shape": qdata.new_empty((*shape, 0), dtype=dtype),
        }
        if "nested_absmax" in tensors:
            params |= {name: tensors[name] for name in self.optional}
            offset = 0 if state.is_meta else read_marker(state)["nested_offset"]
            params["nested_offset"] = params["nested_absmax"].new_tensor(float(offset))
        return qdata.view(torch.uint8).reshape(-1, 1), params

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """bitsandbytes' tensors; the table and the state are made from the others."""
        kind, shape = shape_of(params)
        dtype = params[f"{kind}_shape"].dtype
        tensors = {
            "weight": qdata,
            "weight.absmax": params["absmax"],
            "weight.quant_map": table_on(TABLES[kind], qdata.device).clone(),
        }
        state: dict[str, object] = {
            "quant_type": kind,
            "blocksize": block_size_of(params),
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        text = ""
        if "nested_absmax" in params:
            tensors |= {self.names[name][0]: params[name] for name in self.optional}
            offset = params["nested_offset"]
            value = 0.0 if offset.is_meta else offset.item()
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
            text = f', "nested_offset": {json.dumps(value):<{_FLOAT}}'
        text = f"{json.dumps(state)[:-1]}{text}}}"
        tensors[_STATES[kind]] = torch.tensor(
            list(text.encode()), dtype=torch.uint8, device=qdata.device
        )
        return tensors

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The config of transformers and diffusers, as these write it."""
        if not layers:
            return FormatMetadata()
        stored = next(iter(layers.values()))
        kind = next(kind for kind, end in _STATES.items() if end in stored.tensors)
        dtype = stored.quantized[f"{kind}_shape"].torch_dtype
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": "nested_absmax" in stored.quantized,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": [
                key.removesuffix(".weight") for key in others if key.endswith(".weight")
            ],
        }
        return self.format_metadata(config)


def _fits(state: Mapping[str, Any], kind: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a state is complete, and its tensors are those of such a weight."""
    shape, size = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        return False
    if type(size) is not int or size < 1 or state.get("dtype") not in _DTYPES:
        return False
    numel, nested = math.prod(shape), "nested_absmax" in infos
    if nested and (
        type(state.get("nested_offset")) not in (int, float)
        or not abs(state["nested_offset"]) <= _LARGEST
        or state.get("nested_blocksize") != NESTED
        or "nested_quant_map" not in infos
    ):
        return False
    return (
        state.get("quant_type") == kind
        and infos["weight"].nbytes == -(-numel // 2)
        and infos["absmax"].shape == (-(-numel // size),)
        and (infos["absmax"].dtype == "U8") == nested
    )


DIALECTS = (BitsAndBytesDialect(),)
