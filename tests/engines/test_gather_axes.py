"""Gathers of one- and two-dimensional layers, whose tiles run on from sample to sample of a batch.

Where nothing is gathered along an axis and tensors have one position there, the samples lie along
it (``samples_along_y`` in ``cuda/gather.j2``).
"""

from __future__ import annotations

from dataclasses import replace

import plans
import pytest
from interpreted import (
    Library,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    shifted,
    solve,
)

from convgen.engines.gather.axes import arrange, gather_axes, runs_along_batch
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache")


# Specification; channels in and out, extents: small, so that a tile has many samples.
Layer = tuple[ConvSpec, tuple[int, int], tuple[int, ...]]
PLANES: Layer = ConvSpec("conv_transpose2d", 4, 2, 1), (18, 9), (3, 5)
GROUPED: Layer = ConvSpec("conv2d", 3, (1, 2), 1, groups=2), (6, 18), (5, 4)
LINES: Layer = ConvSpec("conv1d", 5, 2, 2), (9, 17), (9,)


@pytest.mark.parametrize(
    ("layer", "kind", "vectors", "small"),
    mostly_long(
        [
            (PLANES, "f32", False, True),
            (GROUPED, "bf16tc", True, True),
            (LINES, "tf32", False, True),
            (PLANES, "tf32", True, False),
            (GROUPED, "bf16tc", False, False),
            (GROUPED, "bf16tc", True, False),
            (LINES, "tf32", False, False),
        ],
        *range(3),
    ),
    ids=lambda value: value[0].name if isinstance(value, tuple) else str(value),
)
def test_tiles_of_many_samples_agree_with_float64(
    layer: Layer, kind: str, vectors: bool, small: bool
) -> None:
    spec, channels, extents = layer
    contractions = ("fprop", "dgrad")
    schedules = {}
    if kind != "f32":
        schedules = {
            (contraction, kind): replace(
                plans.plan(spec, contraction, kind).schedule, vectors=vectors
            )
            for contraction in contractions
        }
    files = engine_sources(spec, kind, contractions, schedules, small=small)
    loaded = Library(compile_interpreted(f"samples_{spec.name}_{kind}", files, "checked"))
    for contraction in contractions:
        for seed, batch in enumerate((7, 1)):
            given = problem(
                spec, contraction, kind, extents, batch=batch, channels=channels, seed=seed
            )
            read = "fine" if contraction == "fprop" else "coarse"
            given.operands[read] = shifted(given.operands[read], 1 - seed)
            solve(loaded, given)
            given.check()


def test_samples_lie_along_an_axis_without_taps_alone() -> None:
    for spec, expected in (
        (PLANES[0], True),
        (LINES[0], True),
        (ConvSpec("conv3d", 3, 1, 1), False),
        (ConvSpec("conv3d", (1, 3, 3), (2, 1, 1)), False),
        (ConvSpec("conv3d", (1, 3, 3), 1, (1, 0, 0)), False),
    ):
        for contraction in ("fprop", "dgrad"):
            _, y, _ = arrange(gather_axes(spec.geometry, contraction))
            assert runs_along_batch(y) == expected, (spec.name, contraction)
