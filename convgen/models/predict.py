"""What the cost model expects of a case that nothing was measured of."""

from __future__ import annotations

from convgen.building import gpus
from convgen.measuring.layers import Layer, SuiteError
from convgen.models import beside, layers
from convgen.models.capture import Case
from convgen.tuning import choice, jobs

Pair = tuple[float, float]


def layer_of(case: Case) -> Layer | None:
    """A case as benchmarks have it; None for an empty batch or output."""
    shape, channels = case.input.shape, case.output_shape[1]
    try:
        return Layer("layer", case.spec, shape, channels, case.bias is not None)
    except SuiteError:
        return None


def predicted_ms(case: Case) -> Pair | None:
    """Expected times of a case on a GPU, forward and backward; None where there is no model.

    On the CPU there is none: its family's predictions order schedules, but are no times.
    """
    layer, dtype = layer_of(case), layers.dtype_name(case.dtype)
    if layer is None or dtype is None or case.device.type != "cuda":
        return None
    gpu = choice.gpu_of(gpus.gpu_architectures())
    expected = {
        job.contraction: job.unit.predict(job.unit.default(), job.call, gpu).ms
        for job in jobs.jobs([layer], "cuda", dtype, beside.allows_tf32())
    }
    forward, of_input = ("dgrad", "fprop") if case.spec.transposed else ("fprop", "dgrad")
    backward = 0.0
    if case.grad:
        backward += expected[of_input] * case.input.requires_grad
        backward += expected["wgrad"] * case.weight.requires_grad
    return expected[forward], backward
