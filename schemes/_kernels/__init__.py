"""Kernels: products with a quantized weight, as functions of tensors.

Each file or folder computes the same in another way: `torch_eager` with torch's own
operations, `cpu` compiled by LLVM, `triton` and `inductor` on GPUs, `scaled_mm` and
`int_mm` on matrix units of few bits. None of them knows schemes, modules or hosts; what
a scheme hands them is a `BlockScaled`.
"""
