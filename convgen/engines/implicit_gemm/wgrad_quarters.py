"""wgrad in TF32 and 3xTF32: ``templates/cuda/implicit_gemm/wgrad_quarters.cuh``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from convgen.engines.cost import (
    GEMM_TILE_CLOCKS,
    LAUNCH_CLOCKS,
    QUARTER_COPY_BYTES,
    Gpu,
    Prediction,
    memory_ms,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.implicit_gemm.common import (
    BLOCK_M,
    NAME,
    SUFFIX,
    WGRAD_QUARTERS_HEADERS,
    WGRAD_TAPS_KINDS,
    accepts,
    has_patches,
)
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, Range
from convgen.spec.geometry import Geometry

LINES = (4, 3, 2, 1)
SPLIT_LINES = (6, 3)
"""Where the three consumers share a tile's lines: a plane of taps has one product."""
CONSUMERS = 3
PRODUCT_TAPS = 3
QUARTERS = 4
WIDE, NARROW = 64, 32
"""Fine channels of a block."""
UNIT_BYTES = 16
STAGE_BYTES = 112 << 10
SPLIT_SUMS = 48
"""Of a thread in 3xTF32, beside as many that have left the tensor cores."""
PARTS = {"tf32": 1, "tf32x3": 2}
"""TF32 values that a float is the sum of, by math mode."""


@dataclass(frozen=True)
class QuarterSizes:
    """The sizes of tiles that are compiled, in lines of eight units."""

    lines: Annotated[tuple[Annotated[int, Range(1, max(SPLIT_LINES))], ...], Length(1, 8)]


