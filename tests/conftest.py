"""One suite, several ways to run: a test that takes `way` runs once per way that exists in this process and suits it.

The ordinary process has reference, cpu, virtual-sm80 and virtual-sm90 (Triton kernels, compiled and emulated),
cuda-emulated (ops with a .cu file) and, where a CUDA device is present, gpu and gpu-cuda. interpret, Triton's interpreter
under the probe, has its own process: TRITON_INTERPRET=1 pytest -m interpret. `--way NAME` runs one way alone.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtkernels import _native, _op, lab, ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Way:
    """dtypes: what it takes, the first where a test leaves the choice; stems: the ops it has, None for all."""

    name: str
    backend: str
    device: str = "cpu"
    dtypes: tuple = FLOATS
    stems: tuple | None = None
    # programs run one lane or one array operation at a time: keep shapes small
    slow: bool = False

    def suits(self, stem, dtypes):
        return (self.stems is None or stem in self.stems) and all(d in self.dtypes for d in dtypes)

    def open(self):
        """What has to be active while a test runs this way."""
        if self.name == "interpret":
            return probed()
        if self.name.startswith("virtual"):
            return lab.VirtualGPU(int(self.name.removeprefix("virtual-sm")))
        if self.name == "cuda-emulated":
            return lab.EmulatedCuda()
        return nullcontext()


# What a test may ask for. Vendor matmuls promise no bits, so kernel_way is without them; what the kernels have no part in
# (threads of torch, autograd around an op) is tested where they are fast.
WAY_FIXTURES = {
    "way": lambda way: True,
    "fast_way": lambda way: not way.slow,
    "kernel_way": lambda way: way.backend != "reference",
    "fast_kernel_way": lambda way: way.backend != "reference" and not way.slow,
    "emulated_triton_way": lambda way: way.backend == "triton" and way.device == "cpu",
}


def ways():
    if INTERPRETING:
        return [Way("interpret", "triton", slow=True)]
    found = [Way("reference", "reference")]
    if _native.available():
        found.append(Way("cpu", "cpu"))
    if not _virtual_refusal():
        found.append(Way("virtual-sm80", "triton", dtypes=FLOATS[:2], slow=True))
        # There float32 compiles to the same instructions as for sm_80, and bfloat16 to others.
        found.append(Way("virtual-sm90", "triton", dtypes=(torch.bfloat16,), slow=True))
    if not _emulator_refusal():
        from mtkernels.lab import emulated

        found.append(Way("cuda-emulated", "cuda", stems=emulated.stems(), slow=True))
    if torch.cuda.is_available():
        found.append(Way("gpu", "triton", "cuda"))
        compiled = tuple(s for s in ops.STEMS if _native.has_stem(s, "cuda"))
        found += [Way("gpu-cuda", "cuda", "cuda", stems=compiled)] if compiled else []
    return found


def _virtual_refusal():
    try:
        import triton
    except ImportError as missing:
        return str(missing)
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    return f"triton {triton.__version__} is older than 3.8" if old else ""


def _emulator_refusal():
    from mtkernels.lab import emulated

    return emulated.refusal()


def pytest_addoption(parser):
    parser.addoption("--way", help="run the tests of one way alone, such as virtual-sm90")


def pytest_generate_tests(metafunc):
    marks = pytest.mark.interpret if INTERPRETING else ()
    for fixture in WAY_FIXTURES.keys() & set(metafunc.fixturenames):
        chosen = [w for w in ways() if WAY_FIXTURES[fixture](w)]
        metafunc.parametrize(fixture, [pytest.param(w, id=w.name, marks=marks) for w in chosen])


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if _way(item) is None or _way(item).suits(_stem(item), _dtypes(item))]
    wanted = config.getoption("--way")
    if wanted:
        other = [item for item in items if getattr(_way(item), "name", None) != wanted]
        items[:] = [item for item in items if item not in other]
        config.hook.pytest_deselected(items=other)


def _way(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    # where no way suits a fixture, pytest puts a mark in its place
    return next((params[fixture] for fixture in WAY_FIXTURES if isinstance(params.get(fixture), Way)), None)


def _stem(item):
    """The op that a test is about: its parameter `name`, or the name of its file."""
    name = str(item.callspec.params.get("name")).split(":")[0]
    return _op.OPS[name].stem if name in _op.OPS else Path(item.path).stem.removeprefix("test_")


def _dtypes(item):
    """Floating-point dtypes that a test asks for; one that says nothing of `dtype` means float32."""
    found = [d for value in item.callspec.params.values() for d in (value if isinstance(value, tuple) else (value,)) if isinstance(d, torch.dtype)]
    open_choice = found or "dtype" in item.fixturenames or "emulated_triton_way" in item.fixturenames
    return [d for d in found if d.is_floating_point] if open_choice else [torch.float32]


def pytest_report_header(config):
    missing = [] if INTERPRETING else [("cpu", "" if _native.available() else _native.reason()), ("virtual", _virtual_refusal()), ("cuda-emulated", _emulator_refusal())]
    absent = "".join(f"; no {name}: {why}" for name, why in missing if why)
    return f"ways to run: {', '.join(w.name for w in ways())}{absent}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def dtype(request):
    """Of a test that takes `dtype` without parametrising it: the first that its way takes."""
    return _way(request.node).dtypes[0]


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter():
    if INTERPRETING:
        from mtkernels.lab import interpreter

        interpreter.install()
    yield


@pytest.fixture(autouse=True)
def way_is_open(request):
    """The tool that the test's way runs in, or None."""
    way = _way(request.node)
    with way.open() if way else nullcontext() as tool:
        yield tool


@contextmanager
def probed():
    """Any finding of the probe fails the test."""
    with lab.Probe(seed=0) as probe:
        yield probe
    if probe.findings:
        pytest.fail("\n".join(map(str, probe.findings)), pytrace=False)
