"""The text of generated packages: what is in it, what is not, and that it is the same each time."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convgen.codegen.package import EPILOGUE, PYTHON, render_package
from convgen.codegen.render import render_kernels
from convgen.spec import OPERATORS, ConvSpec

SPECS = [
    ConvSpec.make(kernel_size=3, stride=2),
    ConvSpec.make(kernel_size=2, stride=2, in_channels=64, out_channels=32),
    ConvSpec.make("conv_transpose2d", kernel_size=(3, 5), padding=(1, 2), groups=4),
    ConvSpec.make("conv_transpose1d", kernel_size=4, stride=3, output_padding=1, out_channels=8),
    ConvSpec.make("conv3d", kernel_size=3, stride=(1, 2, 2), padding=1, in_channels=16, groups=2),
    ConvSpec.make("conv2d", kernel_size=1, stride=2),
    ConvSpec.make("conv1d", kernel_size=4, padding="same", dilation=3),
]
EPILOGUES = [
    ConvSpec.make("conv2d", kernel_size=3, padding=1, activation="relu", residual=True),
    ConvSpec.make(kernel_size=3, stride=2, activation="silu"),
    ConvSpec.make("conv1d", kernel_size=3, padding=1, stride=2, residual=True),
    ConvSpec.make("conv3d", kernel_size=3, activation="clamp:-inf,2.5", residual=True),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def render(spec: ConvSpec, *backends: str) -> dict[str, str]:
    dtypes = {"cpu": ("f32", "f64"), "cuda": ("f32",)}
    chosen = backends or ("cpu", "cuda")
    plans, kernels = {}, {}
    for backend in chosen:
        files, plans[backend] = render_kernels(spec, backend, dtypes[backend])
        kernels |= files
    return render_package(spec, plans, kernels)


def test_operators_are_shared_only_by_the_same_kernels() -> None:
    def namespace(**kernels: str) -> str:
        plans = {"cpu": render_kernels(SPECS[0], "cpu", ["f32"])[1]}
        operators = render_package(SPECS[0], plans, kernels)["_operators.py"]
        return next(line for line in operators.splitlines() if line.startswith("NAMESPACE = "))

    assert namespace(a="1") == namespace(a="1")
    assert namespace(a="1") != namespace(a="2")


@every_spec
class TestText:
    def test_is_the_same_each_time(self, spec: ConvSpec) -> None:
        assert render(spec) == render(spec)

    def test_imports_torch_and_the_standard_library_alone(self, spec: ConvSpec) -> None:
        files = render(spec, "cpu")
        for file in PYTHON:
            for node in ast.walk(ast.parse(files[file])):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules = [str(node.module)]
                for module in modules:
                    root = module.split(".")[0]
                    assert root == "torch" or root in sys.stdlib_module_names, module

    def test_documents_what_it_exports(self, spec: ConvSpec) -> None:
        tree = ast.parse(render(spec)["__init__.py"])
        assert spec.op in (ast.get_docstring(tree) or "")
        documented = {
            node.name: ast.get_docstring(node)
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert documented[spec.op]
        assert documented[spec.class_name]

    def test_holds_nothing_that_its_operator_does_not_use(self, spec: ConvSpec) -> None:
        files = render(spec)
        text = "".join(files[file] for file in PYTHON)
        words = {
            "def _check_output_padding": spec.transposed,
            "output_size": spec.transposed,
            "self.padding_mode": not spec.transposed,
            "% GROUPS": spec.groups > 1,
            "LEADING": spec.ndim < 3,
            "COARSE_CHANNELS": spec.geometry.coarse_channels is not None,
            "FINE_CHANNELS": spec.geometry.fine_channels is not None,
        }
        assert {word: word in text for word in words} == words
        other = OPERATORS[(OPERATORS.index(spec.op) + 1) % len(OPERATORS)]
        assert ConvSpec(other, 3).class_name + "(" not in text

    def test_spec_json_reads_back(self, spec: ConvSpec) -> None:
        described = json.loads(render(spec)["spec.json"])
        assert ConvSpec.from_dict(described["spec"]) == spec
        assert described["name"] == spec.name
        assert described["command"].startswith("convgen generate ")
        assert {name: entry["dtypes"] for name, entry in described["backends"].items()} == {
            "cpu": ["f32", "f64"],
            "cuda": ["f32"],
        }
        for entry in described["backends"].values():
            units = [*entry["dtypes"], *entry["math_modes"]]
            # Of a math mode, another family may serve some calls beside.
            kernels = {(kernel["contraction"], kernel["dtype"]) for kernel in entry["kernels"]}
            assert len(kernels) == 3 * len(units)

    def test_is_formatted(self, spec: ConvSpec, tmp_path: Path) -> None:
        check_format(render(spec), tmp_path)


def check_format(files: dict[str, str], folder: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    for file in files:
        if file.endswith(".py"):
            (folder / file).write_text(files[file])
    for arguments in (["format", "--check", "--diff"], ["check", "--ignore=E501"]):
        options = ["--isolated", "--line-length=100", "--no-cache"]
        done = subprocess.run(
            [ruff, *arguments, *options, str(folder)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spec", EPILOGUES, ids=lambda spec: spec.name)
def test_packages_with_an_epilogue_are_formatted_and_say_what_they_compute(
    spec: ConvSpec, tmp_path: Path
) -> None:
    files = render(spec)
    check_format(files, tmp_path)
    assert files.keys() >= {*PYTHON, EPILOGUE}
    documented = ast.get_docstring(ast.parse(files["__init__.py"]))
    assert f"{spec.op}(input, weight, bias)" in (documented or "")
    assert ConvSpec.from_dict(json.loads(files["spec.json"])["spec"]) == spec


def test_operators_of_different_kernels_have_different_names() -> None:
    def namespace(files: dict[str, str]) -> str:
        return next(
            line for line in files["_operators.py"].splitlines() if line.startswith("NAMESPACE")
        )

    spec = SPECS[0]
    names = {
        namespace(render(spec)),
        namespace(render(spec, "cpu")),
        namespace(render(ConvSpec.make(kernel_size=3, stride=2, padding=1))),
    }
    assert len(names) == 3
    assert all(ast.literal_eval(name.split(" = ")[1]).isidentifier() for name in names)


@pytest.mark.parametrize(
    ("op", "expected"), [("conv_transpose3d", "ConvTranspose3d"), ("conv1d", "Conv1d")]
)
def test_class_names_are_those_of_torch(op: str, expected: str) -> None:
    assert ConvSpec(op, 3).class_name == expected
