"""Device code of lora.py: T rows, widths D in and O out, A adapters of ranks R_i, rows grouped by adapter.

Sorted position j holds row t = perm[j]; the ordinal of a row in its adapter is its dropout uid. A rank belongs to the
bucket b = 0..3 of BLOCK_R = 16 << b that covers it (above 128: tiles of 128). One launch serves every bucket in the
constexpr bit set BUCKETS; a tile takes its own bucket's branch, so no adapter's arithmetic depends on its neighbours.

table [7, A] int64: pointers to A_i [R, D], B_i [O, R] and bias_i [O] (0 = none), the rank, and pointers to the
gradients dA_i, dB_i, dbias_i. In a slot of partial sums these three lie one after another, padded to PARTIAL_ALIGN.
"""

import triton
import triton.language as tl

from ._common import dropout_keep, dropout_scale, group_of_tile

CHUNK_ROWS = tl.constexpr(1024)
PARTIAL_ALIGN = tl.constexpr(8)


@triton.jit
def _load_factor(table_ptr, field, n_adapters, adapter, FACTOR: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + field * n_adapters + adapter).to(tl.pointer_type(FACTOR))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load_rank(table_ptr, n_adapters, adapter, RANK_ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(table_ptr + 3 * n_adapters + adapter).to(tl.int32), RANK_ALIGN)


@triton.jit
def _bucket(rank):
    return (rank > 16).to(tl.int32) + (rank > 32).to(tl.int32) + (rank > 64).to(tl.int32)


@triton.jit
def _shrink_tile(
    p_row, m_row, p_factor, stride_r, stride_c, rank, rank0, n_cols,
    alpha, uid, seed, step, site, threshold,
    p_s,
    DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s[m, r] = alpha * sum_k keep[m, k] rows[m, k] factor[r, k]; p_row and p_s [M, 1] point at rows."""
    compute: tl.constexpr = p_s.dtype.element_ty
    o_r, o_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    m_r = o_r[None, :] < rank - rank0
    p_factor += tl.cast(rank0, tl.int64) * stride_r
    p_s += rank0
    acc = tl.zeros([p_row.shape[0], BLOCK_R], tl.float32)
    for k in range(0, n_cols, BLOCK_K):
        m_k = o_k < n_cols - k
        # [M, K]
        b_x = tl.load(p_row + (k + o_k[None, :]), mask=m_row[:, None] & m_k[None, :], other=0.0)
        # [K, R]
        p_w = p_factor + tl.cast(k, tl.int64) * stride_c + (o_r[None, :] * stride_r + o_k[:, None] * stride_c)
        b_w = tl.load(p_w, mask=m_k[:, None] & m_r, other=0.0)
        if DROPOUT:
            b_x = tl.where(dropout_keep(seed, uid, k, site, step, threshold, BLOCK_K), b_x, 0.0)
        acc = tl.dot(b_x.to(compute), b_w.to(compute), acc, input_precision="ieee")
    tl.store(p_s + o_r[None, :], (acc * alpha).to(compute), mask=m_row[:, None] & m_r)


@triton.jit(do_not_specialize=["site"])
def _lora_shrink_kernel(
    x_ptr, stride_x, perm_ptr, offsets_ptr, tiles_ptr,  # rows [T, width] and their plan
    table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, site,  # adapters
    s_ptr,  # output [T, max_rank]
    n_rows, width, n_adapters, max_rank,
    BACKWARD: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Forward: s = (M o x) A^T, zeros right of each rank and in rows of no adapter. Backward: dS = scale dy B."""
    tile, rank0 = tl.program_id(0), tl.program_id(1) * 128
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    begin = tl.load(offsets_ptr + adapter)
    # The tiles after the last adapter's cover the rows of no adapter.
    end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_rows)
    o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_j < end
    p_s = s_ptr + o_j[:, None].to(tl.int64) * max_rank
    rank = tl.zeros((), tl.int32)
    if adapter < n_adapters:
        rank = _load_rank(table_ptr, n_adapters, adapter, RANK_ALIGN)
    if not BACKWARD:
        o_r = rank0 + tl.arange(0, FILL_R)
        m_fill = m_row[:, None] & (o_r[None, :] >= rank) & (o_r[None, :] < max_rank)
        tl.store(p_s + o_r[None, :], tl.zeros([BLOCK_M, FILL_R], p_s.dtype.element_ty), mask=m_fill)
    if rank <= rank0:
        return

    p_row = x_ptr + tl.load(perm_ptr + o_j, mask=m_row, other=0).to(tl.int64)[:, None] * stride_x
    threshold = tl.load(threshold_ptr + adapter)
    seed, step = tl.load(seeds_ptr + adapter), tl.load(step_ptr)
    if BACKWARD:
        p_factor = _load_factor(table_ptr, 1, n_adapters, adapter, FACTOR, ALIGNED)
        alpha, stride_r, stride_c = tl.load(scale_ptr + adapter), 1, rank
    else:
        p_factor = _load_factor(table_ptr, 0, n_adapters, adapter, FACTOR, ALIGNED)
        alpha, stride_r, stride_c = dropout_scale(threshold, DROPOUT), width, 1
    for b in tl.static_range(4):
        if BUCKETS & (1 << b):
            if _bucket(rank) == b:
                _shrink_tile(
                    p_row, m_row, p_factor, stride_r, stride_c, rank, rank0, width,
                    alpha, o_j - begin, seed, step, site, threshold,
                    p_s,
                    DROPOUT, 16 << b, BLOCK_K if b < 3 else BLOCK_K // 2,
                )  # fmt: skip


