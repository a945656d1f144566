"""wgrad in TF32 from packed quarters, for Hopper, on the CPU: float64, the model, planted bugs."""

from __future__ import annotations

import math
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
from interpreted import Fault, Library, mostly_long, problem, without_bias

from convgen.engines import abi
from convgen.engines.cost import H200
from convgen.engines.implicit_gemm.wgrad_quarters import (
    LINES,
    SPLIT_LINES,
    WGRAD_QUARTERS,
    QuarterSizes,
    TapColumns,
)
from convgen.engines.problem import Call
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


# Batch, channels in and out, extents.
Given = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, tuple[Given, ...]]
ONE, SPLIT = QuarterSizes((1,)), QuarterSizes((3,))
APART = spec("conv2d", 3, 2, 1, dilation=2, groups=2)
"""Taps two apart that meet every second position: residues share what they meet."""
CASES: list[Case] = [
    # Blocks of 32 fine channels, and of 64; coarse ones that fill no block.
    (APART, "tf32", ((2, (48, 40), (12, 9)), (1, (100, 72), (3, 20)))),
    (spec("conv3d", 3, 1, 1), "tf32", ((2, (40, 24), (2, 9, 11)), (1, (17, 136), (1, 3, 9)))),
    (spec("conv3d", 3, 1, 1), "tf32x3", ((2, (40, 24), (2, 9, 11)),)),
    (spec("conv2d", 3, 1, 1), "tf32x3", ((1, (72, 70), (12, 28)),)),
    # Consumers share positions, of W that is divided, or H.
    (spec("conv1d", 3, 1, 1), "tf32", ((2, (70, 24), (131,)), (1, (17, 33), (2,)))),
    (spec("conv3d", (3, 1, 1), 1, (1, 0, 0)), "tf32x3", ((1, (40, 24), (3, 30, 8)),)),
    (spec("conv1d", 7, 1, 9, dilation=3), "tf32", ((2, (40, 72), (150,)),)),
    (spec("conv1d", 16, 8, 4, groups=2), "tf32x3", ((2, (40, 48), (331,)),)),
    # Lines of taps in products of two and three, the last ones of which have fewer.
    (spec("conv2d", 4, 2, 1), "tf32", ((1, (80, 24), (19, 14)),)),
    (spec("conv2d", 7, 2, 3), "tf32", ((1, (40, 24), (29, 12)),)),
    (spec("conv2d", (2, 11)), "tf32x3", ((1, (20, 36), (12, 28)),)),
    (spec("conv2d", (1, 5), (1, 3), (0, 2), dilation=(1, 2)), "tf32", ((2, (40, 24), (6, 51)),)),
    (spec("conv2d", (4, 3), (3, 2), (1, 2), dilation=(3, 2)), "tf32x3", ((2, (40, 24), (26, 31)),)),
    (spec("conv_transpose3d", 3, 2, 1, 1), "tf32x3", ((1, (40, 24), (3, 9, 8)),)),
]


def name_of(case: object) -> str:
    assert isinstance(case, tuple)
    return f"{case[0].name}-{case[1]}"


def one_size(of: ConvSpec) -> QuarterSizes:
    return SPLIT if TapColumns.of(of.geometry).splits else ONE


@pytest.mark.parametrize("case", mostly_long(list(map(tuple, ([each] for each in CASES))), 0))
def test_values_agree_with_float64(case: Case) -> None:
    of, mode, calls = case
    for batch, channels, extents in calls:
        for layout in LAYOUTS:
            given = problem(of, "wgrad", mode, extents, batch=batch, channels=channels)
            solve(library(of, "wgrad", mode, one_size(of)), given, layout)
            given.check()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
