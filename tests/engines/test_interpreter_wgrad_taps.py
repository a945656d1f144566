"""wgrad a tap at a time, for Hopper, on the CPU: results against float64, bugs put into it."""

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
from interpreted import Fault, Library, mostly_long, problem, without_bias

from convgen.engines import abi
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
POINT, STRIDED, STEPS = spec("conv2d", 1), spec("conv2d", 3, 2, 1), spec("conv2d", 1, 2)
CASES: list[Case] = [
    # Rows of positions, a sample's last one cut off; several blocks of channels; fewer than a row.
    (POINT, "bf16tc", ((3, (72, 40), (8, 13)), (2, (160, 200), (4, 4)), (1, (64, 24), (16, 20)))),
    # Floats, also of lines and channels that are no multiples of four, which are packed; of more
    # channels than a thread block has.
    (
        POINT,
        "tf32",
        (
            (3, (72, 40), (8, 13)),
            (2, (100, 36), (4, 4)),
            (2, (33, 170), (5, 7)),
            (2, (32, 30), (8, 8)),
        ),
    ),
    # Boxes of 28 and of 20 positions: less than the rows of a block that is turned.
    (STEPS, "tf32", ((3, (72, 40), (7, 13)), (2, (36, 100), (9, 8)))),
    # Blocks of positions that end with the output, divide it, or are smaller than their rows.
    (STRIDED, "bf16tc", ((2, (160, 72), (9, 20)), (3, (32, 24), (10, 7)), (1, (24, 40), (9, 9)))),
]
MORE_CASES: list[Case] = [
    (spec("conv2d", 1, 2), "f16tc", ((3, (72, 40), (7, 13)),)),
    (spec("conv3d", (3, 1, 1), 1, (1, 0, 0), groups=2), "bf16tc", ((2, (80, 48), (4, 5, 9)),)),
    (spec("conv_transpose2d", 2, 2), "f16tc", ((2, (80, 48), (9, 9)),)),
    (spec("conv_transpose3d", 3, 2, 1, 1), "bf16tc", ((1, (24, 40), (3, 9, 8)),)),
    (spec("conv1d", 5, 3, 4, dilation=2, groups=2), "bf16tc", ((2, (64, 32), (200,)),)),
    # Boxes of 49, 25, 54 and 60 positions: less than rows of 64, several planes and samples.
    (STRIDED, "bf16tc", ((3, (40, 24), (14, 14)), (7, (24, 40), (9, 9)))),
    (spec("conv3d", 3, 2, 1), "f16tc", ((2, (40, 24), (11, 12, 11)), (5, (24, 72), (5, 6, 4)))),
    # Channels that are padded, where they lie side by side, too; lines of odd lengths.
    (STRIDED, "f16tc", ((2, (21, 139), (9, 13)), (1, (70, 8), (16, 17)))),
    (spec("conv1d", 3, 2), "bf16tc", ((3, (40, 72), (101,)),)),
    (spec("conv3d", 1, groups=3), "tf32", ((2, (60, 48), (2, 4, 6)), (2, (60, 48), (1, 4, 4)))),
    (spec("conv3d", 1, (1, 2, 3), groups=2), "tf32", ((3, (72, 80), (3, 5, 8)),)),
    (spec("conv_transpose2d", 1, 2, 0, 1), "tf32", ((2, (36, 70), (5, 9)),)),
    (spec("conv2d", 1, 1, 1), "tf32", ((2, (36, 70), (5, 9)),)),
    (spec("conv1d", 1), "tf32", ((2, (304, 264), (72,)), (1, (20, 24), (7,)))),
    (spec("conv1d", 1), "f16tc", ((2, (304, 264), (72,)),)),
]
ONE_SIZE = TapWgradSizes((64,))


def name_of(case: object) -> str:
    assert isinstance(case, tuple)
    return f"{case[0].name}-{case[1]}"


ALL_LAYOUTS = [*LAYOUTS, ("coarse", "fine")]


def check(case: Case, schedule: TapWgradSizes | None = None) -> None:
    of, mode, calls = case
    for batch, channels, extents in calls:
        for layout in ALL_LAYOUTS:
            given = problem(of, "wgrad", mode, extents, batch=batch, channels=channels)
            solve(library(of, "wgrad", mode, schedule), given, layout)
            given.check()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_agrees_with_float64(case: Case) -> None:
    # Two chunks of columns, of one tap and the next.
    check(case, TapWgradSizes((128,)) if case[0] is STRIDED else ONE_SIZE)


@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=name_of)
def test_all_sizes_and_convolutions_agree_with_float64(case: Case) -> None:
    check(case)


