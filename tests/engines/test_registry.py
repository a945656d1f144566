"""Families and the units of a layer: what a further family takes, and what guests serve."""

from __future__ import annotations

import json

import plans
import pytest

from convgen.codegen.render import render_kernels
from convgen.engines import registry
from convgen.engines.cost import H200
from convgen.engines.mma.gather import MmaGather
from convgen.engines.problem import Call, Problem
from convgen.engines.registry import units
from convgen.spec import ConvSpec
from convgen.specialize import render

UP = ConvSpec.make(kernel_size=3, stride=2)


class Strided(MmaGather):
    """A second family of gathers in math modes, for strided layers alone."""

    name = "strided"
    suffix = "_strided"

    def accepts(self, problem: Problem) -> str:
        return "" if max(problem.geometry.stride) > 1 else "for strided layers"


@pytest.fixture
def strided(monkeypatch: pytest.MonkeyPatch) -> Strided:
    family = Strided()
    others = [other for other in registry.FAMILIES if not other.suffix]
    monkeypatch.setattr(registry, "FAMILIES", (*others, family))
    return family


class TestASecondFamilyOfAKind:
    def test_has_units_of_its_own_where_it_accepts_the_problem(self, strided: Strided) -> None:
        def names(spec: ConvSpec) -> list[str]:
            return [unit.name for unit in units("cuda", spec.geometry, ["f16"])]

        alone = ["fprop_f16", "dgrad_f16", "wgrad_f16", "fprop_f16tc", "dgrad_f16tc", "wgrad_f16tc"]
        assert names(ConvSpec.make(kernel_size=3)) == alone
        both = [*alone[:4], "fprop_f16tc_strided", "dgrad_f16tc", "dgrad_f16tc_strided", alone[5]]
        assert names(UP) == both

    def test_is_rendered_beside_the_first_and_stated_in_the_package(self, strided: Strided) -> None:
        files = render(UP, ["cuda"], ["f16"])
        assert "src/cuda/fprop_f16tc_strided.cu" in files
        assert "src/cuda/fprop_f16tc.cu" in files
        cuda = json.loads(files["spec.json"])["backends"]["cuda"]
        kernels = [(k["contraction"], k["dtype"], k["engine"]) for k in cuda["kernels"]]
        assert ("fprop", "f16tc", "mma") in kernels
        assert ("fprop", "f16tc", "strided") in kernels
        assert cuda["math_modes"] == ["f16tc"]

    def test_takes_the_schedules_that_are_given_for_it(self, strided: Strided) -> None:
        unit = plans.unit(UP, "fprop", "f16tc")
        legal = [c.schedule for c in unit.family.candidates(unit.problem) if not c.refusal]
        given = {("fprop", "f16tc_strided"): legal[1]}
        _, found = render_kernels(UP, "cuda", ["f16"], given)
        by_family = {p.family.name: p for p in found if p.contraction == "fprop"}
        assert by_family["strided"].schedule == legal[1]
        assert by_family["mma"].schedule == legal[0]

    def test_needs_a_suffix(self, strided: Strided, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Strided, "suffix", "")
        with pytest.raises(AssertionError, match="suffixes of their own"):
            units("cuda", UP.geometry, ["f16"])


def test_a_call_goes_to_the_guest_that_serves_it() -> None:
    unit = plans.unit(ConvSpec.make("conv3d", kernel_size=3, padding=1, groups=64), "fprop", "f32")
    ((guest, plan),) = unit.guests
    assert plan is not None
    one = Call(2, 64, 64, (32, 64, 64), (32, 64, 64))
    several = Call(2, 256, 256, (32, 64, 64), (32, 64, 64))
    assert guest.serves(plan.problem, one)
    assert unit.predict(unit.default(), one, H200) == guest.predict(plan, one, H200)
    assert not guest.serves(plan.problem, several)
    host = unit.family.predict(unit.default(), several, H200)
    assert unit.predict(unit.default(), several, H200) == host


def test_every_family_says_why_it_has_no_kernel() -> None:
    few = ConvSpec.make("conv3d", kernel_size=3, in_channels=1, out_channels=2)
    mma = plans.unit(few, "fprop", "tf32")
    assert "leave the tensor cores' products empty" in mma.family.accepts(mma.problem)
    ((depthwise, plan),) = plans.unit(few, "fprop", "f32").guests
    assert plan is None
    assert "several channels" in depthwise.accepts(Problem(few.geometry, "fprop", "f32"))
