"""Strides and dilations with common divisors: what no tap meets is left out before the kernels.

See ``convgen/spec/compaction.py`` and ``templates/cuda/mma/compaction.cuh``.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import plans
import pytest
import torch
import torch.nn.functional as F
from interpreted import (
    Library,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    solve,
    unoptimized,
)

from convgen.checking import interpreted
from convgen.engines.cost import H200
from convgen.engines.mma.common import packed_call
from convgen.engines.problem import Call, Problem
from convgen.spec import ConvSpec, Geometry
from convgen.spec.compaction import compaction_of
from convgen.specialize import render, specialize

READERS = ("fprop", "wgrad")


pytestmark = pytest.mark.usefixtures("shared_cache")


def geometry(kernel: int, stride: int, padding: int, dilation: int) -> Geometry:
    def line(value: int, other: int) -> tuple[int, int, int]:
        return other, other, value

    return Geometry(
        line(kernel, 1), line(stride, 1), line(padding, 0), line(dilation, 1), 1, None, None
    )


@pytest.mark.parametrize("padding", range(7))
@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (4, 2), (2, 6), (3, 3), (6, 4)])
def test_the_layer_on_the_compacted_tensor_meets_the_same_positions(
    stride: int, dilation: int, padding: int
) -> None:
    whole = geometry(3, stride, padding, dilation)
    for contraction in READERS:
        compaction = Problem.packed(whole, contraction, "tf32").compaction
        assert compaction is not None
        met, step, offset = compaction.geometry, compaction.step[2], compaction.offset[2]
        assert compaction.step[:2] == (1, 1)
        for i, tap in itertools.product(range(9), range(3)):
            position = i * met.stride[2] - met.padding[2] + tap * met.dilation[2]
            assert position * step + offset == i * stride - padding + tap * dilation


def test_there_is_one_only_where_lines_hold_what_no_tap_meets() -> None:
    writes = Problem.packed(geometry(3, 2, 1, 2), "dgrad", "tf32")
    assert writes.compaction is None
    assert writes.geometry == geometry(3, 2, 1, 2)
    for stride, dilation in (1, 1), (2, 1), (1, 2), (2, 3):
        assert compaction_of(geometry(3, stride, 0, dilation)) is None
    planes = replace(geometry(3, 1, 1, 1), stride=(2, 2, 1), dilation=(2, 2, 1))
    assert compaction_of(planes) is None
    assert compaction_of(replace(planes, stride=(2, 2, 2), dilation=(2, 1, 2))) is not None


# Channels open and odd, in groups; compactions that begin before and within the tensor, whose lines
# are longer than it; tensors that hold not one of their positions.
SPECS = [
    (ConvSpec("conv_transpose3d", 3, 2, 1, dilation=2), (17, 25), ((3, 4, 9), (1, 1, 1))),
    (
        ConvSpec("conv2d", (3, 2), (4, 2), (1, 3), dilation=(2, 4), groups=2),
        (18, 10),
        ((9, 14), (5, 37)),
    ),
    (ConvSpec("conv1d", 5, 3, 4, dilation=3), (8, 24), ((41,), (9,))),
    (ConvSpec("conv1d", 1, 2, 1, dilation=2), (8, 8), ((1,), (6,))),
]


@pytest.mark.parametrize(
    ("index", "kind", "architecture", "small"),
    mostly_long(
        [
            (0, "bf16tc", "90a", True),
            (1, "tf32x3", "80", True),
            (0, "tf32", "80", False),
            (0, "bf16tc", "90a", False),
            (1, "tf32x3", "90a", False),
            (1, "f16tc", "80", False),
            (2, "bf16tc", "80", False),
            (3, "tf32", "90a", False),
        ],
        0,
    ),
)
def test_kernels_on_compacted_tensors_agree_with_float64(
    index: int, kind: str, architecture: str, small: bool
) -> None:
    spec, channels, calls = SPECS[index]
    sources = engine_sources(spec, kind, READERS, small=small)
    assert "compaction_shape<T>" in sources[f"fprop_{kind}.cu"]
    name = f"compaction_{spec.name}_{kind}_{architecture}"
    loaded = Library(compile_interpreted(name, sources, "checked", architecture=architecture))
    for seed, extents in enumerate(calls):
        for contraction in READERS:
            given = problem(
                spec, contraction, kind, extents, batch=1 + seed, channels=channels, seed=seed
            )
            solve(loaded, given)
            given.check()


def test_packing_is_part_of_the_predicted_time() -> None:
    whole = ConvSpec("conv_transpose3d", 3, 2, 1, dilation=2).geometry
    plan = plans.plan(whole, "fprop", "bf16tc")
    assert plan.problem.compaction is not None
    assert plan.geometry == plan.problem.compaction.geometry
    call = Call(16, 32, 64, (16, 32, 32), (33, 65, 65))
    met = packed_call(plan.problem, call)
    assert met == replace(call, fine_extent=(16, 32, 32))
    tf32 = replace(plan.problem, kind="tf32")
    assert packed_call(tf32, replace(call, fine_extent=(1, 1, 1))).fine_extent == (1, 1, 4)
    uncompacted = replace(plan, problem=replace(plan.problem, compaction=None))
    dense = plan.family.predict(uncompacted, met, H200)
    packed = plan.family.predict(plan, call, H200)
    # Half of the lines' elements are read for nothing; all are read once and written half.
    elements = 16 * 64 * 16 * 32 * (65 + 32)
    expected = 2 * elements / H200.memory_bytes_per_s * 1e3 + 0.002
    assert packed.ms - dense.ms == pytest.approx(expected)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    spec = ConvSpec("conv_transpose1d", 3, 2, 1, dilation=2)
    folder = tmp_path_factory.mktemp("generated") / spec.name
    for path, text in render(spec, ("cuda",), ("bf16",)).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with unoptimized("plain"):
        return interpreted.load(folder, "plain")


@pytest.mark.long
def test_gradients_share_what_is_packed(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = sys.modules[f"{module.__name__}._kernels"]
    layer = module.ConvTranspose1d(9, 17, dtype=torch.bfloat16)
    x = torch.randn(2, 9, 37, dtype=torch.bfloat16, requires_grad=True)
    operands = (x, layer.weight, layer.bias)

    def gradients() -> tuple[torch.Tensor, ...]:
        out = layer(x)
        return torch.autograd.grad(out, operands, torch.ones_like(out))

    calls: list[str] = []
    run = kernels.Launch.run

    def recorded(launch: Any, *rest: Any, is_packed: bool = False) -> bool:
        calls.append("of packed" if is_packed else "whole")
        return bool(run(launch, *rest, is_packed=is_packed))

    alone = gradients()  # plans are made
    monkeypatch.setattr(kernels.Launch, "run", recorded)
    together = gradients()
    assert calls == ["whole", "whole", "whole", "of packed"]  # forward, bias, input, weight
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    expected = torch.autograd.grad(
        F.conv_transpose1d(x, layer.weight, layer.bias, 2, 1, dilation=2).sum(), operands
    )
    # torch rounds its sums to bfloat16 in another order.
    for one, other in zip(together, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-1)


@pytest.mark.long
def test_gradients_of_gradients_are_of_operators(module: ModuleType) -> None:
    """What packs once is none, and stays aside where gradients are recorded."""
    layer = module.ConvTranspose1d(8, 8, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, 8, 9, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), layer.weight)
    out = F.conv_transpose1d(x, layer.weight, None, 2, 1, dilation=2)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), layer.weight)
    torch.testing.assert_close(second, expected, rtol=5e-2, atol=1.0)


def test_the_cpu_has_nothing_packed_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels sum the bias gradient in the pass of the weight's."""
    package = specialize(
        "conv_transpose1d", kernel_size=3, stride=2, padding=1, dilation=2, dtypes=["f32"]
    )
    operators = sys.modules[f"{package.__name__}._operators"]
    calls: list[str] = []
    wbgrad = operators.PLAIN.wbgrad

    def recorded(*inputs: Any) -> Any:
        calls.append("wbgrad")
        return wbgrad(*inputs)

    monkeypatch.setattr(operators, "PLAIN", operators.PLAIN._replace(wbgrad=recorded))
    monkeypatch.setattr(operators, "gradient_kernels", lambda *_: calls.append("shared"))
    layer = package.ConvTranspose1d(8, 8)
    layer(torch.randn(1, 8, 9, requires_grad=True)).sum().backward()
    assert calls == ["wbgrad"]
