"""The mma family's gathers, interpreted and checked: how they stage lines, and loads of words.

Lines that no wide access can copy pass through raw buffers in 16-byte vectors
(``templates/cuda/mma/staging.cuh``), or tiles are staged as the input lies in memory
(``vectors.cuh``). Where strides are even, lanes load words of two 16-bit inputs as they lie there
(``WordOrder`` in ``fragments.cuh``): which half of a word a line begins in follows from the
tensor's address and extents, and the weights are packed for it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import plans
import pytest
import torch
from interpreted import (
    LIMITS,
    Fault,
    Library,
    check_nonfinite,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    shifted,
    solve,
)
from interpreted import Problem as Given

from convgen.engines.gather.axes import gather_axes
from convgen.engines.gather.unroll import window_words
from convgen.engines.mma.fit import loads_words
from convgen.engines.problem import Problem
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache")

# ---- Staging --------------------------------------------------------------------------------

INPUT = {"fprop": "fine", "dgrad": "coarse"}
# Strides along W that are one, that make pairs of columns, and that do neither; with halos of a
# few columns, and of more than a vector.
SPECS = {
    1: ConvSpec("conv2d", 3, 1, 1),
    2: ConvSpec("conv3d", (3, 3, 4), 2, (1, 1, 11), dilation=(1, 1, 3)),
    3: ConvSpec("conv2d", (2, 3), (2, 3), 1, groups=2),
}
# Batch, channels in and out, extents: odd widths, with several chunks of channels, strips and
# tiles; widths below a vector; words and second channels that do not exist.
CALLS = {
    1: ((2, (41, 9), (7, 37)), (1, (3, 2), (2, 1)), (1, (17, 1), (3, 5))),
    2: ((2, (35, 9), (7, 5, 47)), (1, (3, 2), (2, 1, 2)), (1, (18, 1), (3, 4, 131))),
    3: ((2, (42, 6), (5, 67)), (1, (6, 2), (3, 3))),
}


def sources(
    stride: int, kind: str, contraction: str, architecture: str, vectors: bool = False
) -> dict[str, str]:
    """On sm_90a with so many channels that warpgroups multiply, beside two of producers."""
    plan = plans.plan(SPECS[stride], contraction, kind)
    rows, _ = plan.schedule.tiles[0]
    tiles = ((rows, 24 if architecture == "90a" else 8),)
    schedules = {(contraction, kind): replace(plan.schedule, tiles=tiles, vectors=vectors)}
    return engine_sources(SPECS[stride], kind, (contraction,), schedules)


@cache
def library(
    stride: int, kind: str, contraction: str, architecture: str, vectors: bool = False
) -> Path:
    files = sources(stride, kind, contraction, architecture, vectors)
    name = f"staging_{stride}_{contraction}_{kind}_{architecture}_{vectors}"
    if architecture == "90a":
        return compile_interpreted(name, files, "checked", architecture=architecture)
    return compile_interpreted(name, files, "checked")


def problems(stride: int, kind: str, contraction: str) -> list[Given]:
    return [
        problem(
            SPECS[stride], contraction, kind, extents, batch=batch, channels=channels, seed=seed
        )
        for seed, (batch, channels, extents) in enumerate(CALLS[stride])
    ]


UNALIGNED = [
    (*line, vectors, architecture)
    for line in (
        (1, "tf32", "dgrad"),
        (1, "bf16tc", "fprop"),
        (2, "tf32", "fprop"),
        (3, "tf32", "fprop"),
        (2, "bf16tc", "fprop"),
        (3, "f16tc", "fprop"),
    )
    for vectors in (False, True)
    for architecture in ("80", "90a")
]


@pytest.mark.parametrize(
    ("stride", "kind", "contraction", "vectors", "architecture"),
    mostly_long(UNALIGNED, 0, 18),
)
def test_unaligned_lines_agree_with_float64(
    stride: int,
    kind: str,
    contraction: str,
    vectors: bool,
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread block, whose copies run ahead from tile to tile; addresses of any alignment."""
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    path = tmp_path / "one.so"
    path.write_bytes(library(stride, kind, contraction, architecture, vectors).read_bytes())
    loaded = Library(path)
    for index, given in enumerate(problems(stride, kind, contraction)):
        name = INPUT[contraction]
        given.operands[name] = shifted(given.operands[name], (0, 3, 1)[index])
        solve(loaded, given)
        given.check()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tf32", "bf16tc"])
