"""Device code of rmsnorm_lora_shrink.py: rows [T, D]; positions, buckets, `mask` and `bits` as in lora_kernels.py.

The row product of dx's mean, sum(w dxn' o xhat) = sum(dxn o xn) + sum(dS o S), needs no second product with A.
"""

import triton
import triton.language as tl

from ._common import dropout_scale
from ._lora import (
    CHUNK_ROWS,
    PART_A,
    PTR_A,
    PTR_DA,
    RANK,
    S_BEGIN,
    STRIDE_A,
    STRIDE_DA,
    bucket_of,
    dropout_of,
    factor_pointer,
    field,
    size_field,
)
from ._producers import PASS, fill_s, largest_rank, position_chunk, position_tile, shrink_step, shrink_target, store_s
from .lora_kernels import _store_sum, bits_of_target, draw_bits, expand_dot, fill_zeros, first_slot, keep_tile
from .lora_shrink import _sum_chunks_program


@triton.jit
def _weights(gamma_ptr, o_k, d_in, offset):
    return offset + tl.load(gamma_ptr + o_k, mask=o_k < d_in, other=0.0).to(tl.float32)


@triton.jit
def _scaled(b_x, b_r, b_w, ROUND_FIRST: tl.constexpr):
    """(xn in the dtype of x, xhat) of rows [M, K], their 1 / rms [M] and weights [K]."""
    b_xhat = b_x.to(tl.float32) * b_r[:, None]
    if ROUND_FIRST:
        b_xhat = b_xhat.to(b_x.dtype).to(tl.float32)
    return (b_xhat * b_w[None, :]).to(b_x.dtype), b_xhat


@triton.jit
def _draw_bits_of_targets(
    bits, b_p, m_row, uid, n_cols, table_ptr, step_ptr, n_adapters, adapter, TARGETS: tl.constexpr, ALIGN: tl.constexpr
):
    """Write the keep bits of every target, zeros for one of rank 0 and for no adapter."""
    n_columns = n_adapters * TARGETS
    for g in tl.range(0, TARGETS, num_stages=1):
        entry = g * n_adapters + adapter
        rank = tl.zeros((), tl.int32)
        if adapter < n_adapters:
            rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
        target_bits = bits_of_target(bits[0], bits[1], bits[2], g)
        if rank > 0:
            draw_bits(dropout_of(table_ptr, n_columns, entry, step_ptr, True), target_bits, b_p, m_row, uid, n_cols, 128)
        else:
            fill_zeros(target_bits[0] + b_p[:, None].to(tl.int64) * bits[1], m_row, 0, bits[2], 64)


