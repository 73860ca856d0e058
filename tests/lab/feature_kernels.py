"""Small Triton kernels, one per language feature that a tool of the lab has to get right."""

import triton
import triton.language as tl


@triton.jit
def affine_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n) * 2 + 1, mask=o < n)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        b_a = tl.load(a_ptr + o_m[:, None] * stride_a + (k + o_k)[None, :], mask=(o_m[:, None] < M) & m_k[None, :], other=0.0)
        b_b = tl.load(b_ptr + (k + o_k)[:, None] * stride_b + o_n[None, :], mask=m_k[:, None] & (o_n[None, :] < N), other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    p_c = c_ptr + o_m[:, None] * stride_c + o_n[None, :]
    tl.store(p_c, acc.to(c_ptr.dtype.element_ty), mask=(o_m[:, None] < M) & (o_n[None, :] < N))


@triton.jit
def descriptor_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def host_descriptor_matmul_kernel(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def specialised_matmul_kernel(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, warp_specialize=True):
        acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def small_dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    p = o[:, None] * N + o[None, :]
    tl.store(c_ptr + p, tl.dot(tl.load(a_ptr + p), tl.trans(tl.load(b_ptr + p))))


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + o, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=o < n)


@triton.jit
def reduce_axes_kernel(x_ptr, sums_ptr, arg_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(sums_ptr + tl.arange(0, M), tl.sum(x, 1))
    tl.store(sums_ptr + M + tl.arange(0, N), tl.sum(x, 0))
    tl.store(arg_ptr + tl.arange(0, M), tl.argmax(x, 1))
    tl.store(arg_ptr + M + tl.arange(0, N), tl.argmin(x, 0))


@triton.jit
def scan_kernel(x_ptr, sums_ptr, sorted_ptr, counts_ptr, N: tl.constexpr, BINS: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(x_ptr + o)
    tl.store(sums_ptr + o, tl.cumsum(x, 0))
    tl.store(sorted_ptr + o, tl.sort(x))
    tl.store(counts_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))


@triton.jit
def topk_kernel(x_ptr, y_ptr, N: tl.constexpr, K: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, K)[None, :], tl.topk(tl.load(x_ptr + tl.arange(0, N)[None, :]), K))


@triton.jit
def atomics_kernel(cells_ptr, old_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    one = tl.full([BLOCK], 1, cells_ptr.dtype.element_ty)
    old = tl.atomic_add(cells_ptr + o % 4, one)
    tl.atomic_max(cells_ptr + 4, tl.program_id(0).to(cells_ptr.dtype.element_ty))
    tl.atomic_add(cells_ptr + 5, tl.full([], 1, cells_ptr.dtype.element_ty), sem="relaxed")
    tl.store(old_ptr + tl.program_id(0) * BLOCK + o, old)


@triton.jit
def atomic_add_kernel(cells_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(cells_ptr + tl.arange(0, BLOCK), tl.full([BLOCK], 1, cells_ptr.dtype.element_ty))


@triton.jit
def lock_kernel(lock_ptr, count_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(count_ptr, tl.load(count_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def last_block_kernel(x_ptr, part_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr):
    block, o = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(part_ptr + block, tl.sum(tl.load(x_ptr + block * BLOCK + o), 0))
    if tl.atomic_add(counter_ptr, 1) == tl.num_programs(0) - 1:
        m = o < tl.num_programs(0)
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + o, mask=m, other=0.0), 0))


@triton.jit
def random_kernel(words_ptr, uniform_ptr, seed, N: tl.constexpr):
    o = tl.arange(0, N)
    w0, w1, w2, w3 = tl.philox(seed, o, o * 0, o * 0, o * 0, n_rounds=10)
    tl.store(words_ptr + o, w0.to(tl.int64))
    tl.store(words_ptr + N + o, w3.to(tl.int64))
    tl.store(uniform_ptr + o, tl.rand(seed, o))
    tl.store(uniform_ptr + N + o, tl.randn(seed, o))


@triton.jit
def while_kernel(x_ptr, y_ptr, counts_ptr, BLOCK: tl.constexpr):
    block, o = tl.program_id(0), tl.arange(0, BLOCK)
    n, i = tl.load(counts_ptr + block), 0
    acc = tl.zeros([BLOCK], tl.float32)
    while i < n:
        acc += tl.load(x_ptr + i * BLOCK + o)
        i += 1
    if n > 3:
        acc += 100
    elif n == 0:
        acc -= 1
    tl.store(y_ptr + block * BLOCK + o, acc)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o).to(y_ptr.dtype.element_ty))


@triton.jit
def integer_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b = tl.load(a_ptr + o), tl.load(b_ptr + o)
    tl.store(out_ptr + o, a // b)
    tl.store(out_ptr + N + o, a % b)
    tl.store(out_ptr + 2 * N + o, a >> (b & 15))
    tl.store(out_ptr + 3 * N + o, a << (b & 15))
    tl.store(out_ptr + 4 * N + o, tl.umulhi(a, b))
    tl.store(out_ptr + 5 * N + o, tl.minimum(a, b) ^ tl.maximum(a, b))


@triton.jit
def math_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(x_ptr + o)
    tl.store(y_ptr + o, tl.exp(x))
    tl.store(y_ptr + N + o, tl.log(tl.abs(x) + 1))
    tl.store(y_ptr + 2 * N + o, tl.sqrt(tl.abs(x)))
    tl.store(y_ptr + 3 * N + o, tl.sigmoid(x))
    tl.store(y_ptr + 4 * N + o, tl.math.div_rn(1.0, x))
    tl.store(y_ptr + 5 * N + o, tl.floor(x))
    tl.store(y_ptr + 6 * N + o, tl.sin(x))


@triton.jit
def layout_kernel(x_ptr, y_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(y_ptr + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(x))
    even, odd = tl.split(tl.reshape(x, [M, N // 2, 2]))
    joined = tl.reshape(tl.join(odd, even), [M, N])
    tl.store(y_ptr + M * N + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], joined)
    index = tl.load(index_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(y_ptr + 2 * M * N + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.gather(x, index, 1))


# Wrong on purpose.


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o))


@triton.jit
def lying_hint_kernel(x_ptr, y_ptr, offset, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(tl.multiple_of(x_ptr + offset, 16) + o))


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0, "x must be positive")


@triton.jit
def column_kernel(x_ptr, y_ptr, stride, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, tl.load(x_ptr + o * stride))
