"""fprop and dgrad of the ``mma`` engine: which tiles a warp keeps, and how they are staged.

Both are one gather (``templates/cuda/mma/gather.cu.j2``); see :mod:`convgen.engines.gather` for how
it is unrolled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from convgen.engines import Candidate, KernelPlan
from convgen.engines.cost import (
    H200,
    NARROW_ELEMENTS,
    OVERRULES,
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
    GatherSchedule,
    arrange,
    first_offset,
    gather_axes,
    gather_context,
    loops_over_taps,
    output_channels,
    paired_lines,
)
from convgen.engines.mma_fit import (
    CREW_WARPS,
    FEW_PRODUCTS,
    GROUP_CHANNELS,
    GROUPED,
    GROUPED_ARCHITECTURE,
    GROUPS,
    LONE_WARPS,
    MAX_TILE_REGISTERS,
    MOST_WARPS,
    NEWER,
    NEWER_ARCHITECTURE,
    SPILL_FREE,
    GatherTiles,
    budget,
    crowded,
    default_refusal,
    few_products,
    first_refusal,
    granules_pay,
    grouped,
    halves_spill,
    likely_spill,
    loads_words,
    misfit,
    pairs_of_line,
    products_of,
    strided_spill,
    tuned_refusal,
)
from convgen.spec import Geometry
from convgen.spec.dtypes import MODES

ENGINE_NAME = "mma"
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
# What the model chooses must be faster than the rule's by more than the model may be wrong.
MODEL_MARGIN = 0.85
# Staging 16-bit lines by way of raw buffers (``staging.cuh``): passages of 32 words through shared
# memory (written to a buffer, read, partly by halves, and written to the tile), and instructions
# (about 3 are for copying them, 10 for moving them, the others for what each item takes).
NARROW_PAIRS = (3.5, 19.0)
# As the input lies in memory (``granules.cuh``): an asynchronous copy of 16 bytes is about seven
# instructions, as it is of words that come by wide accesses.
GRANULES = (1.0, 7 / 4)


def _block_cost(blocks: int, out_blocks: int) -> float:
    """Time of ``out_blocks`` blocks of 8 channels in warps of ``blocks``: few share a fragment."""
    padded = -(-out_blocks // blocks) * blocks
    return padded * {1: 2.5, 2: 1.7, 3: 1.6}.get(blocks, 1.5)


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
        if default_refusal(geometry, contraction, mode, other) or likely_spill(
            geometry, contraction, mode, gather, SPILL_FREE
        ):
            continue
        if crowded(geometry, contraction, mode, gather) or (
            other.granules and halves_spill(geometry, contraction, mode, gather)
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
        granules = granules_pay(geometry, contraction, mode, gather)
        return GatherTiles(style, row_axis, variants, tiles, granules=granules)

    if loops_over_taps(x):
        return schedule("none", budget(mode))
    for style in ("taps", "plane"):
        chosen = schedule(style, budget(mode))
        # All have the same rows: what suits the one with the most channels suits all.
        widest = max(chosen.gathers, key=products_of)
        if misfit(geometry, contraction, mode, widest, budget(mode), MAX_TILE_REGISTERS):
            continue
        if strided_spill(geometry, contraction, mode, widest):
            chosen = schedule(style, few_products(mode))
        if not default_refusal(geometry, contraction, mode, chosen):
            return chosen
    return schedule("line", budget(mode))


def _tile_of(plan: KernelPlan, problem: Problem, gpu: Gpu) -> tuple[int, int]:
    """A warp's tile, of those compiled, much as the kernel chooses it.

    That which pads least, unless the model promises more of another: with few positions, narrower
    tiles keep more multiprocessors at work.
    """
    fprop = plan.contraction == "fprop"
    channels = problem.coarse_channels if fprop else problem.fine_channels
    needed = -(-channels // plan.geometry.groups // 8)
    tiles: tuple[tuple[int, int], ...] = plan.schedule.tiles
    ruled = min(tiles, key=lambda tile: _block_cost(tile[1] // 8, needed))
    if len(tiles) == 1:
        return ruled

    def expected(tile: tuple[int, int]) -> float:
        return _tile_prediction(plan, problem, gpu, tile).ms

    fastest = min(tiles, key=expected)
    return fastest if expected(fastest) < OVERRULES * expected(ruled) else ruled


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
        limits = GROUPED if grouped(gather) else SPILL_FREE
        return likely_spill(geometry, contraction, mode, gather, limits)

    candidates = [Candidate(default, "")]
    for schedule in dict.fromkeys(schedules):
        if schedule != default:
            refusal = tuned_refusal(geometry, contraction, mode, schedule)
            candidates.append(Candidate(schedule, refusal or first_refusal(schedule, spills)))
    return candidates


def tiles_refusal(plan: KernelPlan, architectures: Iterable[str]) -> str:
    """Why a plan of fprop or dgrad cannot be for these architectures; empty if it can."""
    geometry, contraction, mode = plan.geometry, plan.contraction, plan.dtype
    names = [name.partition("+")[0] for name in architectures]
    if all(name == GROUPED_ARCHITECTURE for name in names):
        return tuned_refusal(geometry, contraction, mode, plan.schedule)
    refusal = default_refusal(geometry, contraction, mode, plan.schedule)
    if refusal or not any(int(name.rstrip("af")) >= NEWER_ARCHITECTURE for name in names):
        return refusal

    def spills(gather: GatherSchedule) -> str:
        return likely_spill(geometry, contraction, mode, gather, NEWER)

    return first_refusal(plan.schedule, spills)


def combine_tiles(choices: Sequence[tuple[KernelPlan, Problem]]) -> GatherTiles | None:
    """See :meth:`convgen.engines.Engine.combine`; of plans of fprop or dgrad."""
    plans = [plan for plan, _ in choices]
    first = plans[0].schedule
    if any(replace(plan.schedule, tiles=first.tiles) != first for plan in plans):
        return None
    wanted = {_tile_of(plan, problem, H200) for plan, problem in choices}
    rows_of = {channels: rows for rows, channels in [*first.tiles, *wanted]}
    by_channels = sorted(rows_of.items(), reverse=True)
    combined: GatherTiles = replace(
        first, tiles=tuple((rows, channels) for channels, rows in by_channels)
    )
    # Every call must take the tile that it has in its own schedule.
    if any(
        _tile_of(replace(plan, schedule=combined), problem, H200) != _tile_of(plan, problem, H200)
        for plan, problem in choices
    ):
        return None
    return combined


def _loads_words(plan: KernelPlan) -> bool:
    """Whether lanes load words of two neighbouring elements."""
    granules: bool = plan.schedule.granules
    return granules and loads_words(plan.geometry, plan.contraction, plan.dtype)


def tiles_prediction(plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
    """Time of one call of fprop or dgrad."""
    return _tile_prediction(plan, problem, gpu, _tile_of(plan, problem, gpu))


@cache
def _tile_prediction(
    plan: KernelPlan, problem: Problem, gpu: Gpu, tile: tuple[int, int]
) -> Prediction:
    """Time of one call with one of the compiled tiles."""
    rows, channels = tile
    gather = replace(plan, schedule=plan.schedule.gather(tile))
    blocks = channels // 8
    mode = plan.dtype
    split = 2 if mode == "tf32x3" else 1
    inputs = problem.fine_channels if plan.contraction == "fprop" else problem.coarse_channels
    neighbours = _loads_words(plan)
    # Channels of a staged word.
    elements = 1 if neighbours else 4 // MODES[mode].size_bytes
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
        gpu.grouped_product_clocks > 0 and products_of(gather.schedule) <= FEW_PRODUCTS
    )
    staging_warps = MOST_WARPS - warps if many else CREW_WARPS
    _, _, x = arrange(gather_axes(plan.geometry, plan.contraction))
    load = (4.0, {"tf32": 8.0, "tf32x3": 24.0}.get(mode, 4.0))
    narrow = NARROW_PAIRS if elements == 2 else NARROW_ELEMENTS
    if neighbours:
        load = (4.0, 6.0)
        narrow = (GRANULES[0], GRANULES[1] / 2)  # words of one element each
    elif plan.schedule.granules:
        # Each element of a word is loaded, and a pair put together.
        load = (4.0 * elements * min(x.step, 2), load[1] + 8 * (elements - 1))
        narrow = GRANULES
    if plan.schedule.pairs:
        # Two loads of two words instead of four, of fewer pairs than there are columns, some of
        # which are copied from two pairs.
        columns, pairs = map(len, pairs_of_line(x))
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
    return gather_prediction(
        gather,
        problem,
        gpu,
        warp,
        element_bytes=size_bytes,
        word_bytes=2 if neighbours else 4,
        neighbours=neighbours,
    )


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
    words = _loads_words(plan)
    if words:
        math = math.replace("Pairs", "Neighbours")
    element = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
    _, _, x = arrange(gather_axes(plan.geometry, plan.contraction))
    # What is unrolled depends on the rows, all else on the style alone.
    by_rows = {
        gather.rows: gather_context(plan.geometry, plan.contraction, gather, words)
        for gather in plan.schedule.gathers
    }
    return next(iter(by_rows.values())) | {
        "paired": lambda columns: paired_lines(columns, first_offset(x) % 2),
        "units_of": {rows: context["units"] for rows, context in by_rows.items()},
        "element": element[MODES[plan.dtype].torch_name],
        "math": math,
        "words": words,
    }