@pytest.mark.parametrize("lines", [*LINES[:3], SPLIT_LINES[0]])
def test_every_size_agrees_with_float64(mode: str, lines: int) -> None:
    of, extents = (
        (spec("conv1d", 3, 1, 1), (431,))
        if lines == SPLIT_LINES[0]
        else (spec("conv2d", 3, 1, 1), (33, 19))
    )
    if lines not in WGRAD_QUARTERS.plan(of.geometry, "wgrad", mode).schedule.lines:
        pytest.skip("no kernel has this size")
    for channels in ((72, 24), (24, 72)):
        given = problem(of, "wgrad", mode, extents, batch=1, channels=channels)
        solve(library(of, "wgrad", mode, QuarterSizes((lines,))), given, ())
        given.check()


@pytest.mark.parametrize(("value", "layout"), [(torch.nan, ()), (torch.inf, LAST)])
def test_what_is_not_finite_reaches_the_taps_that_meet_it(
    value: float, layout: tuple[str, ...]
) -> None:
    """Units beyond the output are zeros, which meet elements that these taps do not."""
    extents = (12, 9)
    given = problem(APART, "wgrad", "tf32", extents, batch=1, channels=(40, 40))
    clean = given.reference.clone()
    # Corners, beside where the last units begin, and elements that no tap meets.
    places = [(0, 0), (11, 8), (11, 0), (0, 8), (5, 7), (10, 6), (9, 1)]
    ones = {name: torch.ones(t.shape, dtype=torch.float64) for name, t in given.operands.items()}
    for channel, (h, w) in enumerate(places):
        given.operands["fine"][0, channel, 0, h, w] = value
        ones["fine"][0, channel, 0, h, w] = 1e100
    reached = without_bias(APART, "wgrad", ones) > 1e50
    assert reached.any()
    assert not reached.all()
    solve(library(APART, "wgrad", "tf32", ONE), given, layout)
    result = given.result.double()
    assert torch.equal(~result.isfinite(), reached)
    assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-3


@pytest.mark.long
def test_sums_of_one_sign_stay_accurate() -> None:
    """Tensor cores truncate: sums leave them after each stage, and now and then to memory."""
    of = spec("conv1d", 3, 1, 1)
    given = problem(of, "wgrad", "tf32x3", (25600,), channels=(16, 16))
    for name in ("coarse", "fine"):
        given.operands[name].abs_()
    given.reference.copy_(without_bias(of, "wgrad", given.operands))
    solve(library(of, "wgrad", "tf32x3", SPLIT), given, ())
    assert given.error() < 3e-6


def test_results_are_the_same_from_run_to_run_and_rounded_to_nearest() -> None:
    """Values three quarters of TF32's last place above 1: truncated, all of them would be 1."""
    given = problem(APART, "wgrad", "tf32", (12, 9), channels=(48, 40))
    solve(library(APART, "wgrad", "tf32", ONE), given, ())
    first = given.result.clone()
    solve(library(APART, "wgrad", "tf32", ONE), given, ())
    assert torch.equal(first, given.result)
    for name in ("coarse", "fine"):
        given.operands[name].fill_(1 + 0.75 * 2.0**-10)
    solve(library(APART, "wgrad", "tf32", ONE), given, ())
    met = math.prod(given.operands["coarse"].shape[-2:])
    assert float(given.result[3, 5, 0, 1, 1]) == pytest.approx(met * (1 + 2.0**-10) ** 2, rel=1e-6)


LAYERS: dict[str, tuple[ConvSpec, Given]] = {
    "L1": (spec("conv3d", 3), (1, (256, 256), (6, 122, 182))),
    "L4": (spec("conv3d", 3, 1, 1), (2, (32, 32), (96, 96, 96))),
    "strided": (spec("conv3d", 3, 2, 1), (2, (64, 128), (64, 64, 64))),
    "vocoder": (spec("conv1d", 11, 1, 15, dilation=3), (8, (128, 128), (16384,))),
}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_model_expects_what_the_library_does(
    layer: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "132")
    of, (batch, channels, extents) = LAYERS[layer]
    plan = WGRAD_QUARTERS.plan(of.geometry, "wgrad", mode)
    lead = (1,) * (3 - of.ndim)
    coarse, fine = (*lead, *of.output_extents(extents)), (*lead, *extents)
    call = Call(batch, channels[1], channels[0], coarse, fine)  # type: ignore[arg-type]
    numbers = (batch, channels[1], channels[0], *coarse, *fine)
    packed = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(
        0, *numbers, sum(abi.CHANNELS_LAST.values())
    )
    loaded = library(of, "wgrad", mode)
    expected = loaded.expected_ms(f"convgen_wgrad_{mode}_implicit_gemm", packed)
    assert WGRAD_QUARTERS.predict(plan, call, H200).ms == pytest.approx(expected, rel=0.1)


