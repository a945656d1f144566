"""How wgrad's operands lie in shared memory, and the tiles that a warp computes of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import gcd

from convgen.engines.problem import Problem
from convgen.spec.dtypes import MODES
from convgen.spec.geometry import Geometry

QUAD = 4
"""Neighbouring positions along W that one lane feeds to a product."""

ROWS, COLUMNS = 16, 8
# Staged columns of one window; a longer reach along W is split into blocks of taps.
MAX_REACH = 96
MAX_TAPS = 28


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
    unaligned_loads: int = 0
    """Where lines are staged as they lie in memory: loads of a word or a part of it."""


def wavefronts_of(vector: int, lane_pitch: int, channel_pitch: int) -> int:
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
        (wavefronts_of(vector, lane_pitch + extra, 1024 + residue), extra, residue)
        for extra in (0, vector)
        for residue in range(0, 32, 4)
    )


def layout_of(geometry: Geometry, elements: int, taps: int) -> Layout:
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


def elements_of(mode: str) -> int:
    return 4 // MODES[mode].size_bytes


def tile_of(layout: Layout, elements: int, taps_h: int, m: int, n: int) -> Tile:
    # A fragment is two rows of a quad: 512 bytes for 32-bit elements.
    coarse = m * 8 // elements
    return Tile(m, n, coarse, n * taps_h * layout.used_vectors * layout.wavefronts)


def warpgroup_tile_of(layout: Layout, taps: tuple[int, int], m: int, blocks: int) -> Tile:
    """A tile of warpgroups: ``m`` tiles of 16 fine channels, 8 ``blocks`` coarse ones."""
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


def layouts_of(problem: Problem) -> dict[int, Layout]:
    """The layouts that blocks of so many taps along W may have."""
    elements = elements_of(problem.kind)
    layouts = {}
    for taps_w in _block_sizes(problem.geometry.kernel[2]):
        layout = layout_of(problem.geometry, elements, taps_w)
        if layout.window_vectors * layout.vector * elements <= MAX_REACH or taps_w == 1:
            layouts[taps_w] = layout
    return layouts


def tap_blocks(geometry: Geometry, layouts: dict[int, Layout]) -> list[tuple[int, int]]:
    """The blocks of (taps along H, taps along W) that a warp may have."""
    return [
        (taps_h, taps_w)
        for taps_h, taps_w in product(_block_sizes(geometry.kernel[1]), layouts)
        if taps_h * taps_w <= MAX_TAPS
    ]


def _block_sizes(kernel: int) -> list[int]:
    """Taps per block along an axis: sizes that fill their blocks evenly, and multiples of four."""
    return [
        size
        for size in range(1, min(kernel, MAX_TAPS) + 1)
        if (size % 4 == 0 and size <= 16) or -(-kernel // -(-kernel // size)) == size
    ]
