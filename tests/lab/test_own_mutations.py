"""Mistakes in the package's own kernels fail the op suite; the kernels as they are pass the same checks."""

import pytest

pytest.importorskip("triton")
from own_mutations import MUTATIONS, failure, mutated

from mtkernels.lab import emulated, interpreter


def cells():
    here = ("probe", "accuracy", "orders") if interpreter.interpreting() else ("virtual", "emulated")
    return [(name, check) for name, mutation in MUTATIONS.items() for check in mutation.caught if check in here]


def right_cells():
    """One mutation for each check of each distinct problem: without its mistake they are all the same."""
    distinct = {(MUTATIONS[name].problem, str(MUTATIONS[name].ids), MUTATIONS[name].file.endswith(".cu"), check): (name, check) for name, check in cells()}
    return list(distinct.values())


def parametrized(found):
    marks = pytest.mark.interpret if interpreter.interpreting() else ()
    return pytest.mark.parametrize("name, check", [pytest.param(*cell, marks=marks) for cell in found])


@pytest.fixture(autouse=True)
def tool(request):
    check = request.node.callspec.params["check"]
    if check == "virtual":
        pytest.importorskip("triton", minversion="3.8")
    if check == "emulated" and emulated.refusal():
        pytest.skip(emulated.refusal())


@parametrized(cells())
def test_mistake_fails_the_suite(name, check, tmp_path):
    with mutated(MUTATIONS[name], tmp_path):
        assert failure(MUTATIONS[name], check), f"{check} does not see it"


@parametrized(right_cells())
def test_kernels_as_they_are_pass(name, check):
    assert not failure(MUTATIONS[name], check)
