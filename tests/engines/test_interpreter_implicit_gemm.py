"""The implicit GEMM's kernels for Hopper on the CPU: results against float64, bugs put into them.

They are the sources that nvcc compiles, to the byte, but for what a bug changes.
"""

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
from interpreted import Fault, Library, Problem, compile_interpreted, mostly_long, problem
from torch import Tensor

from convgen.engines import abi
from convgen.engines.implicit_gemm.gather import GatherSizes
from convgen.engines.implicit_gemm.wgrad import WgradSizes
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache", "settings")


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_two_multiprocessors(patch)
        yield


CONV3D, CONV2D = spec("conv3d", 3, 1, 1), spec("conv2d", 3, 1, 1)
FULL = spec("conv3d", (3, 2, 2))
POINT, STRIDED = spec("conv2d", 1), spec("conv2d", 3, 2, 1)
GROUPS = spec("conv2d", 3, 1, 1, groups=2)

# Specification, contraction, mode, calls: batch, channels in and out, extents.
Call = tuple[int, tuple[int, int], tuple[int, ...]]
Case = tuple[ConvSpec, str, str, tuple[Call, ...]]
CASES: list[Case] = [
    # Folded tiles of 24 output channels; two K blocks; splits of K; channels that are padded.
    (
        CONV3D,
        "fprop",
        "bf16tc",
        ((1, (24, 24), (3, 6, 9)), (1, (72, 130), (2, 3, 5)), (1, (9, 40), (2, 5, 3))),
    ),
    (CONV3D, "dgrad", "tf32", ((1, (20, 40), (3, 6, 9)), (2, (72, 36), (2, 3, 5)))),
    # A thread block whose second consumer has no channels, now and then.
    (CONV2D, "fprop", "bf16tc", ((1, (24, 192), (16, 8)),)),
    # Planes of padding alone, which are passed over: of one consumer, of both.
    (FULL, "dgrad", "bf16tc", ((1, (72, 130), (5, 4, 6)), (1, (24, 40), (6, 5, 9)))),
    # Blocks of 64 and of 32 channels; last tiles that end with the lines.
    (CONV3D, "wgrad", "bf16tc", ((2, (40, 24), (2, 9, 11)), (1, (72, 100), (1, 8, 17)))),
    # Rows of positions: of a sample and more of them, fewer than a tile has, a padded weight; and
    # too few for a row's bytes.
    (
        POINT,
        "fprop",
        "bf16tc",
        ((3, (72, 40), (8, 13)), (3, (17, 130), (4, 4)), (1, (32, 24), (3, 5))),
    ),
    # Phases, one of them with a single tap, of lines of either parity.
    (STRIDED, "dgrad", "bf16tc", ((2, (72, 40), (8, 13)), (1, (136, 130), (70, 33)))),
    # A slab for each residue of the stride: of both consumers' lines, of one's.
    (
        STRIDED,
        "fprop",
        "tf32",
        ((2, (36, 40), (19, 13)), (1, (20, 130), (40, 30)), (1, (9, 40), (70, 7))),
    ),
]
MORE_CASES: list[Case] = [
    # Planes of one tile of 8 x 8; many channels of few positions.
    (CONV3D, "fprop", "bf16tc", ((2, (136, 72), (4, 8, 8)),)),
    (spec("conv1d", 3, 1, 1), "dgrad", "bf16tc", ((3, (40, 520), (10,)),)),
    (CONV3D, "fprop", "tf32", ((2, (40, 24), (5, 6, 9)), (1, (100, 130), (2, 3, 5)))),
    (CONV3D, "dgrad", "f16tc", ((1, (24, 40), (5, 6, 9)), (1, (72, 64), (2, 9, 17)))),
    (CONV2D, "fprop", "f16tc", ((2, (64, 72), (19, 13)), (1, (17, 9), (5, 33)))),
    (STRIDED, "fprop", "bf16tc", ((3, (64, 72), (19, 13)), (1, (40, 130), (70, 40)))),
    (spec("conv3d", 3, 2, 1), "fprop", "bf16tc", ((2, (72, 40), (5, 19, 13)),)),
    (spec("conv3d", 3, (1, 2, 1), 1), "fprop", "f16tc", ((2, (72, 200), (5, 19, 13)),)),
    # Strides and dilations with common divisors, and without: residues that no tap meets.
    (spec("conv2d", 3, 2, 1, dilation=2), "fprop", "tf32", ((2, (64, 24), (19, 13)),)),
    (
        spec("conv2d", 7, (2, 3), 3, dilation=(1, 2), groups=2),
        "fprop",
        "f16tc",
        ((2, (64, 48), (39, 33)),),
    ),
    (
        spec("conv2d", (5, 4), (4, 2), 2, dilation=(2, 3)),
        "fprop",
        "bf16tc",
        ((1, (40, 72), (45, 33)),),
    ),
    # Lines whose boxes are longer than TMA's.
    (spec("conv1d", 5, 2, 2), "fprop", "bf16tc", ((2, (40, 24), (739,)), (1, (72, 130), (100,)))),
    (spec("conv1d", 10, 5), "fprop", "tf32", ((2, (40, 24), (1739,)),)),
    (spec("conv2d", 1), "dgrad", "f16tc", ((3, (64, 72), (19, 13)), (2, (100, 72), (16, 20)))),
    # Outputs that meet nothing but padding; taps that are a plane apart.
    (spec("conv3d", 3, 1, (7, 1, 1)), "fprop", "tf32", ((1, (40, 24), (2, 6, 9)),)),
    (
        spec("conv3d", 3, 1, (6, 1, 1), dilation=(2, 1, 1)),
        "fprop",
        "f16tc",
        ((1, (40, 72), (3, 6, 9)),),
    ),
    (spec("conv3d", 1, groups=2), "fprop", "f16tc", ((2, (64, 96), (3, 8, 11)),)),
    (spec("conv3d", 1, groups=2), "dgrad", "bf16tc", ((2, (40, 160), (3, 8, 11)),)),
    (spec("conv2d", 3, 1, 1, groups=2), "fprop", "tf32", ((2, (64, 40), (9, 13)),)),
    (
        spec("conv2d", (3, 2), 1, 1, dilation=(1, 2), groups=2),
        "dgrad",
        "bf16tc",
        ((2, (64, 256), (9, 13)), (2, (128, 128), (4, 8))),
    ),
    (spec("conv3d", 3, 1, 2, dilation=(2, 1, 1)), "fprop", "bf16tc", ((2, (48, 40), (5, 4, 9)),)),
    # Phases: with several taps, one, and none; blocks of K that are no whole ones; planes.
    (spec("conv2d", 3, 2, 1), "dgrad", "f16tc", ((2, (72, 40), (8, 13)), (1, (200, 24), (9, 20)))),
    (spec("conv_transpose3d", 2, 2), "dgrad", "f16tc", ((2, (80, 48), (2, 5, 9)),)),
    (spec("conv_transpose3d", 3, 2, 1, 1), "dgrad", "tf32", ((1, (24, 40), (2, 5, 9)),)),
    (
        spec("conv2d", (1, 4), (3, 2), (0, 1), dilation=(1, 2)),
        "dgrad",
        "tf32",
        ((2, (20, 36), (10, 13)),),
    ),
    (spec("conv1d", 16, 8, 4, groups=2), "dgrad", "bf16tc", ((2, (96, 64), (100,)),)),
    # Lines that are transposed behind the products, of channels that TMA does not store; bias.
    (spec("conv_transpose1d", 8, 4, 2), "dgrad", "bf16tc", ((2, (72, 40), (37,)),)),
    (spec("conv_transpose2d", 4, 2, 1, 1), "dgrad", "f16tc", ((3, (24, 21), (5, 6)),)),
    (spec("conv2d", 1, 2), "dgrad", "bf16tc", ((2, (40, 24), (9, 12)),)),
    (STRIDED, "dgrad", "bf16tc", ((1, (40, 24), (5, 6)),)),
    (spec("conv_transpose3d", 4, 2, 1), "dgrad", "bf16tc", ((2, (40, 130), (3, 9, 20)),)),
    (spec("conv2d", 5, (2, 3), 2, dilation=(3, 2)), "dgrad", "f16tc", ((2, (40, 24), (39, 33)),)),
    (spec("conv_transpose1d", 8, 4, 2), "dgrad", "tf32", ((1, (40, 72), (400,)),)),
    (spec("conv1d", 14, 7), "fprop", "bf16tc", ((2, (40, 24), (2400,)),)),
    # Weights whose rows of eight end with a group, and do not.
    (GROUPS, "dgrad", "tf32", ((1, (64, 48), (9, 13)), (1, (40, 48), (5, 8)))),
    (spec("conv1d", 7, 1, 3), "fprop", "bf16tc", ((2, (64, 40), (300,)), (2, (32, 200), (77,)))),
    (spec("conv1d", 3, 1, 2, dilation=2), "dgrad", "tf32", ((2, (64, 40), (300,)),)),
    (spec("conv2d", 3, 1, 1, groups=2), "wgrad", "f16tc", ((2, (40, 136), (17, 9)),)),
    (spec("conv2d", (2, 5), 1, 2, dilation=(1, 2)), "wgrad", "bf16tc", ((2, (24, 40), (9, 25)),)),
    (spec("conv1d", 7, 1, 9, dilation=3), "wgrad", "bf16tc", ((2, (64, 40), (300,)),)),
    (spec("conv_transpose3d", 3, 1, 1), "dgrad", "bf16tc", ((1, (32, 48), (5, 8, 8)),)),
    (spec("conv_transpose2d", 4, 2, 1), "fprop", "f16tc", ((2, (40, 24), (7, 8)),)),
]


