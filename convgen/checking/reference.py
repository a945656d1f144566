"""What layers compute in float64, how far results are from that, and how far torch's own are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convgen.checking import activations
from convgen.checking.cases import Case
from convgen.spec import ConvSpec

OPERANDS = ("input", "weight", "bias", "residual")

Quantities = dict[str, Tensor]

Errors = tuple[float, float]
"""``||out - ref|| / ||ref||``, and the largest ``|out - ref|`` of an element against its magnitude.
Either is infinite or NaN where that can be no number."""

_DRAWS = 8
"""Of inputs near a case's for which torch's error is measured, too."""


def quantities(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], second_order: bool = True
) -> Quantities:
    """Everything that is compared, from the inputs ``input``, ``weight``, maybe ``bias`` and
    ``residual``, and the directions ``grad``, ``u`` and ``v`` (of the shapes of output, input and
    weight).

    Second order is the gradient of ``<grad input, u> + <grad weight, v>``; without it, derivatives
    are not recorded, as in training. But for an activation, all of it is sums of products, so that
    the inputs' magnitudes give the sums of magnitudes.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name not in ("u", "v"))
        for name, tensor in inputs.items()
    }
    names = [name for name in OPERANDS if name in leaves]
    output = run(**{name: leaves[name] for name in names})
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], leaves["grad"], create_graph=second_order
    )
    found = {
        "forward": output.detach(),
        **{f"grad {n}": g.detach() for n, g in zip(names, gradients, strict=True)},
    }
    if not second_order:
        return found
    scalar = (gradients[0] * leaves["u"]).sum() + (gradients[1] * leaves["v"]).sum()
    again = ("input", "weight", "grad")
    # torch returns plain zeros for an empty batch, without a graph behind them.
    second = torch.autograd.grad(scalar, [leaves[name] for name in again], materialize_grads=True)
    return found | {f"grad grad {n}": g for n, g in zip(again, second, strict=True)}


def linear(spec: ConvSpec, case: Case) -> Callable[..., Tensor]:
    """torch's function for a specification, padded explicitly where before and after differ.

    Without an activation.
    """
    function: Callable[..., Tensor] = getattr(F, spec.op)
    arguments = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}

    def run(
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
        return run
    pads = [
        zeros
        for both in zip(reversed(spec.padding_begin), reversed(spec.padding_end), strict=True)
        for zeros in both
    ]
    return lambda input, *operands, **others: run(F.pad(input, pads), *operands, **others)


@dataclass(frozen=True)
class Reference:
    """What the quantities of a case are."""

    values: Quantities
    """In float64."""
    magnitudes: Quantities
    """What single elements are measured by."""
    dtype: torch.dtype
    """Of results."""
    products: Tensor | None
    """Beside a large bias, the sums of products, by which the forward is measured."""

    @staticmethod
    def of(spec: ConvSpec, case: Case, inputs: Mapping[str, Tensor]) -> Reference:
        """That of a layer for inputs on the CPU."""
        exact = linear(spec, case)
        if spec.activation:
            values, measures = _with_activation(spec, exact, inputs)
        else:
            values = quantities(exact, double(inputs))
            measures = quantities(exact, magnitudes(inputs))
        products = None
        if case.values == "large bias":
            products = exact(inputs["input"].double(), inputs["weight"].double())
        return Reference(values, measures, inputs["input"].dtype, products)

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, Errors]:
        """Of each quantity, in norm and of the worst element."""
        errors = {
            name: errors_between(results[name], expected, self.magnitudes[name])
            for name, expected in self.values.items()
        }
        if self.products is not None:
            errors["forward"] = self._error_beside_bias(results["forward"])
        return errors

    def where_finite(self, theirs: Quantities, results: Mapping[str, Tensor]) -> Quantities:
        """Results, and the reference where other results, of its shape, are not finite."""
        found = {}
        for name, expected in self.values.items():
            found[name] = result = results[name].detach().cpu()
            if result.shape == expected.shape:
                found[name] = torch.where(theirs[name].isfinite(), result.double(), expected)
        return found

    def _error_beside_bias(self, result: Tensor) -> Errors:
        """Of sums of positive products and a bias that is large beside them: what the last rounding
        of the result may change is no error."""
        assert self.products is not None
        expected = self.values["forward"]
        difference = (result.detach().cpu().double() - expected).abs()
        difference -= torch.finfo(self.dtype).eps * expected.abs()
        found = self.products + difference.clamp_(min=0)
        return errors_between(found, self.products, self.products)


