"""Derivatives of generated modules, of first and second order, and the tools built on them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, Package
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # operator: shapes of the input and the weight
    "conv_transpose3d": ((2, 2, 2, 1, 2), (2, 1, 3, 3, 3)),
    "conv_transpose2d": ((2, 4, 2, 2), (4, 1, 3, 2)),
    "conv_transpose1d": ((2, 2, 3), (2, 2, 4)),
    "conv3d": ((1, 2, 2, 2, 3), (1, 2, 1, 3, 2)),
    "conv2d": ((1, 4, 3, 4), (2, 2, 2, 3)),
    "conv1d": ((2, 2, 7), (3, 2, 5)),
}


def operands(op: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x_shape, w_shape = SHAPES[op]
    groups = LAYERS[op].get("groups", 1)
    bias = w_shape[1] * groups if op.startswith("conv_transpose") else w_shape[0]
    x, w, b = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in (x_shape, w_shape, (bias,))
    )
    return x, w, b


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


@pytest.mark.parametrize("op", LAYERS)
class TestDerivatives:
    def test_gradcheck_and_gradgradcheck(
        self,
        package: Package,
        device: str,
        op: str,
    ) -> None:
        function = getattr(package(op, device, **LAYERS[op]), op)
        inputs = operands(op, device)
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
        assert gradcheck(function, inputs[:2])

    def test_only_what_is_asked_for_is_computed(
        self, package: Package, device: str, op: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = package(op, device, **LAYERS[op])
        operators = sys.modules[f"{module.__name__}._operators"]
        x, w, b = operands(op, device)
        y = getattr(module, op)(x, w, b).sum()
        called: list[str] = []
        for way in ("CALLS", "PLAIN"):
            functions = {
                name: lambda *a, f=function, n=name: (called.append(n), f(*a))[1]
                for name, function in getattr(operators, way)._asdict().items()
            }
            monkeypatch.setattr(operators, way, operators.Calls(**functions))
        of_x = "fprop" if op.startswith("conv_transpose") else "dgrad"
        for asked, expected in (
            ([x], [of_x]),
            ([w], ["wgrad"]),
            ([b], ["bgrad"]),
            ([x, w], [of_x, "wgrad"]),
            ([x, w, b], [of_x, "wbgrad"]),
        ):
            called.clear()
            torch.autograd.grad(y, asked, retain_graph=True)
            assert called == expected

    def test_forward_mode(self, package: Package, device: str, op: str) -> None:
        function = getattr(package(op, device, **LAYERS[op]), op)
        inputs = operands(op, device)
        # Batched tangents would go through vmap, whose fallback warns.
        modes = {"check_forward_ad": True, "check_batched_grad": False}
        assert gradcheck(function, inputs, check_backward_ad=False, **modes)
        assert gradcheck(function, inputs[:2], check_backward_ad=False, **modes)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=False)

    def test_tangents_of_the_other_operators(self, package: Package, device: str, op: str) -> None:
        module = package(op, device, **LAYERS[op])
        x, w, b = operands(op, device)
        y = getattr(module, op)(x, w, b).detach().requires_grad_()
        coarse, fine = (x, y) if op.startswith("conv_transpose") else (y, x)
        operators = sys.modules[f"{module.__name__}._operators"]
        for operator, arguments in (
            (operators.wgrad, (coarse, fine)),
            (operators.bgrad, (coarse,)),
            (operators.wbgrad, (coarse, fine)),
        ):
            assert gradcheck(operator, arguments, check_forward_ad=True, check_batched_grad=False)

    def test_third_order_equals_torch(
        self,
        package: Package,
        op: str,
    ) -> None:
        if "output_padding" in LAYERS[op]:
            pytest.skip("torch has no third derivative with output_padding")
        x, w, b = operands(op)
        options = {name: value for name, value in LAYERS[op].items() if name != "kernel_size"}

        def third(y: Tensor) -> tuple[Tensor, ...]:
            (first,) = torch.autograd.grad(y.pow(4).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(3).sum(), w, create_graph=True)
            return torch.autograd.grad(second.pow(2).sum(), (x, w, b))

        ours = third(getattr(package(op, **LAYERS[op]), op)(x, w, b))
        theirs = third(getattr(F, op)(x, w, b, **options))
        for tensor, expected in zip(ours, theirs, strict=True):
            assert (tensor - expected).norm() <= 1e-12 * expected.norm()

    def test_opcheck(
        self,
        package: Package,
        device: str,
        op: str,
    ) -> None:
        module = package(op, device, **LAYERS[op])
        x, w, b = operands(op, device)
        y = getattr(module, op)(x, w, b).detach().requires_grad_()
        operators = namespace(module)
        coarse, fine = (x, y) if op.startswith("conv_transpose") else (y, x)
        bias_a = torch.randn(coarse.shape[1], dtype=x.dtype, device=device, requires_grad=True)
        bias_b = torch.randn(fine.shape[1], dtype=x.dtype, device=device, requires_grad=True)
        for operator, arguments in (
            (operators.fprop, (fine, w, bias_a, coarse.shape[2:])),
            (operators.fprop, (fine.detach(), w, None, coarse.shape[2:])),
            (operators.dgrad, (coarse, w, bias_b, fine.shape[2:])),
            (operators.dgrad, (coarse, w.detach(), None, fine.shape[2:])),
            (operators.wgrad, (coarse, fine)),
            (operators.bgrad, (coarse,)),
            (operators.wbgrad, (coarse, fine)),
        ):
            torch.library.opcheck(operator.default, arguments)


def namespace(module: ModuleType) -> Any:
    operator = getattr(module, "dgrad", None) or module.fprop
    return getattr(torch.ops, sys.modules[operator.__module__].NAMESPACE)


class TestMemory:
    """What the backward pass does not need is not kept."""

    def kept(self, output: Tensor) -> list[tuple[int, ...]]:
        assert output.grad_fn is not None
        return [
            tuple(tensor.shape) for tensor in output.grad_fn.saved_tensors if tensor is not None
        ]

    def test_frozen_weight_does_not_keep_the_input(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(1, 2, 3, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3, 3)
        assert self.kept(k3s2.conv_transpose3d(x, w)) == [(2, 4, 3, 3, 3)]

    def test_first_layer_does_not_keep_the_weight(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 4, 3, 3, 3, requires_grad=True)
        assert self.kept(k3s2.conv_transpose3d(x, w)) == [(1, 2, 3, 3, 3)]

    def test_bias_alone_keeps_nothing(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)
        b = torch.randn(4, requires_grad=True)
        y = k3s2.conv_transpose3d(x, w, b)
        assert self.kept(y) == []
        (gradient,) = torch.autograd.grad(y.sum(), b)
        torch.testing.assert_close(gradient, torch.full((4,), 343.0))

    def test_no_grad_builds_no_graph(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 4, 3, 3, 3, requires_grad=True)
        with torch.no_grad():
            assert not k3s2.conv_transpose3d(x, w).requires_grad
        with torch.inference_mode():
            assert k3s2.conv_transpose3d(x, w).is_inference()


class TestTransforms:
    """torch.func on generated functions."""

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(3, 2, 2, 3, 2, dtype=torch.float64)
        w = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)
        return x, w, torch.randn(2, dtype=torch.float64)

    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            yield

    def test_grad_and_hessian(self, k3s2: ModuleType) -> None:
        x, w, b = self.arguments()

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return k3s2.conv_transpose3d(x, w, b).pow(3).sum()

        def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.conv_transpose3d(x, w, b, 2).pow(3).sum()

        for first, second in zip(
            torch.func.grad(ours, (0, 1, 2))(x, w, b),
            torch.func.grad(theirs, (0, 1, 2))(x, w, b),
            strict=True,
        ):
            torch.testing.assert_close(first, second)
        hessians = [
            torch.func.jacrev(torch.func.grad(function, 2), 2)(x, w, b)
            for function in (ours, theirs)
        ]
        torch.testing.assert_close(*hessians)

    def test_forward_and_reverse_mode_nest(self, k3s2: ModuleType) -> None:
        x, w, b = self.arguments()
        direction = torch.randn_like(w)

        def derivatives(function: Any) -> list[Tensor]:
            def loss(w: Tensor) -> Tensor:
                return function(x, w, b).pow(3).sum()

            def change(w: Tensor) -> Tensor:
                return torch.func.jvp(lambda w: function(x, w, b), (w,), (direction,))[1]

            return [
                torch.func.jvp(torch.func.grad(loss), (w,), (direction,))[1],
                torch.func.grad(lambda w: change(w * w).pow(2).sum())(w),
                torch.func.jacfwd(lambda b: function(x, w, b))(b),
            ]

        ours = derivatives(k3s2.conv_transpose3d)
        theirs = derivatives(lambda x, w, b: F.conv_transpose3d(x, w, b, 2))
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first, second)

    def test_gradients_of_each_sample(self, k3s2: ModuleType) -> None:
        x, w, b = self.arguments()

        def gradients(function: Any) -> tuple[Tensor, ...]:
            def loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
                return function(x.unsqueeze(0), w, b).square().sum()

            each = torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims=(None, None, 0))
            return each(w, b, x)

        ours = gradients(k3s2.conv_transpose3d)
        theirs = gradients(lambda x, w, b: F.conv_transpose3d(x, w, b, 2))
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first, second)

    def test_vmap_over_weights(self, k3s2: ModuleType) -> None:
        x, w, _ = self.arguments()
        many = torch.stack([w, 2 * w, -w])
        result = torch.func.vmap(k3s2.conv_transpose3d, in_dims=(None, 0))(x, many)
        y = k3s2.conv_transpose3d(x, w)
        torch.testing.assert_close(result, torch.stack([y, 2 * y, -y]))

    def test_functional_call(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(2, 3)
        zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
        x = torch.randn(1, 2, 3, 3, 3)
        assert not torch.func.functional_call(layer, zeros, (x,)).any()


class TestTraining:
    def network(self, k3s2: ModuleType) -> nn.Module:
        return nn.Sequential(k3s2.ConvTranspose3d(2, 3), nn.ReLU(), k3s2.ConvTranspose3d(3, 1))

    def test_steps_as_torch_does(self, k3s2: ModuleType) -> None:
        torch.manual_seed(3)
        ours = self.network(k3s2)
        torch.manual_seed(3)
        theirs = nn.Sequential(
            nn.ConvTranspose3d(2, 3, 3, 2), nn.ReLU(), nn.ConvTranspose3d(3, 1, 3, 2)
        )
        x, target = torch.randn(2, 2, 2, 2, 2), torch.randn(2, 1, 11, 11, 11)
        losses: list[list[float]] = []
        for network in (ours, theirs):
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
            losses.append([])
            for _ in range(5):
                optimizer.zero_grad()
                loss = F.mse_loss(network(x), target)
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert losses[0][-1] < losses[0][0]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(
        self, k3s2: ModuleType, use_reentrant: bool
    ) -> None:
        network = self.network(k3s2)
        x = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
        expected = torch.autograd.grad(network(x).sum(), list(network.parameters()))
        checkpoint(network, x, use_reentrant=use_reentrant).sum().backward()
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)

    def test_distributed_data_parallel(self, k3s2: ModuleType, tmp_path: Any) -> None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
        )
        try:
            network = self.network(k3s2)
            x = torch.randn(1, 2, 2, 2, 2)
            expected = torch.autograd.grad(network(x).sum(), list(network.parameters()))
            nn.parallel.DistributedDataParallel(network)(x).sum().backward()
        finally:
            torch.distributed.destroy_process_group()
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)

    def test_shared_memory(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(2, 3)
        x = torch.randn(1, 2, 3, 3, 3)
        expected = layer(x)
        layer.share_memory()
        assert layer.weight.is_shared()
        assert torch.equal(layer(x.share_memory_()), expected)
