"""The PTX emulator on hand-written PTX: control flow, warp operations, memory checks, number formats, counters."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from mtkernels.lab.ptx import Finding, GlobalMemory, Program, Unsupported, numerics
from mtkernels.lab.ptx.counters import Counters, instruction_mix

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.file 1 "/src/hand.py"
.extern .shared .align 16 .b8 dynamic[];
.visible .entry hand({params})
.reqntid {threads}
{{
 .reg .pred %p<20>;
 .reg .b16 %h<20>;
 .reg .b32 %r<40>;
 .reg .f32 %f<20>;
 .reg .b64 %a<20>;
 .loc 1 7 0
"""
# %a<n> = address of argument n, %r0 = thread, %r1 = 4 * thread, %a10 = address of this thread's word of the last argument
PROLOGUE = " mov.u32 %r0, %tid.x;\n shl.b32 %r1, %r0, 2;\n"


def run(body, *tensors, threads=32, grid=(1,), shared=0, counters=None):
    params = ", ".join(f".param .u64 arg{n}" for n in range(len(tensors)))
    loads = "".join(f" ld.param.u64 %a{n}, [arg{n}];\n" for n in range(len(tensors)))
    last = f" cvt.u64.u32 %a11, %r1;\n add.s64 %a10, %a{len(tensors) - 1}, %a11;\n" if tensors else ""
    program = Program(HEAD.format(params=params, threads=threads) + loads + PROLOGUE + last + body + "\n ret;\n}\n")
    memory = GlobalMemory()
    arguments = [memory.add(f"arg{n}", t.data_ptr(), t.numel() * t.element_size(), t) for n, t in enumerate(tensors)]
    launch = program.run(grid, arguments, memory, shared_bytes=shared, counters=counters)
    return program, launch


def words(n=32, dtype=torch.int32):
    return torch.zeros(n, dtype=dtype)


