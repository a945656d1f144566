"""fprop and dgrad in 3xTF32 for Hopper, on the CPU: as accurate as fp32, bugs put into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

import pytest
import torch
from implicit_gemms import (
    LAST,
    LAYOUTS,
    Bug,
    compile_with_bugs,
    library,
    solve,
    sources,
    spec,
    use_two_multiprocessors,
)
from interpreted import Fault, Library, Problem, mostly_long, problem, without_bias

from convgen.engines import abi
from convgen.engines.implicit_gemm.gather import GatherSizes
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")

MODE = "tf32x3"
LIMIT = 2e-6
"""Of an error, relative to the largest result."""


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


# Specification, contraction, calls: batch, channels in and out, extents.
Given = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, tuple[Given, ...]]
ONE, ONE_OF_TAPS = GatherSizes((16,), (16,)), GatherSizes((), (16,))
CONV3D, VALID = spec("conv3d", 3, 1, 1), spec("conv2d", (1, 2))
PATCHES = spec("conv2d", (9, 10), (9, 10))
CASES: list[Case] = [
    # Windows of two taps.
    (VALID, "fprop", ((2, (40, 72), (6, 9)),)),
    # Folded tiles of 24 output channels; two K blocks; splits of K; channels that are padded.
    (
        CONV3D,
        "fprop",
        ((1, (24, 24), (3, 6, 9)), (1, (72, 130), (2, 3, 5)), (1, (9, 40), (2, 5, 3))),
    ),
    (CONV3D, "dgrad", ((1, (20, 40), (3, 6, 9)), (2, (72, 36), (2, 3, 5)))),
    (spec("conv3d", 3, 1, (7, 1, 1)), "fprop", ((1, (40, 24), (2, 6, 9)),)),
    # Slabs that a pack has split: strides, and phases with several taps, one, and none.
    (spec("conv2d", 3, 2, 1), "fprop", ((3, (64, 72), (19, 13)), (1, (17, 24), (5, 6)))),
    (spec("conv2d", 3, 2, 1), "dgrad", ((2, (72, 40), (8, 13)),)),
    (spec("conv3d", 3, 2, 1), "fprop", ((1, (40, 24), (5, 6, 7)),)),
    (spec("conv2d", (1, 4), (3, 2), (0, 1), dilation=(1, 2)), "dgrad", ((2, (20, 36), (10, 13)),)),
    (spec("conv_transpose1d", 8, 4, 2), "dgrad", ((2, (72, 40), (37,)),)),
    # One tap.
    (spec("conv2d", 1, groups=2), "fprop", ((3, (80, 72), (8, 13)),)),
    (spec("conv2d", 1), "dgrad", ((3, (64, 72), (19, 13)), (2, (101, 72), (16, 20)))),
    (
        spec("conv2d", (3, 2), 1, 1, dilation=(1, 2), groups=2),
        "dgrad",
        ((2, (64, 256), (9, 13)), (2, (128, 128), (4, 8))),
    ),
    (spec("conv1d", 7, 1, 3), "fprop", ((2, (64, 40), (300,)), (2, (33, 200), (77,)))),
    (spec("conv1d", 3, 1, 2, dilation=2), "dgrad", ((2, (64, 40), (300,)),)),
    (PATCHES, "fprop", ((2, (3, 24), (21, 34)), (1, (41, 24), (19, 53)))),
    (PATCHES, "dgrad", ((2, (3, 24), (21, 34)), (1, (5, 40), (18, 31)))),
]


def name_of(case: object) -> str:
    assert isinstance(case, tuple)
    return f"{case[0].name}-{case[1]}"


def error(given: Problem) -> float:
    """The largest, over the largest result."""
    difference = (given.result.double() - given.reference).abs().max()
    return float(difference / given.reference.abs().max())


@pytest.mark.parametrize("case", mostly_long([(case,) for case in CASES], 0), ids=name_of)
def test_every_layout_is_as_accurate_as_fp32(case: Case) -> None:
    of, contraction, calls = case
    sizes = GatherSizes((8,), (8,)) if of is VALID else None
    for batch, channels, extents in calls:
        for index, layout in enumerate(LAYOUTS):
            given = problem(
                of, contraction, MODE, extents, batch=batch, channels=channels, bias=index < 2
            )
            solve(library(of, contraction, MODE, sizes), given, layout)
            assert error(given) < LIMIT, (channels, layout)


def valid(fine: torch.Tensor, weight: torch.Tensor) -> Problem:
    """VALID's fprop, of which no window meets padding."""
    given = problem(VALID, "fprop", MODE, (6, 9), batch=2, channels=(40, 72), bias=False)
    given.operands["fine"].copy_(fine)
    given.operands["weight"].copy_(weight)
    given.reference.copy_(without_bias(VALID, "fprop", given.operands))
    return given


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    given = problem(VALID, "fprop", MODE, (6, 9), batch=2, channels=(40, 72))
    return given.operands["fine"], given.operands["weight"]


