"""wgrad of outputs smaller than a tile with its halo, and of few positions, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from implicit_gemms import LAST, LAYOUTS, library, solve, spec, use_two_multiprocessors
from interpreted import problem, without_bias

from convgen.engines import abi
from convgen.engines.implicit_gemm.wgrad import WgradSizes
from convgen.engines.implicit_gemm.wgrad_taps import TapWgradSizes
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


# Batch, channels in and out, extents.
Call = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, tuple[Call, ...]]
CONV3D, CONV2D = spec("conv3d", 3, 1, 1), spec("conv2d", 3, 1, 1)
POINT = spec("conv2d", 1)
CASES: list[Case] = [
    # A box of 64 positions, and boxes of 60 of three samples.
    (CONV3D, "bf16tc", ((1, (24, 136), (4, 4, 4)), (3, (24, 40), (5, 4, 1)))),
]
MORE_CASES: list[Case] = [
    (
        CONV3D,
        "bf16tc",
        ((2, (40, 24), (6, 6, 6)), (2, (35, 72), (3, 5, 9)), (1, (64, 64), (2, 3, 8))),
    ),
    (CONV2D, "f16tc", ((3, (200, 40), (7, 7)), (2, (24, 72), (5, 9)), (5, (40, 40), (8, 3)))),
    (spec("conv2d", (3, 5), 1, (1, 2), dilation=2, groups=2), "bf16tc", ((2, (48, 80), (6, 7)),)),
    (spec("conv_transpose3d", 3, 1, 1), "bf16tc", ((2, (24, 40), (5, 4, 6)),)),
    (spec("conv1d", 3, 1, 1), "f16tc", ((3, (24, 264), (40,)), (2, (40, 24), (7,)))),
    (spec("conv1d", 7, 1, 9, dilation=3), "bf16tc", ((2, (64, 40), (30,)),)),
]
SIZES = WgradSizes((8,))


def check(case: Case, layouts: tuple[tuple[str, ...], ...]) -> None:
    of, mode, calls = case
    for batch, channels, extents in calls:
        for layout in layouts:
            given = problem(of, "wgrad", mode, extents, batch=batch, channels=channels)
            solve(library(of, "wgrad", mode, SIZES), given, layout)
            given.check()
            first = given.result.clone()
            solve(library(of, "wgrad", mode, SIZES), given, layout)
            assert torch.equal(first, given.result)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_outputs_agree_with_float64(case: Case) -> None:
    check(case, ((), LAST))


@pytest.mark.long
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_more_small_outputs_agree_with_float64(case: Case) -> None:
    check(case, (*LAYOUTS, ("coarse", "fine")))


@pytest.mark.parametrize(
    ("of", "extents"),
    [
        (CONV3D, (4, 3, 5)),
        pytest.param(CONV2D, (7, 9), marks=pytest.mark.long),
        pytest.param(spec("conv1d", 3, 1, 2), (11,), marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_reaches_the_taps_that_meet_it(
    of: ConvSpec, extents: tuple[int, ...], layout: tuple[str, ...]
) -> None:
    """Corners of a sample, which all taps but some meet."""
    given = problem(of, "wgrad", "bf16tc", extents, batch=2, channels=(24, 40))
    clean = given.reference.clone()
    ones = {name: torch.ones(t.shape, dtype=torch.float64) for name, t in given.operands.items()}
    ends = given.operands["fine"].shape[2:]
    for channel, place in enumerate([(0, 0, 0), tuple(end - 1 for end in ends)]):
        at = (channel, channel, *place)
        given.operands["fine"][at] = (torch.nan, torch.inf)[channel]
        ones["fine"][at] = 1e100
    reached = without_bias(of, "wgrad", ones) > 1e50
    assert reached.any()
    assert not reached.all()
    solve(library(of, "wgrad", "bf16tc", SIZES), given, layout)
    result = given.result.double()
    assert torch.equal(~result.isfinite(), reached)
    assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-2


def test_sums_of_ones_are_counts() -> None:
    given = problem(CONV3D, "wgrad", "bf16tc", (4, 3, 5), batch=2, channels=(24, 40))
    for name in ("coarse", "fine"):
        given.operands[name].fill_(1)
    solve(library(CONV3D, "wgrad", "bf16tc", SIZES), given, LAST)
    assert given.result[7, 5, 1, 1, 1] == 2 * 4 * 3 * 5
    assert given.result[39, 23, 0, 2, 0] == 2 * 3 * 2 * 4


@pytest.mark.parametrize(
    ("layout", "extents"),
    [((), (7, 7)), (("coarse",), (8, 8)), (("fine", "weight"), (3, 5))],
    ids=str,
)
def test_pointwise_operands_that_do_not_lie_so_are_packed(
    layout: tuple[str, ...], extents: tuple[int, ...]
) -> None:
    given = problem(POINT, "wgrad", "bf16tc", extents, batch=3, channels=(35, 72))
    loaded = library(POINT, "wgrad", "bf16tc", TapWgradSizes((64,)))
    numbers = abi.NUMBERS.pack(0, *given.numbers, sum(abi.CHANNELS_LAST[name] for name in layout))
    symbol = f"{given.symbol}_implicit_gemm"
    assert loaded.workspace_bytes(symbol, bytes(abi.POINTERS.size) + numbers) > 0
    given.operands["fine"][1, 34, 0, 2, 2] = torch.nan
    solve(loaded, given, layout)
    assert torch.equal(
        given.result.isfinite(),
        torch.arange(35).ne(34)[:, None, None, None].expand(72, 35, 1, 1, 1),
    )
