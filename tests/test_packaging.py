"""What users install: wheels with and without kernels, the sdist, and imports with nothing optional around."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "mtkernels/__init__.py").read_text(), re.M)[1]

HIDE_TORCH = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
"""
FORBID_TORCH = """
import builtins
real_import = builtins.__import__
def forbid(name, *rest, **options):
    assert name.split(".")[0] != "torch", "setup.py imported torch"
    return real_import(name, *rest, **options)
builtins.__import__ = forbid
"""
READ_SETUP = """
import setuptools
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="commandline")
tag = dist.get_command_obj("bdist_wheel")
tag.ensure_finalized()
print("extensions", [e.name for e in dist.ext_modules or []], "tag", "-".join(tag.get_tag()), "version", dist.get_version())
"""
RUN_SETUP = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refusal(prelude, **env):
    command = [sys.executable, "-W", "ignore", "-c", prelude + RUN_SETUP]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    return done.stderr


def read_setup(prelude, **env):
    return run(sys.executable, "-W", "ignore", "-c", prelude + READ_SETUP, **env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(out), ".", MTKERNELS_BUILD_EXT="0")
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory):
    """The unpacked sdist: a clean source tree, and proof that the sdist builds."""
    out = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(out)  # our own archive, and Python 3.11.2 has no filters
    return next(out.iterdir())


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(tree)]
    run(*pip, MTKERNELS_BUILD_EXT="0")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(out), str(wheel))
    return out


def test_pure_wheel_holds_the_package_and_nothing_beside_it(wheel):
    assert wheel.name == f"mtkernels-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top_level = archive.read(f"mtkernels-{VERSION}.dist-info/top_level.txt").decode().split()
    assert top_level == ["mtkernels"]
    assert {name.split("/")[0] for name in names} == {"mtkernels", f"mtkernels-{VERSION}.dist-info"}
    wanted = {"py.typed", "csrc/cuda/gpu.h", "csrc/cuda/gpu_ptx.h", "csrc/cuda/task_reduce.cu", "csrc/emulator/gpu_emulated.h"}
    for folder in ("mtkernels", "triton_kernels", "bench"):
        inside = "" if folder == "mtkernels" else f"{folder}/"
        files = [p for suffix in ("*.py", "*.json") for p in (ROOT / folder).rglob(suffix)]
        wanted |= {inside + p.relative_to(ROOT / folder).as_posix() for p in files}
    assert {f"mtkernels/{name}" for name in wanted} - set(names) == set()
    sources = [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    assert not [name for name in sources if not name.startswith(("mtkernels/csrc/emulator/", "mtkernels/csrc/cuda/"))]
    assert {f"mtkernels/csrc/emulator/{p.name}" for p in (ROOT / "csrc/emulator").glob("*.cpp")} <= set(sources)


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "triton_kernels", "bench", "mtkernels", "tests")
    suffixes = (".py", ".cpp", ".cu", ".h", ".json")
    sources = {p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes}
    assert (sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"}) - names == set()


def test_without_torch_the_build_is_pure():
    assert f"extensions [] tag py3-none-any version {VERSION}" in read_setup(HIDE_TORCH)


def test_with_torch_the_build_is_abi3_and_never_imports_torch():
    said = read_setup(FORBID_TORCH, MTKERNELS_BUILD_EXT="cpu")
    assert "extensions ['mtkernels._C'] tag cp310-abi3-" in said


@pytest.mark.parametrize(
    "env, prelude, says",
    [
        ({"MTKERNELS_BUILD_EXT": "yes"}, "", "give 0, auto, cpu or cuda"),
        ({"MTKERNELS_BUILD_EXT": "cpu"}, HIDE_TORCH, "needs torch"),
        ({"MTKERNELS_BUILD_EXT": "cuda", "NVCC": "", "PATH": "/nonexistent"}, "", "needs nvcc"),
    ],
)
def test_a_build_that_cannot_be_says_what_to_do(env, prelude, says):
    assert says in refusal(prelude, **env)


def test_an_old_torch_is_refused(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "torch/version.py").write_text("__version__ = '2.10.1+cpu'\n")
    prelude = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert "needs torch >= 2.11, found 2.10.1" in refusal(prelude, MTKERNELS_BUILD_EXT="auto")


def test_no_file_imports_the_top_level_triton_kernels():
    pattern = re.compile(r"^\s*(import|from) triton_kernels\b", re.M)
    folders = ("mtkernels", "triton_kernels", "bench", "tests", "examples")
    assert not [p for f in folders for p in (ROOT / f).rglob("*.py") if pattern.search(p.read_text())]
    assert not (ROOT / "triton_kernels/__init__.py").exists() and not (ROOT / "bench/__init__.py").exists()


def test_installed_wheel_works_with_nothing_optional(installed, tmp_path):
    script = f"""
import sys, warnings
sys.path.insert(0, {str(installed)!r})
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "peft", "transformers", "matplotlib", "rich", "accelerate"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
# an editable install of the checkout would lend its extension to the wheel
sys.meta_path[:] = [Block(), *(f for f in sys.meta_path if "Editable" not in str(f))]
import torch
import mtkernels as mtk
from mtkernels import _native
assert mtk.__file__.startswith({str(installed)!r}) and mtk.__version__ == {VERSION!r}
assert not _native.available() and "pip install --no-build-isolation ." in _native.reason()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        s = mtk.task_reduce(torch.ones(3), torch.tensor([0, 1, 0]), 2)
assert s.tolist() == [2.0, 1.0]
told = [str(w.message) for w in caught if "pip install --no-build-isolation" in str(w.message)]
assert len(told) == 1, told
assert not [m for m in sys.modules if m.split(".")[0] in ("triton", "peft", "transformers")]
"""
    run(sys.executable, "-c", script, cwd=tmp_path, MTKERNELS_BACKEND="", TRITON_INTERPRET="0")


@pytest.mark.skipif(find_spec("mtkernels._C") is None, reason="no compiled kernels in this environment")
def test_extension_is_abi3_and_loads_without_a_gpu():
    from mtkernels import _native

    assert Path(find_spec("mtkernels._C").origin).name == "_C.abi3.so"
    assert _native.available(), _native.reason()
    assert _native.has_stem("task_reduce") and _native.has_op("task_cross_entropy_bwd")
    assert not _native.has_op("no_such_op") and not _native.has_op("group_plan", "cuda")