@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_infinities_and_nans_are_what_they_are_in_fp32(layout: tuple[str, ...]) -> None:
    """With values that TF32 holds, whose lower parts are zero; and what rounds to an infinity."""
    loaded = library(VALID, "fprop", MODE, GatherSizes((8,), (8,)))
    fine, weight = operands()
    weight[:24] = weight[:24].sign()
    weight[24:48] *= 1e30
    weight[:, 0] = weight[:, 0].sign() / 4
    fine[0, 3, 0, 2, 3], fine[1, 39, 0, 5, 8] = torch.inf, -torch.inf
    fine[0, 7, 0, 0, 0], fine[1, 0, 0, 0, 5] = torch.nan, 3.4028e38
    weight[70, 5, 0, 0, 1] = torch.inf
    given = valid(fine, weight)
    solve(loaded, given, layout)
    expected = given.reference.float()
    assert expected.isinf().any()
    assert torch.equal(given.result.isnan(), expected.isnan())
    assert torch.equal(given.result.isinf(), expected.isinf())
    assert torch.equal(given.result.sign()[expected.isinf()], expected.sign()[expected.isinf()])
    # Values that round to an infinity have TF32's bits.
    others = expected.abs() < 1e20
    difference = (given.result.double() - given.reference)[others].abs()
    assert float((difference / given.reference[others].abs().amax()).max()) < LIMIT


def test_constants_spread_magnitudes_and_large_biases() -> None:
    loaded = library(VALID, "fprop", MODE, GatherSizes((8,), (8,)))
    fine, weight = operands()
    for values in (0.1, 1 + 2.0**-11 + 2.0**-12, 1e-40, 7.3e-39):
        given = valid(torch.full_like(fine, values), torch.full_like(weight, 0.7))
        solve(loaded, given, LAST)
        # The lower part of a denormal is lost: tensor cores read no bit of it.
        lost = 80 * 0.7 * 2.0**-137 / float(given.reference.max())
        assert error(given) < max(LIMIT, lost), values
    given = valid(fine.abs(), weight.abs())
    solve(loaded, given, ())
    assert error(given) < LIMIT
    scale = 10.0 ** torch.linspace(-18, 18, 40).view(1, 40, 1, 1, 1)
    given = valid(fine * scale, weight / scale)
    solve(loaded, given, ())
    assert error(given) < LIMIT
    given = problem(VALID, "fprop", MODE, (6, 9), batch=1, channels=(40, 72))
    given.operands["bias"].fill_(1e6)
    given.reference.copy_(without_bias(VALID, "fprop", given.operands) + 1e6)
    solve(loaded, given, ())
    assert error(given) < LIMIT


