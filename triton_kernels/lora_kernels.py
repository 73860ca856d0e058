"""Device code that lora_shrink.py and lora_expand.py share: one tile of each LoRA product.

P positions of n adapters, sorted by adapter: the j-th is position p = perm[j] of row p // n_slots, its ordinal in the
adapter is its dropout uid. A rank belongs to the bucket b = 0..3 of BLOCK_R = 16 << b that covers it; a kernel compiles
the buckets of the constexpr bit set BUCKETS and a tile takes its own, so no adapter's arithmetic depends on its
neighbours. `mask` is (threshold, seed, site, step) of the dropout, `bits` (pointer, row stride, bytes) of keep bits [P, bytes],
which the shrink writes and everybody reads in place of drawing the mask; the pointer is None where it is drawn again.
"""

import triton
import triton.language as tl

from ._common import dropout_bits, dropout_keep, unpack_bits
from ._lora import CHUNK_ROWS, bucket_of


@triton.jit
def fill_zeros(p_s, m_row, begin, end, FILL_R: tl.constexpr):
    """Zeros in columns [begin, end) of the rows p_s [M, 1]."""
    BLOCK_M: tl.constexpr = m_row.shape[0]
    for r in range(0, end, FILL_R):
        o_r = r + tl.arange(0, FILL_R)
        m_fill = m_row[:, None] & (o_r[None, :] >= begin) & (o_r[None, :] < end)
        tl.store(p_s + o_r[None, :], tl.zeros([BLOCK_M, FILL_R], p_s.dtype.element_ty), mask=m_fill)


@triton.jit
def bits_of_target(bits_ptr, stride_bits, n_bytes, target):
    if bits_ptr is not None:
        bits_ptr += target * n_bytes
    return bits_ptr, stride_bits, n_bytes


@triton.jit
def keep_tile(mask, bits, b_p, m_row, uid, column, BLOCK_C: tl.constexpr):
    """Keep mask [M, BLOCK_C] of positions b_p with ordinals uid, for columns starting at `column`, a multiple of 8."""
    if bits[0] is None:
        threshold, seed, site, step = mask
        return dropout_keep(seed, uid, column, site, step, threshold, BLOCK_C)
    else:
        o_b = column // 8 + tl.arange(0, BLOCK_C // 8)
        p_bits = bits[0] + b_p[:, None].to(tl.int64) * bits[1] + o_b[None, :]
        return unpack_bits(tl.load(p_bits, mask=m_row[:, None] & (o_b < bits[2])[None, :], other=0))


@triton.jit
def draw_bits(mask, bits, b_p, m_row, uid, n_cols, BLOCK_C: tl.constexpr):
    """Write the keep bits of positions b_p, for this program to read.

    All before their first use: drawn beside it, in the layout of a dot, they would be drawn again in that of their store.
    """
    threshold, seed, site, step = mask
    for c in range(0, n_cols, BLOCK_C):
        o_b = c // 8 + tl.arange(0, BLOCK_C // 8)
        p_bits = bits[0] + b_p[:, None].to(tl.int64) * bits[1] + o_b[None, :]
        b_bits = dropout_bits(seed, uid, c, n_cols, site, step, threshold, BLOCK_C)
        tl.store(p_bits, b_bits, mask=m_row[:, None] & (o_b < bits[2])[None, :])
    tl.debug_barrier()


