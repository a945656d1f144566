"""Layers and calls, chosen so that every branch of the CUDA templates is rendered."""

from __future__ import annotations

from dataclasses import dataclass

from interpreted import Problem, problem

from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES

CONTRACTIONS = ("fprop", "dgrad", "wgrad", "bgrad")


@dataclass(frozen=True)
class Case:
    spec: ConvSpec
    dtype: str
    calls: tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
    """Batch, channels in and out, input extents."""

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.dtype}"

    @property
    def stem(self) -> str:
        return f"{self.spec.name}_{self.dtype}"

    @property
    def contractions(self) -> tuple[str, ...]:
        # Biases have no math modes.
        return tuple(c for c in CONTRACTIONS if c != "bgrad" or self.dtype in DTYPES)

    def problems(self) -> list[Problem]:
        return [
            problem(
                self.spec,
                contraction,
                self.dtype,
                extents,
                batch=batch,
                channels=channels,
                bias=index % 2 == 0,
                seed=index,
            )
            for index, (batch, channels, extents) in enumerate(self.calls)
            for contraction in self.contractions
        ]


def spec(op: str, kernel: int | tuple[int, ...], *rest: object, **more: object) -> ConvSpec:
    return ConvSpec(op, kernel, *rest, **more)  # type: ignore[arg-type]


UP, CONV = "conv_transpose3d", "conv3d"
CASES = [
    # All taps unrolled, register rows along D; ragged tiles, several chunks of channels.
    Case(spec(UP, 3, 2), "f32", ((2, (5, 6), (3, 5, 9)), (1, (19, 9), (1, 2, 37)))),
    Case(spec(UP, 3, 2, 1, 1, in_channels=8, out_channels=16), "f32", ((1, (8, 16), (3, 4, 8)),)),
    Case(spec(UP, 3, 2, 1, 1), "f64", ((1, (3, 5), (2, 5, 7)),)),
    # Rows along H; a kernel without depth.
    Case(spec("conv2d", 3, 1, 1), "f16", ((3, (9, 4), (11, 13)), (1, (1, 1), (1, 1)))),
    Case(spec("conv_transpose2d", (4, 3), 2, 1), "bf16", ((2, (7, 3), (6, 9)),)),
    # No overlap: one product and a scatter; vector stores.
    Case(spec(UP, 2, 2), "f32", ((1, (8, 4), (3, 4, 8)), (2, (3, 2), (2, 3, 5)))),
    # Empty phases; padding beyond the kernel.
    Case(spec(UP, (1, 2, 1), (2, 3, 2), 0, (1, 2, 1)), "f64", ((1, (3, 2), (2, 3, 4)),)),
    Case(spec(CONV, (1, 2, 2), (1, 2, 1), (2, 3, 2)), "f32", ((1, (2, 3), (2, 3, 4)),)),
    # Dilation and stride together, in groups with odd channels.
    Case(
        spec(CONV, (2, 3, 3), 2, 1, dilation=(1, 2, 3), groups=3), "f32", ((2, (9, 15), (4, 7, 9)),)
    ),
    Case(
        spec(UP, 3, (1, 2, 3), 1, (0, 1, 2), dilation=2, groups=2),
        "f16",
        ((1, (6, 10), (3, 4, 5)),),
    ),
    # Depthwise.
    Case(
        spec(CONV, 3, 1, 1, groups=8, in_channels=8, out_channels=8),
        "bf16",
        ((2, (8, 8), (3, 5, 9)),),
    ),
    # Too many taps to unroll: a plane of taps at a time, or a line.
    Case(spec(CONV, (3, 5, 7), 1, (1, 2, 3)), "f32", ((1, (4, 5), (4, 6, 9)),)),
    Case(spec(CONV, 9, 1, (1, 4, 4)), "f32", ((1, (2, 3), (8, 4, 5)),)),
    # One-dimensional: positions scattered over the plane. A vocoder's upsampling.
    Case(spec("conv1d", 7, 1, 3, groups=4), "f32", ((3, (8, 12), (50,)), (1, (4, 4), (301,)))),
    Case(spec("conv_transpose1d", 16, 8, 4), "f32", ((2, (6, 3), (37,)),)),
    # Long lines and many phases: loops over taps.
    Case(spec("conv_transpose1d", 40, 20, 10), "f32", ((1, (4, 3), (23,)),)),
    Case(spec("conv2d", (3, 40), (1, 1), (1, 20)), "f32", ((1, (3, 4), (5, 45)),)),
    Case(spec("conv_transpose2d", (4, 3), (2, 12)), "f64", ((1, (3, 4), (3, 5)),)),
]

