"""The package's own Triton kernels as compiled for sm_80 and sm_90, executed and compared with the reference."""

import os
from importlib import import_module

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the virtual GPU runs compiled kernels; run in the ordinary process", allow_module_level=True)
pytest.importorskip("triton", minversion="3.8")

from mtkernels.lab.virtual_gpu import VirtualGPU
from mtkernels.testing import FLOOR, poisoned, relative_error

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Compiled:
    """The launchers of one stem, run on the virtual GPU with the configuration shipped for it."""

    def __init__(self, arch, monkeypatch):
        self.arch, self.monkeypatch, self.launches = arch, monkeypatch, []

    def __call__(self, stem, function, *args):
        module = import_module(f"mtkernels.triton_kernels.{stem}")
        for owner in (module, import_module("mtkernels.triton_kernels._common")):
            self.monkeypatch.setattr(owner, "arch_of", lambda device: f"sm_{self.arch}", raising=False)
        with poisoned(), VirtualGPU(self.arch) as gpu:
            result = getattr(module, function)(*args)
        self.launches = gpu.launches
        return result


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def compiled(request, monkeypatch):
    return Compiled(request.param, monkeypatch)


def reference(stem, function, *args):
    return getattr(import_module(f"mtkernels.reference.{stem}"), function)(*args)


def plan_of(ids, n_groups):
    return reference("group_plan", "group_plan", ids, n_groups)


def assert_close(actual, expected, dtype):
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert torch.equal(a.isnan(), e.isnan()), n
        assert relative_error(a.nan_to_num(), e.nan_to_num()) < 4 * FLOOR[dtype], n


def several_programs(compiled, *kernels):
    """Each kernel ran with more than one program."""
    programs = {launch.kernel: launch.grid for launch in compiled.launches}
    for kernel in kernels:
        assert max(programs[kernel]) > 1, programs


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_group_plan(dtype, compiled):
    ids = torch.randint(-2, 72, (600,)).to(dtype)
    ids[ids == 5] = 6
    actual = compiled("group_plan", "group_plan", ids, 70)
    for a, e in zip(actual, plan_of(ids, 70), strict=True):
        assert torch.equal(a, e)
    count = next(launch for launch in compiled.launches if "count" in launch.kernel)
    assert min(count.grid[:2]) > 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_task_reduce(dtype, compiled):
    ids = torch.randint(-1, 4, (2600,))
    ids[torch.rand(2600) < 0.6] = 1
    ids32, _, offsets, perm, _, tiles = plan_of(ids, 5)
    values, coef = torch.randn(2600).to(dtype), torch.randn(2600)
    sums = compiled("task_reduce", "task_reduce_fwd", values, coef, offsets, perm, tiles)
    assert_close([sums], [reference("task_reduce", "task_reduce_fwd", values, coef, offsets, perm, tiles)], F32)
    several_programs(compiled, "_task_reduce_chunks_kernel", "_task_reduce_finish_kernel")
    backward = torch.randn(5), values, coef, ids32
    assert_close(compiled("task_reduce", "task_reduce_bwd", *backward), reference("task_reduce", "task_reduce_bwd", *backward), dtype)
    several_programs(compiled, "_task_reduce_bwd_kernel")


@pytest.mark.parametrize("dtype, n_classes", [(F32, 53), (BF16, 53), (F32, 5000), (BF16, 4099)])
def test_task_cross_entropy(dtype, n_classes, compiled):
    T = 41
    logits = torch.randn(T, n_classes + 3).to(dtype)[:, :n_classes]
    target, ids = torch.randint(0, n_classes, (T,)), torch.randint(-1, 3, (T,)).int()
    target[3], target[5], ids[5], logits[:, 7] = -100, n_classes, 0, -torch.inf
    target[target == 7] = 8
    forward = logits, target, ids, -100
    nll, lse = compiled("task_cross_entropy", "task_cross_entropy_fwd", *forward)
    assert_close([nll, lse], reference("task_cross_entropy", "task_cross_entropy_fwd", *forward), F32)
    backward = torch.randn(T), logits, target, ids, lse, -100
    actual = compiled("task_cross_entropy", "task_cross_entropy_bwd", *backward)
    assert_close([actual], [reference("task_cross_entropy", "task_cross_entropy_bwd", *backward)], dtype)
    several_programs(compiled, "_task_cross_entropy_bwd_kernel")


