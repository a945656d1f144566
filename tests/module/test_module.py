"""A generated module in the place of torch's layer and function."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, Package
from torch import Tensor, nn

EXTENTS = (5, 6, 7)


def class_of(module: ModuleType) -> str:
    return next(name for name in module.__all__ if name.startswith("Conv"))


def layers(package: Package, op: str, constants: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """The generated layer and torch's, with 4 input and 6 output channels and equal parameters."""
    module = package(op, **constants)
    torch.manual_seed(7)
    ours = getattr(module, class_of(module))(4, 6, **more)
    torch.manual_seed(7)
    theirs = getattr(nn, class_of(module))(4, 6, **constants, **more)
    return ours, theirs


def example(op: str, *, batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, *EXTENTS[-int(op[-2]) :])


every_layer = pytest.mark.parametrize(("op", "constants"), LAYERS.items(), ids=list(LAYERS))


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


@every_layer
class TestLayer:
    def test_equals_torch_from_the_same_seed(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants)
        for (name, parameter), (other, expected) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == other
            assert torch.equal(parameter, expected)
        x = example(op)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    def test_looks_like_torch(self, package: Package, op: str, constants: dict[str, Any]) -> None:
        ours, theirs = layers(package, op, constants)
        assert isinstance(ours, type(theirs))
        assert repr(ours) == repr(theirs)
        for name in type(theirs).__constants__:
            assert getattr(ours, name) == getattr(theirs, name), name

    def test_exchanges_state_with_torch(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants)
        nn.init.normal_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(theirs.weight, ours.weight)
        nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(theirs.weight, ours.weight)

    def test_survives_copies_and_pickles(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, _ = layers(package, op, constants)
        x = example(op)
        expected = ours(x)
        saved = io.BytesIO()
        torch.save(ours, saved)
        saved.seek(0)
        for other in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(saved, weights_only=False),
        ):
            assert type(other) is type(ours)
            assert torch.equal(other(x), expected)

    def test_takes_unbatched_input(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants, bias=False)
        assert ours.bias is None
        x = example(op)[0].requires_grad_()
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), x),
            torch.autograd.grad(expected.square().sum(), x),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_takes_an_empty_batch(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants)
        x = example(op, batch=0).requires_grad_()
        y = ours(x)
        assert y.shape == theirs(x).shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not ours.weight.grad.any()
        assert not ours.bias.grad.any()

    def test_meta_and_dtype_arguments(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants, device="meta", dtype=torch.float64)
        x = example(op).to("meta", torch.float64)
        y = ours(x)
        assert (y.device, y.dtype, y.shape) == (x.device, x.dtype, theirs(x).shape)

    def test_works_with_parametrizations(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        ours, theirs = layers(package, op, constants)
        for layer in (ours, theirs):
            nn.utils.parametrizations.weight_norm(layer)
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(ours)
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(theirs)
        x = example(op)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("op", "constants"),
    [
        ("conv3d", LAYERS["conv3d"]),
        ("conv2d", LAYERS["conv2d"]),
        ("conv1d", LAYERS["conv1d"]),
    ],
)
def test_padding_modes(package: Package, op: str, constants: dict[str, Any], mode: str) -> None:
    ours, theirs = layers(package, op, constants, padding_mode=mode)
    assert repr(ours) == repr(theirs)
    for extra in range(4):
        shape = [extent + extra for extent in EXTENTS[-int(op[-2]) :]]
        x = torch.randn(2, 4, *shape, requires_grad=True)
        y, expected = ours(x), theirs(x)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), x),
            torch.autograd.grad(expected.square().sum(), x),
            rtol=1e-4,
            atol=1e-4,
        )


class TestOutputSize:
    @pytest.mark.parametrize("size", [(9, 11, 13), (10, 11, 14), (2, 6, 9, 11, 14)])
    def test_equals_torch(self, k3s2: ModuleType, size: tuple[int, ...]) -> None:
        ours = k3s2.ConvTranspose3d(4, 6)
        theirs = nn.ConvTranspose3d(4, 6, 3, stride=2)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 4, 4, 5, 6)
        expected = theirs(x, size)
        assert expected.shape[2:] == size[-3:]
        torch.testing.assert_close(ours(x, output_size=size), expected)
        torch.testing.assert_close(ours(x[0], torch.Size(size[-3:])), expected[0])

    @pytest.mark.parametrize("size", [(8, 11, 13), (9, 11, 15), (9, 11)])
    def test_refuses_what_torch_refuses(self, k3s2: ModuleType, size: tuple[int, ...]) -> None:
        x = torch.randn(2, 4, 4, 5, 6)
        with pytest.raises(ValueError, match=r"output.size") as expected:
            nn.ConvTranspose3d(4, 6, 3, stride=2)(x, list(size))
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            k3s2.ConvTranspose3d(4, 6)(x, list(size))


