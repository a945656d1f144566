"""`convgen scan` and `convgen swap`: what they print, and what they say of a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Package

from convgen.cli import main
from convgen.models import beside
from convgen.models.beside import Times
from convgen.models.capture import Case
from convgen.models.report import FusedRow, SwapReport

pytestmark = pytest.mark.usefixtures("shared_cache")

NETWORKS = """
from torch import nn

def vocoder(width=4):
    return nn.Sequential(
        nn.ConvTranspose1d(3, width, 4, 3, output_padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv1d(width, 2, 5, 3, padding=2),
    )

def plain(): return nn.Linear(2, 2)
def nothing(): return None
def fails(): raise RuntimeError("no weights\\nhere")
settings = {}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Package) -> None:
    for op in ("conv_transpose1d", "conv1d"):
        package(op, dtypes=("f32", "f64"), **LAYERS[op])
    (tmp_path / "vocoders.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVGEN_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.delitem(__import__("sys").modules, "vocoders", raising=False)
    # Packages for the dtype alone would be compiled for this test alone.
    survey = __import__("convgen.models.survey", fromlist=["_names"])
    monkeypatch.setattr(survey, "_names", lambda _: ("f32", "f64"))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed layers are faster by convgen."""

    def measure(case: Case, function: Any, *_: Any) -> Times:
        ours = (1.0, 1.5) if case.spec.transposed else (4.0, 1.0)
        back = float(case.backward)
        return Times((2.0, 3.0 * back), (ours[0], ours[1] * back) if function else (0.0, 0.0), True)

    monkeypatch.setattr(beside, "measure", measure)


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


SCAN = ("scan", "vocoders:vocoder", "--input", "2,3,7")


@pytest.mark.usefixtures("times")
class TestTables:
    def test_scan_before_and_after_swap(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = say(capsys, *SCAN)
        assert status == 0
        assert "conv_transpose1d_k4_s3_op2_d2 3->4 f32  [2x3x7]" in out
        assert "2 / 3" in out
        assert "--measure tells what convgen changes" in out
        status, out, _ = say(capsys, "swap", *SCAN[1:])
        assert status == 0
        assert "1 of 2 convolutions are convgen's" in out
        assert "torch: no faster" in out
        status, out, _ = say(capsys, *SCAN, "--json")
        assert status == 0
        found = json.loads(out)
        assert [row["choice"] for row in found["layers"]] == ["convgen", "torch"]
        assert found["layers"][0]["convgen_ms"] == [1.0, 1.5]
        assert found["after_ms"] == pytest.approx(sum(found["network_ms"]) - 2.5)

    def test_measures_on_request_under_autocast_and_without_gradients(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        status, out, _ = say(capsys, *SCAN, "--measure", "--inference", "--json")
        assert status == 0
        row = json.loads(out)["layers"][0]
        assert (row["torch_ms"], row["convgen_ms"]) == ([2.0, 0.0], [1.0, 0.0])
        status, out, _ = say(capsys, *SCAN, "--amp", "bf16", "--only", "0", "--json")
        assert [row["dtype"] for row in json.loads(out)["layers"]] == ["bf16"]
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")

    def test_a_chart(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        say(capsys, "swap", *SCAN[1:])
        status, _, err = say(capsys, *SCAN, "--plot", "bars.svg")
        assert status == 0, err
        assert "conv_transpose1d_k4" in (tmp_path / "bars.svg").read_text()


def test_fuse_says_what_one_kernel_computes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def swap(*_: Any, **options: Any) -> SwapReport:
        given.update(options)
        rows = (("0", "1"), "tanh", ""), (("2", "3"), "relu", "ReLU has hooks")
        return SwapReport((), "a processor", fused=tuple(FusedRow(*row) for row in rows))

    monkeypatch.setattr("convgen.models.swap.swap", swap)
    status, out, _ = say(capsys, "swap", "--fuse", *SCAN[1:])
    assert status == 0
    assert given["fuse"] is True
    assert "0 + 1: one kernel\n2 + 3: ReLU has hooks\n" in out


@pytest.mark.parametrize(
    ("network", "line"),
    [
        ("vocoders:vocodr", "vocoders has no 'vocodr': did you mean 'vocoder'?"),
        ("vocodrs:vocoder", "there is no module 'vocodrs' to import"),
        ("vocoders", "vocoders is no network: give MODULE:FACTORY"),
        ("vocoders:vocoder(width)", "is no network: give MODULE:FACTORY, or MODULE:FACTORY(...)"),
        ("vocoders:vocoder(w=1)", "makes no network: vocoder() got an unexpected keyword"),
        ("vocoders:fails", "vocoders.fails makes no network: no weights"),
        ("vocoders:settings", "vocoders.settings is a dict, which makes no network"),
        ("vocoders:nothing", "vocoders.nothing makes a NoneType, which is no torch.nn.Module"),
        ("vocoders:plain", "the network has no convolution"),
        ("vocoders:vocoder(width=7)", "the network does not take the inputs float32 [2, 2, 7]: "),
    ],
)
@pytest.mark.parametrize("command", ["scan", "swap"])
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], command: str, network: str, line: str
) -> None:
    status, out, err = say(capsys, command, network, "--input", "2,2,7")
    assert (status, out) == (2, "")
    (only,) = err.splitlines()
    assert only.startswith(f"convgen {command}: ")
    assert line in only