@triton.jit
def shrink_dot(
    p_row, m_row, p_factor, stride_r, stride_c, n_ranks, n_cols, uid, mask, bits, b_p,
    COMPUTE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m, r] = sum_k keep[m, k] rows[m, k] factor[r, k] for r < n_ranks; p_row [M, 1] points at rows, those of positions b_p."""
    o_r, o_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    m_r = o_r[None, :] < n_ranks
    acc = tl.zeros([p_row.shape[0], BLOCK_R], tl.float32)
    for k in range(0, n_cols, BLOCK_K):
        m_k = o_k < n_cols - k
        # [M, K]
        b_x = tl.load(p_row + (k + o_k[None, :]), mask=m_row[:, None] & m_k[None, :], other=0.0)
        # [K, R]
        p_w = p_factor + tl.cast(k, tl.int64) * stride_c + (o_r[None, :] * stride_r + o_k[:, None] * stride_c)
        b_w = tl.load(p_w, mask=m_k[:, None] & m_r, other=0.0)
        if DROPOUT:
            b_x = tl.where(keep_tile(mask, bits, b_p, m_row, uid, k, BLOCK_K), b_x, 0.0)
        acc = tl.dot(b_x.to(COMPUTE), b_w.to(COMPUTE), acc, input_precision="ieee")
    return acc


@triton.jit
def expand_dot(
    p_s, m_row, p_factor, stride_r, stride_c, rank, bucket, column, n_cols,
    BUCKETS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc[m, n] = sum_r s[m, r] factor[r, column + n]; p_s [M, 1] points at rows of S.

    Ranks above 16 go in tiles of 32: the rows wait for memory, and wider tiles only take registers from other programs.
    """
    o_n = tl.arange(0, BLOCK_N)
    p_factor += tl.cast(column, tl.int64) * stride_c
    acc = tl.zeros([p_s.shape[0], BLOCK_N], tl.float32)
    for b in tl.static_range(2):
        if BUCKETS & (1 if b == 0 else 14):
            if tl.minimum(bucket, 1) == b:
                o_r = tl.arange(0, 16 << b)
                for r in tl.range(0, rank, 16 << b, num_stages=1):
                    m_r = o_r < rank - r
                    # [M, R]
                    b_s = tl.load(p_s + (r + o_r[None, :]), mask=m_row[:, None] & m_r[None, :], other=0.0)
                    # [R, N]
                    o_w = o_r[:, None] * stride_r + o_n[None, :] * stride_c
                    m_w = m_r[:, None] & (o_n[None, :] < n_cols - column)
                    b_w = tl.load(p_factor + tl.cast(r, tl.int64) * stride_r + o_w, mask=m_w, other=0.0)
                    acc = tl.dot(b_s, b_w.to(b_s.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def first_slot(offsets_ptr, adapter):
    """Partial-sum slot of the adapter's first chunk: only adapters of more than one chunk take slots."""
    slot = tl.zeros((), tl.int32)
    for g in range(0, adapter, 256):
        o_g = g + tl.arange(0, 256)
        m_g = o_g < adapter
        b_rows = tl.load(offsets_ptr + o_g + 1, mask=m_g, other=0) - tl.load(offsets_ptr + o_g, mask=m_g, other=0)
        slot += tl.sum(tl.where(b_rows > CHUNK_ROWS, tl.cdiv(b_rows, CHUNK_ROWS), 0))
    return slot


@triton.jit
def _factor_grad_dot(
    wide_ptr, stride_wide, column, n_cols, s_ptr, stride_s, rank0, rank,
    perm_ptr, gates_ptr, begin, n_rows, n_slots, uid0, mask, bits,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """acc[c, r] = sum_j keep[j, c] wide[row of j, c] gate_j s[p_j, r], and for a bias sum_j gate_j wide[row of j, c]."""
    o_c, o_r = column + tl.arange(0, BLOCK_W), rank0 + tl.arange(0, BLOCK_R)
    m_c, m_r = o_c < n_cols, o_r < rank
    perm_ptr += begin
    acc = tl.zeros([BLOCK_W, BLOCK_R], tl.float32)
    acc_bias = tl.zeros([BLOCK_W], tl.float32)
    for j in range(0, n_rows, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < n_rows
        b_p = tl.load(perm_ptr + o_j, mask=m_j, other=0)
        # [J, W]
        p_wide = wide_ptr + (b_p // n_slots)[:, None].to(tl.int64) * stride_wide + o_c[None, :]
        b_wide = tl.load(p_wide, mask=m_j[:, None] & m_c[None, :], other=0.0)
        # [J, R]
        b_s = tl.load(s_ptr + b_p[:, None].to(tl.int64) * stride_s + o_r[None, :], mask=m_j[:, None] & m_r[None, :], other=0.0)
        if HAS_BIAS:
            b_bias = b_wide.to(tl.float32)
        if gates_ptr is not None:
            b_gate = tl.load(gates_ptr + b_p, mask=m_j, other=0.0)
            b_s = (b_s * b_gate[:, None]).to(s_ptr.dtype.element_ty)
            if HAS_BIAS:
                b_bias *= b_gate[:, None]
        if HAS_BIAS:
            acc_bias += tl.sum(b_bias, axis=0)
        if DROPOUT:
            b_wide = tl.where(keep_tile(mask, bits, b_p, m_j, uid0 + o_j, column, BLOCK_W), b_wide, 0.0)
        acc = tl.dot(tl.trans(b_wide.to(b_s.dtype)), b_s, acc, input_precision="ieee")
    return acc, acc_bias


@triton.jit
def factor_grad_tile(
    wide_ptr, stride_wide, column, n_cols, s_ptr, stride_s, rank0, rank, alpha, mask, bits,
    perm_ptr, gates_ptr, offsets_ptr, adapter, chunk, n_slots,
    p_grad, stride_c, stride_r, p_bias,  # gradient [c, r] and gradient of the bias [c], null if not wanted
    partial_ptr, slot_size, part, part_c, part_r, part_bias,  # and the places of both in a slot of partial sums
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """alpha times the sums of one chunk of an adapter's positions; the whole gradient if there is no other chunk.

    The accumulator is wide in both dimensions, so ranks above 64 go in tiles of 64.
    """
    first, end = tl.load(offsets_ptr + adapter), tl.load(offsets_ptr + adapter + 1)
    begin = first + chunk * CHUNK_ROWS
    one_chunk = end - first <= CHUNK_ROWS
    p_slot = partial_ptr
    if end - first > CHUNK_ROWS:
        p_slot += (first_slot(offsets_ptr, adapter) + chunk).to(tl.int64) * slot_size
    bucket = bucket_of(tl.minimum(rank, 64))
    for b in tl.static_range(3):
        if BUCKETS & (12 if b == 2 else 1 << b):
            if bucket == b:
                acc, acc_bias = _factor_grad_dot(
                    wide_ptr, stride_wide, column, n_cols, s_ptr, stride_s, rank0, rank,
                    perm_ptr, gates_ptr, begin, tl.minimum(end - begin, CHUNK_ROWS), n_slots, chunk * CHUNK_ROWS, mask, bits,
                    HAS_BIAS, DROPOUT, 16 << b, BLOCK_J, BLOCK_W,
                )  # fmt: skip
                o_c, o_r = column + tl.arange(0, BLOCK_W), rank0 + tl.arange(0, 16 << b)
                m_c = o_c < n_cols
                c, r = o_c[:, None].to(tl.int64), o_r[None, :].to(tl.int64)
                m_grad = m_c[:, None] & (o_r < rank)[None, :] & (p_grad.to(tl.int64) != 0)
                _store_sum(acc * alpha, m_grad, p_grad, c * stride_c + r * stride_r, p_slot, part + c * part_c + r * part_r, one_chunk)
                if HAS_BIAS:
                    m_c &= (p_bias.to(tl.int64) != 0) & (rank0 == 0)
                    _store_sum(acc_bias * alpha, m_c, p_bias, o_c, p_slot, part_bias + o_c, one_chunk)


@triton.jit
def _store_sum(value, mask, p_grad, o_grad, p_slot, o_slot, one_chunk):
    if one_chunk:
        tl.store(p_grad + o_grad, value.to(p_grad.dtype.element_ty), mask=mask)
    else:
        tl.store(p_slot + o_slot, value, mask=mask)