def lora_problem(dtype, ranks, T=150, D=72, widths=(104,), n_slots=1):
    """Ragged groups, an adapter without rows, ids of no adapter, every kind of dropout; odd adapters have a bias."""
    n, n_targets = len(ranks), len(widths)
    ids = torch.randint(-1, n, (T * n_slots,))
    ids[ids == 0] = n - 1
    _, _, offsets, perm, _, tiles = plan_of(ids, n)
    A = [torch.randn(r, D).to(dtype) for _ in widths for r in ranks]
    B = [torch.randn(O, r).to(dtype) for O in widths for r in ranks]
    bias = [torch.randn(O if i % 2 else 0).to(dtype) for O in widths for i in range(n)]
    threshold = torch.tensor([0, 32768, 16384, 65536, 3277, 40000][:n], dtype=torch.int32)
    gates = torch.randn(len(perm)) if n_slots > 1 else None
    scale = [torch.rand(n) for _ in widths]
    adapters = scale, [threshold] * n_targets, [torch.arange(7, 7 + n)] * n_targets, gates, offsets, perm, tiles
    adapters += torch.tensor(2**32 + 11), list(range(3, 3 + n_targets)), True

    def rows(width):
        return torch.randn(T, width + 8).to(dtype)[:, :width]

    return (A, B, bias, *adapters), rows(D), rows(D), [rows(O) for O in widths], [rows(O) for O in widths]


def check_lora(compiled, dtype, bank, x, dx, dys, ys):
    expected_ys, expected_dx = [y.clone() for y in ys], dx.clone()
    s = compiled("lora", "lora_fwd", x, *bank, ys)
    expected_s = reference("lora", "lora_fwd", x, *bank, expected_ys)
    assert_close([s, *ys], [expected_s, *expected_ys], dtype)
    several_programs(compiled, "_lora_shrink_kernel", "_lora_expand_kernel")
    forward = compiled.launches
    A, B, bias = bank[:3]
    actual, expected = ([torch.full((len(dys), len(s)), torch.nan), *(torch.full_like(t, torch.nan) for t in (*A, *B, *bias))] for _ in range(2))
    for run, (e, *grads), out in ((compiled, actual, dx), (reference, expected, expected_dx)):
        run("lora", "lora_bwd", dys, x, expected_s, *bank, out, e, grads[: len(A)], grads[len(A) : 2 * len(A)], grads[2 * len(A) :])
    assert_close([dx, *actual], [expected_dx, *expected], dtype)
    several_programs(compiled, "_lora_expand_bwd_kernel", "_lora_grad_a_kernel", "_lora_bwd_finish_kernel")
    if dtype != F32:
        assert all(launch.instructions["tensor core"] for launch in (*forward, *compiled.launches))


# One rank bucket compiles in half the time of several.
LORA = {
    "sm80-fp32": (80, F32, [3, 0, 16, 1, 33]),
    "sm80-bf16": (80, BF16, [3, 0, 16, 1, 7, 33]),
    "sm80-fp16": (80, F16, [16, 5, 8]),
    "sm90-bf16": (90, BF16, [3, 40, 0, 1, 16, 33]),
}


@pytest.mark.parametrize("case", LORA)
def test_lora(case, monkeypatch):
    arch, dtype, ranks = LORA[case]
    check_lora(Compiled(arch, monkeypatch), dtype, *lora_problem(dtype, ranks))


def test_lora_of_two_targets_and_two_gated_slots(monkeypatch):
    check_lora(Compiled(80, monkeypatch), F16, *lora_problem(F16, [5, 8, 0, 16], T=70, widths=(40, 104), n_slots=2))


