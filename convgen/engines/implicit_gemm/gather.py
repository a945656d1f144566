"""fprop and dgrad of any stride: ``templates/cuda/implicit_gemm/kernel.cuh``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from convgen.engines.cost import (
    GEMM_PROMOTION_CLOCKS,
    GEMM_TILE_CLOCKS,
    LAUNCH_CLOCKS,
    Gpu,
    Prediction,
    memory_ms,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.implicit_gemm.common import (
    BLOCK_M,
    ELEMENTS,
    HEADERS,
    NAME,
    ROW_BYTES,
    STEP_BYTES,
    SUFFIX,
    context_of,
    has_patches,
    parts,
    phases,
    refuses_taps,
)
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, Range

HALO_LINES = (32, 24, 16, 8)
TAP_LINES = (32, 16, 8)
SPLIT_LINES = (16, 8)
"""Of either in 3xTF32: sums that leave the tensor cores have as many registers once more."""
CONSUMERS = 2
MAX_SPLITS = 32

Lines = Annotated[int, Range(1, max(HALO_LINES))]


@dataclass(frozen=True)
class GatherSizes:
    """The sizes of tiles that are compiled, in groups of eight positions of one consumer.

    ``halo_lines`` of tiles with a halo, which serve all taps of a plane (of a stride, those of one
    residue or a phase), ``tap_lines``, powers of two, of those that are loaded again for each tap.
    A call takes the one that is expected to take the least time.
    """

    halo_lines: Annotated[tuple[Lines, ...], Length(0, 8)]
    tap_lines: Annotated[tuple[Lines, ...], Length(1, 8)]


class Gather(Family[GatherSizes]):
    """See :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("fprop", "dgrad")
    kinds = tuple(ELEMENTS)
    schedule_type = GatherSizes
    template = "cuda/implicit_gemm/gather.cu.j2"
    headers = HEADERS
    suffix = SUFFIX

    def accepts(self, problem: Problem) -> str:
        return "" if has_patches(problem) else refuses_taps(problem)

    def default(self, problem: Problem) -> GatherSizes:
        halo, tap = _lines(problem)
        return GatherSizes(halo, tap)

    def candidates(self, problem: Problem) -> list[Candidate[GatherSizes]]:
        default = self.default(problem)
        found = [default]
        for tap in default.tap_lines[:2]:
            found += [GatherSizes((halo,), (tap,)) for halo in default.halo_lines]
        return [Candidate(schedule, "") for schedule in dict.fromkeys(found)]

    def refusal(self, plan: Plan[GatherSizes], architectures: Iterable[str] = ()) -> str:
        halo, tap = plan.schedule.halo_lines, plan.schedule.tap_lines
        if len(set(tap)) < len(tap) or len(set(halo)) < len(halo):
            return "the same size is compiled once"
        halo_lines, tap_lines = _lines(plan.problem)
        if not tap or not set(tap) <= set(tap_lines):
            return f"tap_lines are one or more of {', '.join(map(str, tap_lines))}"
        if halo and not halo_lines:
            return "a halo needs several taps, and with a stride ones that share positions"
        if not set(halo) <= set(halo_lines):
            return f"halo_lines are of {', '.join(map(str, halo_lines))}"
        return ""

    def predict(self, plan: Plan[GatherSizes], call: Call, gpu: Gpu) -> Prediction:
        problem = plan.problem
        clocks = min(
            _clocks(problem, call, gpu, lines, halo)
            for sizes, halo in (
                (plan.schedule.halo_lines, True),
                (plan.schedule.tap_lines, False),
            )
            for lines in sizes
        )
        least = memory_ms(problem, call, gpu)
        ms = clocks / gpu.clocks_per_ms
        return Prediction(max(ms, least), "memory" if least > ms else "arithmetic")

    def context(self, plan: Plan[GatherSizes]) -> dict[str, Any]:
        return context_of(plan.problem) | {
            "input": plan.problem.input,
            "output": plan.problem.output,
        }


