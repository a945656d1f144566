"""Implicit GEMMs on a Hopper GPU: values in every layout, determinism, infinities and NaNs."""

from __future__ import annotations

import itertools
import random
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
]

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("conv3d", {"kernel_size": 3, "padding": 1}),
    "grouped": ("conv2d", {"kernel_size": (5, 3), "padding": 2, "dilation": 2, "groups": 2}),
    "dilated": ("conv1d", {"kernel_size": 7, "padding": 9, "dilation": 3}),
    "transposed": ("conv_transpose2d", {"kernel_size": 3, "padding": 1}),
    "pointwise": ("conv2d", {"kernel_size": 1}),
    "pointwise_grouped": ("conv1d", {"kernel_size": 1, "groups": 2}),
    "strided": ("conv3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "nonoverlapping": ("conv_transpose2d", {"kernel_size": 2, "stride": 2}),
    "transposed_strided": ("conv_transpose3d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    "strided_line": ("conv1d", {"kernel_size": 3, "stride": 2}),
    "strided_pointwise": ("conv2d", {"kernel_size": 1, "stride": 2}),
    "patches": ("conv2d", {"kernel_size": 4, "stride": 4}),
    "large_patches": ("conv2d", {"kernel_size": 16, "stride": 16}),
    "line_patches": ("conv1d", {"kernel_size": 10, "stride": 10}),
    "volume_patches": ("conv3d", {"kernel_size": (2, 4, 4), "stride": (2, 4, 4)}),
    "transposed_patches": ("conv_transpose2d", {"kernel_size": 4, "stride": 4}),
    "transposed_line": ("conv_transpose1d", {"kernel_size": 8, "stride": 4, "padding": 2}),
}
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 6e-4}


