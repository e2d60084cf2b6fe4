"""Codes and scales as float32, and float32 as FP8 codes, by integer arithmetic.

No FP8 type of Triton appears, so that everything builds for GPUs without FP8, where
Triton refuses those types. Codes come as int8 or uint8, which is how their bytes are.

The bits of an FP8 number, shifted, are those of a float32 number with another bias ::

    e4m3       s eeee mmm             (-1)^s * 2^(e-7)   * 1.mmm
    float32    s 0000eeee mmm000...   (-1)^s * 2^(e-127) * 1.mmm

so a shift, a mask and a multiplication by 2^(127-7) decode it. The product is exact,
for subnormal codes as well: Triton flushes no subnormal number unless it is told to.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(code, table, CODE: tl.constexpr):
    """The numbers that codes stand for.

    Args:
        code: int32, the sign-extended byte, or 0 to 15 for codes of four bits.
        table: pointer to 16 float32, used if ``CODE`` is "table".
        CODE: "e4m3", "e5m2", "int8", "e2m1" or "table".

    Returns:
        float32 of the same shape, exact; NaN of codes that are no finite numbers.
    """
    if CODE == "e4m3":  # shifted by 20 bits: 2**(127-7)
        bits = (code << 20) & -2014314496
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    elif CODE == "e5m2":  # shifted by 21 bits: 2**(127-15)
        bits = (code << 21) & -1880096768
        value = bits.to(tl.float32, bitcast=True) * 5.192296858534828e33
        return tl.where((code & 0x7F) >= 0x7C, float("nan"), value)
    elif CODE == "int8":
        # the last bits of 2**23 + 128 + code; faster than a conversion
        bits = (code & 0xFF) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    elif CODE == "e2m1":  # shifted by 22 bits: 2**(127-1)
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return tl.load(table + code)


@triton.jit
def scale_number(scale, SCALE: tl.constexpr):
    """Scales as float32, exact.

    Args:
        scale: float32, bfloat16 or float16; int8 bytes if ``SCALE`` names an FP8 type.
        SCALE: "float", "e4m3" or "e8m0".
    """
    if SCALE == "e4m3":
        return number(scale.to(tl.int32), scale, "e4m3")
    elif SCALE == "e8m0":
        exponent = scale.to(tl.int32) & 0xFF
        # 2**-127, of exponent 0, is subnormal
        bits = tl.where(exponent == 0, 0x400000, exponent << 23)
        return bits.to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def nearest_integer(x):
    """int32 nearest to float32 below 2**22 in size; half to even."""
    # 1.5 * 2**23: the spacing of numbers there is 1
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def fp8_code(x, CODE: tl.constexpr):
    """Round float32 to FP8: to nearest even, and to the largest number beyond it.

    Args:
        x: float32, no NaN.
        CODE: "e4m3" or "e5m2".

    Returns:
        int8 of the same shape, the bits of the FP8 numbers.
    """
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.abs(x)
    if CODE == "e4m3":
        size = tl.minimum(size, 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # the spacing of numbers at 2**14 is that of subnormal codes, 2**-9
        subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(bits < (121 << 23), subnormal, normal)
    else:
        size = tl.minimum(size, 57344.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - (112 << 2)
        # the spacing of numbers at 2**7 is 2**-16
        subnormal = (size + 128.0).to(tl.int32, bitcast=True) - 0x43000000
        code = tl.where(bits < (113 << 23), subnormal, normal)
    return (code | sign).to(tl.int8)


@triton.jit
def power_code(x):
    """The next power of two up as an E8M0 code in int32; 0, for 2**-127, of 0.

    Args:
        x: float32, finite and not negative.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    fraction = bits & 0x7FFFFF
    # below 2**-126 numbers are subnormal, and 2**-127 has the first bit alone
    code = tl.where(exponent == 0, fraction > 0x400000, exponent + (fraction != 0))
    return tl.minimum(code.to(tl.int32), 254)


@triton.jit
def power_inverse(code):
    """One over the power of two that an E8M0 code in int32, up to 254, stands for.

    A product with it is the exact quotient; Triton before 3.7 divides by 2**-127, which
    is subnormal, as by zero.
    """
    bits = tl.where(code == 254, 0x400000, (254 - code) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_value(x):
    """Round float32 to the nearest bfloat16, half to even; still float32.

    A GPU does that when it converts; Triton's interpreter truncates.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)
