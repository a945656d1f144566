"""wgrad of the ``mma`` engine: which tile of the weights a warp keeps, and how rows are staged.

Times below are clocks of a multiprocessor: ``mma.sync`` issues one product (m16n8k8 in TF32,
m16n8k16 in 16 bits) in 1.5 clocks of all four quarters together, shared memory serves 128 bytes, a
wavefront, in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import gcd
from typing import Any

from convgen.engines import Candidate, KernelPlan
from convgen.engines.cost import Gpu, Prediction, Problem, memory_ms
from convgen.spec import Geometry
from convgen.spec.dtypes import MODES

QUAD = 4
"""Neighbouring positions along W that one lane feeds to a product."""

ROWS, COLUMNS = 16, 8
PRODUCT_CLOCKS = 1.5
LEVEL2_BYTES = 28
"""Per clock, with all multiprocessors at work."""
# Sums, fragments and window of a lane. 168 registers are what 12 warps leave a thread; addresses
# and the loop take the rest. Of operands that are split, not all live at once; what lasts while
# they come and go is counted apart.
REGISTERS, REGISTERS_SPLIT, REGISTERS_LASTING = 142, 146, 116
# Chunks of 16 positions that 3xTF32 sums in the tensor cores, which truncate when they add, before
# their sum is added in fp32: 8 products of depth 8, three each.
FLUSH = 4
# Staged columns of one window; a longer reach along W is split into blocks of taps.
MAX_REACH = 96
# Where four warps multiply together: registers that sums and operands of a lane may take, of the
# 144 that twelve such warps have beside four that stage.
GROUP_REGISTERS = 112
GROUPS_OF_WARPS = 3
GROUP_LATENCY = 200
"""Clocks of a group from the end of its products to its next ones."""
GROUP_COPY_CLOCKS = 12
"""Of a warp's asynchronous copy, whatever its width."""
GROUP_LEAST_COARSE = 16
MAX_GROUP_BLOCKS, MAX_GROUP_TILES = 8, 2
UNKNOWN_GROUP_BLOCKS = (4, 6, 8)
# Coarse tiles to compile where the channels are not known: 16, 32 and 48 pad little of any count.
UNKNOWN_M_TILES = (1, 2, 3)
MAX_M_TILES, MAX_N_TILES = 4, 8
MAX_TAPS = 28
# What groups of warps take longer, as measured, where few warps stage strided lines word by word.
STAGING_BOUND = 2.5


@dataclass(frozen=True)
class WgradSchedule:
    """What a warp keeps in registers, and what the template unrolls.

    ``tiles`` lists the compiled tiles (coarse tiles of 16 channels, fine tiles of 8), each at
    ``taps_h x taps_w`` taps; a call takes the one that suits its channels. ``flush`` is the number
    of chunks that are summed in the tensor cores at once, 0 for all.

    ``group_tiles`` are tiles (fine tiles of 16 channels, coarse blocks of 8), each at
    ``group_taps`` taps along H and W, where four warps multiply together (wgmma, sm_90a): such
    devices run these instead. Without them, with operands that are split or few channels in a
    group, they run the others too.
    """

    taps_h: int
    taps_w: int
    tiles: tuple[tuple[int, int], ...]
    flush: int
    group_taps: tuple[int, int] = (0, 0)
    group_tiles: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a row of the fine tensor lies in shared memory. Lengths are in staged columns or words.

    ``position_columns`` columns belong to one position, ``column_step`` apart in the tensor (and
    ``tap_columns`` from tap to tap); the columns of a quad take ``quad_pitch`` words. The first
    column is ``shift`` columns left of the first that is read, so that tiles start at multiples of
    ``column_align`` elements. A window is ``window_vectors`` loads of ``vector`` words, each of
    ``wavefronts``; taps read ``used_vectors`` of them, as ``operands`` of two registers each, which
    taps share where they lie as far apart as positions. ``joins``: several blocks of taps along W
    may share a tile. ``*_residue``: of the channel pitches, mod 32 words.
    """

    position_columns: int
    column_step: int
    tap_columns: int
    quad_pitch: int
    shift: int
    column_align: int
    window_vectors: int
    used_vectors: int
    operands: int
    vector: int
    wavefronts: int
    joins: bool
    coarse_residue: int
    fine_residue: int

    @property
    def position_step(self) -> int:
        """Columns of the tensor that staged ones cover, from position to position."""
        return self.position_columns * self.column_step


@dataclass(frozen=True)
class Tile:
    """A compiled tile and the wavefronts of shared memory that a warp's chunk of it takes."""

    m: int
    n: int
    coarse_wavefronts: int
    fine_wavefronts: int
    loose_loads: int = 0
    """Where lines are staged as they lie in memory: loads of a word or a part of it."""


