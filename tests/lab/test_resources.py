"""Every shipped kernel, compiled for each GPU family: no spills, shared memory fits, GEMMs use the tensor cores."""

import pytest

pytest.importorskip("triton")

from mtkernels.lab import resources
from mtkernels.lab.interpreter import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 turns kernels into Python; run in the ordinary process")

EXPECTED_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def _tested(target, case):
    """The costliest specialisation of every kernel on every family, unless it compiles alike there."""
    if case.tensor_cores:
        return ".ragged" in case.name or target == "sm_90" or case.name.startswith("dora.")
    if case.name.startswith("lora_") and not case.name.startswith("lora_embedding."):
        return ".ragged" in case.name and target == "sm_100"
    return target != "sm_90"


CASES = [] if interpreting() else [(t, c) for t in EXPECTED_CORES for c in resources.shipped_cases(t) if _tested(t, c)]


@pytest.mark.parametrize("target, case", CASES, ids=[f"{c.name}-{t}" for t, c in CASES])
def test_shipped_kernel_fits(target, case):
    measured = resources.measure(case, target)
    assert not resources.problems(case, measured, target), measured
    if case.tensor_cores:
        assert EXPECTED_CORES[target] in measured.tensor_cores, measured


def test_every_kernel_module_lists_its_cases():
    stems = {case.name.split(".")[0] for case in resources.shipped_cases("sm_90")}
    assert {"group_plan", "lora_shrink", "lora_expand", "task_reduce", "task_cross_entropy"} <= stems


def test_problems_are_found():
    case = next(c for c in resources.shipped_cases("sm_90", ["lora_shrink"]) if c.tensor_cores)
    bad = resources.Resources(255, 16, 4, 300_000, 4, 100, {})
    assert len(resources.problems(case, bad, "sm_90")) == 3


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="sm_42.*sm_80"):
        next(iter(resources.shipped_cases("sm_42")))
