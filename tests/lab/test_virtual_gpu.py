"""Compiled Triton kernels, executed without a GPU, agree with torch; kernels that are wrong are caught."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the virtual GPU runs compiled kernels; run in the ordinary process", allow_module_level=True)
triton = pytest.importorskip("triton", minversion="3.8")

import feature_kernels as k

from mtkernels.lab import driver as stub
from mtkernels.lab.ptx import Finding
from mtkernels.lab.virtual_gpu import VirtualGPU


@pytest.fixture
def gpu():
    with VirtualGPU(arch=80) as gpu:
        yield gpu


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.double().abs().max()), equal_nan=True)


def matmul(a, b, block=(64, 32, 32), precision="ieee", **options):
    (M, K), N = a.shape, b.shape[1]
    c = torch.full((M, N), torch.nan, dtype=a.dtype)
    grid = triton.cdiv(M, block[0]), triton.cdiv(N, block[1])
    k.matmul_kernel[grid](a, b, c, M, N, K, a.stride(0), b.stride(0), c.stride(0), *block, precision, **options)
    return c


def test_several_programs_and_a_ragged_edge(gpu):
    x, y = torch.randn(1000), torch.zeros(1024)
    k.affine_kernel[(8,)](x, y, 1000, BLOCK=128)
    assert torch.equal(y[:1000], x * 2 + 1) and not y[1000:].any()


@pytest.mark.parametrize(
    "dtype, precision, tolerance",
    [
        (torch.bfloat16, "ieee", 2**-9),
        (torch.float16, "ieee", 2**-12),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32", 2**-9),
        (torch.float32, "tf32x3", 2e-6),
    ],
)
def test_matmul_of_ragged_shapes(dtype, precision, tolerance, gpu):
    a, b = torch.randn(96, 104).to(dtype), torch.randn(104, 88).to(dtype)
    close(matmul(a, b, precision=precision, num_warps=4, num_stages=3), a.double() @ b.double(), tolerance)


@pytest.mark.parametrize("block, options", [((32, 64, 64), dict(num_warps=8, num_stages=4)), ((16, 16, 32), dict(num_warps=1, num_stages=2))])
def test_matmul_configurations(block, options, gpu):
    a, b = torch.randn(50, 72).bfloat16(), torch.randn(72, 40).bfloat16()
    close(matmul(a, b, block, **options), a.double() @ b.double(), 2**-9)


def test_matmul_of_unaligned_rows(gpu):
    a, b = torch.randn(40, 37).bfloat16(), torch.randn(37, 33).bfloat16()
    close(matmul(a, b, num_warps=4), a.double() @ b.double(), 2**-9)


def test_device_descriptors_become_pointers(gpu):
    a, b = torch.randn(80, 48).bfloat16(), torch.randn(48, 64).bfloat16()
    c = torch.empty(80, 64, dtype=torch.bfloat16)
    k.descriptor_matmul_kernel[(2, 2)](a, b, c, 80, 64, 48, 64, 32, 32)
    close(c, a.double() @ b.double(), 2**-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_softmax_of_odd_rows(dtype, tolerance, gpu):
    x = torch.randn(5, 99).to(dtype)
    y = torch.empty_like(x)
    k.softmax_kernel[(5,)](x, y, 99, BLOCK=128)
    close(y, x.double().softmax(-1), tolerance)


def test_reductions_along_both_axes(gpu):
    x, sums, args = torch.randn(32, 64), torch.empty(96), torch.empty(96, dtype=torch.int32)
    k.reduce_axes_kernel[(1,)](x, sums, args, 32, 64)
    close(sums, torch.cat([x.double().sum(1), x.double().sum(0)]))
    assert torch.equal(args, torch.cat([x.argmax(1), x.argmin(0)]).int())


def test_scans_sort_and_histogram(gpu):
    x = torch.randint(0, 16, (256,), dtype=torch.int32)
    sums, ordered, counts = torch.empty_like(x), torch.empty_like(x), torch.empty(16, dtype=torch.int32)
    k.scan_kernel[(1,)](x, sums, ordered, counts, 256, 16)
    assert torch.equal(sums, x.cumsum(0).int()) and torch.equal(ordered, x.sort().values)
    assert torch.equal(counts, torch.bincount(x, minlength=16).int())


def test_topk(gpu):
    x, y = torch.randn(64), torch.empty(8)
    k.topk_kernel[(1,)](x, y, 64, 8)
    assert torch.equal(y, x.topk(8).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_atomics_act_one_after_another(dtype, gpu):
    cells, old = torch.zeros(16, dtype=dtype), torch.empty(8 * 64, dtype=dtype)
    k.atomics_kernel[(8,)](cells, old, BLOCK=64)
    assert cells.tolist()[:6] == [128, 128, 128, 128, 7, 8]
    assert torch.equal(old.view(-1, 4).T.sort().values, torch.arange(128).expand(4, 128).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_atomic_add_of_halves(dtype, gpu):
    cells = torch.zeros(32, dtype=dtype)
    k.atomic_add_kernel[(6,)](cells, BLOCK=32)
    assert cells.eq(6).all()


def test_a_lock_between_programs(gpu):
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    k.lock_kernel[(7,)](lock, count)
    assert count == 7 and not lock


def test_the_last_program_sees_all_the_others(gpu):
    x, part, counter, out = torch.randn(20 * 64), torch.empty(20), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    k.last_block_kernel[(20,)](x, part, counter, out, BLOCK=64)
    close(out, x.double().sum()[None])


def test_philox_bits(gpu):
    words, uniform = torch.empty(1024, dtype=torch.int64), torch.empty(1024)
    k.random_kernel[(1,)](words, uniform, 0, 512)
    assert words[0] == 0x6627E8D5 and words[512] == 0x9B00DBD8
    assert 0.45 < uniform[:512].mean() < 0.55 and 0.85 < uniform[512:].std() < 1.15


def test_programs_that_take_different_paths(gpu):
    counts = torch.tensor([4, 0, 1, 4, 7, 2], dtype=torch.int32)
    x, y = torch.randn(7 * 64), torch.empty(6, 64)
    k.while_kernel[(6,)](x, y, counts, BLOCK=64)
    expected = torch.stack([x[: 64 * n].view(-1, 64).sum(0) + (100 if n > 3 else -1 if n == 0 else 0) for n in counts.tolist()])
    close(y, expected)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int64])
def test_casts(source, target, gpu):
    x = (torch.randn(128) * 100).to(source)
    y = torch.empty(128, dtype=target)
    k.cast_kernel[(1,)](x, y, BLOCK=128)
    assert torch.equal(y, x.to(target))


def test_integer_arithmetic(gpu):
    a = torch.randint(-(2**31), 2**31, (128,)).int()
    b = torch.randint(1, 1000, (128,)).int() * torch.tensor([1, -1]).repeat(64).int()
    out = torch.empty(6, 128, dtype=torch.int32)
    k.integer_kernel[(1,)](a, b, out, 128)
    unsigned = [int(x) % 2**32 * (int(y) % 2**32) >> 32 for x, y in zip(a, b)]
    high = torch.tensor([u - 2**32 if u >= 2**31 else u for u in unsigned], dtype=torch.int32)
    expected = [torch.div(a, b, rounding_mode="trunc"), torch.fmod(a, b), a >> (b & 15), a << (b & 15), high, torch.minimum(a, b) ^ torch.maximum(a, b)]
    assert torch.equal(out, torch.stack(expected))


def test_float_functions(gpu):
    x, y = torch.randn(128) * 3, torch.empty(7, 128)
    k.math_kernel[(1,)](x, y, 128)
    d = x.double()
    close(y, torch.stack([d.exp(), (d.abs() + 1).log(), d.abs().sqrt(), d.sigmoid(), 1 / d, d.floor(), d.sin()]), 1e-6)


def test_layout_changes(gpu):
    x, y, index = torch.randn(32, 64), torch.empty(3, 32 * 64), torch.randint(0, 64, (32, 64), dtype=torch.int32)
    k.layout_kernel[(1,)](x, y, index, 32, 64)
    swapped = x.view(32, 32, 2).flip(-1)
    assert torch.equal(y, torch.stack([x.T.reshape(-1), swapped.reshape(-1), x.gather(1, index.long()).reshape(-1)]))


def test_out_of_bounds_names_kernel_line_and_argument(gpu):
    where = r"x_ptr \(400 bytes\); block \(0, 0, 0\), thread \d+\s+at feature_kernels.py:\d+, PTX line \d+: ld.global"
    with pytest.raises(Finding, match=f"unmasked_kernel: global memory out of bounds: .*{where}"):
        k.unmasked_kernel[(2,)](torch.randn(100), torch.empty(256), BLOCK=128)


def test_out_of_bounds_store_through_a_view_is_caught(gpu):
    whole = torch.zeros(256)
    with pytest.raises(Finding, match=r"out of bounds.*y_ptr.*[^!]*st.global"):
        k.unmasked_kernel[(2,)](torch.randn(256), whole[:100], BLOCK=128)
    assert not whole[100:].any()


def test_counters_tell_coalesced_from_scattered():
    x, y = torch.randn(128 * 16), torch.empty(128)
    with VirtualGPU(counters=True) as gpu:
        k.column_kernel[(1,)](x, y, 1, 128)
        k.column_kernel[(1,)](x, y, 16, 128)
    reads = [next(a for row in launch.lines() for op, a in row["accesses"] if op.startswith("ld.global")) for launch in gpu.launches]
    assert [r.per_request for r in reads] == [4.0, 32.0]
    assert all(r.bytes == 512 and r.ideal == 4.0 for r in reads)
    assert "32.00 sectors" in gpu.launches[1].report()


def test_counted_instructions_of_a_matmul(gpu):
    a = b = torch.randn(64, 64).bfloat16()
    matmul(a, b, (64, 64, 32), num_warps=4)
    # 64 x 64 x 64 in m16n8k16 pieces
    assert gpu.launches[0].instructions["tensor core"] == 4 * 8 * 4
    with pytest.raises(ValueError, match="counters=True"):
        gpu.launches[0].report()


@pytest.fixture
def hopper():
    with VirtualGPU(arch=90) as gpu:
        yield gpu


def issued(launch, op):
    """Times a warp issued an instruction."""
    blocks = launch.program.translation.blocks
    instructions = launch.program.kernel.instructions
    return sum(launch.executed.get(b.index, 0) * sum(i.op.startswith(op) for i in instructions[b.start : b.end]) for b in blocks)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
@pytest.mark.parametrize("block, options", [((64, 64, 32), dict(num_warps=4, num_stages=3)), ((128, 32, 64), dict(num_warps=8, num_stages=2))])
def test_hopper_matmul_of_pointers(dtype, tolerance, block, options, hopper):
    a, b = torch.randn(150, 104).to(dtype), torch.randn(104, 88).to(dtype)
    close(matmul(a, b, block, **options), a.double() @ b.double(), tolerance)
    m, n = triton.cdiv(150, block[0]), triton.cdiv(88, block[1])
    assert issued(hopper.launches[0], "wgmma.mma_async") == m * n * 4 * (block[0] // 64) * -(-104 // block[2]) * block[2] // 16


def test_hopper_tf32_matmul(hopper):
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    close(matmul(a, b, precision="tf32", num_warps=4), a.double() @ b.double(), 2**-9)
    assert issued(hopper.launches[0], "wgmma.mma_async")


@pytest.mark.parametrize("block_n", [16, 64, 128])
def test_hopper_copies_through_host_descriptors(block_n, hopper):
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b = torch.randn(100, 72).bfloat16(), torch.randn(72, 136).bfloat16()
    c = torch.full((100, 136), torch.nan, dtype=torch.bfloat16)
    blocks = [a, [64, 64]], [b, [64, block_n]], [c, [64, block_n]]
    descriptors = [TensorDescriptor.from_tensor(t, shape) for t, shape in blocks]
    k.host_descriptor_matmul_kernel[(2, triton.cdiv(136, block_n))](*descriptors, 72, 64, block_n, 64, num_warps=4, num_stages=3)
    close(c, a.double() @ b.double(), 2**-9)
    assert issued(hopper.launches[0], "cp.async.bulk.tensor")


def test_hopper_copies_through_device_descriptors(hopper):
    a, b = torch.randn(80, 48).bfloat16(), torch.randn(48, 64).bfloat16()
    c = torch.full((80, 64), torch.nan, dtype=torch.bfloat16)
    k.descriptor_matmul_kernel[(2, 2)](a, b, c, 80, 64, 48, 64, 32, 32)
    close(c, a.double() @ b.double(), 2**-9)
    assert issued(hopper.launches[0], "tensormap.replace")


def test_hopper_warp_specialisation(hopper):
    """Loads and products run in different warps of a block, which meet at barriers in memory."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b, c = (torch.randn(128, 128).bfloat16() for _ in range(3))
    descriptors = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
    k.specialised_matmul_kernel[(2, 2)](*descriptors, 128, 64, 64, 64, num_warps=4, num_stages=3)
    close(c, a.double() @ b.double(), 2**-9)
    assert hopper.launches[0].program.kernel.threads > 128


