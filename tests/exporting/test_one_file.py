"""Layers as one file: what is in it, that it computes as torch does, and how it fails."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import mostly_long
from torch import nn

import convgen
from convgen.spec import ConvSpec
from tests.exporting.exported import compiling, load, quick

SPECS = {
    "transposed": ConvSpec.make(kernel_size=3, stride=2, in_channels=4, out_channels=6),
    "same": ConvSpec.make("conv2d", kernel_size=(2, 3), padding="same", groups=2),
    "plain": ConvSpec.make("conv1d", kernel_size=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's files keep what they compile."""
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(autouse=True)
def _libraries(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of compiling begin with none; files look for compilers by themselves."""
    monkeypatch.delenv("CXX")
    own = request.cls is TestCompiling
    monkeypatch.setenv("CONVGEN_EXPORT_DIR", str(tmp_path / "new" if own else folder))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A convolution of one dimension, the quickest to compile."""
    convgen.export(SPECS["plain"], tmp_path / "plain.py", backends="cpu")
    return quick(tmp_path / "plain.py")


class TestText:
    @pytest.mark.parametrize("name", SPECS)
    @pytest.mark.parametrize("precision", ["torch", "match"])
    def test_is_formatted(self, name: str, precision: str, tmp_path: Path) -> None:
        ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
        if ruff is None:
            pytest.skip("needs ruff")
        file = convgen.export(SPECS[name], tmp_path / "layer.py", precision=precision).path
        text = file.read_text()
        python, _, sources = text.partition("\n_SOURCES = {\n")
        assert not [line for line in python.splitlines() if len(line) > 100]
        assert not re.search(r"[ \t]+\n", text)
        assert sources.count('r"""') > 10
        for arguments in (["format", "--check", "--diff"], ["check", "--ignore=E501"]):
            options = ["--isolated", "--line-length=100", "--no-cache"]
            done = subprocess.run(
                [ruff, *arguments, *options, str(file)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr

    def test_imports_torch_and_the_standard_library_alone(self, plain: Path) -> None:
        for node in ast.walk(ast.parse(plain.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                root = module.split(".")[0]
                assert root == "torch" or root in sys.stdlib_module_names, module

    def test_holds_nothing_that_checkers_of_generated_kernels_refuse(self, tmp_path: Path) -> None:
        file = convgen.export(SPECS["transposed"], tmp_path / "layer.py", precision="match").path
        code = "\n".join(re.split("#|//", line)[0] for line in file.read_text().splitlines())
        for word in (
            r"\btry\s*:",
            r"\bexcept\s",
            r"\bpass\b",
            "threading",
            r"torch\.nn\.",
            "__float2half",
        ):
            assert not re.search(word, code), word
        assert "__global__" in code

    def test_holds_what_was_asked_for_alone(self, tmp_path: Path) -> None:
        def units(**options: object) -> set[str]:
            file = convgen.export(SPECS["transposed"], tmp_path / "layer.py", **options)  # type: ignore[arg-type]
            return set(re.findall(r'"(\w+)/\w+/(\w+)\.\w+": r"""', file.path.read_text()))

        assert units(backends="cpu", backward=False) == {("cpu", "dgrad_f32")}
        assert units(backends="cpu", dtypes=[torch.float64]) == {
            ("cpu", "fprop_f64"), ("cpu", "dgrad_f64"), ("cpu", "wgrad_f64"),
        }  # fmt: skip
        forward = {"backends": "cuda", "backward": False}
        assert {kind for _, kind in units(**forward, precision="fp32")} >= {"dgrad_tf32x3"}
        assert not any("tf32x3" in kind for _, kind in units(**forward, precision="tf32"))
        assert not any(
            "tf32" in kind.replace("tf32x3", "") for _, kind in units(**forward, precision="fp32")
        )

    def test_is_the_same_each_time_and_says_how_it_was_made(self, tmp_path: Path) -> None:
        first = convgen.export(
            SPECS["plain"], tmp_path / "layer.py", backends="cpu"
        ).path.read_text()
        again = convgen.export(
            SPECS["plain"], tmp_path / "layer.py", backends="cpu"
        ).path.read_text()
        assert first == again
        assert "convgen export --op conv1d --kernel 3 --backend cpu -o layer.py" in first

    def test_a_module_is_exported_with_its_dtypes_and_backends(self, tmp_path: Path) -> None:
        example = Path(__file__).parents[2] / "generated" / "conv_transpose3d_k3_s2"
        text = convgen.export(example, tmp_path / "layer.py").path.read_text()
        assert {"torch.float32: ", "torch.float64: "} <= set(
            re.findall(r"torch\.float\d\d: ", text)
        )


@pytest.mark.filterwarnings("ignore:compiling")
class TestCalls:
    @pytest.mark.parametrize("name", mostly_long(["transposed", "same"], 0))
    def test_outputs_and_gradients_of_two_orders_are_torchs(
        self, name: str, tmp_path: Path
    ) -> None:
        spec = SPECS[name]
        file = convgen.export(spec, tmp_path / "layer.py", backends="cpu").path
        module = load(quick(file))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = getattr(module, spec.class_name)(4, 6)
            torch.manual_seed(0)
            theirs = getattr(nn, spec.class_name)(
                4, 6, spec.kernel_size, spec.stride, spec.padding, groups=spec.groups
            )
            x = torch.randn(2, 4, *(5, 6, 7)[-spec.ndim :])
        assert list(layer.state_dict()) == list(theirs.state_dict())
        results = []
        for each in (layer, theirs):
            operand = x.clone().requires_grad_()
            inputs = [operand, *each.parameters()]
            output = each(operand)
            grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
            more = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
            results.append([output, *grads, *more])
        for mine, reference in zip(*results, strict=True):
            assert (mine - reference).norm() <= 1e-5 * reference.norm()

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        operand = x.clone().requires_grad_()
        compiled(operand).sin().sum().backward()
        torch.testing.assert_close(operand.grad, results[1][1], rtol=1e-4, atol=1e-4)
        if spec.ndim > 1:
            memory_format = torch.channels_last_3d if spec.ndim == 3 else torch.channels_last
            mine, reference = (each(x.to(memory_format=memory_format)) for each in (layer, theirs))
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
            assert mine.stride() == reference.stride()
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(RuntimeError, match=r"not for torch\.float16 on cpu"),
        ):
            layer(x)

    def test_arguments_are_torchs_and_other_constants_are_refused(self, plain: Path) -> None:
        module = load(plain)
        x, weight, bias = torch.randn(4, 9), torch.randn(6, 4, 3), torch.randn(6)
        reference = nn.functional.conv1d(x, weight, bias)
        torch.testing.assert_close(module.conv1d(x, weight, bias, 1, 0), reference)
        assert module.conv1d(x[None, :, :][:0], weight).shape == (0, 6, 7)
        with pytest.raises(ValueError, match=r"stride must be \(1,\), as exported, not \(2,\)"):
            module.conv1d(x, weight, stride=2)
        with pytest.raises(ValueError, match="no kernels for Conv1d"):
            module.Conv1d(4, 6, dilation=3)
        with pytest.raises(RuntimeError, match="to have 4 channels, but got 5"):
            module.conv1d(torch.randn(5, 9), weight)
        with pytest.raises(RuntimeError, match="has no output"):
            module.conv1d(torch.randn(4, 2), weight)
        reflecting = module.Conv1d(4, 6, padding_mode="reflect")
        torch.testing.assert_close(
            reflecting(x), nn.functional.conv1d(x, reflecting.weight, reflecting.bias)
        )

    def test_a_file_without_gradients_says_so(self, tmp_path: Path) -> None:
        convgen.export(SPECS["plain"], tmp_path / "layer.py", backends="cpu", backward=False)
        layer = load(quick(tmp_path / "layer.py")).Conv1d(2, 2)
        output = layer(torch.randn(1, 2, 5))
        with pytest.raises(RuntimeError, match="exported without its gradients"):
            output.sum().backward()


def build(file: Path) -> Path:
    """Compiles or finds the forward of :func:`plain`'s file, as its first call does."""
    module = load(file)
    device = torch.device("cpu")
    target = module._Target("cpu", "conv1d_k3", "fprop", "f32", module._arch(device))
    (library,) = module._load([target])
    assert library.convgen_fprop_f32
    return Path(target.path)


class TestCompiling:
    def test_damaged_libraries_are_made_anew(self, plain: Path) -> None:
        with compiling():
            library = build(plain)
        assert library.parent.stat().st_mode & 0o777 == 0o700
        whole = library.read_bytes()
        library.unlink()  # not written to: this process has loaded it
        library.write_bytes(whole[:1000])
        with compiling():
            build(plain)
        assert len(library.read_bytes()) == len(whole)

    def test_a_folder_that_cannot_be_written_serves_what_is_there(
        self, plain: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with compiling():
            library = build(plain)
        monkeypatch.setenv("PATH", "/nowhere")
        library.parent.chmod(0o500)
        build(plain)
        library.parent.chmod(0o770)
        with pytest.raises(RuntimeError, match="others can write to it: set CONVGEN_EXPORT_DIR"):
            build(plain)

    def test_failures_say_what_to_do(
        self, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "/nowhere")
            with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
                build(plain)
            patch.setenv("CXX", "nonesuch")
            with pytest.raises(RuntimeError, match="CXX='nonesuch' was not found"):
                build(plain)
        with monkeypatch.context() as patch:
            patch.setenv("CONVGEN_EXPORT_DIR", str(plain / "below a file"))
            with pytest.raises(RuntimeError, match="cannot be written to: set CONVGEN_EXPORT_DIR"):
                build(plain)
            patch.setenv("CONVGEN_EXPORT_DIR", str(tmp_path / "$(touch x)"))
            with pytest.raises(RuntimeError, match="nvcc cannot compile in"):
                build(plain)
        text = plain.read_text()
        plain.write_text(text.replace("int64_t", "int65_t"))
        with (
            compiling(),
            pytest.raises(RuntimeError, match=r"a compiler failed: .*\n(.*\n)*.*int65_t"),
        ):
            build(plain)
        plain.write_text(text.replace('< "2.9"', '< "99"'))
        with pytest.raises(ImportError, match="this file needs torch"):
            build(plain)

    def test_neither_convgen_nor_ninja_take_part(self, plain: Path, folder: Path) -> None:
        code = (
            "import sys; sys.modules.update(convgen=None, ninja=None, jinja2=None)\n"
            "import torch, plain\n"
            "print(plain.Conv1d(2, 2)(torch.ones(1, 2, 5)).shape)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=plain.parent, capture_output=True, text=True
        )
        assert done.stdout == "torch.Size([1, 2, 3])\n", done.stderr


def test_what_convgen_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "layer.py"
    file.write_text("mine = True\n")
    with pytest.raises(convgen.ExportError, match="was not written by convgen"):
        convgen.export(SPECS["plain"], file, backends="cpu")
    assert file.read_text() == "mine = True\n"
    convgen.export(SPECS["plain"], file, backends="cpu", force=True)
    convgen.export(SPECS["plain"], file, backends="cpu", backward=False)
    file.write_text(file.read_text() + "# a note\n")
    with pytest.raises(convgen.ExportError, match="was changed since"):
        convgen.export(SPECS["plain"], file, backends="cpu")


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(convgen.SpecError, match="precision"):
        convgen.export(SPECS["plain"], tmp_path / "x.py", precision="half")
    with pytest.raises(convgen.SpecError, match="backends"):
        convgen.export(SPECS["plain"], tmp_path / "x.py", backends="tpu")
    with pytest.raises(convgen.ExportError, match="is no generated module"):
        convgen.export(tmp_path, tmp_path / "x.py")


class TestPrecision:
    """Which products float32 gets, on a GPU; what is compared there is the same on the CPU."""

    @pytest.mark.filterwarnings("ignore:compiling")
    @pytest.mark.parametrize("name", ["transposed", "same"])
    def test_what_is_compared_is_the_contraction(self, name: str, tmp_path: Path) -> None:
        file = convgen.export(SPECS[name], tmp_path / "x.py", precision="match", backends="cpu")
        module = load(quick(file.path))
        layer = module._LAYERS[0]
        weight = torch.randn(4, 6, 3, 3, 3) if layer.transposed else torch.randn(6, 2, 2, 3)
        coarse = torch.randn(2, weight.shape[0], *((3, 4, 5) if layer.transposed else (5, 6)))
        # One more than the least that it meets, as with an output padding.
        fine = torch.randn(
            2, weight.shape[1] * layer.groups, *((8, 10, 12) if layer.transposed else (5, 6))
        )
        size = [list(tensor.shape[2:]) for tensor in (coarse, fine)]
        calls = {
            "fprop": (fine, weight, None, size[0]),
            "dgrad": (coarse, weight, None, size[1]),
            "wgrad": (coarse, fine),
        }
        for contraction, (first, second, *more) in calls.items():
            mine = module._kernel_of(contraction, 0, first, second, *more)
            reference = module._by_torch(contraction, layer, first, second, None, tuple(mine.shape))
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("tf32", "accurate", "chosen"),
        [
            (4e-5, 0.0, "tf32"),
            (9e-5, 1e-6, "tf32x3"),  # another seed's numbers might exceed the tolerance
            (9e-5, 1e-3, "tf32"),  # torch takes TF32, too, if not the same
            (float("nan"), float("nan"), "tf32x3"),
        ],
    )
    def test_half_of_the_tolerance_must_do(
        self,
        tf32: float,
        accurate: float,
        chosen: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        file = convgen.export(SPECS["plain"], tmp_path / "x.py", precision="match", backends="cpu")
        module = load(file.path)
        first, second = torch.zeros(2, 3, 8), torch.zeros(4, 3, 3)
        shape = (2, 4, 6)

        def compute(*arguments: object) -> torch.Tensor:
            result = torch.zeros(shape)
            result[1, 2, 3] = {"tf32": tf32, "tf32x3": accurate}[str(arguments[-1])]
            return result

        monkeypatch.setattr(module, "_compute", compute)
        layer = module._LAYERS[0]
        assert module._matching("fprop", layer, 0, first, second, None, shape) == chosen


@pytest.mark.long
@pytest.mark.parametrize("name", ["transposed", "grouped", "dilated"])
def test_nvcc_compiles_the_file_by_its_own_command(name: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    spec = {
        "grouped": ConvSpec.make("conv2d", kernel_size=3, groups=8),
        "dilated": ConvSpec.make("conv1d", kernel_size=3, dilation=2),
        **SPECS,
    }[name]
    file = convgen.export(spec, tmp_path / "layer.py", backends="cuda", backward=False).path
    module = load(file)
    forward = "dgrad" if spec.transposed else "fprop"
    with compiling():
        (library,) = module._load([module._Target("cuda", spec.name, forward, "f32", "90a")])
    for kind in ("f32", "tf32", "tf32x3"):
        assert library[f"convgen_{forward}_{kind}"]


@pytest.mark.long
def test_a_model_compiles_for_the_gpu_when_it_is_constructed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    problem = tmp_path / "problem.py"
    problem.write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, kernel_size):\n"
        "        super().__init__()\n"
        "        self.first = nn.Conv1d(3, 4, kernel_size)\n"
        "        self.second = nn.ConvTranspose1d(4, 3, kernel_size, stride=2)\n"
        "    def forward(self, x):\n"
        "        return self.second(self.first(x))\n"
        "def get_init_inputs():\n"
        "    return [3]\n"
    )
    out = tmp_path / "solution.py"
    module = load(convgen.export_model(problem, out, backward=False, precision="tf32").path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with compiling():
        module.ModelNew(3)
    assert [(target.layer, target.contraction, target.arch) for target in module._libraries] == [
        ("conv1d_k3", "fprop", "90a"),
        ("conv_transpose1d_k3_s2", "dgrad", "90a"),
    ]
