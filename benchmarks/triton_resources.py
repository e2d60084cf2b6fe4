"""What Triton kernels take on each GPU: registers, shared memory, spills.

::

    python -m benchmarks.triton_resources [--targets sm90 gfx942] [--kernels decode]

Every kernel is compiled in its main specialisations for every target. That needs no
GPU; Triton has the compilers of both vendors with it.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Name to backend, architecture, and threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm{sm}": ("cuda", sm, 32) for sm in (75, 80, 86, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}


class Case(NamedTuple):
    """A specialisation of a kernel.

    Attributes:
        name: of the kernel and what is special.
        kernel: the function.
        arguments: types such as ``*i8`` and ``i32``; anything else is a constant.
        options: ``num_warps`` and the like.
        without: targets on which it is not used.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    without: tuple[str, ...] = ()


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        spills: instructions that move registers to memory and back; of AMD, bytes.
        text: assembly, PTX or that of AMD.
    """

    registers: int
    shared: int
    spills: int
    text: str


def compile_case(case: Case, target: str) -> Resources:
    """Compile a kernel for a GPU that need not be there.

    Args:
        case: what to compile.
        target: a name in `TARGETS`.

    Returns:
        Its resources, and its assembly: PTX, or that of AMD.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = case.arguments[name]
        if isinstance(value, str) and re.fullmatch(r"\*?(u|i|fp|bf)\d+", value):
            signature[name] = value
            if value.startswith("*") or name.isupper() or name.endswith(("_n", "_m")):
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options=dict(case.options)
    )
    if TARGETS[target][0] == "cuda":
        registers, spills = _read_cubin(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        spills += _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return Resources(registers, compiled.metadata.shared, spills, text)


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and instructions that use its own memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        spills = 0
        # a stack alone may be a matter of calls
        if _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage):
            spills = len(re.findall(r"\b(?:STL|LDL)\b", _cuobjdump("-sass", file.name)))
    return _number(r"REG:(\d+)", usage), spills


def _cuobjdump(*arguments: str) -> str:
    import triton

    program = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern}: not in the compiler's output")
    return int(found[1])


# -- the kernels -----------------------------------------------------------------------

_WEIGHT = {
    **{"codes": "*i8", "scale": "*fp32", "factor": None, "table": None},
    **{"K": "i32", "R": "i32", "C": "i32"},
    **{"codes_n": "i32", "codes_k": 1, "scale_n": "i32", "scale_k": 1},
    **{"CODE": "e4m3", "SCALE": "float", "HIGH_FIRST": False},
}
_NVIDIA = tuple(name for name, target in TARGETS.items() if target[0] == "cuda")
_AMD = tuple(name for name in TARGETS if name not in _NVIDIA)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Targets where Triton multiplies matrices without matrix units.
_WITHOUT_MATRIX_UNITS = ("sm75",)
#: What is special of weights of some formats.
_FORMATS: dict[str, dict[str, Any]] = {
    "e4m3 1x64": {"SPAN": 64},
    "e5m2 1x32 e8m0": {"CODE": "e5m2", "scale": "*i8", "SCALE": "e8m0", "SPAN": 32},
    "int8 rows": {"CODE": "int8", "SPAN": 64},
    "int8 odd blocks": {"CODE": "int8", "SPAN": 1},
    "nvfp4": {
        **{"codes": "*u8", "scale": "*i8", "factor": "*fp32", "table": "*fp32"},
        **{"CODE": "e2m1", "SCALE": "e4m3", "SPAN": 16},
    },
    "nf4": {
        **{"codes": "*u8", "table": "*fp32", "CODE": "table", "HIGH_FIRST": True},
        **{"SPAN": 64},
    },
}


def _dtypes(name: str) -> tuple[str, ...]:
    """Dtypes of the dense weight that are worth a case: all for one format."""
    return ("bf16", "fp16", "fp32") if name == "e4m3 1x64" else ("bf16",)


def cases() -> Iterator[Case]:
    """Every kernel in its main specialisations."""
    yield from _decode_cases()
    yield from _gemv_cases()
    yield from _gemm_cases()
    yield from _input_cases()
    yield from _quantize_cases()


