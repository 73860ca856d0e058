"""Ceilings for the resources of the shipped kernels: triton_kernels/budgets/<op>.json, written by

    python -m mtkernels.lab resources --write

and by nothing else. A ceiling is what was measured; the same triton version compiles to the same code and must keep it.
Another version allocates registers differently (3.8 against 3.9: up to 68 more on the kernels of version 0.1.0) and pipelines
differently: there OTHER_VERSION_REGISTERS more are let through, and shared and tensor memory are held to the card's limits.
Spills, missing tensor cores and doubled accumulators are mistakes under any version (`resources.problems`).
"""

import json
from importlib import import_module
from pathlib import Path

from .resources import problems

OTHER_VERSION_REGISTERS = 72

_CEILINGS = ("registers", "shared", "tensor_memory")
_UNITS = {"registers": "registers", "shared": "bytes of shared memory", "tensor_memory": "columns of tensor memory"}


def folder():
    return Path(import_module("mtkernels.triton_kernels._common").__file__).parent / "budgets"


def triton_version():
    """Major and minor version, "3.9"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def load(op, where=None):
    """{"triton": version, "cases": {case: {target: entry}}} of an op; no cases when it has no budget yet."""
    path = (where or folder()) / f"{op}.json"
    return json.loads(path.read_text()) if path.exists() else {"triton": None, "cases": {}}


def entry(found):
    """The budget that exactly fits some resources."""
    ceilings = {key: getattr(found, key) for key in _CEILINGS if getattr(found, key)}
    return {**ceilings, "requires": sorted((*found.tensor_cores, *found.tma))}


def regressions(found, budget, same_version, tensor_cores=False):
    """What is worse than the budget entry allows, in words; also what is wrong under any budget."""
    said = problems(found, tensor_cores)
    for key in _CEILINGS:
        value, ceiling = getattr(found, key), budget.get(key, 0)
        if not same_version:
            if key != "registers":
                continue
            ceiling += OTHER_VERSION_REGISTERS
        if value > ceiling:
            said.append(f"{value} {_UNITS[key]}, the budget is {ceiling}")
    missing = [op for op in budget["requires"] if op not in {**found.tensor_cores, **found.tma}]
    if missing:
        said.append(f"no {', '.join(missing)}, which the budget requires")
    return said


def unmatched(cases, targets, where=None):
    """Case and target pairs without a budget, and budgets without a case, in words.

    cases: {op: {target: [case]}} for every target in `targets`. Budgets of other ops and targets are not looked at.
    """
    said = []
    for op, by_target in cases.items():
        budget = load(op, where)["cases"]
        shipped = {(case.name, target) for target, listed in by_target.items() for case in listed}
        budgeted = {(name, target) for name, entries in budget.items() for target in entries if target in targets}
        said += [f"{name} {target}: no budget in {op}.json" for name, target in sorted(shipped - budgeted)]
        said += [f"{name} {target}: a budget in {op}.json without a case" for name, target in sorted(budgeted - shipped)]
    return said


def orphans(ops, where=None):
    """Budget files of no op."""
    return sorted(path for path in (where or folder()).glob("*.json") if path.stem not in ops)


def write(op, results, targets, where=None):
    """Replace the op's entries for `targets` by {(case, target): Resources}; entries for other targets stay.

    Raises ValueError when those others come from another triton version, since a file holds figures of one.
    """
    old, version = load(op, where), triton_version()
    kept = {(name, t): e for name, entries in old["cases"].items() for t, e in entries.items() if t not in targets}
    if kept and old["triton"] != version:
        raise ValueError(f"{op}.json holds figures of triton {old['triton']}, this is {version}; write all targets")
    entries = {**kept, **{pair: entry(found) for pair, found in results.items()}}
    names = dict.fromkeys(name for name, _ in [*results, *kept])
    cases = [(name, sorted((t, e) for (n, t), e in entries.items() if n == name)) for name in names]
    blocks = (
        f"    {json.dumps(name)}: {{\n" + ",\n".join(f"      {json.dumps(t)}: {json.dumps(e)}" for t, e in rows) + "\n    }"
        for name, rows in cases
    )
    path = (where or folder()) / f"{op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "triton": "{version}",\n  "cases": {{\n' + ",\n".join(blocks) + "\n  }\n}\n")