def test_a_layout_without_kernels_is_refused() -> None:
    """Groups of no multiple of 16 bytes: of channels side by side, and of lines of none either."""
    of = spec("conv2d", 1, groups=2)
    for layout, extents in ((LAST, (8, 8)), (("coarse",), (8, 8)), ((), (3, 5))):
        given = problem(of, "wgrad", "tf32", extents, channels=(36, 36))
        with pytest.raises(Fault, match=r"\(-1\)"):
            solve(library(of, "wgrad", "tf32", ONE_SIZE), given, layout)


@pytest.mark.parametrize(
    ("of", "mode", "call", "is_whole"),
    [
        # Lines of weights of a multiple of 16 bytes, and of less; rows and columns beyond them.
        (POINT, "bf16tc", (2, (72, 200), (8, 8)), True),
        (POINT, "bf16tc", (2, (25, 40), (8, 8)), True),
        (POINT, "tf32", (1, (28, 40), (4, 8)), True),
        (POINT, "tf32", (1, (27, 150), (4, 8)), True),
        (POINT, "bf16tc", (2, (24, 40), (64, 16)), False),
        # Neighbouring taps of a contiguous weight, whose chunks begin with any tap.
        (STRIDED, "bf16tc", (1, (72, 136), (9, 9)), True),
        (STRIDED, "bf16tc", (2, (24, 40), (64, 47)), False),
    ],
    ids=str,
)
def test_whole_sums_are_stored_without_a_workspace(
    of: ConvSpec, mode: str, call: Call, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_whole:
        monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "10")
    batch, channels, extents = call
    schedule = TapWgradSizes((128,)) if of is STRIDED else ONE_SIZE
    loaded = library(of, "wgrad", mode, schedule)
    for layout in ((), LAST, ("coarse", "fine")):
        vector = 4 if mode == "tf32" else 8
        packs = any(count % vector for count in channels) if layout else of is STRIDED
        if packs:
            continue
        given = problem(of, "wgrad", mode, extents, batch=batch, channels=channels)
        flags = sum(abi.CHANNELS_LAST[name] for name in layout)
        numbers = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *given.numbers, flags)
        size = loaded.workspace_bytes(f"{given.symbol}_implicit_gemm", numbers)
        packs = of is STRIDED and not {"coarse", "fine"} <= set(layout)
        assert (size == 0) == (is_whole and not packs)
        solve(loaded, given, layout)
        given.check()


@pytest.mark.parametrize(
    ("of", "mode"),
    mostly_long([(STRIDED, "bf16tc"), (STEPS, "tf32"), (POINT, "bf16tc"), (POINT, "tf32")], 2),
)
def test_a_nan_reaches_the_taps_that_meet_it(of: ConvSpec, mode: str) -> None:
    """Positions beyond the output are multiplied, too: they must meet zeros that are no NaNs."""
    # Corners, the last line that is met, and beside where the last blocks begin.
    places = [(0, 0), (17, 35), (17, 0), (0, 35), (2, 34), (16, 14), (9, 31)]
    check_nan(of, (18, 36), 2, places, mode)


