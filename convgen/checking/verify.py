"""Verifies a generated module against torch in float64 on the CPU.

Forward, the gradients of input, weight and bias, and second order (the gradient of a gradient), on
several shapes and in every dtype that the module was generated for: of random numbers, but also of
constants, of one sign, beside a large bias, widely spread, and beside NaN. Memory is poisoned with
NaN while the kernels run, so that an element that they forget cannot pass for a number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convgen.checking import nonfinite
from convgen.checking.cases import Case, cases, make_inputs
from convgen.checking.memory import poisoned_memory
from convgen.checking.nonfinite import first_order
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
    interpreted: bool = module._runtime.INTERPRETED
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
    exact = _reference(spec, case)
    reference = quantities(exact, _double(inputs))
    magnitude = quantities(exact, _magnitudes(inputs))
    if spec.activation:
        reference, magnitude = _with_activation(spec, exact, inputs)

    given = {name: _place(tensor, device, case.strided) for name, tensor in inputs.items()}
    run = _generated(module, spec, case)
    with poisoned_memory():
        first = quantities(run, given)
        second = quantities(run, given)

    errors = {
        name: _errors(first[name], expected, magnitude[name])
        for name, expected in reference.items()
    }
    if case.values == "large bias":
        doubles = _double(inputs)
        products = exact(doubles["input"], doubles["weight"])
        errors["forward"] = _errors_beside_bias(first["forward"], reference["forward"], products)
    same = {
        "same bits twice": all(_same_bits(first[name], second[name]) for name in first),
        "inputs unmodified": all(_same_bits(given[name], inputs[name]) for name in inputs),
    }
    errors |= {name: (0.0, 0.0) if agrees else (math.inf,) * 2 for name, agrees in same.items()}
    return _rows(module, case, device, kind, errors)


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
    run, reference = _generated(module, spec, case), _reference(spec, case)
    errors = {}
    for operand in nonfinite.OPERANDS:
        chosen = nonfinite.not_finite(operand, inputs, reference)
        must, may = nonfinite.reach(operand, chosen, inputs, reference)
        finite = inputs | {operand: inputs[operand].masked_fill(chosen, 0)}
        expected = first_order(reference, _double(finite))
        magnitude = first_order(reference, _magnitudes(finite))
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
                found.append(_errors(*both, magnitude[name]))
        errors[f"NaN in {operand}"] = (max(e for e, _ in found), max(w for _, w in found))
    return _rows(module, case, device, kind, errors)


def _rows(
    module: ModuleType,
    case: Case,
    device: torch.device,
    kind: str,
    errors: Mapping[str, tuple[float, float]],
) -> list[Row]:
    name = "cuda interpreted" if is_interpreted(module) else device.type
    return [
        Row(name, kind, str(case), quantity, error, worst, LIMITS[kind])
        for quantity, (error, worst) in errors.items()
    ]


def _dtype(kind: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES["f32" if kind == "tf32" else kind].torch_name)
    return dtype


def quantities(run: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Quantities:
    """Everything that is compared, from the inputs ``input``, ``weight``, maybe ``bias`` and
    ``residual``, and the directions ``grad``, ``u`` and ``v`` (of the shapes of output, input and
    weight).

    Second order is the gradient of ``<grad input, u> + <grad weight, v>``. All of it is sums of
    products, so that the inputs' magnitudes give the sums of magnitudes.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name not in ("u", "v"))
        for name, tensor in inputs.items()
    }
    names = [name for name in ("input", "weight", "bias", "residual") if name in leaves]
    output = run(**{name: leaves[name] for name in names})
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


def _generated(module: ModuleType, spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(module, spec.op)
    if not spec.transposed:
        return function
    return lambda *inputs, **others: function(*inputs, **others, output_padding=case.output_padding)


def _reference(spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    """torch's function for a specification, padded explicitly where before and after differ.

    Without an activation.
    """
    function: Callable[..., Tensor] = getattr(F, spec.op)
    arguments = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}

    def reference(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        # The bias comes last: torch may begin with it, and then rounds every product to its place.
        output = function(input, weight, **arguments)
        output = output if bias is None else output + bias.view(-1, *[1] * spec.ndim)
        return output if residual is None else output + residual

    if spec.transposed:
        arguments |= {"padding": spec.padding_begin, "output_padding": case.output_padding}
        return reference
    pads = [
        zeros
        for both in zip(reversed(spec.padding_begin), reversed(spec.padding_end), strict=True)
        for zeros in both
    ]
    return lambda input, *operands, **others: reference(F.pad(input, pads), *operands, **others)


def _with_activation(
    spec: ConvSpec, linear: Callable[..., Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Quantities, Quantities]:
    """Quantities of a layer with an activation, and what single elements are measured by.

    Derivatives are those at what goes into the activation, rounded to the tensors' dtype: at a
    kink, where that decides, torch's own have it rounded, too. An element may be off by some of the
    largest one, since no sum of magnitudes bounds what a curved function makes of a sum.
    """
    assert spec.epilogue
    activation = partial(eval, compile(spec.epilogue.forward("x"), "<activation>", "eval"))
    dtype = inputs["input"].dtype

    def run(rounds: bool, **operands: Tensor) -> Tensor:
        sums = linear(**operands)
        if rounds:
            sums = sums + (sums.to(dtype).double() - sums).detach()
        result: Tensor = activation({"torch": torch, "F": F, "x": sums})
        return result

    found = quantities(partial(run, True), _double(inputs))
    found["forward"] = quantities(partial(run, False), _double(inputs))["forward"]
    largest = {
        name: value.abs().max().expand_as(value) if value.numel() else value
        for name, value in found.items()
    }
    return found, largest


def _double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def _magnitudes(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.abs() for name, tensor in _double(inputs).items()}


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


def _errors_beside_bias(result: Tensor, expected: Tensor, products: Tensor) -> tuple[float, float]:
    """The same of sums of positive products and a bias that is large beside them: what the last
    rounding of the result may change is no error."""
    difference = (result.detach().cpu().double() - expected).abs()
    difference -= torch.finfo(result.dtype).eps * expected.abs()
    return _errors(products + difference.clamp_(min=0), products, products)


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
