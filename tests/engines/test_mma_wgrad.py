"""wgrad on the tensor cores: its results, interpreted and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import plans
import pytest
import torch
from interpreted import (
    Library,
    Problem,
    check_nonfinite,
    compile_interpreted,
    engine_sources,
    mostly_long,
    one_size,
    problem,
    solve,
    solve_exactly,
)

from convgen.engines.mma.wgrad import wgrad_refusal, wgrad_schedule
from convgen.engines.mma.wgrad_layout import (
    layout_of,
    warpgroup_tile_of,
)
from convgen.spec import ConvSpec
from convgen.spec.dtypes import MODES

LIMITS = {"tf32": 5e-4, "tf32x3": 2e-6, "f16tc": 6e-4, "bf16tc": 5e-3}
"""On ``||out - ref|| / ||ref||``: 1.7 times what rounding operands (tf32) or the result costs."""


pytestmark = pytest.mark.usefixtures("shared_cache")


UP, CONV = "conv_transpose3d", "conv3d"


@dataclass(frozen=True)
class Case:
    spec: ConvSpec
    modes: tuple[str, ...]
    calls: tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
    """Batch, channels in and out, input extents."""

    def problems(self, mode: str) -> list[Problem]:
        base = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[MODES[mode].torch_name]
        problems = []
        for index, (batch, channels, extents) in enumerate(self.calls):
            made = problem(
                self.spec, "wgrad", base, extents, batch=batch, channels=channels, seed=index
            )
            problems.append(replace(made, dtype=mode))
        return problems


ALL = ("tf32", "tf32x3", "f16tc", "bf16tc")
CASES = [
    # Several tiles of channels, odd channels, odd rows, two samples.
    Case(ConvSpec(UP, 3), ALL, ((1, (5, 7), (3, 5, 6)), (2, (20, 9), (2, 4, 18)))),
    # Channels that end within eight, odd rows of both tensors, tiles of channels without any.
    Case(ConvSpec(CONV, (1, 3, 3), 1, 1), ALL, ((2, (12, 21), (1, 9, 33)),)),
    # Copies whose first column lies left of the tensor; 16-byte accesses.
    Case(ConvSpec(CONV, 3, 1, 1), ("tf32", "bf16tc"), ((2, (16, 40), (3, 7, 24)),)),
    Case(ConvSpec(UP, 3, 2, 1, 1), ("tf32", "f16tc"), ((2, (5, 7), (3, 5, 6)),)),
    # Groups; blocks of taps beyond the kernel; columns in steps of two.
    Case(
        ConvSpec(UP, (3, 5, 7), 2, (1, 2, 3), 1, 1, 4),
        ("tf32", "tf32x3", "bf16tc"),
        ((1, (32, 32), (3, 4, 6)), (2, (16, 20), (2, 3, 9))),
    ),
    # A stride that needs padded quads; blocks of taps along W.
    Case(ConvSpec("conv_transpose1d", 16, 8, 4), ("tf32", "f16tc"), ((2, (20, 9), (33,)),)),
    Case(
        ConvSpec("conv1d", 41, 4, 20, groups=4),
        ("tf32", "bf16tc"),
        ((1, (16, 32), (200,)), (2, (20, 16), (90,))),
    ),
    # Nothing shared between positions.
    Case(ConvSpec("conv3d", 1, 2), ("tf32", "f16tc"), ((2, (9, 17), (4, 7, 9)),)),
    Case(ConvSpec("conv1d", 5, 50, 3), ("tf32x3", "bf16tc"), ((1, (4, 6), (530,)),)),
    # Dilation, alone and with stride.
    Case(ConvSpec(UP, 3, 2, 1, 0, 2), ("tf32", "bf16tc"), ((1, (16, 24), (3, 5, 7)),)),
    Case(
        ConvSpec(CONV, (3, 3, 5), (2, 3, 5), (2, 1, 4), dilation=(3, 2, 2)),
        ("tf32", "f16tc"),
        ((1, (8, 20), (13, 14, 40)),),
    ),
]
# On sm_90a, where four warps multiply together: channels beyond one block, both tensors' rows odd.
GROUP_CASES = [
    # The second call's lines are unaligned, and end beyond the tensor.
    Case(
        ConvSpec(UP, 3), ("tf32", "bf16tc"), ((1, (48, 48), (3, 6, 8)), (1, (48, 48), (5, 9, 11)))
    ),
    Case(ConvSpec(CONV, 3, 1, 1), ("f16tc",), ((1, (40, 72), (3, 5, 9)),)),
    Case(
        ConvSpec(UP, 3, 2, 1, in_channels=32, out_channels=64),
        ("bf16tc",),
        ((1, (32, 64), (3, 5, 9)),),
    ),
    # Strided lines, word by word: what is tuned may have warpgroups there, the default has none.
    Case(ConvSpec(UP, 3, 2, 1), ("tf32",), ((1, (32, 48), (3, 5, 9)),)),
    # Unaligned rows that are read in words: of a stride of four, with a word that half read.
    Case(ConvSpec(UP, (2, 3, 5), (1, 2, 4), (0, 1, 2)), ("f16tc",), ((2, (32, 16), (4, 5, 9)),)),
    Case(ConvSpec(UP, (1, 2, 4), 2, (0, 0, 1)), ("bf16tc",), ((1, (40, 24), (3, 5, 17)),)),
    Case(ConvSpec(CONV, (3, 1, 7), (2, 1, 2), (2, 0, 4)), ("f16tc",), ((1, (24, 32), (5, 3, 43)),)),
    # Unaligned rows of which single elements are read; of strides whose channels share a place.
    Case(ConvSpec(UP, 3, 2, 1, dilation=2), ("bf16tc",), ((1, (32, 64), (3, 5, 8)),)),
    Case(ConvSpec(CONV, 3, 1, 1), ("bf16tc",), ((1, (16, 32), (2, 8, 9)),)),
]
RUNS = [(case, mode, "80") for case in CASES for mode in case.modes]
RUNS += [
    (case, mode, "90a")
    for case, modes in [(case, case.modes) for case in GROUP_CASES]
    + [(case, case.modes[-1:]) for case in CASES[1:]]
    for mode in modes
    if plans.warpgroup_wgrad(case.spec, mode).warpgroup_tiles
]


@cache
def library(
    spec: ConvSpec, mode: str, checks: str, architecture: str = "80", small: bool = True
) -> Path:
    """With one size of the kernel, or all."""
    schedule = plans.warpgroup_wgrad(spec, mode)
    if small:
        schedule = one_size(schedule)
    sources = engine_sources(spec, mode, ("wgrad",), {("wgrad", mode): schedule})
    name = f"{spec.name}_{mode}_wgrad" + ("" if architecture == "80" else f"_{architecture}")
    return compile_interpreted(name, sources, checks, architecture=architecture)


# All modes by warps, and those that warpgroups have.
QUICK_RUNS = [run for run in RUNS if run[0] == CASES[0] and run[2] == "80"]
QUICK_RUNS += [(GROUP_CASES[1], "f16tc", "90a")]


@pytest.mark.parametrize(
    ("case", "mode", "architecture"),
    mostly_long(RUNS[::3], 0),
    ids=lambda value: value.spec.name if isinstance(value, Case) else value,
)
def test_weights_that_meet_nothing_infinite_are_finite(
    case: Case, mode: str, architecture: str
) -> None:
    loaded = Library(library(case.spec, mode, "checked", architecture))
    check_nonfinite(loaded, case.spec, case.problems(mode)[0])


@pytest.mark.parametrize(
    ("case", "mode", "architecture", "small"),
    mostly_long(
        [(*run, True) for run in QUICK_RUNS] + [(*run, False) for run in RUNS],
        *range(len(QUICK_RUNS)),
    ),
    ids=lambda value: value.spec.name if isinstance(value, Case) else str(value),
)
def test_checked_kernels_agree_with_float64(
    case: Case, mode: str, architecture: str, small: bool
) -> None:
    loaded = Library(library(case.spec, mode, "checked", architecture, small))
    for made in case.problems(mode):
        solve(loaded, made)
        assert made.error() <= LIMITS[mode]


@pytest.mark.long
@pytest.mark.parametrize(
    ("tiles", "taps"),
    [(((2, 2),), (1, 3)), (((1, 3),), (3, 1)), (((1, 8),), (1, 2))],
)
def test_groups_have_any_tiles(tiles: tuple[tuple[int, int], ...], taps: tuple[int, int]) -> None:
    """Several tiles of fine channels, several rows of taps, blocks beyond the kernel."""
    spec = ConvSpec(UP, 3, 2, 1)
    wanted = plans.wgrad(spec, "bf16tc")
    schedule = replace(wgrad_schedule(wanted), warpgroup_taps=taps, warpgroup_tiles=tiles)
    assert not wgrad_refusal(wanted, schedule)
    sources = engine_sources(spec, "bf16tc", ("wgrad",), {("wgrad", "bf16tc"): schedule})
    loaded = Library(compile_interpreted("warpgroup_tiles", sources, architecture="90a"))
    for made in Case(spec, (), ((2, (20, 33), (3, 5, 9)),)).problems("bf16tc"):
        solve(loaded, made)
        assert made.error() <= LIMITS["bf16tc"]


@pytest.mark.long
@pytest.mark.parametrize("width", [24, 25])
@pytest.mark.parametrize(
    ("mode", "architecture"),
    [(mode, a) for mode in ("tf32", "bf16tc") for a in ("80", "90a")],
)
@pytest.mark.parametrize("skipped", [1, 2])
def test_tensors_may_start_anywhere(mode: str, skipped: int, architecture: str, width: int) -> None:
    """Rows that 16-byte accesses divide, at addresses that they do not: several per place. And odd
    rows."""
    case = Case(ConvSpec(CONV, 3, 1, 1), (), ((2, (20, 40), (3, 7, width)),))
    (made,) = case.problems(mode)
    operands = dict(made.operands)
    for name in ("coarse", "fine"):
        room = torch.empty(operands[name].numel() + 64, dtype=operands[name].dtype)
        first = -room.data_ptr() % 64 // room.element_size() + skipped
        moved = room[first : first + operands[name].numel()].view(operands[name].shape)
        operands[name] = moved.copy_(operands[name])
    moved_problem = replace(made, operands=operands)
    solve(Library(library(case.spec, mode, "checked", architecture)), moved_problem)
    assert moved_problem.error() <= LIMITS[mode]


@pytest.mark.parametrize("skipped", [1, 4, 7])
@pytest.mark.parametrize("height", mostly_long([6, 7], 1))
def test_unaligned_rows_may_start_anywhere(skipped: int, height: int) -> None:
    """Odd rows of neighbouring channels that begin alike, or not, behind any vector's start."""
    spec = ConvSpec(UP, 3, 2, 1, (0, height % 2, 0), in_channels=32, out_channels=32)
    (made,) = Case(spec, (), ((1, (32, 32), (4, height, 21)),)).problems("f16tc")
    fine = made.operands["fine"]
    room = torch.empty(fine.numel() + 64, dtype=fine.dtype)
    first = -room.data_ptr() % 64 // room.element_size() + skipped
    moved = room[first : first + fine.numel()].view(fine.shape).copy_(fine)
    moved_problem = replace(made, operands={**made.operands, "fine": moved})
    solve(Library(library(spec, "f16tc", "checked", "90a")), moved_problem)
    assert moved_problem.error() <= LIMITS["f16tc"]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["tf32", "f16tc"])