def _residues(problem: Problem) -> int:
    """Slabs of a plane: a stride divides its axes (``Residues`` in ``tiles.cuh``)."""
    g = problem.geometry
    return math.prod(
        min(stride // math.gcd(stride, dilation), kernel)
        for kernel, stride, dilation in zip(g.kernel[1:], g.stride[1:], g.dilation[1:], strict=True)
    )


def _has_halo(problem: Problem) -> bool:
    """Whether a slab serves several taps, or, with stride 1, several planes."""
    g = problem.geometry
    if max(g.stride) == 1:
        return g.taps > 1
    if parts(problem) == 2:
        return False
    if phases(problem) > 1:
        return _taps_of_phase(problem, (1, 2)) > 1
    return g.kernel[1] * g.kernel[2] > _residues(problem)


def _taps_of_phase(problem: Problem, axes: tuple[int, ...]) -> int:
    """Along some axes, at most (``AxisPhase`` in ``phases.cuh``)."""
    g = problem.geometry
    return math.prod(
        -(-g.kernel[i] // (g.stride[i] // math.gcd(g.stride[i], g.dilation[i]))) for i in axes
    )


def _lines(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes that exist: with a halo, and of a tap."""
    split = parts(problem) == 2
    halo, tap = (SPLIT_LINES, SPLIT_LINES) if split else (HALO_LINES, TAP_LINES)
    return halo if _has_halo(problem) else (), tap


def _clocks(problem: Problem, call: Call, gpu: Gpu, lines: int, halo: bool) -> float:
    """Of the best way that ``host.cuh`` considers for a size, but for folded planes."""
    g = problem.geometry
    d, h, w = call.extent(problem.output)
    outputs = call.channels(problem.output) // g.groups
    inputs = call.channels(problem.input) // g.groups
    positions = 8 * lines
    gathered = -(-g.taps // phases(problem))  # taps of an output
    if h == 1 or not halo:
        tiles = -(-d * h * w * call.batch // positions)
    else:
        tiles = call.batch * d * -(-h // lines) * -(-w // 8)
    # Products of 32 bytes of K, and K blocks.
    steps = -(-inputs * problem.element_bytes // STEP_BYTES)
    blocks = -(-inputs * problem.element_bytes // ROW_BYTES)
    units = blocks if halo else blocks * gathered
    slab_bytes = positions * ROW_BYTES * (1.3 if halo else 1)
    split = parts(problem) == 2
    weight_bytes = ROW_BYTES * parts(problem)
    if split and not halo and g.taps > 1:
        slab_bytes *= 2  # split by the pack
    best = math.inf
    for consumers_of_positions in (1, 2):
        width = BLOCK_M * (CONSUMERS // consumers_of_positions)
        ctas = -(-tiles // consumers_of_positions) * -(-outputs // width) * g.groups
        products = float(gathered * steps * CONSUMERS * 4 * lines)
        if split:
            products = 3 * products + gathered * blocks * GEMM_PROMOTION_CLOCKS
        planes = consumers_of_positions
        if halo and max(g.stride) == 1:
            planes += g.kernel[0] - 1
        elif halo and phases(problem) > 1:
            planes *= _taps_of_phase(problem, (0,))
        elif halo:
            planes *= g.kernel[0] * _residues(problem)
        taps = gathered if halo else 1
        loads = units * (planes * slab_bytes + taps * width * weight_bytes) / gpu.bulk_bytes
        for splits in range(1, min(units, MAX_SPLITS) + 1):
            if splits > 1 and ctas * splits > 2 * gpu.multiprocessors:
                break
            waves = -(-ctas * splits // gpu.multiprocessors)
            clocks = waves * (max(products, loads) / splits + GEMM_TILE_CLOCKS)
            if splits > 1:
                sums = 8 * splits * call.batch * outputs * g.groups * d * h * w
                clocks += LAUNCH_CLOCKS + sums / (gpu.bulk_bytes / 2 * gpu.multiprocessors)
            best = min(best, clocks)
    return best


GATHER = Gather()
