"""What tests share: devices, a cache folder of their own, and packages compiled once a session."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Every test process has a pool of OpenMP threads for all cores. Threads that spin while they wait
# take the cores from the other processes, and every wait lasts many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What is compiled is compiled without optimization, also in the processes that tests start (see
# bin/c++), but for what asks for `optimized`. xdist's processes inherit both variables.
if "CONVGEN_TEST_CXX" not in os.environ:
    found = filter(shutil.which, ("c++", "g++", "clang++"))
    os.environ["CONVGEN_TEST_CXX"] = os.environ.get("CXX") or next(found, "c++")
    os.environ["CXX"] = shlex.quote(str(Path(__file__).parent / "bin" / "c++"))
# Precompiled headers of Inductor's would serve few files.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")

import pytest
import torch

import convgen

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

LAYERS: dict[str, dict[str, Any]] = {
    "conv_transpose3d": {"kernel_size": 3, "stride": 2},
    "conv_transpose2d": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "groups": 2},
    "conv_transpose1d": {"kernel_size": 4, "stride": 3, "output_padding": 2, "dilation": 2},
    "conv3d": {"kernel_size": (1, 3, 2), "padding": (0, 1, 1)},
    "conv2d": {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2), "groups": 2},
    "conv1d": {"kernel_size": 5, "stride": 3, "padding": 2},
}
"""One specification of each operator, for most tests."""

ALL_DTYPES = ("f32", "f64", "f16", "bf16")

Package = Callable[..., ModuleType]


def pytest_configure(config: pytest.Config) -> None:
    for warning in (
        "ignore:Using padding='same' with even kernel lengths",  # torch's reference says so
        "ignore:.torch.jit.script(_method)?. is deprecated",  # torch itself uses it
    ):
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _untuned() -> Iterator[None]:
    """What this machine's user has tuned must not change what tests see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_TUNED", "0")
        yield


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled packages, one for all of pytest-xdist's processes.

    CONVGEN_TEST_CACHE keeps one between sessions.
    """
    if kept := os.environ.get("CONVGEN_TEST_CACHE"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        return Path(kept)
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # Each process has a folder of its own in there.
        session = session.parent
    cache = session / "packages"
    cache.mkdir(exist_ok=True)
    return cache


@pytest.fixture(scope="module")
def shared_cache(session_cache: Path) -> Iterator[None]:
    """Lets a module's tests compile into the cache of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
        yield


@pytest.fixture(scope="session")
def package(session_cache: Path) -> Package:
    """``package("conv2d", "cpu", kernel_size=3, ...)``: a module, compiled at its first use."""

    def build(op: str, device: str = "cpu", **constants: Any) -> ModuleType:
        constants.setdefault("dtypes", ("f32", "f64"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
            return convgen.specialize(op, backends=device, **constants)

    return build


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test compiles is compiled as for users."""
    monkeypatch.setenv("CXX", os.environ["CONVGEN_TEST_CXX"])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """``"cpu"``, and ``"cuda"`` where there is a GPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Seeds torch, and gives TF32 no say in what a GPU computes as a reference."""
    torch.manual_seed(0)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
