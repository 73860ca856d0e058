"""One suite, several ways to run: a test that takes `way` runs once per way that exists in this process.

reference, cpu: the ordinary process. interpret: Triton kernels on CPU tensors, in its own process
(TRITON_INTERPRET=1 pytest -m interpret). gpu: added where a CUDA device is present.
"""

import os
from dataclasses import dataclass

import pytest
import torch

from mtkernels import _native

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Way:
    name: str
    backend: str
    device: str = "cpu"


def ways():
    if INTERPRETING:
        return [Way("interpret", "triton")]
    found = [Way("reference", "reference")]
    if _native.available():
        found.append(Way("cpu", "cpu"))
    if torch.cuda.is_available():
        found.append(Way("gpu", "triton", "cuda"))
    return found


def pytest_generate_tests(metafunc):
    """`way`: every way; `kernel_way`: those that run our kernels (vendor matmuls promise no bits)."""
    marks = pytest.mark.interpret if INTERPRETING else ()
    for fixture in {"way", "kernel_way"} & set(metafunc.fixturenames):
        chosen = [w for w in ways() if fixture == "way" or w.backend != "reference"]
        metafunc.parametrize(fixture, [pytest.param(w, id=w.name, marks=marks) for w in chosen])


def pytest_report_header(config):
    missing = "" if _native.available() else f"; cpu kernels not tested: {_native.reason()}"
    return f"ways to run: {', '.join(w.name for w in ways())}{missing}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def repaired_interpreter():
    if INTERPRETING:
        from mtkernels.lab import interpreter

        interpreter.install()
    yield


@pytest.fixture(autouse=True)
def probed(request):
    """Interpreted ways run under the probe, and any finding fails the test."""
    if not INTERPRETING or not {"way", "kernel_way"} & set(request.fixturenames):
        yield
        return
    from mtkernels.lab.probe import Probe

    with Probe(seed=0) as probe:
        yield
    if probe.findings:
        pytest.fail("\n".join(map(str, probe.findings)), pytrace=False)
