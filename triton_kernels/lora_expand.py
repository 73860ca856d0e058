"""Out of rank space: y += c s (S B^T + beta), and from dy its gradients dS, dB, dbeta and e, for all targets at once.

dS and dB read the same rows of dy: both kinds of programs share one launch, chunk of positions by chunk of positions and
target by target, so that whoever comes second finds the chunk in L2.
"""

import torch
import triton
import triton.language as tl

from ._common import cdiv, group_of_tile, tile_index
from ._lora import (
    CHUNK,
    CHUNK_ROWS,
    O_CONTIGUOUS,
    PART_B,
    PART_BIAS,
    PTR_B,
    PTR_BIAS,
    PTR_DB,
    PTR_DBIAS,
    RANK,
    S_BEGIN,
    S_WIDTH,
    STRIDE_B_O,
    STRIDE_B_R,
    STRIDE_DB_O,
    STRIDE_DB_R,
    bank_of,
    bucket_of,
    factor_pointer,
    field,
    fill_width,
    lora_cases,
    options_of,
    pick,
    scale_of,
    size_field,
    slots_of,
    strides_of_B,
)
from .lora_kernels import expand_dot, factor_grad_tile, fill_zeros, shrink_dot
from .lora_shrink import launch_finish, new_partial


@triton.jit
def target_of(program, widths, BLOCK: tl.constexpr, EXTRA, PER_BLOCK):
    """(target, program within it) where target g takes EXTRA + PER_BLOCK * cdiv(widths[g], BLOCK) programs."""
    target = tl.zeros((), tl.int32)
    for g in tl.static_range(len(widths) - 1):
        n = EXTRA + PER_BLOCK * tl.cdiv(widths[g], BLOCK)
        past = (target == g) & (program >= n)
        program = tl.where(past, program - n, program)
        target += past.to(tl.int32)
    return target, program