def _wavefronts(vector: int, lane_pitch: int, channel_pitch: int) -> int:
    """Wavefronts of a warp's loads of ``vector`` words: lane 4 g + t at t, g of the pitches.

    Shared memory serves 32 lanes of one word, 16 of two, or 8 of four at a time.
    """
    lanes = 32 // vector
    total = 0
    for first in range(0, 32, lanes):
        banks: dict[int, set[int]] = {}
        for lane in range(first, first + lanes):
            at = lane // 4 * channel_pitch + lane % 4 * lane_pitch
            for word in range(at, at + vector):
                banks.setdefault(word % 32, set()).add(word)
        total += max(len(words) for words in banks.values())
    return total


@cache
def _pitches(vector: int, lane_pitch: int) -> tuple[int, int, int]:
    """(least wavefronts, words added to ``lane_pitch``, channel pitch mod 32) of a load."""
    return min(
        (_wavefronts(vector, lane_pitch + extra, 1024 + residue), extra, residue)
        for extra in (0, vector)
        for residue in range(0, 32, 4)
    )


def _layout(geometry: Geometry, elements: int, taps: int) -> Layout:
    """The layout for windows of ``taps`` taps, ``elements`` elements to a word."""
    kernel, stride = geometry.kernel[2], geometry.stride[2]
    dilation, padding = geometry.dilation[2], geometry.padding[2]
    blocks = -(-kernel // taps)
    # Columns between those that positions and taps share are not staged.
    step = stride if kernel == 1 else gcd(stride, dilation)
    tap_columns = 1 if kernel == 1 else dilation // step
    reach = (taps - 1) * tap_columns + 1
    # Where neighbouring positions share nothing, neither are those between two reaches.
    apart = stride // step > reach
    position_columns = reach if apart else stride // step

    lane_pitch = QUAD * position_columns // elements
    vector = 4 if lane_pitch % 4 == 0 else 2
    width = vector * elements
    wavefronts, extra, residue = _pitches(vector, lane_pitch)

    def vectors(shift: int) -> int:
        return -(-(shift + (QUAD - 1) * position_columns + reach) // width)

    align, shift = 1, 0
    if step == 1 and not apart:
        # The widest copies that cost no further load; pairs of 16-bit elements at any price, for
        # asynchronous copies have 4 bytes at least.
        block_step = taps * dilation if blocks > 1 else 0
        narrowest = elements if block_step % elements == 0 else 1
        least = vectors(-padding % narrowest)
        for candidate in (4, 2, 1):
            start = -padding % candidate
            if candidate >= narrowest and block_step % candidate == 0 and vectors(start) == least:
                align, shift = candidate, start
                break
    block_columns = taps * tap_columns
    joins = not apart and block_columns % (QUAD * position_columns if extra else width) == 0
    used = {
        (shift + p * position_columns + w * tap_columns) // width
        for p, w in product(range(QUAD), range(taps))
    }
    # First columns of what a product reads; of 32-bit elements a tap has two.
    operands = {
        w * tap_columns + step * position_columns
        for w, step in product(range(taps), range(2 // elements))
    }
    quad_words = QUAD // elements
    return Layout(
        position_columns=position_columns,
        column_step=step,
        tap_columns=tap_columns,
        quad_pitch=lane_pitch + extra,
        shift=shift,
        column_align=align,
        window_vectors=vectors(shift),
        used_vectors=len(used),
        operands=len(operands),
        vector=vector,
        wavefronts=wavefronts,
        joins=joins,
        coarse_residue=_pitches(quad_words, quad_words)[2],
        fine_residue=residue,
    )


def _elements(mode: str) -> int:
    return 4 // MODES[mode].size_bytes


def _tile(layout: Layout, elements: int, taps_h: int, m: int, n: int) -> Tile:
    # A fragment is two rows of a quad: 512 bytes for 32-bit elements.
    coarse = m * 8 // elements
    return Tile(m, n, coarse, n * taps_h * layout.used_vectors * layout.wavefronts)


def _group_tile(layout: Layout, taps: tuple[int, int], m: int, blocks: int) -> Tile:
    """A tile of groups of warps: ``m`` tiles of 16 fine channels, 8 ``blocks`` coarse ones."""
    rows = 2 * m * taps[0]
    columns = {
        p * layout.position_columns + w * layout.tap_columns
        for p, w in product(range(QUAD), range(taps[1]))
    }
    # Single elements, or words where all columns between are staged, which the first column may
    # halve. Half of all lines read one more where their last columns are at stake.
    loads = len(columns)
    if layout.column_step == 1 and layout.position_columns % 2 == 0:
        loads = max(columns) // 2 + 1 + max(columns) % 2
    elif layout.column_step == 1:
        end = layout.shift + max(columns) + 1
        loads = -(-end // 2) - layout.shift // 2 + (end % 2 == 0)
    wavefronts = rows * layout.used_vectors * layout.wavefronts
    return Tile(m, blocks, 0, wavefronts, rows * loads)


def _staging(layout: Layout, elements: int, m: int, n: int, rows: int) -> tuple[float, float]:
    """What staging a chunk's share of a tile takes, of schedulers and of level 2.

    ``rows`` blocks of rows of taps share it, as many as go with other warps into a thread block.
    """
    positions = 16
    # A third of a tile is its halo.
    fine = 1.3 * COLUMNS * n * positions * layout.position_columns
    coarse = ROWS * m * positions
    sharers = min(rows, 3)
    # Instructions of four schedulers, per access of a warp; below 4 bytes through registers.
    access = 7 / 4 * (3 if layout.column_align < elements else 1)
    issue = (access * fine / layout.column_align + 7 / 4 * coarse / QUAD) / 32
    level2 = (fine + coarse) * 4 / elements / LEVEL2_BYTES
    return issue / sharers, level2 / sharers


def _clocks(
    mode: str, layout: Layout, rows: int, taps_h: int, taps_w: int, m: int, n: int
) -> float | None:
    """Time of a chunk of a warp, or None if its registers do not fit.

    ``rows`` counts the blocks of ``taps_h`` rows of taps.
    """
    elements = _elements(mode)
    split = mode == "tf32x3"
    tile = _tile(layout, elements, taps_h, m, n)
    sums = 4 * m * n * taps_h * taps_w
    fragments = m * 8 // elements
    window = layout.used_vectors * layout.vector
    # A window as long as the registers allow; the compiler loads the rest as it goes. In 16 bits
    # the pairs that taps read are made beside it.
    held = min(window, 24) * elements
    # Taps that lie apart share fewer pairs of columns; each pair is a copy of two registers.
    pairs = 4 if elements == 1 and layout.tap_columns > 1 else 0
    if split:
        if 2 * (sums + fragments + held) > REGISTERS_SPLIT:
            return None
        # Both sets of sums are there all the time, while fragments and windows come and go; each
        # window has an address.
        lasting = 2 * sums + fragments / 2 + held + pairs + 2 * n * taps_h
        if lasting > REGISTERS_LASTING:
            return None
    elif sums + fragments + held + pairs > REGISTERS:
        return None
    products = m * n * taps_h * taps_w * 2 // elements
    tensor = PRODUCT_CLOCKS * products * (3 if split else 1)
    shared = tile.coarse_wavefronts + tile.fine_wavefronts
    # Rounding or splitting, addresses, the loop; four instructions a clock.
    operands = fragments + n * taps_h * window
    issue = (products + operands * (1 if elements == 2 else 2.5) + 40) / 4
    copies, level2 = _staging(layout, elements, m, n, rows)
    issue += copies
    return max(tensor, 1.1 * shared, issue, level2) + 0.2 * (tensor + shared + issue + level2)


def _group_registers(layout: Layout, elements: int, taps_h: int, taps_w: int, m: int) -> int:
    """Registers of a lane's operands, where groups of warps multiply: four for each product.

    A tap's second product in TF32 reads what its neighbour's first one does, where taps are as far
    apart as positions.
    """
    shared = elements == 2 or layout.tap_columns == layout.position_columns
    products = taps_w + 1 if shared else 2 * taps_w
    return 4 * m * taps_h * products


def _group_clocks(
    mode: str, layout: Layout, taps: tuple[int, int], m: int, blocks: int
) -> float | None:
    """Time of a chunk of four warps that multiply together, or None if registers do not fit."""
    elements = _elements(mode)
    taps_h, taps_w = taps
    sums = 4 * m * blocks * taps_h * taps_w
    if sums + _group_registers(layout, elements, taps_h, taps_w, m) > GROUP_REGISTERS:
        return None
    products = m * taps_h * taps_w * 2 // elements
    # wgmma takes half a clock per column, and reads its second operand in half of that.
    tensor = 4.0 * blocks * products
    windows = 2 * m * taps_h * layout.used_vectors * layout.wavefronts
    shared = tensor / 2 + 4 * windows
    latency = (tensor + GROUP_LATENCY) / GROUPS_OF_WARPS
    return max(tensor, shared, latency) + 0.1 * (tensor + shared)


def _group_cost(
    geometry: Geometry, mode: str, layout: Layout, taps: tuple[int, int], tile: tuple[int, int]
) -> float | None:
    """As ``_cost``, where groups of warps multiply: clocks per chunk, of all taps and channels."""
    m, blocks = tile
    elements = _elements(mode)
    clocks = _group_clocks(mode, layout, taps, m, blocks)
    if clocks is None:
        return None
    coarse, fine = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    tiles = -(-(fine or 16 * m) // (ROWS * m))
    counts = (tiles, *(-(-k // t) for k, t in zip(geometry.kernel, (1, *taps), strict=True)))
    best = math.inf
    # How a block of three groups takes the units, and what it stages for them.
    for split in product(*(range(1, count + 1) for count in counts)):
        n, d, h, w = split
        units = n * d * h * w
        if units > GROUPS_OF_WARPS * 4 or (w > 1 and not layout.joins):
            continue
        blocks_of_units = math.prod(-(-a // b) for a, b in zip(counts, split, strict=True))
        halo = (1.0 + 0.3 * min(2, d * h - 1)) * (1.5 if w < counts[3] else 1.0)
        words = 16 * (8 * blocks + ROWS * m * n * halo * layout.position_columns) / elements
        copies = ROWS * m * n * 16 * halo * layout.position_columns / 32 / layout.column_align
        staging = max(4 * words / LEVEL2_BYTES, copies * GROUP_COPY_CLOCKS)
        # Half a tile's chunks wait for nobody.
        clocks_of_all = max(-(-units // 4) * clocks, staging) + 0.2 * staging
        best = min(best, blocks_of_units * clocks_of_all)
    if coarse:
        best *= -(-coarse // (8 * blocks))
    return best / ((1 if coarse else blocks) * (1 if fine else m))


def _group_schedule(
    geometry: Geometry, mode: str
) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """The best ``group_taps`` and ``group_tiles``."""
    none: tuple[tuple[int, int], tuple[tuple[int, int], ...]] = (0, 0), ()
    coarse, fine = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    if not _suits_groups(geometry, mode):
        return none
    layouts = _layouts(geometry, mode)
    needed = -(-coarse // 8) if coarse else 0
    sizes = range(1, min(needed, MAX_GROUP_BLOCKS) + 1) if coarse else UNKNOWN_GROUP_BLOCKS
    most_m = min(MAX_GROUP_TILES, -(-fine // ROWS)) if fine else 1
    costs = {
        (taps, (m, blocks)): cost
        for taps, m, blocks in product(_tap_blocks(geometry, layouts), range(1, most_m + 1), sizes)
        if (cost := _group_cost(geometry, mode, layouts[taps[1]], taps, (m, blocks))) is not None
    }
    if not costs:
        return none
    if coarse:
        taps, tile = min(costs, key=lambda key: (costs[key], key))
        return taps, (tile,)

    # The taps with the least time for all sizes together; one that does not fit falls back to
    # several smaller ones.
    def time(taps: tuple[int, int], size: int) -> float:
        return min(
            (
                costs[taps, (1, b)] * -(-size // b) * b / size
                for b in sizes
                if (taps, (1, b)) in costs
            ),
            default=math.inf,
        )

    taps = min((t for t, _ in costs), key=lambda t: (sum(time(t, b) for b in sizes), t))
    return taps, tuple((1, b) for b in sizes if (taps, (1, b)) in costs)


def _suits_groups(geometry: Geometry, mode: str) -> bool:
    """Whether a group's channels may fill the products of groups of warps."""
    coarse, fine = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    few = (coarse or GROUP_LEAST_COARSE) < GROUP_LEAST_COARSE or (fine or ROWS) < ROWS
    unknown = geometry.groups > 1 and not (coarse and fine)
    return mode != "tf32x3" and not few and not unknown


def _staging_bounds_groups(geometry: Geometry, mode: str) -> bool:
    """Whether groups of warps wait for those that stage: strided lines, copied word by word."""
    return mode == "tf32" and geometry.stride[2] > 1


def _layouts(geometry: Geometry, mode: str) -> dict[int, Layout]:
    """The layouts that blocks of so many taps along W may have."""
    elements = _elements(mode)
    layouts = {}
    for taps_w in _block_sizes(geometry.kernel[2]):
        layout = _layout(geometry, elements, taps_w)
        if layout.window_vectors * layout.vector * elements <= MAX_REACH or taps_w == 1:
            layouts[taps_w] = layout
    return layouts


def _tap_blocks(geometry: Geometry, layouts: dict[int, Layout]) -> list[tuple[int, int]]:
    """The blocks of (taps along H, taps along W) that a warp may have."""
    return [
        (taps_h, taps_w)
        for taps_h, taps_w in product(_block_sizes(geometry.kernel[1]), layouts)
        if taps_h * taps_w <= MAX_TAPS
    ]


def _cost(
    geometry: Geometry,
    mode: str,
    layout: Layout,
    taps: tuple[int, int],
    tile: tuple[int, int],
    channels: tuple[int | None, int | None],
) -> float | None:
    """Clocks per chunk of positions, of all taps and of ``channels`` (per group) where known.

    Else of 16 x 8 of them. None where a warp's registers do not suffice.
    """
    (taps_h, taps_w), (m, n), (coarse, fine) = taps, tile, channels
    _, kh, kw = geometry.kernel
    rows = geometry.kernel[0] * -(-kh // taps_h)
    clocks = _clocks(mode, layout, rows, taps_h, taps_w, m, n)
    if clocks is None:
        return None
    units: float = -(-kh // taps_h) * -(-kw // taps_w)
    if taps_w < kw and layout.position_step != geometry.stride[2]:
        units *= 1.5  # positions share nothing: every block of taps stages the whole row
    units *= -(-coarse // (ROWS * m)) if coarse else 1
    units *= -(-fine // (COLUMNS * n)) if fine else 1
    return clocks * units / ((1 if coarse else m) * (1 if fine else n))


def wgrad_schedule(geometry: Geometry, mode: str) -> WgradSchedule:
    """The default schedule of a mode (a key of ``spec.dtypes.MODES``): least time per weight."""
    channels = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    coarse, fine = channels
    layouts = _layouts(geometry, mode)

    def cost(taps: tuple[int, int], m: int, n: int) -> float | None:
        return _cost(geometry, mode, layouts[taps[1]], taps, (m, n), channels)

    most_n = MAX_N_TILES if fine else 2

    def best(
        blocks: list[tuple[int, int]], m_tiles: tuple[int, ...], most_n: int = most_n
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(taps, tile) of the least time."""
        candidates = []
        for taps, m, n in product(blocks, m_tiles, range(1, most_n + 1)):
            time = cost(taps, m, n)
            if time is not None:
                # Of equals the smaller tile: it leaves more blocks to spread.
                candidates.append((time, m * n * taps[0] * taps[1], -m, n, taps))
        _, _, negative_m, n, taps = min(candidates)
        return taps, (-negative_m, n)

    blocks = _tap_blocks(geometry, layouts)
    if coarse:
        taps, tile = best(blocks, tuple(range(1, MAX_M_TILES + 1)))
        tiles: tuple[tuple[int, int], ...] = (tile,)
    elif geometry.groups > 1:
        # Groups tend to be small: a warp takes more taps rather than more channels, which may not
        # exist, and larger tiles follow where they fit.
        taps, tile = best(blocks, (1,), 1)
        larger = (best([taps], (m,))[1] for m in UNKNOWN_M_TILES if cost(taps, m, 1) is not None)
        tiles = tuple(dict.fromkeys([tile, *larger]))
    else:
        taps, _ = best(blocks, UNKNOWN_M_TILES)
        tiles = tuple(
            best([taps], (m,))[1] for m in UNKNOWN_M_TILES if cost(taps, m, 1) is not None
        )
    alone = WgradSchedule(*taps, tiles, _flush(mode))
    if _staging_bounds_groups(geometry, mode):
        return alone
    return with_groups(alone, geometry, mode)


def with_groups(schedule: WgradSchedule, geometry: Geometry, mode: str) -> WgradSchedule:
    """The same, with the best tiles of groups of warps, where channels suit them."""
    taps, tiles = _group_schedule(geometry, mode)
    return replace(schedule, group_taps=taps, group_tiles=tiles)


def _flush(mode: str) -> int:
    return FLUSH if mode == "tf32x3" else 0


def wgrad_refusal(geometry: Geometry, mode: str, schedule: WgradSchedule) -> str:
    """Why a mode cannot have a schedule; empty if it can."""
    layouts = _layouts(geometry, mode)
    taps = schedule.taps_h, schedule.taps_w
    if taps not in _tap_blocks(geometry, layouts):
        return f"{taps[0]} x {taps[1]} taps do not fill their blocks, or reach too far for a window"
    if schedule.flush != _flush(mode):
        return f"sums of {mode} leave the tensor cores after {_flush(mode)} chunks (0: at the end)"
    for m, n in schedule.tiles:
        if not (1 <= m <= MAX_M_TILES and 1 <= n <= MAX_N_TILES):
            return f"tiles have at most {MAX_M_TILES} x {MAX_N_TILES} products, not {m} x {n}"
        if _clocks(mode, layouts[taps[1]], 1, *taps, m, n) is None:
            return f"a tile of {m} x {n} products for {taps[0]} x {taps[1]} taps spills"
    return _group_refusal(geometry, mode, schedule)


def _group_refusal(geometry: Geometry, mode: str, schedule: WgradSchedule) -> str:
    taps = schedule.group_taps
    if not schedule.group_tiles:
        return "" if taps == (0, 0) else "taps of groups of warps need tiles"
    if mode == "tf32x3":
        return "groups of warps do not multiply operands that are split"
    layouts = _layouts(geometry, mode)
    if taps not in _tap_blocks(geometry, layouts):
        return f"{taps[0]} x {taps[1]} taps do not fill their blocks, or reach too far for a window"
    for m, blocks in schedule.group_tiles:
        if not (1 <= m <= MAX_GROUP_TILES and 1 <= blocks <= MAX_GROUP_BLOCKS):
            return (
                f"tiles of groups have at most {MAX_GROUP_TILES} x {MAX_GROUP_BLOCKS} products, "
                f"not {m} x {blocks}"
            )
        if _group_clocks(mode, layouts[taps[1]], taps, m, blocks) is None:
            return f"a group's tile of {m} x {blocks} for {taps[0]} x {taps[1]} taps spills"
    return ""


def wgrad_space(geometry: Geometry, mode: str) -> list[Candidate]:
    """All schedules of a mode: every block of taps with every tile, or a list of tiles."""
    default = wgrad_schedule(geometry, mode)
    coarse, fine = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    most_m = min(MAX_M_TILES, -(-coarse // ROWS)) if coarse else 0
    most_n = min(MAX_N_TILES, -(-fine // COLUMNS)) if fine else 2
    lists: list[tuple[tuple[int, int], ...]]
    if coarse:
        lists = [((m, n),) for m, n in product(range(1, most_m + 1), range(1, most_n + 1))]
    else:
        lists = [
            tuple((m, n) for m in sizes)
            for sizes, n in product((UNKNOWN_M_TILES, (1, 2), (1,), (2,)), range(1, most_n + 1))
        ]
    taps_blocks = _tap_blocks(geometry, _layouts(geometry, mode))
    schedules = [
        WgradSchedule(*taps, tiles, _flush(mode)) for taps, tiles in product(taps_blocks, lists)
    ]
    if _suits_groups(geometry, mode):
        most = min(MAX_GROUP_BLOCKS, -(-coarse // 8)) if coarse else MAX_GROUP_BLOCKS
        most_m = min(MAX_GROUP_TILES, -(-fine // ROWS)) if fine else MAX_GROUP_TILES
        tiles_of_groups: list[tuple[tuple[int, int], ...]] = [
            ((m, blocks),) for m, blocks in product(range(1, most_m + 1), range(2, most + 1))
        ]
        if not coarse:
            tiles_of_groups += [tuple((1, b) for b in UNKNOWN_GROUP_BLOCKS), ((1, 4), (1, 6))]
        schedules += [
            replace(default, group_taps=taps, group_tiles=tiles)
            for taps, tiles in product(taps_blocks, tiles_of_groups)
        ]
    return [
        Candidate(schedule, wgrad_refusal(geometry, mode, schedule))
        for schedule in dict.fromkeys([default, *schedules])
    ]


def wgrad_prediction(plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
    """Time of a call: the chunks of its positions, dealt to all multiprocessors."""
    geometry, schedule = plan.geometry, plan.schedule
    channels = problem.coarse_channels // geometry.groups, problem.fine_channels // geometry.groups
    elements = _elements(plan.dtype)
    # The kernel takes the compiled tile that suits a call's channels.
    grouped = gpu.grouped_product_clocks > 0 and schedule.group_tiles
    known = replace(
        geometry,
        coarse_channels=problem.coarse_channels,
        fine_channels=problem.fine_channels,
    )
    if grouped:
        taps = schedule.group_taps
        layout = _layout(geometry, elements, taps[1])
        found = [_group_cost(known, plan.dtype, layout, taps, t) for t in schedule.group_tiles]
    else:
        taps = schedule.taps_h, schedule.taps_w
        layout = _layout(geometry, elements, schedule.taps_w)
        found = [_cost(geometry, plan.dtype, layout, taps, t, channels) for t in schedule.tiles]
    costs = [clocks for clocks in found if clocks is not None]
    if not costs:
        return Prediction(math.inf, "registers")
    d, h, w = problem.coarse_extent
    # Rows are padded to whole quads.
    chunks = problem.batch * d * h * -(-w // QUAD) * QUAD / 16
    clocks = chunks * geometry.groups * min(costs)
    if grouped:
        clocks *= STAGING_BOUND if _staging_bounds_groups(geometry, plan.dtype) else 1
    else:
        clocks *= geometry.kernel[0] * gpu.product_clocks / PRODUCT_CLOCKS
    ms = clocks / gpu.multiprocessors / gpu.ghz * 1e-6
    # Adding up the partial results of all blocks.
    ms += 0.01
    floor = memory_ms(geometry, problem, MODES[plan.dtype].size_bytes, gpu)
    return Prediction(ms, "arithmetic") if ms > floor else Prediction(floor, "memory")


def _block_sizes(kernel: int) -> list[int]:
    """Taps per block along an axis: sizes that fill their blocks evenly, and multiples of four."""
    even = {-(-kernel // blocks) for blocks in range(1, kernel + 1)}
    return sorted(size for size in even | {4, 8, 12, 16} if size <= min(kernel, MAX_TAPS))


def wgrad_context(plan: KernelPlan) -> dict[str, Any]:
    """What ``cuda/mma/wgrad.cu.j2`` is given."""
    schedule: WgradSchedule = plan.schedule
    elements = _elements(plan.dtype)
    layout = _layout(plan.geometry, elements, schedule.taps_w)
    group_layout = _layout(plan.geometry, elements, max(schedule.group_taps[1], 1))
    element, product_type = {
        "tf32": ("float", "Tf32Product"),
        "tf32x3": ("float", "SplitTf32Product"),
        "f16tc": ("half", "HalfProduct"),
        "bf16tc": ("bfloat16", "Bfloat16Product"),
    }[plan.dtype]
    return {
        "element": element,
        "product": product_type,
        "layout": layout,
        "tiles": [_tile(layout, elements, schedule.taps_h, m, n) for m, n in schedule.tiles],
        "group_layout": group_layout,
        "group_tiles": [
            _group_tile(group_layout, schedule.group_taps, *t) for t in schedule.group_tiles
        ],
    }
