"""The CUDA engines' kernels, executed on the CPU: every access checked, results against float64.

These are the rendered sources that nvcc compiles, to the byte. The cases are chosen so that every
branch of the templates is rendered: see :func:`test_every_style_of_kernel_is_run`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import plans
import pytest
import torch
from engine_cases import CASES, CONV, MMA_CASES, UP, WGMMA_CASES, Case, spec
from interpreted import (
    LIMITS,
    Fault,
    Library,
    check_nonfinite,
    compile_interpreted,
    engine_sources,
    mostly_long,
    solve,
    solve_exactly,
)

from convgen.checking import interpret
from convgen.codegen.render import render_kernels
from convgen.engines.implicit_gemm.gather import GatherSizes
from convgen.spec.dtypes import DTYPES, MODES

pytestmark = pytest.mark.usefixtures("shared_cache")


# Every dtype and math mode, and every way of unrolling.
SMALL_CASES = [*(CASES[i] for i in (0, 2, 3, 4, 11, 15)), *(MMA_CASES[i] for i in range(4))]


@cache
def library(case: Case, mode: str, small: bool = False) -> Path:
    sources = engine_sources(case.spec, case.dtype, case.contractions, small=small)
    return compile_interpreted(case.stem, sources, mode)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_one_size_of_each_kernel_agrees_with_float64(case: Case) -> None:
    loaded = Library(library(case, "checked", small=True))
    for given in case.problems():
        solve(loaded, given)
        given.check()


@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES, *MMA_CASES], ids=str)
def test_checked_kernels_agree_with_float64(case: Case) -> None:
    loaded = Library(library(case, "checked"))
    for given in case.problems():
        solve(loaded, given)
        given.check()


@pytest.mark.parametrize("case", mostly_long(SMALL_CASES, 0, 3, -2, -1), ids=str)
def test_what_is_not_finite_comes_out_where_it_is_read(case: Case) -> None:
    loaded = Library(library(case, "checked", small=True))
    checked = set()
    for given in case.problems():
        if given.contraction not in {"bgrad", *checked}:
            checked.add(given.contraction)
            check_nonfinite(loaded, case.spec, given)


GATHERS = ("fprop", "dgrad")


def check_calls(loaded: Library, case: Case, contractions: tuple[str, ...] = GATHERS) -> None:
    """The case's calls of some contractions agree with float64."""
    for given in case.problems():
        if given.contraction in contractions:
            solve(loaded, given)
            given.check()


def by_warpgroups(
    case: Case, contractions: tuple[str, ...] = GATHERS, warpgroups: int = 2
) -> dict[str, str]:
    """Sources with enough channels per warp that warps multiply in warpgroups."""
    schedules = {}
    for contraction in contractions:
        default = plans.plan(case.spec, contraction, case.dtype).schedule
        if contraction == "wgrad":
            continue  # by warpgroups wherever it can be
        (rows, _), *_ = default.tiles
        schedules[contraction, case.dtype] = replace(
            default, tiles=((rows, 24),), warpgroups=warpgroups
        )
    return engine_sources(case.spec, case.dtype, contractions, schedules)


def compile_sm_90a(name: str, sources: dict[str, str]) -> Path:
    return compile_interpreted(name, sources, "checked", architecture="90a")


QUICK_GROUPS = (3, -2)
"""Of :data:`WGMMA_CASES`: both sizes of elements."""


@pytest.mark.parametrize("case", mostly_long(WGMMA_CASES, *QUICK_GROUPS), ids=str)
def test_warpgroups_agree_with_float64(case: Case) -> None:
    loaded = Library(compile_sm_90a(f"{case.spec.name}_{case.dtype}_90a", by_warpgroups(case)))
    check_calls(loaded, case)


# Three consumer warpgroups beside one of producers: by copies of elements and wide ones, with raw
# lines, with sums that leave the tensor cores, and several phases.
THREE_WARPGROUPS = [WGMMA_CASES[i] for i in (0, 2, 3, 4, 6, 9, -2)]


@pytest.mark.long
@pytest.mark.parametrize("case", THREE_WARPGROUPS, ids=str)
def test_three_warpgroups_agree_with_float64(case: Case) -> None:
    name = f"{case.spec.name}_{case.dtype}_three"
    loaded = Library(compile_sm_90a(name, by_warpgroups(case, warpgroups=3)))
    check_calls(loaded, case)