class TestFunction:
    @pytest.mark.parametrize("output_padding", [0, 1, (1,), [0, 1, 0], torch.Size([1, 0, 1])])
    def test_output_padding(self, k3s2: ModuleType, output_padding: Any) -> None:
        x, w, b = torch.randn(1, 2, 3, 4, 5), torch.randn(2, 3, 3, 3, 3), torch.randn(3)
        expected = F.conv_transpose3d(x, w, b, 2, 0, output_padding)
        torch.testing.assert_close(
            k3s2.conv_transpose3d(x, w, b, output_padding=output_padding), expected
        )

    @pytest.mark.parametrize("output_padding", [2, -1, (1, 1), (0, 2, 0)])
    def test_refuses_output_padding_that_torch_refuses(
        self, k3s2: ModuleType, output_padding: Any
    ) -> None:
        x, w = torch.randn(1, 2, 3, 4, 5), torch.randn(2, 3, 3, 3, 3)
        with pytest.raises(RuntimeError) as expected:
            F.conv_transpose3d(x, w, None, 2, 0, output_padding)
        with pytest.raises(RuntimeError) as error:
            k3s2.conv_transpose3d(x, w, None, 2, 0, output_padding)
        assert str(error.value).split(" output_padding")[0].split(", but")[0] in str(expected.value)

    def test_takes_any_strides_and_offsets(self, package: Package, device: str) -> None:
        module = package("conv_transpose3d", device, kernel_size=3, stride=2)
        x = torch.randn(2, 3, 4, 5, 6, device=device)
        w, b = torch.randn(3, 5, 3, 3, 3, device=device), torch.randn(5, device=device)
        expected = F.conv_transpose3d(x, w, b, 2)
        inputs = {
            "channels last": x.to(memory_format=torch.channels_last_3d),
            "transposed": x.transpose(2, 4).contiguous().transpose(2, 4),
            "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
            "every second": x.repeat_interleave(2, dim=3)[:, :, :, ::2],
        }
        for name, given in inputs.items():
            assert torch.equal(given, x), name
            torch.testing.assert_close(module.conv_transpose3d(given, w, b), expected, msg=name)
        odd = torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)
        assert odd.data_ptr() % 8 == 4
        for weight in (odd, w.mT.contiguous().mT):
            torch.testing.assert_close(module.conv_transpose3d(x, weight, b), expected)
        spread = b.repeat_interleave(2)[::2]
        torch.testing.assert_close(module.conv_transpose3d(x, w, spread), expected)
        one = x[:, :, :1].expand(2, 3, 4, 5, 6)
        torch.testing.assert_close(
            module.conv_transpose3d(one, w, b), F.conv_transpose3d(one, w, b, 2)
        )

    def test_leaves_inputs_alone_and_repeats_to_the_bit(self, k3s2: ModuleType) -> None:
        x, w, b = torch.randn(2, 3, 4, 5, 6), torch.randn(3, 5, 3, 3, 3), torch.randn(5)
        copies = [tensor.clone() for tensor in (x, w, b)]
        first = k3s2.conv_transpose3d(x, w, b)
        assert torch.equal(first, k3s2.conv_transpose3d(x, w, b))
        for tensor, copied in zip((x, w, b), copies, strict=True):
            assert torch.equal(tensor, copied)

    def test_numbers_of_threads_agree_to_the_bit(self, k3s2: ModuleType) -> None:
        x, w = torch.randn(2, 6, 5, 9, 17), torch.randn(6, 5, 3, 3, 3, requires_grad=True)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y = k3s2.conv_transpose3d(x, w)
                results.append((y.detach(), *torch.autograd.grad(y.square().sum(), w)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for tensor, expected in zip(other, results[0], strict=True):
                assert torch.equal(tensor, expected)


class TestErrors:
    """The exceptions of torch; most with its words."""

    X, W, B = torch.randn(1, 4, 3, 3, 3), torch.randn(4, 2, 3, 3, 3), torch.randn(2)
    WC = torch.randn(2, 4, 1, 3, 2)

    @pytest.mark.parametrize(
        ("x", "w", "b"),
        [
            (X[0, 0], W, B),
            (X[None], W, B),
            (X[:, :3], W, B),
            (X[0, :3], W, B),
            (X, W, torch.randn(3)),
            (X, W, torch.randn(1, 2)),
            (torch.randn(1, 4, 0, 3, 3), W, B),
        ],
    )
    def test_transposed(self, k3s2: ModuleType, x: Tensor, w: Tensor, b: Tensor) -> None:
        self.compare(lambda: k3s2.conv_transpose3d(x, w, b), lambda: F.conv_transpose3d(x, w, b, 2))

    @pytest.mark.parametrize(
        ("x", "w", "b"),
        [
            (X[0, 0], WC, B),
            (X[:, :3], WC, B),
            (X.double(), WC, B.double()),
            (X, WC, B.double()),
            (X, WC, torch.randn(3)),
        ],
    )
    def test_convolution(self, package: Package, x: Tensor, w: Tensor, b: Tensor) -> None:
        module = package("conv3d", **LAYERS["conv3d"])
        self.compare(lambda: module.conv3d(x, w, b), lambda: F.conv3d(x, w, b, padding=(0, 1, 1)))

    @pytest.mark.parametrize("x", [torch.randn(2, 1, 4), torch.randn(1, 4)])
    def test_kernel_larger_than_the_input(self, package: Package, x: Tensor) -> None:
        module = package("conv1d", kernel_size=3, dilation=2, dtypes=("f32",))
        w = torch.randn(1, 1, 3)
        self.compare(lambda: module.conv1d(x, w), lambda: F.conv1d(x, w, dilation=2))

    def compare(self, ours: Any, theirs: Any) -> None:
        with pytest.raises(RuntimeError) as expected:
            theirs()
        with pytest.raises(RuntimeError) as error:
            ours()
        words = str(expected.value).replace("transposed=1, ", "").replace("groups=1, ", "")
        if "type" not in words:
            said = str(error.value).replace("transposed=1, ", "").replace("groups=1, ", "")
            assert said == words

    def test_negative_extents(self, package: Package) -> None:
        module = package("conv_transpose2d", kernel_size=2, padding=2, dtypes=("f32",))
        x, w = torch.randn(1, 2, 3, 1), torch.randn(2, 2, 2, 2)
        self.compare(
            lambda: module.conv_transpose2d(x, w), lambda: F.conv_transpose2d(x, w, None, 1, 2)
        )

    def test_another_kernel_size(self, k3s2: ModuleType) -> None:
        with pytest.raises(RuntimeError, match=r"kernel size \(3, 3, 3\).*\[4, 2, 3, 3, 2\]"):
            k3s2.conv_transpose3d(self.X, self.W[..., :2], self.B)

    def test_dtypes_that_differ(self, k3s2: ModuleType) -> None:
        with pytest.raises(RuntimeError, match="should be the same"):
            k3s2.conv_transpose3d(self.X.double(), self.W, self.B)
        with pytest.raises(RuntimeError, match=r"bias type .* should be the same"):
            k3s2.conv_transpose3d(self.X, self.W, self.B.double())

    def test_devices_that_differ(self, k3s2: ModuleType) -> None:
        for x, w, b in (
            (self.X.to("meta"), self.W, self.B),
            (self.X, self.W.to("meta"), self.B),
            (self.X, self.W, self.B.to("meta")),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                k3s2.conv_transpose3d(x, w, b)

    def test_channels_that_are_fixed(self, package: Package) -> None:
        module = package(
            "conv2d", kernel_size=3, in_channels=4, out_channels=6, groups=2, dtypes=("f32",)
        )
        layer = module.Conv2d()
        assert (layer.in_channels, layer.out_channels) == (4, 6)
        assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
        with pytest.raises(ValueError, match="in_channels must be 4, as generated, not 8"):
            module.Conv2d(8, 6)
        with pytest.raises(RuntimeError, match="6 elements in dimension 0"):
            module.conv2d(torch.randn(1, 4, 5, 5), torch.randn(8, 2, 3, 3))
        with pytest.raises(RuntimeError, match="2 elements in dimension 1"):
            module.conv2d(torch.randn(1, 8, 5, 5), torch.randn(6, 4, 3, 3))

    def test_weights_that_groups_do_not_divide(self, package: Package) -> None:
        module = package("conv2d", **LAYERS["conv2d"])
        x, w = torch.randn(1, 4, 5, 5), torch.randn(5, 2, 2, 3)
        with pytest.raises(RuntimeError, match="Given groups=2, expected weight to be divisible"):
            module.conv2d(x, w)
        with pytest.raises(ValueError, match="out_channels must be divisible by groups"):
            module.Conv2d(4, 5)
        operators = getattr(torch.ops, sys.modules[module.fprop.__module__].NAMESPACE)
        with pytest.raises(RuntimeError, match="2 groups do not divide 5 and 4 channels"):
            operators.wgrad(torch.randn(1, 5, 5, 5), x)


class TestPackage:
    def test_two_copies_and_a_reload_share_their_operators(
        self, k3s2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from convgen.specialize import export, load

        assert k3s2.__file__ is not None
        copied = load(export(Path(k3s2.__file__).parent, tmp_path))
        assert copied is not k3s2
        x, w = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 2, 3, 3, 3)
        assert torch.equal(copied.conv_transpose3d(x, w), k3s2.conv_transpose3d(x, w))
        assert copied.dgrad is k3s2.dgrad

        import importlib

        monkeypatch.syspath_prepend(tmp_path)
        imported = importlib.import_module("conv_transpose3d_k3_s2")
        reloaded = importlib.reload(imported)
        assert torch.equal(reloaded.conv_transpose3d(x, w), k3s2.conv_transpose3d(x, w))
        del sys.modules["conv_transpose3d_k3_s2"]

    def test_missing_library_says_what_to_run(self, k3s2: ModuleType, tmp_path: Path) -> None:
        import subprocess

        from convgen.specialize import export

        assert k3s2.__file__ is not None
        copied = export(Path(k3s2.__file__).parent, tmp_path)
        (copied / "lib/cpu.so").unlink()
        code = (
            "import torch, conv_transpose3d_k3_s2 as m\n"
            "m.conv_transpose3d(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 3, 3, 3))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "CONVGEN_NO_BUILD": "1"},
            capture_output=True,
            text=True,
        )
        assert "conv_transpose3d_k3_s2 was not compiled for cpu here" in done.stderr
        assert "run `convgen generate --kernel 3 --stride 2 --dtype f32,f64`" in done.stderr

    def test_a_copy_with_a_broken_library_does_not_keep_a_good_one_from_being_used(
        self, k3s2: ModuleType, tmp_path: Path
    ) -> None:
        import shutil
        import subprocess

        from convgen.specialize import export

        assert k3s2.__file__ is not None
        original = Path(k3s2.__file__).parent
        for name in ("broken", "foreign", "absent", "good"):
            export(original, tmp_path, name)
        (tmp_path / "broken/lib/cpu.so").write_text("no library")
        # A library that loads and has no kernels.
        foreign = tmp_path / "foreign/lib/cpu.so"
        shutil.copyfile(torch._C.__file__, foreign)
        digest = hashlib.sha256(foreign.read_bytes()).hexdigest()
        foreign.with_name("cpu.so.sha256").write_text(f"{digest}  lib/cpu.so\n")
        shutil.rmtree(tmp_path / "absent/lib")
        code = (
            "import torch, broken, foreign, absent\n"
            "x, w = torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 3, 3, 3)\n"
            "try: broken.conv_transpose3d(x, w)\n"
            "except RuntimeError as error: print(error)\n"
            "import good\n"
            "for copy in (broken, foreign, absent, good): print(copy.conv_transpose3d(x, w).sum())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        refused, *sums = done.stdout.splitlines()
        assert "broken/lib/cpu.so cannot be loaded" in refused
        assert "foreign/lib/cpu.so cannot be loaded" in refused
        assert "run `convgen generate --kernel 3 --stride 2 --backend auto`" in refused
        assert sums == ["tensor(27.)"] * 4
