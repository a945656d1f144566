"""How the CPU's kernels add up: sums of one sign, large biases, elements that are not finite."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor


def both(
    module: ModuleType, op: str, x: Tensor, weight: Tensor, grad: float, **arguments: Any
) -> dict[str, tuple[float, float]]:
    """Errors of our and torch's results on the same tensors, against float64."""

    def results(function: Any, dtype: torch.dtype, **arguments: Any) -> dict[str, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        bias = torch.full((weight.shape[0],), 0.1, dtype=dtype, requires_grad=True)
        y = function(*leaves, bias, **arguments)
        gradients = torch.autograd.grad(y, [*leaves, bias], torch.full_like(y, grad))
        return dict(
            zip(("forward", "input", "weight", "bias"), (y.detach(), *gradients), strict=True)
        )

    torchs = getattr(F, op)
    expected = results(torchs, torch.float64, **arguments)
    found = (
        results(getattr(module, op), torch.float32),
        results(torchs, torch.float32, **arguments),
    )

    def error(of: dict[str, Tensor], name: str) -> float:
        difference = of[name].double() - expected[name]
        return float(difference.norm() / expected[name].norm())

    return {name: (error(found[0], name), error(found[1], name)) for name in expected}


@pytest.mark.parametrize(
    ("op", "kernel", "arguments", "shape", "outputs"),
    [
        ("conv2d", 1, {}, (1, 2048, 8, 8), 8),
        ("conv3d", 3, {"padding": 1}, (1, 256, 6, 6, 6), 16),
        ("conv2d", 3, {"padding": 1, "stride": 2}, (1, 1, 300, 301), 1),
        # Taps in a loop, in parts; enough chains that their sums are added up twice.
        ("conv1d", 80, {}, (1, 512, 90), 2),
    ],
)
def test_constant_inputs_lose_at_most_twice_what_torch_loses(
    package: Package, op: str, kernel: int, arguments: Any, shape: tuple[int, ...], outputs: int
) -> None:
    module = package(op, kernel_size=kernel, dtypes=("f32",), **arguments)
    weight_shape = (outputs, shape[1], *(kernel,) * (len(shape) - 2))
    for x, w, grad in ((1.0, 0.1, 1.0), (0.7, 0.3, 0.3)):
        errors = both(
            module, op, torch.full(shape, x), torch.full(weight_shape, w), grad, **arguments
        )
        for name, (ours, theirs) in errors.items():
            # What rounding ten terms takes is no loss to compare.
            assert ours <= max(2 * theirs, 6e-7), f"{name} of {x} x {w}: {ours} against {theirs}"
            assert ours <= 4e-6, f"{name} of {x} x {w}"


def test_terms_are_not_rounded_to_the_last_place_of_a_large_bias(package: Package) -> None:
    module = package("conv3d", kernel_size=3, padding=1, dtypes=("f32",))
    x = torch.ones(1, 256, 3, 3, 3)
    weight, bias = torch.full((2, 256, 3, 3, 3), 3e-5), torch.tensor([1000.0, -1000.0])
    y = module.conv3d(x, weight, bias)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=1)
    assert float((y.double() - expected).abs().max()) <= 2.0**-15  # half a place of 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
# One block of positions; several of one range; several ranges.
@pytest.mark.parametrize("extents", [(6, 7), (60, 71), (402, 301)])
def test_what_no_window_reads_does_not_spoil_the_weights_gradient(
    package: Package, extents: tuple[int, int], value: float, dtype: torch.dtype
) -> None:
    module = package("conv2d", kernel_size=3, stride=2, dtypes=("f32", "f16"))
    x, weight = torch.randn(1, 2, *extents), torch.randn(3, 2, 3, 3)
    rows, columns = (2 * ((extent - 3) // 2) + 3 for extent in extents)
    x[:, 0, rows:] = value
    x[:, 1, :, columns:] = value
    w = weight.to(dtype).requires_grad_()
    y = module.conv2d(x.to(dtype), w)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, w, grad)
    read = x[..., :rows, :columns].to(dtype).double()
    (theirs,) = torch.autograd.grad(
        F.conv2d(read, (v := w.detach().double().requires_grad_()), stride=2), v, grad.double()
    )
    limit = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    assert float((ours.double() - theirs).norm() / theirs.norm()) <= limit


def test_nan_that_is_read_reaches_the_weights_that_meet_it_alone(package: Package) -> None:
    module = package("conv2d", kernel_size=3, stride=2, dtypes=("f32", "f16"))
    x, weight = torch.randn(2, 2, 9, 9), torch.randn(3, 2, 3, 3, requires_grad=True)
    x[1, 1, 4, 3] = math.nan  # an even row, which taps 0 and 2 meet, and an odd column: tap 1
    y = module.conv2d(x, weight)
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    expected = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    expected[:, 1, ::2, 1] = True
    assert torch.equal(gradient.isnan(), expected)