# Tiles as the input lies in memory: all modes, inputs with and without stride, lines of any length
# and place, scattered positions, phases, windows of planes and lines. (Case, style of unrolling.)
VECTORS = [
    (WGMMA_CASES[0], "taps"),
    (WGMMA_CASES[1], "plane"),
    (WGMMA_CASES[2], "taps"),
    (WGMMA_CASES[6], "taps"),
    (WGMMA_CASES[8], "slab"),
    (WGMMA_CASES[9], "taps"),
    (WGMMA_CASES[10], "plane"),
    (WGMMA_CASES[-1], "line"),
    (Case(spec("conv1d", 5, 2, 3), "bf16tc", ((2, (18, 9), (71,)), (1, (3, 4), (40,)))), "line"),
    (
        Case(
            spec(CONV, 3, 2, 1, dilation=2, groups=2),
            "f16tc",
            ((2, (22, 10), (7, 8, 33)), (1, (2, 4), (3, 5, 16))),
        ),
        "taps",
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "style", "architecture"),
    [(*given, a) for given in VECTORS for a in ("80", "90a")],
    ids=str,
)
def test_tiles_may_be_staged_as_the_input_lies_in_memory(
    case: Case, style: str, architecture: str
) -> None:
    schedules = {}
    for contraction in GATHERS:
        default = plans.plan(case.spec, contraction, case.dtype).schedule
        (rows, _), *_ = default.tiles
        schedules[contraction, case.dtype] = replace(
            default, unroll=style, tiles=((rows, 24), (1, 8)), vectors=True
        )
    sources = engine_sources(case.spec, case.dtype, GATHERS, schedules)
    name = f"{case.stem}_vectors_{architecture}"
    loaded = Library(compile_interpreted(name, sources, "checked", architecture=architecture))
    check_calls(loaded, case)


# Lanes with neighbouring positions: all modes, first columns that are even and odd, taps apart,
# phases, lines of odd lengths, aligned and not. (Case, style of unrolling.)
PAIRS = [
    (WGMMA_CASES[0], "taps"),
    (WGMMA_CASES[1], "slab"),
    (WGMMA_CASES[2], "taps"),
    (WGMMA_CASES[-2], "taps"),
    (
        Case(spec("conv2d", (2, 4), 1, (0, 3), dilation=(1, 2)), "tf32", ((1, (9, 17), (3, 67)),)),
        "line",
    ),
    (
        Case(spec(CONV, 3, 1, 1), "tf32", ((2, (9, 30), (4, 6, 16)), (1, (8, 8), (3, 5, 7)))),
        "plane",
    ),
    (Case(spec(UP, (3, 4, 5), 1, 2), "bf16tc", ((1, (18, 9), (4, 6, 32)),)), "taps"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "style", "architecture"),
    [(*given, a) for given in PAIRS for a in ("80", "90a")],
    ids=str,
)
def test_lanes_may_have_neighbouring_positions(case: Case, style: str, architecture: str) -> None:
    schedules = {}
    for contraction in GATHERS:
        default = plans.plan(case.spec, contraction, case.dtype)
        rows = min(default.schedule.tiles[0][0], 2)
        schedule = replace(default.schedule, unroll=style, tiles=((rows, 24), (1, 8)), pairs=True)
        if default.family.refusal(replace(default, schedule=schedule), ["90a"]) == "":
            schedules[contraction, case.dtype] = schedule
    assert schedules
    contractions = tuple(contraction for contraction, _ in schedules)
    sources = engine_sources(case.spec, case.dtype, contractions, schedules)
    name = f"{case.stem}_pairs_{architecture}"
    loaded = Library(compile_interpreted(name, sources, "checked", architecture=architecture))
    check_calls(loaded, case, contractions)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_buffers_may_be_released_by_mbarriers(architecture: str) -> None:
    """As compiled for racecheck, whose tool does not follow named barriers."""
    for case in (WGMMA_CASES[3], WGMMA_CASES[-2]):
        sources = by_warpgroups(case, (*GATHERS, "wgrad"))
        macro = "#define CONVGEN_RACECHECK\n"
        sources = {**sources, "releases.cuh": macro + sources["releases.cuh"]}
        name = f"{case.stem}_racecheck_{architecture}"
        loaded = Library(compile_interpreted(name, sources, "checked", architecture=architecture))
        check_calls(loaded, case, (*GATHERS, "wgrad"))


