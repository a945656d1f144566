"""Patches by Hopper's kernels on the CPU: results against float64, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from implicit_gemms import LAST, LAYOUTS, library, solve, spec, use_two_multiprocessors
from interpreted import Problem, mostly_long, problem

from convgen.engines import abi
from convgen.engines.family import Plan
from convgen.engines.implicit_gemm.common import has_patches, refuses_taps
from convgen.engines.implicit_gemm.gather import GatherSizes
from convgen.engines.implicit_gemm.wgrad_quarters import WGRAD_QUARTERS
from convgen.engines.implicit_gemm.wgrad_taps import WGRAD_TAPS, TapWgradSizes
from convgen.engines.problem import Problem as Contraction
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


ALL_LAYOUTS = (*LAYOUTS, ("fine", "weight"), ("coarse",), ("weight",), ("coarse", "fine"))

# Specification, mode, calls: batch, channels in and out, extents.
Call = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, tuple[Call, ...]]

# Too many phases, and steps, for any other kernel: with any channels there are patches alone.
PATCHES, LINES = spec("conv2d", (9, 10), (9, 10)), spec("conv1d", 17, 17)
CASES: list[Case] = [
    # Rows and columns that no window reads; accesses of two elements, or of one; chunks of
    # channels, the last of which has fewer.
    (PATCHES, "bf16tc", ((2, (3, 24), (21, 34)), (1, (5, 40), (18, 31)), (1, (41, 24), (19, 53)))),
]
MORE_CASES: list[Case] = [
    (PATCHES, "f16tc", ((3, (4, 72), (27, 100)), (1, (40, 24), (10, 24)), (1, (1, 16), (9, 10)))),
    (LINES, "bf16tc", ((3, (3, 40), (170,)), (2, (16, 24), (100,)))),
    (spec("conv3d", (2, 16, 16), (2, 16, 16)), "bf16tc", ((2, (3, 40), (5, 35, 48)),)),
    (spec("conv2d", 16, 16), "bf16tc", ((2, (3, 136), (64, 49)), (1, (64, 72), (32, 16)))),
    (spec("conv_transpose2d", 16, 16), "f16tc", ((2, (40, 3), (3, 2)),)),
    (spec("conv_transpose1d", 17, 17, 0, 5), "bf16tc", ((2, (40, 8), (9,)),)),
    (
        spec("conv_transpose3d", (3, 2, 4), (3, 2, 4), 0, (2, 1, 3)),
        "bf16tc",
        ((2, (24, 8), (2, 3, 4)),),
    ),
]
# Channels that are known, so few of them that no other kernel serves.
FEW = spec("conv2d", 4, 4, in_channels=3, out_channels=24)
SMALL = spec("conv2d", 3, 3)
FEW_UP = spec("conv_transpose2d", (4, 3), (4, 3), 0, (3, 2), in_channels=24, out_channels=6)


def check(case: Case, contraction: str, sizes: Any = None, layouts: Any = ALL_LAYOUTS) -> None:
    of, mode, calls = case
    for call, (batch, channels, extents) in enumerate(calls):
        for index, layout in enumerate(LAYOUTS if call else layouts):
            given = problem(
                of, contraction, mode, extents, batch=batch, channels=channels, bias=index % 2 == 0
            )
            solve(library(of, contraction, mode, sizes), given, layout)
            given.check()


def plan_of(of: ConvSpec) -> Plan[TapWgradSizes]:
    return Plan(Contraction(of.geometry, "wgrad", "tf32"), WGRAD_TAPS, TapWgradSizes((128,)))


def sizes_of(contraction: str) -> GatherSizes | TapWgradSizes:
    return TapWgradSizes((64,)) if contraction == "wgrad" else GatherSizes((), (16,))


@pytest.mark.parametrize("contraction", ["fprop", "dgrad", "wgrad"])
def test_patches_agree_with_float64(contraction: str) -> None:
    of, mode, calls = CASES[0]
    check((of, mode, calls[:2]), contraction, sizes_of(contraction), LAYOUTS)


@pytest.mark.long
@pytest.mark.parametrize("contraction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize(
    "case", [*CASES, *MORE_CASES], ids=lambda case: f"{case[0].name}-{case[1]}"
)
def test_all_sizes_agree_with_float64(case: Case, contraction: str) -> None:
    check(case, contraction)


@pytest.mark.parametrize("contraction", mostly_long(["wgrad", "fprop", "dgrad"], 1))
def test_tf32_agrees_with_float64(contraction: str) -> None:
    # Windows of a sample in fours, which wgrad reads as they lie, and others.
    of_four = (2, (3, 40), (18, 41))
    for of, calls in ((PATCHES, (of_four, *CASES[0][2][:2])), (FEW, ((2, (3, 24), (9, 14)),))):
        check((of, "tf32", calls), contraction, sizes_of(contraction))


@pytest.mark.long
def test_tf32_wgrad_of_open_channels_agrees_with_float64() -> None:
    """Layers that quarters serve as well: with few fine channels and with many."""
    assert WGRAD_TAPS.context(plan_of(SMALL))["quarters"]
    assert not WGRAD_TAPS.context(plan_of(spec("conv2d", 16, 16)))["quarters"]
    calls = ((2, (3, 40), (9, 14)), (2, (72, 24), (12, 12)), (1, (130, 136), (8, 24)))
    check((SMALL, "tf32", calls), "wgrad", TapWgradSizes((128,)))


def test_a_layer_has_one_kernel_of_patches_or_quarters_for_its_wgrad() -> None:
    """Both accept some in TF32: their kernels lie in one unit then."""
    for of in (SMALL, PATCHES, FEW, spec("conv2d", 2, 2), spec("conv2d", 1)):
        of_layer = Contraction(of.geometry, "wgrad", "tf32")
        taken = [not family.accepts(of_layer) for family in (WGRAD_TAPS, WGRAD_QUARTERS)]
        assert taken == [of.geometry.kernel != (1, 2, 2), of.geometry.kernel == (1, 2, 2)]


@pytest.mark.long
@pytest.mark.parametrize("of", [FEW, FEW_UP], ids=lambda of: of.name)
def test_layers_of_three_channels_have_kernels_of_patches_alone(of: ConvSpec) -> None:
    channels = (3, 24) if of is FEW else (24, 6)
    for contraction in ("fprop", "dgrad", "wgrad"):
        of_layer = Contraction(of.geometry, contraction, "bf16tc")
        assert has_patches(of_layer)
        assert refuses_taps(of_layer)
        check((of, "bf16tc", ((2, channels, (5, 7)),)), contraction, sizes_of(contraction))


def test_which_layers_have_patches() -> None:
    def has(*arguments: Any, contraction: str = "fprop", **more: Any) -> bool:
        return has_patches(Contraction(spec(*arguments, **more).geometry, contraction, "bf16tc"))

    assert has("conv2d", 16, 16)
    assert has("conv2d", 4, 4, in_channels=3)
    assert has("conv3d", 2, 2, in_channels=4)
    assert not has("conv2d", 4, 4, in_channels=2, out_channels=8)
    # Other kernels serve as well, or, of few taps, most likely do.
    assert not has("conv2d", 4, 4, in_channels=96)
    assert not has("conv2d", 2, 2)
    assert not has("conv2d", 16, 16, 1)
    assert not has("conv2d", 16, 8)
    assert not has("conv2d", 16, 16, groups=2)
    assert not has("conv1d", 3, 3, dilation=2)
    assert not has("conv2d", 1)


def planted(given: Problem, read: tuple[int, ...]) -> None:
    """NaNs and infinities in fine where no window reads."""
    fine = given.operands["fine"]
    met = torch.zeros(fine.shape, dtype=torch.bool)
    met[(..., *(slice(0, extent) for extent in read))] = True
    fine[~met] = torch.nan
    fine[..., -1, -1] = torch.inf


@pytest.mark.parametrize(
    ("contraction", "mode"), [("fprop", "bf16tc"), ("wgrad", "bf16tc"), ("wgrad", "tf32")]
)
def test_what_no_window_reads_goes_nowhere(contraction: str, mode: str) -> None:
    for layout in ((), LAST):
        given = problem(PATCHES, contraction, mode, (21, 34), batch=2, channels=(3, 24), bias=False)
        planted(given, (18, 30))
        solve(library(PATCHES, contraction, mode, sizes_of(contraction)), given, layout)
        given.check()


def test_a_nan_stays_in_its_window() -> None:
    loaded = library(PATCHES, "fprop", "bf16tc", sizes_of("fprop"))
    for layout in ((), LAST):
        given = problem(PATCHES, "fprop", "bf16tc", (21, 34), batch=2, channels=(3, 24))
        clean = given.reference.clone()
        given.operands["fine"][1, 2, 0, 17, 9] = torch.nan
        solve(loaded, given, layout)
        reached = torch.zeros(clean.shape, dtype=torch.bool)
        reached[1, :, 0, 1, 0] = True
        result = given.result.double()
        assert torch.equal(result.isnan(), reached)
        assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-2


def test_a_nan_reaches_its_columns_of_the_weights_gradient() -> None:
    """In TF32: of a window of the last sample; a block of positions ends behind it."""
    loaded = library(PATCHES, "wgrad", "tf32", sizes_of("wgrad"))
    for layout in ((), LAST, ("fine",), ("coarse", "weight")):
        given = problem(PATCHES, "wgrad", "tf32", (21, 40), batch=2, channels=(3, 24), bias=False)
        clean = given.reference.clone()
        given.operands["fine"][1, 2, 0, 17, 39] = torch.nan
        solve(loaded, given, layout)
        reached = torch.zeros(clean.shape, dtype=torch.bool)
        reached[:, 2, 0, 8, 9] = True
        result = given.result.double()
        assert torch.equal(result.isnan(), reached)
        assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-3


@pytest.mark.parametrize(("contraction", "mode"), [("fprop", "bf16tc"), ("wgrad", "tf32")])
def test_patches_pay_where_a_layer_has_few_channels(contraction: str, mode: str) -> None:
    loaded = library(PATCHES, contraction, mode, sizes_of(contraction))
    symbol = f"convgen_{contraction}_{mode}_implicit_gemm"

    def expected_ms(batch: int, coarse: int, fine: int) -> float:
        numbers = [batch, coarse, fine, 1, 20, 20, 1, 180, 200]
        call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *numbers, 0)
        return loaded.expected_ms(symbol, call)

    assert expected_ms(32, 768, 3) > 0
    assert expected_ms(32, 16, 64) < 0