@dataclass(frozen=True)
class TapColumns:
    """The taps of a plane, in products of neighbours along W: ``QuarterTaps`` of the template."""

    columns: int
    chunks: int
    groups: int
    splits: bool

    @staticmethod
    def of(g: Geometry) -> TapColumns:
        kernel_h, kernel_w = g.kernel[1:]

        def taps(columns: int) -> TapColumns:
            chunks = -(-kernel_w // columns)
            lines = kernel_h * chunks
            return TapColumns(columns, chunks, -(-lines // CONSUMERS), lines == 1)

        # Of equals the one with the most columns.
        return min(map(taps, range(min(kernel_w, PRODUCT_TAPS), 0, -1)), key=TapColumns.cost)

    def cost(self) -> int:
        return self.groups * ((1 if self.splits else CONSUMERS) * self.columns + 1)


@dataclass(frozen=True)
class Tile:
    """A size that is compiled: ``QuarterStage`` of the template."""

    bytes: int
    columns: int
    steps: int
    tile: tuple[int, int]
    """Lines and columns of units."""

    @staticmethod
    def of(problem: Problem, lines: int, channels: int, linear: bool) -> Tile | None:
        """None where there is no such kernel; ``linear`` ones divide W, not H."""
        g, parts, taps = problem.geometry, PARTS[problem.kind], TapColumns.of(problem.geometry)
        h, w = (1, 8 * lines) if linear else (lines, 8)
        tap_lines = g.kernel[1] * taps.chunks
        if taps.chunks == 1:
            span = min(tap_lines, CONSUMERS)
        else:
            span = 1 if taps.chunks % CONSUMERS == 0 or g.kernel[1] == 1 else 2
        box_w = (w - 1) * g.stride[2] + taps.chunks * taps.columns
        box_h = 1 if linear else (h - 1) * g.stride[1] + span
        size = parts * UNIT_BYTES * (h * w * BLOCK_M + box_h * box_w * channels)
        sums = taps.columns * channels // 2
        if max(box_h, box_w) > 256 or size > STAGE_BYTES or (parts == 2 and sums > SPLIT_SUMS):
            return None
        if taps.splits and lines % CONSUMERS != 0:
            return None
        steps = 4 * lines // (CONSUMERS if taps.splits else 1)
        return Tile(size, 2 * sums, steps, (h, w))


class QuarterWgrad(Family[QuarterSizes]):
    """See :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = tuple(PARTS)
    schedule_type = QuarterSizes
    template = "cuda/implicit_gemm/wgrad_quarters.cu.j2"
    headers = WGRAD_QUARTERS_HEADERS
    suffix = SUFFIX

    def accepts(self, problem: Problem) -> str:
        if reason := accepts(problem):
            return reason
        if problem.geometry.taps == 1:
            return "a kernel of one tap needs no pack"
        if problem.kind in WGRAD_TAPS_KINDS and has_patches(problem):
            return "patches are rows of a matrix, in a unit that has these kernels beside"
        if not self.lines(problem):
            return "tiles with their halo do not fit into shared memory twice"
        return ""

    def lines(self, problem: Problem) -> tuple[int, ...]:
        """The sizes of tiles that there are kernels for, in lines of eight units."""
        if accepts(problem) or problem.geometry.taps == 1:
            return ()
        return self._existing(problem, self._lines(problem))

    def default(self, problem: Problem) -> QuarterSizes:
        return QuarterSizes(self.lines(problem) or self._lines(problem))

    def candidates(self, problem: Problem) -> list[Candidate[QuarterSizes]]:
        lines = self.default(problem).lines
        sizes = dict.fromkeys((lines, *((one,) for one in lines)))
        return [Candidate(QuarterSizes(each), "") for each in sizes]

    def refusal(self, plan: Plan[QuarterSizes], architectures: Iterable[str] = ()) -> str:
        lines, known = plan.schedule.lines, self.default(plan.problem).lines
        if not lines or not set(lines) <= set(known) or len(set(lines)) < len(lines):
            return f"lines are one or more of {', '.join(map(str, known))}, each once"
        return ""

    @staticmethod
    def _lines(problem: Problem) -> tuple[int, ...]:
        return SPLIT_LINES if TapColumns.of(problem.geometry).splits else LINES

    @staticmethod
    def _existing(problem: Problem, lines: Iterable[int]) -> tuple[int, ...]:
        # One dimension is two and three of which the others have one position.
        linear = (False, True) if problem.geometry.kernel[:2] == (1, 1) else (False,)
        return tuple(n for n in lines if any(Tile.of(problem, n, NARROW, w) for w in linear))

    def predict(self, plan: Plan[QuarterSizes], call: Call, gpu: Gpu) -> Prediction:
        g, parts, taps = plan.geometry, PARTS[plan.kind], TapColumns.of(plan.geometry)
        d, h, w = call.coarse_extent
        h, w = -(-h // g.dilation[1]), -(-w // g.dilation[2])
        linear = call.coarse_extent[:2] == (1, 1) and g.kernel[:2] == (1, 1)
        h, w = (h, -(-w // QUARTERS)) if linear else (-(-h // QUARTERS), w)
        samples = call.batch * d * g.dilation[1] * g.dilation[2]
        coarse, fine = call.coarse_channels // g.groups, call.fine_channels // g.groups
        clocks = []
        for lines in plan.schedule.lines:
            for channels in (WIDE, NARROW):
                tile = Tile.of(plan.problem, lines, channels, linear)
                if tile is None:
                    continue
                blocks = -(-coarse // BLOCK_M) * -(-fine // channels)
                pairs = g.kernel[0] * taps.groups * g.groups * blocks
                tiles = samples * -(-h // tile.tile[0]) * -(-w // tile.tile[1])
                product = max(tile.columns / 2, (BLOCK_M + tile.columns) / 4)
                products = tile.steps * CONSUMERS * (2 * parts - 1) * product
                each = max(products, tile.bytes / gpu.bulk_bytes)
                clocks.append(-(-pairs * tiles // gpu.multiprocessors) * each)
        elements = call.batch * (
            call.coarse_channels * math.prod(call.coarse_extent)
            + call.fine_channels * math.prod(call.fine_extent)
        )
        packs = 4 * (1 + parts) * elements / (QUARTER_COPY_BYTES * gpu.multiprocessors)
        ms = (min(clocks) + packs + GEMM_TILE_CLOCKS + 4 * LAUNCH_CLOCKS) / gpu.clocks_per_ms
        least = memory_ms(plan.problem, call, gpu)
        return Prediction(max(ms, least), "memory" if least > ms else "arithmetic")

    def context(self, plan: Plan[QuarterSizes]) -> dict[str, Any]:
        return {
            "parts": PARTS[plan.kind],
            "gather_padding": plan.geometry.padding,
        }


WGRAD_QUARTERS = QuarterWgrad()
