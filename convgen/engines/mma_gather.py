"""fprop and dgrad of the ``mma`` engine: which tiles a warp keeps, and how they are staged.

Both are one gather (``templates/cuda/mma/gather.cu.j2``); see :mod:`convgen.engines.gather` for how
it is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from convgen.dtypes import MODES
from convgen.engines import Candidate, KernelPlan
from convgen.engines.cost import (
    H200,
    NARROW_ELEMENTS,
    Gpu,
    Prediction,
    Problem,
    Warp,
    gather_prediction,
    typical_problems,
)
from convgen.engines.gather import (
    MAX_VARIANTS,
    STYLES,
    Axis,
    GatherSchedule,
    arrange,
    first_offset,
    gather_axes,
    gather_context,
    loops_over_taps,
    output_channels,
    paired_lines,
    style_refusal,
)
from convgen.spec import Geometry

ENGINE_NAME = "mma"

# 16 x 8 products that a warp keeps in registers, four each: 80 registers, beside which the
# fragments of a column and what tells a warp its place stay under the 168 that blocks of 12 warps
# leave a thread.
PRODUCTS = 20
# 3xTF32 keeps a second set of sums, which leaves the tensor core after every 8 channels.
PRODUCTS_FLUSHED = 10
# Where the compiler prefetches more, and would spill what it keeps meanwhile: 16-bit products take
# half the clocks; large columns of a strided window lie far apart.
PRODUCTS_FEW, PRODUCTS_FLUSHED_FEW = 16, 6
# Output channels per warp, in blocks of 8, where the count is not known.
UNKNOWN_BLOCKS = (6, 4, 2)
UNKNOWN_BLOCKS_FEW = (4, 3, 2)  # where six do not fit
# Sizes that a tuned schedule may compile instead.
UNKNOWN_CHOICES = (
    UNKNOWN_BLOCKS,
    UNKNOWN_BLOCKS_FEW,
    (8, 4),
    (6, 3),
    (4, 3),
    (4, 2),
    (3, 2, 1),
    (2, 1),
)
# Registers for the fragments of one column (4 per row, 8 in 3xTF32); with all sums; and with these
# where the window of a tile is strided.
MAX_COLUMN_REGISTERS = 48
MAX_TILE_REGISTERS = 112
MAX_STRIDED_TILE_REGISTERS = 96
# Where warps trade registers (sm_90a), those that multiply together keep more. A tuned schedule may
# count on it; no default does, which must suit every GPU.
GROUP_CHANNELS = 24  # GROUP_LEAST_CHANNELS of the templates
LONE_WARPS, CREW_WARPS = 8, 4  # that multiply each for itself in a thread block; that stage
MOST_WARPS = 16  # of a thread block on sm_90a
FEW_PRODUCTS = 8  # of a warp, beside which two crews stage there
GROUPED_ARCHITECTURE = "90a"
PRODUCTS_GROUPED = {"tf32": 24, "tf32x3": 12, "f16tc": 24, "bf16tc": 24}
GROUPED_REGISTERS = {"tf32": 120, "tf32x3": 128, "f16tc": 120, "bf16tc": 120}
# Three groups have 152 registers for each thread instead of 184, and keep the fragments of one
# column instead of two. With more than this ptxas spills.
GROUPS = (2, 3)
THREE_GROUPS_REGISTERS = {"tf32": 92, "tf32x3": 96, "f16tc": 92, "bf16tc": 92}
# Of sums and all pairs of columns that are held at once, by groups: with more ptxas spills, or lets
# no products overlap.
PAIRS_REGISTERS = {2: 112, 3: 92}


@dataclass(frozen=True)
class Limits:
    """Registers for sums and a column that a schedule may take which is not the rule's, by mode.

    ``strided``: beside columns of a strided window, which lie far apart.
    """

    plain: Mapping[str, int]
    strided: Mapping[str, int]


# With so many, hardly any of 430 kernels spilled on sm_90; with more, most did. Beside columns of a
# strided window TF32 did with more on sm_80.
SPILL_FREE = Limits(
    {"tf32": 92, "tf32x3": 92, "f16tc": 84, "bf16tc": 84},
    {"tf32": 84, "tf32x3": 92, "f16tc": 84, "bf16tc": 84},
)
GROUPED = Limits(GROUPED_REGISTERS, GROUPED_REGISTERS)
THREE_GROUPS = Limits(THREE_GROUPS_REGISTERS, THREE_GROUPS_REGISTERS)
# What was measured on sm_90a spills with more than this where warps multiply alone on a GPU that is
# no older, though not on sm_80.
NEWER_ARCHITECTURE = 90
NEWER = Limits(
    {"tf32": 100, "tf32x3": 100, "f16tc": 92, "bf16tc": 92}, dict.fromkeys(GROUPED_REGISTERS, 72)
)
# What the model chooses must be faster than the rule's by more than the model may be wrong.
MODEL_MARGIN = 0.85
# Multiply instructions of an unrolled pass, over all phases: 16 bytes each, with about as many
# loads beside them, in an instruction cache of 128 KiB. Of code not much longer (1944 did) nvcc
# leaves the sums in local memory.
UNROLL_LIMIT = 1600
# Two stages of a representative tile and its weights: what a block on sm_90 may hold, less a margin
# for wider tiles. Smaller GPUs cut narrower tiles at launch.
STAGES_LIMIT_BYTES = 200 * 1024
# Registers for sums and a column beside which there is room for halves of words (granules in 16
# bits). With more ptxas spills a few.
HALVES_REGISTERS = 76
# Two stages that any GPU holds.
SMALL_STAGES_BYTES = 90 * 1024

# Staging 16-bit lines by way of raw buffers (``staging.cuh``): passages of 32 words through shared
# memory (written to a buffer, read, partly by halves, and written to the tile), and instructions
# (about 3 are for copying them, 10 for moving them, the others for what each item takes).
NARROW_PAIRS = (3.5, 19.0)
# As the input lies in memory (``granules.cuh``): an asynchronous copy of 16 bytes is about seven
# instructions, as it is of words that come by wide accesses.
GRANULES = (1.0, 7 / 4)


@dataclass(frozen=True)
class GatherTiles:
    """fprop and dgrad: what the template unrolls, and the tiles that one warp may compute.

    As :class:`convgen.engines.gather.GatherSchedule`, but each number of output channels has its
    own register rows: a tile is (rows, channels), all of them are compiled, and a call takes the
    one whose channels suit it best.

    ``groups`` is how many times four warps multiply in a thread block where they do so together
    (sm_90a, 24 or more channels): 2, or 3 with fewer registers each. With ``granules`` tiles are
    staged as the input lies in memory, 16 bytes at a time, and lanes find their elements there.
    With ``pairs`` a lane has neighbouring positions and loads what all taps of a line read for
    them, two words at a time.
    """

    unroll: str
    row_axis: str
    variants: int
    tiles: tuple[tuple[int, int], ...]
    groups: int = 2
    granules: bool = False
    pairs: bool = False

    def gather(self, tile: tuple[int, int]) -> GatherSchedule:
        """What a warp does with one of the tiles."""
        rows, channels = tile
        return GatherSchedule(self.unroll, self.row_axis, rows, self.variants, (channels,))

    @property
    def gathers(self) -> tuple[GatherSchedule, ...]:
        return tuple(map(self.gather, self.tiles))


def _block_cost(blocks: int, out_blocks: int) -> float:
    """Time of ``out_blocks`` blocks of 8 channels in warps of ``blocks``: few share a fragment."""
    padded = -(-out_blocks // blocks) * blocks
    return padded * {1: 2.5, 2: 1.7, 3: 1.6}.get(blocks, 1.5)


def _budget(mode: str) -> int:
    """Products that a warp may keep."""
    if mode == "tf32x3":
        return PRODUCTS_FLUSHED
    return PRODUCTS if mode == "tf32" else PRODUCTS_FEW


def _grouped(gather: GatherSchedule) -> bool:
    """Whether its warps multiply in groups where a GPU has that."""
    return min(gather.channels) >= GROUP_CHANNELS


def _few(mode: str) -> int:
    """Products that a warp may keep beside what lies far apart."""
    return PRODUCTS_FLUSHED_FEW if mode == "tf32x3" else PRODUCTS_FEW


def _fragment_registers(mode: str) -> int:
    """Registers of a fragment of the input, or of a product's sums with what flushes them."""
    return 8 if mode == "tf32x3" else 4


