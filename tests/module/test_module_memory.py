"""Memory that is not there, tensors without elements, and libraries that were cut short."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, Package
from torch import Tensor

X, W, B = torch.randn(2, 3, 3, 2, 4), torch.randn(3, 2, 3, 3, 3), torch.randn(2)
GRAD = torch.randn(2, 2, 7, 5, 9)


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


def operators_of(module: ModuleType) -> ModuleType:
    """The ``_operators.py`` that serves a package: perhaps that of a copy loaded before."""
    forward = module.dgrad if "transpose" in module.SPEC["op"] else module.fprop
    return sys.modules[forward.__module__]


def freed(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor of these sizes without memory: from the start, within a storage, not contiguous."""
    whole = tensor.clone()
    flat = torch.randn(tensor.numel() + 5000)
    within = flat[5000:].view(tensor.shape)
    dim = next((dim for dim in range(tensor.dim() - 1) if tensor.shape[dim] > 1), 0)
    spread = tensor.transpose(dim, -1).clone().transpose(dim, -1)
    strided = torch.randn(2 * tensor.numel())[::2] if tensor.dim() == 1 else spread
    for each in (whole, within, strided):
        each.untyped_storage().resize_(0)
        yield each


def calls(module: ModuleType, raw: bool) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Every operator by its name, with tensors and extents that it takes."""
    operators = operators_of(module)

    def named(name: str) -> Callable[..., Any]:
        operator: Callable[..., Any] = getattr(operators, f"{name}_op" if raw else name)
        return operator

    coarse_bias = torch.randn(3)
    return {
        "dgrad": (named("dgrad"), [X, W, B, (7, 5, 9)]),
        "fprop": (named("fprop"), [GRAD, W, coarse_bias, (3, 2, 4)]),
        "wgrad": (named("wgrad"), [X, GRAD]),
        "bgrad": (named("bgrad"), [GRAD]),
        "wbgrad": (named("wbgrad"), [X, GRAD]),
    }


class TestFreedStorages:
    @pytest.mark.parametrize("raw", [False, True], ids=["function", "operator"])
    def test_raise_in_every_operand_of_every_operator(self, k3s2: ModuleType, raw: bool) -> None:
        for call, inputs in calls(k3s2, raw).values():
            call(*inputs)
            for at, tensor in enumerate(inputs):
                if isinstance(tensor, Tensor):
                    for gone in freed(tensor):
                        with pytest.raises(RuntimeError, match="was freed"):
                            call(*inputs[:at], gone, *inputs[at + 1 :])

    def test_raise_in_the_forward_and_the_backward_pass(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        for gone in freed(X):
            with pytest.raises(RuntimeError, match="was freed"):
                layer(gone.requires_grad_())
        for tensor in (layer.weight, X.clone().requires_grad_()):
            y = layer(tensor if tensor.shape == X.shape else X.clone().requires_grad_())
            tensor.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="was freed"):
                y.sum().backward()
            layer = k3s2.ConvTranspose3d(3, 2)
        y = layer(X)
        for gone in freed(GRAD):
            with pytest.raises(RuntimeError, match="was freed"):
                y.backward(gone, retain_graph=True)

    def test_raise_where_torch_would_copy_them(self, package: Package) -> None:
        module = package("conv2d", **LAYERS["conv2d"])
        layer = module.Conv2d(2, 2, padding_mode="circular")
        for gone in freed(torch.randn(1, 2, 6, 6)):
            with pytest.raises(RuntimeError, match="was freed"):
                layer(gone)
            with (
                pytest.raises(RuntimeError, match="was freed"),
                torch.autocast("cpu", torch.bfloat16),
            ):
                module.conv2d(gone, layer.weight)
        # A sum without terms is the bias alone.
        empty, weight = torch.randn(1, 0, 6, 6), torch.randn(2, 0, 2, 3)
        for gone in freed(torch.randn(2)):
            with pytest.raises(RuntimeError, match="was freed"):
                module.conv2d(empty, weight, gone)

    def test_are_told_from_memory_at_low_addresses(
        self, k3s2: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dispatch = sys.modules[operators_of(k3s2).is_plain.__module__]
        monkeypatch.setattr(dispatch, "LEAST_ADDRESS", 1 << 63)
        assert dispatch.is_plain((X, W, B))
        for raw in (False, True):
            for call, inputs in calls(k3s2, raw).values():
                call(*inputs)

    def test_serve_again_with_their_memory(self, k3s2: ModuleType) -> None:
        x = X.clone()
        size_bytes = x.untyped_storage().nbytes()
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="was freed"):
            k3s2.conv_transpose3d(x, W, B)
        x.untyped_storage().resize_(size_bytes)
        x.copy_(X)
        assert torch.equal(k3s2.conv_transpose3d(x, W, B), k3s2.conv_transpose3d(X, W, B))


def test_damaged_libraries_are_not_loaded_and_whole_ones_are_read_once(
    k3s2: ModuleType, tmp_path: Path
) -> None:
    assert k3s2.__file__ is not None
    package = Path(k3s2.__file__).parent
    whole = (package / "lib/cpu.so").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    damaged = {
        "half": whole[:middle],
        "begin": whole[:3000],
        "cut": whole[:-200],
        "shorter": whole[:-1],
        "empty": b"",
        "longer": whole + b"\0",
        "flipped": flipped,
    }
    for name in (*damaged, "undigested", "waiting", "good"):
        shutil.copytree(package, tmp_path / name)
        (tmp_path / name / "lib/cpu.so").write_bytes(damaged.get(name, whole))
    for name in ("undigested", "waiting"):
        (tmp_path / name / "lib/cpu.so.sha256").unlink()
    os.mkfifo(tmp_path / "waiting/lib/cpu.so.sha256")
    bad = ", ".join((*damaged, "undigested", "waiting"))
    code = (
        "import sys, torch\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: event == 'open' and opened.append(str(args[0])))\n"
        f"import {bad}\n"
        "x, w = torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 3, 3, 3)\n"
        f"for copy in {bad}:\n"
        "    try: copy.conv_transpose3d(x, w)\n"
        "    except RuntimeError as error: print(error)\n"
        "import good\n"
        "for _ in range(3): good.conv_transpose3d(x, w)\n"
        "good.conv_transpose3d(x, w.clone().requires_grad_()).sum().backward()\n"
        "print(sum(path.endswith('good/lib/cpu.so') for path in opened))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *refused, times = done.stdout.splitlines()
    assert len(refused) == len(damaged) + 2
    for said in refused:
        assert "run `convgen generate --kernel 3 --stride 2 --backend auto`" in said
        assert said.count("cpu.so.sha256 is missing") == 2
        for name, content in damaged.items():
            assert f"{name}/lib/cpu.so cannot be loaded (its {len(content)} bytes are not" in said
    assert times == "1"


def test_the_digest_is_in_the_format_of_sha256sum(k3s2: ModuleType) -> None:
    assert k3s2.__file__ is not None
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "lib/cpu.so.sha256"],
        cwd=Path(k3s2.__file__).parent,
        check=True,
    )


class Overriding(Tensor):
    """A subclass in the manner of MONAI's MetaTensor: methods with signatures of its own."""

    @staticmethod
    def __new__(cls, tensor: Tensor, note: str = "") -> Overriding:
        made = tensor.as_subclass(cls)
        made.note = note
        return made

    note: str

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.note = next((arg.note for arg in args if isinstance(arg, cls)), "")
        return result

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None) -> Any:
        return Overriding(self.as_subclass(Tensor).new_empty(size, dtype=dtype, device=device))

    def clone(self) -> Any:
        return Overriding(self.as_subclass(Tensor).clone(), self.note)

    def detach(self) -> Any:
        return Overriding(self.as_subclass(Tensor).detach(), self.note)

    def __getitem__(self, index: Any) -> Any:
        return Overriding(self.as_subclass(Tensor)[index], f"{self.note}[]")