def test_sanitized_kernels_stay_within_exact_tensors(mode: str, tmp_path: Path) -> None:
    """Under AddressSanitizer and UBSan, with odd rows and padding."""
    problems = CASES[2].problems(mode)
    solve_exactly(library(CASES[2].spec, mode, "address", small=False), problems, tmp_path)
    for made in problems:
        assert made.error() <= LIMITS[mode]


# Where the unaligned rows of a call are staged.
PLACES_OF_LINES = """
CONVGEN_EXPORT int places_of_lines(const int64_t* sizes, int64_t* found) {
  ConvgenCall call = {};
  call.batch = sizes[0], call.coarse_channels = sizes[1], call.fine_channels = sizes[2];
  for (int i = 0; i < 3; ++i) {
    call.coarse_extent[i] = sizes[3 + i], call.fine_extent[i] = sizes[6 + i];
  }
  const DeviceLimits limits = {132, 227 * 1024, 90};
  Plan p;
  if (const int error = plan(call, limits, p)) return error;
  const ProductShape& s = p.shape;
  found[0] = s.unaligned, found[1] = s.fine_pitch, found[2] = s.planes, found[3] = s.rows;
  found[4] = s.row_words, found[5] = s.stages, found[6] = s.stage_words;
  return CONVGEN_OK;
}
"""


