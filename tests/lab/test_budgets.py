"""Shipped kernels against their budgets, and every kind of regression against a budget that it breaks."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from mtkernels.lab import budgets, cli_resources, matrix, resources
from mtkernels.lab.interpreter import interpreting
from mtkernels.lab.occupancy import FAMILIES

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 turns kernels into Python; run in the ordinary process")

SHIPPED = [] if interpreting() else [(case, t) for t in FAMILIES for case in matrix.default_cases(t)]


@pytest.fixture(scope="module")
def measured():
    return matrix.measure_all(SHIPPED, cache=matrix.default_cache())


@pytest.mark.parametrize("case, target", SHIPPED, ids=[f"{c.name}-{t}" for c, t in SHIPPED])
def test_shipped_kernel_keeps_its_budget(measured, case, target):
    found, budget = measured[case.name, target], budgets.load(case.name.split(".")[0])
    assert isinstance(found, resources.Resources), found
    same_version = budget["triton"] == budgets.triton_version()
    assert not budgets.regressions(found, budget["cases"][case.name][target], same_version, case.tensor_cores), found


def test_every_case_has_a_budget_and_every_budget_a_case():
    cases = {op: {t: list(matrix.shipped_cases(t, [op])) for t in resources.TARGETS} for op in matrix.shipped_ops()}
    assert not budgets.unmatched(cases, resources.TARGETS) and not budgets.orphans(cases)


def test_default_cases_cover_every_kernel():
    for target in FAMILIES:
        everything = list(matrix.shipped_cases(target))
        default = matrix.default_cases(target)
        assert {c.kernel.__name__ for c in default} == {c.kernel.__name__ for c in everything}
        assert {c.kernel.__name__ for c in default if c.tensor_cores} == {c.kernel.__name__ for c in everything if c.tensor_cores}


CASE = "task_reduce.chunks"
FITTING = resources.Resources(
    target="sm_90", registers=100, scalar_registers=0, accumulation_registers=0, stack=0, spills=0, scalar_spills=0, shared=4096,
    num_warps=4, instructions=100, tensor_cores={"HGMMA": 4}, tma={"UTMALDG": 1}, tensor_memory=0, accumulators=0,
    doubled_accumulators=0, loops=(),
)  # fmt: skip
BLACKWELL = dict(target="sm_100", tensor_cores={"UTCHMMA": 4}, tensor_memory=64, accumulators=1)


@pytest.mark.parametrize(
    "before, after, says",
    [
        ({}, dict(registers=101), "101 registers, the budget is 100"),
        ({}, dict(shared=4097), "4097 bytes of shared memory, the budget is 4096"),
        ({}, dict(shared=228 * 1024), "sm_90 has 232448"),
        ({}, dict(stack=8, spills=2), "8 bytes of stack, 2 spill instructions"),
        ({}, dict(tensor_cores={"HMMA": 8}), "no HGMMA, which the budget requires"),
        ({}, dict(tma={}), "no UTMALDG, which the budget requires"),
        (BLACKWELL, {**BLACKWELL, "tensor_memory": 128}, "128 columns of tensor memory, the budget is 64"),
        (BLACKWELL, {**BLACKWELL, "accumulators": 2, "doubled_accumulators": 1}, "1 accumulators too many"),
        (dict(target="gfx942"), dict(target="gfx942", scalar_spills=65), "65 spilled scalar registers"),
    ],
)
def test_each_regression_is_found(before, after, says):
    before, after = dataclasses.replace(FITTING, **before), dataclasses.replace(FITTING, **after)
    budget = budgets.entry(before)
    assert not budgets.regressions(before, budget, same_version=True)
    assert any(says in text for text in budgets.regressions(after, budget, same_version=True))


def test_another_triton_may_take_some_more_registers():
    budget, more = budgets.entry(FITTING), budgets.OTHER_VERSION_REGISTERS
    grown = dataclasses.replace(FITTING, registers=100 + more, shared=8192)
    assert not budgets.regressions(grown, budget, same_version=False)
    assert len(budgets.regressions(grown, budget, same_version=True)) == 2
    assert budgets.regressions(dataclasses.replace(grown, registers=101 + more), budget, same_version=False)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command on budgets of its own: run("--check", ...) -> (exit status, what it said)."""
    monkeypatch.setattr(budgets, "folder", lambda: tmp_path / "budgets")

    def call(*arguments):
        parser = argparse.ArgumentParser()
        cli_resources.add_arguments(parser)
        status = cli_resources.run(parser.parse_args(["task_reduce", *arguments]))
        return status, "".join(capsys.readouterr())

    return call