def test_products_that_nothing_waits_for_are_caught() -> None:
    case = WGMMA_CASES[-2]
    sources = by_warpgroups(case, ("dgrad",))
    file = "fragments.cuh"
    # Both the last column's wait and the one before sums are read.
    text = sources[file]
    ends = {"wgmma_wait<ONE ? 0 : 1>();": "wgmma_wait<1>();", "wgmma_wait<0>();": ""}
    for wait, left in ends.items():
        assert text.count(wait) == 1
        text = text.replace(wait, left)
    buggy = {**sources, file: text}
    loaded = Library(compile_sm_90a("buggy_wait", buggy))
    given = next(p for p in case.problems() if p.contraction == "dgrad")
    with pytest.raises(Fault, match=r"race on shared memory|wgmma_wait is missing"):
        solve(loaded, given)


SANITIZED = [*(CASES[i] for i in (4, 8)), *(MMA_CASES[i] for i in (6, 10))]


@pytest.mark.long
@pytest.mark.parametrize("case", SANITIZED, ids=str)
def test_sanitized_kernels_agree_with_float64(case: Case, tmp_path: Path) -> None:
    """Under AddressSanitizer and UBSan, with tensors of exactly their sizes."""
    problems = case.problems()
    solve_exactly(library(case, "address"), problems, tmp_path)
    for given in problems:
        given.check()


@pytest.mark.long
def test_all_modes_and_thread_counts_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimized: None
) -> None:
    """Compiled as users get it, with products fused with their sums."""
    case = CASES[0]
    sources = engine_sources(case.spec, case.dtype, case.contractions)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("CONVGEN_INTERPRET_THREADS", threads)
        for mode in ("plain", "checked", "address"):
            problems = case.problems()
            path = interpret.library(case.stem, sources, mode)
            if mode == "address":
                solve_exactly(path, problems, tmp_path)
            else:
                loaded = Library(path)
                for given in problems:
                    solve(loaded, given)
            results.append([given.result for given in problems])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.long
