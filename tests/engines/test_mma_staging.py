"""How the mma engine's gathers stage lines that no wide access can copy, interpreted and checked.

Such lines pass through raw buffers in 16-byte granules (``templates/cuda/mma/staging.cuh``), or
tiles are staged as the input lies in memory (``granules.cuh``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import plans
import pytest
from interpreted import (
    LIMITS,
    Fault,
    Library,
    Problem,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    shifted,
    solve,
)

from convgen.spec import ConvSpec

INPUT = {"fprop": "fine", "dgrad": "coarse"}
# Strides along W that are one, that make pairs of columns, and that do neither; with halos of a
# few columns, and of more than a granule.
SPECS = {
    1: ConvSpec("conv2d", 3, 1, 1),
    2: ConvSpec("conv3d", (3, 3, 4), 2, (1, 1, 11), dilation=(1, 1, 3)),
    3: ConvSpec("conv2d", (2, 3), (2, 3), 1, groups=2),
}
# Batch, channels in and out, extents: odd widths, with several chunks of channels, strips and
# tiles; widths below a granule; words and second channels that do not exist.
CALLS = {
    1: ((2, (41, 9), (7, 37)), (1, (3, 2), (2, 1)), (1, (17, 1), (3, 5))),
    2: ((2, (35, 9), (7, 5, 47)), (1, (3, 2), (2, 1, 2)), (1, (18, 1), (3, 4, 131))),
    3: ((2, (42, 6), (5, 67)), (1, (6, 2), (3, 3))),
}


pytestmark = pytest.mark.usefixtures("shared_cache")


def sources(
    stride: int, kind: str, contraction: str, architecture: str, granules: bool = False
) -> dict[str, str]:
    """On sm_90a with so many channels that warps multiply in groups, and two crews stage."""
    plan = plans.plan(SPECS[stride], contraction, kind)
    rows, _ = plan.schedule.tiles[0]
    tiles = ((rows, 24 if architecture == "90a" else 8),)
    schedules = {(contraction, kind): replace(plan.schedule, tiles=tiles, granules=granules)}
    return engine_sources(SPECS[stride], kind, (contraction,), schedules)


@cache
def library(
    stride: int, kind: str, contraction: str, architecture: str, granules: bool = False
) -> Path:
    files = sources(stride, kind, contraction, architecture, granules)
    name = f"staging_{stride}_{contraction}_{kind}_{architecture}_{granules}"
    if architecture == "90a":
        return compile_interpreted(name, files, "checked", architecture=architecture)
    return compile_interpreted(name, files, "checked")


def problems(stride: int, kind: str, contraction: str) -> list[Problem]:
    return [
        problem(
            SPECS[stride], contraction, kind, extents, batch=batch, channels=channels, seed=seed
        )
        for seed, (batch, channels, extents) in enumerate(CALLS[stride])
    ]


UNALIGNED = [
    (*line, granules, architecture)
    for line in (
        (1, "tf32", "dgrad"),
        (1, "bf16tc", "fprop"),
        (2, "tf32", "fprop"),
        (3, "tf32", "fprop"),
        (2, "bf16tc", "fprop"),
        (3, "f16tc", "fprop"),
    )
    for granules in (False, True)
    for architecture in ("80", "90a")
]


@pytest.mark.parametrize(
    ("stride", "kind", "contraction", "granules", "architecture"),
    mostly_long(UNALIGNED, 0, 11, 18, 21),
)
def test_unaligned_lines_agree_with_float64(
    stride: int,
    kind: str,
    contraction: str,
    granules: bool,
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread block, whose copies run ahead from tile to tile; addresses of any alignment."""
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    path = tmp_path / "one.so"
    path.write_bytes(library(stride, kind, contraction, architecture, granules).read_bytes())
    loaded = Library(path)
    for index, given in enumerate(problems(stride, kind, contraction)):
        name = INPUT[contraction]
        given.operands[name] = shifted(given.operands[name], (0, 3, 1)[index])
        solve(loaded, given)
        given.check()


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


@pytest.mark.parametrize(
    ("architecture", "kind"), mostly_long([("80", "bf16tc"), ("90a", "tf32")], 1)
)
def test_granules_may_be_handed_over_by_mbarriers(architecture: str, kind: str) -> None:
    """As compiled for racecheck, which follows no named barrier at which a warp only arrives."""
    files = sources(2, kind, "fprop", architecture, granules=True)
    files["releases.cuh"] = "#define CONVGEN_RACECHECK\n" + files["releases.cuh"]
    name = f"handed_over_{architecture}"
    loaded = Library(compile_interpreted(name, files, "checked", architecture=architecture))
    for given in problems(2, kind, "fprop"):
        solve(loaded, given)
        given.check()


@pytest.mark.parametrize("kind", ["tf32", "bf16tc"])
def test_what_lies_beside_a_line_is_cleared(kind: str) -> None:
    """It is the end of the line before or the begin of the next, as a tile's columns hold it."""
    files = sources(2, kind, "fprop", "80", granules=True)
    (unit,) = (name for name in files if name.startswith("fprop_"))
    statement = "granules.clear_margins(s, crew);"
    assert statement in files[unit]
    text = files[unit].replace(statement, "")
    loaded = Library(compile_interpreted("buggy_clear", {**files, unit: text}, "checked"))
    given = problems(2, kind, "fprop")[0]
    solve(loaded, given)
    assert given.error() > 10 * LIMITS[kind]


def test_columns_that_are_cleared_before_all_have_landed_are_caught() -> None:
    """Others of the crew have copied them."""
    files = sources(2, "bf16tc", "fprop", "80", granules=True)
    unit = "fprop_bf16tc.cu"
    text = files[unit].replace("named_barrier_sync(BARRIER_COPIED + turn_of_crew", "if (false) (0")
    assert text != files[unit]
    loaded = Library(compile_interpreted("buggy_meeting", {**files, unit: text}, "checked"))
    with pytest.raises(Fault, match=r"asynchronous copy|race on shared memory"):
        solve(loaded, problems(2, "bf16tc", "fprop")[0])


def test_granules_that_nothing_waits_for_are_caught() -> None:
    files = sources(2, "bf16tc", "fprop", "80", granules=True)
    unit = "fprop_bf16tc.cu"
    text = files[unit].replace("copy_wait<decltype(pending)::value>();", "")
    announced = files["fragments.cuh"].replace("copy_wait<PENDING>();", "")
    assert text != files[unit]
    assert announced != files["fragments.cuh"]
    files |= {unit: text, "fragments.cuh": announced}
    loaded = Library(compile_interpreted("buggy_granules", files, "checked"))
    with pytest.raises(Fault, match="asynchronous copy"):
        solve(loaded, problems(2, "bf16tc", "fprop")[0])