@triton.jit(do_not_specialize=["slot"])
def _lora_expand_kernel(
    ys, strides, widths, perm_ptr, offsets_ptr, tiles_ptr,  # updated rows [T, O] of each target and the plan
    table_ptr, s_ptr, stride_s, gates_ptr,  # S [P, widths of the bank], gates [P] or None
    n_column_tiles, n_slots, slot, n_adapters,
    HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGN: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y += gate scale (s B^T + bias) in rows of `slot`."""
    tile = tl.program_id(0) // n_column_tiles
    target, column_tile = target_of(tl.program_id(0) % n_column_tiles, widths, BLOCK_N, 0, 1)
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    if adapter >= n_adapters:
        return
    n_columns, entry = n_adapters * len(ys), target * n_adapters + adapter
    rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
    p_bias = factor_pointer(table_ptr, n_columns, entry, PTR_BIAS, FACTOR, ALIGNED)
    # Without rank or bias the rows stay as they are: adding 0 would turn -0 into +0.
    if (rank == 0) & (p_bias.to(tl.int64) == 0):
        return

    o_j = tl.load(offsets_ptr + adapter) + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_j < tl.load(offsets_ptr + adapter + 1)
    b_p = tl.load(perm_ptr + o_j, mask=m_row, other=0)
    m_row &= b_p % n_slots == slot
    width, column = pick(widths, target), column_tile * BLOCK_N
    o_n = column + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    p_y = pick(ys, target) + (b_p // n_slots)[:, None].to(tl.int64) * pick(strides, target) + o_n[None, :]
    b_y = tl.load(p_y, mask=m_row[:, None] & m_n[None, :], other=0.0)
    stride_o, stride_r = strides_of_B(table_ptr, n_columns, entry, STRIDE_B_O, STRIDE_B_R, LAYOUT, ALIGN)
    acc = expand_dot(
        s_ptr + b_p[:, None].to(tl.int64) * stride_s + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), m_row,
        factor_pointer(table_ptr, n_columns, entry, PTR_B, FACTOR, ALIGNED),
        stride_r, stride_o, rank, bucket_of(rank), column, width,
        BUCKETS, BLOCK_N,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n & (p_bias.to(tl.int64) != 0), other=0.0).to(tl.float32)[None, :]
    c = scale_of(table_ptr, n_columns, entry) + tl.zeros([BLOCK_M, 1], tl.float32)
    if gates_ptr is not None:
        c *= tl.load(gates_ptr + b_p, mask=m_row, other=0.0)[:, None]
    # An explicit fma, so that every variant of the kernel rounds alike whatever the compiler would fuse.
    y = tl.fma(acc, tl.broadcast_to(c, [BLOCK_M, BLOCK_N]), b_y.to(tl.float32))
    tl.store(p_y, y.to(b_y.dtype), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def row_dot(p_row, m_row, p_bias, n_cols, BLOCK_K: tl.constexpr):
    """sum_k rows[m, k] bias[k]; p_row [M, 1] points at rows."""
    o_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([p_row.shape[0]], tl.float32)
    for k in range(0, n_cols, BLOCK_K):
        m_k = o_k < n_cols - k
        b_dy = tl.load(p_row + (k + o_k[None, :]), mask=m_row[:, None] & m_k[None, :], other=0.0)
        b_bias = tl.load(p_bias + (k + o_k), mask=m_k, other=0.0)
        acc += tl.sum(b_dy.to(tl.float32) * b_bias.to(tl.float32)[None, :], axis=1)
    return acc


@triton.jit
def _ds_program(
    dy_ptr, stride_dy, width, s_ptr, stride_s, gates_ptr, perm_ptr, o_j, end, n_slots,
    table_ptr, n_columns, entry, has_adapter,
    ds_ptr, stride_ds, e_ptr,
    HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dS = gate scale dy B, zeros right of the rank and without adapter; e = S . (dy B) + dy . bias unless e_ptr is None."""
    compute: tl.constexpr = ds_ptr.dtype.element_ty
    m_row = o_j < end
    b_p = tl.load(perm_ptr + o_j, mask=m_row, other=0)
    rank = tl.zeros((), tl.int32)
    if has_adapter:
        rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
    s_begin = size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN)
    p_s, p_ds = s_ptr + s_begin + b_p[:, None].to(tl.int64) * stride_s, ds_ptr + s_begin + b_p[:, None].to(tl.int64) * stride_ds
    fill_zeros(p_ds, m_row, rank, field(table_ptr, n_columns, entry, S_WIDTH).to(tl.int32), FILL_R)
    b_e = tl.zeros([o_j.shape[0]], tl.float32)
    if has_adapter:
        p_row = dy_ptr + (b_p // n_slots)[:, None].to(tl.int64) * stride_dy
        if HAS_BIAS and e_ptr is not None:
            p_bias = factor_pointer(table_ptr, n_columns, entry, PTR_BIAS, FACTOR, ALIGNED)
            if p_bias.to(tl.int64) != 0:
                b_e = row_dot(p_row, m_row, p_bias, width, BLOCK_K)
        c = scale_of(table_ptr, n_columns, entry) + tl.zeros([o_j.shape[0], 1], tl.float32)
        if gates_ptr is not None:
            c *= tl.load(gates_ptr + b_p, mask=m_row, other=0.0)[:, None]
        p_B = factor_pointer(table_ptr, n_columns, entry, PTR_B, FACTOR, ALIGNED)
        stride_o, stride_r = strides_of_B(table_ptr, n_columns, entry, STRIDE_B_O, STRIDE_B_R, LAYOUT, ALIGN)
        for b in tl.static_range(4):
            if BUCKETS & (1 << b):
                if bucket_of(rank) == b:
                    for rank0 in range(0, rank, 16 << b):
                        acc = shrink_dot(
                            p_row, m_row, p_B + tl.cast(rank0, tl.int64) * stride_r, stride_r, stride_o, rank - rank0, width,
                            o_j, (0, 0, 0, 0), (None, 0, 0), b_p,
                            compute, False, 16 << b, BLOCK_K if b < 3 else BLOCK_K // 2,
                        )  # fmt: skip
                        o_r = rank0 + tl.arange(0, 16 << b)
                        m_s = m_row[:, None] & (o_r < rank)[None, :]
                        tl.store(p_ds + o_r[None, :], (acc * c).to(compute), mask=m_s)
                        if e_ptr is not None:
                            b_e += tl.sum(acc * tl.load(p_s + o_r[None, :], mask=m_s, other=0.0).to(tl.float32), axis=1)
    if e_ptr is not None:
        tl.store(e_ptr + b_p, b_e, mask=m_row)


@triton.jit
def _lora_expand_bwd_kernel(
    dys, strides, widths, s_ptr, stride_s, gates_ptr, perm_ptr, offsets_ptr, tiles_ptr,  # dy [T, O], S, gates and the plan
    table_ptr,
    ds_ptr, stride_ds, e_ptr, partial_ptr, slot_size,  # outputs dS like S, e [targets, P] or None, [slots, slot_size]
    n_programs, n_positions, n_slots, n_rank_tiles, n_adapters,
    HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr, FACTOR: tl.constexpr, GRAD: tl.constexpr,
    LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Of the n_programs of one chunk, each target's first CHUNK_ROWS / BLOCK_M make dS and the rest dB = dy^T (gate scale s)."""
    n_ds_programs: tl.constexpr = CHUNK_ROWS // BLOCK_M
    tile = tl.program_id(0) // n_programs
    target, program = target_of(tl.program_id(0) % n_programs, widths, BLOCK_W, n_ds_programs, n_rank_tiles)
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    chunk = tile - tl.load(p_tiles + adapter)
    has_adapter = adapter < n_adapters
    n_columns, entry = n_adapters * len(dys), target * n_adapters + tl.minimum(adapter, n_adapters - 1)
    p_dy, stride_dy, width = pick(dys, target), pick(strides, target), pick(widths, target)
    if program < n_ds_programs:
        # The chunks after the last adapter's cover the positions of no adapter.
        end = tl.load(offsets_ptr + adapter + 1, mask=has_adapter, other=n_positions)
        begin = tl.load(offsets_ptr + adapter) + chunk * CHUNK_ROWS + program * BLOCK_M
        if begin < end:
            _ds_program(
                p_dy, stride_dy, width, s_ptr, stride_s, gates_ptr, perm_ptr, begin + tl.arange(0, BLOCK_M), end, n_slots,
                table_ptr, n_columns, entry, has_adapter,
                ds_ptr, stride_ds, None if e_ptr is None else e_ptr + target.to(tl.int64) * n_positions,
                HAS_BIAS, BUCKETS, FILL_R, FACTOR, LAYOUT, ALIGNED, ALIGN, BLOCK_K,
            )  # fmt: skip
    elif has_adapter:
        program -= n_ds_programs
        rank0, column = program % n_rank_tiles * 64, program // n_rank_tiles * BLOCK_W
        rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
        p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DB, GRAD, ALIGNED)
        p_bias = factor_pointer(table_ptr, n_columns, entry, PTR_DBIAS, GRAD, ALIGNED)
        wanted = (p_grad.to(tl.int64) != 0) & (rank > rank0) | (p_bias.to(tl.int64) != 0) & (rank0 == 0)
        if wanted:
            stride_o, stride_r = strides_of_B(table_ptr, n_columns, entry, STRIDE_DB_O, STRIDE_DB_R, LAYOUT, ALIGN)
            part_o, part_r = rank, 1
            if LAYOUT == O_CONTIGUOUS:
                part_o, part_r = 1, width
            factor_grad_tile(
                p_dy, stride_dy, column, width,
                s_ptr + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), stride_s, rank0, rank,
                scale_of(table_ptr, n_columns, entry), (0, 0, 0, 0), (None, 0, 0),
                perm_ptr, gates_ptr, offsets_ptr, adapter, chunk, n_slots,
                p_grad, stride_o, stride_r, p_bias,
                partial_ptr, slot_size, field(table_ptr, n_columns, entry, PART_B), part_o, part_r,
                field(table_ptr, n_columns, entry, PART_BIAS),
                HAS_BIAS, False, BUCKETS, BLOCK_J, BLOCK_W,
            )  # fmt: skip


