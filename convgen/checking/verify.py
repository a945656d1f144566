"""Verifies a generated module against torch in float64 on the CPU.

Forward, the gradients of input, weight and bias, and second order (the gradient of a gradient), on
several shapes and in every dtype that the module was generated for: of random numbers, but also of
constants, of one sign, beside a large bias, widely spread, and beside NaN. Memory is poisoned with
NaN while the kernels run, so that an element that they forget cannot pass for a number.

Errors have limits (:data:`LIMITS`); those of a layer with an activation may also be twice as large
as torch's own in the same case (:data:`BESIDE_TORCH`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convgen.checking import nonfinite
from convgen.checking.cases import Case, cases, make_inputs
from convgen.checking.memory import poisoned_memory
from convgen.checking.nonfinite import first_order
from convgen.checking.reference import (
    Errors,
    Reference,
    double,
    errors_between,
    linear,
    magnitudes,
    of_torch,
    quantities,
    worse,
)
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES, parse_dtype

LIMITS = {"f64": 1e-12, "f32": 1e-5, "tf32": 1e-3, "f16": 2e-3, "bf16": 1e-2}
"""Largest relative norm of an error. Sums run in fp32 or better, so f16 and bf16 are those of one
rounding of each result; the reference takes the rounded inputs. tf32 rounds each operand to 10
bits, which the reference does not."""

BESIDE_TORCH = 2
"""Behind an activation, an error beyond its limit may be so many times as large as torch's own.

