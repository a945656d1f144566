"""The implicit GEMM's kernels for GPUs since sm_80 on the CPU: results, and bugs put into them.

They are the sources that nvcc compiles, but for the tile: of several a call takes one, and Hopper's
kernels, which these units have besides, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import pytest
import torch
from implicit_gemms import (
    LAST,
    LAYOUTS,
    MULTISTAGE_TILES,
    Bug,
    compile_with_bugs,
    multistage_sources,
    solve,
    spec,
    use_two_multiprocessors,
)
from interpreted import Fault, Library, Problem, compile_interpreted, problem

from convgen.engines import abi
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


LARGEST, SMALLEST = MULTISTAGE_TILES[0], MULTISTAGE_TILES[-1]

CONV3D, CONV2D, CONV1D = (spec(f"conv{n}d", 3, 1, 1) for n in (3, 2, 1))
STRIDED = spec("conv2d", 3, 2, 1)


@cache
def library(of: ConvSpec, contraction: str, mode: str, tile: str = "") -> Library:
    """By default with a tile that suits its tests: the smallest, or where its choice is tested."""
    tile = tile or (LARGEST if (of, contraction, mode) == CASES[0][:3] else SMALLEST)
    files = multistage_sources(of, contraction, mode, tile)
    return Library(compile_interpreted(of.name, files, "checked", architecture="80"))


# Specification, contraction, mode, calls: batch, channels in and out, extents.
Call = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, str, tuple[Call, ...]]
CASES: list[Case] = [
    # Samples that begin within a tile; results that leave one by one, or 16 bytes of channels.
    (CONV3D, "fprop", "bf16tc", ((2, (40, 72), (3, 5, 9)),)),
    # Phases of one, two and four taps, of inputs that are rounded where they are multiplied.
    (STRIDED, "dgrad", "tf32", ((2, (20, 36), (9, 12)),)),
]
MORE_CASES: list[Case] = [
    (CONV3D, "fprop", "f16tc", ((1, (32, 64), (4, 8, 8)), (3, (100, 130), (2, 3, 5)))),
    (CONV3D, "fprop", "tf32", ((2, (40, 24), (5, 6, 9)), (1, (9, 130), (2, 3, 5)))),
    (CONV3D, "dgrad", "bf16tc", ((2, (40, 24), (5, 6, 9)), (1, (72, 130), (2, 4, 8)))),
    (CONV3D, "dgrad", "tf32", ((1, (20, 40), (3, 6, 9)),)),
    (CONV2D, "fprop", "bf16tc", ((2, (17, 9), (5, 33)), (2, (64, 264), (16, 16)))),
    (CONV1D, "dgrad", "f16tc", ((3, (40, 136), (30,)),)),
    # Strides, dilation, paddings of all sizes, kernels of all shapes; groups.
    (STRIDED, "fprop", "bf16tc", ((3, (64, 72), (19, 13)),)),
    (spec("conv3d", 3, 2, 1, dilation=2), "fprop", "tf32", ((2, (32, 24), (9, 7, 8)),)),
    (spec("conv2d", 1), "fprop", "f16tc", ((3, (64, 72), (19, 13)), (2, (40, 32), (8, 8)))),
    (spec("conv2d", 1), "dgrad", "bf16tc", ((3, (64, 72), (19, 13)),)),
    (spec("conv3d", (1, 2, 5), 1, (7, 1, 1)), "fprop", "tf32", ((1, (40, 24), (2, 6, 9)),)),
    (spec("conv1d", 41, 4, 20, groups=2), "fprop", "bf16tc", ((2, (64, 48), (300,)),)),
    (spec("conv1d", 7, 1, 9, dilation=3), "dgrad", "bf16tc", ((2, (64, 40), (300,)),)),
    (
        spec("conv2d", (3, 2), 1, 1, dilation=(1, 2), groups=2),
        "dgrad",
        "bf16tc",
        ((2, (80, 256), (9, 13)), (2, (128, 48), (4, 8))),
    ),
    (spec("conv2d", 3, 1, 1, groups=3), "fprop", "tf32", ((2, (51, 60), (9, 13)),)),
    (spec("conv_transpose3d", 3, 1, 1), "fprop", "bf16tc", ((1, (32, 48), (5, 8, 8)),)),
    # Phases: with several taps, one, and none; results that are transposed behind the products.
    (STRIDED, "dgrad", "bf16tc", ((2, (72, 40), (8, 13)), (1, (40, 24), (5, 6)))),
    (spec("conv_transpose3d", 2, 2), "dgrad", "f16tc", ((2, (80, 48), (2, 5, 9)),)),
    (spec("conv_transpose3d", 3, 2, 1, 1), "dgrad", "tf32", ((1, (24, 40), (2, 5, 9)),)),
    (
        spec("conv2d", (1, 4), (3, 2), (0, 1), dilation=(1, 2)),
        "dgrad",
        "tf32",
        ((2, (20, 36), (10, 13)),),
    ),
    (spec("conv1d", 16, 8, 4, groups=2), "dgrad", "bf16tc", ((2, (96, 64), (100,)),)),
    (spec("conv2d", 1, 2), "dgrad", "bf16tc", ((2, (40, 24), (9, 12)),)),
]


def name_of(case: object) -> str:
    return f"{case[0].name}-{case[1]}-{case[2]}" if isinstance(case, tuple) else str(case)


def check(case: Case, tile: str = "") -> None:
    of, contraction, mode, calls = case
    for batch, channels, extents in calls:
        for index, layout in enumerate(LAYOUTS):
            given = problem(
                of, contraction, mode, extents, batch=batch, channels=channels, bias=index < 2
            )
            solve(library(of, contraction, mode, tile), given, layout)
            given.check()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_agrees_with_float64(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", MORE_CASES, ids=name_of)
def test_all_convolutions_agree_with_float64(case: Case) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("tile", MULTISTAGE_TILES[:-1])
@pytest.mark.parametrize("mode", ["bf16tc", "tf32"])
def test_all_tiles_agree_with_float64(tile: str, mode: str) -> None:
    check((CONV3D, "fprop", mode, ((3, (40, 136), (3, 8, 8)), (1, (32, 72), (3, 5, 7)))), tile)


def finite_elsewhere(given: Problem, reached: torch.Tensor, clean: torch.Tensor) -> None:
    result = given.result.double()
    assert not result[reached].isfinite().any()
    assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-2


@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_stays_in_its_windows(layout: tuple[str, ...]) -> None:
    given = problem(CONV3D, "fprop", "bf16tc", (5, 6, 9), batch=1, channels=(24, 24))
    clean = given.reference.clone()
    given.operands["fine"][0, 7, 2, 3, 4] = torch.nan
    given.operands["fine"][0, 3, 0, 0, 0] = torch.inf
    solve(library(CONV3D, "fprop", "bf16tc"), given, layout)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[:, :, 1:4, 2:5, 3:6] = reached[:, :, :2, :2, :2] = True
    finite_elsewhere(given, reached, clean)


def test_a_nan_stays_in_the_phases_that_meet_it() -> None:
    given = problem(STRIDED, "dgrad", "tf32", (9, 12), batch=2, channels=(40, 24))
    clean = given.reference.clone()
    given.operands["coarse"][1, 7, 0, 2, 3] = torch.nan
    given.operands["coarse"][0, 3, 0, 0, 0] = torch.inf
    solve(library(STRIDED, "dgrad", "tf32"), given, LAST)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[1, :, 0, 3:6, 5:8] = reached[0, :, 0, :2, :2] = True
    finite_elsewhere(given, reached, clean)


@pytest.mark.long
def test_tf32_is_rounded_to_nearest() -> None:
    """Values three quarters of TF32's last place above 1: truncated, all of them would be 1."""
    for layout in ((), LAST):
        given = problem(CONV3D, "dgrad", "tf32", (2, 3, 5), channels=(36, 72), bias=False)
        for name in ("coarse", "weight"):
            given.operands[name].fill_(1 + 0.75 * 2.0**-10)
        solve(library(CONV3D, "dgrad", "tf32"), given, layout)
        middle = float(given.result[0, 0, 0, 1, 2])
        assert middle == pytest.approx(72 * 18 * (1 + 2.0**-10) ** 2, rel=1e-5)