def test_factors_of_several_chunks(monkeypatch):
    """An adapter with more rows than one chunk goes through partial sums."""
    compiled = Compiled(80, monkeypatch)
    bank, x, _, dys, _ = lora_problem(F32, [4, 2], T=2200, D=16, widths=(8,))
    s = torch.randn(2200, 4)
    grads = [[torch.full_like(t, torch.nan) for t in (*bank[0], *bank[1], *bank[2])] for _ in range(2)]
    for run, found in zip((compiled, reference), grads):
        run("lora", "lora_bwd", dys, x, s, *bank, None, None, found[:2], found[2:4], found[4:])
    assert_close(*grads, F32)


def producer_problem(dtype, ranks, D=72, T=70, n_targets=1, n_slots=1):
    """(factors and plan as launchers take them, n tensors [T, D] of any row stride, s and dS alike) of a LoRA problem."""
    (A, _, _, _, threshold, seeds, _, *plan), *_ = lora_problem(dtype, ranks, T, D, widths=(8,) * n_targets, n_slots=n_slots)
    rows = [torch.randn(T, D + 8).to(dtype)[:, :D] for _ in range(4)]
    return (A, threshold, seeds, *plan), rows, torch.randn(T * n_slots, n_targets * max(ranks) + 8).to(dtype)[:, :-8]


def check_producer(compiled, stem, dtype, bank, given, ds, saved, outputs):
    """Forward of `given`, then backward from the reference's results; outputs: tensors that the backward writes before the dA."""
    actual = compiled(stem, f"{stem}_fwd", *given, *bank)
    expected = reference(stem, f"{stem}_fwd", *given, *bank)
    assert_close(actual, expected, dtype)
    several_programs(compiled, compiled.launches[0].kernel)
    forward = compiled.launches
    written = [[torch.full_like(t, torch.nan) for t in (*outputs, *bank[0])] for _ in range(2)]
    for run, found in zip((compiled, reference), written):
        run(stem, f"{stem}_bwd", *saved(expected), *bank, *found[: len(outputs)], found[len(outputs) :])
    assert_close(*written, dtype)
    if dtype != F32:
        assert all(launch.instructions["tensor core"] for launch in (*forward, *compiled.launches) if "finish" not in launch.kernel)


PRODUCERS = {
    "sm80-bf16": (80, BF16, dict(ranks=[3, 0, 16, 1])),
    "sm80-slots": (80, F16, dict(ranks=[5, 8, 0, 16], n_slots=2)),
    "sm80-fp32": (80, F32, dict(ranks=[3, 0, 33])),
    "sm90-bf16": (90, BF16, dict(ranks=[3, 70, 0])),
}


@pytest.mark.parametrize("n_targets", [1, 2])
@pytest.mark.parametrize("case", PRODUCERS)
def test_rmsnorm_lora_shrink(case, n_targets, monkeypatch):
    arch, dtype, shape = PRODUCERS[case]
    bank, (x, dxn, *_), ds = producer_problem(dtype, **shape, n_targets=n_targets)
    gamma, rounding = torch.randn(72).to(dtype), (0.0, True) if n_targets == 2 else (1.0, False)
    saved = lambda forward: (dxn, ds, x, gamma, forward[2], forward[1], *rounding)  # noqa: E731
    check_producer(Compiled(arch, monkeypatch), "rmsnorm_lora_shrink", dtype, bank, (x, gamma, 1e-5, *rounding), ds, saved, (x.contiguous(), gamma))


@pytest.mark.parametrize("act", [0, 1], ids=["silu", "gelu"])
@pytest.mark.parametrize("case", PRODUCERS)
def test_swiglu_lora_shrink(case, act, monkeypatch):
    arch, dtype, shape = PRODUCERS[case]
    bank, (gate, up, dh, _), ds = producer_problem(dtype, **shape)
    saved = lambda forward: (dh, ds, gate, up, act)  # noqa: E731
    outputs = gate.contiguous(), up.contiguous()
    check_producer(Compiled(arch, monkeypatch), "swiglu_lora_shrink", dtype, bank, (gate, up, act), ds, saved, outputs)
