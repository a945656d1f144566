"""The examples run on a CPU, from end to end."""

from __future__ import annotations

import pytest

from examples import hifigan, nnunet

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("shared_cache")]


def test_nnunet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunet, "PATCH", (1, 1, 8, 8, 8))
    nnunet.main()
    out = capsys.readouterr().out
    assert "of 13 convolutions are convgen's" in out
    assert "a step takes" in out


def test_hifigan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hifigan, "FRAMES", 4)
    monkeypatch.setattr(hifigan, "BLOCKS", hifigan.BLOCKS[:1])
    hifigan.main()
    out = capsys.readouterr().out
    assert "of 11 convolutions are convgen's" in out
    assert "a second of speech takes" in out
