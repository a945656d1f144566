"""wgrad on the tensor cores: which tile of the weights a warp keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

from convgen.engines.cost import H200, Gpu, Prediction, memory_ms
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.mma.common import HEADERS, NAME, accepts, packed_call, packed_prediction
from convgen.engines.mma.wgrad_cost import (
    clocks_of,
    cost_of,
    staging_bounds_warpgroups,
    warpgroup_clocks_of,
    warpgroup_cost_of,
)
from convgen.engines.mma.wgrad_layout import (
    COLUMNS,
    MAX_TAPS,
    QUAD,
    ROWS,
    elements_of,
    layout_of,
    layouts_of,
    tap_blocks,
    tile_of,
    warpgroup_tile_of,
)
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, Range
from convgen.spec.dtypes import MODES
from convgen.spec.geometry import Geometry

# Chunks of 16 positions that 3xTF32 sums in the tensor cores, which truncate when they add, before
# their sum is added in fp32: 8 products of depth 8, three each.
PROMOTION = 4
WARPGROUP_LEAST_COARSE = 16
MAX_WARPGROUP_BLOCKS, MAX_WARPGROUP_TILES = 8, 2
UNKNOWN_WARPGROUP_BLOCKS = (4, 6, 8)
# Coarse tiles to compile where the channels are not known: 16, 32 and 48 pad little of any count.
UNKNOWN_M_TILES = (1, 2, 3)
MAX_M_TILES, MAX_N_TILES = 4, 8
# What warpgroups take longer, as measured, where few warps stage strided lines word by word.
STAGING_BOUND = 2.5

Taps = Annotated[int, Range(0, MAX_TAPS)]


@dataclass(frozen=True)
class WgradSchedule:
    """What a warp keeps in registers, and what the template unrolls.

    ``tiles`` lists the compiled tiles (coarse tiles of 16 channels, fine tiles of 8), each at
    ``taps_h x taps_w`` taps; a call takes the one that suits its channels. ``promotion`` is the
    number of chunks that are summed in the tensor cores at once, 0 for all.

    ``warpgroup_tiles`` are tiles (fine tiles of 16 channels, coarse blocks of 8), each at
    ``warpgroup_taps`` taps along H and W, where four warps multiply together (wgmma, sm_90a): such
    devices run these instead. Without them, with operands that are split or few channels in a
    group, they run the others too.
    """

    taps_h: Taps
    taps_w: Taps
    tiles: Annotated[
        tuple[
            tuple[Annotated[int, Range(1, MAX_M_TILES)], Annotated[int, Range(1, MAX_N_TILES)]], ...
        ],
        Length(1, 8),
    ]
    promotion: Annotated[int, Range(0, PROMOTION)]
    warpgroup_taps: tuple[Taps, Taps] = (0, 0)
    warpgroup_tiles: Annotated[
        tuple[
            tuple[
                Annotated[int, Range(1, MAX_WARPGROUP_TILES)],
                Annotated[int, Range(1, MAX_WARPGROUP_BLOCKS)],
            ],
            ...,
        ],
        Length(0, 8),
    ] = ()


def _warpgroup_schedule(problem: Problem) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
    """The best ``warpgroup_taps`` and ``warpgroup_tiles``."""
    none: tuple[tuple[int, int], tuple[tuple[int, int], ...]] = (0, 0), ()
    coarse, fine = problem.geometry.channels_per_group
    if not _suits_warpgroups(problem):
        return none
    layouts = layouts_of(problem)
    needed = -(-coarse // 8) if coarse else 0
    sizes = range(1, min(needed, MAX_WARPGROUP_BLOCKS) + 1) if coarse else UNKNOWN_WARPGROUP_BLOCKS
    most_m = min(MAX_WARPGROUP_TILES, -(-fine // ROWS)) if fine else 1
    costs = {
        (taps, (m, blocks)): cost
        for taps, m, blocks in product(
            tap_blocks(problem.geometry, layouts), range(1, most_m + 1), sizes
        )
        if (cost := warpgroup_cost_of(problem, layouts[taps[1]], taps, (m, blocks))) is not None
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


def _suits_warpgroups(problem: Problem) -> bool:
    """Whether a group's channels may fill the products of warpgroups."""
    coarse, fine = problem.geometry.channels_per_group
    few = (coarse or WARPGROUP_LEAST_COARSE) < WARPGROUP_LEAST_COARSE or (fine or ROWS) < ROWS
    unknown = problem.geometry.groups > 1 and not (coarse and fine)
    return problem.kind != "tf32x3" and not few and not unknown


