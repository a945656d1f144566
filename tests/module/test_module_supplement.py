"""Kernels that a generated module lacks: built when first asked for, or what to call for them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import convgen
from convgen.building.build import BuildWarning
from convgen.checking import interpreted
from convgen.spec import ConvSpec
from convgen.specialize import export

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture
def module(package: Package) -> ModuleType:
    """Has f32 and f64 for the CPU. These tests build bf16 for it, and never f16."""
    return package("conv1d", kernel_size=3, padding=1)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 9).to(dtype), torch.randn(6, 4, 3).to(dtype)


def raw(module: ModuleType) -> Any:
    """The operators as the dispatcher has them."""
    return getattr(torch.ops, sys.modules[f"{module.__name__}._operators"].NAMESPACE)


def folder(module: ModuleType) -> Path:
    assert module.__file__ is not None
    return Path(module.__file__).parent


class TestBuilt:
    def test_autocast_gets_the_kernels_of_a_module_with_its_dtype(
        self, module: ModuleType, package: Package
    ) -> None:
        def gradients(used: Any) -> tuple[Tensor, ...]:
            x, w = (tensor.requires_grad_() for tensor in operands())
            with torch.autocast("cpu", torch.bfloat16):
                y = used.conv1d(x, w, torch.zeros(6))
            return y, *torch.autograd.grad(y.float().square().sum(), (x, w))

        other = package("conv1d", kernel_size=3, padding=1, dtypes=("bf16",))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BuildWarning)  # only a cold cache compiles
            ours = gradients(module)
        assert ours[0].dtype == torch.bfloat16
        for first, second in zip(ours, gradients(other), strict=True):
            assert torch.equal(first, second)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(module)

    def test_compiled_functions_ask_for_it_too(self, module: ModuleType) -> None:
        torch._dynamo.reset()
        x, w = operands(torch.bfloat16)
        compiled = torch.compile(module.conv1d, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, w), module.conv1d(x, w))

    def test_channels_last_results_lie_as_of_kernels_that_are_there(
        self, module: ModuleType
    ) -> None:
        x, w = operands(torch.bfloat16)
        last = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(module.conv1d(last, w), module.conv1d(x, w))

    def test_every_raw_operator_and_higher_derivatives_are_served(self, module: Any) -> None:
        x, w = operands(torch.bfloat16)
        y = raw(module).fprop(x, w, None, (9,))
        operators = raw(module)
        assert operators.dgrad(y, w, None, (9,)).dtype == torch.bfloat16
        weight, bias = operators.wbgrad(y, x)
        assert torch.equal(weight, operators.wgrad(y, x))
        assert torch.equal(bias, operators.bgrad(y))
        x.requires_grad_()
        (grad,) = torch.autograd.grad(module.conv1d(x, w).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.sum(), x)[0].dtype == torch.bfloat16

    def test_what_is_built_first_is_said_before(
        self, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = package("conv1d", kernel_size=1, dtypes=("f64",))
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path))
        x, w = torch.ones(1, 1, 4), torch.ones(1, 1, 1)
        with pytest.warns(BuildWarning, match="conv1d_k1 lacks f32 kernels for cpu.*compiling"):
            assert torch.equal(module.conv1d(x, w), x)

    def test_a_library_that_is_missing_is_built_from_the_specification(
        self, module: ModuleType, tmp_path: Path
    ) -> None:
        # Another process: copies of a package share what this one has loaded.
        copied = export(folder(module), tmp_path)
        (copied / "lib/cpu.so").unlink()
        code = (
            "import torch, conv1d_k3_p1 as m\n"
            "print(m.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3)).tolist())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout == "[[[2.0, 3.0, 3.0, 2.0]]]\n", done.stderr

    def test_tracers_ask_for_shapes_of_a_gpu_that_is_not_here(
        self, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with FakeTensorMode():
            x, w = (torch.empty(t.shape, device="cuda", dtype=torch.float16) for t in operands())
            assert module.conv1d(x, w).shape == (2, 6, 9)

    @pytest.mark.long
    def test_float16_for_a_gpu_is_rendered_loaded_and_called_with_the_interpreter_in_its_place(
        self, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = package("conv1d", kernel_size=1, groups=2)
        specialize: Any = sys.modules["convgen.specialize"]
        asked = []

        def write(spec: ConvSpec, *, dtypes: Any, backends: Any, progress: Any) -> Path:
            """Stands in for `generate`, whose nvcc would compile for no GPU."""
            asked.append((spec, dtypes, backends))
            progress(0, 1, "writing")
            for name, text in specialize.render(spec, backends, dtypes).items():
                path = tmp_path / spec.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return tmp_path / spec.name

        monkeypatch.setattr(specialize, "generate", write)
        monkeypatch.setattr(specialize, "load", interpreted.load)
        operators = sys.modules[module.fprop.__module__]
        lacking = sys.modules[f"{operators.__package__}._supplement"]
        monkeypatch.setattr(lacking, "_others", {})
        with pytest.warns(BuildWarning, match="conv1d_k1_g2 lacks f16 kernels for cuda"):
            kernels = lacking.kernels_elsewhere(torch.device("cuda"), torch.float16)
        assert asked == [(ConvSpec.from_dict(module.SPEC), ("f16",), ("cuda",))]
        # Its tensors' device is all that a GPU would change from here on.
        lacking._others["cpu", torch.float16] = kernels
        x, w = torch.randn(2, 4, 9, requires_grad=True), torch.randn(6, 2, 1, requires_grad=True)
        with torch.autocast("cpu", torch.float16):
            y = module.conv1d(x, w)
        assert y.dtype == torch.float16
        found = (y, *torch.autograd.grad(y.float().square().sum(), (x, w)))
        expected = F.conv1d(x.double(), w.double(), groups=2)
        wanted = (expected, *torch.autograd.grad(expected.square().sum(), (x, w)))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-2, atol=1e-2)

    @pytest.mark.gpu
    def test_float16_on_a_gpu(self, package: Package) -> None:
        module = package("conv1d", "cuda", kernel_size=3, padding=1, dtypes=("f32",))
        x, w = (tensor.cuda() for tensor in operands())
        with torch.autocast("cuda", torch.float16):
            ours = module.conv1d(x, w)
        expected = F.conv1d(x.double(), w.double(), padding=1)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)


class TestRefused:
    """What cannot be built is said, with the two calls that would make it."""

    def test_the_calls_that_are_told_make_the_same_specification_with_the_dtype(
        self, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CONVGEN_NO_BUILD", "1")
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(RuntimeError, match=r"not for torch.float16: run .*NO_BUILD") as raised,
        ):
            module.conv1d(*operands())
        _, command, _, call, _ = str(raised.value).split("`")
        assert command == "convgen generate --op conv1d --kernel 3 --padding 1 --dtype f32,f64,f16"
        assert call == (
            "convgen.specialize('conv1d', kernel_size=3, padding=1, "
            "dtypes=['f32', 'f64', 'f16'], backends=['cpu'])"
        )

    def test_what_is_in_the_cache_is_refused_too_where_building_is_forbidden(
        self, package: Package, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package("conv1d", kernel_size=2, dtypes=("f32",))
        module = package("conv1d", kernel_size=2, dtypes=("f64",))
        monkeypatch.setenv("CONVGEN_NO_BUILD", "1")
        with pytest.raises(RuntimeError, match=r"dtypes=\['f32', 'f64'\]"):
            module.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2))

    def test_without_convgen(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "convgen", None)
        x, w = operands(torch.float16)
        words = r"dtypes=.*'f16'.*convgen, which .* not installed"
        with pytest.raises(RuntimeError, match=words):
            module.conv1d(x, w)
        with pytest.raises(RuntimeError, match=words):
            raw(module).fprop(x, w, None, (9,))

    def test_by_another_version_of_convgen(
        self, module: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(convgen, "__version__", "9.9")
        with pytest.raises(RuntimeError, match=r"convgen 9.9, .*, is not the .* that wrote this"):
            module.conv1d(*operands(torch.float16))

    def test_where_a_compiler_fails(
        self, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match=r"'f16'.*convgen could not compile them now: "):
            module.conv1d(*operands(torch.float16))

    @pytest.mark.parametrize("forbidden", ["0", "1"])
    @pytest.mark.parametrize(
        ("dtype", "advice"),
        [
            (torch.complex64, "real and imaginary parts by themselves"),
            (torch.complex128, "real and imaginary parts by themselves"),
            (torch.int32, r"by .float\(\)"),
            (torch.bool, r"by .float\(\)"),
        ],
    )
    def test_dtypes_that_nothing_is_generated_for_get_no_call_that_does_not_help(
        self,
        module: ModuleType,
        dtype: torch.dtype,
        advice: str,
        forbidden: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CONVGEN_NO_BUILD", forbidden)
        with pytest.raises(RuntimeError, match=f"no kernels for {dtype}.*{advice}") as raised:
            module.conv1d(*operands(dtype))
        assert "--dtype" not in str(raised.value)
        assert "specialize" not in str(raised.value)
