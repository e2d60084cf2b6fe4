"""What the quantizing nodes have in common: the options of the command line."""

from __future__ import annotations

import sys
from typing import Any

from hijack.errors import HijackError, SchemeError, printable
from hijack.hosts.comfyui.nodes.spec import Input
from hijack.hosts.comfyui.quantize import check_interrupted
from hijack.lora.files import parse_lora
from hijack.options import COMMON, Option, parse_options
from hijack.progress import Progress
from hijack.quantized import QuantizationConfig
from hijack.registry import current_registry
from hijack.scheme import Scheme
from hijack.text import did_you_mean, logger, parse_block_size

log = logger(__name__)

AUTO = "auto"
#: Block sizes to choose among.
BLOCK_SIZES = (AUTO, "1x32", "1x64", "1x128", "32x32", "128x128", "row", "tensor")
#: Where to quantize: on the processor, or where ComfyUI computes.
DEVICES = ("cpu", "gpu")


def schemes() -> list[Scheme]:
    """Registered schemes; the default one first."""
    known = current_registry().schemes().values()
    return sorted(known, key=lambda scheme: (not scheme.is_default, scheme.name))


def scheme_names() -> list[str]:
    """Names of registered schemes; that of the default one first."""
    return [scheme.name for scheme in schemes()]


def _summaries() -> str:
    """The weight formats there are, as they say themselves."""
    told = (f"{scheme.name}: {scheme.summary}" for scheme in schemes())
    return "\n".join(["The weight format. Plugins add others.", *told])


def _declared(name: str) -> dict[str, Option]:
    """The schemes that have an option of a name, and what each says of it."""
    return {
        scheme.name: option
        for scheme in schemes()
        for option in scheme.declared_options()
        if option.name == name
    }


def _meanings(name: str, text: str) -> str:
    """A tooltip of an input for an option that many schemes may have."""
    told = [
        f"{scheme}: {option.described()}" for scheme, option in _declared(name).items()
    ]
    return "\n".join([text, *(told or ["No registered scheme has it."])])


def _choices(name: str) -> list[str]:
    """The values that any scheme takes for an option."""
    words = (
        option.word(choice)
        for option in _declared(name).values()
        for choice in option.choices
    )
    return [AUTO, *dict.fromkeys(words)]


def _limits(name: str) -> tuple[float, float]:
    """The greatest range that any scheme has for an option."""
    options = _declared(name).values()
    return (
        min((o.minimum for o in options if o.minimum is not None), default=0),
        max((o.maximum for o in options if o.maximum is not None), default=128),
    )


def _others() -> str:
    """The options without an input of their own, by scheme."""
    told = []
    for scheme in schemes():
        declared = scheme.declared_options()
        names = [option.name for option in declared if option.name not in COMMON]
        told.append(f"{scheme.name}: {', '.join(names) or 'none'}")
    text = (
        "Further options of the scheme, NAME=VALUE, one a line. The node Options of "
        "the scheme says what they are and makes such a text."
    )
    return "\n".join([text, *told])


def make_config(
    scheme: str,
    block_size: str,
    custom_block_size: str = "",
    dtype: str = AUTO,
    scale_dtype: str = AUTO,
    scale_search: int = 0,
    options: str = "",
) -> QuantizationConfig:
    """What the inputs of the quantizing nodes say.

    Raises:
        HijackError: if the scheme is unknown, or a value is not one that it takes.
    """
    chosen = current_registry().get(scheme)
    declared = chosen.declared_options()
    size = custom_block_size.strip() or block_size.strip()
    values = {
        "block_size": "" if size.lower() == AUTO else size,
        "dtype": "" if dtype == AUTO else dtype,
        "scale_dtype": "" if scale_dtype == AUTO else scale_dtype,
        "scale_search": str(scale_search or ""),
    }
    known = {option.name for option in declared}
    for name, value in values.items():
        if value and name not in known:
            raise HijackError(
                f"{name}: scheme {scheme} has no such option; got {value!r}, expected "
                f"{0 if name == 'scale_search' else AUTO}"
            )
    if values["block_size"]:
        _check_block_size(size)
    texts = [f"{name}={value}" for name, value in values.items() if value]
    parsed = parse_options(declared, [*texts, *lines_of(options)], scheme)
    return QuantizationConfig.of(chosen, parsed)


