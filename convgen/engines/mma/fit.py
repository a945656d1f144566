"""What fits of the gathers of the ``mma`` engine: registers, shared memory, the instruction cache.

Functions say why a tile or schedule cannot be, in words, or nothing if it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from convgen.engines.gather.axes import Axis
from convgen.engines.gather.schedule import GatherSchedule, RowAxis, Style, Variants, gather_refusal
from convgen.engines.gather.unroll import window_words
from convgen.engines.problem import Problem
from convgen.spec.documents import Length, Range

# 16 x 8 products that a warp keeps in registers, four each: 80 registers, beside which the
# fragments of a column and what tells a warp its place stay under the 168 that blocks of 12 warps
# leave a thread.
PRODUCTS = 20
# 3xTF32 keeps a second set of sums, which leaves the tensor core after every 8 channels.
PRODUCTS_PROMOTED = 10
# Where the compiler prefetches more, and would spill what it keeps meanwhile: 16-bit products take
# half the clocks; large columns of a strided window lie far apart.
PRODUCTS_FEW, PRODUCTS_PROMOTED_FEW = 16, 6
# Registers for the fragments of one column (4 per row, 8 in 3xTF32); with all sums; and with these
# where the window of a tile is strided.
MAX_COLUMN_REGISTERS = 48
MAX_TILE_REGISTERS = 112
MAX_STRIDED_TILE_REGISTERS = 96
# Where warps trade registers (sm_90a), those that multiply together keep more. A tuned schedule may
# count on it; no default does, which must suit every GPU.
WARPGROUP_CHANNELS = 24  # WARPGROUP_LEAST_CHANNELS of the templates
LONE_CONSUMER_WARPS = 8  # of a thread block, which multiply each for itself
PRODUCER_WARPS = 4  # of a producer warpgroup
MOST_WARPS = 16  # of a thread block on sm_90a
FEW_PRODUCTS = 8  # of a warp, beside which two producer warpgroups stage there
WARPGROUP_ARCHITECTURE = "90a"
PRODUCTS_OF_WARPGROUPS = {"tf32": 24, "tf32x3": 12, "f16tc": 24, "bf16tc": 24}
WARPGROUP_REGISTERS = {"tf32": 120, "tf32x3": 128, "f16tc": 120, "bf16tc": 120}
# Three warpgroups have 152 registers for each thread instead of 184, and keep the fragments of one
# column instead of two. With more than this ptxas spills.
WARPGROUPS = (2, 3)
THREE_WARPGROUPS_REGISTERS = {"tf32": 92, "tf32x3": 96, "f16tc": 92, "bf16tc": 92}
# Of sums and all pairs of columns that are held at once, by warpgroups: with more ptxas spills, or
# lets no products overlap.
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
OF_WARPGROUPS = Limits(WARPGROUP_REGISTERS, WARPGROUP_REGISTERS)
THREE_WARPGROUPS = Limits(THREE_WARPGROUPS_REGISTERS, THREE_WARPGROUPS_REGISTERS)
# What was measured on sm_90a spills with more than this where warps multiply alone on a GPU that is
# no older, though not on sm_80.
NEWER_ARCHITECTURE = 90
NEWER = Limits(
    {"tf32": 100, "tf32x3": 100, "f16tc": 92, "bf16tc": 92}, dict.fromkeys(WARPGROUP_REGISTERS, 72)
)
# Multiply instructions of an unrolled pass, over all phases: 16 bytes each, with about as many
# loads beside them, in an instruction cache of 128 KiB. Of code not much longer (1944 did) nvcc
# leaves the sums in local memory.
UNROLL_LIMIT = 1600
# Two stages of a representative tile and its weights: what a block on sm_90 may hold, less a margin
# for wider tiles. Smaller GPUs cut narrower tiles at launch.
STAGES_LIMIT_BYTES = 200 * 1024
# Registers for sums and a column beside which there is room for halves of words (vectors in 16
# bits). With more ptxas spills a few.
HALVES_REGISTERS = 76
# Beside few products a second producer warpgroup leaves a thread 128 registers: with words, and
# with halves.
FEW_REGISTERS, HALVES_FEW_REGISTERS = 68, 40
# Two stages that any GPU holds.
SMALL_STAGES_BYTES = 90 * 1024


@dataclass(frozen=True)
class GatherTiles:
    """fprop and dgrad: what the template unrolls, and the tiles that one warp may compute.

    As :class:`GatherSchedule`, but each number of output channels has its own register rows: a tile
    is (rows, channels), all of them are compiled, and a call takes the one whose channels suit it
    best.

    ``warpgroups`` is how many times four warps multiply in a thread block where they do so together
    (sm_90a, 24 or more channels): 2, or 3 with fewer registers each. With ``vectors`` tiles are
    staged as the input lies in memory, 16 bytes at a time, and lanes find their elements there.
    With ``pairs`` a lane has neighbouring positions and loads what all taps of a line read for
    them, two words at a time.
    """

    unroll: Style
    row_axis: RowAxis
    variants: Variants
    tiles: Annotated[
        tuple[tuple[Annotated[int, Range(1, 8)], Annotated[int, Range(8, 64)]], ...], Length(1, 8)
    ]
    warpgroups: Annotated[int, Range(*WARPGROUPS)] = WARPGROUPS[0]
    vectors: bool = False
    pairs: bool = False

    def gather(self, tile: tuple[int, int]) -> GatherSchedule:
        """What a warp does with one of the tiles."""
        rows, channels = tile
        return GatherSchedule(self.unroll, self.row_axis, rows, self.variants, (channels,))

    @property
    def gathers(self) -> tuple[GatherSchedule, ...]:
        return tuple(map(self.gather, self.tiles))


def budget(mode: str) -> int:
    """Products that a warp may keep."""
    if mode == "tf32x3":
        return PRODUCTS_PROMOTED
    return PRODUCTS if mode == "tf32" else PRODUCTS_FEW


def by_warpgroups(gather: GatherSchedule) -> bool:
    """Whether its warps multiply in warpgroups where a GPU has that."""
    return min(gather.channels) >= WARPGROUP_CHANNELS


def few_products(mode: str) -> int:
    """Products that a warp may keep beside what lies far apart."""
    return PRODUCTS_PROMOTED_FEW if mode == "tf32x3" else PRODUCTS_FEW


def _fragment_registers(mode: str) -> int:
    """Registers of a fragment of the input, or of a product's sums with what promotes them."""
    return 8 if mode == "tf32x3" else 4