def worse(one: Mapping[str, Errors], other: Mapping[str, Errors]) -> dict[str, Errors]:
    """The larger errors of two runs."""
    return {
        name: (max(error, other[name][0]), max(worst, other[name][1]))
        for name, (error, worst) in one.items()
    }


def of_torch(
    spec: ConvSpec, case: Case, inputs: Mapping[str, Tensor], reference: Reference, tf32: bool
) -> tuple[Quantities, dict[str, Errors]]:
    """Quantities of a layer with an activation as torch has them on the CPU, and their errors.

    Convolution, sum and activation, and the derivatives of each, are computed one after another in
    the inputs' dtype. But what goes into the activation is rounded once, as kernels have it: what
    more roundings do at a kink would hide theirs. With ``tf32`` it is a sum of products of what
    TF32 has of the operands.

    An error is the largest for the inputs themselves and for some that are near, since that of few
    elements may happen to be none.
    """
    assert spec.epilogue
    sums, function = linear(spec, case), activations.of_torch(spec.epilogue)

    def run(**operands: Tensor) -> Tensor:
        exact = double(operands)
        if tf32:
            for name in ("input", "weight"):
                exact[name] = activations.to_tf32(operands[name]).double()
        computed = sums(**operands)
        return function(activations.at(computed, sums(**exact).to(computed.dtype)))

    own = quantities(run, inputs)
    largest = reference.errors(reference.where_finite(own, own))
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        near = activations.nearby(inputs, generator)
        there = Reference.of(spec, case, near)
        results = quantities(run, near)
        # Measured by the reference here: sums that cancel there need not do so here.
        moved = {
            name: reference.values[name] + value - there.values[name]
            for name, value in there.where_finite(results, results).items()
        }
        largest = worse(largest, reference.errors(moved))
    return own, largest


def _with_activation(
    spec: ConvSpec, sums: Callable[..., Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Quantities, Quantities]:
    """Quantities of a layer with an activation, and what single elements are measured by.

    Where an activation has kinks, derivatives are those at what goes into it, rounded to the
    tensors' dtype: it decides at a kink, and torch's own have it rounded, too. An element may be
    off by some of the largest one, since no sum of magnitudes bounds what a curved function makes
    of a sum.
    """
    assert spec.epilogue
    dtype, doubles = inputs["input"].dtype, double(inputs)
    function = activations.EXACT.get(spec.epilogue.text)
    if function is None:
        kinked = activations.of_torch(spec.epilogue)

        def rounded(**operands: Tensor) -> Tensor:
            exact = sums(**operands)
            return kinked(activations.at(exact, exact.to(dtype).double()))

        found = quantities(rounded, doubles)
        operands = {name: doubles[name] for name in OPERANDS if name in doubles}
        found["forward"] = kinked(sums(**operands))
    else:
        found = quantities(lambda **operands: function(sums(**operands)), doubles)
    largest = {
        name: value.abs().max().expand_as(value) if value.numel() else value
        for name, value in found.items()
    }
    return found, largest


def double(inputs: Mapping[str, Tensor]) -> Quantities:
    return {name: tensor.double() for name, tensor in inputs.items()}


def magnitudes(inputs: Mapping[str, Tensor]) -> Quantities:
    return {name: tensor.abs() for name, tensor in double(inputs).items()}


def errors_between(result: Tensor, expected: Tensor, magnitude: Tensor) -> Errors:
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
