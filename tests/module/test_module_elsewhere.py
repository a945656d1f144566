"""Pickled layers and archives of generated modules in other processes, and on other machines."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Package
from torch import Tensor, nn

import convgen
from convgen import cached
from convgen.building import requests
from convgen.specialize import export

pytestmark = pytest.mark.usefixtures("shared_cache")

X = torch.linspace(-1, 1, 2 * 4 * 9).reshape(2, 4, 9)

RUN = """
import sys, torch
x = torch.linspace(-1, 1, 2 * 4 * 9).reshape(2, 4, 9)
"""


@pytest.fixture
def module(package: Package) -> ModuleType:
    return package("conv1d", kernel_size=3, padding=1, dtypes=("f32",))


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that knows nothing of this one."""
    return subprocess.run(
        [sys.executable, "-c", RUN + code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def network(module: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(module.Conv1d(4, 3), nn.ReLU()).eval()


class TestPickles:
    LOAD = """
pickled, result = sys.argv[1:]
model = torch.load(pickled, weights_only=False)
torch.save(model(x), result)
print(type(model[0]).__module__)
"""

    @pytest.mark.long
    def test_load_on_a_machine_with_an_empty_cache(
        self, module: ModuleType, tmp_path: Path
    ) -> None:
        model = network(module)
        torch.save(model, tmp_path / "model.pt")
        files = tmp_path / "model.pt", tmp_path / "y.pt"
        for _ in range(2):  # built, then found
            done = run(self.LOAD, *files, CONVGEN_CACHE_DIR=str(tmp_path / "cache"))
            assert done.stdout.strip() == module.__name__, done.stderr
            assert torch.equal(torch.load(files[1]), model(X))
        built = [path for path in (tmp_path / "cache").iterdir() if len(path.name) == 64]
        assert len(built) == 1

    def test_of_an_older_cache_key_still_load(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        by_key = convgen.load(Path(module.__file__).parent)
        assert by_key.__name__.startswith("convgen.cached.")
        assert pickle.loads(pickle.dumps(by_key.Conv1d)) is by_key.Conv1d

    def test_classes_functions_and_graphs_are_those_of_the_same_process(self, module: Any) -> None:
        for one in (module.Conv1d, module.conv1d):
            assert pickle.loads(pickle.dumps(one)) is one
        graph = torch.fx.symbolic_trace(network(module))
        assert torch.equal(pickle.loads(pickle.dumps(graph))(X), graph(X))

    @pytest.mark.long
    def test_say_what_is_missing_where_nothing_may_be_compiled(
        self, module: ModuleType, tmp_path: Path
    ) -> None:
        torch.save(network(module), tmp_path / "model.pt")
        done = run(
            self.LOAD,
            *(tmp_path / "model.pt", tmp_path / "y.pt"),
            CONVGEN_CACHE_DIR=str(tmp_path / "cache"),
            CONVGEN_NO_BUILD="1",
        )
        assert "conv1d_k3_p1 is not in the cache" in done.stderr.splitlines()[-1]

    def test_modules_of_two_caches_are_two(
        self, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = sys.modules["convgen.specialize"]  # the name is the function's
        monkeypatch.setattr(pipeline, "_modules", {})
        arguments: dict[str, Any] = {"kernel_size": 3, "padding": 1, "dtypes": ("f32",)}
        assert convgen.specialize("conv1d", backends="cpu", **arguments) is module
        other = export(Path(str(module.__file__)).parent, tmp_path)
        monkeypatch.setitem(cached.packages, module.__name__.rpartition(".")[2], other)
        monkeypatch.setattr(pipeline, "_modules", {})
        second = convgen.specialize("conv1d", backends="cpu", **arguments)
        assert second is not module
        assert second.__file__ == module.__file__


class TestNames:
    def test_hold_the_request(self) -> None:
        request = {"op": "conv1d", "kernel_size": [3], "dtypes": ["f32", "bf16"]}
        name = requests.module_name("conv1d_k3", request)
        assert name.isidentifier()
        assert name.startswith("conv1d_k3__")
        assert requests.read(name) == request

    @pytest.mark.parametrize("name", ["e" * 64, "conv1d_k3", "a__", "__", "a__77", "a__mfrgg"])
    def test_that_hold_none_are_others(self, name: str) -> None:
        assert requests.read(name) is None
        with pytest.raises(ModuleNotFoundError):
            __import__(f"convgen.cached.{name}.conv1d")


class TestArchives:
    """One line, in a process that has not imported the package, registers its operators."""

    LOAD = """
import convgen
folder, archive, result = sys.argv[1:]
if folder != "-":
    convgen.load(folder)
program = torch.export.load(archive).module()
torch.save(program(x), result)
"""

    @pytest.fixture
    def copied(self, module: ModuleType, tmp_path: Path) -> Path:
        """The package beside the archive, as it is handed over."""
        return export(Path(str(module.__file__)).parent, tmp_path)

    @pytest.mark.long
    def test_exported_programs(self, module: Any, copied: Path, tmp_path: Path) -> None:
        model = network(module)
        archive, result = tmp_path / "model.pt2", tmp_path / "y.pt"
        torch.export.save(torch.export.export(model, (X,)), archive)
        done = run(self.LOAD, copied, archive, result)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(result), model(X))

    @pytest.mark.long
    def test_aot_inductor_packages(self, module: Any, copied: Path, tmp_path: Path) -> None:
        model = network(module)
        archive, result = tmp_path / "aot.pt2", tmp_path / "y.pt"
        with torch.no_grad():
            program = torch.export.export(model, (X,))
            torch._inductor.aoti_compile_and_package(program, package_path=str(archive))
        load = self.LOAD.replace(
            "torch.export.load(archive).module()", "torch._inductor.aoti_load_package(archive)"
        )
        done = run(load, copied, archive, result)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(result), model(X))
        assert run(load, "-", archive, result).returncode != 0  # the line is what it takes


def test_load_takes_a_path_as_text_and_gives_the_module(module: Any, tmp_path: Path) -> None:
    copied = export(Path(module.__file__).parent, tmp_path)
    loaded = convgen.load(str(copied))
    weight: Tensor = torch.randn(3, 4, 3)
    assert torch.equal(loaded.conv1d(X, weight), module.conv1d(X, weight))
