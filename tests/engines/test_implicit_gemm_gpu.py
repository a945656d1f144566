"""Implicit GEMMs on a Hopper GPU: values in every layout, determinism, infinities and NaNs."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor

import convgen
from convgen.engines.implicit_gemm.common import UNPROVEN

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]

LAYERS: dict[str, dict[str, Any]] = {
    "conv3d": {"kernel_size": 3, "padding": 1},
    "conv2d": {"kernel_size": (5, 3), "padding": 2, "dilation": 2, "groups": 2},
    "conv1d": {"kernel_size": 7, "padding": 9, "dilation": 3},
    "conv_transpose2d": {"kernel_size": 3, "padding": 1},
}
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 6e-4}


def last(tensor: Tensor) -> Tensor:
    """The same with its channels side by side."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


UNPROVEN_LAYERS: dict[str, dict[str, Any]] = {
    "conv2d": {"kernel_size": 1},
    "conv3d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv_transpose2d": {"kernel_size": 2, "stride": 2},
    "conv_transpose3d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv1d": {"kernel_size": 1, "groups": 2},
}
"""Of what no GPU has timed: see ``convgen/engines/implicit_gemm/common.py``."""


@pytest.fixture(params=LAYERS)
def module(request: pytest.FixtureRequest, package: Package) -> ModuleType:
    constants = LAYERS[request.param]
    return package(request.param, "cuda", dtypes=["f32", "bf16", "f16"], **constants)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_values_and_gradients_in_every_layout(module: ModuleType, dtype: torch.dtype) -> None:
    check_values(module, dtype, LAYERS[module.SPEC["op"]])


def unproven(
    op: str, layer: dict[str, Any], session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    monkeypatch.setenv("CONVGEN_UNPROVEN", ",".join(UNPROVEN))
    # A cache of its own: what is asked for is the same as without the variable.
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(session_cache / "unproven"))
    return convgen.specialize(op, backends="cuda", dtypes=["f32", "bf16", "f16"], **layer)


WITH_UNPROVEN = pytest.mark.parametrize(
    ("op", "layer"),
    [*UNPROVEN_LAYERS.items(), *LAYERS.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)


@WITH_UNPROVEN
def test_values_and_gradients_of_what_no_gpu_has_timed(
    op: str, layer: dict[str, Any], session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = unproven(op, layer, session_cache, monkeypatch)
    for dtype in LIMITS:
        check_values(module, dtype, layer)


@pytest.mark.parametrize("op", LAYERS)
def test_small_layers(op: str, package: Package) -> None:
    """Quick under compute-sanitizer, as the next."""
    module = package(op, "cuda", dtypes=["f32", "bf16", "f16"], **LAYERS[op])
    for dtype in LIMITS:
        check_values(module, dtype, LAYERS[op], small=True)


@WITH_UNPROVEN
def test_small_layers_of_what_no_gpu_has_timed(
    op: str, layer: dict[str, Any], session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = unproven(op, layer, session_cache, monkeypatch)
    for dtype in LIMITS:
        check_values(module, dtype, layer, small=True)


def check_values(
    module: ModuleType, dtype: torch.dtype, layer: dict[str, Any], *, small: bool = False
) -> None:
    op = module.SPEC["op"]
    constants = {name: value for name, value in layer.items() if name != "kernel_size"}
    ndim, groups, transposed = int(op[-2]), module.SPEC["groups"], "transpose" in op
    draw = random.Random(op)
    with torch.backends.cudnn.flags(allow_tf32=True):
        for _ in range(2 if small else 6):
            given, made = (groups * draw.randint(8, 80) for _ in range(2))
            if draw.random() < 0.5:
                given, made = 16 * groups * draw.randint(1, 6), 32 * groups
            extents = [draw.randint(10, 10 if ndim == 3 else 40) + 6 for _ in range(ndim)]
            if small:
                extents = [draw.randint(6, 12) for _ in range(ndim)]
            x = torch.randn(draw.randint(1, 3), given, *extents, device="cuda").to(dtype)
            shape = (given, made // groups) if transposed else (made, given // groups)
            w = torch.randn(*shape, *module.SPEC["kernel_size"], device="cuda").to(dtype) / 10
            b = torch.randn(made, device="cuda").to(dtype)
            where = "cpu" if small else "cuda"
            double = [each.double().to(where).requires_grad_() for each in (x, w, b)]
            expected = getattr(F, op)(*double, **constants)
            grad = torch.randn(expected.shape, device="cuda").to(dtype)
            of_operands = torch.autograd.grad(expected, double, grad.double().to(where))
            wanted = [each.cuda() for each in (expected, *of_operands)]
            for x_last, w_last, grad_last in ((0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 1)):
                operands = [
                    (last(each) if is_last else each).requires_grad_()
                    for each, is_last in ((x, x_last), (w, w_last), (b, False))
                ]
                out = last(grad) if grad_last else grad
                runs = []
                for _ in range(2):
                    y = getattr(module, op)(*operands)
                    runs.append((y, *torch.autograd.grad(y, operands, out)))
                for one, other, right in zip(*runs, wanted, strict=True):
                    assert torch.equal(one, other)
                    error = (one.double() - right).norm() / right.norm()
                    assert error < LIMITS[dtype], (x.shape, w.shape, x_last, w_last, grad_last)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_windows(package: Package, value: float) -> None:
    constants = LAYERS["conv3d"]
    module = package("conv3d", "cuda", dtypes=["f32", "bf16", "f16"], **constants)
    # 32 output channels: two planes share the rows of a product.
    x = torch.randn(1, 32, 9, 21, 13)
    for place in ((0, 0, 0), (8, 20, 12), (4, 20, 5), (3, 4, 12)):
        x[(0, 5, *place)] = value
    w, grad = torch.randn(32, 32, 3, 3, 3), torch.randn(1, 32, 9, 21, 13)
    expected = F.conv3d(x, w, padding=1)
    of_weight = torch.nn.grad.conv3d_weight(x, w.shape, grad, padding=1)
    for layout in (last, Tensor.contiguous):
        given = [layout(each.cuda().bfloat16()).requires_grad_() for each in (x, w)]
        y = module.conv3d(*given)
        assert torch.equal(y.isfinite().cpu(), expected.isfinite())
        (found,) = torch.autograd.grad(y, given[1], layout(grad.cuda().bfloat16()))
        assert torch.equal(found.isfinite().cpu(), of_weight.isfinite())


def test_groups_of_64_channels(package: Package) -> None:
    """One consumer has none of them: 120 tiles of 192 positions are one wave of an H200."""
    module = package("conv2d", "cuda", dtypes=["bf16"], kernel_size=3, padding=1, groups=2)
    x = last(torch.randn(1, 128, 128, 80, device="cuda").bfloat16())
    w = last(torch.randn(128, 64, 3, 3, device="cuda").bfloat16() / 10)
    expected = F.conv2d(x.double(), w.double(), padding=1, groups=2)
    y = module.conv2d(x, w)
    assert (y.double() - expected).norm() / expected.norm() < LIMITS[torch.bfloat16]


def test_tensors_that_begin_anywhere(package: Package) -> None:
    module = package("conv2d", "cuda", dtypes=["bf16"], kernel_size=3)
    w = torch.randn(64, 64, 3, 3, device="cuda").bfloat16()
    x = torch.randn(1 + 64 * 100, device="cuda").bfloat16()[1:].view(1, 10, 10, 64)
    y = module.conv2d(x.movedim(-1, 1), w)
    torch.testing.assert_close(y, module.conv2d(x.movedim(-1, 1).clone(), w))
