"""What launches the kernels of mutations.py: each function takes the defect, "" for none, and returns the outputs."""

import re

import broken_kernels as k
import feature_kernels as features
import numpy as np
import torch

from mtkernels.lab.cuda_emulator import unwritten

M, N, K = 100, 72, 80
BLOCKS = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16)


def matmul(BUG="", dtype=torch.float32):
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N, dtype=dtype)
    k.matmul_kernel[(4, 3)](a, b, c, M, N, K, **BLOCKS, BUG=BUG)
    return a, b, c


def right_matmul(dtype=torch.float32):
    a, b, c = matmul(dtype=dtype)
    torch.testing.assert_close(c, a @ b, rtol=2**-7, atol=2**-5)


def split_sum(BUG=""):
    x, out = torch.randn(64, 16), torch.empty(16) if BUG == "onto empty" else torch.zeros(16)
    k.split_sum_kernel[(8,)](x, out, 8, 16, BUG=BUG)
    return (out,)


def sum_in_order(BUG=""):
    """Sums of many magnitudes, so that the order of additions shows in the bits."""
    x, out = torch.randn(64, 16) * torch.randn(64, 16).mul(3).exp(), torch.zeros(16)
    if BUG:
        k.split_sum_kernel[(8,)](x, out, 8, 16)
    else:
        k.split_sum_kernel[(1,)](x, out, 64, 16)
    return (out,)


def last_block(BUG=""):
    x, out, count = torch.randn(5 * 16), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        k.last_block_kernel[(5,)](x, torch.empty(5), count, out, 16, 8, BUG or "acq_rel")
    if not BUG:
        torch.testing.assert_close(out[0], x.sum(), rtol=1e-4, atol=1e-4)
    return (out,)


def lock(BUG=""):
    count = torch.zeros(1, dtype=torch.int32)
    k.lock_kernel[(6,)](torch.zeros(1, dtype=torch.int32), count, BUG or "acq_rel")
    return (count,)


def softmax(BUG="", dtype=torch.float32):
    x = (torch.randn(5, 99) - 200).to(dtype)
    y = torch.empty_like(x)
    k.softmax_kernel[(5,)](x, y, 99, 128, BUG=BUG)
    if not BUG:
        torch.testing.assert_close(y, x.softmax(-1))
    return (y,)


def copy_rows(BUG=""):
    """The second row starts past 2^31 elements; only the touched pages exist."""
    x = torch.empty(3 * 2**30, dtype=torch.uint8).as_strided((3, 16), (2**30 + 2**29 - 8, 1))
    x.random_(100)
    y = torch.empty(3, 16, dtype=torch.uint8)
    k.copy_rows_kernel[(3,)](x, y, x.stride(0), 16, BUG=BUG)
    assert BUG or torch.equal(x, y)
    return (y,)


def update(BUG=""):
    y = torch.empty(64)
    k.update_kernel[(4,)](torch.randn(64), y, 16, BUG=BUG)
    return (y,)


def scatter(BUG=""):
    index, y = torch.tensor([0, 0, *range(2, 16)] if BUG else range(15, -1, -1)), torch.empty(16)
    k.scatter_kernel[(1,)](torch.randn(16), index, y, 16)
    return (y,)


def shift(BUG=""):
    k.shift_kernel[(4,)](torch.randn(60), 60, 16, BUG=BUG)


def wide_load(BUG=""):
    y = torch.empty(8, dtype=torch.int64)
    k.wide_load_kernel[(1,)](torch.arange(32, dtype=torch.int32), y, 3 if BUG else 4, 8)
    return (y,)


def two_widths(BUG=""):
    words = torch.zeros(64, dtype=torch.int32)
    k.two_widths_kernel[(2,)](words, words.view(torch.uint8), 16, 1 if BUG else 0)


def pair():
    x, y, out = torch.randn(32), torch.randn(32), torch.empty(32)
    k.pair_kernel[(1,)]((x, y), out, 32)
    assert torch.equal(out, torch.where(y < 0, x, y))