def _products(gather: GatherSchedule) -> int:
    """16 x 8 products that a warp keeps."""
    return gather.rows * gather.variants * max(gather.channels) // 8


def _tile_registers(geometry: Geometry, contraction: str, mode: str, gather: GatherSchedule) -> int:
    """Registers of all sums and a column."""
    r, _, _ = arrange(gather_axes(geometry, contraction))
    return (_products(gather) + gather.planes(r)) * _fragment_registers(mode)


def _refusal(geometry: Geometry, contraction: str, mode: str, schedule: GatherTiles) -> str:
    """Why a gather cannot have a schedule by default; empty if it can."""
    return _first_refusal(
        schedule, lambda gather: _unfit(geometry, contraction, mode, gather)
    ) or _fields_refusal(geometry, contraction, mode, schedule)


def _tuned_refusal(geometry: Geometry, contraction: str, mode: str, schedule: GatherTiles) -> str:
    """Why a gather cannot have a tuned schedule; empty if it can."""

    def refusal(gather: GatherSchedule) -> str:
        unfit = _unfit(geometry, contraction, mode, gather)
        if not unfit or not _grouped(gather):
            return unfit
        most = PRODUCTS_GROUPED[mode]
        return _misfit(geometry, contraction, mode, gather, most, GROUPED_REGISTERS[mode])

    return _first_refusal(schedule, refusal) or _fields_refusal(
        geometry, contraction, mode, schedule
    )