@pytest.mark.parametrize("arch, dtype", [(80, torch.int8), (90, torch.int8), (90, torch.float8_e4m3fn), (90, torch.float8_e5m2)])
def test_dot_of_8_bit_types(arch, dtype):
    a, b = ((torch.randn(64, 64) * 20).to(dtype) for _ in range(2))
    c = torch.empty(64, 64, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with VirtualGPU(arch):
        k.small_dot_kernel[(1,)](a, b, c, 64)
    close(c, a.double() @ b.double().T)


def test_clusters_are_refused():
    with VirtualGPU(arch=90), pytest.raises(NotImplementedError, match="num_ctas=2"):
        k.affine_kernel[(2,)](torch.randn(128), torch.empty(128), 128, BLOCK=64, num_ctas=2)


def test_the_driver_is_restored():
    from triton.runtime.driver import driver

    before = driver._active
    with pytest.raises(ZeroDivisionError), VirtualGPU():
        assert driver._active is not before and stub.active()
        1 / 0
    assert driver._active is before and not stub.active()


def test_kernels_may_be_collected_outside_the_block():
    with VirtualGPU():
        compiled = k.affine_kernel[(1,)](torch.randn(64), torch.empty(64), 64, BLOCK=64)
    compiled.__del__()


def test_what_cannot_be_emulated_is_refused():
    with pytest.raises(ValueError, match="arch 100.*use 80 or 90"):
        VirtualGPU(arch=100)