# The tensor cores' engine: every math mode, every way of unrolling.
MMA_CASES = [
    Case(spec(UP, 3, 2), "tf32x3", ((2, (5, 19), (3, 5, 9)), (1, (19, 9), (1, 2, 37)))),
    Case(spec(CONV, (3, 5, 7), 1, (1, 2, 3)), "tf32", ((1, (9, 5), (4, 6, 9)),)),
    Case(spec("conv2d", 3, 1, 1, groups=2), "f16tc", ((2, (18, 8), (11, 13)),)),
    Case(spec("conv_transpose1d", 16, 8, 4), "bf16tc", ((2, (17, 7), (37,)),)),
    Case(spec("conv_transpose1d", 40, 20, 10), "tf32", ((1, (9, 12), (23,)),)),
    Case(spec(UP, 2, 2, in_channels=16, out_channels=8), "f16tc", ((1, (16, 8), (3, 4, 8)),)),
    # Staging: long lines in blocks of columns, by strides that divide a warp or do not; few
    # channels, whose planes are shared out; halos on all sides, wider than the tensor.
    Case(
        spec("conv2d", 3, (1, 2), 1),
        "tf32",
        (
            (1, (9, 3), (5, 259)),
            (1, (1, 9), (3, 131)),
            (1, (2, 17), (2, 70)),
            (1, (3, 2), (9, 39)),
            (1, (1, 1), (6, 33)),
            (1, (2, 2), (7, 33)),
        ),
    ),
    Case(
        spec("conv2d", (3, 5), (2, 1), (4, 8), dilation=(3, 4)),
        "tf32",
        ((2, (11, 8), (3, 61)), (1, (1, 2), (5, 9)), (1, (8, 1), (1, 2))),
    ),
    Case(spec("conv2d", 3, (1, 3), 1), "tf32", ((1, (9, 5), (4, 397)), (1, (6, 9), (3, 50)))),
    Case(
        spec("conv2d", 3, (1, 2), 1),
        "f16tc",
        (
            (1, (17, 3), (5, 259)),
            (1, (1, 9), (3, 131)),
            (1, (3, 17), (2, 70)),
            (1, (6, 2), (9, 39)),
            (1, (2, 1), (6, 33)),
            (1, (3, 3), (7, 33)),
        ),
    ),
    Case(spec("conv2d", 3, (2, 5), 4), "bf16tc", ((1, (9, 7), (5, 333)), (2, (3, 18), (4, 77)))),
    Case(spec("conv1d", 13, 11, 6), "f16tc", ((1, (9, 4), (200,)),)),
    Case(spec(CONV, 3, 1, 1, groups=2), "f16tc", ((1, (6, 10), (3, 5, 41)),)),
]


# As compiled for a GPU with wgmma: warpgroups by positions, and by channels; both widths of
# accesses.
WGMMA_CASES = [
    *MMA_CASES,
    Case(spec(UP, 3), "tf32", ((1, (8, 41), (3, 9, 16)), (2, (9, 3), (1, 2, 3)))),
    Case(spec(CONV, 3, 2, 1), "tf32x3", ((1, (17, 40), (5, 9, 13)),)),
]
