"""The package's .cu files under sanitizers and random schedules, at the shapes of the op suite."""

import pytest
import torch

from mtkernels import LoraBank, _op, group_plan, lora_dropout_mask, task_reduce
from mtkernels.lab import EmulatedCuda, emulated
from mtkernels.lab.cuda_emulator import TOOLS
from mtkernels.testing import MIXED, PROBLEMS, op_of

if emulated.refusal():
    pytest.skip(emulated.refusal(), allow_module_level=True)

NAMES = [name for name in PROBLEMS if _op.OPS[op_of(name)].stem in emulated.stems()]


@pytest.mark.parametrize("name", NAMES)
def test_no_tool_finds_anything(name):
    for ids in (MIXED, [], MIXED + [2] * 1100):
        with EmulatedCuda(tools=TOOLS) as cuda:
            PROBLEMS[name](ids, torch.float32, backend="cuda").results()
        assert cuda.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sanitizers_find_nothing_in_other_types(name, dtype):
    with EmulatedCuda(tools=("asan", "tsan")) as cuda:
        PROBLEMS[name](MIXED, dtype, backend="cuda").results()
    assert cuda.launches


@pytest.mark.parametrize("ids", [MIXED, [], [4] * 70 + [-1] * 40, [[0, 2], [5, -1], [2, 2]]], ids=["mixed", "no rows", "several tiles", "two a row"])
def test_no_tool_finds_anything_in_the_masks(ids):
    factors, plan = [torch.zeros(1, 37) for _ in range(6)], group_plan(torch.tensor(ids, dtype=torch.int64), 6, step=3, backend="reference")
    bank = LoraBank.from_factors(factors, [f.T for f in factors], 1.0, dropout=[0.5, 0.0, 0.25, 1.0, 0.05, 0.5], seeds=[-1, 0, 5, 1, -(2**63), 2**63 - 1])
    for n_cols in (37, 8 * 256 + 1):
        with EmulatedCuda(tools=TOOLS) as cuda:
            bits = lora_dropout_mask(bank, plan, n_cols, backend="cuda")
        assert torch.equal(bits, lora_dropout_mask(bank, plan, n_cols, backend="reference"))
        assert cuda.launches == ["mtk::cuda::launch_lora_dropout_mask"]


def test_every_launch_has_another_schedule(monkeypatch):
    seeds = []
    emulator = emulated._emulator("task_reduce")
    run = emulator.run
    monkeypatch.setattr(emulator, "run", lambda *args, **options: seeds.append(options) or run(*args, **options))
    values, ids = torch.randn(40), torch.randint(-1, 3, (40,))
    with EmulatedCuda(seed=5) as cuda:
        sums = [task_reduce(values, ids, 3, backend="cuda") for _ in range(2)]
    assert torch.equal(*sums) and [s["seed"] for s in seeds] == [5, 6] and seeds[0]["resident"] != seeds[1]["resident"]
    assert cuda.launches == ["mtk::cuda::launch_task_reduce_fwd"] * 2


def test_cpu_tensors_are_taken_inside_the_block_alone():
    values, ids = torch.randn(4), torch.tensor([0, 1, 0, -1])
    with pytest.raises(RuntimeError, match="takes cuda tensors, got cpu"):
        task_reduce(values, ids, 2, backend="cuda")
    with EmulatedCuda():
        torch.testing.assert_close(task_reduce(values, ids, 2, backend="cuda"), task_reduce(values, ids, 2, backend="reference"))
        with pytest.raises(RuntimeError, match="an EmulatedCuda block is open already"), EmulatedCuda():
            pass
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run group_plan here: takes cuda tensors, got cpu"):
            torch.ops.mtkernels.group_plan(ids, 2, True, "cuda")
    with pytest.raises(RuntimeError, match="takes cuda tensors, got cpu"):
        task_reduce(values, ids, 2, backend="cuda")