def products_of(gather: GatherSchedule) -> int:
    """16 x 8 products that a warp keeps."""
    return gather.rows * gather.variants * max(gather.channels) // 8


def tile_registers(problem: Problem, gather: GatherSchedule) -> int:
    """Registers of all sums and a column."""
    r, _, _ = problem.arranged
    return (products_of(gather) + gather.planes(r)) * _fragment_registers(problem.kind)


def default_refusal(problem: Problem, schedule: GatherTiles) -> str:
    """Why a gather cannot have a schedule by default; empty if it can."""
    return first_refusal(schedule, lambda gather: _unfit(problem, gather)) or _fields_refusal(
        problem, schedule
    )


def tuned_refusal(problem: Problem, schedule: GatherTiles) -> str:
    """Why a gather cannot have a tuned schedule; empty if it can."""

    def refusal(gather: GatherSchedule) -> str:
        unfit = _unfit(problem, gather)
        if not unfit or not by_warpgroups(gather):
            return unfit
        most = PRODUCTS_OF_WARPGROUPS[problem.kind]
        return misfit(problem, gather, most, WARPGROUP_REGISTERS[problem.kind])

    return first_refusal(schedule, refusal) or _fields_refusal(problem, schedule)


def _fields_refusal(problem: Problem, schedule: GatherTiles) -> str:
    """Why a schedule cannot have its warpgroups, vectors or pairs; empty if it can."""
    if schedule.vectors and schedule.unroll == "none":
        return "loops over taps read words by residue, not elements of vectors"
    return _three_warpgroups_refusal(problem, schedule) or _pairs_refusal(problem, schedule)


def first_refusal(schedule: GatherTiles, refusal: Callable[[GatherSchedule], str]) -> str:
    """Why one of a schedule's tiles cannot be; empty if all of them can."""
    sizes = {channels for _, channels in schedule.tiles}
    if not sizes or len(sizes) < len(schedule.tiles):
        return "tiles are told apart by their channels: each has a number of its own"
    if any(channels % 8 for channels in sizes):
        return "products have 8 channels: tiles have multiples of these"
    return next(filter(None, map(refusal, schedule.gathers)), "")