def test_threads_that_loop_for_different_times_meet_again():
    out = words()
    run(
        """
 mov.b32 %r2, 0;
 mov.b32 %r3, 0;
LOOP:
 setp.ge.u32 %p1, %r2, %r0;
 @%p1 bra DONE;
 add.s32 %r3, %r3, %r2;
 add.s32 %r2, %r2, 1;
 bra.uni LOOP;
DONE:
 vote.sync.ballot.b32 %r4, %p1, -1;
 setp.eq.u32 %p2, %r4, 0xffffffff;
 @%p2 st.global.u32 [%a10], %r3;
""",
        out,
    )
    assert out.tolist() == [t * (t - 1) // 2 for t in range(32)]


def test_labels_of_nested_scopes_do_not_meet():
    out = words()
    scope = "{\n .reg .pred stop;\nAGAIN:\n add.s32 %r2, %r2, 1;\n setp.ge.s32 stop, %r2, %d;\n @!stop bra AGAIN;\n}\n"
    run(" mov.b32 %r2, 0;\n" + scope.replace("%d", "5") + scope.replace("%d", "9") + " st.global.u32 [%a10], %r2;", out)
    assert out.eq(9).all()


def test_blocks_and_threads_have_their_numbers():
    out = words(6 * 64)
    run(
        """
 mov.u32 %r2, %ctaid.x;
 mov.u32 %r3, %ctaid.y;
 mov.u32 %r4, %nctaid.x;
 mad.lo.s32 %r5, %r3, %r4, %r2;
 shl.b32 %r6, %r5, 6;
 add.s32 %r7, %r6, %r0;
 mad.wide.u32 %a12, %r7, 4, %a0;
 st.global.u32 [%a12], %r7;
""",
        out,
        threads=64,
        grid=(3, 2),
    )
    assert torch.equal(out, torch.arange(6 * 64).int())


def test_a_block_reduction_through_shared_memory():
    x, out = torch.arange(64).int(), words(64)
    body = """
 add.s64 %a12, %a0, %a11;
 ld.global.u32 %r2, [%a12];
 mov.u32 %r3, dynamic;
 add.s32 %r4, %r3, %r1;
 st.shared.u32 [%r4], %r2;
 bar.sync 0;
 mov.b32 %r5, 0;
 mov.b32 %r6, 0;
L: add.s32 %r7, %r3, %r6;
 ld.shared.u32 %r8, [%r7];
 add.s32 %r5, %r5, %r8;
 add.s32 %r6, %r6, 4;
 setp.lt.u32 %p1, %r6, 256;
 @%p1 bra L;
 st.global.u32 [%a10], %r5;
"""
    run(body, x, out, threads=64, shared=256)
    assert out.eq(64 * 63 // 2).all()
    with pytest.raises(Finding, match=r"hand: shared memory out of bounds: 4 bytes at 252 of 252.*thread 63\s+at hand.py:7.*st.shared"):
        run(body, x, out, threads=64, shared=252)


def test_shuffles():
    out = words()
    run(" shfl.sync.bfly.b32 %r2, %r0, 5, 0x1f, -1;\n st.global.u32 [%a10], %r2;", out)
    assert out.tolist() == [t ^ 5 for t in range(32)]
    run(" shfl.sync.down.b32 %r2|%p1, %r0, 30, 0x1f, -1;\n selp.b32 %r3, %r2, 99, %p1;\n st.global.u32 [%a10], %r3;", out)
    assert out.tolist() == [30, 31] + [99] * 30
    run(" shfl.sync.up.b32 %r2, %r0, 1, 0x1800, -1;\n st.global.u32 [%a10], %r2;", out)
    assert out.tolist() == [t if t % 8 == 0 else t - 1 for t in range(32)]
    run(" shfl.sync.idx.b32 %r2, %r0, 3, 0x181f, -1;\n st.global.u32 [%a10], %r2;", out)
    assert out.tolist() == [t // 8 * 8 + 3 for t in range(32)]


def test_a_shuffle_from_a_lane_that_left_is_found():
    with pytest.raises(Finding, match="shuffle reads from an inactive lane.*thread 15"):
        run(" setp.gt.u32 %p1, %r0, 15;\n @%p1 ret;\n shfl.sync.down.b32 %r2, %r0, 1, 0x1f, -1;\n st.global.u32 [%a10], %r2;", words())


def test_a_barrier_some_threads_never_reach_is_found():
    body = """
 setp.gt.u32 %p1, %r0, 15;
 @%p1 bra SKIP;
 bar.sync 1;
SKIP:
 bar.sync 0;
"""
    with pytest.raises(Finding, match=r"deadlock: 16 threads wait here for others that never arrive.*\n.*bar.sync"):
        run(body)


def test_a_barrier_does_not_wait_for_threads_that_left():
    out = words(64)
    body = """
 setp.gt.u32 %p1, %r0, 31;
 @%p1 bra LATER;
 bar.sync 0;
 st.global.u32 [%a10], %r0;
 ret;
LATER:
 setp.gt.u32 %p2, %r0, 0;
"""
    run(body, out, threads=64)
    assert out.tolist() == [*range(32), *[0] * 32]


def test_a_spinning_thread_is_stopped(monkeypatch):
    from mtkernels.lab.ptx import machine

    monkeypatch.setattr(machine, "_SPINS", 20)
    with pytest.raises(Finding, match="no end in sight"):
        run("L: ld.global.u32 %r2, [%a0];\n setp.eq.u32 %p1, %r2, 0;\n @%p1 bra L;", words(1))


def test_misaligned_and_foreign_addresses_are_found():
    with pytest.raises(Finding, match=r"misaligned access: 8 bytes at byte 4 of arg0 \(128 bytes\); block \(0, 0, 0\), thread 1"):
        run(" ld.global.v2.u32 {%r2, %r3}, [%a10];", words())
    with pytest.raises(Finding, match=r"out of bounds: 4 bytes at byte -4 of arg0"):
        run(" ld.global.u32 %r2, [%a10+-4];", words())
    with pytest.raises(Finding, match="global memory out of bounds: 4 bytes at"):
        run(" mov.b64 %a12, 64;\n ld.global.u32 %r2, [%a12];", words())


def test_a_guarded_access_may_point_anywhere():
    out = words(8)
    run(" setp.lt.u32 %p1, %r0, 8;\n mov.b32 %r2, 5;\n @%p1 ld.global.u32 %r2, [%a10];\n add.s32 %r2, %r2, 1;\n @%p1 st.global.u32 [%a10], %r2;", out)
    assert out.eq(1).all()


def test_pointers_in_memory_reach_live_tensors():
    target, out = torch.arange(32).float(), words(dtype=torch.float32)
    table = torch.tensor([target.data_ptr()])
    run(" ld.global.u64 %a12, [%a0];\n add.s64 %a13, %a12, %a11;\n ld.global.f32 %f1, [%a13];\n st.global.f32 [%a10], %f1;", table, out)
    assert torch.equal(out, target)


def test_a_register_picks_one_of_several_parameters():
    """What LLVM makes of a member of a tuple of arguments that is chosen at run time."""
    even, odd, out = torch.arange(32), torch.arange(32) + 100, words(dtype=torch.int64)
    body = " mov.b32 %r2, arg0;\n mov.b32 %r3, arg1;\n and.b32 %r4, %r0, 1;\n setp.eq.u32 %p1, %r4, 1;\n selp.b32 %r2, %r3, %r2, %p1;\n"
    body += " ld.param.b64 %a12, [%r2];\n shl.b32 %r5, %r0, 3;\n cvt.u64.u32 %a13, %r5;\n add.s64 %a12, %a12, %a13;\n add.s64 %a14, %a2, %a13;\n"
    run(body + " ld.global.b64 %a15, [%a12];\n st.global.b64 [%a14], %a15;", even, odd, out)
    assert torch.equal(out, torch.where(torch.arange(32) % 2 == 1, odd, even))


def test_unwritten_shared_memory_is_nan():
    out = words(dtype=torch.float32)
    run(" mov.u32 %r2, dynamic;\n ld.shared.f32 %f1, [%r2];\n st.global.f32 [%a10], %f1;", out, shared=4)
    assert out.isnan().all()


def test_atomics_act_in_thread_order():
    cell, out = words(1), words()
    run(" atom.global.add.u32 %r2, [%a0], 3;\n st.global.u32 [%a10], %r2;", cell, out)
    assert cell == 96 and out.tolist() == list(range(0, 96, 3))
    run(" atom.global.cas.b32 %r2, [%a0], 96, %r0;\n st.global.u32 [%a10], %r2;", cell, out)
    assert cell == 0 and out.tolist() == [96] + [0] * 31


COPY = """
 mov.u32 %r2, dynamic;
 add.s32 %r3, %r2, %r1;
 add.s64 %a12, %a0, %a11;
 cp.async.ca.shared.global [%r3], [%a12], 4;
 cp.async.commit_group;
 cp.async.ca.shared.global [%r3+128], [%a12], 4, {size};
 cp.async.commit_group;
 cp.async.wait_group {allowed};
 ld.shared.u32 %r5, [%r3];
 ld.shared.u32 %r6, [%r3+{second}];
 add.s32 %r7, %r5, %r6;
 st.global.u32 [%a10], %r7;
"""


@pytest.mark.parametrize("allowed, second, fine", [(0, 128, True), (1, 0, True), (1, 128, False), (2, 0, False)])
def test_asynchronous_copies_must_be_waited_for(allowed, second, fine):
    x, out = torch.arange(32).int(), words()
    body = " mov.b32 %r4, 4;\n" + COPY.format(size="%r4", allowed=allowed, second=second)
    if fine:
        run(body, x, out, shared=256)
        assert torch.equal(out, 2 * x)
    else:
        with pytest.raises(Finding, match=r"asynchronous copy was not waited for: copied at hand.py:7, PTX line \d+: cp.async"):
            run(body, x, out, shared=256)


def test_an_asynchronous_copy_of_nothing_writes_zeros():
    x, out = torch.arange(32).int(), words()
    run(" mov.b32 %r4, 0;\n" + COPY.format(size="%r4", allowed=0, second=128), x, out, shared=256)
    assert torch.equal(out, x)


INTEGERS = {
    "bfe.u32 %r2, %r9, 5, 9": lambda x: x >> 5 & 511,
    "bfe.s32 %r2, %r9, 5, 9": lambda x: (x >> 5 & 511) - (512 if x >> 13 & 1 else 0),
    "bfi.b32 %r2, %r9, 0x12345678, 8, 12": lambda x: 0x12345678 & ~0xFFF00 | (x & 0xFFF) << 8,
    "prmt.b32 %r2, %r9, 0x44332211, 0x1647": lambda x: int.from_bytes(bytes([0x44, 0x11, 0x33, x >> 8 & 255]), "little"),
    "lop3.b32 %r2, %r9, 0x0F0F0F0F, 0x33333333, 0x96": lambda x: x ^ 0x0F0F0F0F ^ 0x33333333,
    "shf.l.wrap.b32 %r2, %r9, %r9, 7": lambda x: x << 7 | x >> 25,
    "popc.b32 %r2, %r9": lambda x: x.bit_count(),
    "clz.b32 %r2, %r9": lambda x: 32 - x.bit_length(),
    "brev.b32 %r2, %r9": lambda x: int(f"{x:032b}"[::-1], 2),
    "mul.hi.u32 %r2, %r9, 0x9E3779B9": lambda x: x * 0x9E3779B9 >> 32,
    "mul.hi.s32 %r2, %r9, -12345": lambda x: (x - (x >> 31 << 32)) * -12345 >> 32,
    "div.s32 %r2, %r9, -7": lambda x: int((x - (x >> 31 << 32)) / -7),
    "shr.s32 %r2, %r9, 40": lambda x: -(x >> 31),
    "shl.b32 %r2, %r9, 40": lambda x: 0,
    "abs.s32 %r2, %r9": lambda x: abs(x - (x >> 31 << 32)),
    "cvt.s32.s8 %r2, %r9": lambda x: (x & 255) - (x & 128) * 2,
    "min.s32 %r2, %r9, 5": lambda x: min(x - (x >> 31 << 32), 5),
    "add.cc.u32 %r3, %r9, %r9; addc.u32 %r2, %r9, 0": lambda x: x + (2 * x >> 32),
    "mul.wide.u32 %a12, %r9, 0xDEADBEEF; mul.hi.u64 %a13, %a12, %a12; cvt.u32.u64 %r2, %a13": lambda x: (x * 0xDEADBEEF) ** 2 >> 64,
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integer_instructions(instruction):
    x, out = torch.randint(-(2**31), 2**31, (32,)).int(), words()
    x[:3] = torch.tensor([0, -1, -(2**31)])
    run(f" add.s64 %a14, %a0, %a11;\n ld.global.u32 %r9, [%a14];\n {instruction};\n st.global.u32 [%a10], %r2;", x, out)
    expected = [INTEGERS[instruction](v % 2**32) % 2**32 for v in x.tolist()]
    assert [v % 2**32 for v in out.tolist()] == expected


def test_16_bit_floats_round_as_torch_does():
    x = (torch.randn(4096) * torch.logspace(-8, 8, 4096)).numpy()
    x[:4] = [np.nan, np.inf, -0.0, 1 + 2**-8]
    bf16 = torch.from_numpy(numerics.to_bf16(x).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(bf16, torch.from_numpy(x).bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(numerics.from_bf16(numerics.to_bf16(x))[1:], bf16.float().numpy()[1:])


@pytest.mark.parametrize("kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_8_bit_floats_round_as_torch_does(kind, dtype):
    x = torch.randn(4096) * torch.logspace(-6, 6, 4096)
    x[:2] = torch.tensor([0.0, -0.0])
    largest = torch.finfo(dtype).max
    expected = x.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()
    assert np.array_equal(numerics.to_fp8(x.numpy(), kind), expected)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(numerics.FP8[kind], values, equal_nan=True)


@pytest.mark.parametrize("stride, passes", [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts_are_counted(stride, passes):
    counters = Counters()
    run(f" mov.u32 %r2, dynamic;\n mad.lo.s32 %r3, %r0, {stride}, %r2;\n ld.shared.u32 %r4, [%r3];", shared=4096, counters=counters)
    (access,) = counters.accesses.values()
    assert (access.requests, access.per_request) == (1, passes)


@pytest.mark.parametrize("offset, sectors", [(0, 4), (4, 5)])
def test_sectors_are_counted(offset, sectors):
    counters = Counters()
    x = torch.zeros(64, dtype=torch.int32)
    x = x[-x.data_ptr() % 32 // 4 :]
    program, launch = run(f" ld.global.u32 %r2, [%a10+{offset}];", x, counters=counters)
    (access,) = counters.accesses.values()
    assert (access.per_request, access.ideal) == (sectors, 4)
    assert instruction_mix(program, launch.executed)["global memory"] == 1


def test_what_is_not_known_is_named():
    with pytest.raises(Unsupported, match=r"does not know this instruction\s+at hand.py:7, PTX line \d+: tex.1d"):
        run(" tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [tex, {%r1}];", words())
    with pytest.raises(ValueError, match="no .entry"):
        Program("")


CUDA = """
extern "C" __global__ void scan(const int* x, int* y, float* z) {
  __shared__ int part[4];
  int v = x[threadIdx.x], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) { int o = __shfl_up_sync(~0u, v, d); if (lane >= d) v += o; }
  if (lane == 31) part[warp] = v;
  __syncthreads();
  for (int w = 0; w < warp; ++w) v += part[w];
  y[threadIdx.x] = v;
  z[threadIdx.x] = rsqrtf((float)v) + v / 3;
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_code_of_nvcc_runs(tmp_path):
    (tmp_path / "scan.cu").write_text(CUDA)
    subprocess.run(["nvcc", "-ptx", "-arch=compute_80", "-lineinfo", "scan.cu", "-o", "scan.ptx"], cwd=tmp_path, check=True)
    x, y, z = torch.randint(1, 9, (128,)).int(), words(128), words(128, torch.float32)
    memory = GlobalMemory()
    arguments = [memory.add(n, t.data_ptr(), 512, t) for n, t in zip("xyz", (x, y, z))]
    Program((tmp_path / "scan.ptx").read_text()).run((1,), arguments, memory, threads=128)
    assert torch.equal(y, x.cumsum(0).int())
    torch.testing.assert_close(z, y.float().rsqrt() + y.div(3, rounding_mode="trunc"))
