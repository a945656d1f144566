"""``convgen tune``: what it compiles, what may win, and what it keeps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convgen import cli
from convgen.building.processor import processor_name
from convgen.engines import tuned
from convgen.engines.cost import H200
from convgen.engines.registry import AnyPlan, Unit
from convgen.measuring.layers import Layer
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.tuning import choice, jobs, tables, tune

CPU = torch.device("cpu")
SPEC = ConvSpec.make("conv2d", kernel_size=3, padding=1)
LAYER = Layer("small", SPEC, (2, 5, 12, 19), 6, False)


pytestmark = pytest.mark.usefixtures("shared_cache")


def outcomes(most: int = 2, layer: Layer = LAYER, dtype: str = "f32") -> list[jobs.Outcome]:
    found = [choice.candidates(job, H200, most) for job in jobs.jobs([layer], "cpu", dtype, True)]
    tune.compile_candidates(found, "cpu")
    return found


class TestJobs:
    def kinds(
        self, layer: Layer, backend: str = "cuda", dtype: str = "f32", **more: Any
    ) -> set[str]:
        return {job.kind for job in jobs.jobs([layer], backend, dtype, **{"tf32": True} | more)}

    def test_are_what_a_module_would_take(self) -> None:
        assert self.kinds(LAYER) == {"tf32"}
        assert self.kinds(LAYER, tf32=False) == {"tf32x3"}
        assert self.kinds(LAYER, dtype="f16") == {"f16tc"}
        assert self.kinds(LAYER, dtype="f64") == {"f64"}
        assert self.kinds(LAYER, "cpu") == {"f32"}
        depthwise = replace(SPEC, groups=16)
        assert self.kinds(Layer("depthwise", depthwise, (1, 16, 9, 9), 16, False)) == {"f32"}

    def test_channels_are_fixed_on_request(self) -> None:
        (job, *_) = jobs.jobs([LAYER], "cuda", "f32", True, fixed_channels=True)
        assert (job.spec.in_channels, job.spec.out_channels) == (5, 6)
        assert job.call.coarse_channels == 6
        assert job.call.fine_extent == (1, 12, 19)

    def test_candidates_are_the_default_and_then_the_models_best(self) -> None:
        layer = Layer("68", ConvSpec.make(kernel_size=(3, 5, 5)), (16, 32, 64, 64, 64), 64, False)
        job = jobs.jobs([layer], "cuda", "f32", True, ["dgrad"])[0]
        outcome = choice.candidates(job, H200, 6)
        assert outcome.default.is_default
        assert outcome.considered > 50
        times = [candidate.predicted.ms for candidate in outcome.candidates[1:]]
        assert len(times) == 5
        assert times == sorted(times)
        assert times[0] < outcome.default.predicted.ms

    def test_what_the_tables_hold_defends_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (job,) = jobs.jobs([LAYER], "cuda", "bf16", True, ["dgrad"])
        worst = max(choice.candidates(job, H200, 999).candidates, key=lambda c: c.predicted.ms)
        entry = tuned.Winner(
            spec=SPEC.name,
            contraction="dgrad",
            kind="bf16tc",
            device="GPU",
            architecture="90a",
            size=tuned.size_class(2, (12, 19)),
            channels=(6, 5),
            schedule=dataclasses.asdict(worst.plan.schedule),
            ms=1.0,
            default_ms=2.0,
            convgen="0",
        )
        table = tmp_path / "table.json"
        tables.store([entry], table)
        monkeypatch.setenv(tuned.VARIABLE, str(table))
        for architectures, held in (["90a"], True), ([], False), (["80"], False):
            for most in (2, 4):
                found = choice.candidates(job, H200, most, architectures).candidates
                schedules = [c.plan.schedule for c in found]
                assert len(set(schedules)) == len(schedules) == most
                assert found[0].is_default
                assert (schedules[1] == worst.plan.schedule) == held

    @pytest.mark.parametrize(
        ("architectures", "name"),
        [
            ((), "H200"),
            (("90a",), "H200"),
            (("87",), "A6000"),
            (("103a",), "B200"),
            (("70",), "T4"),
        ],
    )
    def test_the_model_knows_a_gpu_of_every_architecture(
        self, architectures: tuple[str, ...], name: str
    ) -> None:
        assert name in choice.gpu_of(architectures).name


class TestLayersOfOneSpecification:
    WORK = jobs.jobs([LAYER, Layer("wide", SPEC, (1, 40, 9, 9), 33, False)], "cuda", "f32", True)

    def timed(self, *times: tuple[float, float]) -> list[jobs.Outcome]:
        """Two layers whose first candidates took so long, each of the pair in one of them."""
        work = [job for job in self.WORK if job.contraction == "dgrad"]
        found = choice.all_candidates(work, H200, 4)
        schedules = [c.plan.schedule for c in found[0].candidates[: len(times)]]
        for index, outcome in enumerate(found):
            for candidate in outcome.candidates:
                if candidate.plan.schedule in schedules:
                    pair = times[schedules.index(candidate.plan.schedule)]
                    candidate.times_ms = [pair[index]] * 3
        choice.agree(found)
        return found

    def test_try_each_others_candidates(self) -> None:
        for contraction in CONTRACTIONS:
            work = [job for job in self.WORK if job.contraction == contraction]
            alone = [choice.candidates(job, H200, 4) for job in work]
            wanted = {c.plan.schedule for outcome in alone for c in outcome.candidates}
            for outcome in choice.all_candidates(work, H200, 4):
                schedules = [c.plan.schedule for c in outcome.candidates]
                assert set(schedules) == wanted
                assert len(schedules) == len(wanted)
                assert [c.is_default for c in outcome.candidates].index(True) == 0

    def test_choose_the_schedule_that_suits_them_together(self) -> None:
        # The second and the third are each the best of one layer; the third loses less.
        found = self.timed((1.0, 1.0), (0.5, 0.9), (0.6, 0.5))
        schedule = found[0].candidates[2].plan.schedule
        for outcome in found:
            assert outcome.best is not None
            assert outcome.best.plan.schedule == schedule

    def wanting(self, *times_ms: dict[str, float]) -> list[jobs.Outcome]:
        """Layers of 48 and of 24 output channels, with times by the tile that they take.

        Schedules of the two numbers of channels alone, in all the same rows.
        """
        spec = ConvSpec.make(kernel_size=3)
        layers = [Layer(str(c), spec, (2, 48, 64, 64, 64), c, False) for c in (48, 24)]
        found = [
            choice.candidates(job, H200, 1)
            for job in jobs.jobs(layers, "cuda", "f32", True, ["dgrad"])
        ]
        for outcome, channels, times in zip(found, (48, 24), times_ms, strict=True):
            default = outcome.default
            for tiles in (((3, 48), (3, 24)), ((4, 48), (4, 24))):
                schedule = replace(default.plan.schedule, tiles=tiles)
                plan = replace(default.plan, schedule=schedule)
                tile = next(f"{rows}x{each}" for rows, each in tiles if each == channels)
                outcome.candidates.append(
                    jobs.Candidate(plan, default.predicted, False, times_ms=[times[tile]] * 3)
                )
        choice.agree(found)
        return found

    def test_combine_the_tiles_that_each_of_them_is_fastest_with(self) -> None:
        found = self.wanting({"3x48": 1.25, "4x48": 1.5}, {"3x24": 3.29, "4x24": 2.79})
        plan = choice.combined(found)
        assert plan is not None
        assert plan.schedule.tiles == ((3, 48), (4, 24))
        # Nothing to gain: one schedule is the best of both; or they differ by noise.
        assert choice.combined(self.wanting({"3x48": 1, "4x48": 2}, {"3x24": 1, "4x24": 2})) is None
        close = self.wanting({"3x48": 1.00, "4x48": 1.5}, {"3x24": 1.01, "4x24": 1.0})
        assert choice.combined(close) is None

    @pytest.mark.parametrize("outcome", ["right", "wrong", "slow"])
    def test_what_they_combine_is_verified_and_timed_before_it_wins(
        self, monkeypatch: pytest.MonkeyPatch, outcome: str
    ) -> None:
        found = self.wanting({"3x48": 1.25, "4x48": 1.5}, {"3x24": 3.29, "4x24": 2.79})
        compiled: list[object] = []

        def compile_candidates(outcomes: list[jobs.Outcome], backend: str) -> None:
            assert backend == "cpu"
            compiled.extend(c.plan.schedule.tiles for o in outcomes for c in o.candidates)

        def race(
            of: jobs.Outcome,
            clock: object,
            device: object,
            deadline: float,
            seed: int,
            contenders: list[jobs.Candidate],
        ) -> None:
            agreed, new = contenders
            assert agreed is of.agreed
            assert new is of.candidates[-1]
            new.times_ms = [9.0] if outcome == "slow" else [0.9]
            new.note = "wrong" if outcome == "wrong" else ""

        monkeypatch.setattr(tune, "compile_candidates", compile_candidates)
        monkeypatch.setattr(tune, "_race", race)
        agreed = found[0].agreed
        assert agreed is not None
        tune._race_combined(found, tune.clock_for(CPU), CPU, H200, 0.0, 0)
        assert compiled == [((3, 48), (4, 24))] * 2
        for each in found:
            assert each.best is not None
            tiles = each.best.plan.schedule.tiles
            assert tiles == (
                ((3, 48), (4, 24)) if outcome == "right" else agreed.plan.schedule.tiles
            )

    def test_one_layer_chooses_alone(self) -> None:
        (outcome,) = choice.all_candidates([self.WORK[0]], H200, 4)
        outcome.candidates[0].times_ms = [1.0]
        outcome.candidates[1].times_ms = [0.5]
        choice.agree([outcome])
        assert outcome.best is outcome.candidates[1]


class TestRace:
    def test_everything_is_verified_and_timed(self) -> None:
        found = outcomes()
        seen: list[int] = []
        winners = tune.tune(found, CPU, seconds=3, on_job=lambda _, done: seen.append(done))
        assert seen == [1, 2, 3]
        assert [winner.contraction for winner in winners] == list(CONTRACTIONS)
        for outcome, winner in zip(found, winners, strict=True):
            assert len(outcome.candidates) == 2
            for candidate in outcome.candidates:
                assert candidate.note == ""
                assert 0 <= candidate.error < 1e-6
                assert candidate.spread is not None
            assert outcome.best is not None
            assert winner.schedule == dataclasses.asdict(outcome.best.plan.schedule)
            assert (winner.spec, winner.kind) == (SPEC.name, "f32")
            assert (winner.size, winner.channels) == (9, (6, 5))
            assert (winner.device, winner.architecture) == (processor_name(), "")
            json.dumps(outcome.to_dict(), allow_nan=False)

    @pytest.mark.long
    def test_layers_that_combine_compile_and_race_once_more(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On the CPU, whose engine combines nothing by itself."""
        work = jobs.jobs([LAYER, replace(LAYER, name="again")], "cpu", "f32", True, ["fprop"])
        found = choice.all_candidates(work, H200, 2)
        tune.compile_candidates(found, "cpu")
        default = found[0].default.plan
        plan = replace(default, schedule=replace(default.schedule, buffer_bytes=16 << 10))
        monkeypatch.setattr(tune, "combined", lambda group: plan)
        winners = tune.tune(found, CPU, seconds=2)
        for outcome in found:
            new = outcome.candidates[-1]
            assert new.plan == plan
            assert new.note == ""
            assert 0 <= new.error < 1e-6
            assert new.spread is not None
        assert winners[0].schedule == winners[1].schedule

    @pytest.mark.long
    def test_a_wrong_schedule_cannot_win(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = tune.render_unit
        other = replace(SPEC, padding=2)

        def planted(spec: ConvSpec, unit: Unit, plan: AnyPlan) -> str:
            """Kernels of another padding in place of all but the defaults."""
            if plan == unit.default():
                return real(spec, unit, plan)
            problem = replace(plan.problem, geometry=other.geometry)
            return real(other, unit, replace(plan, problem=problem))

        monkeypatch.setattr(tune, "render_unit", planted)
        found = outcomes()
        assert len(tune.tune(found, CPU, seconds=3)) == 3
        for outcome in found:
            default, wrong = outcome.candidates
            assert wrong.note.startswith("wrong: error ")
            assert wrong.spread is None
            assert outcome.best is default

    @pytest.mark.long
    def test_a_kernel_that_refuses_the_call_cannot_win(self) -> None:
        layer = replace(LAYER, input_shape=(2, 4, 12, 19), out_channels=4)
        found = outcomes(1)
        for outcome in found:  # compiled for other channels than it is called with
            outcome.candidates[0].library = outcomes_of_fixed(outcome, layer)
        assert tune.tune(found, CPU, seconds=2) == []
        for outcome in found:
            assert "channel counts differ" in outcome.candidates[0].note
            assert outcome.best is None
            assert outcome.gain is None

    def test_without_time_nothing_wins(self) -> None:
        found = outcomes(1)
        assert tune.tune(found, CPU, seconds=1e-9) == []
        assert found[-1].candidates[0].note == "not run: the seconds were used up"

    def test_noise_does_not_replace_the_default(self) -> None:
        outcome = outcomes()[0]
        default, other = outcome.candidates
        default.times_ms, other.times_ms = [1.0, 1.0, 1.0], [0.99, 0.99, 0.99]
        assert outcome.best is default  # by less than two percent
        other.times_ms = [0.5, 0.9, 1.5]
        assert outcome.best is default  # within the spread
        other.times_ms = [0.8, 0.8, 0.9]
        assert outcome.best is other
        assert outcome.gain == pytest.approx(1.25)
        assert set(outcome.changes(other)) < set(outcome.changes(default))


def outcomes_of_fixed(outcome: jobs.Outcome, layer: Layer) -> Path:
    """The library of an outcome's contraction for a layer's channels alone."""
    work = jobs.jobs([layer], "cpu", "f32", True, [outcome.job.contraction], fixed_channels=True)
    fixed = [choice.candidates(job, H200, 1) for job in work]
    tune.compile_candidates(fixed, "cpu")
    library = fixed[0].candidates[0].library
    assert library is not None
    return library


class TestCommand:
    ONE_LAYER = ("--op", "conv2d", "--kernel", "3", "--padding", "1", "--shape", "2,5,12,19")

    def run(self, *words: str) -> int:
        arguments = ["tune", *self.ONE_LAYER, "--out-channels", "6", *words]
        return cli.main(arguments)

    def test_winners_are_kept_and_generate_reads_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table, figures = tmp_path / "tuned.json", tmp_path / "figures.json"
        monkeypatch.setenv(tuned.VARIABLE, str(table))
        words = ("--device", "cpu", "--candidates", "2", "--seconds", "3", "--contraction", "fprop")
        assert self.run(*words, "--json", str(figures)) == 0
        printed = capsys.readouterr().out
        assert f"1 winners are in {table}, which holds 1." in printed
        assert "fprop f32" in printed
        (winner,) = tuned.read(table)
        assert winner.ms <= winner.default_ms
        (outcome,) = json.loads(figures.read_text())["outcomes"]
        assert [c["won"] for c in outcome["candidates"]].count(True) == 1
        schedules = tuned.schedules(SPEC, "cpu", ["f32"], (), processor_name())
        assert list(schedules) == [("fprop", "f32")]

    def test_a_dry_run_needs_no_gpu_and_writes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned.json"))
        assert self.run("--device", "cuda", "--dry-run") == 0
        printed = capsys.readouterr().out
        assert "dgrad tf32" in printed
        assert "legal schedules" in printed
        assert list(tmp_path.iterdir()) == []

    def test_tables_that_are_off_need_one_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run("--device", "cpu") == 2
        assert "give --table" in capsys.readouterr().err

    def test_a_damaged_table_is_found_before_the_work(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = tmp_path / "tuned.json"
        table.write_text("nonsense")
        assert self.run("--device", "cpu", "--table", str(table)) == 1
        assert "cannot be read" in capsys.readouterr().err
        assert table.read_text() == "nonsense"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    layer = Layer("up", ConvSpec.make(kernel_size=3, stride=2), (2, 24, 6, 9, 17), 16, False)
    found = [
        choice.candidates(job, H200, 3)
        for tf32 in (True, False)
        for job in jobs.jobs([layer], "cuda", "f32", tf32)
    ]
    tune.compile_candidates(found, "cuda")
    winners = tune.tune(found, torch.device("cuda"), seconds=10)
    assert [winner.kind for winner in winners] == 3 * ["tf32"] + 3 * ["tf32x3"]
    assert all(winner.architecture for winner in winners)