def name_of(case: object) -> str:
    assert isinstance(case, tuple)
    return f"{case[0].name}-{case[1]}-{case[2]}"


# Compiled sooner than all sizes.
ONE_SIZE = GatherSizes((16,), (16,))
ONE_SIZE_OF_TAPS = GatherSizes((), (16,))
ONE_SIZE_OF_WGRAD = WgradSizes((8,))


def check(case: Case, schedule: object = None) -> None:
    of, contraction, mode, calls = case
    for batch, channels, extents in calls:
        for index, layout in enumerate(LAYOUTS):
            given = problem(
                of, contraction, mode, extents, batch=batch, channels=channels, bias=index < 2
            )
            solve(library(of, contraction, mode, schedule), given, layout)
            given.check()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_layout_agrees_with_float64(case: Case) -> None:
    sizes = ONE_SIZE_OF_TAPS if case[0] == POINT else ONE_SIZE
    *what, calls = case
    check((*what, calls[:1]), ONE_SIZE_OF_WGRAD if case[1] == "wgrad" else sizes)


@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=name_of)
def test_all_sizes_and_convolutions_agree_with_float64(case: Case) -> None:
    check(case)


ORDERS = (0, 1, 2)
"""Of threads and of copies that land: see CONVGEN_INTERPRET_ORDER."""