def last(tensor: Tensor) -> Tensor:
    """The same with its channels side by side."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(params=LAYERS)
def module(request: pytest.FixtureRequest, package: Package) -> ModuleType:
    op, constants = LAYERS[request.param]
    return package(op, "cuda", dtypes=["f32", "bf16", "f16"], **constants)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_values_and_gradients_in_every_layout(module: ModuleType, dtype: torch.dtype) -> None:
    check_values(module, dtype)


def test_small_layers(module: ModuleType) -> None:
    """Quick under compute-sanitizer."""
    for dtype in LIMITS:
        check_values(module, dtype, small=True)


def check_values(module: ModuleType, dtype: torch.dtype, *, small: bool = False) -> None:
    op = module.SPEC["op"]
    ndim, groups = int(op[-2]), module.SPEC["groups"]
    draw = random.Random(op)
    with torch.backends.cudnn.flags(allow_tf32=True):
        for _ in range(2 if small else 6):
            given, made = (groups * draw.randint(8, 80) for _ in range(2))
            if draw.random() < 0.5:
                given, made = 16 * groups * draw.randint(1, 6), 32 * groups
            extents = [draw.randint(10, 10 if ndim == 3 else 40) + 6 for _ in range(ndim)]
            if small:
                extents = [draw.randint(6, 12) for _ in range(ndim)]
            extents = [max(pair) for pair in zip(extents, module.SPEC["kernel_size"], strict=True)]
            check_call(module, dtype, (draw.randint(1, 3), given, made, extents), small=small)


def check_call(
    module: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int, list[int]],
    *,
    small: bool = False,
) -> None:
    """``shape`` is batch, channels in and out, and extents."""
    op = module.SPEC["op"]
    batch, given, made, extents = shape
    constants = {name: module.SPEC[name] for name in ("stride", "padding", "dilation", "groups")}
    groups = module.SPEC["groups"]
    x = torch.randn(batch, given, *extents, device="cuda").to(dtype)
    channels = (given, made // groups) if "transpose" in op else (made, given // groups)
    w = torch.randn(*channels, *module.SPEC["kernel_size"], device="cuda").to(dtype) / 10
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


SMALL: list[tuple[str, dict[str, Any], tuple[int, int, int, list[int]]]] = [
    ("conv3d", {"kernel_size": 3, "padding": 1}, (2, 320, 320, [4, 4, 4])),
    ("conv3d", {"kernel_size": 3, "padding": 1}, (3, 72, 200, [6, 5, 3])),
    ("conv3d", {"kernel_size": 3, "padding": 1}, (2, 320, 320, [8, 8, 8])),
    ("conv3d", {"kernel_size": 3, "stride": 2, "padding": 1}, (2, 320, 320, [8, 8, 8])),
    ("conv2d", {"kernel_size": 3, "padding": 1}, (5, 136, 264, [7, 7])),
    ("conv2d", {"kernel_size": 3, "padding": 1}, (2, 35, 72, [5, 9])),
    ("conv2d", {"kernel_size": 1}, (32, 320, 1280, [7, 7])),
    ("conv2d", {"kernel_size": 1}, (3, 100, 264, [14, 14])),
    ("conv2d", {"kernel_size": 1}, (4, 64, 256, [56, 56])),
    ("conv1d", {"kernel_size": 3, "padding": 1}, (16, 64, 3072, [40])),
]


@pytest.mark.parametrize(("op", "constants", "shape"), SMALL, ids=str)
def test_few_positions(
    package: Package,
    op: str,
    constants: dict[str, Any],
    shape: tuple[int, int, int, list[int]],
) -> None:
    module = package(op, "cuda", dtypes=["f32", "bf16", "f16"], **constants)
    with torch.backends.cudnn.flags(allow_tf32=True):
        for dtype in LIMITS:
            check_call(module, dtype, shape)


LARGE: list[tuple[str, dict[str, Any], tuple[int, int, int, list[int]]]] = [
    ("conv3d", {"kernel_size": 3, "padding": 1}, (2, 128, 200, [24, 21, 32])),
    ("conv2d", {"kernel_size": 3, "padding": 1, "groups": 2}, (4, 256, 256, [60, 64])),
    ("conv3d", {"kernel_size": 3, "stride": 2, "padding": 1}, (2, 72, 128, [40, 40, 40])),
    ("conv_transpose2d", {"kernel_size": 4, "stride": 2, "padding": 1}, (2, 192, 96, [64, 64])),
]
"""Some calls of these are for implicit GEMMs on every GPU."""


@pytest.mark.parametrize(("op", "constants", "shape"), LARGE, ids=str)
def test_kernels_for_gpus_since_sm_80(
    package: Package,
    op: str,
    constants: dict[str, Any],
    shape: tuple[int, int, int, list[int]],
) -> None:
    """Hopper runs PTX for sm_80, too."""
    dtypes = ["f32", "bf16", "f16"]
    module = package(op, "cuda", dtypes=dtypes, archs=["80+ptx"], **constants)
    with torch.backends.cudnn.flags(allow_tf32=True):
        for dtype in LIMITS:
            check_call(module, dtype, shape)


def test_a_nan_beside_a_small_output_reaches_no_other_tap(package: Package) -> None:
    for op, constants, (_, given, made, extents) in (SMALL[0], SMALL[1], SMALL[3]):
        module = package(op, "cuda", dtypes=["f32", "bf16", "f16"], **constants)
        x = torch.randn(1, given, *extents)
        x[(0, 5, *(end - 1 for end in extents))] = torch.nan
        w = torch.randn(made, given, 3, 3, 3)
        kept = {name: each for name, each in constants.items() if name != "kernel_size"}
        grad = torch.randn_like(F.conv3d(x, w, **kept))
        expected = torch.nn.grad.conv3d_weight(x, w.shape, grad, **kept)
        for layout in (last, Tensor.contiguous):
            operands = [layout(each.cuda().bfloat16()).requires_grad_() for each in (x, w)]
            y = module.conv3d(*operands)
            (found,) = torch.autograd.grad(y, operands[1], layout(grad.cuda().bfloat16()))
            assert torch.equal(found.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_windows(package: Package, value: float) -> None:
    op, constants = LAYERS["plain"]
    module = package(op, "cuda", dtypes=["f32", "bf16", "f16"], **constants)
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


@pytest.mark.parametrize(
    ("kernel", "channels", "extents"),
    [
        (16, 3, (100, 113)),
        (4, 3, (57, 226)),
        (14, 1, (70, 64)),
        (16, 80, (64, 48)),
        (7, 40, (30, 22)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_patches_of_any_channels(
    package: Package, kernel: int, channels: int, extents: tuple[int, int], transposed: bool
) -> None:
    """In every layout, with NaNs and infinities where no window reads."""
    op = "conv_transpose2d" if transposed else "conv2d"
    module = package(op, "cuda", dtypes=["bf16"], kernel_size=kernel, stride=kernel)
    coarse = torch.randn(3, 96, *(extent // kernel for extent in extents)).bfloat16()
    fine = torch.randn(3, channels, *extents).bfloat16()
    w = torch.randn(96, channels, kernel, kernel).bfloat16() / 10
    bias = torch.randn(channels if transposed else 96).bfloat16()
    options = {"stride": kernel}
    if transposed:
        options["output_padding"] = tuple(extent % kernel for extent in extents)
    leaves = [each.double().requires_grad_() for each in (coarse if transposed else fine, w, bias)]
    expected = getattr(F, op)(*leaves, **options)
    grad = fine if transposed else coarse
    wanted = [expected, *torch.autograd.grad(expected, leaves, grad.double())]
    met = [extent // kernel * kernel for extent in extents]
    fine[:, :, met[0] :] = torch.nan
    fine[:, :, :, met[1] :] = torch.inf
    for layouts in itertools.product((last, Tensor.contiguous), repeat=3):
        x, y, g = (
            lay(each.cuda())
            for lay, each in zip(layouts, (coarse if transposed else fine, w, grad), strict=True)
        )
        given = [x.requires_grad_(), y.requires_grad_(), bias.cuda().requires_grad_()]
        if transposed:
            found = [module.conv_transpose2d(*given, output_padding=options["output_padding"])]
        else:
            found = [module.conv2d(*given)]
        found += torch.autograd.grad(found[0], given, g)
        for one, right in zip(found[: 3 if transposed else 4], wanted, strict=False):
            error = (one.detach().double().cpu() - right).norm() / right.norm()
            assert error < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("layer", ["strided", "transposed_line"])
def test_what_is_not_finite_stays_in_its_phases(package: Package, layer: str) -> None:
    op, constants = LAYERS[layer]
    module = package(op, "cuda", dtypes=["f32", "bf16", "f16"], **constants)
    transposed = "transpose" in op
    x = torch.randn(2, 256, 33) if transposed else torch.randn(2, 256, 9, 13, 13)
    w = torch.randn(256, 128, 8) if transposed else torch.randn(128, 256, 3, 3, 3)
    names = ("stride", "padding")
    given = {name: constants[name] for name in names}
    grad = torch.randn_like(getattr(F, op)(x, w, **given))
    read = x if transposed else grad  # by phases
    read[0, 5].view(-1)[0] = torch.nan
    read[1, 7].view(-1)[-1] = torch.inf
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = getattr(F, op)(*leaves, **given)
    expected = y if transposed else torch.autograd.grad(y, x, grad)[0]
    for layout in (last, Tensor.contiguous):
        operands = [layout(e.detach().cuda().bfloat16()).requires_grad_() for e in (x, w)]
        found = getattr(module, op)(*operands)
        if not transposed:
            (found,) = torch.autograd.grad(found, operands[0], layout(grad.cuda().bfloat16()))
        assert torch.equal(found.isfinite().cpu(), expected.isfinite())


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
