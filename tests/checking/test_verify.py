"""What verification finds, and what it must not miss."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ALL_DTYPES, LAYERS, Package
from interpreted import mostly_long
from torch import Tensor

from convgen.checking.cases import cases, output_extents
from convgen.checking.memory import poisoned_memory
from convgen.checking.verify import LIMITS, Row, VerificationError, allowing_tf32, verify
from convgen.spec import ConvSpec
from convgen.specialize import generate, load

QUANTITIES = {
    *("forward", "grad input", "grad weight", "grad bias"),
    *("grad grad input", "grad grad weight", "grad grad grad"),
    *("same bits twice", "inputs unmodified"),
    *("NaN in input", "NaN in weight", "NaN in grad"),
}


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


def broken(module: ModuleType, function: Any) -> Any:
    """A module whose function is another."""
    return SimpleNamespace(**{**vars(module), "conv_transpose3d": function})


def failures(module: Any, **options: Any) -> set[str]:
    report = verify(module, dtypes=["f32"], quick=True, **options)
    assert report.ok == (not [row for row in report.rows if not row.ok])
    return {row.quantity for row in report.rows if not row.ok}


@pytest.mark.parametrize("op", mostly_long(list(LAYERS), 1))
def test_every_operator_passes(package: Package, device: str, op: str) -> None:
    module = package(op, device, **LAYERS[op])
    report = verify(module, device=device)
    assert report.ok
    assert report.name == ConvSpec.from_dict(module.SPEC).name
    assert {row.dtype for row in report.rows} - {"tf32"} == {"f32", "f64"}
    if device == "cpu":
        assert "tf32" not in {row.dtype for row in report.rows}
    assert {row.quantity for row in report.rows} == QUANTITIES
    assert {row.device for row in report.rows} == {device}
    spec = ConvSpec.from_dict(module.SPEC)
    assert {row.shapes for row in report.rows} == {str(case) for case in cases(spec)}


@pytest.mark.long
@pytest.mark.usefixtures("shared_cache", "optimized")
@pytest.mark.parametrize("op", list(LAYERS))
def test_every_operator_passes_as_it_is_compiled_for_users(op: str) -> None:
    spec = ConvSpec.make(op, **LAYERS[op])
    assert verify(load(generate(spec, dtypes=("f32",), backends="cpu"))).ok


@pytest.mark.long
def test_half_precision_passes(package: Package, device: str) -> None:
    module = package("conv_transpose3d", device, kernel_size=3, stride=2, dtypes=ALL_DTYPES)
    report = verify(module, device=device, dtypes=["float16", "bf16"], quick=True)
    assert report.ok
    errors = {row.dtype: row.error for row in report.rows if row.quantity == "forward"}
    assert LIMITS["f32"] < errors["f16"] < errors["bf16"]  # no other kernels than those ran


def test_the_seed_decides_the_inputs(k3s2: ModuleType) -> None:
    first, again, other = (
        [row.error for row in verify(k3s2, dtypes=["f32"], quick=True, seed=seed).rows]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


class TestFindings:
    def test_an_error_above_the_limit(self, k3s2: ModuleType) -> None:
        def scaled(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            return k3s2.conv_transpose3d(input, *operands, **named) * (1 + 3e-5)

        assert "forward" in failures(broken(k3s2, scaled))

    def test_one_wrong_element(self, k3s2: ModuleType) -> None:
        def off(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, *operands, **named)
            corner = torch.zeros_like(y)
            corner.view(-1)[0] = 1e-3
            return y + corner

        assert "forward" in failures(broken(k3s2, off))

    def test_an_element_that_is_never_written(self, k3s2: ModuleType) -> None:
        def forgets(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, *operands, **named)
            mask = torch.zeros_like(y)
            mask.view(-1)[-1] = torch.empty(1).item()
            return y + mask

        assert "forward" in failures(broken(k3s2, forgets))

    def test_a_wrong_gradient(self, k3s2: ModuleType) -> None:
        class Halved(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tensor: Tensor) -> Tensor:
                return tensor.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad / 2

        def wrong(input: Tensor, weight: Tensor, *operands: Any, **named: Any) -> Tensor:
            return k3s2.conv_transpose3d(input, Halved.apply(weight), *operands, **named)

        found = failures(broken(k3s2, wrong))
        assert "grad weight" in found
        assert "forward" not in found
        assert "grad input" not in found

    def test_sums_of_one_sign_that_lose_what_others_do_not(self, k3s2: ModuleType) -> None:
        def loses(input: Tensor, *operands: Any, **options: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, *operands, **options)
            return y * (1 + 4e-5 * (input.amin() == input.amax()))

        assert "forward" in failures(broken(k3s2, loses))

    def test_terms_that_are_rounded_to_the_last_place_of_the_bias(self, k3s2: ModuleType) -> None:
        def rounds(input: Tensor, weight: Tensor, bias: Any = None, **options: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, weight, **options)
            if bias is None:
                return y
            # Each of some ten terms is rounded to multiples of 2^-14.
            place = 2.0**-11 if bias.detach().abs().amax() > 100 else 2.0**-40
            rounded = (y / place).round() * place
            return y + (rounded - y).detach() + bias.view(-1, 1, 1, 1)

        report = verify(broken(k3s2, rounds), dtypes=["f32"])
        assert {row.shapes.split("(")[-1] for row in report.rows if not row.ok} == {"large bias)"}

    @pytest.mark.parametrize("operand", ["input", "weight"])
    def test_nan_that_spreads(self, k3s2: ModuleType, operand: str) -> None:
        def spreads(input: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
            everywhere = {"input": input, "weight": weight}[operand].detach().sum() * 0
            return k3s2.conv_transpose3d(input, weight, *others, **options) + everywhere

        assert failures(broken(k3s2, spreads)) == {f"NaN in {operand}"}

    def test_nan_that_is_lost(self, k3s2: ModuleType) -> None:
        def loses(input: Tensor, *operands: Any, **options: Any) -> Tensor:
            return k3s2.conv_transpose3d(input, *operands, **options).nan_to_num()

        assert "NaN in input" in failures(broken(k3s2, loses))

    def test_a_modified_input(self, k3s2: ModuleType) -> None:
        def modifies(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, *operands, **named)
            input.data[(0,) * input.dim()].add_(1)  # behind autograd's back
            return y

        assert "inputs unmodified" in failures(broken(k3s2, modifies))

    def test_runs_that_differ(self, k3s2: ModuleType) -> None:
        count = iter(range(1000))

        def drifts(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            y = k3s2.conv_transpose3d(input, *operands, **named)
            return y * (1 + next(count) * 2.0**-23)

        assert "same bits twice" in failures(broken(k3s2, drifts))

    def test_a_wrong_shape(self, k3s2: ModuleType) -> None:
        def longer(input: Tensor, *operands: Any, **named: Any) -> Tensor:
            return k3s2.conv_transpose3d(input, *operands, **named)[..., :1].expand(
                k3s2.conv_transpose3d(input, *operands, **named).shape
            )

        assert "forward" in failures(broken(k3s2, longer))


class TestRow:
    def test_ok_wants_both_errors_within_limits(self) -> None:
        def row(error: float, worst: float) -> Row:
            return Row("cpu", "f32", "", "forward", error, worst, 1e-5)

        assert row(1e-5, 2e-5).ok
        assert not row(2e-5, 0).ok
        assert not row(0, 3e-5).ok
        assert not row(math.nan, 0).ok
        assert not row(0, math.nan).ok


class TestCases:
    @pytest.mark.parametrize(
        "spec",
        [
            ConvSpec.make(kernel_size=1, padding=3),
            ConvSpec.make(kernel_size=3, stride=2, output_padding=1, padding=4),
            ConvSpec.make("conv2d", kernel_size=(7, 3), dilation=(3, 1)),
            ConvSpec.make("conv1d", kernel_size=2, groups=64),
            ConvSpec.make("conv1d", kernel_size=2, in_channels=5),
        ],
        ids=lambda spec: spec.name,
    )
    def test_every_case_has_an_output(self, spec: ConvSpec) -> None:
        for case in cases(spec):
            assert min(output_extents(spec, case)) >= 1
            assert case.in_channels % spec.groups == case.out_channels % spec.groups == 0
            assert spec.in_channels in (None, case.in_channels)

    def test_they_cover_what_goes_wrong(self) -> None:
        chosen = cases(ConvSpec.make(kernel_size=3, stride=2))
        assert {case.batch for case in chosen} >= {None, 0, 1, 2}
        assert {case.bias for case in chosen} == {case.strided for case in chosen} == {True, False}
        assert {case.output_padding for case in chosen} >= {(0, 0, 0), (1, 1, 1)}
        values = {"normal", "constant", "one sign", "large bias", "widely spread", "NaN"}
        assert {case.values for case in chosen} == values
        assert len(cases(ConvSpec.make(kernel_size=3), quick=True)) < len(chosen)


class TestErrors:
    def test_dtype_that_was_not_generated(self, k3s2: ModuleType) -> None:
        with pytest.raises(VerificationError, match="has no f16 kernels for cpu, only f32, f64"):
            verify(k3s2, dtypes=["f16"])

    def test_unknown_dtype(self, k3s2: ModuleType) -> None:
        with pytest.raises(ValueError, match="'f8' is not known"):
            verify(k3s2, dtypes=["f8"])

    def test_device_that_was_not_compiled_for(self, k3s2: ModuleType) -> None:
        with pytest.raises(VerificationError, match="is compiled for cpu, not for cuda"):
            verify(k3s2, device="cuda")


@pytest.mark.gpu
def test_tf32_is_verified_where_it_may_run(package: Package) -> None:
    module = package("conv_transpose3d", "cuda", kernel_size=3, stride=2)
    report = verify(module, device="cuda", dtypes=["f32"])
    assert report.ok
    errors = {
        kind: max(row.error for row in report.rows if row.dtype == kind) for kind in ("f32", "tf32")
    }
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors["f32"] < LIMITS["f32"] < errors["tf32"] < LIMITS["tf32"]


def test_the_switch_for_tf32_is_put_back() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with allowing_tf32(allowed):
            assert torch.backends.cudnn.conv.fp32_precision == precision
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_poisoned_memory_is_nan_and_only_inside() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert torch.empty(100, dtype=torch.float64).isnan().all()
        assert torch.ones(3).new_empty((100,)).isnan().all()
        bytes_ = torch.empty(800, dtype=torch.uint8)
        assert bytes_.view(torch.float64).isnan().all()
        assert bytes_.view(torch.float32).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