def _fields_refusal(geometry: Geometry, contraction: str, mode: str, schedule: GatherTiles) -> str:
    """Why a schedule cannot have its groups, granules or pairs; empty if it can."""
    if schedule.granules and schedule.unroll == "none":
        return "loops over taps read words by residue, not elements of granules"
    return _three_groups_refusal(geometry, contraction, mode, schedule) or _pairs_refusal(
        geometry, contraction, mode, schedule
    )


def _first_refusal(schedule: GatherTiles, refusal: Callable[[GatherSchedule], str]) -> str:
    """Why one of a schedule's tiles cannot be; empty if all of them can."""
    sizes = {channels for _, channels in schedule.tiles}
    if not sizes or len(sizes) < len(schedule.tiles):
        return "tiles are told apart by their channels: each has a number of its own"
    return next(filter(None, map(refusal, schedule.gathers)), "")


def _three_groups_refusal(
    geometry: Geometry, contraction: str, mode: str, schedule: GatherTiles
) -> str:
    """Why a schedule cannot have its number of groups of warps; empty if it can."""
    if schedule.groups not in GROUPS:
        return f"a thread block has {' or '.join(map(str, GROUPS))} groups of warps that multiply"
    if schedule.groups == GROUPS[0]:
        return ""
    if not any(map(_grouped, schedule.gathers)):
        return f"three groups of warps need a tile of {GROUP_CHANNELS} channels or more"

    def refusal(gather: GatherSchedule) -> str:
        if not _grouped(gather):
            return ""
        return _spills(geometry, contraction, mode, gather, THREE_GROUPS)

    return _first_refusal(schedule, refusal)


def _pairs_refusal(geometry: Geometry, contraction: str, mode: str, schedule: GatherTiles) -> str:
    """Why lanes cannot have neighbouring positions; empty if they can or need not."""
    if not schedule.pairs:
        return ""
    if schedule.unroll == "none" or schedule.row_axis == "scattered":
        return "positions that are looped over or scattered are no neighbours"
    r, _, x = arrange(gather_axes(geometry, contraction))
    if x.step > 1:
        return "neighbouring positions of a strided input read columns that are no neighbours"
    if schedule.granules:
        return "elements of granules lie anywhere: they are not loaded in pairs"
    # What lies between two pairs is made of both, while a third is loaded if there is one.
    held = min(len(_pairs_of_line(x)[1]), 3)
    most = PAIRS_REGISTERS[schedule.groups]

    def refusal(gather: GatherSchedule) -> str:
        registers = (_products(gather) + held * gather.planes(r)) * _fragment_registers(mode)
        if registers <= most:
            return ""
        return f"sums and pairs of columns take {registers} registers of at most {most}"

    return _first_refusal(schedule, refusal)


