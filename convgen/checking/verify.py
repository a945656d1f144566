"""Verifies a generated module against torch in float64 on the CPU.

Forward, the gradients of input, weight and bias, and second order (the gradient of a gradient), on
several shapes and in every dtype that the module was generated for. Memory is poisoned with NaN
while the kernels run, so that an element that they forget cannot pass for a number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convgen.checking.memory import poisoned_memory
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES, parse_dtype

LIMITS = {"f64": 1e-12, "f32": 1e-5, "tf32": 1e-3, "f16": 2e-3, "bf16": 1e-2}
"""Largest relative norm of an error. Sums run in fp32 or better, so f16 and bf16 are those of one
rounding of each result; the reference takes the rounded inputs. tf32 rounds each operand to 10
bits, which the reference does not."""

_WORST = 2
"""A single element may be off by so many limits, measured by its sum of magnitudes."""

Quantities = dict[str, Tensor]


class VerificationError(RuntimeError):
    """Nothing could be verified; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One quantity in one case.

    ``error`` is ``||out - ref|| / ||ref||`` and ``worst`` the largest ``|out - ref|`` of an
    element against the sum of magnitudes behind it, ``sum |x| |w|``; both against float64. Both
    are infinite where bits had to agree and do not.
    """

    device: str
    """``cpu`` or ``cuda``, or ``cuda interpreted`` for CUDA kernels that ran on the CPU."""
    dtype: str
    """A key of ``spec.dtypes.DTYPES``; ``tf32`` for f32 where torch's switch allows TF32."""
    shapes: str
    """Shape of the input, and what is special about the case."""
    quantity: str
    error: float
    worst: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and self.worst <= _WORST * self.limit


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found: one row for each case, dtype and quantity."""

    name: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)


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
        ]
        return f"{text} ({', '.join(notes)})" if notes else text


def verify(
    module: ModuleType,
    *,
    device: torch.device | str | None = None,
    dtypes: Iterable[str] | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Report:
    """Runs a generated module and compares it with torch in float64 on the CPU.

    Args:
        module: a package that convgen generated, imported.
        device: where to run; by default a GPU if there is one that the module was compiled for,
            else the CPU.
        dtypes: names such as ``"f32"`` or ``"float32"``; by default all that the module has.
        quick: fewer shapes.
        seed: of the random inputs.

    Raises:
        VerificationError: if the module has no kernels for the device or for a dtype.
        ValueError: if a dtype is not known.
    """
    spec = ConvSpec.from_dict(module.SPEC)
    where = _device(module, device)
    generated = tuple(module.BACKENDS[where.type].values())
    chosen = generated if dtypes is None else tuple(map(parse_dtype, dtypes))
    if missing := [name for name in chosen if name not in generated]:
        raise VerificationError(
            f"{spec.name} has no {', '.join(missing)} kernels for {where.type}, "
            f"only {', '.join(generated)}"
        )
    rows: list[Row] = []
    for kind in _kinds(module, where, chosen):
        generator = torch.Generator().manual_seed(seed)
        with allowing_tf32(kind == "tf32"):
            for case in cases(spec, quick):
                rows += _verify_case(module, spec, case, where, kind, generator)
    return Report(spec.name, rows)


def _kinds(module: ModuleType, device: torch.device, dtypes: Iterable[str]) -> list[str]:
    """The dtypes, and tf32 beside f32 where the module has tensor-core kernels for it."""
    modes = getattr(module._runtime, "MATH_MODES", ())
    on_cuda = device.type == "cuda" or is_interpreted(module)
    kinds = list(dtypes)
    if "f32" in kinds and "tf32" in modes and on_cuda:
        kinds.insert(kinds.index("f32") + 1, "tf32")
    return kinds


def is_interpreted(module: ModuleType) -> bool:
    """Whether a module was imported with ``CONVGEN_INTERPRET`` set: see docs/interpreter.md."""
    interpreted: bool = module._runtime.INTERPRETED
    return interpreted


def cases(spec: ConvSpec, quick: bool = False) -> list[Case]:
    """The shapes to verify: ragged in every dimension, and small enough for a few seconds."""
    narrow, wide = _channels(spec, 3, 5), _channels(spec, 17, 9)
    zero = (0,) * spec.ndim
    largest = tuple(max(s, d) - 1 for s, d in zip(spec.stride, spec.dilation, strict=True))
    largest = largest if spec.transposed else zero
    least = spec.least_extents
    ragged = _at_least(least, (3, 5, 9))
    row = _at_least(least, (1, 2, 37))
    chosen = [
        Case(2, *narrow, ragged, spec.output_padding),
        Case(1, *wide, row, spec.output_padding, bias=False),
        Case(None, *narrow, _at_least(least, (2, 4, 6)), largest, strided=True),
    ]
    if not quick:
        chosen += [
            Case(2, *_channels(spec, 1, 1), least, zero),
            Case(3, *wide, _at_least(least, (2, 3, 4)), largest),
            Case(1, *narrow, _at_least(least, (5, 7, 18)), spec.output_padding, strided=True),
            Case(0, *narrow, ragged, spec.output_padding),
        ]
    return chosen


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


def _device(module: ModuleType, device: torch.device | str | None) -> torch.device:
    backends: Mapping[str, object] = module.BACKENDS
    assert module.__file__ is not None
    compiled = [
        name for name in backends if (Path(module.__file__).parent / f"lib/{name}.so").exists()
    ]
    if is_interpreted(module):
        compiled = ["cpu"]  # when the first tensor comes, and from the CUDA sources
    if device is None:
        device = "cuda" if "cuda" in compiled and torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type not in compiled:
        raise VerificationError(
            f"{module.SPEC['op']} is compiled for {' and '.join(compiled) or 'nothing'}, "
            f"not for {where.type}"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise VerificationError("there is no GPU to run on")
    return where


def _verify_case(
    module: ModuleType,
    spec: ConvSpec,
    case: Case,
    device: torch.device,
    kind: str,
    generator: torch.Generator,
) -> list[Row]:
    dtype = getattr(torch, DTYPES["f32" if kind == "tf32" else kind].torch_name)
    inputs = _inputs(spec, case, dtype, generator)
    reference = quantities(_reference(spec, case), _double(inputs))
    magnitude = quantities(_reference(spec, case), {k: v.abs() for k, v in _double(inputs).items()})

    given = {name: _place(tensor, device, case.strided) for name, tensor in inputs.items()}
    run = _generated(module, spec, case)
    with poisoned_memory():
        first = quantities(run, given)
        second = quantities(run, given)

    limit = LIMITS[kind]
    name_of_device = "cuda interpreted" if is_interpreted(module) else device.type
    rows = []
    for name, expected in reference.items():
        error, worst = _errors(first[name], expected, magnitude[name])
        rows.append(Row(name_of_device, kind, str(case), name, error, worst, limit))
    exact = {
        "same bits twice": all(_same_bits(first[name], second[name]) for name in first),
        "inputs unmodified": all(_same_bits(given[name], inputs[name]) for name in inputs),
    }
    for name, agrees in exact.items():
        error = 0.0 if agrees else math.inf
        rows.append(Row(name_of_device, kind, str(case), name, error, error, limit))
    return rows


def quantities(run: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Quantities:
    """Everything that is compared, from the inputs ``input``, ``weight``, maybe ``bias``, and the
    directions ``grad``, ``u`` and ``v`` (of the shapes of output, input and weight).

    Second order is the gradient of ``<grad input, u> + <grad weight, v>``. All of it is sums of
    products, so that the inputs' magnitudes give the sums of magnitudes.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name not in ("u", "v"))
        for name, tensor in inputs.items()
    }
    names = [name for name in ("input", "weight", "bias") if name in leaves]
    output = run(*(leaves[name] for name in names))
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], leaves["grad"], create_graph=True
    )
    scalar = (gradients[0] * leaves["u"]).sum() + (gradients[1] * leaves["v"]).sum()
    again = ("input", "weight", "grad")
    # torch returns plain zeros for an empty batch, without a graph behind them.
    second = torch.autograd.grad(scalar, [leaves[name] for name in again], materialize_grads=True)
    return {
        "forward": output.detach(),
        **{f"grad {n}": g.detach() for n, g in zip(names, gradients, strict=True)},
        **{f"grad grad {n}": g for n, g in zip(again, second, strict=True)},
    }


