"""Small kernels that take too much of something, each beside the one that does not."""

import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, size_k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """c [M, N] = a [M, size_k] b [size_k, N]."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, size_k, K):
        o_k = k + tl.arange(0, K)
        b_a = tl.load(a_ptr + o_m[:, None] * size_k + o_k[None, :])
        b_b = tl.load(b_ptr + o_k[:, None] * N + o_n[None, :])
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc)


@triton.jit
def matmul_tma(a_ptr, b_ptr, c_ptr, size_k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    a = tl.make_tensor_descriptor(a_ptr, [M, size_k], [size_k, 1], [M, K])
    b = tl.make_tensor_descriptor(b_ptr, [size_k, N], [N, 1], [K, N])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [M, N])
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, size_k, K):
        acc = tl.dot(a.load([0, k]), b.load([k, 0]), acc)
    c.store([0, 0], acc.to(tl.bfloat16))


@triton.jit
def two_dots(a_ptr, b_ptr, c_ptr, size_k, rank, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, NESTED: tl.constexpr):
    """c = a b + a b again for the first `rank` columns: NESTED adds it inside the loop over k, otherwise after it."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    p_a = a_ptr + o_m[:, None] * size_k + o_k[None, :]
    p_b = b_ptr + o_k[:, None] * N + o_n[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, size_k, K):
        acc = tl.dot(tl.load(p_a + k), tl.load(p_b + k * N), acc)
        if NESTED:
            if k < rank:
                acc = tl.dot(tl.load(p_a + k), tl.load(p_b + k * N), acc)
    if not NESTED:
        for k in range(0, rank, K):
            acc = tl.dot(tl.load(p_a + k), tl.load(p_b + k * N), acc)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc)


@triton.jit
def row_sums(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = sums of the rows of x [BLOCK, n]."""
    o_m = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n):
        total += tl.load(x_ptr + o_m * n + i)
    tl.store(y_ptr + o_m, total)


@triton.jit
def _apply(x, y):
    return x * 2 + y


@triton.jit
def calls(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o_m = tl.arange(0, BLOCK)
    tl.store(y_ptr + o_m, _apply(tl.load(x_ptr + o_m), 1.0))


@triton.jit
def sums(xs, y_ptr, BLOCK: tl.constexpr):
    """y [BLOCK] = the sum of the arrays of a tuple."""
    o_m = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(xs)):
        total += tl.load(xs[i] + o_m)
    tl.store(y_ptr + o_m, total)
