"""Activations and residuals in the CUDA engines' kernels, executed on the CPU."""

from __future__ import annotations

import importlib
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import implicit_gemms
import pytest
import torch
import torch.nn.functional as F
from implicit_gemms import LAST, laid, use_two_multiprocessors
from interpreted import (
    INPUT,
    LIMITS,
    OPERANDS,
    OUTPUT,
    RESULT,
    Library,
    Problem,
    compile_interpreted,
    engine_sources,
    problem,
)
from torch import Tensor

from convgen.engines import abi
from convgen.engines.implicit_gemm.gather import GATHER, GatherSizes
from convgen.engines.registry import unit_of
from convgen.spec import ConvSpec
from convgen.specialize import render

pytestmark = pytest.mark.usefixtures("shared_cache")

ACTIVATE, RESIDUAL, PREACTIVATION = 1, 2, 4
NUMBERS = struct.Struct("12q2Q")
"""A ConvgenCall from the device on, with its epilogue."""


@dataclass(frozen=True)
class Case:
    """A layer with an epilogue, and calls of the contraction that it is."""

    spec: ConvSpec
    kind: str
    calls: tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
    """Batch, channels (in, out) and extents."""
    layouts: tuple[tuple[str, ...], ...] = ((),)
    """Tensors whose channels lie side by side; of implicit GEMMs, if there are several."""

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.kind}{'-gemm' if len(self.layouts) > 1 else ''}"


def case(op: str, kind: str, kernel: int, calls: Any, *layouts: Any, **options: Any) -> Case:
    options = {"activation": "silu", "residual": True} | options
    spec = ConvSpec.make(op, kernel_size=kernel, **options)
    return Case(spec, kind, calls, layouts or ((),))


GEMM = ((), LAST, ("fine", "coarse"))
CASES = [
    case("conv2d", "f32", 3, ((2, (3, 5), (5, 9)),), padding=1),
    case("conv_transpose1d", "f64", 4, ((2, (3, 10), (7,)),), stride=2, activation="gelu"),
    # Depthwise calls, and others.
    case("conv2d", "f32", 3, ((1, (4, 4), (5, 8)), (1, (8, 4), (4, 5))), groups=4, padding=1),
    case("conv_transpose2d", "tf32", 3, ((1, (8, 12), (5, 6)),), stride=2, activation="tanh"),
    case("conv2d", "f16tc", 3, ((2, (16, 24), (6, 9)),), padding=1, activation="leaky_relu:0.1"),
    case("conv3d", "bf16tc", 3, ((1, (16, 8), (3, 8, 8)),), stride=2, padding=1),
    case("conv2d", "bf16tc", 3, ((2, (64, 72), (9, 17)), (1, (40, 24), (8, 8))), *GEMM, padding=1),
    case("conv2d", "tf32", 3, ((1, (32, 40), (9, 16)),), *GEMM, padding=1, activation="hardswish"),
    # Phases, whose sums leave with their channels side by side in every layout.
    case("conv_transpose2d", "bf16tc", 4, ((2, (40, 24), (5, 6)),), *GEMM, stride=2, padding=1),
    # Patches.
    case("conv2d", "bf16tc", 10, ((2, (3, 24), (21, 34)),), *GEMM, stride=10),
    # Few positions of many channels: sums of several parts.
    case("conv2d", "f16tc", 1, ((1, (512, 64), (5, 7)),), *GEMM, activation="gelu:tanh"),
]
# Kernels of one tap and few channels, of channels_last.
POINTWISE = case("conv2d", "f32", 1, ((2, (32, 3), (5, 9)), (1, (3, 8), (4, 5))))
CASES.append(POINTWISE)
QUICK = (CASES[2], CASES[4])


@cache
def library(case: Case) -> Library:
    contraction = case.spec.forward
    if len(case.layouts) == 1:
        sources = engine_sources(case.spec, case.kind, (contraction,), small=True)
        return Library(compile_interpreted(case.spec.name, sources))
    unit = unit_of(GATHER, case.spec.geometry, contraction, case.kind)
    sizes = GatherSizes((16,) if unit.default().schedule.halo_lines else (), (16,))
    return implicit_gemms.library(case.spec, contraction, case.kind, sizes)


