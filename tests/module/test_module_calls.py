"""Calls of generated modules pass torch's dispatcher by where it has nothing to do, only there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

X, W, B = torch.randn(2, 3, 3, 2, 4), torch.randn(3, 2, 3, 3, 3), torch.randn(2)


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


@contextmanager
def ways(module: ModuleType) -> Iterator[list[bool]]:
    """Collects whether calls go past the dispatcher, each time that this is asked."""
    operators = sys.modules[module.dgrad.__module__]
    found: list[bool] = []
    decide = operators.is_plain

    def is_plain(inputs: tuple[Any, ...]) -> bool:
        found.append(decide(inputs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "is_plain", is_plain)
        patch.setattr(module, "is_plain", is_plain)
        yield found


def kernels_of(module: ModuleType) -> ModuleType:
    """The ``_kernels.py`` that serves a package: perhaps that of a copy which was loaded before."""
    operators = sys.modules[module.dgrad.__module__]
    return sys.modules[operators.dgrad_kernel.__module__]


class FunctionMode(TorchFunctionMode):
    seen = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen += "convgen" in str(getattr(function, "__module__", ""))
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen += "dgrad" in str(function)
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


class TestShortWay:
    @pytest.mark.parametrize("bias", [B, None], ids=["bias", "no bias"])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_is_taken_for_plain_tensors(
        self, k3s2: ModuleType, bias: Tensor | None, context: Callable[[], Any]
    ) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        with ways(k3s2) as found, context():
            torch.testing.assert_close(
                k3s2.conv_transpose3d(X, W, bias), F.conv_transpose3d(X, W, bias, 2)
            )
            layer(X)
            layer(X[0])
        assert len(found) >= 3
        assert all(found)

    def test_is_taken_with_gradients_and_in_the_backward_pass(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        x = X.clone().requires_grad_()
        with ways(k3s2) as found:
            y = layer(x)
            y.sum().backward()
        assert y.grad_fn is not None
        assert len(found) >= 2
        assert all(found)

    def test_equals_the_operator_to_the_bit(self, k3s2: ModuleType) -> None:
        operator = sys.modules[k3s2.dgrad.__module__].dgrad_op
        inputs = [tensor.clone().requires_grad_() for tensor in (X, W, B)]
        results = []
        with ways(k3s2) as found:
            for call in (k3s2.dgrad, operator):
                y = call(*inputs, (7, 5, 9))
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        assert found[0]
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)

    def test_does_not_call_the_operator(
        self, k3s2: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def asked(*_: Any) -> None:
            raise AssertionError("the dispatcher was asked")

        operator = sys.modules[k3s2.dgrad.__module__].dgrad_op
        monkeypatch.setattr(type(operator), "__call__", asked)
        k3s2.conv_transpose3d(X, W, B)
        with pytest.raises(AssertionError, match="was asked"):
            k3s2.conv_transpose3d(torch._neg_view(X), W, B)


class TestLongWay:
    """Whatever looks into calls sees the operator, and results are torch's."""

    def compare(self, module: ModuleType, x: Tensor, w: Tensor = W, b: Tensor = B) -> Tensor:
        with ways(module) as found:
            y: Tensor = module.conv_transpose3d(x, w, b)
        assert found
        assert not found[0]
        torch.testing.assert_close(y, F.conv_transpose3d(x, w, b, 2))
        return y

    @pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
    def test_modes(self, k3s2: ModuleType, mode: type[Any]) -> None:
        with mode() as active:
            self.compare(k3s2, X)
        assert active.seen == 1

    def test_fake_tensors(self, k3s2: ModuleType) -> None:
        mode = FakeTensorMode()
        x, w, b = map(mode.from_tensor, (X, W, B))
        for context in (mode, nullcontext()):
            with context, ways(k3s2) as found:
                y = k3s2.conv_transpose3d(x, w, b)
            assert isinstance(y, FakeTensor)
            assert y.shape == (2, 2, 7, 5, 9)
            assert found
        assert not any(found)

    def test_subclasses(self, k3s2: ModuleType) -> None:
        y = self.compare(k3s2, X.as_subclass(Subclass))
        assert type(y) is Subclass
        two = TwoTensor(X, 2 * X)
        with ways(k3s2) as found:
            y = k3s2.conv_transpose3d(two, TwoTensor(W, W))
        assert found
        assert not any(found)
        torch.testing.assert_close(y.b, F.conv_transpose3d(2 * X, W, None, 2))

    def test_transforms(self, k3s2: ModuleType) -> None:
        with ways(k3s2) as found:
            y = torch.func.vmap(k3s2.conv_transpose3d, in_dims=(0, None))(X[:, None], W)
            gradient = torch.func.grad(lambda x: k3s2.conv_transpose3d(x, W).square().sum())(X)
        assert not any(found)
        torch.testing.assert_close(y.squeeze(1), F.conv_transpose3d(X, W, None, 2))
        expected = torch.func.grad(lambda x: F.conv_transpose3d(x, W, None, 2).square().sum())(X)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)

    def test_tensors_that_outlive_a_transform(self, k3s2: ModuleType) -> None:
        kept = []

        def function(x: Tensor) -> Tensor:
            kept.append(x * 2)
            return x.sum()

        torch.func.grad(function)(X)
        self.compare(k3s2, kept[0])

    def test_tensors_that_hold_their_negative(self, k3s2: ModuleType) -> None:
        x = torch.complex(X, X).conj().imag
        assert x.is_neg()
        self.compare(k3s2, x)
        self.compare(k3s2, X, torch.complex(W, W).conj().imag)

    def test_tensors_without_memory(self, k3s2: ModuleType) -> None:
        self.compare(k3s2, torch._efficientzerotensor(X.shape))
        with pytest.raises(RuntimeError):
            k3s2.conv_transpose3d(X.to_sparse(), W, B)

    def test_profiles_name_the_operator(self, k3s2: ModuleType) -> None:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.compare(k3s2, X)
        assert any("convgen_" in event.key for event in profiled.key_averages())

    def test_compiled_calls_keep_the_operator(self, k3s2: ModuleType) -> None:
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        layer = k3s2.ConvTranspose3d(3, 2)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend=backend)
            assert torch.equal(compiled(X), layer(X))
        assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 1