@pytest.mark.long
def test_copies_land_and_warps_go_on_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded and single planes, whose consumers pass over slabs of each other's."""
    of, contraction, mode, _ = CASES[0]
    for order in ORDERS:
        monkeypatch.setenv("CONVGEN_INTERPRET_ORDER", str(order))
        for channels, extents in (((72, 24), (3, 6, 9)), ((72, 130), (2, 3, 5))):
            given = problem(of, contraction, mode, extents, channels=channels)
            solve(library(of, contraction, mode, ONE_SIZE), given, LAST)
            given.check()


def test_groups_that_end_before_a_consumers_channels() -> None:
    """64 channels of a group are one consumer's; the other's would be those of the next group."""
    given = problem(GROUPS, "fprop", "bf16tc", (32, 8), channels=(128, 128))
    sizes = GatherSizes((32,), (16,))
    solve(library(GROUPS, "fprop", "bf16tc", sizes), given, LAST)
    given.check()


def test_buffers_of_a_consumer_that_has_no_channels_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    given = problem(CONV2D, "fprop", "bf16tc", (16, 8), channels=(24, 192))
    solve(library(CONV2D, "fprop", "bf16tc", GatherSizes((16,), (32,))), given, LAST)
    given.check()


def check_reach(given: Problem, clean: Tensor, reached: Tensor) -> None:
    """Results are not finite where they are ``reached``, and elsewhere those of clean operands."""
    result = given.result.double()
    assert not result[reached].isfinite().any()
    assert float((result - clean)[~reached].norm() / clean[~reached].norm()) < 1e-2