def wgrad_schedule(problem: Problem) -> WgradSchedule:
    """The default schedule of a problem: least time per weight."""
    channels = problem.geometry.channels_per_group
    coarse, fine = channels
    layouts = layouts_of(problem)

    def cost(taps: tuple[int, int], m: int, n: int) -> float | None:
        return cost_of(problem, layouts[taps[1]], taps, (m, n), channels)

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

    blocks = tap_blocks(problem.geometry, layouts)
    if coarse:
        taps, tile = best(blocks, tuple(range(1, MAX_M_TILES + 1)))
        tiles: tuple[tuple[int, int], ...] = (tile,)
    elif problem.geometry.groups > 1:
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
    alone = WgradSchedule(*taps, tiles, _promotion(problem.kind))
    if staging_bounds_warpgroups(problem):
        return alone
    return with_warpgroups(alone, problem)


def with_warpgroups(schedule: WgradSchedule, problem: Problem) -> WgradSchedule:
    """The same, with the best tiles of warpgroups, where channels suit them."""
    taps, tiles = _warpgroup_schedule(problem)
    return replace(schedule, warpgroup_taps=taps, warpgroup_tiles=tiles)


def _promotion(mode: str) -> int:
    return PROMOTION if mode == "tf32x3" else 0


def wgrad_refusal(problem: Problem, schedule: WgradSchedule) -> str:
    """Why a problem cannot have a schedule; empty if it can."""
    layouts = layouts_of(problem)
    taps = schedule.taps_h, schedule.taps_w
    if taps not in tap_blocks(problem.geometry, layouts):
        return f"{taps[0]} x {taps[1]} taps do not fill their blocks, or reach too far for a window"
    if schedule.promotion != _promotion(problem.kind):
        promotion = _promotion(problem.kind)
        after = f"{promotion} chunks (0: at the end)"
        return f"sums of {problem.kind} leave the tensor cores after {after}"
    if any(len(set(each)) < len(each) for each in (schedule.tiles, schedule.warpgroup_tiles)):
        return "the same tile is compiled once"
    for m, n in schedule.tiles:
        if not (1 <= m <= MAX_M_TILES and 1 <= n <= MAX_N_TILES):
            return f"tiles have at most {MAX_M_TILES} x {MAX_N_TILES} products, not {m} x {n}"
        if clocks_of(problem.kind, layouts[taps[1]], 1, *taps, m, n) is None:
            return f"a tile of {m} x {n} products for {taps[0]} x {taps[1]} taps spills"
    return _warpgroup_refusal(problem, schedule)


def _warpgroup_refusal(problem: Problem, schedule: WgradSchedule) -> str:
    taps = schedule.warpgroup_taps
    if not schedule.warpgroup_tiles:
        return "" if taps == (0, 0) else "taps of warpgroups need tiles"
    if problem.kind == "tf32x3":
        return "warpgroups do not multiply operands that are split"
    layouts = layouts_of(problem)
    if taps not in tap_blocks(problem.geometry, layouts):
        return f"{taps[0]} x {taps[1]} taps do not fill their blocks, or reach too far for a window"
    for m, blocks in schedule.warpgroup_tiles:
        if not (1 <= m <= MAX_WARPGROUP_TILES and 1 <= blocks <= MAX_WARPGROUP_BLOCKS):
            return (
                f"tiles of warpgroups have at most {MAX_WARPGROUP_TILES} x "
                f"{MAX_WARPGROUP_BLOCKS} products, not {m} x {blocks}"
            )
        if warpgroup_clocks_of(problem.kind, layouts[taps[1]], taps, m, blocks) is None:
            return f"a warpgroup's tile of {m} x {blocks} for {taps[0]} x {taps[1]} taps spills"
    return ""