class TestNothingIsStale:
    def test_weights_changed_in_place_or_replaced(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        with torch.no_grad():
            first = layer(X)
            layer.weight.mul_(2)
            layer.bias.mul_(2)
            torch.testing.assert_close(layer(X), 2 * first)
            layer.weight.data = torch.zeros_like(layer.weight)
            layer.bias = nn.Parameter(torch.ones(2))
            assert torch.equal(layer(X), torch.ones_like(first))

    def test_dtypes_and_strides_of_the_same_extents(self, k3s2: ModuleType) -> None:
        for x in (X, X.double(), X.mT.contiguous().mT, X.flip(2)):
            w, b = W.to(x.dtype), B.to(x.dtype)
            expected = F.conv_transpose3d(x, w, b, 2)
            torch.testing.assert_close(k3s2.conv_transpose3d(x, w, b), expected)
        for w, b in ((W.double(), B), (W, B.double()), (W.to("meta"), B), (W, B.to("meta"))):
            with pytest.raises(RuntimeError, match=r"should be the same|on the same device"):
                k3s2.conv_transpose3d(X, w, b)

    def test_number_of_threads(self, k3s2: ModuleType) -> None:
        before = torch.get_num_threads()
        kernels = kernels_of(k3s2)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                k3s2.conv_transpose3d(X, W, B)
                _, _, launch, *_ = kernels.plans[kernels.key_of("dgrad", X, W, B, (7, 5, 9))]
                assert int.from_bytes(launch.numbers[:8], "little") == threads
        finally:
            torch.set_num_threads(before)

    def test_switch_of_tf32(self) -> None:
        runtime = import_module("generated.conv_transpose3d_k3_s2._runtime")
        cudnn: Any = torch.backends.cudnn
        before = cudnn.conv.fp32_precision
        try:
            for precision in ("tf32", "ieee"):
                cudnn.conv.fp32_precision = precision
                assert runtime.fp32_precision() == precision
        finally:
            cudnn.conv.fp32_precision = before


class TestWorkspace:
    def test_threads_do_not_share_it(self, k3s2: ModuleType) -> None:
        inputs = [torch.randn(1, 8, 6, 6, 6) for _ in range(4)]
        w = torch.randn(8, 8, 3, 3, 3)
        expected = [k3s2.conv_transpose3d(x, w) for x in inputs]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(200):
                if not torch.equal(k3s2.conv_transpose3d(inputs[index], w), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_large_ones_are_not_kept(self, k3s2: ModuleType) -> None:
        kernels = kernels_of(k3s2)
        for channels, extent, kept in ((2, 2, True), (128, 2, False)):
            x, w = torch.randn(1, channels, *(extent,) * 3), torch.randn(channels, 128, 3, 3, 3)
            y = k3s2.conv_transpose3d(x, w)
            torch.testing.assert_close(y, F.conv_transpose3d(x, w, None, 2), rtol=1e-4, atol=1e-4)
            _, _, launch, *_ = kernels.plans[kernels.key_of("dgrad", x, w, None, y.shape[2:])]
            assert launch.workspace_bytes
            assert launch.kept == kept