@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_stays_in_its_windows(layout: tuple[str, ...]) -> None:
    """Folded tiles multiply what they do not read by zero, which makes NaNs: they begin again."""
    of, contraction, mode, _ = CASES[0]
    given = problem(of, contraction, mode, (5, 6, 9), batch=1, channels=(24, 24))
    clean = given.reference.clone()
    given.operands["fine"][0, 7, 2, 3, 4] = torch.nan
    given.operands["fine"][0, 3, 0, 0, 0] = torch.inf
    solve(library(of, contraction, mode, ONE_SIZE), given, layout)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[:, :, 1:4, 2:5, 3:6] = reached[:, :, :2, :2, :2] = True
    check_reach(given, clean, reached)


def test_a_kernel_of_one_tap_reads_contiguous_tensors_as_they_lie() -> None:
    """Without a workspace; and what is not finite stays at its position."""
    contraction, mode = "fprop", "bf16tc"
    given = problem(POINT, contraction, mode, (8, 13), batch=2, channels=(72, 40))
    loaded = library(POINT, contraction, mode, ONE_SIZE_OF_TAPS)
    numbers = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *given.numbers, 0)
    assert loaded.workspace_bytes(f"{given.symbol}_implicit_gemm", numbers) == 0
    clean = given.reference.clone()
    given.operands["fine"][1, 7, 0, 2, 3] = torch.nan
    given.operands["fine"][0, 71, 0, 7, 12] = torch.inf
    solve(loaded, given, ())
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[1, :, 0, 2, 3] = reached[0, :, 0, 7, 12] = True
    check_reach(given, clean, reached)


@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_stays_in_the_residues_that_meet_it(layout: tuple[str, ...]) -> None:
    given = problem(STRIDED, "fprop", "tf32", (21, 30), batch=2, channels=(36, 24))
    clean = given.reference.clone()
    given.operands["fine"][1, 7, 0, 4, 8] = torch.nan
    given.operands["fine"][0, 3, 0, 7, 13] = torch.inf
    solve(library(STRIDED, "fprop", "tf32", ONE_SIZE), given, layout)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[1, :, 0, 2, 4] = reached[0, :, 0, 3:5, 6:8] = True
    check_reach(given, clean, reached)


@pytest.mark.parametrize("layout", [(), LAST], ids=["contiguous", "channels_last"])
def test_a_nan_stays_in_the_phases_that_meet_it(layout: tuple[str, ...]) -> None:
    given = problem(STRIDED, "dgrad", "bf16tc", (9, 12), batch=2, channels=(40, 24))
    clean = given.reference.clone()
    given.operands["coarse"][1, 7, 0, 2, 3] = torch.nan
    given.operands["coarse"][0, 3, 0, 0, 0] = torch.inf
    solve(library(STRIDED, "dgrad", "bf16tc", ONE_SIZE), given, layout)
    reached = torch.zeros(clean.shape, dtype=torch.bool)
    reached[1, :, 0, 3:6, 5:8] = reached[0, :, 0, :2, :2] = True
    check_reach(given, clean, reached)


def test_phases_pay_where_products_take_longer_than_packs_or_transpositions() -> None:
    loaded = library(STRIDED, "dgrad", "bf16tc", ONE_SIZE_OF_TAPS)
    for channels, pays in ((256, True), (16, False)):
        # Batch, channels, extents of coarse and fine.
        numbers = [2, channels, channels, 1, 64, 64, 1, 128, 128]
        for layout in (0, 7):
            call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *numbers, layout)
            expected = loaded.expected_ms("convgen_dgrad_bf16tc_implicit_gemm", call)
            assert (expected > 0) == pays


def test_tf32_is_rounded_to_nearest() -> None:
    """Values three quarters of TF32's last place above 1: truncated, all of them would be 1."""
    of, contraction, mode, _ = CASES[1]
    for layout in ((), LAST):
        given = problem(of, contraction, mode, (2, 3, 5), channels=(36, 72), bias=False)
        for name in ("coarse", "weight"):
            given.operands[name].fill_(1 + 0.75 * 2.0**-10)
        solve(library(of, contraction, mode, ONE_SIZE), given, layout)
        middle = float(given.result[0, 0, 0, 1, 2])
        assert middle == pytest.approx(72 * 18 * (1 + 2.0**-10) ** 2, rel=1e-5)