@pytest.mark.parametrize(
    ("spec", "sizes", "wavefronts", "loads"),
    mostly_long(
        [
            # All positions of the stride are read, in words.
            (
                ConvSpec(UP, 3, 2, 1, in_channels=32, out_channels=32),
                (4, 32, 32, 32, 64, 128, 63, 127, 255),
                1,
                5,
            ),
            # Every second one, each for itself.
            (
                ConvSpec(UP, 3, 2, 1, dilation=2, in_channels=32, out_channels=64),
                (16, 32, 64, 16, 32, 32, 33, 65, 65),
                1,
                6,
            ),
            # Channels an even number of elements apart.
            (
                ConvSpec(UP, 3, 2, 1, in_channels=32, out_channels=32),
                (4, 32, 32, 32, 64, 128, 62, 127, 255),
                1,
                5,
            ),
            # Quads of neighbouring channels overlap, wherever these lie.
            (
                ConvSpec(CONV, 3, 1, 1, in_channels=32, out_channels=32),
                (4, 32, 32, 31, 65, 65, 31, 65, 65),
                2,
                4,
            ),
        ],
        0,
        3,
    ),
)
def test_loads_from_unaligned_rows_have_few_bank_conflicts(
    spec: ConvSpec, sizes: tuple[int, ...], wavefronts: int, loads: int
) -> None:
    sources = engine_sources(spec, "bf16tc", ("wgrad",))
    sources["wgrad_bf16tc.cu"] += PLACES_OF_LINES
    loaded = Library(compile_interpreted("lines", sources, "plain", architecture="90a"))
    found = np.zeros(7, np.int64)
    loaded("places_of_lines", np.array(sizes, np.int64), found)
    unaligned, pitch, planes, rows, words, stages, stage_words = found.tolist()
    assert unaligned
    assert 0 <= pitch - planes * rows * words < 32
    # Copies of vectors fill whole sectors of shared memory.
    assert stages % 8 == 0
    assert stage_words % 8 == 0
    stride = sizes[6] * sizes[7] * sizes[8]
    if stride % 2 == 1:
        assert pitch % 8 == 0
    for begin in range(8):
        banks = [0] * 32
        for g, t in product(range(8), range(4)):
            word = (begin + g * stride) % 8 // 2 + t * 4 * spec.geometry.stride[2] // 2
            banks[(g * pitch + word) % 32] += 1
        assert max(banks) == wavefronts
    taps = wgrad_schedule(plans.wgrad(spec, "bf16tc")).warpgroup_taps
    tile = warpgroup_tile_of(layout_of(spec.geometry, 2, taps[1]), taps, 1, 4)
    assert tile.unaligned_loads == 2 * taps[0] * loads