# ---- Choice ---------------------------------------------------------------------------------


def expected(loaded: Library, symbol: str, numbers: list[int], layout: int) -> float:
    call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *numbers, layout)
    return loaded.expected_ms(f"{symbol}_implicit_gemm", call)


def test_calls_of_many_channels_and_positions_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch, channels, extents of coarse and fine; contiguous, and channels_last."""
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "108")
    loaded = library(CONV3D, "fprop", "bf16tc")
    for channels, extent, layout, pays in (
        (256, 64, 0, True),
        (256, 64, 7, True),
        (48, 64, 0, False),
        (16, 64, 7, False),
        (256, 8, 7, False),  # which leaves multiprocessors without work
    ):
        numbers = [1, channels, channels, *(extent,) * 6]
        found = expected(loaded, "convgen_fprop_bf16tc", numbers, layout) > 0
        assert found == pays, (channels, extent, layout)


# ---- Bugs -----------------------------------------------------------------------------------

BUGS: Mapping[str, Bug] = {
    "a stage multiplied before it has landed": (
        "multistage",
        "        copy_wait<STAGES - 2>();\n        __syncthreads();\n        if (unit",
        "        PLANTED ? copy_wait<STAGES - 1>() : copy_wait<STAGES - 2>();\n"
        "        __syncthreads();\n        if (unit",
        r"reads shared memory that (nobody wrote|an asynchronous copy)",
    ),
    "a stage filled while others multiply it": (
        "multistage",
        "if (++write == STAGES) write = 0;",
        "if (PLANTED) write = (read + 1) % STAGES; else if (++write == STAGES) write = 0;",
        r"race on shared memory|shared memory that an asynchronous copy",
    ),
    "no barrier between copies and products": (
        "multistage",
        "        __syncthreads();\n        if (unit + 1 < units) {",
        "        if (!PLANTED) __syncthreads();\n        if (unit + 1 < units) {",
        r"race on shared memory|reads shared memory that (nobody wrote|an asynchronous copy)",
    ),
    "positions beside the input": (
        "multistage",
        "if (i < count && input >= 0 && input < extent)",
        "if (i < count && input >= 0 && input < extent + 9 * PLANTED)",
        r"reads out of bounds of",
    ),
    "weights behind the last channel": (
        "multistage",
        "exists && i * STEP < channels);",
        "exists && (PLANTED || i * STEP < channels));",
        r"reads out of bounds of weight",
    ),
    "less shared memory than the stages take": (
        "multistage_host",
        "          grid, threads, SHARED_BYTES, call_.device, call_.stream, s, out, from, by);",
        "          grid, threads, SHARED_BYTES - 64 * PLANTED, call_.device, call_.stream, s, out, "
        "from, by);",
        r"shared memory",
    ),
    "16 bytes at a place of eight": (
        "multistage_host",
        "      if (elements == widest) out.vector = widest;",
        "      if (PLANTED || elements == widest) out.vector = widest;",
        r"16 bytes|unaligned|misaligned|out of bounds",
    ),
    "another kernel's results before it has ended": (
        "multistage",
        "  await_earlier_kernel();\n",
        "  if (!PLANTED) await_earlier_kernel();\n",
        r"before await_earlier_kernel\(\): the launch before writes it",
    ),
}


@cache
def buggy() -> Library:
    files = multistage_sources(CONV3D, "fprop", "bf16tc", SMALLEST)
    return compile_with_bugs("bugs", files, "fprop_bf16tc.cu", BUGS.values(), "80")


@pytest.mark.long
@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_found(name: str) -> None:
    loaded = buggy()
    packed = name.startswith("another")
    # 40 channels leave in eights, 36 do not.
    channels = (40, 36 if name.startswith("16 bytes") else 40)
    given = problem(CONV3D, "fprop", "bf16tc", (3, 5, 9), batch=2, channels=channels)
    layout = () if packed else LAST
    loaded("plant", 0)
    solve(loaded, given, layout)
    given.check()
    loaded("plant", list(BUGS).index(name) + 1)
    try:
        with pytest.raises(Fault, match=BUGS[name][3]):
            solve(loaded, given, layout)
    finally:
        loaded("plant", 0)