def test_phases_of_inputs_that_no_cache_holds() -> None:
    kept = "(RATES.level2_capacity_bytes / 2 / input_bytes)"
    files = sources(STRIDED, "dgrad", "bf16tc", ONE_SIZE_OF_TAPS)
    assert files["implicit_gemm/call.cuh"].count(kept) == 1
    files["implicit_gemm/call.cuh"] = files["implicit_gemm/call.cuh"].replace(
        kept, "(1.0 / 2 / input_bytes)"
    )
    loaded = Library(compile_interpreted("phases", files, "checked", architecture="90a"))
    given = problem(STRIDED, "dgrad", "bf16tc", (37, 22), batch=2, channels=(72, 40))
    solve(loaded, given, LAST)
    given.check()


# ---- Bugs -----------------------------------------------------------------------------------

STILL_READ = "copies into shared memory that products or a TMA store of thread .* still read"

BUGS: Mapping[str, Bug] = {
    "a wrong pitch": (
        "kernel",
        "    return Operand(slab, Slab::PITCH);\n",
        "    return Operand(slab, Slab::PITCH + 40 * PLANTED);\n",
        r"reads shared memory that (nobody wrote|an asynchronous copy)|memory: it reads 16 bytes",
    ),
    "weights released too early": (
        "kernel",
        "          wgmma_wait<1>();\n",
        "          if (PLANTED) wgmma_wait<2>(); else wgmma_wait<1>();\n",
        STILL_READ,
    ),
    "slabs released too early": (
        "kernel",
        "        slab_ring.consumer_wait(slab);\n",
        "        slab_ring.consumer_wait(slab);\n"
        "        if (PLANTED && lane == 0) slab_ring.consumer_release(slab.index);\n",
        STILL_READ,
    ),
    "a stage filled before it is empty": (
        "tiles",
        "    mbarrier_wait(&empty[at.index], at.phase ^ 1);\n",
        "    if (!PLANTED) mbarrier_wait(&empty[at.index], at.phase ^ 1);\n",
        r"race on shared memory|copies into shared memory that|beyond the 1 arrivals",
    ),
    "more stages filled than there are": (
        "kernel",
        "first.n);\n          }\n          at.advance(1, t.slab_stages);\n",
        "first.n);\n          }\n          at.advance(1, t.slab_stages + PLANTED);\n",
        r"on memory that is no mbarrier",
    ),
    "no fence before a store": (
        "epilogue",
        "    bulk_fence();\n",
        "    if (!PLANTED) bulk_fence();\n",
        r"reads shared memory, by the asynchronous proxy, that thread .* without bulk_fence\(\)",
    ),
    "a box stored before all have written it": (
        "epilogue",
        "    named_barrier_sync(barrier, WARPGROUP);\n    if (thread == 0) {",
        "    if (!PLANTED) named_barrier_sync(barrier, WARPGROUP);\n    if (thread == 0) {",
        r"nobody wrote|race on shared memory",
    ),
    "a stored buffer used again too early": (
        "epilogue",
        "if (thread == 0) tma_store_wait_read<1>();",
        "if (thread == 0) PLANTED ? tma_store_wait_read<2>() : tma_store_wait_read<1>();",
        "writes shared memory that products or a TMA store of thread .* still read",
    ),
    "stores that nobody waits for": (
        "kernel",
        "if (threadIdx.x % WARPGROUP == 0) tma_store_wait();",
        "if (threadIdx.x % WARPGROUP == 0 && !PLANTED) tma_store_wait();",
        r"it ended before its store .*: tma_store_wait is missing",
    ),
    "a box larger than the barrier expects": (
        "kernel",
        "ring.producer_acquire(at, stage_bytes);",
        "ring.producer_acquire(at, stage_bytes - 128 * PLANTED);",
        r"deadlock: .* arrivals and -128 bytes are missing",
    ),
    "slabs at no multiple of 128 bytes": (
        "kernel",
        "dynamic + aligned_offset(dynamic, sizeof(SharedStorage));",
        "dynamic + aligned_offset(dynamic, sizeof(SharedStorage)) + 16 * PLANTED;",
        r"tma_load .* its address is a multiple of 128 bytes",
    ),
    "barriers that TMA does not know of": (
        "kernel",
        "      mbarrier_fence();\n",
        "      if (!PLANTED) mbarrier_fence();\n",
        r"tma_load .*mbarrier_fence\(\) is missing",
    ),
    "sums read before they are there": (
        "kernel",
        "    wgmma_wait<0>();\n",
        "    if (!PLANTED) wgmma_wait<0>();\n",
        STILL_READ,
    ),
    "a staged tile overwritten too early": (
        "kernel",
        "        mbarrier_wait(&shared.staged_empty[consumer], staged_phase);\n",
        "        if (!PLANTED) mbarrier_wait(&shared.staged_empty[consumer], staged_phase);\n",
        r"race on shared memory: it writes|beyond the 4 arrivals",
    ),
    "registers that are never free": (
        "kernel",
        "      warpgroup_reg_dealloc<PRODUCER_REGISTERS>();\n",
        "      if (PLANTED) warpgroup_reg_dealloc<PRODUCER_REGISTERS + 8>();\n"
        "      if (!PLANTED) warpgroup_reg_dealloc<PRODUCER_REGISTERS>();\n",
        r"deadlock: .* at warpgroup_reg_alloc<224> with 168 registers for each, while \d+ are free",
    ),
    "another kernel's results before it has ended": (
        "kernel",
        "    await_earlier_kernel();\n",
        "    if (!PLANTED) await_earlier_kernel();\n",
        r"before await_earlier_kernel\(\): the launch before writes it",
    ),
    "a map of an earlier call's tensor": (
        "maps",
        "  return known ? replace_address(map, at) : cudaSuccess;\n",
        "  return known && !PLANTED ? replace_address(map, at) : cudaSuccess;\n",
        r"reads \d+ bytes at 0x|out of bounds of",
    ),
    "a box beyond the weights": (
        "host",
        "w.extent[1] = packed_weight_rows();",
        "w.extent[1] = packed_weight_rows() + PLANTED;",
        r"reads out of bounds of \w+: 128 bytes at offset",
    ),
}
BUGS_OF_FLOATS: Mapping[str, Bug] = {
    "no fence behind rounded slabs": (
        "kernel",
        "      bulk_fence();\n",
        "      if (!PLANTED) bulk_fence();\n",
        r"reads shared memory, by the asynchronous proxy, that thread .* without bulk_fence\(\)",
    ),
    "slabs multiplied before they are rounded": (
        "kernel",
        "{t.rounds ? shared.slab_rounded : shared.slab_full, shared.slab_empty};",
        "{t.rounds && !PLANTED ? shared.slab_rounded : shared.slab_full, shared.slab_empty};",
        r"race on shared memory: it reads|writes shared memory that products",
    ),
    "a slab announced before all of it is rounded": (
        "kernel",
        "      __syncwarp();\n      if (thread % 32 == 0) mbarrier_arrive(&rounded",
        "      if (!PLANTED) __syncwarp();\n      if (thread % 32 == 0) mbarrier_arrive(&rounded",
        r"race on shared memory|writes shared memory that products",
    ),
}


