"""KernelBench's own problems, where CONVGEN_KERNELBENCH names a checkout of its repository.

Extents and batches are made small. Its static checker reads the files for the problems as they are.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import convgen
from tests.exporting.exported import quick

CHECKOUT = Path(os.environ.get("CONVGEN_KERNELBENCH", ""))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        "CONVGEN_KERNELBENCH" not in os.environ,
        reason="CONVGEN_KERNELBENCH names no checkout of ScalingIntelligence/KernelBench",
    ),
    pytest.mark.filterwarnings("ignore:compiling"),
]


def problems() -> Iterator[Path]:
    """Level 1's convolutions, and level 2's problems with a transposed one."""
    for path in sorted((CHECKOUT / "KernelBench").glob("level[12]/*.py")):
        number = int(path.name.partition("_")[0])
        if path.parent.name == "level1":
            if 54 <= number <= 87:
                yield path
        elif "ConvTranspose" in path.name:
            yield path


def small(text: str) -> str:
    """A problem with small extents and batches: what follows the classes, line by line."""
    head, mark, tail = text.rpartition("\nbatch_size")

    def least(match: re.Match[str], most: int) -> str:
        return str(min(int(match[0]), most))

    lines = []
    for line in (mark + tail).split("\n"):
        names = line.partition("=")[0].strip()
        if re.match(r"(batch_size|(depth|height|width|length)(_in)?|D|H|W)(,|$| )", names):
            most = 2 if names == "batch_size" else 64 if names == "length" else 32
            if names in ("depth", "depth_in", "height", "height_in") or "," in names:
                most = 12
            value = line[len(names) :]
            if "," in names:  # depth, height, width: the last one is in the shape of some norms
                first, comma, last = value.rpartition(",")
                value = re.sub(r"\d+", lambda m: least(m, 12), first) + comma + last
            else:
                value = re.sub(r"\d+", lambda m, most=most: least(m, most), value)
            line = names + value
        lines.append(line)
    return head + "\n".join(lines)


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    path = CHECKOUT / "src" / "kernelbench" / "kernel_static_checker.py"
    spec = importlib.util.spec_from_file_location("kernel_static_checker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path", list(problems()), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
class TestProblems:
    def test_the_static_checker_finds_nothing(
        self, path: Path, checker: ModuleType, tmp_path: Path
    ) -> None:
        text = convgen.export_model(path, tmp_path / "solution.py").path.read_text()
        valid, errors, warned = checker.validate_kernel_static(text, "cuda", "fp32")
        assert valid, errors
        # Of level 2, the other layers of the problems are torch's.
        own = checker.validate_kernel_static(path.read_text(), "", "fp32")[2]
        assert set(warned) <= set(own)
        assert not warned or path.parent.name == "level2"

    def test_outputs_and_gradients_are_the_models(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CONVGEN_EXPORT_DIR", str(tmp_path / "libraries"))
        problem = tmp_path / path.name
        problem.write_text(small(path.read_text()))
        solution = convgen.export_model(problem, tmp_path / "solution.py", backends="cpu").path
        # As KernelBench does it: both sources in one namespace that has no name.
        context: dict[str, Any] = {}
        exec(compile(problem.read_text(), "<string>", "exec"), context)
        model, get_inputs = context["Model"], context["get_inputs"]
        torch.manual_seed(42)
        theirs = model(*context["get_init_inputs"]())
        quick(solution, "-O1")
        text = "import os\nos.environ['HOME'] = os.environ['HOME']\n" + solution.read_text()
        exec(compile(text, "<string>", "exec"), context)
        torch.manual_seed(42)
        mine = context["ModelNew"](*context["get_init_inputs"]())
        torch.manual_seed(1)
        inputs = get_inputs()
        truth = copy.deepcopy(theirs).double()
        outputs, grads = [], []
        for each in (theirs, mine, truth):
            dtype = next(each.parameters()).dtype
            operands = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs]
            outputs.append(each(*operands))
            wanted = [*operands, *each.parameters()]
            grads.append(torch.autograd.grad(outputs[-1].sin().sum(), wanted, allow_unused=True))
        torch.testing.assert_close(*outputs[:2], rtol=1e-4, atol=1e-4)
        for one, two, true in zip(*grads, strict=True):
            if one is not None:
                # Of a bias before a norm, say, rounding is all that there is.
                most = 1e-4 * true.norm() + 10 * (one - true).norm()
                assert (two - true).norm() <= most
