"""Tables of tuned schedules: reading, writing, and what generate takes from them."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plans
import pytest

from convgen.building.processor import processor_name
from convgen.engines import tuned
from convgen.engines.registry import units
from convgen.engines.tuned import TunedError, TunedWarning, Winner
from convgen.measuring.layers import read_suite
from convgen.spec import ConvSpec
from convgen.specialize import generate
from convgen.tuning import tables

SPEC = ConvSpec.make(kernel_size=3, stride=2)
DEFAULT = plans.plan(SPEC, "dgrad", "tf32").schedule
OTHER = replace(DEFAULT, tiles=((1, 16), (2, 8)))


def as_json(schedule: Any) -> dict[str, Any]:
    """The fields of a schedule as a table gives them back."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(schedule)))
    return fields


def winner(**changes: object) -> Winner:
    base = Winner(
        spec=SPEC.name,
        contraction="dgrad",
        kind="tf32",
        device="NVIDIA H200",
        architecture="90a",
        size=18,
        channels=(32, 16),
        schedule=as_json(OTHER),
        ms=1.0,
        default_ms=2.0,
        convgen="0.1.0",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "_SHIPPED", tmp_path / "none")
    return path


def found(archs: tuple[str, ...] = ("90a",), **arguments: object) -> dict[tuple[str, str], object]:
    return tuned.schedules(SPEC, "cuda", ["f32"], archs, "", **arguments)  # type: ignore[arg-type]


class TestTable:
    def test_without_a_table_there_is_nothing(self, table: Path) -> None:
        assert found() == {}
        assert tuned.read(table) == []

    def test_a_winner_is_found_again(self, table: Path) -> None:
        assert tables.store([winner()], table) == 1
        assert tuned.read(table) == [winner()]
        assert found() == {("dgrad", "tf32"): OTHER}

    def test_a_newer_one_of_the_same_key_replaces_it(self, table: Path) -> None:
        tables.store([winner(), winner(size=3)], table)
        assert tables.store([winner(schedule=as_json(DEFAULT), ms=3.0)], table) == 2
        assert found()["dgrad", "tf32"] == DEFAULT

    @pytest.mark.parametrize(
        ("archs", "hits"),
        [(("90a",), 1), (("90",), 1), (("80", "90a+ptx"), 1), (("80+ptx",), 0), ((), 0)],
    )
    def test_gpus_go_by_their_architecture(
        self, table: Path, archs: tuple[str, ...], hits: int
    ) -> None:
        tables.store([winner()], table)
        assert len(found(archs)) == hits

    def test_a_schedule_that_counts_on_warpgroups_is_for_their_architecture_alone(
        self, table: Path
    ) -> None:
        """By mma.sync, which has fewer registers, it would spill."""
        grouped = replace(DEFAULT, tiles=((3, 32), (2, 24)))
        plan = plans.plan(SPEC, "dgrad", "tf32")
        assert plan.family.refusal(replace(plan, schedule=grouped)) == ""
        tables.store([winner(schedule=as_json(grouped))], table)
        assert found(("90a",)) == {("dgrad", "tf32"): grouped}
        assert found(("90",)) == found(("80", "90a")) == {}
        # Where it was measured it is judged by its time.
        tables.store([winner(schedule=as_json(grouped), architecture="80")], table)
        assert found(("80",)) == {("dgrad", "tf32"): grouped}

    def test_16_bit_modes_share_winners(self, table: Path) -> None:
        """Their products take equally long."""

        def found(dtype: str) -> dict[tuple[str, str], Any]:
            return tuned.schedules(SPEC, "cuda", [dtype], ["90a"], "")

        tables.store([winner(kind="bf16tc")], table)
        assert found("f16") == {("dgrad", "f16tc"): OTHER}
        assert found("bf16") == {("dgrad", "bf16tc"): OTHER}
        assert found("f32") == {}
        tables.store([winner(kind="f16tc", schedule=as_json(DEFAULT))], table)
        assert found("f16") == {("dgrad", "f16tc"): DEFAULT}
        assert found("bf16") == {("dgrad", "bf16tc"): OTHER}

    def test_processors_go_by_their_name(self, table: Path) -> None:
        schedule = plans.plan(SPEC, "fprop", "f32", "cpu").schedule
        entry = winner(
            contraction="fprop",
            kind="f32",
            device="Fast",
            architecture="",
            schedule=as_json(schedule),
        )
        tables.store([entry], table)
        for name, expected in (("Fast", {("fprop", "f32"): schedule}), ("Other", {})):
            assert tuned.schedules(SPEC, "cpu", ["f32"], (), name) == expected
        assert found() == {}

    def test_of_several_sizes_the_longest_counts_or_the_nearest(self, table: Path) -> None:
        tables.store([winner(), winner(size=24, ms=9.0, schedule=as_json(DEFAULT))], table)
        assert found()["dgrad", "tf32"] == DEFAULT
        assert found(size=19)["dgrad", "tf32"] == OTHER
        assert found(size=23)["dgrad", "tf32"] == DEFAULT

    def test_sizes_are_binary_logarithms(self) -> None:
        assert tuned.size_class(2, (64, 64, 64)) == 19
        assert tuned.size_class(1, (1, 1, 1)) == 0

    def test_the_users_table_comes_before_the_packages(
        self, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tuned, "_SHIPPED", tmp_path)
        tables.store([winner()], tmp_path / "h200.json")
        assert found()["dgrad", "tf32"] == OTHER
        tables.store([winner(schedule=as_json(DEFAULT))], table)
        assert found()["dgrad", "tf32"] == DEFAULT

    def test_switched_off(self, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tables.store([winner()], table)
        monkeypatch.setenv(tuned.VARIABLE, "0")
        assert found() == {}
        assert tuned.user_table() is None

    def test_the_default_place_is_the_data_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(tuned.VARIABLE)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert tuned.user_table() == tmp_path / "convgen" / "tuned.json"
        monkeypatch.setenv("XDG_DATA_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tuned.user_table() == tmp_path / ".local" / "share" / "convgen" / "tuned.json"


class TestFaults:
    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "null", '{"version": 1}', '{"version": 1, "winners": {}}'),
            *('{"version": 2, "winners": []}', '{"version": true, "winners": []}'),
            *("[" * 100_000, '{"version": 1, "winners": [' + "[" * 100_000, "\udcff"),
        ],
        ids=lambda text: text[:30],
    )
    def test_a_damaged_table_is_named_and_not_overwritten(self, table: Path, text: str) -> None:
        table.parent.mkdir()
        table.write_text(text, errors="surrogateescape")
        for use in (found, lambda: tables.store([winner()], table)):
            with pytest.raises(
                TunedError, match=r"tuned\.json cannot be read .* move it away, or set"
            ):
                use()
        assert table.read_text(errors="surrogateescape") == text

    def test_an_entry_that_is_none_is_left_out_and_kept_in_the_file(self, table: Path) -> None:
        tables.store([winner(), winner(contraction="wgrad")], table)
        data = json.loads(table.read_text())
        del data["winners"][1]["kind"]
        table.write_text(json.dumps(data))
        with pytest.warns(TunedWarning, match=r"winners\[1\] is not used: it lacks kind$"):
            assert tuned.read(table) == [winner()]
        assert tables.store([winner(size=3)], table) == 2
        assert json.loads(table.read_text())["winners"][-1] == data["winners"][1]

    def test_a_schedule_that_cannot_be_is_left_out_with_a_warning(self, table: Path) -> None:
        illegal = replace(DEFAULT, tiles=((2, 16), (8, 64)))
        tables.store([winner(schedule=as_json(illegal))], table)
        with pytest.warns(TunedWarning, match=r"dgrad tf32 .* not used: .* spill; .*tune again"):
            assert found() == {}

    def test_a_schedule_of_another_version_is_left_out_with_a_warning(self, table: Path) -> None:
        tables.store([winner(schedule={"tile": 3})], table)
        with pytest.warns(TunedWarning, match="has no field tile"):
            assert found() == {}

    def test_a_schedule_with_one_number_of_rows_is_of_another_version(self, table: Path) -> None:
        fields = {name: value for name, value in as_json(OTHER).items() if name != "tiles"}
        tables.store([winner(schedule=fields | {"rows": 2, "channels": [16, 8]})], table)
        with pytest.warns(
            TunedWarning, match="has no field channels, rows; run convgen tune again"
        ):
            assert found() == {}

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TunedError, match=r"cannot write the table .* set CONVGEN_TUNED"):
            tables.store([winner()], tmp_path / "file" / "tuned.json")

    def test_processes_that_store_at_once_lose_nothing(self, table: Path) -> None:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_store_some, args=(table, n)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert len(tuned.read(table)) == 3 * 5
        assert [path.name for path in table.parent.iterdir() if path != table] == [
            "tuned.json.lock"
        ]


