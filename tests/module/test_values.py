"""Values and gradients of the six operators against torch in float64, over random shapes.

The first test draws calls for a fixed set of specifications, each compiled once; the second draws
whole specifications.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_DTYPES, DEVICES, LAYERS, Package
from hypothesis import given, settings
from interpreted import mostly_long
from torch import Tensor

from convgen.checking.memory import poisoned_memory
from convgen.checking.verify import LIMITS
from convgen.spec import OPERATORS, ConvSpec

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

SPECS: list[tuple[str, dict[str, Any]]] = [
    *LAYERS.items(),
    # Outputs beyond the reach of every tap, taps beyond the output, and phases without taps.
    ("conv_transpose3d", {"kernel_size": (1, 2, 3), "stride": (3, 1, 2), "padding": (0, 3, 1)}),
    ("conv_transpose3d", {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    # No overlap, and channels fixed.
    ("conv_transpose3d", {"kernel_size": 2, "stride": 2, "in_channels": 6, "out_channels": 10}),
    # Depthwise.
    (
        "conv_transpose3d",
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 8},
    ),
    ("conv2d", {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 2), "groups": 16}),
    # More padding than the kernel reaches over, and dilation beyond the stride.
    ("conv3d", {"kernel_size": (1, 3, 2), "padding": (2, 0, 4), "dilation": (1, 2, 3)}),
]


@dataclass(frozen=True)
class Call:
    """One call of a function, drawn at random."""

    batch: int
    channels: tuple[int, int]
    extents: tuple[int, ...]
    output_padding: tuple[int, ...]
    bias: bool
    dtype: str
    order: tuple[int, ...]
    """Dimensions of the input from the outermost in memory to the innermost."""
    seed: int


@st.composite
def calls(draw: st.DrawFn, spec: ConvSpec, dtypes: tuple[str, ...] = ("f32", "f64")) -> Call:
    n = spec.ndim
    per_group = st.integers(1, max(1, 20 // spec.groups))
    longest = {1: 70, 2: 24, 3: 9}[n]
    extents = draw(st.tuples(*[st.integers(1, longest)] * (n - 1), st.integers(1, 2 * longest)))
    limits = [max(s, d) - 1 for s, d in zip(spec.stride, spec.dilation, strict=True)]
    call = Call(
        batch=draw(st.integers(0, 3)),
        channels=(
            spec.in_channels or spec.groups * draw(per_group),
            spec.out_channels or spec.groups * draw(per_group),
        ),
        extents=extents,
        output_padding=tuple(draw(st.integers(0, limit * spec.transposed)) for limit in limits),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        order=tuple(draw(st.permutations(range(n + 2)))),
        seed=draw(st.integers(0, 2**20)),
    )
    plain = ConvSpec.from_dict(spec.to_dict() | {"output_padding": 0})
    hypothesis.assume(min(plain.output_extents(extents)) >= 1)
    return call


def reference(spec: ConvSpec, call: Call, operands: list[Tensor]) -> Tensor:
    function = getattr(F, spec.op)
    options = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    if spec.transposed:
        options |= {"padding": spec.padding, "output_padding": call.output_padding}
    else:
        options |= {"padding": spec.padding}
    return function(*operands, **options)


def check(module: ModuleType, spec: ConvSpec, call: Call, device: str) -> None:
    """Forward and the three gradients, with memory poisoned, twice to the bit."""
    generator = torch.Generator().manual_seed(call.seed)
    first, second = call.channels if spec.transposed else reversed(call.channels)
    shapes = [
        (call.batch, call.channels[0], *call.extents),
        (first, second // spec.groups, *spec.kernel_size),
        *([(call.channels[1],)] if call.bias else []),
    ]
    dtype = DTYPES[call.dtype]
    operands = [torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes]
    for operand in operands:
        operand.requires_grad_()
    expected = reference(spec, call, operands)
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    expected_gradients = torch.autograd.grad(expected, operands, grad.double())

    given = [operand.detach().to(device, dtype) for operand in operands]
    back = [call.order.index(dimension) for dimension in range(spec.ndim + 2)]
    given[0] = given[0].permute(call.order).contiguous().permute(back)
    copies = [tensor.clone() for tensor in given]
    for tensor in given:
        tensor.requires_grad_()
    more = {"output_padding": call.output_padding} if spec.transposed else {}
    runs = []
    for _ in range(2):
        with poisoned_memory():
            y = getattr(module, spec.op)(*given, **more)
            runs.append((y, *torch.autograd.grad(y, given, grad.to(device))))

    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy), "an input was modified"
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other), "two runs differ"
    names = ("forward", "grad input", "grad weight", "grad bias")
    results = (expected, *expected_gradients)
    for name, ours, theirs in zip(names, runs[0], results, strict=False):
        assert ours.shape == theirs.shape, name
        dense = ours.dim() > 3 and ours.movedim(1, -1).is_contiguous()
        assert ours.is_contiguous() or dense, name
        error = (ours.detach().cpu().double() - theirs.detach()).norm().item()
        assert not math.isnan(error), f"{name} has elements that were never written"
        assert error <= LIMITS[call.dtype] * theirs.norm().item(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("op", "constants"),
    mostly_long(SPECS, *range(len(LAYERS) + 1), -3, -1),
    ids=[ConvSpec.make(op, **kw).name for op, kw in SPECS],
)
def test_calls_of_many_shapes(
    package: Package, op: str, constants: dict[str, Any], device: str
) -> None:
    # Those that other tests have, too, are compiled in both dtypes.
    dtypes = ("f32", "f64") if constants in LAYERS.values() else ("f32",)
    module = package(op, device, **constants, dtypes=dtypes)
    spec = ConvSpec.from_dict(module.SPEC)

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(call=calls(spec, dtypes))
    def run(call: Call) -> None:
        check(module, spec, call, device)

    run()


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(package: Package, device: str) -> None:
    module = package("conv_transpose3d", device, kernel_size=3, stride=2, dtypes=ALL_DTYPES)
    spec = ConvSpec.from_dict(module.SPEC)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(call=calls(spec, ("f16", "bf16")))
    def run(call: Call) -> None:
        check(module, spec, call, device)

    run()


@st.composite
def specifications(draw: st.DrawFn) -> ConvSpec:
    op = draw(st.sampled_from(OPERATORS))
    n = int(op[-2])
    transposed = op.startswith("conv_transpose")

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return draw(st.tuples(*[values] * n))

    stride, dilation = each(st.integers(1, 4)), each(st.integers(1, 3))
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    groups = draw(st.sampled_from((1, 1, 2, 5)))
    channels = st.sampled_from((None, None, groups, 3 * groups))
    return ConvSpec.make(
        op,
        kernel_size=each(st.integers(1, 5)),
        stride=stride,
        padding=each(st.integers(0, 4)),
        output_padding=tuple(draw(st.integers(0, limit * transposed)) for limit in limits),
        dilation=dilation,
        groups=groups,
        in_channels=draw(channels),
        out_channels=draw(channels),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_specifications(package: Package, device: str) -> None:
    @settings(
        max_examples=3,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # shrinking would compile for minutes
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(spec=specifications(), data=st.data())
    def run(spec: ConvSpec, data: st.DataObject) -> None:
        constants = {name: value for name, value in spec.to_dict().items() if name != "op"}
        module = package(spec.op, device, **constants, dtypes=("f32",))
        for _ in range(4):
            check(module, spec, data.draw(calls(spec, ("f32",))), device)

    run()