def edit(tmp_path, change):
    path = tmp_path / "budgets" / "task_reduce.json"
    budget = json.loads(path.read_text())
    change(budget)
    path.write_text(json.dumps(budget))


def test_write_then_check(run, tmp_path):
    status, said = run("--target", "sm_90", "--target", "gfx942")
    assert status == 1 and f"{CASE} sm_90: no budget in task_reduce.json" in said
    assert run("--target", "sm_90", "--target", "gfx942", "--write")[0] == 0
    assert run("--target", "sm_90", "--target", "gfx942", "--json", str(tmp_path / "out.json"))[0] == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"} and all(row["occupancy"]["blocks"] for row in rows)
    budget = json.loads((tmp_path / "budgets" / "task_reduce.json").read_text())
    assert {row["registers"] for row in rows if row["case"] == CASE} == {e["registers"] for e in budget["cases"][CASE].values()}


def test_check_names_what_is_worse_missing_or_stale(run, tmp_path):
    assert run("--target", "sm_90", "--write")[0] == 0

    def change(budget):
        cases = budget["cases"]
        cases[CASE]["sm_90"]["registers"] -= 1
        cases["task_reduce.bwd"]["sm_90"]["requires"] = ["HGMMA"]
        cases["task_reduce.gone"] = {"sm_90": cases.pop("task_reduce.finish")["sm_90"]}

    edit(tmp_path, change)
    status, said = run("--target", "sm_90")
    assert status == 1 and f"{CASE} sm_90: " in said and "registers, the budget is" in said
    assert "task_reduce.bwd sm_90: no HGMMA, which the budget requires" in said
    assert "task_reduce.gone sm_90: a budget in task_reduce.json without a case" in said
    assert "task_reduce.finish sm_90: no budget in task_reduce.json" in said


def test_write_keeps_other_targets_of_the_same_triton_alone(run, tmp_path):
    assert run("--target", "sm_90", "--write")[0] == 0 and run("--target", "sm_80", "--write")[0] == 0
    assert set(budgets.load("task_reduce")["cases"][CASE]) == {"sm_80", "sm_90"}
    edit(tmp_path, lambda budget: budget.update(triton="3.1"))
    status, said = run("--target", "sm_80", "--write")
    assert status == 1 and "task_reduce.json holds figures of triton 3.1" in said
    assert budgets.load("task_reduce")["triton"] == "3.1"


def test_write_refuses_a_spill(run, monkeypatch):
    spilled = dataclasses.replace(FITTING, spills=4, stack=16)
    monkeypatch.setattr(cli_resources, "measure_all", lambda pairs, **rest: {(c.name, t): spilled for c, t in pairs})
    status, said = run("--target", "sm_90", "--write")
    assert status == 1 and f"{CASE} sm_90: 16 bytes of stack, 4 spill instructions" in said
    assert not budgets.folder().exists()


def test_a_case_that_does_not_compile_is_reported(run, monkeypatch):
    assert run("--target", "sm_90", "--write")[0] == 0
    failed = matrix.CompileError("PassManager::run failed")
    monkeypatch.setattr(cli_resources, "measure_all", lambda pairs, **rest: {(c.name, t): failed for c, t in pairs})
    status, said = run("--target", "sm_90")
    assert status == 1 and f"{CASE} sm_90: does not compile: PassManager::run failed" in said


def die(name, target):
    if name.endswith("finish"):
        os._exit(1)
    return FITTING


def test_a_compiler_that_dies_takes_one_case_along(monkeypatch):
    monkeypatch.setattr(matrix, "_measure_by_name", die)
    cases = list(matrix.shipped_cases("sm_90", ["task_reduce"]))
    results = matrix.measure_all([(case, "sm_90") for case in cases])
    assert {name for (name, _), found in results.items() if isinstance(found, matrix.CompileError)} == {"task_reduce.finish"}
    assert len(results) == len(cases)


def test_files_of_no_op_are_found(tmp_path):
    (tmp_path / "nothing.json").write_text("{}")
    assert budgets.orphans(matrix.shipped_ops(), tmp_path) == [tmp_path / "nothing.json"]


def test_refusals(run, monkeypatch):
    assert run("no_such_op")[0] == 2 and "no compile cases for no_such_op" in run("no_such_op")[1]
    assert run("--write", "--quick")[0] == 2 and run("--jobs", "0")[0] == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run()[0] == 2


def test_the_command_line():
    command = [sys.executable, "-m", "mtkernels.lab", "resources", "task_reduce", "--target", "sm_90", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {row["case"] for row in json.loads(done.stdout)["results"]} == {c.name for c in matrix.shipped_cases("sm_90", ["task_reduce"])}
    assert "within their budgets" in done.stderr
