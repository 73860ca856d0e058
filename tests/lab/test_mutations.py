"""Every deliberate mistake is caught by every tool that its row names, and its right twin by none."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from mutation_cases import edited
from mutations import CUDA_TOOLS, DOCUMENT, MUTATIONS, RIGHT, TOOLS, document

from mtkernels import lab
from mtkernels.lab import emulated, interpreter
from mtkernels.testing import poisoned

INTERPRETED = ("probe", "orders", "poison")
SEEDS = (None, 3)
BROKEN = Path(__file__).resolve().parent / "cuda" / "broken.cu"
# Findings about memory as the kernel leaves it, which no line is to blame for.
NO_LINE = ("unwritten-output", "order-dependent")


def cells():
    """(mistake, tool) of the table that this process can run."""
    here = INTERPRETED if interpreter.interpreting() else ("virtual", *CUDA_TOOLS)
    return [(name, tool) for name, mutation in MUTATIONS.items() for tool in mutation.caught if tool in here]


def pytest_generate_tests(metafunc):
    marks = pytest.mark.interpret if interpreter.interpreting() else ()
    if "tool" in metafunc.fixturenames:
        metafunc.parametrize("name, tool", [pytest.param(*cell, marks=marks) for cell in cells()])
    elif "right" in metafunc.fixturenames:
        metafunc.parametrize("right", [pytest.param(name, marks=marks) for name in RIGHT])


def by_probe(mutation, bug):
    found = []
    for seed in SEEDS:
        torch.manual_seed(0)
        with lab.Probe(seed) as probe:
            mutation.triton(bug)
        assert probe.launches
        found += [(f.kind, str(f)) for f in probe.findings]
    return found


def by_orders(mutation, bug):
    bits = set()
    for seed in (None, 0, 1, 2):
        torch.manual_seed(0)
        with lab.Probe(seed):
            bits.add(tuple(t.numpy().tobytes() for t in mutation.triton(bug)))
    return [("bits", f"{len(bits)} results")] if len(bits) > 1 else []


def by_poison(mutation, bug):
    with poisoned(), lab.Probe():
        outputs = mutation.triton(bug)
    return [("NaN", "")] if any(t.isnan().any() for t in outputs) else []


def by_virtual(mutation, bug):
    pytest.importorskip("triton", minversion="3.8")
    from mtkernels.lab.ptx import Finding

    edit = edited(mutation.edit) if mutation.edit and bug else None
    try:
        with lab.VirtualGPU(mutation.arch, edit=edit):
            mutation.triton(bug)
    except Finding as found:
        return [(found.kind, str(found))]
    return []


def bug_lines(entry):
    """Lines of broken.cu marked BUG inside one kernel."""
    lines = BROKEN.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"__global__ void {entry}\(", line))
    end = next(i for i in range(start, len(lines)) if lines[i] == "}")
    return {i + 1 for i in range(start, end) if "// BUG" in lines[i]}


def by_cuda(mutation, bug, tool):
    if why := emulated.refusal():
        pytest.skip(why)
    found = lab.CudaEmulator(BROKEN).findings(f"run_{mutation.entry}", bool(bug), *mutation.cuda(), tools=[tool])
    first = {f.kind: f for f in reversed(found)}
    for kind, finding in first.items():
        if kind not in NO_LINE and tool not in mutation.afterwards:
            assert finding.file == str(BROKEN) and finding.line in bug_lines(mutation.entry), found
    return [(f.kind, str(f)) for f in found]


def findings(name, tool, bug):
    mutation = MUTATIONS[name]
    if tool in CUDA_TOOLS:
        return by_cuda(mutation, bug, tool)
    return {"probe": by_probe, "orders": by_orders, "poison": by_poison, "virtual": by_virtual}[tool](mutation, bug)


def test_mistake_is_caught(name, tool):
    found = findings(name, tool, MUTATIONS[name].bug)
    kind, _, rest = MUTATIONS[name].caught[tool].partition(": ")
    assert any(k.startswith(kind) and re.search(rest, text, re.DOTALL) for k, text in found), found
    if tool == "probe":
        assert {k for k, _ in found} == {kind}


def test_the_same_kernel_without_the_mistake_gives_no_finding(name, tool):
    assert not findings(name, tool, "")


def test_right_kernels_give_no_finding(right):
    if not interpreter.interpreting():
        pytest.importorskip("triton", minversion="3.8")
        with lab.VirtualGPU(90) as gpu:
            RIGHT[right]()
        assert gpu.launches
        return
    for seed in (None, 0, 7):
        with lab.Probe(seed) as probe:
            RIGHT[right]()
        assert probe.launches and not probe.findings


def test_every_tool_is_tested():
    tools = {tool for mutation in MUTATIONS.values() for tool in mutation.caught}
    assert tools == set(TOOLS)
    assert all(m.triton or m.entry for m in MUTATIONS.values())
    entries = set(re.findall(r"GPU_ENTRY\(run_(\w+)\)", BROKEN.read_text()))
    assert entries - {"scattered_rows"} == {m.entry for m in MUTATIONS.values() if m.entry}


def test_the_documented_table_is_up_to_date():
    text = DOCUMENT.read_text()
    assert document(text) == text, "run python tests/lab/mutations.py"
