"""Tables that anybody may have written: what is not legal is left out, and nothing else happens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from convgen.engines import tuned
from convgen.engines.registry import FAMILIES, Unit, units
from convgen.engines.tuned import TunedError, TunedWarning, Winner
from convgen.spec import ConvSpec
from convgen.spec.documents import DocumentError

SPECS = [
    ConvSpec.make(kernel_size=3, stride=2),
    ConvSpec.make("conv2d", kernel_size=3, in_channels=64, out_channels=64),
    ConvSpec.make("conv1d", kernel_size=1),
]
UNITS = {
    (unit.family, unit.problem.contraction): unit
    for spec in SPECS
    for backend, dtypes in (("cpu", ("f32",)), ("cuda", ("f64", "f32", "bf16")))
    for unit in units(backend, spec.geometry, dtypes)
}
"""One of each family and contraction."""

CODE = '1; } static int x = system("touch owned"); namespace {'
HOSTILE: list[Any] = [
    *(CODE, "", "3", None, True, False, -1, 10**9, 10**400, 1.5, 2.0),
    *(float("nan"), float("inf"), -float("inf"), {}, {"a": 1}, [[[[1]]]], [CODE], [[CODE, CODE]]),
    [[1, 2]] * 100_000,
]


def mutations(value: Any) -> Iterator[Any]:
    """A value from JSON with something hostile in each of its places in turn."""
    yield from HOSTILE
    if isinstance(value, list):
        yield from ([], [*value, *value], value[:1] * 2)
        for index, inner in enumerate(value):
            for other in mutations(inner):
                yield [*value[:index], other, *value[index + 1 :]]


def is_legal(unit: Unit, schedule: Any) -> bool:
    try:
        plan = unit.with_schedule(unit.family.read_schedule(schedule))
        reason = unit.family.refusal(plan)
    except DocumentError as error:
        reason = str(error)
    assert len(reason) < 300
    assert reason.isprintable()
    return reason == ""


@pytest.mark.parametrize("unit", UNITS.values(), ids=lambda unit: unit.name)
def test_no_field_of_any_schedule_takes_what_is_not_of_its_type_and_range(unit: Unit) -> None:
    schedule = json.loads(json.dumps(asdict(unit.default().schedule)))
    assert is_legal(unit, schedule)
    for name, value in schedule.items():
        for other in mutations(value):
            if is_legal(unit, schedule | {name: other}):
                # What is legal instead of the default is of the same types.
                read = unit.family.read_schedule(schedule | {name: other})
                assert repr(getattr(read, name)).count("'") == repr(value).count("'")
                assert "system" not in repr(read)
        assert not is_legal(unit, {key: each for key, each in schedule.items() if key != name}) or (
            name in {field.name for field in fields(unit.family.schedule_type)}
        )
    assert not is_legal(unit, schedule | {"extra": 1})
    assert not is_legal(unit, {})


def test_strings_of_a_schedule_are_of_a_closed_list() -> None:
    for family in FAMILIES:
        for field in fields(family.schedule_type):
            assert field.type != "str", (family.name, field.name)


SPEC = SPECS[0]
DGRAD = next(unit for unit in units("cpu", SPEC.geometry, ["f32"]) if "dgrad" in unit.name)
LEGAL = json.loads(json.dumps(asdict(DGRAD.default().schedule)))
ENTRY: dict[str, Any] = {
    "spec": SPEC.name,
    "contraction": "dgrad",
    "kind": "f32",
    "device": "here",
    "architecture": "",
    "size": 18,
    "channels": [32, 16],
    "schedule": LEGAL | {"buffer_bytes": 16 << 10},
    "ms": 1.0,
    "default_ms": 2.0,
    "convgen": "0.1.0",
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tuned, "_SHIPPED", tmp_path / "none")
    return tmp_path / "tuned.json"


def found() -> dict[tuple[str, str], Any]:
    return tuned.schedules(SPEC, "cpu", ["f32"], [], "here")


def write(path: Path, *entries: object) -> None:
    path.write_text(json.dumps({"version": 1, "winners": entries}))


def test_an_illegal_entry_does_not_hide_a_legal_one(path: Path) -> None:
    write(path, ENTRY, ENTRY | {"schedule": LEGAL | {"tiles": []}})
    with pytest.warns(TunedWarning, match=r"winners\[1\] \(dgrad f32 of .*tiles must be of 1 to"):
        assert found()["dgrad", "f32"].buffer_bytes == 16 << 10


@pytest.mark.parametrize("name", [field.name for field in fields(Winner)])
def test_no_field_of_a_winner_takes_anything(path: Path, name: str) -> None:
    types = {int: (int,), float: (int, float), str: (str,), list: (list,), dict: (dict,)}
    wrong = [value for value in HOSTILE if type(value) not in types[type(ENTRY[name])]]
    wrong += [10**400] if name in ("size", "channels", "ms") else []
    entries = [ENTRY | {name: value} for value in wrong]
    write(path, *entries, *HOSTILE, ENTRY)
    with pytest.warns(TunedWarning) as warned:
        assert len(found()) == 1
    messages = [str(warning.message) for warning in warned]
    assert messages[0].startswith(f"{path}, winners[0] is not used: ")
    assert messages[-1] == f"{path}: {len(entries) + len(HOSTILE) - 5} more entries are not used"
    assert all(len(message) < 400 and message.isprintable() for message in messages)


def test_what_is_no_regular_file_is_named_at_once(path: Path) -> None:
    os.mkfifo(path)
    for kind in ("a FIFO", "a device", "a folder", "a large file"):
        if kind == "a device":
            path.unlink()
            path.symlink_to("/dev/zero")
        elif kind == "a folder":
            path.unlink()
            path.mkdir()
        elif kind == "a large file":
            path.rmdir()
            with open(path, "w") as file:
                file.truncate(1 << 40)
        with pytest.raises(TunedError, match=r"cannot be read \([iI].*\): move it away, or"):
            found()


@pytest.mark.parametrize("given", ["~nobody-here/x", "~nobody-here"])
def test_a_table_below_a_home_that_does_not_exist_is_named(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuned.VARIABLE, given)
    with pytest.raises(TunedError, match=rf"={given} is nowhere .*: set CONVGEN_TUNED"):
        tuned.user_table()