@pytest.mark.long
def test_buffers_of_unaligned_rows_may_be_handed_over_by_mbarriers() -> None:
    """As compiled for racecheck, whose tool does not follow named barriers."""
    case = GROUP_CASES[0]
    sources = engine_sources(case.spec, "bf16tc", ("wgrad",), small=True)
    macro = "#define CONVGEN_RACECHECK\n"
    sources = {**sources, "releases.cuh": macro + sources["releases.cuh"]}
    loaded = Library(compile_interpreted("unaligned_racecheck", sources, architecture="90a"))
    made = case.problems("bf16tc")[-1]
    solve(loaded, made)
    assert made.error() <= LIMITS["bf16tc"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "processors"), [(a, n) for a in ("80", "90a") for n in (1, 3)]
)
def test_tiles_are_dealt_to_splits_in_turn(
    architecture: str, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few multiprocessors that splits have several tiles, not all as many."""
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", str(processors))
    spec = ConvSpec(UP, 3, 2, 1, in_channels=32, out_channels=32)
    path = tmp_path / "few.so"  # a copy: the library remembers the limits
    path.write_bytes(library(spec, "bf16tc", "checked", architecture).read_bytes())
    loaded = Library(path)
    # On sm_90a rows are unaligned; some tiles lie within the tensors, others at their edges.
    for batch, extents in ((2, (5, 7, 34)), (1, (9, 10, 62))):
        (made,) = Case(spec, (), ((batch, (32, 32), extents),)).problems("bf16tc")
        solve(loaded, made)
        assert made.error() <= LIMITS["bf16tc"]


# Which split each tile of a call is dealt to.
OWNERS_OF_TILES = """
CONVGEN_EXPORT int owners_of_tiles(const int64_t* sizes, int64_t* owners) {
  ConvgenCall call = {};
  call.batch = sizes[0], call.coarse_channels = sizes[1], call.fine_channels = sizes[2];
  for (int i = 0; i < 3; ++i) {
    call.coarse_extent[i] = sizes[3 + i], call.fine_extent[i] = sizes[6 + i];
  }
  const DeviceLimits limits = {static_cast<int>(sizes[9]), 227 * 1024};
  Plan p;
  if (const int error = plan(call, limits, p)) return error;
  const ProductShape& s = p.shape;
  *owners++ = s.tiles, *owners++ = s.splits, *owners++ = s.tiles_w.divisor;
  for (int split = 0; split < s.splits; ++split) {
    SplitTiles tiles(split);
    for (int i = split_tiles(s, split); i > 0; --i, tiles.advance(s)) {
      if (owners[tiles.tile()] >= 0) return CONVGEN_TOO_LARGE;  // dealt twice
      owners[tiles.tile()] = split;
    }
  }
  return CONVGEN_OK;
}
"""


@pytest.mark.parametrize("processors", [1, 7, 64, 132])
def test_splits_share_the_tiles_at_edges(processors: int) -> None:
    spec = ConvSpec(UP, 3, 2, 1, in_channels=32, out_channels=32)
    sources = engine_sources(spec, "bf16tc", ("wgrad",))
    sources["wgrad_bf16tc.cu"] += OWNERS_OF_TILES
    loaded = Library(compile_interpreted("owners", sources, "plain", architecture="90a"))
    for batch, extents in ((4, (32, 64, 128)), (1, (5, 6, 7)), (3, (11, 32, 64))):
        fine = [2 * extent - 1 for extent in extents]
        owners = np.full(1 << 20, -1, np.int64)
        sizes = [batch, 32, 32, *extents, *fine, processors]
        loaded("owners_of_tiles", np.array(sizes, np.int64), owners)
        tiles, splits, tiles_w = owners[:3].tolist()
        dealt = owners[3 : 3 + tiles]
        counts = np.bincount(dealt, minlength=splits)
        assert counts.sum() == tiles
        assert counts.max() - counts.min() <= 1
        at_edge = np.bincount(dealt[::tiles_w], minlength=splits)
        if counts.min() >= 2 * tiles_w:
            assert at_edge.max() <= 2 * at_edge.min()
        assert tiles_w > 1 or extents[-1] < 128  # else there would be no edges to share


def test_small_gpus_cut_other_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 KiB of shared memory per block and one multiprocessor: longer sums, smaller tiles."""
    monkeypatch.setenv("CONVGEN_INTERPRET_SHARED_BYTES", str(48 * 1024))
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    path = tmp_path / "small.so"  # a copy: the library remembers the limits
    path.write_bytes(library(CASES[0].spec, "tf32", "checked").read_bytes())
    loaded = Library(path)
    (made,) = Case(CASES[0].spec, (), ((2, (33, 17), (4, 5, 10)),)).problems("tf32")
    solve(loaded, made)
    assert made.error() <= LIMITS["tf32"]


def test_long_sums_in_tf32x3_keep_fp32_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One multiprocessor, so that a warp sums thousands of positions of truncating products."""
    monkeypatch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
    case = Case(ConvSpec(CONV, (1, 1, 3)), (), ((2, (8, 16), (4, 32, 66)),))
    path = tmp_path / "long.so"
    path.write_bytes(library(case.spec, "tf32x3", "plain").read_bytes())
    (made,) = case.problems("tf32x3")
    solve(Library(path), made)
    assert made.error() <= LIMITS["tf32x3"]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000], ids=lambda x: f"{x & 0xFFFFFFFF:#x}")
def test_every_nan_reaches_the_result(bits: int) -> None:
    """Also those that adding half a unit in the last place would turn into a zero."""
    case = CASES[0]
    (made, _) = case.problems("tf32")
    for name in ("coarse", "fine"):
        operands = {key: tensor.clone() for key, tensor in made.operands.items()}
        operands[name][0, 2, 1, 2, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        poisoned = replace(made, operands=operands)
        solve(Library(library(case.spec, "tf32", "checked")), poisoned)
        # Plane 1 of the fine tensor meets the first two kernel depths.
        hit = poisoned.result[2] if name == "coarse" else poisoned.result[:, 2, :2]
        assert hit.isnan().all()
        other = poisoned.result[3] if name == "coarse" else poisoned.result[:, 3]
        assert other.isfinite().all()


def test_no_samples_give_zeros() -> None:
    case = CASES[0]
    (_, made) = case.problems("tf32")
    operands = dict(made.operands)
    for name in ("coarse", "fine"):
        operands[name] = operands[name][:0]
    empty = replace(made, operands=operands, reference=torch.zeros_like(made.reference))
    solve(Library(library(case.spec, "tf32", "checked")), empty)
    assert torch.equal(empty.result, torch.zeros_like(empty.result))


def test_rendered_source_names_its_unit() -> None:
    sources = engine_sources(CASES[0].spec, "tf32", ("wgrad",))
    text = sources["wgrad_tf32.cu"]
    assert "convgen_wgrad_tf32(const ConvgenCall* call)" in text
    assert "convgen_bgrad" not in text
    assert not re.search(r"[ \t]+$|\n\n\n", text, re.MULTILINE)