def _pairs_of_line(x: Axis) -> tuple[set[int], set[int]]:
    """The columns of a line that taps read, and the pairs that they are made of."""
    first = first_offset(x)
    columns = {tap.offset - first for phase in x.phases for tap in phase.taps}
    at = {column + first % 2 for column in columns}
    return columns, {i // 2 for i in at} | {(i + 1) // 2 for i in at}


def _unfit(geometry: Geometry, contraction: str, mode: str, gather: GatherSchedule) -> str:
    """Why warps that multiply alone cannot have a tile; empty if they can."""
    refusal = _misfit(geometry, contraction, mode, gather, _budget(mode), MAX_TILE_REGISTERS)
    return refusal or _strided_spill(geometry, contraction, mode, gather)


def _strided(geometry: Geometry, contraction: str, gather: GatherSchedule) -> bool:
    """Whether it reads columns of a strided window, which lie far apart."""
    _, _, x = arrange(gather_axes(geometry, contraction))
    return gather.window_r and x.step > 1


def _strided_spill(geometry: Geometry, contraction: str, mode: str, gather: GatherSchedule) -> str:
    """Why the sums spill beside columns of a strided window, which lie far apart; or empty."""
    products = _products(gather)
    tile = _tile_registers(geometry, contraction, mode, gather)
    if not _strided(geometry, contraction, gather) or tile <= MAX_STRIDED_TILE_REGISTERS:
        return ""
    if products <= _few(mode):
        return ""
    return f"beside columns of a strided window {products} products spill; {_few(mode)} fit"


def _misfit(
    geometry: Geometry,
    contraction: str,
    mode: str,
    gather: GatherSchedule,
    most_products: int,
    most_registers: int,
) -> str:
    """Why a tile does not fit into registers, shared memory or the instruction cache.

    ``most_registers`` are for sums and a column together.
    """
    r, y, x = arrange(gather_axes(geometry, contraction))
    style, rows = gather.unroll, gather.rows
    blocks = max(gather.channels) // 8
    if refusal := style_refusal(geometry, x, style):
        return refusal
    products = _products(gather)
    if products > most_products:
        return f"{products} products of a warp spill; {most_products} fit in its registers"
    taps_r = sum(r.counts) if gather.window_r else 1
    taps_y, span_y = (sum(y.counts), max(y.spans)) if gather.window_y else (1, 0)
    planes = gather.planes(r)
    if style in ("line", "none"):
        return ""
    code = taps_r * taps_y * sum(x.counts) * rows * blocks
    if code * (3 if mode == "tf32x3" else 1) > UNROLL_LIMIT:
        return f"{code} products of an unrolled pass do not fit in the instruction cache"
    column = planes * _fragment_registers(mode)
    if column > MAX_COLUMN_REGISTERS:
        return f"a column takes {column} registers of at most {MAX_COLUMN_REGISTERS}"
    tile = _tile_registers(geometry, contraction, mode, gather)
    if tile > most_registers:
        return f"sums and a column take {tile} registers of at most {most_registers}"
    # 64 positions in a strip 32 wide: up to three lines.
    lines = 2 * (y.step if gather.window_y else 1) + span_y + 1
    columns = 31 * x.step + max(x.spans) + 4
    most = (max(r.counts) if gather.window_r else 1) * (max(y.counts) if gather.window_y else 1)
    weights = most * sum(x.counts) * blocks * 8
    weights *= 2 if mode == "tf32x3" else 1
    stages = 2 * 8 * 4 * (planes * lines * columns + weights)
    if stages > STAGES_LIMIT_BYTES:
        return f"two stages take {stages} bytes of shared memory; {STAGES_LIMIT_BYTES} are there"
    return ""


def _spills(
    geometry: Geometry, contraction: str, mode: str, gather: GatherSchedule, limits: Limits
) -> str:
    """Why a tile is likely to spill, having more registers than the limits; or empty."""
    registers = _tile_registers(geometry, contraction, mode, gather)
    strided = _strided(geometry, contraction, gather)
    if registers <= (limits.strided if strided else limits.plain)[mode]:
        return ""
    return f"sums and a column take {registers} registers, and spill"


@cache
def gather_tiles(geometry: Geometry, contraction: str, mode: str) -> GatherTiles:
    """The default schedule: the rule's, or where channels are known and no whole window fits, the
    model's.

    Unknown channels need a list of sizes that suits most of them, which the model does not judge.
    """
    ruled = _ruled_schedule(geometry, contraction, mode)
    per_group = output_channels(geometry, contraction)
    if per_group is None or ruled.unroll not in ("plane", "line") or ruled.row_axis == "scattered":
        return ruled
    sizes = [8 * blocks for blocks in range(1, min(4, -(-per_group // 8)) + 1)]
    problems = typical_problems(geometry)

    def time(schedule: GatherTiles) -> float:
        plan = KernelPlan(geometry, contraction, mode, ENGINE_NAME, schedule)
        return sum(tiles_prediction(plan, problem, H200).ms for problem in problems)

    most = MODEL_MARGIN * time(ruled)
    best = ruled
    for style, rows, channels in product(("taps", "slab"), (2, 3, 4, 6), sizes):
        other = replace(ruled, unroll=style, tiles=((rows, channels),))
        (gather,) = other.gathers
        if _refusal(geometry, contraction, mode, other) or _spills(
            geometry, contraction, mode, gather, SPILL_FREE
        ):
            continue
        if (expected := time(other)) < most:
            most, best = expected, other
    return best


def _ruled_schedule(geometry: Geometry, contraction: str, mode: str) -> GatherTiles:
    """As many rows and channels as fit, and the largest pass that they allow."""
    r, _, x = arrange(gather_axes(geometry, contraction))
    flushed = mode == "tf32x3"
    per_group = output_channels(geometry, contraction)
    variants = min(len(x.phases), MAX_VARIANTS)
    rows = (2 if flushed else 3) if variants == 1 else 2 if variants == 2 and not flushed else 1

    def channel_blocks(products: int) -> tuple[int, ...]:
        """The blocks of 8 channels per warp to compile, with at most so many products."""
        most = products // (rows * variants)
        if per_group is None:
            sizes = UNKNOWN_BLOCKS if most >= max(UNKNOWN_BLOCKS) else UNKNOWN_BLOCKS_FEW
            return tuple(b for b in sizes if b <= most) or (most,)
        needed = -(-per_group // 8)
        choices = range(1, min(most, needed) + 1)
        return (min(choices, key=lambda b: (_block_cost(b, needed), -b)),)

    scattered = max(geometry.kernel[0], geometry.kernel[1]) == 1
    row_axis = "scattered" if scattered else r.name

    def schedule(style: str, products: int) -> GatherTiles:
        tiles = tuple((rows, 8 * blocks) for blocks in channel_blocks(products))
        gather = GatherSchedule(style, row_axis, rows, variants, tuple(c for _, c in tiles))
        granules = _granules_pay(geometry, contraction, mode, gather)
        return GatherTiles(style, row_axis, variants, tiles, granules=granules)

    if loops_over_taps(x):
        return schedule("none", _budget(mode))
    for style in ("taps", "plane"):
        chosen = schedule(style, _budget(mode))
        # All have the same rows: what suits the one with the most channels suits all.
        widest = max(chosen.gathers, key=_products)
        if _misfit(geometry, contraction, mode, widest, _budget(mode), MAX_TILE_REGISTERS):
            continue
        if _strided_spill(geometry, contraction, mode, widest):
            chosen = schedule(style, _few(mode))
        if not _refusal(geometry, contraction, mode, chosen):
            return chosen
    return schedule("line", _budget(mode))


def _granules_pay(geometry: Geometry, contraction: str, mode: str, gather: GatherSchedule) -> bool:
    """Whether tiles are to be staged as a strided input lies in memory.

    Its columns take an access each otherwise. Lines are longer that way: where the narrowest tile
    would not fit on every GPU, words stay apart.
    """
    r, y, x = arrange(gather_axes(geometry, contraction))
    if x.step == 1 or gather.unroll == "none":
        return False
    size = MODES[mode].size_bytes
    taps_y, span_y = (sum(y.counts), max(y.spans)) if gather.window_y else (1, 0)
    taps_r = sum(r.counts) if gather.window_r else 1
    # A warp's 16 positions in one or two lines, at worst over the end of one.
    lines = 2 * (y.step if gather.window_y else 1) + span_y + 1
    line_bytes = -(-(15 * x.step + max(x.spans) + 1) * size // 16) * 16 + 16
    channels = 8 * 4 // size
    split = 2 if mode == "tf32x3" else 1
    weights = taps_r * taps_y * sum(x.counts) * min(gather.channels) * 8 * 4 * split
    stages = 2 * (channels * gather.planes(r) * lines * line_bytes + weights)
    if size == 2 and _tile_registers(geometry, contraction, mode, gather) > HALVES_REGISTERS:
        return False
    return stages <= SMALL_STAGES_BYTES


def _tile_of(schedule: GatherTiles, plan: KernelPlan, problem: Problem) -> tuple[int, int]:
    """A warp's tile, of those compiled: as the kernel chooses it."""
    fprop = plan.contraction == "fprop"
    channels = problem.coarse_channels if fprop else problem.fine_channels
    needed = -(-channels // plan.geometry.groups // 8)
    return min(schedule.tiles, key=lambda tile: _block_cost(tile[1] // 8, needed))


def tiles_space(geometry: Geometry, contraction: str, mode: str) -> list[Candidate]:
    """The schedules of fprop or dgrad that may be tried, or why they cannot be."""
    default = gather_tiles(geometry, contraction, mode)
    per_group = output_channels(geometry, contraction)
    most = 8 if per_group is None else -(-per_group // 8)
    sizes: list[tuple[int, ...]] = [(blocks,) for blocks in range(1, min(most, 8) + 1)]
    if per_group is None:
        sizes = list(UNKNOWN_CHOICES)
    # One number of rows: layers that want several combine what each of them wants.
    schedules = [
        replace(
            default,
            unroll=style,
            tiles=tuple((rows, 8 * b) for b in blocks),
            groups=groups,
            granules=granules,
            pairs=pairs,
        )
        for style, rows, blocks in product(STYLES, (1, 2, 3, 4, 6, 8), sizes)
        for groups in (GROUPS if 8 * max(blocks) >= GROUP_CHANNELS else GROUPS[:1])
        for granules, pairs in ((False, False), (True, False), (False, True))
    ]

    def spills(gather: GatherSchedule) -> str:
        limits = GROUPED if _grouped(gather) else SPILL_FREE
        return _spills(geometry, contraction, mode, gather, limits)

    candidates = [Candidate(default, "")]
    for schedule in dict.fromkeys(schedules):
        if schedule != default:
            refusal = _tuned_refusal(geometry, contraction, mode, schedule)
            candidates.append(Candidate(schedule, refusal or _first_refusal(schedule, spills)))
    return candidates


def tiles_refusal(plan: KernelPlan, architectures: Iterable[str]) -> str:
    """Why a plan of fprop or dgrad cannot be for these architectures; empty if it can."""
    geometry, contraction, mode = plan.geometry, plan.contraction, plan.dtype
    names = [name.partition("+")[0] for name in architectures]
    if all(name == GROUPED_ARCHITECTURE for name in names):
        return _tuned_refusal(geometry, contraction, mode, plan.schedule)
    refusal = _refusal(geometry, contraction, mode, plan.schedule)
    if refusal or not any(int(name.rstrip("af")) >= NEWER_ARCHITECTURE for name in names):
        return refusal

    def spills(gather: GatherSchedule) -> str:
        return _spills(geometry, contraction, mode, gather, NEWER)

    return _first_refusal(plan.schedule, spills)


def combine_tiles(choices: Sequence[tuple[KernelPlan, Problem]]) -> GatherTiles | None:
    """See :meth:`convgen.engines.Engine.combine`; of plans of fprop or dgrad."""
    plans = [plan for plan, _ in choices]
    first = plans[0].schedule
    if any(replace(plan.schedule, tiles=first.tiles) != first for plan in plans):
        return None
    wanted = {_tile_of(plan.schedule, plan, problem) for plan, problem in choices}
    rows_of = {channels: rows for rows, channels in [*first.tiles, *wanted]}
    by_channels = sorted(rows_of.items(), reverse=True)
    combined: GatherTiles = replace(
        first, tiles=tuple((rows, channels) for channels, rows in by_channels)
    )
    # Every call must take the tile that it has in its own schedule.
    if any(
        _tile_of(combined, plan, problem) != _tile_of(plan.schedule, plan, problem)
        for plan, problem in choices
    ):
        return None
    return combined


def tiles_prediction(plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
    """Time of one call of fprop or dgrad."""
    rows, channels = tile = _tile_of(plan.schedule, plan, problem)
    gather = replace(plan, schedule=plan.schedule.gather(tile))
    blocks = channels // 8
    mode = plan.dtype
    split = 2 if mode == "tf32x3" else 1
    inputs = problem.fine_channels if plan.contraction == "fprop" else problem.coarse_channels
    elements = 4 // MODES[mode].size_bytes
    products = 3 if split == 2 else 1
    grouped = gpu.grouped_product_clocks > 0 and channels >= GROUP_CHANNELS
    # Lanes load weights once per tap; the tensor core itself does, for the 64 positions of a
    # group and each row.
    weight = (2.0 * blocks * split, 1.0 * blocks * split)
    if grouped:
        weight = (0.5 * blocks * products * rows, 4.0)
    clocks = gpu.grouped_product_clocks if grouped else gpu.product_clocks
    warps = 4 * plan.schedule.groups if grouped else LONE_WARPS
    many = grouped or (
        gpu.grouped_product_clocks > 0 and _products(gather.schedule) <= FEW_PRODUCTS
    )
    staging_warps = MOST_WARPS - warps if many else CREW_WARPS
    _, _, x = arrange(gather_axes(plan.geometry, plan.contraction))
    load = (4.0, {"tf32": 8.0, "tf32x3": 24.0}.get(mode, 4.0))
    narrow = NARROW_PAIRS if elements == 2 else NARROW_ELEMENTS
    if plan.schedule.granules:
        # Each element of a word is loaded, and a pair put together.
        load = (4.0 * elements * min(x.step, 2), load[1] + 8 * (elements - 1))
        narrow = GRANULES
    if plan.schedule.pairs:
        # Two loads of two words instead of four, of fewer pairs than there are columns, some of
        # which are copied from two pairs.
        columns, pairs = map(len, _pairs_of_line(x))
        load = (4.0 * pairs / columns, load[1] - 4 + 2 * pairs / columns + 2)
    warp = Warp(
        lanes=16,
        channels=channels,
        warps=warps,
        # Four loads of a fragment, and the rounding or splitting of its words.
        load=load,
        weight=weight,
        tap_clocks=blocks * clocks * products,
        tap_instructions=products if grouped else blocks * products,
        words=-(-inputs // plan.geometry.groups // elements // 8) * 8,
        weight_bytes=32 * blocks * split,
        staged_words=8,
        staged_clocks=60,
        narrow=narrow,
        staging_warps=staging_warps,
    )
    size_bytes = MODES[mode].size_bytes
    return gather_prediction(gather, problem, gpu, warp, element_bytes=size_bytes, word_bytes=4)


def tiles_context(plan: KernelPlan) -> dict[str, Any]:
    """What the template of fprop and dgrad is given."""
    # cuDNN rounds a transposed convolution's operands to nearest even, a convolution's away
    # from zero; rounding alike keeps TF32 results within 3e-6 of its own.
    rounding = "NEAREST_AWAY" if plan.contraction == "fprop" else "NEAREST_EVEN"
    math = {
        "tf32": f"Tf32<Rounding::{rounding}>",
        "tf32x3": "Tf32x3",
        "f16tc": "Pairs<half>",
        "bf16tc": "Pairs<bfloat16>",
    }[plan.dtype]
    element = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
    _, _, x = arrange(gather_axes(plan.geometry, plan.contraction))
    # What is unrolled depends on the rows, all else on the style alone.
    by_rows = {
        gather.rows: gather_context(plan.geometry, plan.contraction, gather)
        for gather in plan.schedule.gathers
    }
    return next(iter(by_rows.values())) | {
        "paired": lambda columns: paired_lines(columns, first_offset(x) % 2),
        "units_of": {rows: context["units"] for rows, context in by_rows.items()},
        "element": element[MODES[plan.dtype].torch_name],
        "math": math,
    }