def never_called(self: Tensor, *_: Any, **__: Any) -> Any:
    raise AssertionError("a subclass's method was called")


for name in (
    *("contiguous", "data_ptr", "dim", "expand", "is_contiguous", "is_floating_point", "is_neg"),
    *("narrow", "stride", "to", "transpose", "unsqueeze", "untyped_storage", "view"),
):
    setattr(Overriding, name, never_called)


class TestSubclasses:
    def test_may_override_methods_in_every_operator(self, k3s2: ModuleType) -> None:
        for raw in (False, True):
            for call, inputs in calls(k3s2, raw).values():
                expected = call(*inputs)
                for tensor in (X, X.mT.contiguous().mT):
                    given = [
                        Overriding(tensor if value is X else value, "kept")
                        if isinstance(value, Tensor)
                        else value
                        for value in inputs
                    ]
                    result = call(*given)
                    pairs = (
                        zip(result, expected, strict=True)
                        if isinstance(result, tuple)
                        else [(result, expected)]
                    )
                    for ours, theirs in pairs:
                        assert type(ours) is Overriding
                        assert torch.equal(ours.as_subclass(Tensor), theirs)

    @pytest.mark.parametrize("raw", [False, True], ids=["function", "operator"])
    def test_may_be_gradients_of_every_operator(self, k3s2: ModuleType, raw: bool) -> None:
        for call, inputs in calls(k3s2, raw).values():
            results: list[list[Tensor]] = []
            for wrap in (Tensor.contiguous, Overriding):
                given = [
                    value.clone().requires_grad_() if isinstance(value, Tensor) else value
                    for value in inputs
                ]
                operands = [value for value in given if isinstance(value, Tensor)]
                outputs = call(*given)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                grads = [wrap(torch.ones_like(each)) for each in outputs]
                firsts = torch.autograd.grad(outputs, operands, grads, create_graph=True)
                seconds = torch.autograd.grad(
                    [each for each in firsts if each.grad_fn],
                    operands,
                    [wrap(torch.ones_like(each)) for each in firsts if each.grad_fn],
                    allow_unused=True,
                )
                found = [each for each in (*firsts, *seconds) if each is not None]
                results.append([each.as_subclass(Tensor) for each in found])
            assert all(map(torch.equal, *results))

    def test_are_compiled(self, k3s2: ModuleType) -> None:
        class Named(Tensor):
            """torch.compile reads methods, and takes none that raises always."""

        compiled = torch.compile(k3s2.conv_transpose3d)
        y = compiled(X.as_subclass(Named), W, B)
        assert type(y) is Named
        assert torch.equal(y.as_subclass(Tensor), k3s2.conv_transpose3d(X, W, B))

    @pytest.mark.parametrize("mode", ["zeros", "circular"])
    def test_pass_through_layers_and_their_gradients(self, package: Package, mode: str) -> None:
        module = package("conv2d", **LAYERS["conv2d"])
        ours = module.Conv2d(2, 4, padding_mode=mode)
        theirs = torch.nn.Conv2d(2, 4, **LAYERS["conv2d"], padding_mode=mode)
        theirs.load_state_dict(ours.state_dict())
        for shape in ((3, 2, 6, 7), (2, 6, 7)):
            x = torch.randn(shape)
            results = []
            for layer in (ours, theirs):
                given = Overriding(x, "kept").requires_grad_()
                y = layer(given)
                assert (type(y), y.note) == (Overriding, "kept")
                (grad,) = torch.autograd.grad(y.square().sum(), given)
                results.append((y.as_subclass(Tensor), grad.as_subclass(Tensor)))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_keep_large_workspaces_from_their_methods(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(1, 128, 2, 2, 2), torch.randn(128, 128, 3, 3, 3)
        y = k3s2.conv_transpose3d(Overriding(x, "kept"), w)
        assert torch.equal(y.as_subclass(Tensor), k3s2.conv_transpose3d(x, w))


def shape_of(call: Callable[[], Tensor]) -> Any:
    try:
        return tuple(call().shape)
    except RuntimeError:
        return "RuntimeError"


class TestEmptyTensors:
    CASES = (
        *LAYERS.items(),
        ("conv_transpose2d", {"kernel_size": 2, "padding": 2, "dtypes": ("f32",)}),
        ("conv1d", {"kernel_size": 3, "dilation": 2, "dtypes": ("f32",)}),
    )

    @pytest.mark.parametrize(("op", "constants"), CASES)
    def test_of_batches_are_torchs(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        ndim = int(op[-2])
        arguments = {name: value for name, value in constants.items() if name != "dtypes"}
        kernel = module.SPEC["kernel_size"]
        del arguments["kernel_size"]
        w = torch.randn(2, 2 // module.SPEC["groups"], *kernel)
        for extents in itertools.product(range(5), repeat=min(ndim, 2)):
            x = torch.randn(0, 2, *(4,) * (ndim - len(extents)), *extents)
            ours = shape_of(lambda x=x: getattr(module, op)(x, w))
            assert ours == shape_of(lambda x=x: getattr(F, op)(x, w, **arguments)), extents

    def test_have_gradients(self, package: Package) -> None:
        module = package("conv_transpose2d", kernel_size=2, padding=2, dtypes=("f32",))
        w = torch.randn(2, 3, 2, 2, requires_grad=True)
        b = torch.randn(3, requires_grad=True)
        for extents in ((3, 3), (3, 5), (0, 0), (4, 0)):
            x = torch.randn(0, 2, *extents, requires_grad=True)
            if extents[1] < 3:
                with pytest.raises(RuntimeError, match="Output size is too small"):
                    module.conv_transpose2d(x, w, b)
                continue
            y = module.conv_transpose2d(x, w, b)
            grads = torch.autograd.grad(y.sum(), (x, w, b))
            assert [grad.shape for grad in grads] == [x.shape, w.shape, b.shape]
            assert not any(grad.any() for grad in grads)

    def test_of_vmap_have_shapes_and_gradients(self, k3s2: ModuleType) -> None:
        vmap = torch.func.vmap
        call = k3s2.conv_transpose3d
        none = torch.randn(0, 1, 3, 2, 2, 2)
        shape = (0, 1, 2, 5, 5, 5)
        assert vmap(call, (0, None))(none, W).shape == shape
        assert vmap(call, (1, None))(none.transpose(0, 1), W).shape == shape
        assert vmap(call, (0, None))(none[:, 0], W).shape == (0, *shape[2:])
        assert vmap(call, (None, 0))(X[:1, ..., :2], W.expand(0, *W.shape)).shape == (
            *(0, 1, 2, 7, 5, 5),
        )
        assert vmap(call, (0, 0, 0))(none, W.expand(0, *W.shape), B.expand(0, 2)).shape == shape
        assert vmap(vmap(call, (0, None)), (0, None))(none.expand(4, *none.shape), W).shape == (
            *(4, *shape),
        )
        gradients = torch.func.grad(lambda x, w: call(x, w).square().sum(), (0, 1))
        of_x, of_w = vmap(gradients, (0, None))(none, W)
        assert (of_x.shape, of_w.shape) == (none.shape, (0, *W.shape))
        w = W.clone().requires_grad_()
        for y in (
            vmap(call, (0, None))(none, w),
            vmap(call, (None, 0))(X, w.expand(0, *W.shape)),
        ):
            (of_w,) = torch.autograd.grad(y.sum(), w)
            assert not of_w.any()

    @pytest.mark.parametrize("raw", [False, True], ids=["function", "operator"])
    def test_of_raw_operators_have_the_right_rank(self, k3s2: ModuleType, raw: bool) -> None:
        for name, (call, inputs) in calls(k3s2, raw).items():
            for at, value in enumerate(inputs):
                others: list[Any] = [(), (7,), (7, 5), (7, 5, 9, 1), (-1, 5, 9), (1 << 62,) * 3]
                others += [(0.5, 5, 9)]
                if isinstance(value, Tensor):
                    others = [
                        value.new_empty((2,) * rank) for rank in range(7) if rank != value.dim()
                    ]
                for other in others:
                    with pytest.raises((RuntimeError, TypeError)) as error:
                        call(*inputs[:at], other, *inputs[at + 1 :])
                    assert "must be real number" not in str(error.value), (name, other)

    @pytest.mark.parametrize("op", ["conv1d", "conv2d", "conv_transpose1d"])
    def test_of_raw_operators_are_not_strided_with_another_rank(
        self, package: Package, op: str
    ) -> None:
        operators = operators_of(module := package(op, **LAYERS[op]))
        assert module.SPEC["op"] == op
        for rank in range(1, 6):
            if rank == int(op[-2]) + 2:
                continue
            strided = torch.randn((4,) * rank)[..., ::2]
            for name, inputs in (
                ("fprop", (strided, strided, None, (2,) * int(op[-2]))),
                ("dgrad", (strided, strided, strided, (2,) * int(op[-2]))),
                ("wgrad", (strided, strided)),
                ("bgrad", (strided,)),
                ("wbgrad", (strided, strided)),
            ):
                for suffix in ("", "_op"):
                    with pytest.raises(RuntimeError):
                        getattr(operators, name + suffix)(*inputs)

    def test_with_more_elements_than_a_tensor_can_have_are_refused(self, package: Package) -> None:
        module = package("conv_transpose1d", **LAYERS["conv_transpose1d"])
        x, w = torch.ones(1, 1, 1).expand(1, 1, 1 << 62), torch.ones(1, 1, 4)
        with pytest.raises(RuntimeError, match=r"more elements|overflowed"):
            module.conv_transpose1d(x, w)
