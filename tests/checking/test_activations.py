"""Layers with an activation: what verification finds in them, and what it must not miss.

The layers here are torch's, computed as kernels compute them, and wrong where a test says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from convgen.checking.activations import EXACT, at, of_torch, to_tf32
from convgen.checking.verify import LIMITS, Report, Row, verify
from convgen.commands.report import verification as print_verification
from convgen.spec import ConvSpec
from convgen.spec.activation import ACTIVATIONS, Activation
from convgen.spec.dtypes import DTYPES

ALL = (
    *("relu", "leaky_relu:0.01", "leaky_relu:-0.5", "silu", "gelu", "gelu:tanh", "sigmoid", "tanh"),
    *("hardswish", "clamp:-0.5,0.75", "hardtanh:-0.5,0.75"),
)

Derivative = Callable[[Tensor, Tensor], Tensor]


def by_torch(activation: Activation) -> Derivative:
    """The derivative of generated modules: ``grad`` times that at what was saved."""
    composite = activation.composite("grad", "saved")

    def derivative(grad: Tensor, saved: Tensor) -> Tensor:
        text = composite if composite and torch.is_grad_enabled() else ""
        text = text or activation.backward("grad", "saved")
        result: Tensor = eval(text, {"torch": torch, "F": F, "grad": grad, "saved": saved})
        return result

    return derivative


@dataclass(frozen=True)
class Layer:
    """A convolution with an epilogue whose parts can be exchanged for wrong ones."""

    spec: ConvSpec
    activation: Callable[[Tensor], Tensor]
    derivative: Derivative
    saves_output: bool
    saved: Callable[[Tensor], Tensor] = lambda saved: saved
    forward_residual: float = 1.0
    saved_residual: float = 1.0
    gradient_residual: float = 1.0

    @staticmethod
    def of(activation: str) -> Layer:
        spec = ConvSpec.make(
            "conv2d", kernel_size=3, padding=1, activation=activation, residual=True
        )
        assert spec.epilogue
        right, derivative = of_torch(spec.epilogue), by_torch(spec.epilogue)
        return Layer(spec, right, derivative, spec.epilogue.saves_output)

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Any = None
    ) -> Tensor:
        dtype = input.dtype
        if torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
            input, weight = (at(each, to_tf32(each)) for each in (input, weight))
        sums = F.conv2d(input.double(), weight.double(), padding=1)
        if bias is not None:
            sums = sums + bias.double().view(-1, 1, 1)
        sums = sums.to(torch.promote_types(dtype, torch.float32))
        result: Tensor = self._epilogue().apply(sums, residual.to(sums.dtype), dtype)[0]
        return result

    def _epilogue(self) -> Any:
        class Epilogue(Function):
            @staticmethod
            def forward(
                ctx: Any, sums: Tensor, residual: Tensor, dtype: torch.dtype
            ) -> tuple[Tensor, Tensor]:
                ctx.set_materialize_grads(False)
                result = self.activation(sums + self.forward_residual * residual).to(dtype)
                before = (sums + self.saved_residual * residual).to(dtype)
                ctx.save_for_backward(result if self.saves_output else before)
                return result, before

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None, of_before: Tensor | None) -> Any:
                (saved,) = ctx.saved_tensors
                terms = [] if of_before is None else [of_before]
                if grad is not None:
                    terms.append(self.derivative(grad, self.saved(saved)))
                if not terms:
                    return None, None, None
                whole = sum(terms[1:], terms[0])
                return whole, self.gradient_residual * whole, None

        return Epilogue

    def verified(self, folder: Path, dtype: str, **options: Any) -> Report:
        """What is found of the layer as a module."""
        (folder / "lib").mkdir(exist_ok=True)
        (folder / "lib" / "cpu.so").touch()
        tf32 = dtype == "tf32"
        module: Any = SimpleNamespace(
            SPEC=self.spec.to_dict(),
            BACKENDS={"cpu": {name: name for name in DTYPES}},
            __file__=str(folder / "__init__.py"),
            _library=SimpleNamespace(INTERPRETED=tf32),
            _runtime=SimpleNamespace(MATH_MODES=("tf32",)),
            conv2d=self.__call__,
        )
        report = verify(module, dtypes=["f32" if tf32 else dtype], **options)
        return replace(report, rows=[row for row in report.rows if row.dtype == dtype])


QUICK = {("sigmoid", "f32"), ("tanh", "bf16"), ("silu", "f16"), ("gelu", "tf32"), ("relu", "bf16")}


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.long)
        for each in product(ALL, ("f64", "f32", "tf32", "f16", "bf16"))
    ],
)
def test_rounding_is_no_fault(tmp_path: Path, activation: str, dtype: str) -> None:
    report = Layer.of(activation).verified(tmp_path, dtype)
    assert report.ok, [row for row in report.rows if not row.ok]
    beside = [row for row in report.rows if row.beside_torch]
    assert all(row.limit > LIMITS[dtype] for row in beside)
    if not activation.startswith((*EXACT, "hardswish")) and dtype != "tf32":
        assert not beside  # straight lines lose nothing


def test_all_activations_are_tested() -> None:
    assert {Activation.parse(each).name for each in ALL} == set(ACTIVATIONS)


def negated(grad: Tensor, saved: Tensor) -> Tensor:
    return -torch.ops.aten.tanh_backward(grad, saved)


def without_product_rule(grad: Tensor, saved: Tensor) -> Tensor:
    """Of silu, half of its derivative."""
    return grad * torch.sigmoid(saved)


def cut_off(grad: Tensor, saved: Tensor) -> Tensor:
    """Of a sigmoid: 0 from 4 on, where it is 0.018 or less."""
    return torch.ops.aten.sigmoid_backward(grad, saved) * (saved < 0.982)


def inaccurate(grad: Tensor, saved: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(grad, saved) * (1 + 3e-5)


def constant(grad: Tensor, saved: Tensor) -> Tensor:
    """Of gelu, right but for its own derivatives."""
    return torch.ops.aten.gelu_backward(grad, saved.detach())


def wrong_in_training(grad: Tensor, saved: Tensor) -> Tensor:
    """Of silu, where nobody records derivatives."""
    return by_torch(Activation("silu"))(grad, saved) * (1.0 if torch.is_grad_enabled() else 1.1)


def inside_other_bounds(grad: Tensor, saved: Tensor) -> Tensor:
    return torch.where((saved >= -0.5) & (saved <= 0.85), grad, 0)


def one_wrong_element(grad: Tensor, saved: Tensor) -> Tensor:
    of_one = torch.ones_like(grad)
    of_one[(0,) * grad.dim()] = 0.5
    return torch.ops.aten.sigmoid_backward(grad, saved) * of_one


NO_RESIDUAL = {"forward_residual": 0.0, "saved_residual": 0.0}
ROUGH: dict[str, tuple[str, dict[str, Any]]] = {
    "wrong sign": ("tanh", {"derivative": negated}),
    "half of the formula": ("silu", {"derivative": without_product_rule}),
    "at the result": ("silu", {"saves_output": True}),
    "at what goes in": ("sigmoid", {"saves_output": False}),
    "before the residual": ("gelu:tanh", {"saved_residual": 0.0}),
    "dropped residual": ("sigmoid", NO_RESIDUAL),
    "subtracted residual": ("gelu", {"forward_residual": -1.0, "saved_residual": -1.0}),
    "no gradient of the residual": ("gelu", {"gradient_residual": 0.0}),
    "no second order": ("gelu", {"derivative": constant}),
    "wrong where nothing is recorded": ("silu", {"derivative": wrong_in_training}),
    "another bound": ("clamp:-0.5,0.75", {"activation": lambda x: x.clamp(-0.5, 0.85)}),
    "another bound of the derivative": ("clamp:-0.5,0.75", {"derivative": inside_other_bounds}),
    "another slope": ("leaky_relu:-0.5", {"activation": lambda x: F.leaky_relu(x, -0.45)}),
    "another activation": ("hardswish", {"activation": F.silu}),
    "no activation": ("tanh", {"activation": lambda x: x}),
    "one wrong element": ("sigmoid", {"derivative": one_wrong_element}),
}
FINE: dict[str, tuple[str, dict[str, Any]]] = {
    "an approximation": ("gelu", {"activation": lambda x: F.gelu(x, approximate="tanh")}),
    "0 where it is flat": ("sigmoid", {"derivative": cut_off}),
    "a few digits too few": ("tanh", {"derivative": inaccurate}),
    "saved in 16 bits": ("silu", {"saved": lambda saved: saved.half().to(saved.dtype)}),
    "the last digits of a slope": (
        "leaky_relu:-0.5",
        {"activation": lambda x: F.leaky_relu(x, -0.5001)},
    ),
    "the last digits of a bound": (
        "clamp:-0.5,0.75",
        {"activation": lambda x: x.clamp(-0.5, 0.7501)},
    ),
}


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *((fault, "bf16") for fault in ROUGH),
        *((fault, "f32") for fault in FINE),
        *(
            pytest.param(fault, dtype, marks=pytest.mark.long)
            for fault, dtype in product(ROUGH, ("f32", "tf32", "f16"))
        ),
    ],
)
def test_faults_are_found(tmp_path: Path, fault: str, dtype: str) -> None:
    activation, wrong = (ROUGH | FINE)[fault]
    report = replace(Layer.of(activation), **wrong).verified(tmp_path, dtype, quick=True)
    assert not report.ok
    if "activation" not in wrong and "forward_residual" not in wrong:
        assert all(row.ok for row in report.rows if row.quantity == "forward")


def test_the_table_says_which_limits_are_torch_s(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*errors_and_limits: tuple[float, float]) -> str:
        rows = [Row("cpu", "f32", "", "grad input", e, e, limit) for e, limit in errors_and_limits]
        print_verification(SimpleNamespace(name="a"), rows, False)  # type: ignore[arg-type]
        return capsys.readouterr().out

    usual = 1e-6, LIMITS["f32"]
    assert "torch's own convolution and activation" in shown(usual, (1.2e-5, 4e-5))
    assert "torch" not in shown(usual)
    # Of several cases, one where torch has no digit left is not what a line is about.
    assert "1.0e-06" in shown((1.0, 2.0), usual)
    assert "FAILED" in shown(usual, (3.0, 2.0))


class TestExact:
    @pytest.mark.parametrize("activation", EXACT)
    def test_torch_s_values_and_derivatives(self, activation: str) -> None:
        x = torch.linspace(-2, 2, 81, dtype=torch.float64, requires_grad=True)
        both: list[Tensor] = [
            function(x) for function in (EXACT[activation], of_torch(Activation(activation)))
        ]
        for _ in range(3):
            torch.testing.assert_close(*both, rtol=1e-12, atol=1e-13)
            both = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in both]

    def test_digits_are_kept_where_it_is_flat(self) -> None:
        x = torch.tensor([-40.0, 40.0], dtype=torch.float64, requires_grad=True)
        tail = math.exp(-40)
        sigmoid, tanh = EXACT["sigmoid"](x), EXACT["tanh"](x / 2)
        for y, factor in ((sigmoid, 1), (tanh, 2)):
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x)
            torch.testing.assert_close(first, torch.full_like(x, factor * tail), rtol=1e-14, atol=0)
            expected = factor * tail * -x.detach().sign()
            torch.testing.assert_close(second, expected, rtol=1e-14, atol=0)


def test_ten_bits_of_tf32() -> None:
    unit = 2.0**-10
    given = torch.tensor([1, 1 + unit, 1 + 0.49 * unit, -1 - 0.5 * unit, 3e38, 0])
    expected = torch.tensor([1, 1 + unit, 1, -1 - unit, 3e38, 0])
    assert torch.equal(to_tf32(given)[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])
    torch.testing.assert_close(to_tf32(given), expected, rtol=unit / 2, atol=0)