@cache
def buggy(mode: str) -> Library:
    """CONV3D's fprop."""
    files = sources(CONV3D, "fprop", mode, ONE_SIZE)
    return compile_with_bugs("buggy", files, f"fprop_{mode}.cu", bugs_of(mode).values())


def bugs_of(mode: str) -> Mapping[str, Bug]:
    return BUGS_OF_FLOATS if mode == "tf32" else BUGS


@pytest.mark.parametrize(
    ("mode", "bug"),
    [("bf16tc", bug) for bug in ("none", *bugs_of("bf16tc"))]
    + mostly_long([("tf32", bug) for bug in ("none", *bugs_of("tf32"))]),
)
def test_a_planted_bug_is_caught(mode: str, bug: str) -> None:
    loaded = buggy(mode)
    number = [*bugs_of(mode), bug].index(bug) + 1 if bug != "none" else 0
    layout = () if "staged" in bug else LAST
    given = problem(CONV3D, "fprop", mode, (4, 9, 9), batch=2, channels=(72, 40))
    loaded("plant", 0)
    kept = solve(loaded, given, layout) if "earlier call" in bug else {}
    loaded("plant", number)
    if bug == "none":
        solve(loaded, given, layout)
        given.check()
        return
    with pytest.raises(Fault, match=bugs_of(mode)[bug][3]) as caught:
        solve(loaded, given, layout)
    del kept  # whose memory no other tensor could have
    message = str(caught.value)
    assert re.match(
        r"kernel implicit_gemm_kernel<.*>, block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", message
    )
    assert re.search(r"\(\w+\.cuh:\d+", message)