Torch's is that of its convolution and its activation, one after another in the dtype on the same
inputs (:func:`convgen.checking.reference.of_torch`): derivatives may lose most of their digits
where an activation is nearly flat, whoever computes them. Where none are lost, torch's error is
small, and a wrong formula, sign or operand is far beyond it.
"""

_WORST = 2
"""A single element may be off by so many limits, measured by its sum of magnitudes."""


class VerificationError(RuntimeError):
    """Nothing could be verified; the message says what is missing."""


@dataclass(frozen=True)
class Row:
    """One quantity in one case.

    ``error`` is ``||out - ref|| / ||ref||`` and ``worst`` the largest ``|out - ref|`` of an
    element against the sum of magnitudes behind it, ``sum |x| |w|``, or of a layer with an
    activation against the largest element; both against float64. Both are infinite where bits had
    to agree and do not.
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
    """That of the dtype in :data:`LIMITS`, or more beside torch (:data:`BESIDE_TORCH`)."""

    @property
    def ok(self) -> bool:
        return _within((self.error, self.worst), self.limit)

    @property
    def beside_torch(self) -> bool:
        """Whether the limit was had from torch's own error."""
        return self.limit != LIMITS[self.dtype]


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found: one row for each case, dtype and quantity."""

    name: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)


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
    on_cuda = where.type == "cuda" or is_interpreted(module)
    for kind in _kinds(module, on_cuda, chosen):
        generator = torch.Generator().manual_seed(seed)
        with allowing_tf32(kind == "tf32"):
            for case in cases(spec, quick, on_cuda):
                if case.values == "NaN" and spec.activation:
                    continue  # of which an activation may make numbers
                verify_case = _verify_nonfinite if case.values == "NaN" else _verify_case
                rows += verify_case(module, spec, case, where, kind, generator)
    return Report(spec.name, rows)


def _kinds(module: ModuleType, on_cuda: bool, dtypes: Iterable[str]) -> list[str]:
    """The dtypes, and tf32 beside f32 where the module has tensor-core kernels for it."""
    modes = getattr(module._runtime, "MATH_MODES", ())
    kinds = list(dtypes)
    if "f32" in kinds and "tf32" in modes and on_cuda:
        kinds.insert(kinds.index("f32") + 1, "tf32")
    return kinds


def is_interpreted(module: ModuleType) -> bool:
    """Whether a module was imported with ``CONVGEN_INTERPRET`` set: see docs/interpreter.md."""
    interpreted: bool = module._library.INTERPRETED
    return interpreted


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
    inputs = make_inputs(spec, case, _dtype(kind), generator)
    given = {name: _place(tensor, device, case.strided) for name, tensor in inputs.items()}
    run = _generated(module, spec, case)
    with poisoned_memory():
        first = quantities(run, given)
        second = quantities(run, given)
        # Derivatives that nobody records may be computed otherwise. Of layers without an activation
        # the cases with NaN are after those.
        alone = first | (quantities(run, given, second_order=False) if spec.activation else {})

    reference = Reference.of(spec, case, inputs)
    errors = worse(reference.errors(first), reference.errors(alone))
    limits = dict.fromkeys(errors, LIMITS[kind])
    if spec.activation and not all(_within(each, LIMITS[kind]) for each in errors.values()):
        theirs, of_theirs = of_torch(spec, case, inputs, reference, tf32=kind == "tf32")
        # What torch cannot compute of these inputs, for numbers that are too large, is not judged.
        judged = [reference.where_finite(theirs, each) for each in (first, alone)]
        errors = worse(*map(reference.errors, judged))
        limits = {
            name: limit if _within(errors[name], limit) else _beside(of_theirs[name], limit)
            for name, limit in limits.items()
        }
    same = {
        "same bits twice": all(_same_bits(first[name], second[name]) for name in first),
        "inputs unmodified": all(_same_bits(given[name], inputs[name]) for name in inputs),
    }
    errors |= {name: (0.0, 0.0) if agrees else (math.inf,) * 2 for name, agrees in same.items()}
    return _rows(module, case, device, kind, errors, limits)


def _verify_nonfinite(
    module: ModuleType,
    spec: ConvSpec,
    case: Case,
    device: torch.device,
    kind: str,
    generator: torch.Generator,
) -> list[Row]:
    """What is not finite in one operand comes out where that is read, and nowhere else."""
    inputs = make_inputs(spec, case, _dtype(kind), generator)
    run, reference = _generated(module, spec, case), linear(spec, case)
    errors = {}
    for operand in nonfinite.OPERANDS:
        chosen = nonfinite.not_finite(operand, inputs, reference)
        must, may = nonfinite.reach(operand, chosen, inputs, reference)
        finite = inputs | {operand: inputs[operand].masked_fill(chosen, 0)}
        expected = first_order(reference, double(finite))
        magnitude = first_order(reference, magnitudes(finite))
        given = inputs | {operand: nonfinite.filled(inputs[operand], chosen)}
        with poisoned_memory():
            results = first_order(run, {k: _place(t, device, False) for k, t in given.items()})
        found = []
        for name, result in results.items():
            if result.shape != expected[name].shape or nonfinite.spreads(
                result, must[name], may[name]
            ):
                found.append((math.inf, math.inf))
            else:
                both = nonfinite.others(result, may[name], expected[name])
                found.append(errors_between(*both, magnitude[name]))
        errors[f"NaN in {operand}"] = (max(e for e, _ in found), max(w for _, w in found))
    return _rows(module, case, device, kind, errors)


def _rows(
    module: ModuleType,
    case: Case,
    device: torch.device,
    kind: str,
    errors: Mapping[str, Errors],
    limits: Mapping[str, float] | None = None,
) -> list[Row]:
    name = "cuda interpreted" if is_interpreted(module) else device.type
    limits = limits or {}
    return [
        Row(name, kind, str(case), quantity, error, worst, limits.get(quantity, LIMITS[kind]))
        for quantity, (error, worst) in errors.items()
    ]


def _dtype(kind: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES["f32" if kind == "tf32" else kind].torch_name)
    return dtype


def _generated(module: ModuleType, spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(module, spec.op)
    if not spec.transposed:
        return function
    return lambda *inputs, **others: function(*inputs, **others, output_padding=case.output_padding)


def _place(tensor: Tensor, device: torch.device, strided: bool) -> Tensor:
    """A copy on the device; with the last dimension outermost in memory if ``strided``."""
    copy = tensor.detach().clone().to(device)
    return copy.movedim(-1, 0).contiguous().movedim(0, -1) if strided else copy


def _beside(errors: Errors, limit: float) -> float:
    """The limit of a quantity of which torch has such errors."""
    return max(limit, BESIDE_TORCH * max(errors[0], errors[1] / _WORST))


def _within(errors: Errors, limit: float) -> bool:
    """Whether an error in norm and that of the worst element are within a limit; NaN is not."""
    return errors[0] <= limit and errors[1] <= _WORST * limit


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