def solve(
    loaded: Library, symbol: str, given: Problem, layout: tuple[str, ...], flags: int
) -> tuple[Tensor, Tensor]:
    """The result, and what goes into the activation; of what is not written, NaN."""
    result = RESULT[given.contraction]
    stored = {name: laid(tensor, name in layout) for name, tensor in given.operands.items()}
    for name in (result, "preactivation"):
        stored[name] = torch.full_like(stored[result], torch.nan)
    stored["residual"] = laid(given.operands["residual"], result in layout)
    which = sum(abi.CHANNELS_LAST[name] for name in layout)
    more = (stored["residual"].data_ptr(), stored["preactivation"].data_ptr())
    numbers = NUMBERS.pack(0, *given.numbers, which, flags, *more)
    size = loaded.workspace_bytes(symbol, bytes(abi.POINTERS.size) + numbers)
    scratch = torch.full((size + 255,), 0xFF, dtype=torch.uint8)
    workspace = (scratch.data_ptr() + 255) & -256 if size else 0
    for name, tensor in stored.items():
        contents = OUTPUT if name in (result, "preactivation") else INPUT
        loaded.register(tensor.data_ptr(), tensor.nbytes, name, contents)
    if size:
        loaded.register(workspace, size, "workspace", OUTPUT)
    addresses = [stored[name].data_ptr() if name in stored else 0 for name in OPERANDS]
    try:
        loaded.call(symbol, abi.POINTERS.pack(*addresses, workspace, 0) + numbers)
    finally:
        loaded.forget()
    found = (stored[result], stored["preactivation"])
    last = result in layout
    return tuple(each.movedim(-1, 1) if last else each for each in found)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.long) for c in CASES],
    ids=str,
)
def test_activations_and_residuals_agree_with_float64(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_two_multiprocessors(monkeypatch)
    check(case, library(case))


MULTISTAGE = (CASES[6], CASES[7], CASES[8])


@pytest.mark.long
@pytest.mark.parametrize("case", MULTISTAGE, ids=str)
def test_kernels_for_gpus_since_sm_80_have_epilogues(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_two_multiprocessors(monkeypatch)
    tile = implicit_gemms.MULTISTAGE_TILES[-1]
    files = implicit_gemms.multistage_sources(case.spec, case.spec.forward, case.kind, tile)
    check(case, Library(compile_interpreted(case.spec.name, files)))


def check(case: Case, loaded: Library) -> None:
    suffix = "_implicit_gemm" if len(case.layouts) > 1 else ""
    activation = case.spec.epilogue
    assert activation
    for batch, channels, extents in case.calls:
        given = problem(
            case.spec, case.spec.forward, case.kind, extents, batch=batch, channels=channels
        )
        residual = torch.randn(given.result.shape).to(given.result.dtype)
        given.operands["residual"] = residual
        sums = given.reference + residual.double()
        expected = eval(activation.forward("x"), {"torch": torch, "F": F, "x": sums})
        everything = ACTIVATE | RESIDUAL | PREACTIVATION
        layouts = case.layouts
        if case is CASES[2] and channels[0] == case.spec.groups:
            layouts = (*layouts, LAST)  # Depthwise kernels, too.
        if case is POINTWISE:
            layouts = (*layouts, LAST)
        for layout in layouts:
            for flags, result, before in (
                (everything, expected, sums),
                (RESIDUAL, sums, None),
                (0, given.reference, None),
            ):
                found = solve(loaded, given.symbol + suffix, given, layout, flags)
                for each, wanted in zip(found, (result, before), strict=True):
                    if wanted is None:
                        assert each.isnan().all()
                        continue
                    error = float((each.double() - wanted).norm() / wanted.norm())
                    assert error <= LIMITS[case.kind], f"{layout} {flags}: error {error}"


def test_a_nan_of_the_sums_stays_where_it_is_read() -> None:
    """Lanes that load words of two elements find such results again, and finish them again."""
    case = CASES[4]
    assert case.spec.epilogue
    given = problem(case.spec, "fprop", case.kind, (6, 9), channels=(16, 24))
    residual = torch.randn(given.result.shape).to(given.result.dtype)
    given.operands["residual"] = residual
    given.operands["fine"][0, 3, 0, 2, 4] = torch.nan
    reached = torch.zeros(given.result.shape, dtype=torch.bool)
    reached[:, :, 0, 1:4, 3:6] = True
    flags = ACTIVATE | RESIDUAL | PREACTIVATION
    found = solve(library(case), given.symbol, given, (), flags)
    sums = given.reference + residual.double()
    for each, wanted in zip(found, (F.leaky_relu(sums, 0.1), sums), strict=True):
        assert each[reached].isnan().all()
        error = (each.double() - wanted)[~reached].norm() / wanted[~reached].norm()
        assert float(error) <= LIMITS[case.kind]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*CONVGEN_INTERPRET")
def test_a_package_computes_by_its_cuda_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, layouts and gradients, beside torch; every access is checked."""
    monkeypatch.setenv("CONVGEN_INTERPRET", "checked")
    spec = ConvSpec.make("conv2d", kernel_size=3, padding=1, activation="silu", residual=True)
    package = tmp_path / "interpreted_silu"
    for path, text in render(spec, ["cuda"], ["f64"]).items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("interpreted_silu")
    shapes = ((2, 3, 5, 6), (4, 3, 3, 3), (4,), (2, 4, 5, 6))
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w, b, r = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        leaves = [each.requires_grad_() for each in (x.to(memory_format=layout), w, b, r)]
        y = module.conv2d(*leaves[:3], residual=leaves[3])
        expected = F.silu(F.conv2d(*leaves[:3], padding=1) + leaves[3])
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        found, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
        torch.testing.assert_close(found, wanted)