@triton.jit
def _expand_tile(
    p_y, m_y, p_s, m_row, p_factor, stride_r, stride_c, p_bias, rank, column, n_cols,
    alpha, uid, seed, step, site, threshold,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[m, n] += alpha * (keep[m, n] sum_r s[m, r] factor[r, n] + bias[n]); p_y [M, N], p_s [M, 1]."""
    BLOCK_M: tl.constexpr = p_y.shape[0]
    BLOCK_N: tl.constexpr = p_y.shape[1]
    o_n, o_r = column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    m_n = o_n < n_cols
    b_y = tl.load(p_y, mask=m_y, other=0.0)
    p_factor += tl.cast(column, tl.int64) * stride_c
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        m_r = o_r < rank - r
        # [M, R]
        b_s = tl.load(p_s + (r + o_r[None, :]), mask=m_row[:, None] & m_r[None, :], other=0.0)
        # [R, N]
        p_w = p_factor + tl.cast(r, tl.int64) * stride_r + (o_r[:, None] * stride_r + (o_n - column)[None, :] * stride_c)
        b_w = tl.load(p_w, mask=m_r[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_s, b_w.to(b_s.dtype), acc, input_precision="ieee")
    if DROPOUT:
        acc = tl.where(dropout_keep(seed, uid, column, site, step, threshold, BLOCK_N), acc, 0.0)
    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n & (p_bias.to(tl.int64) != 0), other=0.0).to(tl.float32)[None, :]
    # An explicit fma, so that every variant of the kernel rounds alike whatever the compiler would fuse.
    tl.store(p_y, tl.fma(acc, alpha, b_y.to(tl.float32)).to(b_y.dtype), mask=m_y)


@triton.jit
def _expand_program(
    program, y_ptr, stride_y, perm_ptr, offsets_ptr, tiles_ptr,
    table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, site,
    s_ptr, width, n_adapters, max_rank,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_column_tiles = tl.cdiv(width, BLOCK_N)
    tile, column = program // n_column_tiles, program % n_column_tiles * BLOCK_N
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    if adapter < n_adapters:
        rank = _load_rank(table_ptr, n_adapters, adapter, RANK_ALIGN)
        p_bias = _load_factor(table_ptr, 2, n_adapters, adapter, FACTOR, ALIGNED)
        # Without rank or bias the rows stay as they are: adding 0 would turn -0 into +0.
        if (rank > 0) | (HAS_BIAS & (p_bias.to(tl.int64) != 0)):
            begin = tl.load(offsets_ptr + adapter)
            o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
            m_row = o_j < tl.load(offsets_ptr + adapter + 1)
            o_n = column + tl.arange(0, BLOCK_N)
            b_t = tl.load(perm_ptr + o_j, mask=m_row, other=0).to(tl.int64)
            p_y = y_ptr + b_t[:, None] * stride_y + o_n[None, :]
            p_s = s_ptr + o_j[:, None].to(tl.int64) * max_rank
            threshold = tl.load(threshold_ptr + adapter)
            seed, step = tl.load(seeds_ptr + adapter), tl.load(step_ptr)
            if BACKWARD:
                p_factor = _load_factor(table_ptr, 0, n_adapters, adapter, FACTOR, ALIGNED)
                alpha, stride_r, stride_c = dropout_scale(threshold, DROPOUT), width, 1
            else:
                p_factor = _load_factor(table_ptr, 1, n_adapters, adapter, FACTOR, ALIGNED)
                alpha, stride_r, stride_c = tl.load(scale_ptr + adapter), 1, rank
            for b in tl.static_range(4):
                if BUCKETS & (1 << b):
                    if _bucket(rank) == b:
                        _expand_tile(
                            p_y, m_row[:, None] & (o_n[None, :] < width), p_s, m_row,
                            p_factor, stride_r, stride_c, p_bias, rank, column, width,
                            alpha, o_j - begin, seed, step, site, threshold,
                            HAS_BIAS, DROPOUT, 16 << b if b < 3 else 64,
                        )  # fmt: skip


@triton.jit
def _lora_expand_kernel(
    y_ptr, stride_y, perm_ptr, offsets_ptr, tiles_ptr,  # updated rows [T, width] and their plan
    table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr,  # adapters
    s_ptr,  # input [T, max_rank]
    width, n_adapters, max_rank,
    HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y += scale (s B^T + bias)."""
    _expand_program(
        tl.program_id(0), y_ptr, stride_y, perm_ptr, offsets_ptr, tiles_ptr,
        table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, 0,
        s_ptr, width, n_adapters, max_rank,
        False, HAS_BIAS, False, BUCKETS, FACTOR, ALIGNED, RANK_ALIGN, TILE_INDEX, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _partial_parts(rank, d_in, d_out):
    """First elements of dB and dbias in a slot; dA starts at 0."""
    dB = tl.cdiv(rank.to(tl.int64) * d_in, PARTIAL_ALIGN) * PARTIAL_ALIGN
    return dB, dB + tl.cdiv(rank.to(tl.int64) * d_out, PARTIAL_ALIGN) * PARTIAL_ALIGN


@triton.jit
def _first_slot(offsets_ptr, adapter):
    """Partial-sum slot of the adapter's first chunk: only adapters of more than one chunk take slots."""
    slot = tl.zeros((), tl.int32)
    for g in range(0, adapter, 256):
        o_g = g + tl.arange(0, 256)
        m_g = o_g < adapter
        b_rows = tl.load(offsets_ptr + o_g + 1, mask=m_g, other=0) - tl.load(offsets_ptr + o_g, mask=m_g, other=0)
        slot += tl.sum(tl.where(b_rows > CHUNK_ROWS, tl.cdiv(b_rows, CHUNK_ROWS), 0))
    return slot


@triton.jit
def _factor_grad_tile(
    wide_ptr, stride_wide, s_ptr, max_rank, perm_ptr, begin, n_rows, column, n_cols, rank, rank0,
    alpha, uid0, seed, step, site, threshold,
    p_grad, p_partial, p_bias_grad, p_bias_partial, one_chunk, stride_r, stride_c,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """grad[c, r] = alpha * sum_j keep[j, c] wide[perm[j], c] s[j, r] over one chunk, and for a bias sum_j wide."""
    o_c, o_r = column + tl.arange(0, BLOCK_W), rank0 + tl.arange(0, BLOCK_R)
    m_c, m_r = o_c < n_cols, o_r < rank
    s_ptr += begin.to(tl.int64) * max_rank
    perm_ptr += begin
    acc = tl.zeros([BLOCK_W, BLOCK_R], tl.float32)
    acc_bias = tl.zeros([BLOCK_W], tl.float32)
    for j in range(0, n_rows, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < n_rows
        b_t = tl.load(perm_ptr + o_j, mask=m_j, other=0).to(tl.int64)
        # [J, W]
        p_wide = wide_ptr + b_t[:, None] * stride_wide + o_c[None, :]
        b_wide = tl.load(p_wide, mask=m_j[:, None] & m_c[None, :], other=0.0)
        # [J, R]
        p_s = s_ptr + (o_j[:, None] * max_rank + o_r[None, :])
        b_s = tl.load(p_s, mask=m_j[:, None] & m_r[None, :], other=0.0)
        if DROPOUT:
            b_wide = tl.where(dropout_keep(seed, uid0 + o_j, column, site, step, threshold, BLOCK_W), b_wide, 0.0)
        if HAS_BIAS:
            acc_bias += tl.sum(b_wide.to(tl.float32), axis=0)
        acc = tl.dot(tl.trans(b_wide.to(b_s.dtype)), b_s, acc, input_precision="ieee")
    o_grad = o_c[:, None].to(tl.int64) * stride_c + o_r[None, :].to(tl.int64) * stride_r
    m_grad = m_c[:, None] & m_r[None, :]
    if one_chunk:
        tl.store(p_grad + o_grad, (acc * alpha).to(p_grad.dtype.element_ty), mask=m_grad)
    else:
        tl.store(p_partial + o_grad, acc * alpha, mask=m_grad)
    if HAS_BIAS:
        m_c &= (p_bias_grad.to(tl.int64) != 0) & (rank0 == 0)
        if one_chunk:
            tl.store(p_bias_grad + o_c, (acc_bias * alpha).to(p_grad.dtype.element_ty), mask=m_c)
        else:
            tl.store(p_bias_partial + o_c, acc_bias * alpha, mask=m_c)


@triton.jit(do_not_specialize=["site"])
def _lora_factor_grad_kernel(
    x_ptr, stride_x, dy_ptr, stride_dy, s_ptr, ds_ptr, perm_ptr, offsets_ptr, tiles_ptr,  # rows and their plan
    table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, site,  # adapters
    partial_ptr, partial_stride,  # output [slots, partial_stride]; single chunks go to the table's gradients
    d_in, d_out, n_adapters, max_rank,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One chunk of rows: dA = dS^T (M o x) in the first cdiv(D, BLOCK_W) column tiles, dB = scale dy^T s in the rest.

    The accumulator is wide in both dimensions, so ranks above 64 go in tiles of 64.
    """
    tile, column_tile, rank0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * 64
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    if adapter >= n_adapters:
        return
    rank = _load_rank(table_ptr, n_adapters, adapter, RANK_ALIGN)
    p_dbias = _load_factor(table_ptr, 6, n_adapters, adapter, FACTOR, ALIGNED)
    if (rank <= rank0) & ((rank0 > 0) | (p_dbias.to(tl.int64) == 0)):
        return

    chunk = tile - tl.load(p_tiles + adapter)
    first = tl.load(offsets_ptr + adapter)
    begin, end = first + chunk * CHUNK_ROWS, tl.load(offsets_ptr + adapter + 1)
    n_rows = tl.minimum(end - begin, CHUNK_ROWS)
    one_chunk = end - first <= CHUNK_ROWS
    slot = _first_slot(offsets_ptr, adapter) + chunk
    dB, dbias = _partial_parts(rank, d_in, d_out)
    p_partial = partial_ptr + slot.to(tl.int64) * partial_stride
    threshold = tl.load(threshold_ptr + adapter)
    seed, step = tl.load(seeds_ptr + adapter), tl.load(step_ptr)
    n_tiles_in = tl.cdiv(d_in, BLOCK_W)
    for b in tl.static_range(3):
        if BUCKETS & (12 if b == 2 else 1 << b):
            if tl.minimum(_bucket(rank), 2) == b:
                if column_tile < n_tiles_in:
                    _factor_grad_tile(
                        x_ptr, stride_x, ds_ptr, max_rank, perm_ptr, begin, n_rows,
                        column_tile * BLOCK_W, d_in, rank, rank0,
                        dropout_scale(threshold, DROPOUT), chunk * CHUNK_ROWS, seed, step, site, threshold,
                        _load_factor(table_ptr, 4, n_adapters, adapter, FACTOR, ALIGNED), p_partial,
                        p_dbias, p_partial, one_chunk, d_in, 1,
                        False, DROPOUT, 16 << b, BLOCK_J, BLOCK_W,
                    )  # fmt: skip
                else:
                    _factor_grad_tile(
                        dy_ptr, stride_dy, s_ptr, max_rank, perm_ptr, begin, n_rows,
                        (column_tile - n_tiles_in) * BLOCK_W, d_out, rank, rank0,
                        tl.load(scale_ptr + adapter), 0, seed, step, site, threshold,
                        _load_factor(table_ptr, 5, n_adapters, adapter, FACTOR, ALIGNED), p_partial + dB,
                        p_dbias, p_partial + dbias, one_chunk, 1, rank,
                        HAS_BIAS, False, 16 << b, BLOCK_J, BLOCK_W,
                    )  # fmt: skip


@triton.jit
def _sum_chunks_program(
    program, partial_ptr, partial_stride, offsets_ptr, table_ptr, d_in, d_out, n_adapters,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of an adapter of several chunks, summed in order, or exact zeros for one without rows."""
    n_blocks = tl.cdiv(partial_stride, BLOCK_E)
    adapter, block = program // n_blocks, program % n_blocks
    rank = _load_rank(table_ptr, n_adapters, adapter, RANK_ALIGN)
    dB, dbias = _partial_parts(rank, d_in, d_out)
    p_dbias = _load_factor(table_ptr, 6, n_adapters, adapter, FACTOR, ALIGNED)
    o_e = block.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_dA = o_e < rank.to(tl.int64) * d_in
    m_dB = (o_e >= dB) & (o_e < dB + rank.to(tl.int64) * d_out)
    m_dbias = (o_e >= dbias) & (o_e < dbias + d_out) & (p_dbias.to(tl.int64) != 0)
    n_chunks = tl.cdiv(tl.load(offsets_ptr + adapter + 1) - tl.load(offsets_ptr + adapter), CHUNK_ROWS)
    if n_chunks != 1:
        p_partial = partial_ptr + _first_slot(offsets_ptr, adapter).to(tl.int64) * partial_stride + o_e
        acc = tl.zeros([BLOCK_E], tl.float32)
        for c in range(0, n_chunks):
            acc += tl.load(p_partial + tl.cast(c, tl.int64) * partial_stride, mask=m_dA | m_dB | m_dbias, other=0.0)
        grad = acc.to(FACTOR)
        tl.store(_load_factor(table_ptr, 4, n_adapters, adapter, FACTOR, ALIGNED) + o_e, grad, mask=m_dA)
        tl.store(_load_factor(table_ptr, 5, n_adapters, adapter, FACTOR, ALIGNED) + (o_e - dB), grad, mask=m_dB)
        tl.store(p_dbias + (o_e - dbias), grad, mask=m_dbias)


@triton.jit(do_not_specialize=["site"])
def _lora_bwd_finish_kernel(
    dx_ptr, stride_dx, perm_ptr, offsets_ptr, tiles_ptr,  # updated rows [T, D] and their plan
    table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, site,  # adapters
    ds_ptr, partial_ptr, partial_stride,  # inputs [T, max_rank], [slots, partial_stride]
    d_in, d_out, n_adapters, max_rank, n_dx_programs,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK_ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first n_dx_programs do dx += M o (dS A), the rest sum chunk gradients: neither needs the other."""
    program = tl.program_id(0)
    if program < n_dx_programs:
        _expand_program(
            program, dx_ptr, stride_dx, perm_ptr, offsets_ptr, tiles_ptr,
            table_ptr, scale_ptr, threshold_ptr, seeds_ptr, step_ptr, site,
            ds_ptr, d_in, n_adapters, max_rank,
            True, False, DROPOUT, BUCKETS, FACTOR, ALIGNED, RANK_ALIGN, TILE_INDEX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _sum_chunks_program(
            program - n_dx_programs, partial_ptr, partial_stride, offsets_ptr, table_ptr,
            d_in, d_out, n_adapters, FACTOR, ALIGNED, RANK_ALIGN, BLOCK_E,
        )  # fmt: skip