@triton.jit
def _normalize_and_shrink(
    p_x, p_xn, b_p, m_row, m_write, b_r, gamma_ptr, offset, d_in, uid, table_ptr, step_ptr, n_adapters, adapter, rank0, bits, p_s,
    FIRST: tl.constexpr, TARGETS: tl.constexpr, SHRINKS: tl.constexpr, ROUND_FIRST: tl.constexpr, DROPOUT: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """xn of a tile of rows and S of SHRINKS targets, from FIRST on, ranks from rank0 on."""
    BLOCK_M: tl.constexpr = m_row.shape[0]
    COMPUTE: tl.constexpr = p_s.dtype.element_ty
    n_columns, entry = n_adapters * TARGETS, FIRST * n_adapters + adapter
    if SHRINKS > 0:
        target0 = shrink_target(table_ptr, n_columns, entry, step_ptr, rank0, bits, FIRST, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A)
        acc0 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if SHRINKS > 1:
        target1 = shrink_target(
            table_ptr, n_columns, entry + n_adapters, step_ptr, rank0, bits, FIRST + 1, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A
        )
        acc1 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if SHRINKS > 2:
        target2 = shrink_target(
            table_ptr, n_columns, entry + 2 * n_adapters, step_ptr, rank0, bits, FIRST + 2, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A
        )
        acc2 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, d_in, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = (o_k < d_in)[None, :]
        # [M, K]
        b_x = tl.load(p_x + o_k[None, :], mask=m_row[:, None] & m_k, other=0.0)
        b_xn, _ = _scaled(b_x, b_r, _weights(gamma_ptr, o_k, d_in, offset), ROUND_FIRST)
        tl.store(p_xn + o_k[None, :], b_xn, mask=m_write[:, None] & m_k)
        if SHRINKS > 0:
            acc0 = shrink_step(acc0, b_xn, b_p, m_row, k, d_in, uid, target0, COMPUTE, DROPOUT)
        if SHRINKS > 1:
            acc1 = shrink_step(acc1, b_xn, b_p, m_row, k, d_in, uid, target1, COMPUTE, DROPOUT)
        if SHRINKS > 2:
            acc2 = shrink_step(acc2, b_xn, b_p, m_row, k, d_in, uid, target2, COMPUTE, DROPOUT)
    if SHRINKS > 0:
        store_s(acc0, p_s, m_row, rank0, target0, table_ptr, n_columns, entry, DROPOUT, ALIGN)
    if SHRINKS > 1:
        store_s(acc1, p_s, m_row, rank0, target1, table_ptr, n_columns, entry + n_adapters, DROPOUT, ALIGN)
    if SHRINKS > 2:
        store_s(acc2, p_s, m_row, rank0, target2, table_ptr, n_columns, entry + 2 * n_adapters, DROPOUT, ALIGN)


@triton.jit
def _rmsnorm_shrink_kernel(
    x_ptr, stride_x, gamma_ptr, eps, offset, perm_ptr, offsets_ptr, tiles_ptr,  # rows [T, D], weights [D] and the plan
    table_ptr, step_ptr,
    xn_ptr, s_ptr, stride_s, rstd_ptr,  # outputs [T, D], [P, widths], [T]
    bits_ptr, stride_bits, n_bytes,  # output uint8 [P, targets, ceil(D / 8)] or None
    n_positions, n_slots, d_in, n_adapters,
    TARGETS: tl.constexpr, ROUND_FIRST: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row is written from its first position, whoever owns that; S of every position."""
    adapter, b_p, m_row, uid = position_tile(
        tl.program_id(0), perm_ptr, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX, BLOCK_M
    )
    b_t, m_write = (b_p // n_slots).to(tl.int64), m_row & (b_p % n_slots == 0)
    p_x, p_xn = x_ptr + b_t[:, None] * stride_x, xn_ptr + b_t[:, None] * d_in
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in range(0, d_in, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_k[None, :], mask=m_row[:, None] & (o_k < d_in)[None, :], other=0.0).to(tl.float32)
        square += b_x * b_x
    # Both correctly rounded, as torch's on a CPU.
    b_r = tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(square, axis=1) / d_in + eps))
    tl.store(rstd_ptr + b_t, b_r, mask=m_write)

    p_s = s_ptr + b_p[:, None].to(tl.int64) * stride_s
    fill_s(p_s, m_row, table_ptr, n_adapters, adapter, TARGETS, FILL_R, ALIGN)
    bits = (bits_ptr, stride_bits, n_bytes)
    if bits_ptr is not None:
        _draw_bits_of_targets(bits, b_p, m_row, uid, d_in, table_ptr, step_ptr, n_adapters, adapter, TARGETS, ALIGN)
    rank = largest_rank(table_ptr, n_adapters, adapter, TARGETS, ALIGN)
    if rank == 0:
        _normalize_and_shrink(
            p_x, p_xn, b_p, m_row, m_write, b_r, gamma_ptr, offset, d_in, uid, table_ptr, step_ptr, n_adapters, adapter, 0, bits, p_s,
            0, TARGETS, 0, ROUND_FIRST, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A, 16, BLOCK_K,
        )  # fmt: skip
        return
    for b in tl.static_range(4):
        if BUCKETS & (1 << b):
            if bucket_of(rank) == b:
                for first in tl.static_range(0, TARGETS, PASS if b < 2 else 1):
                    for rank0 in tl.range(0, rank, 16 << b, num_stages=1):
                        _normalize_and_shrink(
                            p_x, p_xn, b_p, m_row, m_write & (first + rank0 == 0), b_r, gamma_ptr, offset, d_in, uid,
                            table_ptr, step_ptr, n_adapters, adapter, rank0, bits, p_s,
                            first, TARGETS, min(TARGETS - first, PASS if b < 2 else 1), ROUND_FIRST, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A,
                            16 << b, BLOCK_K if b < 3 else BLOCK_K // 2,
                        )  # fmt: skip


@triton.jit
def _row_product(
    p_x, p_dxn, p_s, p_ds, m_row, b_r, gamma_ptr, offset, stride_s, stride_ds, d_in, s_width, n_slots, BLOCK_K: tl.constexpr
):
    """sum(dxn o xn) + sum(dS o S) of rows [M], S and dS from the row's first position on."""
    BLOCK_M: tl.constexpr = m_row.shape[0]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in range(0, d_in, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = m_row[:, None] & (o_k < d_in)[None, :]
        b_dxn = tl.load(p_dxn + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        acc += b_dxn * (b_x * _weights(gamma_ptr, o_k, d_in, offset)[None, :])
    b_dot = tl.sum(acc, axis=1) * b_r
    o_c = tl.arange(0, 16)
    for slot in range(0, n_slots):
        b_rank = tl.zeros([BLOCK_M, 16], tl.float32)
        for c in range(0, s_width, 16):
            m_c = m_row[:, None] & (o_c < s_width - c)[None, :]
            b_s = tl.load(p_s + slot * stride_s + c + o_c[None, :], mask=m_c, other=0.0).to(tl.float32)
            b_ds = tl.load(p_ds + slot * stride_ds + c + o_c[None, :], mask=m_c, other=0.0).to(tl.float32)
            # No adapter reads a column right of its rank, whatever dS holds there.
            b_rank += tl.where(b_s == 0.0, 0.0, b_s * b_ds)
        b_dot += tl.sum(b_rank, axis=1)
    return b_dot


@triton.jit
def _add_lora(
    total, p_ds, b_p, m_row, uid, column, d_in, table_ptr, step_ptr, bits, n_adapters, adapter,
    TARGETS: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
):  # fmt: skip
    """total [M, K] + sum over targets of M o (dS A), columns from `column` on."""
    BLOCK_K: tl.constexpr = total.shape[1]
    n_columns = n_adapters * TARGETS
    for g in tl.range(0, TARGETS, num_stages=1):
        entry = g * n_adapters + adapter
        rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
        if rank > 0:
            acc = expand_dot(
                p_ds + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), m_row,
                factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED),
                size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN_A), 1, rank, bucket_of(rank), column, d_in,
                BUCKETS, BLOCK_K,
            )  # fmt: skip
            mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
            if DROPOUT:
                target_bits = bits_of_target(bits[0], bits[1], bits[2], g)
                acc = tl.where(keep_tile(mask, target_bits, b_p, m_row, uid, column, BLOCK_K), acc, 0.0)
            # An explicit fma, so that every variant of the kernel rounds alike whatever the compiler would fuse.
            total = tl.fma(acc, dropout_scale(mask[0], DROPOUT), total)
    return total


@triton.jit(do_not_specialize=["slot"])
def _rmsnorm_dx_kernel(
    dxn_ptr, stride_dxn, ds_ptr, stride_ds, x_ptr, stride_x, gamma_ptr, offset, rstd_ptr, s_ptr, stride_s,
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes,
    dx_ptr, stride_dx, gamma_partial_ptr,  # outputs [T, D], [tiles, D]
    n_positions, n_slots, slot, d_in, n_adapters, s_width,
    FIRST: tl.constexpr, HAS_DX: tl.constexpr, HAS_DGAMMA: tl.constexpr, TARGETS: tl.constexpr, ROUND_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx and a tile's part of dgamma, from the rows whose position `slot` is in the tile; slots after the first add to them."""
    tile = tl.program_id(0)
    adapter, b_p, m_row, uid = position_tile(tile, perm_ptr, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX, BLOCK_M)
    m_row &= b_p % n_slots == slot
    b_t = (b_p // n_slots).to(tl.int64)
    b_r = tl.load(rstd_ptr + b_t, mask=m_row, other=0.0)
    p_x, p_dx = x_ptr + b_t[:, None] * stride_x, dx_ptr + b_t[:, None] * stride_dx
    p_dxn, p_ds = dxn_ptr + b_t[:, None] * stride_dxn, ds_ptr + b_p[:, None].to(tl.int64) * stride_ds
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    if FIRST and HAS_DX:
        p_s = s_ptr + b_p[:, None].to(tl.int64) * stride_s
        b_mean = _row_product(p_x, p_dxn, p_s, p_ds, m_row, b_r, gamma_ptr, offset, stride_s, stride_ds, d_in, s_width, n_slots, BLOCK_K) / d_in
    for k in tl.range(0, d_in, BLOCK_K, num_stages=1):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = m_row[:, None] & (o_k < d_in)[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if FIRST:
            total = tl.load(p_dxn + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        if adapter < n_adapters:
            total = _add_lora(
                total, p_ds, b_p, m_row, uid, k, d_in, table_ptr, step_ptr, (bits_ptr, stride_bits, n_bytes), n_adapters, adapter,
                TARGETS, DROPOUT, BUCKETS, FACTOR, ALIGNED, ALIGN, ALIGN_A,
            )  # fmt: skip
        b_w = _weights(gamma_ptr, o_k, d_in, offset)[None, :]
        b_x = tl.load(p_x + o_k[None, :], mask=m_k, other=0.0)
        if HAS_DGAMMA:
            _, b_xhat = _scaled(b_x, b_r, tl.zeros([BLOCK_K], tl.float32), ROUND_FIRST)
            p_partial = gamma_partial_ptr + tl.cast(slot * tl.num_programs(0) + tile, tl.int64) * d_in
            tl.store(p_partial + o_k, tl.sum(total * b_xhat, axis=0), mask=o_k < d_in)
        if HAS_DX:
            b_dx = b_r[:, None] * (b_w * total - b_x.to(tl.float32) * b_r[:, None] * b_mean[:, None])
            if not FIRST:
                b_dx += tl.load(p_dx + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
            tl.store(p_dx + o_k[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m_k)


@triton.jit
def _normed_grad_dot(
    x_ptr, stride_x, rstd_ptr, b_w, column, d_in, ds_ptr, stride_ds, rank0, rank, perm_ptr, n_rows, n_slots, uid0, mask, bits,
    ROUND_FIRST: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """acc[c, r] = sum_j keep[j, c] xn[row of j, c] dS[p_j, r]"""
    o_c, o_r = column + tl.arange(0, BLOCK_W), rank0 + tl.arange(0, BLOCK_R)
    m_c, m_r = o_c < d_in, o_r < rank
    acc = tl.zeros([BLOCK_W, BLOCK_R], tl.float32)
    for j in range(0, n_rows, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < n_rows
        b_p = tl.load(perm_ptr + o_j, mask=m_j, other=0)
        b_t = (b_p // n_slots).to(tl.int64)
        if bits[0] is not None:  # before the rows that it would share registers with
            keep = keep_tile(mask, bits, b_p, m_j, uid0 + o_j, column, BLOCK_W)
        # [J, W]
        b_x = tl.load(x_ptr + b_t[:, None] * stride_x + o_c[None, :], mask=m_j[:, None] & m_c[None, :], other=0.0)
        b_xn, _ = _scaled(b_x, tl.load(rstd_ptr + b_t, mask=m_j, other=0.0), b_w, ROUND_FIRST)
        # [J, R]
        b_ds = tl.load(ds_ptr + b_p[:, None].to(tl.int64) * stride_ds + o_r[None, :], mask=m_j[:, None] & m_r[None, :], other=0.0)
        if bits[0] is not None:
            b_xn = tl.where(keep, b_xn, 0.0)
        elif DROPOUT:
            b_xn = tl.where(keep_tile(mask, bits, b_p, m_j, uid0 + o_j, column, BLOCK_W), b_xn, 0.0)
        acc = tl.dot(tl.trans(b_xn.to(b_ds.dtype)), b_ds, acc, input_precision="ieee")
    return acc


@triton.jit
def _rmsnorm_grad_a_kernel(
    x_ptr, stride_x, gamma_ptr, offset, rstd_ptr, ds_ptr, stride_ds, perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr,
    bits_ptr, stride_bits, n_bytes,
    partial_ptr, slot_size,  # output [slots, slot_size]; single chunks go to the table's gradients
    n_slots, d_in, n_rank_tiles, n_adapters,
    TARGETS: tl.constexpr, ROUND_FIRST: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dA = dS^T (M o xn) over one chunk of positions; programs that differ only in target and rank tile share x in L2."""
    n_columns = n_adapters * TARGETS
    program, target = tl.program_id(0) // TARGETS, tl.program_id(0) % TARGETS
    program, rank0 = program // n_rank_tiles, program % n_rank_tiles * 64
    n_column_tiles = tl.cdiv(d_in, BLOCK_W)
    tile, column = program // n_column_tiles, program % n_column_tiles * BLOCK_W
    adapter, chunk, first, end = position_chunk(tile, offsets_ptr, tiles_ptr, 0, n_adapters, TILE_INDEX)
    if adapter >= n_adapters:
        return
    entry = target * n_adapters + adapter
    rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
    p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DA, GRAD, ALIGNED)
    if (rank <= rank0) | (p_grad.to(tl.int64) == 0):
        return

    begin, one_chunk = first + chunk * CHUNK_ROWS, end - first <= CHUNK_ROWS
    p_slot = partial_ptr
    if end - first > CHUNK_ROWS:
        p_slot += (first_slot(offsets_ptr, adapter) + chunk).to(tl.int64) * slot_size
    mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
    o_c = column + tl.arange(0, BLOCK_W)
    b_w = _weights(gamma_ptr, o_c, d_in, offset)
    for b in tl.static_range(3):
        if BUCKETS & (12 if b == 2 else 1 << b):
            if bucket_of(tl.minimum(rank, 64)) == b:
                acc = _normed_grad_dot(
                    x_ptr, stride_x, rstd_ptr, b_w, column, d_in,
                    ds_ptr + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), stride_ds, rank0, rank,
                    perm_ptr + begin, tl.minimum(end - begin, CHUNK_ROWS), n_slots, chunk * CHUNK_ROWS, mask,
                    bits_of_target(bits_ptr, stride_bits, n_bytes, target),
                    ROUND_FIRST, DROPOUT, 16 << b, BLOCK_J, BLOCK_W,
                )  # fmt: skip
                o_r = rank0 + tl.arange(0, 16 << b)
                c, r = o_c[:, None].to(tl.int64), o_r[None, :].to(tl.int64)
                _store_sum(
                    acc * dropout_scale(mask[0], DROPOUT), (o_c < d_in)[:, None] & (o_r < rank)[None, :],
                    p_grad, c + r * size_field(table_ptr, n_columns, entry, STRIDE_DA, ALIGN_A),
                    p_slot, field(table_ptr, n_columns, entry, PART_A) + c + r * d_in, one_chunk,
                )  # fmt: skip


@triton.jit
def _rmsnorm_finish_kernel(
    partial_ptr, slot_size, gamma_partial_ptr, offsets_ptr, tiles_ptr, table_ptr,  # inputs [slots, slot_size], [K, tiles, D]
    dgamma_ptr,  # output [D]
    n_positions, n_slots, n_tiles, d_in, size_A, n_adapters, n_sums,
    TARGETS: tl.constexpr, GRAD: tl.constexpr, LAYOUT: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first n_sums programs add up the chunks of the dA, the rest the tiles of dgamma."""
    program = tl.program_id(0)
    if program < n_sums:
        _sum_chunks_program(
            program, partial_ptr, slot_size, offsets_ptr, table_ptr, d_in, size_A, 0, 0, n_adapters, TARGETS,
            GRAD, LAYOUT, DENSE, ALIGNED, BLOCK_E,
        )  # fmt: skip
    else:
        o_k = (program - n_sums) * BLOCK_E + tl.arange(0, BLOCK_E)
        unowned = n_positions - tl.load(offsets_ptr + n_adapters)
        used = tl.load(tiles_ptr + TILE_INDEX * (n_adapters + 1) + n_adapters) + tl.cdiv(unowned, BLOCK_M)
        acc = tl.zeros([BLOCK_E], tl.float32)
        for slot in range(0, n_slots):
            for tile in range(0, used):
                acc += tl.load(gamma_partial_ptr + tl.cast(slot * n_tiles + tile, tl.int64) * d_in + o_k, mask=o_k < d_in, other=0.0)
        tl.store(dgamma_ptr + o_k, acc.to(dgamma_ptr.dtype.element_ty), mask=o_k < d_in)
