"""One stem, the same files everywhere; files and functions stay small."""

import ast
import subprocess
from pathlib import Path

import pytest

from mtkernels import ops

ROOT = Path(__file__).resolve().parent.parent
FILE_BUDGET, FUNCTION_BUDGET = 400, 60
HEADINGS = ("Formula", "Shapes", "Gradients", "Backends", "Cost")


def tracked(*patterns):
    """Files of the checkout that match, tracked by git or about to be; everything below the root in an sdist."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    if (ROOT / ".git").exists():
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return sorted(path for name in names if (path := ROOT / name).is_file())
    return sorted(path for pattern in patterns for path in ROOT.rglob(pattern))


@pytest.mark.parametrize("stem", ops.STEMS)
def test_every_stem_has_its_files(stem):
    expected = [f"mtkernels/reference/{stem}.py", f"mtkernels/ops/{stem}.py", f"triton_kernels/{stem}.py", f"csrc/cpu/{stem}.cpp", f"tests/test_{stem}.py", f"bench/bench_{stem}.py"]
    missing = [name for name in expected if not (ROOT / name).is_file()]
    assert not missing, f"{stem} lacks {', '.join(missing)}"
    page = (ROOT / "mtkernels" / "ops" / f"{stem}.py").read_text()
    assert (ROOT / f"csrc/cuda/{stem}.cu").is_file() or "No CUDA C++:" in page, f"{stem} has no .cu file and does not say why"


def test_every_cuda_source_runs_in_the_emulator():
    sources = {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")}
    launchers = {p.stem for p in (ROOT / "mtkernels" / "lab" / "emulated").glob("[a-z]*.py")}
    assert sources == launchers, "csrc/cuda/X.cu needs mtkernels/lab/emulated/X.py, the launchers of X_op.cpp for the emulator"
    assert sources <= set(ops.STEMS)


@pytest.mark.parametrize("stem", ops.STEMS)
def test_every_op_page_has_its_headings(stem):
    page = ast.get_docstring(ast.parse((ROOT / "mtkernels" / "ops" / f"{stem}.py").read_text()))
    assert [line.split()[0] for line in page.splitlines() if line.split() and line.split()[0] in HEADINGS] == list(HEADINGS)
    assert all(function in page or stem in page for function in ops.STEMS[stem])


def test_no_stray_op_files():
    helpers = {"__init__", "_lora", "philox"}
    for folder in ("mtkernels/reference", "mtkernels/ops"):
        assert {p.stem for p in (ROOT / folder).glob("*.py")} - helpers == set(ops.STEMS)


def test_public_functions_are_documented_and_exported():
    import mtkernels

    for functions in ops.STEMS.values():
        for name in functions:
            assert name in mtkernels.__all__ and getattr(mtkernels, name).__doc__
    assert sorted(mtkernels.__all__, key=str.lower) == sorted(set(mtkernels.__all__), key=str.lower)


def test_file_and_function_budgets():
    long_files = {str(p.relative_to(ROOT)): n for p in tracked("*.py", "*.cpp", "*.cu", "*.h") if (n := len(p.read_text().splitlines())) > FILE_BUDGET}
    long_functions = {}
    for path in tracked("*.py"):
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > FUNCTION_BUDGET:
                long_functions[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not long_files and not long_functions


def test_triton_kernels_is_no_package():
    assert not (ROOT / "triton_kernels" / "__init__.py").exists(), "it would shadow OpenAI's triton_kernels"
    assert not (ROOT / "bench" / "__init__.py").exists()
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(n.split(".")[0] == "triton_kernels" for n in names), f"{path} imports triton_kernels; say mtkernels.triton_kernels"
