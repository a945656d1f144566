"""The float64 reference at sampled positions against torch in float64, and what it catches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convgen.measuring.reference import SampledReference, agreement
from convgen.spec import ConvSpec

SPECS = [
    ConvSpec("conv_transpose3d", (3, 2, 4), (2, 1, 3), (1, 0, 2), 0, (1, 2, 1), 2),
    ConvSpec("conv_transpose3d", 2, 3, 0, (1, 0, 2)),
    ConvSpec("conv_transpose2d", (3, 5), (2, 3), (1, 2), 0, (2, 1), 2),
    ConvSpec("conv_transpose1d", 16, 8, 4),
    ConvSpec("conv3d", (1, 3, 2), (2, 1, 2), (0, 2, 1), 0, (1, 2, 1)),
    ConvSpec("conv2d", 3, 1, "same", groups=4),
    ConvSpec("conv1d", 5, 3, 2, dilation=2),
]

Results = dict[str, Tensor]
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


def case(spec: ConvSpec, dtype: torch.dtype = torch.float64) -> tuple[SampledReference, Results]:
    """A reference, and output and gradients of input, weight and bias by torch."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    first, second = (4, 8 // spec.groups) if spec.transposed else (8, 4 // spec.groups)
    x = draw(2, 4, *(9, 8, 11)[: spec.ndim]).requires_grad_()
    weight = draw(first, second, *spec.kernel_size).requires_grad_()
    bias = draw(8).requires_grad_()
    arguments = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    arguments |= {"groups": spec.groups}
    if spec.transposed:
        arguments["output_padding"] = spec.output_padding
    output = getattr(F, spec.op)(x, weight, bias, **arguments)
    grad = draw(*output.shape)
    reference = SampledReference(spec, x, weight, bias, grad)
    results = (output.detach(), *torch.autograd.grad(output, (x, weight, bias), grad))
    return reference, dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_agrees_with_torch_in_float64(spec: ConvSpec) -> None:
    reference, results = case(spec)
    assert reference.errors(results).worst < 1e-13


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_float32_has_the_error_of_float32(spec: ConvSpec) -> None:
    reference, results = case(spec, torch.float32)
    assert 1e-9 < reference.errors(results).worst < 1e-5


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("spec", SPECS[:5:4], ids=lambda spec: spec.name)
def test_catches_a_result_that_is_off_everywhere(spec: ConvSpec, which: str) -> None:
    reference, results = case(spec)
    results[which] *= 1.01
    errors = reference.errors(results)
    assert [name for name in NAMES if getattr(errors, name) > 1e-3] == [which]


@pytest.mark.parametrize("which", NAMES)
def test_catches_a_single_element_that_was_not_written(which: str) -> None:
    reference, results = case(SPECS[0])
    results[which].view(-1)[3] = math.nan
    errors = reference.errors(results)
    assert (errors.of("forward") == math.inf) == (which == "output")
    assert (errors.of("backward") == math.inf) == (which != "output")


def test_results_that_were_not_asked_for_have_no_error() -> None:
    reference, results = case(SPECS[0])
    del results["grad_weight"], results["grad_bias"]
    errors = reference.errors(results)
    assert errors.grad_weight == errors.grad_bias == 0
    assert 0 < errors.worst < 1e-13


def test_agreement_sees_one_wrong_element_of_whole_results() -> None:
    a = torch.ones(5, 3)
    b = a.clone()
    assert agreement({"output": a}, {"output": b}).output == 0
    a[4, 2] = 3.0
    assert agreement({"output": a}, {"output": b}).output == pytest.approx(2 / math.sqrt(15))
    a[0, 0] = math.nan
    assert agreement({"output": a}, {"output": b}).output == math.inf
