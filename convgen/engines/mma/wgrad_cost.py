"""What a tile of wgrad takes, and whether registers suffice for it.

Times are clocks of a multiprocessor of an H200, whose shared memory serves 128 bytes, a wavefront,
in one.
"""

from __future__ import annotations

import math
from itertools import product
from operator import gt

from convgen.engines.cost import H200, WARPGROUP_LATENCY
from convgen.engines.mma.wgrad_layout import (
    COLUMNS,
    QUAD,
    ROWS,
    Layout,
    elements_of,
    tile_of,
)
from convgen.engines.problem import Problem

# Sums, fragments and window of a lane. 168 registers are what 12 warps leave a thread; addresses
# and the loop take the rest. Of operands that are split, not all live at once; what lasts while
# they come and go is counted apart.
REGISTERS, REGISTERS_SPLIT, REGISTERS_LASTING = 142, 146, 116
# Where four warps multiply together: registers that sums and operands of a lane may take, of the
# 144 that twelve such warps have beside four that stage.
WARPGROUP_REGISTERS = 112
WARPGROUPS = 3
WARPGROUP_COPY_CLOCKS = 12
"""Of a warp's asynchronous copy, whatever its width."""
_SPLITS = tuple(
    split
    for split in product(range(1, WARPGROUPS * 4 + 1), repeat=4)
    if math.prod(split) <= WARPGROUPS * 4
)
"""How many units a block may have, along fine channels, D, H and W."""


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
    level2 = (fine + coarse) * 4 / elements / H200.level2_bytes
    return issue / sharers, level2 / sharers


def clocks_of(
    mode: str, layout: Layout, rows: int, taps_h: int, taps_w: int, m: int, n: int
) -> float | None:
    """Time of a chunk of a warp, or None if its registers do not fit.

    ``rows`` counts the blocks of ``taps_h`` rows of taps.
    """
    elements = elements_of(mode)
    split = mode == "tf32x3"
    tile = tile_of(layout, elements, taps_h, m, n)
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
    tensor = H200.product_clocks * products * (3 if split else 1)
    shared = tile.coarse_wavefronts + tile.fine_wavefronts
    # Rounding or splitting, addresses, the loop; four instructions a clock.
    operands = fragments + n * taps_h * window
    issue = (products + operands * (1 if elements == 2 else 2.5) + 40) / 4
    copies, level2 = _staging(layout, elements, m, n, rows)
    issue += copies
    return max(tensor, 1.1 * shared, issue, level2) + 0.2 * (tensor + shared + issue + level2)


def _warpgroup_registers(layout: Layout, elements: int, taps_h: int, taps_w: int, m: int) -> int:
    """Registers of a lane's operands, where warpgroups multiply: four for each product.

    A tap's second product in TF32 reads what its neighbour's first one does, where taps are as far
    apart as positions.
    """
    shared = elements == 2 or layout.tap_columns == layout.position_columns
    products = taps_w + 1 if shared else 2 * taps_w
    return 4 * m * taps_h * products


def warpgroup_clocks_of(
    mode: str, layout: Layout, taps: tuple[int, int], m: int, blocks: int
) -> float | None:
    """Time of a chunk of four warps that multiply together, or None if registers do not fit."""
    elements = elements_of(mode)
    taps_h, taps_w = taps
    sums = 4 * m * blocks * taps_h * taps_w
    if sums + _warpgroup_registers(layout, elements, taps_h, taps_w, m) > WARPGROUP_REGISTERS:
        return None
    products = m * taps_h * taps_w * 2 // elements
    # wgmma takes half a clock per column, and reads its second operand in half of that.
    tensor = 4.0 * blocks * products
    windows = 2 * m * taps_h * layout.used_vectors * layout.wavefronts
    shared = tensor / 2 + 4 * windows
    latency = (tensor + WARPGROUP_LATENCY) / WARPGROUPS
    return max(tensor, shared, latency) + 0.1 * (tensor + shared)


def warpgroup_cost_of(
    problem: Problem, layout: Layout, taps: tuple[int, int], tile: tuple[int, int]
) -> float | None:
    """As ``_cost``, where warpgroups multiply: clocks per chunk, of all taps and channels."""
    m, blocks = tile
    elements = elements_of(problem.kind)
    clocks = warpgroup_clocks_of(problem.kind, layout, taps, m, blocks)
    if clocks is None:
        return None
    coarse, fine = problem.geometry.channels_per_group
    tiles = -(-(fine or 16 * m) // (ROWS * m))
    counts = (
        tiles,
        *(-(-k // t) for k, t in zip(problem.geometry.kernel, (1, *taps), strict=True)),
    )
    best = math.inf
    # How a block of three warpgroups takes the units, and what it stages for them.
    for split in _SPLITS:
        n, d, h, w = split
        units = n * d * h * w
        if any(map(gt, split, counts)) or (w > 1 and not layout.joins):
            continue
        blocks_of_units = math.prod(-(-a // b) for a, b in zip(counts, split, strict=True))
        halo = (1.0 + 0.3 * min(2, d * h - 1)) * (1.5 if w < counts[3] else 1.0)
        words = 16 * (8 * blocks + ROWS * m * n * halo * layout.position_columns) / elements
        copies = ROWS * m * n * 16 * halo * layout.position_columns / 32 / layout.column_align
        staging = max(4 * words / H200.level2_bytes, copies * WARPGROUP_COPY_CLOCKS)
        # Half a tile's chunks wait for nobody.
        clocks_of_all = max(-(-units // 4) * clocks, staging) + 0.2 * staging
        best = min(best, blocks_of_units * clocks_of_all)
    if coarse:
        best *= -(-coarse // (8 * blocks))
    return best / ((1 if coarse else blocks) * (1 if fine else m))


def cost_of(
    problem: Problem,
    layout: Layout,
    taps: tuple[int, int],
    tile: tuple[int, int],
    channels: tuple[int | None, int | None],
) -> float | None:
    """Clocks per chunk of positions, of all taps and of ``channels`` (per group) where known.

    Else of 16 x 8 of them. None where a warp's registers do not suffice.
    """
    (taps_h, taps_w), (m, n), (coarse, fine) = taps, tile, channels
    _, kh, kw = problem.geometry.kernel
    rows = problem.geometry.kernel[0] * -(-kh // taps_h)
    clocks = clocks_of(problem.kind, layout, rows, taps_h, taps_w, m, n)
    if clocks is None:
        return None
    units: float = -(-kh // taps_h) * -(-kw // taps_w)
    if taps_w < kw and layout.position_step != problem.geometry.stride[2]:
        units *= 1.5  # positions share nothing: every block of taps stages the whole row
    units *= -(-coarse // (ROWS * m)) if coarse else 1
    units *= -(-fine // (COLUMNS * n)) if fine else 1
    return clocks * units / ((1 if coarse else m) * (1 if fine else n))


def staging_bounds_warpgroups(problem: Problem) -> bool:
    """Whether warpgroups wait for producers: strided lines, copied word by word."""
    return problem.kind == "tf32" and problem.geometry.stride[2] > 1
