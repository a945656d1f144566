"""fprop and dgrad on the tensor cores: which tiles a warp keeps, and how they are staged.

Both are one gather (``templates/cuda/mma/gather.cu.j2``); see :mod:`convgen.engines.gather.unroll`
for how it is unrolled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from convgen.engines.cost import (
    H200,
    OVERRULES,
    Gpu,
    Prediction,
    typical_calls,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.gather.cost import NARROW_ELEMENTS, Warp, gather_prediction
from convgen.engines.gather.schedule import (
    STYLES,
    GatherSchedule,
    loops_over_taps,
    row_axis_of,
    variants_of,
)
from convgen.engines.gather.unroll import gather_context, paired_lines
from convgen.engines.mma.common import HEADERS, NAME, accepts, packed_call, packed_prediction
from convgen.engines.mma.fit import (
    FEW_PRODUCTS,
    LONE_CONSUMER_WARPS,
    MAX_TILE_REGISTERS,
    MOST_WARPS,
    NEWER,
    NEWER_ARCHITECTURE,
    OF_WARPGROUPS,
    PRODUCER_WARPS,
    SPILL_FREE,
    WARPGROUP_ARCHITECTURE,
    WARPGROUP_CHANNELS,
    WARPGROUPS,
    GatherTiles,
    budget,
    by_warpgroups,
    crowded,
    default_refusal,
    few_products,
    first_refusal,
    halves_spill,
    likely_spill,
    loads_words,
    misfit,
    pairs_of_line,
    products_of,
    strided_spill,
    tuned_refusal,
    vectors_pay,
)
from convgen.engines.problem import Call, Problem
from convgen.spec.dtypes import MODES
from convgen.spec.geometry import Geometry

WARPGROUP = 4
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
# Time of 8 channels in a warp of so many blocks of 8, and of more.
FEW_BLOCKS, MANY_BLOCKS = {1: 25, 2: 17}, 15
# Staging 16-bit lines by way of raw buffers (``staging.cuh``): passages of 32 words through shared
# memory (written to a buffer, read, partly by halves, and written to the tile), and instructions
# (about 3 are for copying them, 10 for moving them, the others for what each item takes).
NARROW_PAIRS = (3.5, 19.0)
# As the input lies in memory (``vectors.cuh``): an asynchronous copy of 16 bytes is about seven
# instructions, as it is of words that come by wide accesses.
VECTORS = (1.0, 7 / 4)


def _block_cost(blocks: int, out_blocks: int) -> int:
    """Time of ``out_blocks`` blocks of 8 channels in warps of ``blocks``: few share a fragment."""
    padded = -(-out_blocks // blocks) * blocks
    return padded * FEW_BLOCKS.get(blocks, MANY_BLOCKS)


@cache
def gather_tiles(problem: Problem) -> GatherTiles:
    """The default schedule: the rule's, or where channels are known and no whole window fits, the
    model's.

    Unknown channels need a list of sizes that suits most of them, which the model does not judge.
    """
    ruled = _ruled_schedule(problem)
    per_group = problem.output_channels
    if per_group is None or ruled.unroll not in ("plane", "line") or ruled.row_axis == "scattered":
        return ruled
    sizes = [8 * blocks for blocks in range(1, min(4, -(-per_group // 8)) + 1)]
    calls = typical_calls(problem.geometry)

    def time(schedule: GatherTiles) -> float:
        return sum(_schedule_prediction(problem, schedule, call, H200).ms for call in calls)

    most = OVERRULES * time(ruled)
    best = ruled
    for style, rows, channels in product(("taps", "slab"), (2, 3, 4, 6), sizes):
        other = replace(ruled, unroll=style, tiles=((rows, channels),))
        (gather,) = other.gathers
        if default_refusal(problem, other) or likely_spill(problem, gather, SPILL_FREE):
            continue
        if crowded(problem, gather) or (other.vectors and halves_spill(problem, gather)):
            continue
        if (expected := time(other)) < most:
            most, best = expected, other
    return best


def _ruled_schedule(problem: Problem) -> GatherTiles:
    """As many rows and channels as fit, and the largest pass that they allow."""
    _, _, x = problem.arranged
    promoted = problem.kind == "tf32x3"
    per_group = problem.output_channels
    variants = variants_of(problem)
    rows = (2 if promoted else 3) if variants == 1 else 2 if variants == 2 and not promoted else 1

    def channel_blocks(products: int) -> tuple[int, ...]:
        """The blocks of 8 channels per warp to compile, with at most so many products."""
        most = products // (rows * variants)
        if per_group is None:
            sizes = UNKNOWN_BLOCKS if most >= max(UNKNOWN_BLOCKS) else UNKNOWN_BLOCKS_FEW
            return tuple(b for b in sizes if b <= most) or (most,)
        needed = -(-per_group // 8)
        choices = range(1, min(most, needed) + 1)
        return (min(choices, key=lambda b: (_block_cost(b, needed), -b)),)

    row_axis = row_axis_of(problem)

    def schedule(style: str, products: int) -> GatherTiles:
        tiles = tuple((rows, 8 * blocks) for blocks in channel_blocks(products))
        gather = GatherSchedule(style, row_axis, rows, variants, tuple(c for _, c in tiles))
        vectors = vectors_pay(problem, gather)
        return GatherTiles(style, row_axis, variants, tiles, vectors=vectors)

    if loops_over_taps(x):
        return schedule("none", budget(problem.kind))
    for style in ("taps", "plane"):
        chosen = schedule(style, budget(problem.kind))
        # All have the same rows: what suits the one with the most channels suits all.
        widest = max(chosen.gathers, key=products_of)
        if misfit(problem, widest, budget(problem.kind), MAX_TILE_REGISTERS):
            continue
        if strided_spill(problem, widest):
            chosen = schedule(style, few_products(problem.kind))
        if not default_refusal(problem, chosen):
            return chosen
    return schedule("line", budget(problem.kind))


def _tile_of(problem: Problem, schedule: GatherTiles, call: Call, gpu: Gpu) -> tuple[int, int]:
    """A warp's tile, of those compiled, as the host chooses it when a call is made.

    That which pads least, unless the model promises more of another: with few positions, narrower
    tiles keep more multiprocessors at work.
    """
    needed = -(-call.channels(problem.output) // problem.geometry.groups // 8)
    ruled = min(schedule.tiles, key=lambda tile: _block_cost(tile[1] // 8, needed))
    if len(schedule.tiles) == 1:
        return ruled

    def expected(tile: tuple[int, int]) -> float:
        return _tile_prediction(problem, schedule, call, gpu, tile, brief=True).ms

    fastest = min(schedule.tiles, key=expected)
    return fastest if expected(fastest) < OVERRULES * expected(ruled) else ruled


def _space(problem: Problem) -> list[Candidate[GatherTiles]]:
    """The schedules of fprop or dgrad that may be tried, or why they cannot be."""
    default = gather_tiles(problem)
    per_group = problem.output_channels
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
            warpgroups=warpgroups,
            vectors=vectors,
            pairs=pairs,
        )
        for style, rows, blocks in product(STYLES, (1, 2, 3, 4, 6, 8), sizes)
        for warpgroups in (WARPGROUPS if 8 * max(blocks) >= WARPGROUP_CHANNELS else WARPGROUPS[:1])
        for vectors, pairs in ((False, False), (True, False), (False, True))
    ]

    def spills(gather: GatherSchedule) -> str:
        limits = OF_WARPGROUPS if by_warpgroups(gather) else SPILL_FREE
        return likely_spill(problem, gather, limits)

    candidates = [Candidate(default, "")]
    for schedule in dict.fromkeys(schedules):
        if schedule != default:
            refusal = tuned_refusal(problem, schedule)
            candidates.append(Candidate(schedule, refusal or first_refusal(schedule, spills)))
    return candidates


def _loads_words(problem: Problem, schedule: GatherTiles) -> bool:
    """Whether lanes load words of two neighbouring elements."""
    return schedule.vectors and loads_words(problem)


def _schedule_prediction(
    problem: Problem, schedule: GatherTiles, call: Call, gpu: Gpu
) -> Prediction:
    """Time of one call, of what it packs first apart."""
    tile = _tile_of(problem, schedule, call, gpu)
    return _tile_prediction(problem, schedule, call, gpu, tile)


@cache
def _tile_prediction(
    problem: Problem,
    schedule: GatherTiles,
    call: Call,
    gpu: Gpu,
    tile: tuple[int, int],
    brief: bool = False,
) -> Prediction:
    """Time of one call with one of the compiled tiles; ``brief`` as of ``gather_prediction``."""
    rows, channels = tile
    gather = schedule.gather(tile)
    blocks = channels // 8
    mode = problem.kind
    split = 2 if mode == "tf32x3" else 1
    neighbours = _loads_words(problem, schedule)
    # Channels of a staged word.
    elements = 1 if neighbours else 4 // problem.element_bytes
    products = 3 if split == 2 else 1
    grouped = gpu.warpgroup_product_clocks > 0 and channels >= WARPGROUP_CHANNELS
    # Lanes load weights once per tap; the tensor core itself does, for the 64 positions of a
    # group and each row.
    weight = (2.0 * blocks * split, 1.0 * blocks * split)
    if grouped:
        weight = (0.5 * blocks * products * rows, 4.0)
    clocks = gpu.warpgroup_product_clocks if grouped else gpu.product_clocks
    warps = WARPGROUP * schedule.warpgroups if grouped else LONE_CONSUMER_WARPS
    many = grouped or (gpu.warpgroup_product_clocks > 0 and products_of(gather) <= FEW_PRODUCTS)
    producer_warps = MOST_WARPS - warps if many else PRODUCER_WARPS
    _, _, x = problem.arranged
    load = (4.0, {"tf32": 8.0, "tf32x3": 24.0}.get(mode, 4.0))
    narrow = NARROW_PAIRS if elements == 2 else NARROW_ELEMENTS
    if neighbours:
        load = (4.0, 6.0)
        narrow = (VECTORS[0], VECTORS[1] / 2)  # words of one element each
    elif schedule.vectors:
        # Each element of a word is loaded, and a pair put together.
        load = (4.0 * elements * min(x.step, 2), load[1] + 8 * (elements - 1))
        narrow = VECTORS
    if schedule.pairs:
        # Two loads of two words instead of four, of fewer pairs than there are columns, some of
        # which are copied from two pairs.
        columns, pairs = map(len, pairs_of_line(x))
        load = (4.0 * pairs / columns, load[1] - 4 + 2 * pairs / columns + 2)
    warp = Warp(
        lanes=16 * WARPGROUP if grouped else 16,
        channels=channels,
        warps=schedule.warpgroups if grouped else LONE_CONSUMER_WARPS,
        # Four loads of a fragment, and the rounding or splitting of its words.
        load=load,
        weight=weight,
        tap_clocks=blocks * clocks * products,
        tap_instructions=products if grouped else blocks * products,
        words=-(-call.channels(problem.input) // problem.geometry.groups // elements // 8) * 8,
        weight_bytes=32 * blocks * split,
        staged_words=8,
        narrow=narrow,
        producer_warps=producer_warps,
        # Three warpgroups cannot be shared out among two blocks of channels.
        most_c=(2 if schedule.warpgroups == 2 else 1) if grouped else 6,
        together=WARPGROUP if grouped else 1,
    )
    return gather_prediction(
        problem,
        gather,
        call,
        gpu,
        warp,
        word_bytes=2 if neighbours else 4,
        neighbours=neighbours,
        brief=brief,
    )


class MmaGather(Family[GatherTiles]):
    """fprop and dgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("fprop", "dgrad")
    kinds = MODES
    schedule_type = GatherTiles
    template = "cuda/mma/gather.cu.j2"
    headers = HEADERS

    def problem(self, geometry: Geometry, contraction: str, kind: str) -> Problem:
        return Problem.packed(geometry, contraction, kind)

    def accepts(self, problem: Problem) -> str:
        return accepts(problem)

    def default(self, problem: Problem) -> GatherTiles:
        return gather_tiles(problem)

    def candidates(self, problem: Problem) -> list[Candidate[GatherTiles]]:
        return _space(problem)

    def refusal(self, plan: Plan[GatherTiles], architectures: Iterable[str] = ()) -> str:
        problem, schedule = plan.problem, plan.schedule
        names = [name.partition("+")[0] for name in architectures]
        if all(name == WARPGROUP_ARCHITECTURE for name in names):
            return tuned_refusal(problem, schedule)
        refusal = default_refusal(problem, schedule)
        if refusal or not any(int(name.rstrip("af")) >= NEWER_ARCHITECTURE for name in names):
            return refusal

        def spills(gather: GatherSchedule) -> str:
            return likely_spill(problem, gather, NEWER)

        return first_refusal(schedule, spills)

    def combine(self, choices: Sequence[tuple[Plan[GatherTiles], Call]]) -> GatherTiles | None:
        first, problem = choices[0][0].schedule, choices[0][0].problem
        if any(replace(plan.schedule, tiles=first.tiles) != first for plan, _ in choices):
            return None
        tiles = [_tile_of(problem, plan.schedule, call, H200) for plan, call in choices]
        rows_of = {channels: rows for rows, channels in [*first.tiles, *tiles]}
        by_channels = sorted(rows_of.items(), reverse=True)
        combined = replace(first, tiles=tuple((rows, channels) for channels, rows in by_channels))
        # Every call must take the tile that it has in its own schedule.
        if any(
            _tile_of(problem, combined, call, H200) != tile
            for (_, call), tile in zip(choices, tiles, strict=True)
        ):
            return None
        return combined

    def predict(self, plan: Plan[GatherTiles], call: Call, gpu: Gpu) -> Prediction:
        problem = plan.problem
        met = packed_call(problem, call)
        dense = _schedule_prediction(problem, plan.schedule, met, gpu)
        return packed_prediction(dense, problem, call, gpu)

    def context(self, plan: Plan[GatherTiles]) -> dict[str, Any]:
        problem = plan.problem
        # On an H200 cuDNN rounds a transposed convolution's operands to nearest even, and those of
        # a convolution of one tap; others', of the few channels that come here, away from zero.
        # Rounding alike keeps TF32 results within 3e-6 of its own.
        away = problem.output == "coarse" and problem.geometry.taps > 1
        rounding = "NEAREST_AWAY" if away else "NEAREST_EVEN"
        math = {
            "tf32": f"Tf32<Rounding::{rounding}>",
            "tf32x3": "Tf32x3",
            "f16tc": "Pairs<half>",
            "bf16tc": "Pairs<bfloat16>",
        }[plan.kind]
        words = _loads_words(problem, plan.schedule)
        if words:
            math = math.replace("Pairs", "Neighbours")
        element = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
        _, _, x = problem.arranged
        # What is unrolled depends on the rows, all else on the style alone.
        gathers = {gather.rows: gather for gather in plan.schedule.gathers}
        by_rows = {rows: gather_context(problem, gather, words) for rows, gather in gathers.items()}
        return next(iter(by_rows.values())) | {
            "paired": lambda columns: paired_lines(columns, x.first_offset % 2),
            "units_of": {rows: context["units"] for rows, context in by_rows.items()},
            "element": element[MODES[plan.kind].torch_name],
            "math": math,
            "words": words,
            "few_blocks": FEW_BLOCKS,
            "many_blocks": MANY_BLOCKS,
        }


GATHER = MmaGather()