def _three_warpgroups_refusal(problem: Problem, schedule: GatherTiles) -> str:
    """Why a schedule cannot have its number of warpgroups; empty if it can."""
    if schedule.warpgroups not in WARPGROUPS:
        return f"a thread block has {' or '.join(map(str, WARPGROUPS))} warpgroups that multiply"
    if schedule.warpgroups == WARPGROUPS[0]:
        return ""
    if not any(map(by_warpgroups, schedule.gathers)):
        return f"three warpgroups need a tile of {WARPGROUP_CHANNELS} channels or more"

    def refusal(gather: GatherSchedule) -> str:
        if not by_warpgroups(gather):
            return ""
        return likely_spill(problem, gather, THREE_WARPGROUPS)

    return first_refusal(schedule, refusal)


def _pairs_refusal(problem: Problem, schedule: GatherTiles) -> str:
    """Why lanes cannot have neighbouring positions; empty if they can or need not."""
    if not schedule.pairs:
        return ""
    if schedule.unroll == "none" or schedule.row_axis == "scattered":
        return "positions that are looped over or scattered are no neighbours"
    r, _, x = problem.arranged
    if x.step > 1:
        return "neighbouring positions of a strided input read columns that are no neighbours"
    if schedule.vectors:
        return "elements of vectors lie anywhere: they are not loaded in pairs"
    # What lies between two pairs is made of both, while a third is loaded if there is one.
    held = min(len(pairs_of_line(x)[1]), 3)
    most = PAIRS_REGISTERS[schedule.warpgroups]

    def refusal(gather: GatherSchedule) -> str:
        registers = (products_of(gather) + held * gather.planes(r)) * _fragment_registers(
            problem.kind
        )
        if registers <= most:
            return ""
        return f"sums and pairs of columns take {registers} registers of at most {most}"

    return first_refusal(schedule, refusal)