def test_small_buffers_hold_parts_of_planes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with so little shared memory that raw buffers hold one line each."""
    monkeypatch.setenv("CONVGEN_INTERPRET_SHARED_BYTES", str(50 * 1024))
    path = tmp_path / "small.so"
    path.write_bytes(library(2, kind, "fprop", "80").read_bytes())
    loaded = Library(path)
    given = problems(2, kind, "fprop")[0]
    solve(loaded, given)
    given.check()


@pytest.mark.parametrize(
    ("statement", "report"),
    [
        ("copy_wait<RAW_BUFFERS - 2>();", "asynchronous copy"),
        ("__syncwarp();  // all lanes' copies", "race on shared memory|asynchronous copy"),
    ],
)
def test_lines_that_are_moved_too_early_are_caught(statement: str, report: str) -> None:
    files = sources(2, "bf16tc", "fprop", "80")
    assert statement in files["staging.cuh"]
    text = files["staging.cuh"].replace(statement, statement.partition(";")[2])
    path = compile_interpreted("buggy_staging", {**files, "staging.cuh": text}, "checked")
    with pytest.raises(Fault, match=report):
        solve(Library(path), problems(2, "bf16tc", "fprop")[0])


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "kind"), [("80", "bf16tc"), ("90a", "tf32")])
def test_vectors_may_be_handed_over_by_mbarriers(architecture: str, kind: str) -> None:
    """As compiled for racecheck, which follows no named barrier at which a warp only arrives."""
    files = sources(2, kind, "fprop", architecture, vectors=True)
    files["releases.cuh"] = "#define CONVGEN_RACECHECK\n" + files["releases.cuh"]
    name = f"handed_over_{architecture}"
    loaded = Library(compile_interpreted(name, files, "checked", architecture=architecture))
    given = problems(2, kind, "fprop")[0]
    solve(loaded, given)
    given.check()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tf32", "bf16tc"])
def test_what_lies_beside_a_line_is_cleared(kind: str) -> None:
    """It is the end of the line before or the begin of the next, as a tile's columns hold it."""
    files = sources(2, kind, "fprop", "80", vectors=True)
    (unit,) = (name for name in files if name.startswith("fprop_"))
    statement = "vectors.clear_margins(s, producers);"
    assert statement in files[unit]
    text = files[unit].replace(statement, "")
    loaded = Library(compile_interpreted("buggy_clear", {**files, unit: text}, "checked"))
    given = problems(2, kind, "fprop")[0]
    solve(loaded, given)
    assert given.error() > 10 * LIMITS[kind]


def test_columns_that_are_cleared_before_all_have_landed_are_caught() -> None:
    """Others of the producer warpgroup have copied them."""
    files = sources(2, "bf16tc", "fprop", "80", vectors=True)
    unit = "fprop_bf16tc.cu"
    text = files[unit].replace(
        "named_barrier_sync(BARRIER_COPIED + turn_of_warpgroup", "if (false) (0"
    )
    assert text != files[unit]
    loaded = Library(compile_interpreted("buggy_meeting", {**files, unit: text}, "checked"))
    with pytest.raises(Fault, match=r"asynchronous copy|race on shared memory"):
        solve(loaded, problems(2, "bf16tc", "fprop")[0])


def test_vectors_that_nothing_waits_for_are_caught() -> None:
    files = sources(2, "bf16tc", "fprop", "80", vectors=True)
    unit = "fprop_bf16tc.cu"
    text = files[unit].replace("copy_wait<decltype(pending)::value>();", "")
    announced = files["fragments.cuh"].replace("copy_wait<PENDING>();", "")
    assert text != files[unit]
    assert announced != files["fragments.cuh"]
    files |= {unit: text, "fragments.cuh": announced}
    loaded = Library(compile_interpreted("buggy_vectors", files, "checked"))
    with pytest.raises(Fault, match="asynchronous copy"):
        solve(loaded, problems(2, "bf16tc", "fprop")[0])


# ---- Words of neighbours --------------------------------------------------------------------