# ---- Bugs -----------------------------------------------------------------------------------

STILL_READ = "copies into shared memory that products or a TMA store of thread .* still read"
BUGS: Mapping[str, Bug] = {
    "a stage released too early": (
        "wgrad_quarters",
        "        wgmma_wait<1>();\n",
        "        if (PLANTED) wgmma_wait<2>(); else wgmma_wait<1>();\n",
        STILL_READ,
    ),
    "fewer bytes than the boxes have": (
        "wgrad_quarters",
        "ring.producer_acquire(at, Stage::BYTES);",
        "ring.producer_acquire(at, Stage::BYTES - 128 * PLANTED);",
        r"deadlock: .* arrivals and -128 bytes are missing",
    ),
    "sums of two thread blocks in one place": (
        "wgrad_quarters",
        "(int64_t{blockIdx.x} + index) * Stage::PARTIALS +\n",
        "(int64_t{blockIdx.x} * !PLANTED + index) * Stage::PARTIALS +\n",
        r"race on global memory|global memory that nobody wrote",
    ),
    "one thread block's sums left out": (
        "wgrad",
        "last_cta[i] = t.cta_of(first + t.positions - 1);",
        "last_cta[i] = t.cta_of(first + t.positions - 1) - PLANTED;",
        "differ",
    ),
    "sums begun again that were not": (
        "wgrad_quarters",
        "const bool adds = unit > first && unit > pair_begin;",
        "const bool adds = PLANTED || (unit > first && unit > pair_begin);",
        "nobody wrote",
    ),
    "taps a unit too far": (
        "wgrad_quarters",
        "const int first_tap = kh * Stage::BOX_W",
        "const int first_tap = PLANTED + kh * Stage::BOX_W",
        r"differ|nobody wrote|out of bounds",
    ),
    "a line of taps too few": (
        "wgrad_quarters",
        "tile_h * Stage::TILE_H * Conv::STRIDE_H + kh,",
        "tile_h * Stage::TILE_H * Conv::STRIDE_H + kh - PLANTED,",
        "differ",
    ),
    "units of another residue": (
        "quarters",
        "return axis.quarter != 0 ? first : floor_mod(first, axis.residues);",
        "return axis.quarter != 0 || PLANTED ? first : floor_mod(first, axis.residues);",
        "differ",
    ),
    "packed before the kernel before has ended": (
        "quarters",
        "  await_earlier_kernel();\n",
        "  if (!PLANTED) await_earlier_kernel();\n",
        r"before await_earlier_kernel\(\)",
    ),
    "a box of too few lines": (
        "wgrad_quarters_host",
        "v.box[2] = Stage::BOX_H;",
        "v.box[2] = Stage::BOX_H - PLANTED;",
        r"deadlock: .* bytes are missing",
    ),
}


@cache
def buggy() -> Library:
    files = sources(APART, "wgrad", "tf32", ONE)
    return compile_with_bugs("buggy_quarters", files, "wgrad_tf32.cu", BUGS.values())


@pytest.mark.long
@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two pairs of blocks, of which each is several thread blocks'.
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "5")
    loaded = buggy()
    loaded("plant", [*BUGS, bug].index(bug) + 1 if bug != "none" else 0)
    given = problem(APART, "wgrad", "tf32", (15, 35), batch=2, channels=(48, 40))
    if bug == "none":
        solve(loaded, given, ())
        given.check()
        return
    message = ""
    try:
        solve(loaded, given, ())
    except Fault as fault:
        message = str(fault)
    if not given.error() < 1e-2:
        message += " the results differ"
    assert re.search(BUGS[bug][3], message), message