def _check_block_size(text: str) -> None:
    try:
        parse_block_size(text)
    except SchemeError as error:
        raise SchemeError(f"block_size: {error}; or write {AUTO}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def find_loras(text: str) -> list[tuple[str, float]]:
    """Files and strengths of LoRAs, one a line, from ComfyUI's folder of LoRAs.

    Raises:
        HijackError: if a file is not there, or a strength is no number.
    """
    folder_paths = sys.modules["folder_paths"]
    found = []
    for line in lines_of(text):
        name, strength = parse_lora(line)
        path = folder_paths.get_full_path("loras", str(name))
        if path is None:
            known = folder_paths.get_filename_list("loras")
            raise HijackError(
                f"loras: {str(name)!r} is not in ComfyUI's folder of LoRAs; expected "
                f"FILE or FILE:STRENGTH{did_you_mean(str(name), known)}"
            )
        found.append((path, strength))
    return found


def device_of(word: str) -> Any:
    """The device that a choice of `DEVICES` stands for."""
    if word == "cpu":
        return word
    return sys.modules["comfy.model_management"].get_torch_device()


def progress_bar() -> Progress:
    """ComfyUI's progress bar; pressing cancel raises from it."""
    utils = sys.modules["comfy.utils"]
    bars: list[Any] = []

    def advance(done: int, total: int, layer: str) -> None:
        check_interrupted()
        if not bars:
            bars.append(utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return advance


def logged(where: str, notes: list[str]) -> str:
    """Put notes into the log, a line each, and give them as one text."""
    for note in notes:
        log.info("hijack: %s: %s", where, note)
    return "\n".join(map(printable, notes))


SCHEME = Input(
    "scheme",
    "COMBO",
    _summaries,
    options=scheme_names,
)
BLOCK_SIZE = Input(
    "block_size",
    "COMBO",
    "Weights that share a scale: ROWSxCOLUMNS, row, or tensor. auto is the format's "
    "own choice. Smaller blocks are more exact. For other sizes fill in "
    "custom_block_size.",
    options=lambda: BLOCK_SIZES,
    default=AUTO,
    free=True,
)
PATTERNS = (
    Input(
        "include",
        "STRING",
        "Layers to quantize, as patterns such as transformer_blocks.*.img_mlp.*, one "
        "a line. Empty, or the word default: what is usual for this family of models, "
        "or, of a model that is not known, the linear layers that are no embedding, "
        "norm, head or router.",
        default="",
        multiline=True,
        optional=True,
    ),
    Input(
        "exclude",
        "STRING",
        "Layers to leave as they are, as patterns, one a line. Empty, or the word "
        "default: what this family of models is sensitive in, such as norms.",
        default="",
        multiline=True,
        optional=True,
    ),
)
RULES = Input(
    "rules",
    "STRING",
    "What is special about some layers, one rule a line; the first that matches "
    "applies. PATTERN=128x128 sets their block size, PATTERN=skip leaves them as they "
    "are, PATTERN=bf16, f16 or f32 does so in that dtype.",
    default="",
    multiline=True,
    optional=True,
    advanced=True,
)
LORAS = Input(
    "loras",
    "STRING",
    "LoRAs to merge at full precision first, one a line: FILE or FILE:STRENGTH, such "
    "as style.safetensors:0.8, with files of ComfyUI's folder of LoRAs.",
    default="",
    multiline=True,
    optional=True,
)
DETAILS = (
    Input(
        "custom_block_size",
        "STRING",
        "A block size that block_size does not list, such as 1x48 or 64x64. Empty: "
        "block_size counts.",
        default="",
        optional=True,
        advanced=True,
    ),
    Input(
        "dtype",
        "COMBO",
        lambda: _meanings(
            "dtype",
            "What quantized weights are stored as. auto is the format's own choice.",
        ),
        options=lambda: _choices("dtype"),
        default=AUTO,
        optional=True,
        advanced=True,
    ),
    Input(
        "scale_dtype",
        "COMBO",
        lambda: _meanings(
            "scale_dtype",
            "What scales are stored as. auto is the weight's own dtype, or what the "
            "dialect asks for.",
        ),
        options=lambda: _choices("scale_dtype"),
        default=AUTO,
        optional=True,
        advanced=True,
    ),
    Input(
        "scale_search",
        "INT",
        lambda: _meanings(
            "scale_search",
            "Try this many scales and take the one with the least error. 0 tries none.",
        ),
        default=0,
        optional=True,
        advanced=True,
        limits=lambda: _limits("scale_search"),
    ),
    Input(
        "options",
        "STRING",
        _others,
        default="",
        multiline=True,
        optional=True,
        advanced=True,
    ),
    Input(
        "device",
        "COMBO",
        "Where layers are quantized, one at a time: on the processor, or on the "
        "device that ComfyUI computes on, which is faster.",
        options=lambda: DEVICES,
        default="cpu",
        optional=True,
        advanced=True,
    ),
)
ALIASES = ("fp8", "quantize", "quantization", "block-wise", "musubi", "low vram")