def test_small_gpus_cut_other_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 48 KiB of shared memory per block and one multiprocessor."""
    monkeypatch.setenv("CONVGEN_INTERPRET_SHARED_BYTES", str(48 * 1024))
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    case = CASES[0]
    case = Case(case.spec, case.dtype, ((2, (33, 17), (4, 5, 10)),))
    # A copy: the library remembers the limits that it has asked for.
    path = tmp_path / "small.so"
    path.write_bytes(library(case, "checked", small=True).read_bytes())
    loaded = Library(path)
    for given in case.problems():
        solve(loaded, given)
        given.check()


# Ways of unrolling that no default takes there: (style, rows, channels).
OTHER_SCHEDULES = [
    (Case(spec(CONV, (3, 5, 5)), "f32", ((1, (5, 9), (5, 7, 12)),)), "slab", 4, 8),
    (Case(spec(UP, 3, 2, 1, 1), "f32", ((2, (4, 5), (3, 4, 9)),)), "slab", 2, 4),
    (Case(spec(UP, (3, 5, 5)), "tf32", ((1, (9, 20), (7, 4, 12)),)), "slab", 4, 16),
    (Case(spec(CONV, (3, 3, 5), (2, 2, 1), 1), "tf32x3", ((1, (9, 7), (6, 7, 11)),)), "slab", 2, 8),
    (Case(spec(UP, (4, 3, 3), 2, 1, 1), "f16tc", ((1, (17, 9), (3, 4, 6)),)), "slab", 2, 8),
    (Case(spec(CONV, 3, 1, 1), "bf16tc", ((1, (18, 20), (8, 4, 9)),)), "taps", 6, 16),
    (Case(spec(UP, 3, 1, 1), "tf32", ((1, (8, 30), (7, 5, 9)),)), "taps", 6, 24),
]


@pytest.mark.parametrize(
    ("case", "style", "rows", "channels"), mostly_long(OTHER_SCHEDULES, 1), ids=str
)
def test_other_schedules_agree_with_float64(
    case: Case, style: str, rows: int, channels: int
) -> None:
    """What ``convgen tune`` may choose."""
    schedules = {}
    for contraction in ("fprop", "dgrad"):
        default = plans.plan(case.spec, contraction, case.dtype).schedule
        schedules[contraction, case.dtype] = (
            replace(default, unroll=style, tiles=((rows, channels),))
            if case.dtype in MODES
            else replace(default, unroll=style, rows=rows, channels=(channels,))
        )
    sources = engine_sources(case.spec, case.dtype, ("fprop", "dgrad"), schedules)
    loaded = Library(compile_interpreted(f"{case.stem}_{style}{rows}", sources, "checked"))
    check_calls(loaded, case)


ROWS_CASES = [
    # All taps; slabs, of phases. Calls take the tiles in turn.
    (Case(spec("conv2d", 3, 1, 1), "tf32", ((1, (9, 40), (9, 7)), (1, (33, 24), (5, 8)))), "taps"),
    (
        Case(
            spec(UP, 3, (2, 1, 2), 1), "tf32x3", ((1, (9, 16), (5, 4, 6)), (1, (5, 8), (4, 3, 5)))
        ),
        "slab",
    ),
    # Positions scattered over the plane, a line at a time, and a tap at a time.
    (Case(spec("conv1d", 5, 1, 2), "bf16tc", ((1, (9, 40), (70,)), (2, (48, 24), (33,)))), "line"),
    (
        Case(
            spec("conv_transpose1d", 40, 20, 10), "tf32", ((1, (9, 16), (23,)), (1, (8, 8), (9,)))
        ),
        "none",
    ),
]


def tiles_of(case: Case, style: str) -> dict[tuple[str, str], object]:
    """Schedules whose tiles have rows of their own for either number of channels of the calls."""
    tiles = ((1, 16), (2, 8)) if case.spec.transposed else ((2, 48), (3, 24))
    return {
        (contraction, case.dtype): replace(
            plans.plan(case.spec, contraction, case.dtype).schedule,
            unroll=style,
            tiles=tiles,
        )
        for contraction in GATHERS
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "style", "architecture"),
    [(*given, a) for given in ROWS_CASES for a in ("80", "90a")],
    ids=str,
)
def test_every_number_of_channels_has_rows_of_its_own(
    case: Case, style: str, architecture: str
) -> None:
    sources = engine_sources(case.spec, case.dtype, GATHERS, tiles_of(case, style))
    name = f"{case.stem}_rows_{architecture}"
    loaded = Library(compile_interpreted(name, sources, "checked", architecture=architecture))
    check_calls(loaded, case)


@pytest.mark.long
def test_a_call_takes_the_rows_of_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap that is wrong for one number of rows is wrong in the calls with its channels alone."""
    # Calls for which no other tile promises more: of fewer thread blocks, or with fewer of them.
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    calls = (1, (9, 40), (9, 7)), (1, (33, 24), (4, 8))
    case = Case(spec("conv2d", 3, 1, 1), "tf32", calls)
    schedule = plans.plan(case.spec, "fprop", case.dtype).schedule
    schedule = replace(schedule, unroll="taps", tiles=((3, 48), (2, 24)))
    sources = engine_sources(case.spec, case.dtype, ("fprop",), {("fprop", case.dtype): schedule})
    file = f"fprop_{case.dtype}.cu"
    for rows, wrong in (3, (True, False)), (2, (False, True)):
        before, after = sources[file].split(f"for 8 input words and {rows} rows.")
        assert "tile_offset<CHANNELS>(1)" in after
        buggy = before + after.replace("tile_offset<CHANNELS>(1)", "tile_offset<CHANNELS>(2)", 1)
        loaded = Library(
            compile_interpreted(f"buggy_rows_{rows}", {**sources, file: buggy}, "checked")
        )
        problems = [given for given in case.problems() if given.contraction == "fprop"]
        for given in problems:
            solve(loaded, given)
        assert tuple(given.error() > 100 * LIMITS[case.dtype] for given in problems) == wrong


def test_every_dtype_and_math_mode_is_run_by_make_test() -> None:
    assert {case.dtype for case in SMALL_CASES} == set(DTYPES) | set(MODES)
    assert {WGMMA_CASES[i].dtype for i in QUICK_GROUPS} == {"tf32", "bf16tc"}


def test_every_style_of_kernel_is_run() -> None:
    styles = set()
    for case in CASES:
        _, plans = render_kernels(case.spec, "cuda", [case.dtype])
        for plan in plans:
            # Those of the implicit GEMM are in test_interpreter_implicit_gemm.py.
            if plan.contraction == "wgrad" or isinstance(plan.schedule, GatherSizes):
                continue
            scattered = plan.schedule.row_axis == "scattered"
            styles.add((plan.contraction, plan.schedule.unroll, scattered))
    gathers = ("fprop", "dgrad")
    assert styles >= {(c, style, False) for c in gathers for style in ("taps", "plane")}
    assert styles >= {(c, "line", scattered) for c in gathers for scattered in (False, True)}
    assert styles >= {(c, "none", scattered) for c in gathers for scattered in (False, True)}