def table(BUG=""):
    buffer = torch.randn(64)
    tensors = [torch.randn(5), torch.randn(16), buffer[32:40], torch.randn(9)]
    sizes = torch.tensor([len(t) for t in tensors])
    pointers, y = torch.tensor([t.data_ptr() for t in tensors]), torch.empty(4)
    if BUG == "freed":
        tensors.clear()
    elif BUG == "advanced":
        pointers[0] += 4
    k.table_kernel[(4,)](pointers, sizes, y, 3 if BUG == "beyond" else 0, 32)
    if not BUG:
        torch.testing.assert_close(y, torch.stack([t.sum() for t in tensors]))
    return (y,)


def lying_hint(BUG=""):
    y = torch.empty(512)
    features.lying_hint_kernel[(1,)](torch.randn(600), y, 3 if BUG else 32, BLOCK=512)
    return (y,)


def assertion(BUG=""):
    features.assert_kernel[(1,)](1.0 - (torch.arange(64) == (40 if BUG else 64)).float(), BLOCK=64, debug=True)


def pipelined_matmul(BUG=""):
    """num_stages=3: tiles arrive by cp.async."""
    a, b, c = torch.randn(64, 96).bfloat16(), torch.randn(96, 64).bfloat16(), torch.empty(64, 64, dtype=torch.bfloat16)
    features.matmul_kernel[(1, 2)](a, b, c, 64, 64, 96, 96, 64, 64, 64, 32, 32, "ieee", num_warps=4, num_stages=3)
    return (c,)


def descriptor_matmul(BUG=""):
    a, b, c = (torch.randn(64, 64).bfloat16() for _ in range(3))
    features.descriptor_matmul_kernel[(1, 1)](a, b, c, 64, 64, 64, 64, 64, 32)
    return (c,)


def descriptors(host):
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b, c = torch.randn(80, 48).bfloat16(), torch.randn(48, 64).bfloat16(), torch.empty(80, 64, dtype=torch.bfloat16)
    if host:
        blocks = zip((a, b, c), ([64, 32], [32, 32], [64, 32]))
        features.host_descriptor_matmul_kernel[(2, 2)](*(TensorDescriptor.from_tensor(*t) for t in blocks), 48, 64, 32, 32)
    else:
        features.descriptor_matmul_kernel[(2, 2)](a, b, c, 80, 64, 48, 64, 32, 32)
    torch.testing.assert_close(c, a @ b, rtol=2**-7, atol=2**-6)


# Edits of PTX: (what must be there, what to make of it)

weaker_wait = r"cp.async.wait_group\s+(\w+)", lambda m: f"cp.async.wait_group {int(m.group(1), 0) + 1}"
no_wait = r"cp.async.wait_group[^;]*;", ""
no_barrier_wait = r"mbarrier.try_wait[^;]*;\s*@!complete bra.uni waitLoop;", ""
no_proxy_fence = r"fence.proxy.async.shared::cta;", ""
no_arrival = r"@%p\d+ mbarrier.arrive.expect_tx[^;]*;", ""
no_barrier_init = r"@%p\d+ mbarrier.init[^;]*;", ""


def edited(edit):
    """VirtualGPU's `edit` that makes one of these."""
    pattern, replacement = edit

    def apply(name, ptx):
        assert re.search(pattern, ptx)
        return re.sub(pattern, replacement, ptx)

    return apply


# Arguments of broken.cu


def rng():
    return np.random.default_rng(0)


def floats(*shape):
    return rng().standard_normal(shape, np.float32)


def wide_floats(n):
    """Of many magnitudes, so that the order of a sum shows."""
    generator = rng()
    return generator.standard_normal(n, np.float32) * np.exp(3 * generator.standard_normal(n, np.float32))


def f32(*shape):
    return unwritten(shape, np.float32)


def zeros(*shape):
    return np.zeros(shape, np.int32)


def bins(n):
    return rng().integers(0, 4, n).astype(np.int32)
