"""What a layer is verified with: shapes, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convgen.spec import ConvSpec

CONSTANTS = {
    "input": 1.0,
    "weight": 0.1,
    "bias": 0.1,
    "grad": 0.3,
    "u": 0.7,
    "v": 1.1,
    "residual": 0.2,
}
"""Of the case with constant inputs: none but the first are multiples of a power of two."""

BIAS, PRODUCTS = 1000.0, 3e-5
"""Of the case with a large bias: its size, and the weights'. Products are less than half a unit in
the last place of such a bias in f32, and lost where they are added to it one by one."""

LONG_SUM, LONG_SUM_ON_CUDA = 4096, 512
"""Terms of a constant sum. Many CUDA kernels add up in one chain, as torch's do: such a sum loses
about 1e-8 per term."""

SPREAD = {torch.float16: 6}
"""Binary orders of magnitude of the case with widely spread ones, where not ``_SPREAD``."""

_SPREAD = 20


@dataclass(frozen=True)
class Case:
    """One call: shapes, and what is special about it."""

    batch: int | None
    """None for an unbatched input."""
    in_channels: int
    out_channels: int
    extents: tuple[int, ...]
    output_padding: tuple[int, ...]
    bias: bool = True
    strided: bool = False
    """Channels last, as permuted copies: what is not contiguous must not matter."""
    values: str = "normal"
    """``normal`` (random), ``constant``, ``one sign``, ``large bias``, ``widely spread``, or
    ``NaN``: normal, but for a few elements that are not finite (:mod:`convgen.checking.nonfinite`).
    """

    @property
    def input_shape(self) -> tuple[int, ...]:
        batch = () if self.batch is None else (self.batch,)
        return (*batch, self.in_channels, *self.extents)

    def __str__(self) -> str:
        text = f"{'x'.join(map(str, self.input_shape))} -> {self.out_channels}"
        notes = [
            *(["unbatched"] if self.batch is None else []),
            *([] if self.bias else ["no bias"]),
            *(["strided"] if self.strided else []),
            *([] if self.values == "normal" else [self.values]),
        ]
        return f"{text} ({', '.join(notes)})" if notes else text


def cases(spec: ConvSpec, quick: bool = False, on_cuda: bool = False) -> list[Case]:
    """What to verify: ragged in every dimension, and small enough for a few seconds."""
    narrow, wide = _channels(spec, 3, 5), _channels(spec, 17, 9)
    zero = (0,) * spec.ndim
    largest = tuple(max(s, d) - 1 for s, d in zip(spec.stride, spec.dilation, strict=True))
    largest = largest if spec.transposed else zero
    least = spec.least_extents
    ragged = _at_least(least, (3, 5, 9))
    row = _at_least(least, (1, 2, 37))
    small = _at_least(least, (2, 3, 5))
    terms = LONG_SUM_ON_CUDA if on_cuda else LONG_SUM
    long = _channels(spec, max(3, terms // spec.geometry.taps), 2)
    chosen = [
        Case(2, *narrow, ragged, spec.output_padding),
        Case(1, *wide, row, spec.output_padding, bias=False),
        Case(None, *narrow, _at_least(least, (2, 4, 6)), largest, strided=True),
        Case(1, *long, _at_least(least, (3, 3, 3)), zero, values="constant"),
        Case(2, *wide, _at_least(least, (3, 4, 7)), largest, values="NaN"),
    ]
    if not quick:
        chosen += [
            Case(2, *_channels(spec, 1, 1), least, zero),
            Case(3, *wide, _at_least(least, (2, 3, 4)), largest),
            Case(1, *narrow, _at_least(least, (5, 7, 18)), spec.output_padding, strided=True),
            Case(0, *narrow, ragged, spec.output_padding),
            Case(2, *narrow, _at_least(least, (4, 4, 7)), largest, values="NaN"),
            Case(2, *narrow, small, spec.output_padding, values="one sign"),
            Case(1, *narrow, small, spec.output_padding, values="large bias"),
            Case(2, *wide, small, spec.output_padding, values="widely spread"),
        ]
    return chosen


def output_extents(spec: ConvSpec, case: Case) -> tuple[int, ...]:
    """Spatial extents of a case's output."""
    extra = [c - s for c, s in zip(case.output_padding, spec.output_padding, strict=True)]
    return tuple(e + x for e, x in zip(spec.output_extents(case.extents), extra, strict=True))


def make_inputs(
    spec: ConvSpec, case: Case, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tensors on the CPU: operands, and directions to differentiate along."""
    in_channels, out_channels = case.in_channels, case.out_channels
    first, second = (in_channels, out_channels) if spec.transposed else (out_channels, in_channels)
    weight_shape = (first, second // spec.groups, *spec.kernel_size)
    batch = () if case.batch is None else (case.batch,)
    output_shape = (*batch, out_channels, *output_extents(spec, case))
    shapes = {
        "input": case.input_shape,
        "weight": weight_shape,
        **({"bias": (out_channels,)} if case.bias else {}),
        **({"residual": output_shape} if spec.residual else {}),
        "grad": output_shape,
        "u": case.input_shape,
        "v": weight_shape,
    }

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if case.values == "constant":
            values.fill_(CONSTANTS[name])
        elif case.values in ("one sign", "large bias"):
            values.abs_()
        elif case.values == "widely spread":
            orders = SPREAD.get(dtype, _SPREAD)
            values *= 2.0 ** -torch.randint(orders + 1, shape, generator=generator).double()
        if case.values == "large bias":
            values *= {"bias": BIAS, "weight": PRODUCTS}.get(name, 1.0)
        return values.to(dtype)

    return {name: make(name, shape) for name, shape in shapes.items()}


def _channels(spec: ConvSpec, per_group_in: int, per_group_out: int) -> tuple[int, int]:
    """Channels of a case: those of the specification, else so many per group (few, if many)."""
    if spec.groups > 8:
        per_group_in, per_group_out = 1, 1 + (per_group_out > 1) * (spec.groups <= 32)
    return (
        spec.in_channels or spec.groups * per_group_in,
        spec.out_channels or spec.groups * per_group_out,
    )


def _at_least(least: tuple[int, ...], wanted: Sequence[int]) -> tuple[int, ...]:
    """The last of ``wanted``, one per dimension, or more where that has no output."""
    return tuple(map(max, zip(least, wanted[-len(least) :], strict=True)))
