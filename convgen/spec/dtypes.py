"""The element types that kernels are generated for: stated once, rendered everywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """An element type.

    ``name`` is the suffix of symbols and files, ``torch_name`` PyTorch's attribute; sums run in
    ``accumulator``, the name of another entry of :data:`DTYPES`.
    """

    name: str
    torch_name: str
    size_bytes: int
    accumulator: str


DTYPES: dict[str, DType] = {
    "f32": DType("f32", "float32", 4, "f32"),
    "f64": DType("f64", "float64", 8, "f64"),
    "f16": DType("f16", "float16", 2, "f32"),
    "bf16": DType("bf16", "bfloat16", 2, "f32"),
}

MODES: dict[str, DType] = {
    "tf32": DType("tf32", "float32", 4, "f32"),
    "tf32x3": DType("tf32x3", "float32", 4, "f32"),
    "f16tc": DType("f16tc", "float16", 2, "f32"),
    "bf16tc": DType("bf16tc", "bfloat16", 2, "f32"),
}
"""Tensor-core math modes: further units for tensors of a dtype, chosen at call time.

``tf32`` rounds float32 operands to TF32; ``tf32x3`` computes with float32 accuracy from three TF32
products; ``f16tc`` and ``bf16tc`` multiply 16-bit operands. All sum in float32.
"""

TENSOR_CORE_MODES = {"f32": ("tf32", "tf32x3"), "f16": ("f16tc",), "bf16": ("bf16tc",)}
"""The math modes of a dtype's tensors."""

KINDS: dict[str, DType] = DTYPES | MODES
"""All that a kernel may compute in: dtypes and math modes."""


def parse_dtype(name: str) -> str:
    """The canonical name of a dtype given by it or by PyTorch's (``float32``, ``half``, ...).

    Raises:
        ValueError: naming the dtypes that are known.
    """
    aliases = {"float": "f32", "double": "f64", "half": "f16"}
    aliases |= {dtype.torch_name: dtype.name for dtype in DTYPES.values()}
    canonical = aliases.get(name, name)
    if canonical not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known: choose from {', '.join(DTYPES)}")
    return canonical
