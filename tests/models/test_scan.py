"""What `convgen.scan` reports of a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from whole_networks import Volumes, Waves, made

import convgen
from convgen.engines.cost import GPUS
from convgen.models import beside, capture, layers, plots, predict, survey
from convgen.models.beside import Times
from convgen.models.errors import NetworkError

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convgen.models.scan._SECONDS", 0.01)
    monkeypatch.setattr(beside, "measure", lambda *_: Times((1.0, 2.0), (0.0, 0.0), True))


def test_counts_calls_flops_and_times_and_changes_nothing() -> None:
    model, x = made(Waves)
    before = [type(module) for module in model.modules()]
    report = convgen.scan(model, x)
    assert [type(module) for module in model.modules()] == before
    assert [row.names for row in report.rows] == [("ups.0",), ("ups.1",), ("down",), ("last",)]
    assert all(row.calls == 1 and row.torch_ms == (1.0, 2.0) for row in report.rows)
    assert all(row.convgen_ms is None for row in report.rows)  # the CPU has no model of times
    assert min(report.network_ms) > 0
    assert report.after_ms == sum(report.network_ms)
    # What torch counts, but for positions that only padding meets.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    with torch.no_grad():
        flops = sum(row.flops for row in convgen.scan(model, x).rows)
    assert 0.6 * counter.get_total_flops() < flops <= counter.get_total_flops()


def test_a_network_without_or_with_swapped_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NetworkError, match="has no convolution"):
        convgen.scan(nn.Linear(2, 2), torch.randn(2))
    layer = nn.Conv1d(2, 2, 3)
    layer.__class__ = type("Conv1d", (convgen.models.classes.Convolution, nn.Conv1d), {})
    with pytest.raises(NetworkError, match=r"convgen\.unswap it"):
        convgen.scan(layer, torch.randn(1, 2, 5))


def test_on_a_gpu_the_cost_model_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convgen.building.gpus.gpu_architectures", lambda: ("90a",))
    assert 90 in GPUS
    model, x = made(Volumes)
    found = [each for each in layers.find(model.float()) if not each.refusal]
    calls = capture.run(model, found, x.float()).calls
    times: dict[str, Any] = {}
    for name, cases in calls.items():
        (case,) = cases
        assert predict.predicted_ms(case) is None  # on the CPU
        there = capture.Case(
            **{**vars(case), "device": torch.device("cuda", 0), "autocast": torch.float16}
        )
        times[name] = predict.predicted_ms(there)
    assert all(forward > 0 and backward > 0 for forward, backward in times.values())


def test_segments_of_the_chart_add_up_to_the_network() -> None:
    model, x = made(Waves)
    report = convgen.scan(model, x)
    parts = plots.segments(report)
    assert len(parts) == 5
    assert sum(before for _, before, _ in parts) >= 12.0
    assert parts[-1][0] == "everything else"


def test_rows_are_found_again_by_name() -> None:
    model, x = made(Volumes)
    report = convgen.scan(model, x, only=["up", "other"])
    assert report.left["other"].startswith("OwnForward.forward")
    assert report.to_dict()["layers"][0]["names"] == ("up",)
    assert survey.name_of(torch.device("cpu")) == report.device