def _decode_cases() -> Iterator[Case]:
    from schemes._kernels.triton import _decode as decode

    for name, weight in _FORMATS.items():
        for dtype in _dtypes(name):
            own = {
                **{"out": f"*{dtype}", "out_n": "i32", "out_k": 1},
                **{"first": "i32", "end": "i32"},
                "SPANS": decode.COLUMNS // weight["SPAN"],
                "ROWS": decode.ELEMENTS // decode.COLUMNS,
            }
            arguments = {**_WEIGHT, **weight, **own}
            yield Case(f"decode {name} {dtype}", decode.decode_kernel, arguments, {})


def _gemv_cases() -> Iterator[Case]:
    from schemes._kernels.triton import gemv

    for name, weight in _FORMATS.items():
        span = min(weight["SPAN"], gemv.SPAN)
        for inputs in (1, 4):
            for dtype in _dtypes(name) if inputs == 1 else ("bf16",):
                own = {
                    **{"out": f"*{dtype}", "x": f"*{dtype}", "bias": f"*{dtype}"},
                    **{"N": "i32", "x_m": "i32", "x_k": 1, "INPUTS": inputs},
                    **{"SPANS": gemv.MIN_COLUMNS // span, "SPAN": span},
                }
                arguments = {**_WEIGHT, **weight, **own}
                title = f"gemv {inputs} {name} {dtype}"
                warps = gemv.MIN_COLUMNS // gemv.WARP_COLUMNS
                options = {"num_warps": warps}
                yield Case(title, gemv.gemv_kernel, arguments, options)


def _gemm_cases() -> Iterator[Case]:
    from schemes._kernels.triton import gemm

    for name, weight in _FORMATS.items():
        if weight["SPAN"] < gemm.MIN_SPAN:
            continue
        for inputs, dtype, parts in ((16, "bf16", 4), (64, "fp16", 1)):
            if inputs == 64 and name not in ("e4m3 1x64", "nf4"):
                continue
            own = {
                **{"out": f"*{dtype}", "x": f"*{dtype}", "bias": f"*{dtype}"},
                "parts": "*fp32" if parts > 1 else None,
                "arrived": "*i32" if parts > 1 else None,
                **{"M": "i32", "N": "i32", "x_m": "i32", "x_k": 1},
                **{"PARTS": parts, "INPUTS": inputs, "ROWS": gemm.ROWS},
                "SPANS": gemm.COLUMNS // weight["SPAN"],
            }
            arguments = {**_WEIGHT, **weight, **own}
            title = f"gemm {inputs} {name} {dtype}"
            yield Case(title, gemm.gemm_kernel, arguments, {}, _WITHOUT_MATRIX_UNITS)


def _input_cases() -> Iterator[Case]:
    from schemes._kernels.triton import inputs, rotate

    for dtype in ("bf16", "fp32"):
        x = {"x": f"*{dtype}", "M": "i32", "K": "i32", "x_m": "i32", "x_k": 1}
        codes = {"codes": "*i8", "scales": "*fp32", "CODE": "int8", "LARGEST": 127.0}
        for group in (64, 256):
            turn = {**x, "GROUP": group, "ROOT": math.isqrt(group)}
            how = rotate.rotation_options(_DTYPES[dtype])
            arguments = {**turn, "out": f"*{dtype}", "REPEATS": rotate.REPEATS}
            name = f"rotate {group} {dtype}"
            yield _rotation_case(name, rotate.rotate_kernel, arguments, how)
        kernel, arguments = inputs.rotated_tokens_kernel, {**turn, **codes}
        arguments["rows"] = "i32"
        for maker, others in (("nvidia", _AMD), ("amd", _NVIDIA)):
            how = inputs.rotated_options(_DTYPES[dtype], maker == "amd")
            name = f"rotated tokens int8 {dtype} {maker}"
            case = _rotation_case(name, kernel, arguments, how)
            yield case._replace(without=(*case.without, *others))
        for code, largest in (("int8", 127.0), ("e4m3", 448.0)):
            arguments = {**x, **codes, "CODE": code, "LARGEST": largest}
            arguments["BLOCK"] = inputs.BLOCK
            yield Case(f"tokens {code} {dtype}", inputs.tokens_kernel, arguments, {})
        for span, powers in ((128, False), (32, True)):
            arguments = {
                **{**x, **codes, "CODE": "e4m3", "LARGEST": 448.0},
                **{"scales": "*i8" if powers else "*fp32", "POWERS": powers},
                **{"rows": "i32", "wide": "i32", "ROWS": 8, "SPAN": span},
                "SPANS": 512 // span,
            }
            yield Case(f"groups {span} {dtype}", inputs.groups_kernel, arguments, {})
        arguments = {
            **{"out": f"*{dtype}", "product": "*i32", "bias": f"*{dtype}"},
            **{"token_scale": "*fp32", "weight_scale": "*fp32"},
            **{"M": "i32", "N": "i32", "product_m": "i32", "weight_n": 1},
            **{"ROWS": inputs.OUTPUT_ROWS, "COLUMNS": inputs.OUTPUT_COLUMNS},
        }
        kernel, options = inputs.int8_output_kernel, {"enable_fp_fusion": False}
        yield Case(f"output {dtype}", kernel, arguments, options)


def _rotation_case(
    name: str, kernel: Any, arguments: Mapping[str, Any], how: Mapping[str, int]
) -> Case:
    """A kernel that rotates, with the options that it is started with."""
    options = {name: value for name, value in how.items() if name != "ROWS"}
    arguments = {**arguments, "ROWS": how["ROWS"]}
    return Case(name, kernel, arguments, options, _WITHOUT_MATRIX_UNITS)


def _quantize_cases() -> Iterator[Case]:
    from schemes._kernels.triton import quantize

    weight = {
        **{"weight": "*bf16", "weight_n": "i32", "weight_k": 1},
        **{"N": "i32", "K": "i32", "R": "i32", "C": "i32", "wide": "i32"},
    }
    codes = {
        **{"codes": "*i8", "scale": "*fp32", "damaged": "*i32", "CODE": "e4m3"},
        **{"least": "fp32", "most": "fp32", "LARGEST": 448.0, "POWERS": False},
    }
    powers = {"scale": "*i8", "POWERS": True}
    for name, special, blocks, warps in (
        ("1x64", {}, (16, 4, 1, 64), 4),
        ("1x64 e5m2 bf16", {"CODE": "e5m2", "scale": "*bf16"}, (16, 4, 1, 64), 4),
        ("1x32 e8m0", powers, (16, 8, 1, 32), 4),
        ("128x128", {}, (1, 1, 128, 128), 16),
        ("1x16384", {}, (1, 1, 1, 16384), 16),
    ):
        names = ("BLOCKS_DOWN", "BLOCKS_ACROSS", "ROWS", "COLUMNS")
        shape = dict(zip(names, blocks, strict=True))
        arguments = {**weight, **codes, **special, **shape, "high": "i32"}
        kernel, options = quantize.blocks_kernel, {"num_warps": warps}
        yield Case(f"quantize {name}", kernel, arguments, options)
    part = {"ROWS": quantize.PART_ROWS, "COLUMNS": quantize.PART_COLUMNS}
    arguments = {**weight, **codes, **part, "sizes": "*i32"}
    yield Case("quantize sizes", quantize.sizes_kernel, arguments, {})
    yield Case("quantize parts", quantize.parts_kernel, arguments, {})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--kernels", nargs="*", default=[""], help="starts of names")
    options = parser.parse_args()
    print("registers of a thread / shared bytes of a program / spills")
    print()
    print("| kernel |", *(f"{target} |" for target in options.targets))
    print("|---|" + "---:|" * len(options.targets))
    for case in cases():
        if case.name.startswith(tuple(options.kernels)):
            cells = [_cell(case, target) for target in options.targets]
            print(f"| {case.name} |", *(f"{cell} |" for cell in cells), flush=True)


def _cell(case: Case, target: str) -> str:
    if target in case.without:
        return "not used"
    return " / ".join(map(str, compile_case(case, target)[:3]))


if __name__ == "__main__":
    main()
