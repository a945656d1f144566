"""The CPU's kernels for depthwise layers, whose channels lie in the lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Package
from cpu_kernels import (
    Library,
    Problem,
    as_last,
    check,
    compile_library,
    compute,
    make_tensors,
    problem,
)
from test_cpu_sums import both

from convgen.codegen.render import render_kernels
from convgen.spec import ConvSpec

C1, C2, C3 = "conv1d", "conv2d", "conv3d"
T1, T2, T3 = "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"


def depthwise(op: str, channels: int, *shapes: tuple[int, ...], **arguments: Any) -> Any:
    return problem(op, (channels, channels), *shapes, groups=channels, **arguments)


PROBLEMS = [
    # All register tiles inside, channels that fill no vector; rows that are nothing but borders.
    depthwise(C2, 43, (2, 5, 19), (1, 3, 1), kernel_size=3, padding=1,
              dtypes=("f32", "bf16")),
    # Chains of parts of the taps, beyond the input on either side.
    depthwise(C3, 16, (1, 3, 4, 6), kernel_size=(5, 6, 7), padding=(2, 3, 6), long=True),
    # Phases with and without taps; extents of one, everything different in every dimension.
    depthwise(T3, 17, (2, 3, 5, 4), (1, 1, 2, 1), kernel_size=(1, 3, 4), stride=(3, 1, 2),
              padding=(0, 2, 1), dilation=(1, 3, 2), output_padding=(2, 0, 1)),
    depthwise(C2, 24, (2, 9, 50), kernel_size=3, stride=(1, 2), dilation=(2, 20), padding=(0, 20),
              long=True),
    # Too many taps along w to unroll, too many phases.
    depthwise(C2, 16, (2, 3, 60), kernel_size=(1, 20), padding=(0, 7), stride=(1, 3), long=True),
    depthwise(T2, 16, (2, 3, 9), kernel_size=(2, 7), stride=(2, 5), padding=(0, 1), long=True),
    # Several blocks and ranges of wgrad, several passes of sums.
    depthwise(C2, 19, (2, 70, 230), kernel_size=3, stride=2, flags=("-O2", "-march=native"),
              dtypes=("f32", "f64"), long=True),
    # Channels fixed when it is generated; several channels to a group, of either tensor.
    depthwise(C2, 16, (2, 6, 5), kernel_size=3, padding=1, fixed=True, long=True),
    problem(C2, (16, 32), (2, 6, 5), kernel_size=3, padding=1, groups=16, long=True),
]  # fmt: skip

# The widths of AVX-512 and NEON, on any processor.
PROBLEMS += [
    depthwise(C2, 43, (2, 5, 19), kernel_size=3, padding=1, long=True,
              flags=("-O1", "-march=native", f"-DCONVGEN_VECTOR_BYTES={size}", "-Wno-psabi"))
    for size in (64, 16)
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Problem], Library]:
    """Libraries by problem, each compiled once."""
    built: dict[str, Library] = {}

    def get(case: Problem) -> Library:
        if case.name not in built:
            folder = tmp_path_factory.mktemp("library")
            path = compile_library(case.spec, case.dtypes, folder, case.flags)
            built[case.name] = Library(path, case.spec)
        return built[case.name]

    return get


@pytest.mark.parametrize("case", PROBLEMS)
def test_values_and_gradients_match_float64(
    case: Problem, library: Callable[[Problem], Library]
) -> None:
    for dtype in case.dtypes:
        for shape in case.shapes:
            tensors = make_tensors(case.spec, case.channels, shape, dtype)
            for last in ("", "xwy", "x"):
                check(compute(library(case), tensors, dtype, last=last), tensors, dtype)


@pytest.mark.parametrize("case", [PROBLEMS[2], PROBLEMS[6]])
def test_bits_do_not_depend_on_threads(case: Any, library: Callable[[Problem], Library]) -> None:
    given: Problem = case.values[0] if hasattr(case, "values") else case
    tensors = make_tensors(given.spec, given.channels, given.shapes[0], "f32")
    first = compute(library(given), tensors, "f32", threads=1, last="xwy")
    for threads in (2, 3, 5):
        again = compute(library(given), tensors, "f32", threads=threads, last="xwy")
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} differs with {threads} threads"


def test_what_is_not_finite_comes_out_where_it_is_read_and_nowhere_else(
    library: Callable[[Problem], Library],
) -> None:
    given: Problem = PROBLEMS[0].values[0]
    tensors = make_tensors(given.spec, given.channels, given.shapes[0], "f32")
    for value in (math.nan, math.inf):
        tensors.x[1, 7, 2, 18] = value
        tensors.grad[0, 40, 0, 0] = value
        # What reads one of these, counted.
        x, grad = ((~t.isfinite()).double() for t in (tensors.x, tensors.grad))
        ones = torch.ones_like(tensors.weight, dtype=torch.float64)
        shape, arguments = tensors.weight.shape, {"padding": 1, "groups": 43}
        of_weight = torch.nn.grad.conv2d_weight
        readers = {
            "y": torch.nn.functional.conv2d(x, ones, **arguments),
            "gx": torch.nn.functional.conv_transpose2d(grad, ones, **arguments),
            "gw": of_weight(x, shape, torch.ones_like(grad), **arguments)
            + of_weight(torch.ones_like(x), shape, grad, **arguments),
        }
        found = compute(library(given), tensors, "f32", last="xwy")
        for name, count in readers.items():
            assert torch.equal(found[name].isfinite(), count == 0), f"{name}, {value}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kernel", "shape"), [(3, (2, 16, 112, 112)), (7, (1, 16, 56, 56)), (13, (1, 16, 40, 40))]
)
def test_constant_inputs_lose_at_most_twice_what_torch_loses(
    package: Package, kernel: int, shape: tuple[int, ...]
) -> None:
    module = package("conv2d", kernel_size=kernel, groups=16, dtypes=("f32",))
    for x, w, grad in ((1.0, 0.1, 1.0), (0.7, 0.3, 0.3)):
        values = as_last(torch.full(shape, x))
        weight = torch.full((16, 1, kernel, kernel), w)
        errors = both(module, "conv2d", values, weight, grad, groups=16)
        for name, (ours, theirs) in errors.items():
            assert ours <= max(2 * theirs, 6e-7), f"{name} of {x} x {w}: {ours} against {theirs}"


def test_layers_that_are_never_depthwise_have_no_such_kernels() -> None:
    def mentions(**arguments: Any) -> bool:
        files, _ = render_kernels(ConvSpec.make(op=C2, **arguments), "cpu", ("f32",))
        return any("depthwise" in files[name] for name in files if name.endswith(".cpp"))

    assert mentions(kernel_size=3, groups=8)
    assert mentions(kernel_size=3, groups=8, in_channels=8, out_channels=8)
    assert not mentions(kernel_size=3)
    assert not mentions(kernel_size=3, groups=8, in_channels=8, out_channels=16)