CONV, UP = "conv3d", "conv_transpose3d"
# Specification, dtype, style of unrolling; batch, channels in and out, extents (of a transposed
# convolution's gradient: out and in). Odd and even numbers of lines, planes, channels and samples,
# so that lines begin in either half; 32 channels or more, which lanes share out in eights.
Calls = tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
WORDS: list[tuple[ConvSpec, str, str, Calls]] = [
    (
        ConvSpec(CONV, 3, 2, 1),
        "bf16tc",
        "slab",
        ((2, (32, 9), (5, 7, 19)), (1, (64, 24), (4, 6, 8)), (2, (7, 3), (3, 5, 5))),
    ),
    (ConvSpec(CONV, 3, 2, 1), "f16tc", "taps", ((3, (33, 9), (3, 3, 35)), (1, (16, 8), (4, 3, 9)))),
    (ConvSpec(UP, 4, 2, 1), "bf16tc", "plane", ((2, (9, 32), (2, 3, 5)), (1, (3, 5), (1, 1, 1)))),
    (
        ConvSpec(CONV, (2, 3, 5), (2, 4, 4), (0, 1, 2), dilation=(1, 1, 3), groups=2),
        "f16tc",
        "line",
        ((2, (18, 6), (5, 7, 39)), (1, (66, 2), (2, 3, 15))),
    ),
    (
        ConvSpec(CONV, (1, 1, 6), 2, (0, 0, 2)),
        "bf16tc",
        "line",
        ((2, (35, 4), (3, 5, 17)), (1, (32, 8), (1, 1, 41))),
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "architecture"),
    [(case, a) for case in WORDS for a in ("80", "90a")],
    ids=lambda value: value if isinstance(value, str) else f"{value[0].name}-{value[2]}",
)
def test_words_of_neighbours_agree_with_float64(
    case: tuple[ConvSpec, str, str, Calls], architecture: str
) -> None:
    spec, kind, style, calls = case
    default = plans.plan(spec, "fprop", kind).schedule
    rows = 1 if default.row_axis == "scattered" else 2
    tiles = ((rows, 24), (1, 8)) if architecture == "90a" else ((rows, 8),)
    schedule = replace(default, unroll=style, tiles=tiles, vectors=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    (unit,) = (name for name in files if name.startswith("fprop_"))
    assert "using Math = Neighbours<" in files[unit]
    name = f"words_{spec.name}_{kind}_{architecture}"
    loaded = Library(compile_interpreted(name, files, "checked", architecture=architecture))
    for seed, (batch, channels, extents) in enumerate(calls):
        given = problem(spec, "fprop", kind, extents, batch=batch, channels=channels, seed=seed)
        for elements in (0, 1, 6):
            given.operands["fine"] = shifted(given.operands["fine"], elements)
            solve(loaded, given)
            given.check()


@pytest.mark.long
def test_three_warpgroups_beside_one_producer_agree_with_float64() -> None:
    """A producer warpgroup alone tells of a buffer when the next one's copies are on their way."""
    spec, kind, style, calls = WORDS[0]
    default = plans.plan(spec, "fprop", kind).schedule
    schedule = replace(default, unroll=style, tiles=((2, 24),), warpgroups=3, vectors=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    loaded = Library(compile_interpreted("words_three", files, "checked", architecture="90a"))
    for seed, (batch, channels, extents) in enumerate(calls):
        given = problem(spec, "fprop", kind, extents, batch=batch, channels=channels, seed=seed)
        solve(loaded, given)
        given.check()


@pytest.mark.parametrize("extents", [(5, 7, 19), (4, 6, 18)])
@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("at", [slice(0, 1), slice(-2, None)], ids=["first", "last"])
def test_nan_at_an_end_of_a_line_stays_in_its_line(
    at: slice, elements: int, extents: tuple[int, int, int]
) -> None:
    """A word may hold it beside an end of the next line, or of the next sample."""
    spec, kind = ConvSpec(CONV, 3, 2, 1), "bf16tc"
    default = plans.plan(spec, "fprop", kind).schedule
    schedule = replace(default, unroll="slab", tiles=((2, 8),), vectors=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    loaded = Library(compile_interpreted("words_nan", files, "checked"))
    given = problem(spec, "fprop", kind, extents, batch=2, channels=(9, 4), seed=1)
    given.operands["fine"][0, ..., at] = torch.nan
    given.operands["fine"] = shifted(given.operands["fine"], elements)
    solve(loaded, given)
    # Position p reads columns 2p - 1 to 2p + 1; a word has one more on either side.
    columns = range(extents[2])[at]
    for p in range(given.result.shape[-1]):
        if {2 * p - 1, 2 * p, 2 * p + 1} & set(columns):
            assert given.result[0, ..., p].isnan().all()
        else:
            assert given.result[0, ..., p].isfinite().all()
    assert given.result[1].isfinite().all()
    given.operands["fine"] = shifted(given.operands["fine"].nan_to_num(0.5), elements)
    check_nonfinite(loaded, spec, given)


def test_only_even_strides_load_words() -> None:
    """Elsewhere neighbouring positions begin in different halves."""
    assert loads_words(Problem(ConvSpec(CONV, 3, 2, 1).geometry, "fprop", "bf16tc"))
    assert loads_words(Problem(ConvSpec(UP, 3, (2, 4, 2), 1).geometry, "fprop", "f16tc"))
    assert not loads_words(Problem(ConvSpec(CONV, 3, 2, 1).geometry, "fprop", "tf32"))
    assert not loads_words(Problem(ConvSpec(CONV, 3, (1, 2, 2), 1).geometry, "fprop", "bf16tc"))
    assert not loads_words(Problem(ConvSpec("conv2d", 3, 2, 1).geometry, "fprop", "bf16tc"))
    assert not loads_words(Problem(ConvSpec(UP, 3, 2, 1).geometry, "dgrad", "bf16tc"))


@pytest.mark.parametrize(
    ("kernel", "dilation", "words"),
    [(1, 1, (0,)), (2, 1, (0, 1)), (3, 1, (0, 1)), (4, 1, (0, 1, 2)), (3, 4, (0, 2, 4))],
)
def test_window_words(kernel: int, dilation: int, words: tuple[int, ...]) -> None:
    """Both halves in which the first tap's input may lie are covered."""
    geometry = ConvSpec(CONV, (1, 1, kernel), 2, dilation=(1, 1, dilation)).geometry
    assert window_words(gather_axes(geometry, "fprop")[2]) == words
