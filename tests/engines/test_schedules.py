"""The families' schedules: defaults are legal, refusals have reasons, the model is about right."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import plans
import pytest

from convgen.codegen.render import TEMPLATES, render_unit
from convgen.engines.cost import GPUS, H200, typical_calls
from convgen.engines.mma.fit import WARPGROUP_CHANNELS
from convgen.engines.problem import Call
from convgen.engines.registry import AnyPlan, Unit, units
from convgen.measuring.layers import Layer, read_suite, suites
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.spec.documents import DocumentError
from convgen.tuning.jobs import call_of

LAYERS = {layer.name.split("-")[0]: layer for layer in read_suite("kernelbench3d")}
SPECS = [
    ConvSpec.make(kernel_size=3, stride=2),
    ConvSpec.make(kernel_size=2, stride=2, in_channels=64, out_channels=32),
    ConvSpec.make(kernel_size=(3, 5, 5)),
    ConvSpec.make("conv3d", kernel_size=7, stride=2, padding=3, in_channels=16, out_channels=40),
    ConvSpec.make("conv2d", kernel_size=(1, 9), dilation=2, groups=4),
    ConvSpec.make("conv_transpose1d", kernel_size=16, stride=8, padding=4),
    ConvSpec.make("conv_transpose1d", kernel_size=40, stride=20),
    ConvSpec.make("conv3d", kernel_size=3, padding=1, groups=64, in_channels=64, out_channels=64),
]
DTYPES = {"cpu": ("f32", "f64", "bf16"), "cuda": ("f32", "f64", "f16")}


def defaults(spec: ConvSpec) -> list[tuple[Unit, AnyPlan]]:
    """The default of every unit that may be compiled for a specification."""
    return [
        (unit, unit.default())
        for backend, dtypes in DTYPES.items()
        for unit in units(backend, spec.geometry, dtypes)
    ]


def plan_of(layer: Layer, contraction: str, kind: str) -> tuple[Unit, AnyPlan]:
    unit = plans.unit(layer.spec, contraction, kind)
    return unit, unit.default()


class TestSpace:
    @pytest.mark.long
    def test_defaults_are_legal_for_every_layer_of_the_suites(self) -> None:
        for layer in {layer for name in suites() for layer in read_suite(name)}:
            for spec in (layer.spec, layer.fixed()):
                for unit, plan in defaults(spec):
                    assert unit.family.refusal(plan) == "", (spec.name, plan)

    @pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
    def test_candidates_are_distinct_the_default_among_them_and_refusals_say_why(
        self, spec: ConvSpec
    ) -> None:
        for unit, default in defaults(spec):
            space = unit.family.candidates(unit.problem)
            schedules = [candidate.schedule for candidate in space]
            assert len(set(schedules)) == len(schedules)
            assert [c.refusal for c in space if c.schedule == default.schedule] == [""]
            for candidate in space:
                legal = unit.family.refusal(replace(default, schedule=candidate.schedule)) == ""
                # A space may leave out more than what cannot be: what is likely to spill.
                assert legal or candidate.refusal
                assert candidate.refusal == "" or len(candidate.refusal.split()) > 3

    def test_a_large_space_has_choices_and_refusals(self) -> None:
        unit = plans.unit(LAYERS["68"].spec, "dgrad", "tf32")
        space = unit.family.candidates(unit.problem)
        legal = {c.schedule.unroll for c in space if not c.refusal}
        assert legal >= {"taps", "slab", "plane", "line"}
        reasons = " ".join(c.refusal for c in space)
        for word in ("spill", "shared memory", "registers"):
            assert word in reasons

    @pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
    def test_schedules_survive_json(self, spec: ConvSpec) -> None:
        for unit, plan in defaults(spec):
            text = json.dumps(dataclasses.asdict(plan.schedule))
            assert unit.family.read_schedule(json.loads(text)) == plan.schedule

    def test_each_tile_is_judged_by_its_own_rows(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")

        def refusal(*tiles: tuple[int, int]) -> str:
            return unit.family.refusal(replace(plan, schedule=replace(plan.schedule, tiles=tiles)))

        assert refusal((3, 48), (4, 24), (6, 16)) == ""
        assert refusal((6, 16)) == ""
        assert "products of a warp spill" in refusal((3, 24), (6, 48))
        assert "tiles are told apart by their channels" in refusal((3, 48), (4, 48))
        assert "tiles are told apart by their channels" in refusal()

    def test_three_warpgroups_are_for_tiles_that_leave_them_registers(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")

        def refusal(warpgroups: int, *tiles: tuple[int, int]) -> str:
            schedule = replace(plan.schedule, warpgroups=warpgroups, tiles=tiles)
            return unit.family.refusal(replace(plan, schedule=schedule), ["90a"])

        assert refusal(2, (4, 48)) == refusal(3, (3, 48), (6, 16)) == ""
        assert "spill" in refusal(3, (4, 48))
        assert "24 channels or more" in refusal(3, (6, 16))
        assert "2 or 3 warpgroups" in refusal(4, (3, 48))
        space = unit.family.candidates(unit.problem)
        assert {c.schedule.warpgroups for c in space if not c.refusal} == {2, 3}

    def test_vectors_are_for_taps_that_are_unrolled(self) -> None:
        unit, plan = plan_of(LAYERS["73"], "fprop", "tf32")

        def refusal(plan: AnyPlan) -> str:
            return unit.family.refusal(replace(plan, schedule=replace(plan.schedule, vectors=True)))

        assert refusal(plan) == ""
        long = ConvSpec.make("conv1d", kernel_size=80, stride=2)
        assert "loops over taps" in refusal(plans.plan(long, "fprop", "tf32"))
        space = unit.family.candidates(unit.problem)
        assert {c.schedule.vectors for c in space if not c.refusal} == {False, True}

    def test_lanes_have_neighbouring_positions_where_pairs_of_columns_fit(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")

        def refusal(plan: AnyPlan, **changes: object) -> str:
            schedule = replace(plan.schedule, pairs=True, **changes)
            return unit.family.refusal(replace(plan, schedule=schedule), ["90a"])

        assert refusal(plan, tiles=((3, 48), (3, 16))) == ""
        assert "pairs of columns take 144" in refusal(plan, tiles=((4, 48),))
        assert "pairs of columns take 112" in refusal(plan, tiles=((3, 48),), warpgroups=3)
        assert "vectors" in refusal(plan, tiles=((3, 48),), vectors=True)
        line = ConvSpec.make("conv1d", kernel_size=5)
        assert "scattered" in refusal(plans.plan(line, "fprop", "tf32"))
        _, strided = plan_of(LAYERS["73"], "fprop", "tf32")
        assert "strided" in refusal(strided, tiles=((2, 32),))
        space = unit.family.candidates(unit.problem)
        assert {c.schedule.pairs for c in space if not c.refusal} == {False, True}

    @pytest.mark.parametrize(
        ("layer", "contraction", "mode", "tile"),
        [("58", "dgrad", "tf32", (6, 24)), ("72", "fprop", "tf32", (4, 16))],
    )
    def test_what_may_spill_elsewhere_is_for_where_it_was_measured(
        self, layer: str, contraction: str, mode: str, tile: tuple[int, int]
    ) -> None:
        """Both spill for sm_90, and neither for sm_80."""
        unit, plan = plan_of(LAYERS[layer], contraction, mode)
        plan = replace(plan, schedule=replace(plan.schedule, unroll="slab", tiles=(tile,)))
        for measured in (), ("90a",), ("80",):
            assert unit.family.refusal(plan, measured) == ""
        for elsewhere in ("90",), ("80", "120"):
            assert "and spill" in unit.family.refusal(plan, elsewhere)

    def test_a_prediction_is_that_of_the_tile_which_the_call_takes(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")

        def time(layer: str, *tiles: tuple[int, int]) -> float:
            other = replace(plan, schedule=replace(plan.schedule, tiles=tiles))
            return unit.predict(other, call_of(LAYERS[layer]), H200).ms

        for layer, tile in ("61", (3, 48)), ("70", (4, 24)):
            assert time(layer, (3, 48), (4, 24)) == time(layer, tile)
        assert time("70", (3, 48), (3, 24)) == time("70", (3, 24)) > time("70", (4, 24))

    def test_layers_combine_the_tiles_that_each_of_them_takes(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")

        def combine(*choices: tuple[str, tuple[tuple[int, int], ...]]) -> object:
            return unit.family.combine(
                [
                    (
                        replace(plan, schedule=replace(plan.schedule, tiles=tiles)),
                        call_of(LAYERS[layer]),
                    )
                    for layer, tiles in choices
                ]
            )

        ours, theirs = ("61", ((3, 48), (3, 32), (3, 16))), ("70", ((4, 48), (4, 24)))
        combined = combine(ours, theirs)
        assert combined == replace(plan.schedule, tiles=((3, 48), (3, 32), (4, 24), (3, 16)))
        # 61 would take the 48 channels of 70's.
        assert combine(("61", ((4, 24), (4, 16))), ("70", ((3, 24),))) is None
        assert combine(("61", ((3, 24),)), ("70", ((3, 24),))) == replace(
            plan.schedule, tiles=((3, 24),)
        )
        slab = replace(plan, schedule=replace(plan.schedule, unroll="slab"))
        call = call_of(LAYERS["61"])
        assert unit.family.combine([(plan, call), (slab, call)]) is None
        wgrad = plans.plan(plan.geometry, "wgrad", "tf32")
        assert wgrad.family.combine([(wgrad, call)]) is None

    def test_fields_of_another_schedule_are_refused(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "wgrad", "tf32")
        with pytest.raises(DocumentError, match="it has no field unroll"):
            unit.family.read_schedule({"unroll": "full"})
        wrong = replace(plan, schedule=replace(plan.schedule, taps_w=9))
        assert "taps do not fill" in unit.family.refusal(wrong)

    def test_every_legal_schedule_of_a_small_space_renders(self) -> None:
        spec = SPECS[0]
        for unit, default in defaults(spec):
            space = unit.family.candidates(unit.problem)
            for schedule in [c.schedule for c in space if not c.refusal][::7]:
                assert render_unit(spec, unit, replace(default, schedule=schedule))


# The default schedules' kernels on one H200, in ms: docs/kernels.md.
MEASURED = {
    ("58", "dgrad", "tf32"): 0.79,
    ("61", "dgrad", "tf32"): 1.30,
    ("68", "dgrad", "tf32"): 9.73,
    ("70", "dgrad", "tf32"): 3.33,
    ("72", "dgrad", "tf32"): 0.22,
    ("73", "dgrad", "tf32"): 0.91,
    ("77", "dgrad", "tf32"): 0.51,
    ("61", "fprop", "tf32"): 1.26,
    ("73", "fprop", "tf32"): 0.68,
    ("77", "fprop", "tf32"): 0.22,
    ("73", "fprop", "bf16tc"): 0.49,
}
MEASURED_SIMT = {"dgrad": 7.96, "fprop": 6.55, "wgrad": 6.96}


def test_the_space_and_the_templates_agree_when_warps_multiply_together() -> None:
    text = (TEMPLATES / "cuda" / "mma" / "fragments.cuh").read_text()
    assert f"constexpr int WARPGROUP_LEAST_CHANNELS = {WARPGROUP_CHANNELS};" in text


class TestModel:
    @pytest.mark.parametrize(
        ("name", "contraction", "kind"), MEASURED, ids=lambda value: str(value)
    )
    def test_predictions_are_near_measurements(
        self, name: str, contraction: str, kind: str
    ) -> None:
        unit, plan = plan_of(LAYERS[name], contraction, kind)
        predicted = unit.predict(plan, call_of(LAYERS[name]), H200).ms
        measured = MEASURED[name, contraction, kind]
        assert measured / 1.45 < predicted < 1.25 * measured

    def test_warps_that_stage_16_bit_lines_bound_gradients_of_strided_layers(self) -> None:
        """Of odd lines, where these are not staged as they lie in memory: docs/kernels.md."""
        unit, plan = plan_of(LAYERS["73"], "fprop", "bf16tc")
        assert plan.schedule.vectors
        words = replace(plan.schedule, unroll="plane", tiles=((3, 32), (3, 24)), vectors=False)
        found = unit.predict(replace(plan, schedule=words), call_of(LAYERS["73"]), H200)
        assert found.bound == "staging"
        assert found.ms == pytest.approx(0.67, rel=0.25)
        assert unit.predict(plan, call_of(LAYERS["73"]), H200).ms < 0.7 * found.ms

    @pytest.mark.parametrize("contraction", CONTRACTIONS)
    def test_simt_predictions_are_near_measurements(self, contraction: str) -> None:
        unit, plan = plan_of(LAYERS["61"], contraction, "f32")
        predicted = unit.predict(plan, call_of(LAYERS["61"]), H200).ms
        assert predicted == pytest.approx(MEASURED_SIMT[contraction], rel=0.15)

    @pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
    def test_predictions_are_times_that_grow_with_the_batch(self, spec: ConvSpec) -> None:
        for unit, plan in defaults(spec):
            for call in typical_calls(spec.geometry):
                one = unit.predict(plan, call, H200)
                four = unit.predict(plan, replace(call, batch=4 * call.batch), H200)
                assert 0 < one.ms < four.ms < 4.5 * one.ms or math.isinf(one.ms)
                assert one.bound

    def test_a_few_tiles_more_than_multiprocessors_cost_another_wave(self) -> None:
        layer = LAYERS["61"]
        unit, plan = plan_of(layer, "dgrad", "tf32")
        plan = replace(plan, schedule=replace(plan.schedule, tiles=((3, 48),)))

        def time(multiprocessors: int) -> float:
            gpu = replace(H200, multiprocessors=multiprocessors)
            call = Call(1, 48, 48, (4, 16, 16), (6, 18, 18))
            return unit.predict(plan, call, gpu).ms

        # 3 positions along D at a time, 128 of the 18 x 18 plane: 2 x 3 tiles.
        assert time(6) == time(100)
        assert time(5) == pytest.approx(2 * time(6))

    def test_narrower_tiles_keep_more_multiprocessors_at_work(self) -> None:
        unit, plan = plan_of(LAYERS["61"], "dgrad", "tf32")
        narrow, wide = (
            replace(plan, schedule=replace(plan.schedule, tiles=((3, channels),)))
            for channels in (16, 48)
        )
        both = replace(plan, schedule=replace(plan.schedule, tiles=((3, 48), (3, 16))))
        few = Call(1, 48, 48, (4, 16, 16), (6, 18, 18))
        many = call_of(LAYERS["61"])

        def time(plan: AnyPlan, call: Call) -> float:
            return unit.predict(plan, call, H200).ms

        assert time(both, few) == time(narrow, few) < time(wide, few)
        assert time(both, many) == time(wide, many) < time(narrow, many)

    def test_weights_that_outweigh_the_input_are_read_by_fewer_blocks(self) -> None:
        # 16 taps of 512 x 256 channels, but 861 positions: blocks of all channels would have 16
        # positions each.
        up = ConvSpec.make("conv_transpose1d", kernel_size=16, stride=8, padding=4)
        unit, plan = plans.unit(up, "dgrad", "tf32"), plans.plan(up, "dgrad", "tf32")
        call = Call(1, 512, 256, (1, 1, 861), (1, 1, 6888))
        # As measured on an H200: 0.070 ms; by blocks of all channels 0.129.
        assert unit.predict(plan, call, H200).ms < 0.08

    def test_samples_of_a_batch_fill_the_tiles_of_small_planes(self) -> None:
        up = ConvSpec.make("conv_transpose2d", kernel_size=4, stride=2, padding=1)
        unit, plan = plan_of(Layer("up", up, (128, 512, 4, 4), 256, False), "dgrad", "tf32")
        one = Call(1, 512, 256, (1, 4, 4), (1, 8, 8))
        few, many = (unit.predict(plan, replace(one, batch=batch), H200).ms for batch in (1, 128))
        assert many < 8 * few

    def test_depthwise_calls_have_one_prediction_whatever_the_schedule(self) -> None:
        spec = ConvSpec.make("conv3d", kernel_size=3, padding=1, groups=64)
        call = Call(2, 64, 64, (32, 64, 64), (32, 64, 64))
        measured = {"fprop": 0.077, "dgrad": 0.078, "wgrad": 0.103}  # H200
        for contraction in CONTRACTIONS:
            unit = plans.unit(spec, contraction, "f32")
            predictions = {
                unit.predict(
                    unit.with_schedule(c.schedule),
                    call,
                    H200,
                )
                for c in unit.family.candidates(unit.problem)
            }
            (prediction,) = predictions
            assert prediction.ms == pytest.approx(measured[contraction], rel=0.35)

    def test_times_follow_the_gpu(self) -> None:
        layer = LAYERS["61"]
        for kind in ("tf32", "f64"):
            unit, plan = plan_of(layer, "dgrad", kind)
            times = {
                number: unit.predict(plan, call_of(layer), gpu).ms for number, gpu in GPUS.items()
            }
            assert times[90] < times[80] < times[86]