def _store_some(path: Path, process: int) -> None:
    for size in range(5):
        tables.store([winner(size=10 * process + size)], path)


def test_this_version_can_have_every_schedule_of_the_packages_tables() -> None:
    layers = [layer for name in ("kernelbench3d", "models") for layer in read_suite(name)]
    specs = {layer.spec.name: layer.spec for layer in layers}
    winners = [winner for path in tuned._SHIPPED.glob("*.json") for winner in tuned.read(path)]
    assert winners
    for each in winners:
        geometry = specs[each.spec].geometry
        found = {unit.key: unit for unit in units("cuda", geometry, ["f32", "bf16"])}
        unit = found[each.contraction, each.kind]
        schedule = unit.family.read_schedule(each.schedule)
        # Fields that came later have their defaults.
        assert as_json(schedule) == as_json(schedule) | dict(each.schedule)
        assert unit.family.refusal(unit.with_schedule(schedule)) == "", each


def test_the_packages_tables_hold_what_is_clearly_faster_than_the_default() -> None:
    winners = [winner for path in tuned._SHIPPED.glob("*.json") for winner in tuned.read(path)]
    assert not [each for each in winners if tuned.GAIN * each.ms > each.default_ms]


def test_generate_takes_the_tables_schedules(
    table: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
    spec = ConvSpec.make("conv1d", kernel_size=3)
    default = plans.plan(spec, "fprop", "f32", "cpu").schedule
    schedule = replace(default, buffer_bytes=16 << 10)
    entry = winner(
        spec=spec.name,
        contraction="fprop",
        kind="f32",
        device=processor_name(),
        architecture="",
        schedule=as_json(schedule),
    )
    tables.store([entry], table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        package = generate(spec, dtypes=["f32"], backends="cpu")
    kernels = json.loads((package / "spec.json").read_text())["backends"]["cpu"]["kernels"]
    chosen = {kernel["contraction"]: kernel["schedule"] for kernel in kernels}
    assert chosen["fprop"]["buffer_bytes"] == 16 << 10
    assert chosen["dgrad"]["buffer_bytes"] == default.buffer_bytes
