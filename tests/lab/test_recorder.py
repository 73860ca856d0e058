"""The launch recorder sees the launches of ordinary Python calls, for GPUs that are not there."""

import os
from importlib import import_module

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the recorder compiles kernels; run in the ordinary process", allow_module_level=True)
triton = pytest.importorskip("triton")

import feature_kernels as k

from mtkernels.lab.recorder import record_launches, summary


def call():
    x, y = torch.randn(1000), torch.full((1000,), 5.0)
    k.affine_kernel[lambda options: (triton.cdiv(1000, options["BLOCK"]),)](x, y, 1000, BLOCK=256, num_warps=8)
    return y


def test_what_a_launch_says():
    with record_launches(90) as launches:
        y = call()
        call()
    assert summary(launches) == {"affine_kernel": 2}
    launch = launches[0]
    assert (launch.kernel, launch.grid, launch.programs, launch.num_warps) == ("affine_kernel", (4, 1, 1), 4, 8)
    assert launch.signature == {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    assert launch.constants == {"BLOCK": 256}
    assert ".target sm_90" in launch.asm("ptx")
    assert y.eq(5).all(), "recording executes nothing"


@pytest.mark.parametrize("arch, kind, text", [(80, "ptx", ".target sm_80"), (100, "ptx", ".target sm_100"), ("gfx942", "amdgcn", "gfx942")])
def test_other_targets(arch, kind, text):
    with record_launches(arch) as launches:
        call()
    assert text in launches[0].asm(kind)


def test_autotuned_kernels_run_every_configuration():
    configs = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((64, 2), (128, 4))]
    kernel = triton.autotune(configs, key=["n"])(k.affine_kernel)
    x, y = torch.randn(256), torch.empty(256)
    with record_launches(80) as launches:
        kernel[lambda options: (triton.cdiv(256, options["BLOCK"]),)](x, y, 256)
    assert {(launch.constants["BLOCK"], launch.num_warps) for launch in launches} == {(64, 2), (128, 4)}


def test_launches_of_an_op_do_not_grow_with_the_adapters():
    lora = import_module("mtkernels.triton_kernels.lora")
    from mtkernels.reference.group_plan import group_plan

    counts = []
    for n in (2, 9):
        ids = torch.randint(0, n, (40,))
        _, _, offsets, perm, _, tiles = group_plan(ids, n)
        A, B = [torch.randn(4, 32).bfloat16() for _ in range(n)], [torch.randn(24, 4).bfloat16() for _ in range(n)]
        x, y = torch.randn(40, 32).bfloat16(), torch.zeros(40, 24).bfloat16()
        none = torch.zeros(n, dtype=torch.int32)
        with record_launches(80) as launches:
            lora.lora_fwd(x, A, B, [], [torch.ones(n)], [none], [none.long()], None, offsets, perm, tiles, torch.tensor(0), [0], False, [y])
        counts.append(summary(launches))
    assert counts[0] == counts[1] == {"_lora_shrink_kernel": 1, "_lora_expand_kernel": 1}


def test_a_kernel_that_needs_too_much_shared_memory_is_refused():
    a = b = c = torch.randn(256, 256)
    with record_launches(86), pytest.raises(triton.OutOfResources, match="shared memory"):
        k.matmul_kernel[(1, 1)](a, b, c, 256, 256, 256, 256, 256, 256, 128, 128, 64, "ieee", num_warps=8, num_stages=4)


def test_the_driver_is_restored_and_unknown_targets_are_refused():
    from triton.runtime.driver import driver

    before = driver._active
    with pytest.raises(ValueError, match="arch 42 is not known; use one of 80, 86"), record_launches(42):
        pass
    assert driver._active is before