def pairs_of_line(x: Axis) -> tuple[set[int], set[int]]:
    """The columns of a line that taps read, and the pairs that they are made of."""
    first = x.first_offset
    columns = {tap.offset - first for phase in x.phases for tap in phase.taps}
    at = {column + first % 2 for column in columns}
    return columns, {i // 2 for i in at} | {(i + 1) // 2 for i in at}


def _unfit(problem: Problem, gather: GatherSchedule) -> str:
    """Why warps that multiply alone cannot have a tile; empty if they can."""
    refusal = misfit(problem, gather, budget(problem.kind), MAX_TILE_REGISTERS)
    return refusal or strided_spill(problem, gather)


def _strided(problem: Problem, gather: GatherSchedule) -> bool:
    """Whether it reads columns of a strided window, which lie far apart."""
    _, _, x = problem.arranged
    return gather.window_r and x.step > 1


def strided_spill(problem: Problem, gather: GatherSchedule) -> str:
    """Why the sums spill beside columns of a strided window, which lie far apart; or empty."""
    products = products_of(gather)
    tile = tile_registers(problem, gather)
    if not _strided(problem, gather) or tile <= MAX_STRIDED_TILE_REGISTERS:
        return ""
    if products <= few_products(problem.kind):
        return ""
    fit = few_products(problem.kind)
    return f"beside columns of a strided window {products} products spill; {fit} fit"


def misfit(
    problem: Problem,
    gather: GatherSchedule,
    most_products: int,
    most_registers: int,
) -> str:
    """Why a tile does not fit into registers, shared memory or the instruction cache.

    ``most_registers`` are for sums and a column together.
    """
    r, y, x = problem.arranged
    style, rows = gather.unroll, gather.rows
    blocks = max(gather.channels) // 8
    if refusal := gather_refusal(problem, gather):
        return refusal
    products = products_of(gather)
    if products > most_products:
        return f"{products} products of a warp spill; {most_products} fit in its registers"
    taps_r = sum(r.counts) if gather.window_r else 1
    taps_y, span_y = (sum(y.counts), max(y.spans)) if gather.window_y else (1, 0)
    planes = gather.planes(r)
    if style in ("line", "none"):
        return ""
    slots = taps_r * taps_y * _slots_of_line(problem)
    code = slots * rows * blocks
    if code * (3 if problem.kind == "tf32x3" else 1) > UNROLL_LIMIT:
        return f"{code} products of an unrolled pass do not fit in the instruction cache"
    column = planes * _fragment_registers(problem.kind)
    if column > MAX_COLUMN_REGISTERS:
        return f"a column takes {column} registers of at most {MAX_COLUMN_REGISTERS}"
    tile = tile_registers(problem, gather)
    if tile > most_registers:
        return f"sums and a column take {tile} registers of at most {most_registers}"
    # 64 positions in a strip 32 wide: up to three lines.
    lines = 2 * (y.step if gather.window_y else 1) + span_y + 1
    columns = 31 * x.step + max(x.spans) + 4
    most = (max(r.counts) if gather.window_r else 1) * (max(y.counts) if gather.window_y else 1)
    weights = most * _slots_of_line(problem) * blocks * 8
    weights *= 2 if problem.kind == "tf32x3" else 1
    stages = 2 * 8 * 4 * (planes * lines * columns + weights)
    if stages > STAGES_LIMIT_BYTES:
        return f"two stages take {stages} bytes of shared memory; {STAGES_LIMIT_BYTES} are there"
    return ""


def likely_spill(problem: Problem, gather: GatherSchedule, limits: Limits) -> str:
    """Why a tile is likely to spill, having more registers than the limits; or empty."""
    registers = tile_registers(problem, gather)
    strided = _strided(problem, gather)
    if registers <= (limits.strided if strided else limits.plain)[problem.kind]:
        return ""
    return f"sums and a column take {registers} registers, and spill"


def crowded(problem: Problem, gather: GatherSchedule) -> bool:
    """Whether a warp of few products likely spills beside two producer warpgroups."""
    few = products_of(gather) <= FEW_PRODUCTS and not by_warpgroups(gather)
    return few and tile_registers(problem, gather) > FEW_REGISTERS


def loads_words(problem: Problem) -> bool:
    """Whether lanes load words of two neighbouring elements from vectors, as they lie in memory.

    Of 16 bits each. Weights are packed for the half of its word in which a line begins, which must
    be the same for all positions: strides are even.
    """
    even = all(axis.step % 2 == 0 for axis in problem.axes)
    return even and problem.element_bytes == 2


def _slots_of_line(problem: Problem) -> int:
    """Weight slots of one line of a pass, at most: taps, or words of two of them."""
    _, _, x = problem.arranged
    taps = sum(x.counts)
    if not loads_words(problem):
        return taps
    return max(taps, len(window_words(x)))


def halves_spill(problem: Problem, gather: GatherSchedule) -> bool:
    """Whether halves of words, as vectors hold them in 16 bits, likely spill beside a tile."""
    if problem.element_bytes == 4 or loads_words(problem):
        return False
    few = products_of(gather) <= FEW_PRODUCTS and not by_warpgroups(gather)
    most = HALVES_FEW_REGISTERS if few else HALVES_REGISTERS
    return tile_registers(problem, gather) > most


def vectors_pay(problem: Problem, gather: GatherSchedule) -> bool:
    """Whether tiles are to be staged as a strided input lies in memory.

    Its columns take an access each otherwise. Lines are longer that way: where the narrowest tile
    would not fit on every GPU, words stay apart.
    """
    r, y, x = problem.arranged
    if x.step == 1 or gather.unroll == "none":
        return False
    size = problem.element_bytes
    taps_y, span_y = (sum(y.counts), max(y.spans)) if gather.window_y else (1, 0)
    taps_r = sum(r.counts) if gather.window_r else 1
    # A warp's 16 positions in one or two lines, at worst over the end of one.
    lines = 2 * (y.step if gather.window_y else 1) + span_y + 1
    line_bytes = -(-(15 * x.step + max(x.spans) + 1) * size // 16) * 16 + 16
    channels = 8 * 4 // size
    split = 2 if problem.kind == "tf32x3" else 1
    slots = taps_r * taps_y * _slots_of_line(problem)
    weights = slots * min(gather.channels) * 8 * 4 * split
    stages = 2 * (channels * gather.planes(r) * lines * line_bytes + weights)
    return stages <= SMALL_STAGES_BYTES and not halves_spill(problem, gather)
