"""Which backend runs, and what is said when one cannot."""

import os
import subprocess
import sys

import pytest
import torch

import mtkernels as mtk
from mtkernels import _backends, _native


@pytest.fixture
def fresh():
    _backends._choose.cache_clear()
    _native.warn_missing_once.cache_clear()
    yield
    _backends._choose.cache_clear()


def hide(monkeypatch, name):
    find = _backends.find_spec
    monkeypatch.setattr(_backends, "find_spec", lambda n: None if n.split(".")[0] == name else find(n))


def run(code, **env):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    return done.stdout + done.stderr


def test_order_argument_context_environment():
    ids = torch.tensor([0])
    with mtk.backend("triton"):
        assert _backends.requested() == "triton" and _backends.requested("cpu") == "cpu"
        with mtk.backend("reference"):
            assert mtk.group_plan(ids, 1).perm.tolist() == [0]
        assert mtk.group_plan(ids, 1, backend="reference").perm.tolist() == [0]
    assert _backends.requested() == os.environ.get("MTKERNELS_BACKEND", "")
    code = "import mtkernels as m; print(m._backends.requested(), m._backends.requested('cpu'))"
    assert run(code, MTKERNELS_BACKEND="reference").split() == ["reference", "cpu"]
    assert "MTKERNELS_BACKEND='fast' is not one of reference, cpu, triton, cuda" in run("import mtkernels", MTKERNELS_BACKEND="fast")


def test_context_restores_after_an_error():
    with pytest.raises(KeyError), mtk.backend("reference"):
        raise KeyError
    assert _backends.requested() == os.environ.get("MTKERNELS_BACKEND", "")


def test_unknown_names():
    with pytest.raises(ValueError, match="backend 'metal' is not one of reference, cpu, triton, cuda"), mtk.backend("metal"):
        pass
    with pytest.raises(ValueError, match="backend 'metal' is not one of"):
        mtk.group_plan(torch.tensor([0]), 1, backend="metal")
    with pytest.raises(ValueError, match="no op 'lora_conv'; there are group_plan, lora_linear"):
        mtk.explain("lora_conv")


@pytest.mark.parametrize("name, device", [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_explicit_choice_never_falls_back(name, device):
    with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run task_reduce here: takes {name} tensors, got {device}"):
        _backends.choose("task_reduce", name, device, torch.float32)


def test_float64_runs_on_the_reference_only():
    values = torch.randn(3, dtype=torch.float64)
    assert mtk.task_reduce(values, torch.tensor([0, 1, 0]), 2).dtype == torch.float64
    with pytest.raises(RuntimeError, match="torch.float64 runs on the reference only"):
        mtk.task_reduce(values, torch.tensor([0, 1, 0]), 2, backend="cpu")


def test_cuda_tensors_without_triton_are_told_why(fresh, monkeypatch):
    hide(monkeypatch, "triton")
    assert _backends.refusal("lora", "triton", "cuda", torch.float32) == "triton is not installed (pip install triton)"
    with pytest.warns(UserWarning, match="lora on cuda runs the slow reference .*triton is not installed"):
        assert _backends.choose("lora", "", "cuda", torch.float32) == "reference"


def test_cpu_without_the_extension_is_told_how_to_build_it(fresh, monkeypatch):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "no compiled kernels in this install")
    with pytest.warns(UserWarning, match="CPU tensors run on the slow reference: no compiled kernels"):
        assert _backends.choose("lora", "", "cpu", torch.float32) == "reference"


def test_the_virtual_gpu_opens_triton_to_cpu_tensors():
    pytest.importorskip("triton", minversion="3.8")
    from mtkernels.lab import VirtualGPU

    values, ids = torch.randn(40), torch.randint(0, 3, (40,))
    exact = mtk.task_reduce(values, ids, 3, backend="reference")
    with pytest.raises(RuntimeError, match="takes cuda tensors; CPU tensors only under"):
        mtk.task_reduce(values, ids, 3, backend="triton")
    with VirtualGPU(arch=80) as gpu:
        torch.testing.assert_close(mtk.task_reduce(values, ids, 3, backend="triton"), exact)
    assert len(gpu.launches) == 6  # four of the plan, two of the sums
    with pytest.raises(RuntimeError, match="takes cuda tensors"):
        mtk.task_reduce(values, ids, 3, backend="triton")


def test_explain_lists_every_backend():
    x = torch.randn(2, 4)
    found = mtk.explain("lora_linear", x)
    assert list(found) == list(_backends.NAMES) and found["reference"] == "yes"
    assert found.chosen == ("cpu" if _native.available() else "reference")
    assert "takes cuda tensors" in found["cuda"] and "lora_linear: " in str(found)
    with mtk.backend("reference"):
        assert mtk.explain("lora", x).chosen == "reference"
    assert mtk.explain("task_cross_entropy", x.double()).chosen == "reference"


def test_env_prints_versions_and_the_matrix():
    done = subprocess.run([sys.executable, "-m", "mtkernels.env"], capture_output=True, text=True, check=True)
    assert torch.__version__ in done.stdout and mtk.__version__ in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    for stem in mtk.ops.STEMS:
        assert sum(row[:1] == [stem] for row in rows) == 2


def test_importing_is_cheap_and_needs_nothing_optional():
    code = "import sys, torch; import mtkernels; print([m for m in ('triton', 'peft', 'transformers', 'torch._dynamo') if m in sys.modules])"
    assert run(code).strip() == "[]"
