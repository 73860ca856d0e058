"""Kernels that are right, each with the defects that mutations.py lists; BUG = "" is the right one."""

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BUG: tl.constexpr = "",
):  # fmt: skip
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BUG == "overlapping tiles":
        o_n -= tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_a = (o_m[:, None] < M) & (o_k[None, :] < K)
        if BUG == "mask dropped":
            m_a = o_k[None, :] < K
        row = o_m + 1 if BUG == "wrong row offset" else o_m
        b_a = tl.load(a_ptr + row[:, None] * K + o_k[None, :], mask=m_a, other=0.0)
        b_b = tl.load(b_ptr + o_k[:, None] * N + o_n[None, :], mask=(o_k[:, None] < K) & (o_n[None, :] < N), other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision="ieee")
    m_c = (o_m[:, None] < M) & (o_n[None, :] < N)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc.to(c_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def split_sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr, BUG: tl.constexpr = ""):
    """out[n] += sum of this program's rows."""
    o_n = tl.arange(0, N)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.sum(tl.load(x_ptr + o_r[:, None] * N + o_n[None, :]), axis=0)
    if BUG == "no atomic":
        tl.store(out_ptr + o_n, tl.load(out_ptr + o_n) + total)
    elif BUG == "atomic within a program":
        tl.atomic_add(out_ptr + o_n, total, scope="cta")
    else:
        tl.atomic_add(out_ptr + o_n, total)


@triton.jit
def last_block_kernel(x_ptr, part_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr, P: tl.constexpr, SEM: tl.constexpr):
    """The last program to arrive sums the parts, clears them and resets the counter."""
    block, o_p = tl.program_id(0), tl.arange(0, P)
    tl.store(part_ptr + block, tl.sum(tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK))))
    if tl.atomic_add(count_ptr, 1, sem=SEM) == tl.num_programs(0) - 1:
        m_p = o_p < tl.num_programs(0)
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + o_p, mask=m_p, other=0.0)))
        tl.store(part_ptr + o_p, tl.zeros([P], tl.float32), mask=m_p)
        tl.store(count_ptr, 0)


@triton.jit
def lock_kernel(lock_ptr, count_ptr, SEM: tl.constexpr):
    while tl.atomic_cas(lock_ptr, 0, 1, sem=SEM) == 1:
        pass
    tl.store(count_ptr, tl.load(count_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0, sem=SEM)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, BUG: tl.constexpr = ""):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    if BUG == "no other":
        x = tl.load(x_ptr + row * n + o, mask=o < n).to(tl.float32)
    else:
        x = tl.load(x_ptr + row * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + o, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=o < n)


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, stride_x, N: tl.constexpr, BUG: tl.constexpr = ""):
    row, o = tl.program_id(0), tl.arange(0, N)
    if BUG == "int32 overflow":
        offset = row * stride_x
    else:
        offset = row.to(tl.int64) * stride_x
    tl.store(y_ptr + row * N + o, tl.load(x_ptr + offset + o))


@triton.jit
def update_kernel(x_ptr, y_ptr, N: tl.constexpr, BUG: tl.constexpr = ""):
    """y = x, and a second launch would do y += x."""
    o = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + o)
    if BUG == "output read":
        x += tl.load(y_ptr + o)
    if BUG == "output not written":
        tl.store(y_ptr + o, x, mask=tl.program_id(0) < 3)
    else:
        tl.store(y_ptr + o, x)


@triton.jit
def scatter_kernel(x_ptr, index_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + tl.load(index_ptr + o), tl.load(x_ptr + o))


@triton.jit
def shift_kernel(x_ptr, n, BLOCK: tl.constexpr, BUG: tl.constexpr = ""):
    """In place: every program moves its own block by one, or reads its neighbour's first element."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reach = n if BUG == "neighbour" else (tl.program_id(0) + 1) * BLOCK
    x = tl.load(x_ptr + o + 1, mask=(o + 1 < reach) & (o + 1 < n), other=0.0)
    tl.store(x_ptr + o, x, mask=o < n)


@triton.jit
def sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(0, n, BLOCK):
        acc += tl.load(x_ptr + i + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(acc))


@triton.jit
def wide_load_kernel(x_ptr, y_ptr, first, N: tl.constexpr):
    p_x = (x_ptr + first).to(tl.pointer_type(tl.int64))
    tl.store(y_ptr + tl.arange(0, N), tl.load(p_x + tl.arange(0, N)))


@triton.jit
def table_kernel(table_ptr, sizes_ptr, y_ptr, EXTRA: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = sum of the float32 vector whose address is table[i]."""
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    p_x = tl.load(table_ptr + i).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + i, tl.sum(tl.load(p_x + o, mask=o < tl.load(sizes_ptr + i) + EXTRA, other=0.0)))


@triton.jit
def turn_kernel(turn_ptr, order_ptr):
    tl.store(order_ptr + tl.atomic_add(turn_ptr, 1), tl.program_id(0))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + o, tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o), input_precision=PRECISION))


@triton.jit
def two_widths_kernel(words_ptr, bytes_ptr, N: tl.constexpr, OVERLAP: tl.constexpr):
    """Program 0 reads words of a buffer, program 1 writes bytes behind them."""
    o = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(words_ptr + 2 * N + o, tl.load(words_ptr + o))
    else:
        tl.store(bytes_ptr + 4 * N - OVERLAP + o, tl.zeros([N], tl.uint8))


@triton.jit
def flag_kernel(flag_ptr, data_ptr, out_ptr, SEM: tl.constexpr):
    """Program 0 hands a value to the others, which wait; run it in the grid's order."""
    if tl.program_id(0) == 0:
        tl.store(data_ptr, 3.0)
        tl.atomic_xchg(flag_ptr, 1, sem="release")
    else:
        while tl.atomic_add(flag_ptr, 0, sem=SEM) == 0:
            pass
        tl.store(out_ptr + tl.program_id(0) - 1, tl.load(data_ptr))


@triton.jit
def pair_kernel(pair, out_ptr, N: tl.constexpr):
    """out = the first tensor where the second is negative, else the second; pointers chosen lane by lane."""
    x_ptr, y_ptr = pair
    o = tl.arange(0, N)
    p = tl.where(tl.load(y_ptr + o) < 0, x_ptr + o, y_ptr + o)
    tl.store(out_ptr + o, tl.load(p))