def _inputs(
    spec: ConvSpec, case: Case, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Normal random tensors on the CPU: operands, and directions to differentiate along."""
    in_channels, out_channels = case.in_channels, case.out_channels
    first, second = (in_channels, out_channels) if spec.transposed else (out_channels, in_channels)
    weight_shape = (first, second // spec.groups, *spec.kernel_size)
    batch = () if case.batch is None else (case.batch,)
    output_shape = (*batch, out_channels, *output_extents(spec, case))
    shapes = {
        "input": case.input_shape,
        "weight": weight_shape,
        **({"bias": (out_channels,)} if case.bias else {}),
        "grad": output_shape,
        "u": case.input_shape,
        "v": weight_shape,
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def output_extents(spec: ConvSpec, case: Case) -> tuple[int, ...]:
    """Spatial extents of a case's output."""
    extra = [c - s for c, s in zip(case.output_padding, spec.output_padding, strict=True)]
    return tuple(e + x for e, x in zip(spec.output_extents(case.extents), extra, strict=True))


def _generated(module: ModuleType, spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(module, spec.op)
    if not spec.transposed:
        return function
    return lambda input, weight, bias=None: function(
        input, weight, bias, output_padding=case.output_padding
    )


def _reference(spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    """torch's function for a specification, padded explicitly where before and after differ."""
    function: Callable[..., Tensor] = getattr(F, spec.op)
    arguments = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    if spec.transposed:
        arguments |= {"padding": spec.padding_begin, "output_padding": case.output_padding}
        return lambda *operands: function(*operands, **arguments)
    pads = [
        zeros
        for both in zip(reversed(spec.padding_begin), reversed(spec.padding_end), strict=True)
        for zeros in both
    ]
    return lambda input, *operands: function(F.pad(input, pads), *operands, **arguments)


def _double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def _place(tensor: Tensor, device: torch.device, strided: bool) -> Tensor:
    """A copy on the device; with the last dimension outermost in memory if ``strided``."""
    copy = tensor.detach().clone().to(device)
    return copy.movedim(-1, 0).contiguous().movedim(0, -1) if strided else copy


def _errors(result: Tensor, expected: Tensor, magnitude: Tensor) -> tuple[float, float]:
    """Relative norm of the error, and the worst element against its sum of magnitudes."""
    if result.shape != expected.shape:
        return math.inf, math.inf
    difference = result.detach().cpu().double() - expected
    norm = expected.norm().item()
    off = difference.norm().item()
    # Where nothing is summed, 0 / 0 elements are exact and anything else is infinitely wrong.
    worst = torch.where(difference == 0, 0.0, difference.abs() / magnitude)
    largest = worst.max().item() if worst.numel() else 0.0
    if off == 0:
        return 0.0, largest
    return (off / norm if norm else math.inf), (math.inf if math.isnan(largest) else largest)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes and bits (NaN equals itself), wherever the tensors lie."""
    first, second = (t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and torch.equal(first, second)


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Sets torch's switch for TF32 in convolutions, which generated modules follow."""
    cudnn: Any = torch.backends.cudnn
    switch = cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
