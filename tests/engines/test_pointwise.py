"""Kernels of one tap and few channels in channels_last (``simt/pointwise.cuh``), interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from implicit_gemms import LAST, solve
from interpreted import Library, Problem, compile_interpreted, engine_sources, problem

from convgen.codegen.render import TEMPLATES
from convgen.engines import abi
from convgen.engines.simt.common import POINTWISE_FEW
from convgen.spec import ConvSpec

ALL = ("fprop", "dgrad", "wgrad")
HEAD = ConvSpec("conv2d", 1)


@pytest.fixture(autouse=True, scope="module")
def environment(shared_cache: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Blocks have several steps.
        patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
        yield


@cache
def library(dtype: str) -> Library:
    files = engine_sources(HEAD, dtype, ALL, small=True)
    return Library(compile_interpreted(f"pointwise_{dtype}", files, "checked"))


def takes(given: Problem, layout: tuple[str, ...]) -> bool:
    flags = sum(abi.CHANNELS_LAST[name] for name in layout)
    call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *given.numbers, flags)
    return library(given.dtype).takes_layout(given.symbol, call)


@pytest.mark.parametrize(
    "dtype", ["f32", *(pytest.param(each, marks=pytest.mark.long) for each in ("bf16", "f64"))]
)
def test_values_agree_with_float64(dtype: str) -> None:
    for batch, channels, extents in (
        (3, (32, 3), (9, 37)),
        (2, (4, 40), (5, 7)),
        (1, (8, 8), (3, 5)),
        (5, (64, 7), (8, 31)),
    ):
        for contraction in ALL:
            given = problem(HEAD, contraction, dtype, extents, batch=batch, channels=channels)
            assert takes(given, LAST)
            solve(library(dtype), given, LAST, "")
            given.check()


def test_others_are_not_taken() -> None:
    for channels in ((32, 9), (30, 3), (256, 4)):
        given = problem(HEAD, "fprop", "f32", (5, 6), channels=channels)
        assert not takes(given, LAST)
    given = problem(HEAD, "fprop", "f32", (5, 6), channels=(32, 4))
    assert takes(given, ("coarse", "fine"))
    assert not takes(given, ("fine", "weight"))
    assert not takes(given, ())


@pytest.mark.parametrize("channels", [(32, 3), (3, 32)])
def test_what_is_not_finite_stays_at_its_position(channels: tuple[int, int]) -> None:
    given = problem(HEAD, "fprop", "f32", (4, 9), batch=2, channels=channels)
    given.operands["fine"][1, 2, 0, 3, 5] = torch.inf
    given.operands["fine"][0, 1, 0, 0, 0] = torch.nan
    solve(library("f32"), given, LAST, "")
    finite = given.result.isfinite()
    assert not finite[1, :, 0, 3, 5].any()
    assert not finite[0, :, 0, 0, 0].any()
    assert int((~finite).sum()) == 2 * channels[1]


def test_the_model_and_the_kernels_agree_on_what_is_few() -> None:
    header = (TEMPLATES / "cuda" / "simt" / "pointwise.cuh").read_text()
    assert f"constexpr int POINTWISE_FEW = {POINTWISE_FEW}," in header


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [(32, 3), (3, 32), (64, 8), (8, 8)], ids=str)
def test_on_a_gpu(package: Package, dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """Values, gradients and memory formats; the same to the bit."""
    module = package("conv3d", "cuda", dtypes=["f32", "f16", "bf16"], kernel_size=1)
    shape = (2, channels[0], 17, 33, 31)
    x = torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last_3d)
    w = torch.randn(*channels[::-1], 1, 1, 1, device="cuda").to(dtype)
    b = torch.randn(channels[1], device="cuda").to(dtype)
    leaves = [each.requires_grad_() for each in (x, w, b)]
    double = [each.detach().double().requires_grad_() for each in leaves]
    found, expected = module.conv3d(*leaves), F.conv3d(*double)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, leaves, grad)
    wanted = torch.autograd.grad(expected, double, grad.double())
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert float((one.double() - other).norm() / other.norm()) <= limit
    again = torch.autograd.grad(module.conv3d(*leaves), leaves, grad)
    assert all(map(torch.equal, gradients, again))