@pytest.mark.long
def test_long_sums_of_one_sign_stay_accurate() -> None:
    """Sums leave the tensor cores, which truncate, after each tap."""
    given = problem(CONV3D, "fprop", MODE, (2, 3, 5), channels=(256, 24), bias=False)
    for name, value in (("fine", 0.1), ("weight", 0.7)):
        given.operands[name].fill_(value)
    given.reference.copy_(without_bias(CONV3D, "fprop", given.operands))
    solve(library(CONV3D, "fprop", MODE, ONE), given, LAST)
    assert error(given) < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_stays_in_its_windows(layout: tuple[str, ...]) -> None:
    """Folded tiles multiply what they do not read by zero, which makes NaNs: they begin again."""
    given = problem(CONV3D, "fprop", MODE, (5, 6, 9), batch=1, channels=(24, 24))
    clean = given.reference.clone()
    given.operands["fine"][0, 7, 2, 3, 4] = torch.nan
    given.operands["fine"][0, 3, 0, 0, 0] = torch.inf
    solve(library(CONV3D, "fprop", MODE, ONE), given, layout)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[:, :, 1:4, 2:5, 3:6] = reached[:, :, :2, :2, :2] = True
    result = given.result.double()
    assert not result[reached].isfinite().any()
    assert result[:, :, :1, :1, :1].isinf().all()
    assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < LIMIT


def test_calls_pay_where_products_fill_the_rows() -> None:
    loaded = library(VALID, "fprop", MODE, GatherSizes((8,), (8,)))
    for channels, layout, pays in ((256, 7, True), (3, 7, False), (3, 0, False)):
        numbers = [2, channels, channels, 1, 128, 127, 1, 128, 128]
        call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *numbers, layout)
        expected = loaded.expected_ms(f"convgen_fprop_{MODE}_implicit_gemm", call)
        assert (expected > 0) == pays, channels


# ---- Bugs -----------------------------------------------------------------------------------

BUGS: Mapping[str, Bug] = {
    "no fence behind split slabs": (
        "kernel",
        "      bulk_fence();\n",
        "      if (!PLANTED) bulk_fence();\n",
        r"reads shared memory, by the asynchronous proxy, that thread .* without bulk_fence\(\)",
    ),
    "slabs multiplied before they are split": (
        "kernel",
        "{t.rounds ? shared.slab_rounded : shared.slab_full, shared.slab_empty};",
        "{t.rounds && !PLANTED ? shared.slab_rounded : shared.slab_full, shared.slab_empty};",
        r"race on shared memory: it reads|writes shared memory that products|nobody wrote",
    ),
    "lower parts of positions elsewhere": (
        "kernel",
        "{x, x.moved(stage_bytes / PARTS)}",
        "{x, x.moved(PLANTED ? 0 : stage_bytes / PARTS)}",
        "differ",
    ),
    "lower parts of weights elsewhere": (
        "kernel",
        "at_tap + part * t.lower_tap);",
        "at_tap + part * !PLANTED * t.lower_tap);",
        "differ",
    ),
    "weights released too early": (
        "kernel",
        "            const Operand x = positions.moved(",
        "            if (PLANTED && lane == 0) weight_ring.consumer_release(weight.index);\n"
        "            const Operand x = positions.moved(",
        r"still read|race on shared memory|arrivals",
    ),
    "sums read before they are there": (
        "split",
        "  wgmma_wait<0>();\n",
        "  if (!PLANTED) wgmma_wait<0>();\n",
        r"still read|products|differ",
    ),
    "a rest that is left out": (
        "split",
        "  return {upper, x - upper};\n",
        "  return {upper, PLANTED ? 0.0f : x - upper};\n",
        "differ",
    ),
    "fewer bytes than the boxes have": (
        "kernel",
        "ring.producer_acquire(at, stage_bytes);",
        "ring.producer_acquire(at, stage_bytes - 128 * PLANTED);",
        r"deadlock: .* arrivals and -128 bytes are missing",
    ),
}


@cache
def buggy() -> Library:
    files = sources(CONV3D, "fprop", MODE, ONE)
    return compile_with_bugs("buggy_split", files, f"fprop_{MODE}.cu", BUGS.values())


@pytest.mark.long
@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_a_planted_bug_is_caught(bug: str) -> None:
    loaded = buggy()
    loaded("plant", [*BUGS, bug].index(bug) + 1 if bug != "none" else 0)
    given = problem(CONV3D, "fprop", MODE, (4, 9, 9), batch=2, channels=(72, 40))
    message = ""
    try:
        solve(loaded, given, LAST)
    except Fault as fault:
        message = str(fault)
    if not error(given) < LIMIT:
        message += " the results differ"
    if bug == "none":
        assert not message
    else:
        assert re.search(BUGS[bug][3], message), message