@pytest.mark.long
@pytest.mark.parametrize(
    ("of", "extents", "batch"),
    [
        (STRIDED, (8, 8), 1),
        pytest.param(STRIDED, (14, 10), 3, marks=pytest.mark.long),
        pytest.param(spec("conv3d", 3, 2, 1), (6, 8, 5), 2, marks=pytest.mark.long),
        pytest.param(spec("conv3d", (3, 1, 1), 1, (1, 0, 0)), (3, 3, 5), 3, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_nan_beside_a_small_output(of: ConvSpec, extents: tuple[int, ...], batch: int) -> None:
    """Blocks as large as an output, or that end with it: none reads beyond a tap's own elements."""
    check_nan(of, extents, batch, [(0,) * len(extents), tuple(e - 1 for e in extents)])


def check_nan(
    of: ConvSpec,
    extents: tuple[int, ...],
    batch: int,
    places: list[tuple[int, ...]],
    mode: str = "bf16tc",
) -> None:
    given = problem(of, "wgrad", mode, extents, batch=batch, channels=(24, 40))
    clean = given.reference.clone()
    ones = {name: torch.ones(t.shape, dtype=torch.float64) for name, t in given.operands.items()}
    for channel, place in enumerate(places):
        at = (batch - 1, channel, *(0,) * (3 - len(place)), *place)
        given.operands["fine"][at] = torch.nan
        ones["fine"][at] = 1e100
    reached = without_bias(of, "wgrad", ones) > 1e50
    assert reached.any()
    assert not reached.all()
    for layout in ALL_LAYOUTS:
        solve(library(of, "wgrad", mode, ONE_SIZE), given, layout)
        result = given.result.double()
        assert torch.equal(~result.isfinite(), reached)
        assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-2


def test_tf32_is_rounded_to_nearest() -> None:
    """Values three quarters of TF32's last place above 1: truncated, all of them would be 1."""
    given = problem(POINT, "wgrad", "tf32", (4, 5), channels=(36, 72))
    for name in ("coarse", "fine"):
        given.operands[name].fill_(1 + 0.75 * 2.0**-10)
    for layout in ((), LAST, ("fine",)):
        solve(library(POINT, "wgrad", "tf32", ONE_SIZE), given, layout)
        assert float(given.result[3, 5]) == pytest.approx(20 * (1 + 2.0**-10) ** 2, rel=1e-6)


# ---- Bugs -----------------------------------------------------------------------------------

STILL_READ = "copies into shared memory that products or a TMA store of thread .* still read"
BUGS: Mapping[str, Bug] = {
    "a stage released too early": (
        "wgrad_taps",
        "      wgmma_wait<1>();\n",
        "      if (PLANTED) wgmma_wait<2>(); else wgmma_wait<1>();\n",
        STILL_READ,
    ),
    "sums read before they are there": (
        "wgrad_taps",
        "    wgmma_wait<0>();\n",
        "    if (!PLANTED) wgmma_wait<0>();\n",
        STILL_READ + "|it ended before its products",
    ),
    "no fence behind rounded stages": (
        "tap_floats",
        "      bulk_fence();\n      __syncwarp();\n",
        "      if (!PLANTED) bulk_fence();\n      __syncwarp();\n",
        r"reads shared memory, by the asynchronous proxy, that thread .* without bulk_fence\(\)",
    ),
    "stages multiplied before they are rounded": (
        "wgrad_taps",
        "{ROUNDS ? shared.rounded : shared.full, shared.empty};",
        "{ROUNDS && !PLANTED ? shared.rounded : shared.full, shared.empty};",
        r"race on shared memory: it reads|writes shared memory that products",
    ),
    "fewer bytes than the boxes have": (
        "tap_floats",
        "ring.producer_acquire(at, rows * ROW_BYTES);",
        "ring.producer_acquire(at, rows * ROW_BYTES - 128 * PLANTED);",
        r"deadlock: .* arrivals and -128 bytes are missing",
    ),
    "registers that are never free": (
        "wgrad_taps",
        "      warpgroup_reg_alloc<CONSUMER_REGISTERS>();\n",
        "      if (PLANTED) warpgroup_reg_alloc<CONSUMER_REGISTERS + 8>();\n"
        "      if (!PLANTED) warpgroup_reg_alloc<CONSUMER_REGISTERS>();\n",
        r"deadlock: .* at warpgroup_reg_alloc<232> with 168 registers for each, while \d+ are free",
    ),
    "sums of two thread blocks in one place": (
        "wgrad_taps",
        "(int64_t{blockIdx.x} + index) * TAP_PARTIALS<COLUMNS> +\n",
        "(int64_t{blockIdx.x} * !PLANTED + index) * TAP_PARTIALS<COLUMNS> +\n",
        r"race on global memory|global memory that nobody wrote",
    ),
    "one thread block's sums left out": (
        "wgrad_taps",
        "for (int more = 1; more < count; ++more) {",
        "for (int more = 1 + PLANTED; more < count; ++more) {",
        "differ",
    ),
    "a block of channels too far": (
        "wgrad_taps_host",
        "FLOATS ? best_.tiling.fine_rows : best_.columns;",
        "FLOATS ? best_.tiling.fine_rows / (1 + PLANTED) : best_.columns;",
        r"deadlock: .* bytes are missing",
    ),
    "lanes that write a block before others have read it": (
        "tap_floats",
        "  }\n  __syncwarp();\n",
        "  }\n  if (!PLANTED) __syncwarp();\n",
        "race on shared memory",
    ),
    "vectors of a turned block in each other's place": (
        "tap_floats",
        "vectors[(to ^ (4 * square + i)) + 8 * i]",
        "vectors[(to ^ (4 * square + i) ^ PLANTED) + 8 * i]",
        "differ",
    ),
    "blocks that nobody loads or clears": (
        "wgrad_taps",
        "if (ROUNDS) clear_blocks",
        "if (ROUNDS && !PLANTED) clear_blocks",
        "reads shared memory that nobody wrote",
    ),
}


@cache
def buggy() -> Library:
    files = sources(POINT, "wgrad", "tf32", ONE_SIZE)
    return compile_with_bugs("buggy_taps", files, "wgrad_tf32.cu", BUGS.values())


@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_a_planted_bug_is_caught(bug: str) -> None:
    loaded = buggy()
    loaded("plant", [*BUGS, bug].index(bug) + 1 if bug != "none" else 0)
    given = problem(POINT, "wgrad", "tf32", (12, 25), batch=2, channels=(40, 72))
    message = ""
    # One tensor alone that is turned: the positions' order in both is the same otherwise.
    for layout in ((), LAST, ("fine",)):
        try:
            solve(loaded, given, layout)
        except Fault as fault:
            message += str(fault)
        if given.error() > 1e-2:
            message += " the results differ"
    if bug == "none":
        assert not message
        return
    assert re.search(BUGS[bug][3], message), message