def launch_expand(bank, s, gates, offsets, perm, tiles, ys):
    """One launch per slot of a row: two positions of a row may lie in any two tiles, but never in one slot."""
    if not bank.constexprs["BUCKETS"] or not perm.numel():
        return
    options = options_of("lora_expand", "expand", s.device, s.dtype)
    widths = tuple(y.shape[1] for y in ys)
    n_column_tiles = sum(cdiv(w, options["BLOCK_N"]) for w in widths)
    n_slots = slots_of(perm, len(ys[0]))
    row_tiles = cdiv(perm.numel(), options["BLOCK_M"]) + bank.n_adapters
    for slot in range(n_slots if n_column_tiles else 0):
        _lora_expand_kernel[(row_tiles * n_column_tiles,)](
            tuple(ys), tuple(y.stride(0) for y in ys), widths, perm, offsets, tiles,
            bank.table, s, s.stride(0), gates,
            n_column_tiles, n_slots, slot, bank.n_adapters,
            TILE_INDEX=tile_index(options["BLOCK_M"]),
            **bank.pick("HAS_BIAS", "BUCKETS", "FACTOR", "LAYOUT", "ALIGNED", "ALIGN"), **options,
        )  # fmt: skip


def launch_ds_and_grad_b(bank, dys, s, gates, offsets, perm, tiles, ds, e, partial):
    """dS and e whole; dB and dbias of adapters of one chunk, and partial sums of the others."""
    options = options_of("lora_expand", "bwd", s.device, s.dtype)
    widths = tuple(dy.shape[1] for dy in dys)
    n_rank_tiles = max(1, cdiv(bank.max_rank, 64)) * any(bank.largest[1:])
    n_programs = sum(CHUNK // options["BLOCK_M"] + n_rank_tiles * cdiv(w, options["BLOCK_W"]) for w in widths)
    n_chunks = cdiv(perm.numel(), CHUNK) + bank.n_adapters + 1
    if not perm.numel():
        return
    _lora_expand_bwd_kernel[(n_chunks * n_programs,)](
        tuple(dys), tuple(dy.stride(0) for dy in dys), widths, s, s.stride(0), gates, perm, offsets, tiles,
        bank.table,
        ds, ds.stride(0), e, partial, partial.stride(0),
        n_programs, perm.numel(), slots_of(perm, len(dys[0])), n_rank_tiles, bank.n_adapters,
        FILL_R=fill_width(bank), TILE_INDEX=tile_index(CHUNK),
        **bank.pick("HAS_BIAS", "BUCKETS", "FACTOR", "GRAD", "LAYOUT", "ALIGNED", "ALIGN"), **options,
    )  # fmt: skip


def lora_expand_fwd(s, B, bias, scale, gates, offsets, perm, tiles, ys):
    """Adds to ys."""
    with torch.cuda.device_of(s):
        bank = bank_of(len(ys), B=B, bias=bias, scale=scale)
        launch_expand(bank, s, gates, offsets, perm, tiles, ys)


def lora_expand_bwd(dys, s, B, bias, scale, gates, offsets, perm, tiles, ds, e, dB, dbias):
    """ds and e (or None) are written whole; dB and dbias are written, but for the empty ones."""
    with torch.cuda.device_of(s):
        bank = bank_of(len(dys), B=B, bias=bias, scale=scale, dB=dB, dbias=dbias)
        partial = new_partial(bank, perm)
        launch_ds_and_grad_b(bank, dys, s, gates, offsets, perm, tiles, ds, e, partial)
        launch_finish(bank, ds, len(dys[0]), offsets, perm, tiles, None, False, None, partial)


def compile_cases(arch):
    kernels = dict(expand=(_lora_expand_kernel, False), bwd=(_lora_expand_bwd_kernel, False))
    yield from lora_cases("lora_expand", kernels, arch)