def _space(problem: Problem) -> list[Candidate[WgradSchedule]]:
    """All schedules of a problem: every block of taps with every tile, or a list of tiles."""
    default = wgrad_schedule(problem)
    coarse, fine = problem.geometry.channels_per_group
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
    taps_blocks = tap_blocks(problem.geometry, layouts_of(problem))
    schedules = [
        WgradSchedule(*taps, tiles, _promotion(problem.kind))
        for taps, tiles in product(taps_blocks, lists)
    ]
    if _suits_warpgroups(problem):
        most = min(MAX_WARPGROUP_BLOCKS, -(-coarse // 8)) if coarse else MAX_WARPGROUP_BLOCKS
        most_m = min(MAX_WARPGROUP_TILES, -(-fine // ROWS)) if fine else MAX_WARPGROUP_TILES
        tiles_of_warpgroups: list[tuple[tuple[int, int], ...]] = [
            ((m, blocks),) for m, blocks in product(range(1, most_m + 1), range(2, most + 1))
        ]
        if not coarse:
            tiles_of_warpgroups += [
                tuple((1, b) for b in UNKNOWN_WARPGROUP_BLOCKS),
                ((1, 4), (1, 6)),
            ]
        schedules += [
            replace(default, warpgroup_taps=taps, warpgroup_tiles=tiles)
            for taps, tiles in product(taps_blocks, tiles_of_warpgroups)
        ]
    return [
        Candidate(schedule, wgrad_refusal(problem, schedule))
        for schedule in dict.fromkeys([default, *schedules])
    ]


class MmaWgrad(Family[WgradSchedule]):
    """wgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = MODES
    schedule_type = WgradSchedule
    template = "cuda/mma/wgrad.cu.j2"
    headers = HEADERS

    def problem(self, geometry: Geometry, contraction: str, kind: str) -> Problem:
        return Problem.packed(geometry, contraction, kind)

    def accepts(self, problem: Problem) -> str:
        return accepts(problem)

    def default(self, problem: Problem) -> WgradSchedule:
        return wgrad_schedule(problem)

    def candidates(self, problem: Problem) -> list[Candidate[WgradSchedule]]:
        return _space(problem)

    def refusal(self, plan: Plan[WgradSchedule], architectures: Iterable[str] = ()) -> str:
        return wgrad_refusal(plan.problem, plan.schedule)

    def predict(self, plan: Plan[WgradSchedule], call: Call, gpu: Gpu) -> Prediction:
        """Time of a call: the chunks of its positions, dealt to all multiprocessors."""
        problem, schedule, met = plan.problem, plan.schedule, packed_call(plan.problem, call)
        geometry = problem.geometry
        channels = met.coarse_channels // geometry.groups, met.fine_channels // geometry.groups
        elements = elements_of(problem.kind)
        # The kernel takes the compiled tile that suits a call's channels.
        grouped = gpu.warpgroup_product_clocks > 0 and schedule.warpgroup_tiles
        if grouped:
            taps = schedule.warpgroup_taps
            layout = layout_of(geometry, elements, taps[1])
            known = replace(
                geometry, coarse_channels=met.coarse_channels, fine_channels=met.fine_channels
            )
            of_call = replace(problem, geometry=known)
            found = [warpgroup_cost_of(of_call, layout, taps, t) for t in schedule.warpgroup_tiles]
        else:
            taps = schedule.taps_h, schedule.taps_w
            layout = layout_of(geometry, elements, schedule.taps_w)
            found = [cost_of(problem, layout, taps, t, channels) for t in schedule.tiles]
        costs = [clocks for clocks in found if clocks is not None]
        if not costs:
            return Prediction(math.inf, "registers")
        d, h, w = met.coarse_extent
        # Rows are padded to whole quads.
        chunks = met.batch * d * h * -(-w // QUAD) * QUAD / 16
        clocks = chunks * geometry.groups * min(costs)
        if grouped:
            clocks *= STAGING_BOUND if staging_bounds_warpgroups(problem) else 1
        else:
            clocks *= geometry.kernel[0] * gpu.product_clocks / H200.product_clocks
        ms = clocks / gpu.multiprocessors / gpu.ghz * 1e-6
        # Adding up the partial results of all blocks.
        ms += 0.01
        floor = memory_ms(problem, met, gpu)
        dense = Prediction(ms, "arithmetic") if ms > floor else Prediction(floor, "memory")
        return packed_prediction(dense, problem, call, gpu)

    def context(self, plan: Plan[WgradSchedule]) -> dict[str, Any]:
        schedule, elements = plan.schedule, elements_of(plan.kind)
        layout = layout_of(plan.geometry, elements, schedule.taps_w)
        warpgroup_layout = layout_of(plan.geometry, elements, max(schedule.warpgroup_taps[1], 1))
        element, product_type = {
            "tf32": ("float", "Tf32Product"),
            "tf32x3": ("float", "SplitTf32Product"),
            "f16tc": ("half", "HalfProduct"),
            "bf16tc": ("bfloat16", "Bfloat16Product"),
        }[plan.kind]
        return {
            "element": element,
            "product": product_type,
            "layout": layout,
            "tiles": [tile_of(layout, elements, schedule.taps_h, m, n) for m, n in schedule.tiles],
            "warpgroup_layout": warpgroup_layout,
            "warpgroup_tiles": [
                warpgroup_tile_of(warpgroup_layout, schedule.warpgroup_taps, *t)
                for t in schedule.warpgroup_tiles
            ],
        }


WGRAD = MmaWgrad()
