"""Into rank space and back: S = (M o x) A^T, its gradients dA = dS^T (M o x) and dx += M o (dS A), for all targets at once.

Programs of one row tile that differ only in their target (and in the shrink, nothing else) are neighbours in the grid,
so a tile of x comes from memory once and from L2 for the other targets.
"""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, dropout_scale, group_of_tile, launch_options, tile_index
from ._lora import (
    CHUNK,
    CHUNK_ROWS,
    D_OUT,
    O_CONTIGUOUS,
    PART_A,
    PART_B,
    PART_BIAS,
    PTR_A,
    PTR_DA,
    PTR_DB,
    PTR_DBIAS,
    RANK,
    S_BEGIN,
    S_WIDTH,
    STRIDE_A,
    STRIDE_DA,
    STRIDE_DB_O,
    STRIDE_DB_R,
    bank_of,
    bucket_of,
    dropout_of,
    factor_pointer,
    field,
    fill_width,
    lora_cases,
    options_of,
    size_field,
    slots_of,
)
from .lora_kernels import bits_of_target, draw_bits, expand_dot, factor_grad_tile, fill_zeros, first_slot, keep_tile, shrink_dot


@triton.jit
def _lora_shrink_kernel(
    x_ptr, stride_x, perm_ptr, offsets_ptr, tiles_ptr,  # rows [T, D] and the plan of their positions
    table_ptr, step_ptr,
    s_ptr, stride_s, bits_ptr, stride_bits, n_bytes,  # outputs [P, widths], uint8 [P, targets, ceil(D / 8)] or None
    n_positions, n_slots, d_in, n_adapters, n_targets,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s = (M o x) A^T, zeros right of each rank and in rows of no adapter."""
    tile, target = tl.program_id(0) // n_targets, tl.program_id(0) % n_targets
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    begin = tl.load(offsets_ptr + adapter)
    # The tiles after the last adapter's cover the positions of no adapter.
    end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_positions)
    o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_j < end
    b_p = tl.load(perm_ptr + o_j, mask=m_row, other=0)
    n_columns, entry = n_adapters * n_targets, target * n_adapters + tl.minimum(adapter, n_adapters - 1)
    rank = tl.zeros((), tl.int32)
    if adapter < n_adapters:
        rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
    p_s = s_ptr + b_p[:, None].to(tl.int64) * stride_s + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN)
    fill_zeros(p_s, m_row, rank, field(table_ptr, n_columns, entry, S_WIDTH).to(tl.int32), FILL_R)
    bits = bits_of_target(bits_ptr, stride_bits, n_bytes, target)
    if rank == 0:
        if bits_ptr is not None:
            fill_zeros(bits[0] + b_p[:, None].to(tl.int64) * stride_bits, m_row, 0, n_bytes, 64)
        return

    p_row = x_ptr + (b_p // n_slots)[:, None].to(tl.int64) * stride_x
    p_A = factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED)
    stride_A = size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN_A)
    mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
    alpha = dropout_scale(mask[0], DROPOUT)
    compute: tl.constexpr = s_ptr.dtype.element_ty
    if bits_ptr is not None:
        draw_bits(mask, bits, b_p, m_row, o_j - begin, d_in, 128)
    for b in tl.static_range(4):
        if BUCKETS & (1 << b):
            if bucket_of(rank) == b:
                for rank0 in range(0, rank, 16 << b):
                    acc = shrink_dot(
                        p_row, m_row, p_A + tl.cast(rank0, tl.int64) * stride_A, stride_A, 1, rank - rank0, d_in,
                        o_j - begin, mask, bits, b_p,
                        compute, DROPOUT, 16 << b, BLOCK_K if b < 3 else BLOCK_K // 2,
                    )  # fmt: skip
                    o_r = rank0 + tl.arange(0, 16 << b)
                    tl.store(p_s + o_r[None, :], (acc * alpha).to(compute), mask=m_row[:, None] & (o_r < rank)[None, :])


@triton.jit
def _lora_grad_a_kernel(
    x_ptr, stride_x, ds_ptr, stride_ds, perm_ptr, offsets_ptr, tiles_ptr,  # rows [T, D], dS [P, widths] and the plan
    table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes,
    partial_ptr, slot_size,  # output [slots, slot_size]; single chunks go to the table's gradients
    n_slots, d_in, n_rank_tiles, n_adapters, n_targets,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dA = dS^T (M o x) over one chunk of positions."""
    program, target = tl.program_id(0) // n_targets, tl.program_id(0) % n_targets
    program, rank0 = program // n_rank_tiles, program % n_rank_tiles * 64
    n_column_tiles = tl.cdiv(d_in, BLOCK_W)
    tile, column = program // n_column_tiles, program % n_column_tiles * BLOCK_W
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    if adapter >= n_adapters:
        return
    n_columns, entry = n_adapters * n_targets, target * n_adapters + adapter
    rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
    p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DA, GRAD, ALIGNED)
    if (rank <= rank0) | (p_grad.to(tl.int64) == 0):
        return

    mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
    factor_grad_tile(
        x_ptr, stride_x, column, d_in,
        ds_ptr + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), stride_ds, rank0, rank,
        dropout_scale(mask[0], DROPOUT), mask, bits_of_target(bits_ptr, stride_bits, n_bytes, target),
        perm_ptr, None, offsets_ptr, adapter, tile - tl.load(p_tiles + adapter), n_slots,
        p_grad, 1, size_field(table_ptr, n_columns, entry, STRIDE_DA, ALIGN_A), p_grad,
        partial_ptr, slot_size, field(table_ptr, n_columns, entry, PART_A), 1, d_in, 0,
        False, DROPOUT, BUCKETS, BLOCK_J, BLOCK_W,
    )  # fmt: skip


@triton.jit
def _dx_program(
    program, dx_ptr, stride_dx, perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes, ds_ptr, stride_ds,
    n_slots, slot, d_in, n_adapters, n_targets,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_column_tiles = tl.cdiv(d_in, BLOCK_N)
    tile, column = program // n_column_tiles, program % n_column_tiles * BLOCK_N
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    if adapter < n_adapters:
        n_columns, max_rank = n_adapters * n_targets, tl.zeros((), tl.int32)
        for g in range(0, n_targets):
            max_rank = tl.maximum(max_rank, size_field(table_ptr, n_columns, g * n_adapters + adapter, RANK, ALIGN))
        if max_rank > 0:
            begin = tl.load(offsets_ptr + adapter)
            o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
            m_row = o_j < tl.load(offsets_ptr + adapter + 1)
            b_p = tl.load(perm_ptr + o_j, mask=m_row, other=0)
            m_row &= b_p % n_slots == slot
            o_n = column + tl.arange(0, BLOCK_N)
            p_dx = dx_ptr + (b_p // n_slots)[:, None].to(tl.int64) * stride_dx + o_n[None, :]
            m_dx = m_row[:, None] & (o_n < d_in)[None, :]
            total = tl.load(p_dx, mask=m_dx, other=0.0).to(tl.float32)
            for g in tl.range(0, n_targets, num_stages=1):
                entry = g * n_adapters + adapter
                rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
                mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
                acc = expand_dot(
                    ds_ptr + b_p[:, None].to(tl.int64) * stride_ds + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), m_row,
                    factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED),
                    size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN_A), 1, rank, bucket_of(rank), column, d_in,
                    BUCKETS, BLOCK_N,
                )  # fmt: skip
                if DROPOUT:
                    bits = bits_of_target(bits_ptr, stride_bits, n_bytes, g)
                    acc = tl.where(keep_tile(mask, bits, b_p, m_row, o_j - begin, column, BLOCK_N), acc, 0.0)
                # An explicit fma, so that every variant of the kernel rounds alike whatever the compiler would fuse.
                total = tl.fma(acc, dropout_scale(mask[0], DROPOUT), total)
            tl.store(p_dx, total.to(dx_ptr.dtype.element_ty), mask=m_dx)


@triton.jit
def _sum_part(
    p_grad, partial_ptr, slot_size, part, block, n_chunks, size, width, stride, stride_width,
    DENSE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sum of the chunks of one gradient, `size` elements in rows of `width`; zeros without chunks."""
    if p_grad.to(tl.int64) != 0:
        o_e = tl.cast(block, tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
        m_e = o_e < size
        acc = tl.zeros([BLOCK_E], tl.float32)
        for c in range(0, n_chunks):
            acc += tl.load(partial_ptr + tl.cast(c, tl.int64) * slot_size + part + o_e, mask=m_e, other=0.0)
        if not DENSE:
            o_e = o_e // width * stride + o_e % width * stride_width
        tl.store(p_grad + o_e, acc.to(p_grad.dtype.element_ty), mask=m_e)


@triton.jit
def _sum_chunks_program(
    program, partial_ptr, slot_size, offsets_ptr, table_ptr, d_in, size_A, size_B, size_bias, n_adapters, n_targets,
    GRAD: tl.constexpr, LAYOUT: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of an adapter of several chunks, summed in order, or exact zeros for one without positions."""
    n_columns = n_adapters * n_targets
    n_blocks_A, n_blocks_B = tl.cdiv(size_A, BLOCK_E), tl.cdiv(size_B, BLOCK_E)
    n_blocks = n_blocks_A + n_blocks_B + tl.cdiv(size_bias, BLOCK_E)
    entry, block = program // n_blocks, program % n_blocks
    adapter = entry % n_adapters
    n_chunks = tl.cdiv(tl.load(offsets_ptr + adapter + 1) - tl.load(offsets_ptr + adapter), CHUNK_ROWS)
    if n_chunks != 1:
        if n_chunks > 0:
            partial_ptr += first_slot(offsets_ptr, adapter).to(tl.int64) * slot_size
        rank, d_out = field(table_ptr, n_columns, entry, RANK), field(table_ptr, n_columns, entry, D_OUT)
        if block < n_blocks_A:
            p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DA, GRAD, ALIGNED)
            part, stride = field(table_ptr, n_columns, entry, PART_A), field(table_ptr, n_columns, entry, STRIDE_DA)
            _sum_part(p_grad, partial_ptr, slot_size, part, block, n_chunks, rank * d_in, d_in, stride, 1, DENSE, BLOCK_E)
        elif block < n_blocks_A + n_blocks_B:
            p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DB, GRAD, ALIGNED)
            part = field(table_ptr, n_columns, entry, PART_B)
            stride, stride_width = field(table_ptr, n_columns, entry, STRIDE_DB_O), field(table_ptr, n_columns, entry, STRIDE_DB_R)
            width = rank
            if LAYOUT == O_CONTIGUOUS:
                stride, stride_width, width = stride_width, stride, d_out
            block -= n_blocks_A
            _sum_part(p_grad, partial_ptr, slot_size, part, block, n_chunks, rank * d_out, width, stride, stride_width, DENSE, BLOCK_E)
        else:
            p_grad = factor_pointer(table_ptr, n_columns, entry, PTR_DBIAS, GRAD, ALIGNED)
            part = field(table_ptr, n_columns, entry, PART_BIAS)
            block -= n_blocks_A + n_blocks_B
            _sum_part(p_grad, partial_ptr, slot_size, part, block, n_chunks, d_out, d_out, d_out, 1, DENSE, BLOCK_E)


@triton.jit(do_not_specialize=["slot"])
def _lora_bwd_finish_kernel(
    dx_ptr, stride_dx, perm_ptr, offsets_ptr, tiles_ptr,  # updated rows [T, D] and the plan
    table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes,
    ds_ptr, stride_ds, partial_ptr, slot_size,  # inputs [P, widths], [slots, slot_size]
    n_slots, slot, d_in, size_A, size_B, size_bias, n_adapters, n_targets, n_dx_programs,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, GRAD: tl.constexpr, LAYOUT: tl.constexpr,
    DENSE: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first n_dx_programs do dx += M o (dS A) in rows of `slot`, the rest sum chunks: neither needs the other."""
    program = tl.program_id(0)
    if program < n_dx_programs:
        _dx_program(
            program, dx_ptr, stride_dx, perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes,
            ds_ptr, stride_ds, n_slots, slot, d_in, n_adapters, n_targets,
            DROPOUT, BUCKETS, FACTOR, ALIGNED, ALIGN, ALIGN_A, TILE_INDEX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _sum_chunks_program(
            program - n_dx_programs, partial_ptr, slot_size, offsets_ptr, table_ptr,
            d_in, size_A, size_B, size_bias, n_adapters, n_targets, GRAD, LAYOUT, DENSE, ALIGNED, BLOCK_E,
        )  # fmt: skip


def bits_args(bits):
    """Keep bits [P, targets, bytes] or None, their row stride and bytes of a row and target."""
    return (None, 0, 0) if bits is None else (bits, bits.stride(0), bits.shape[2])


def prefers_bits(device):
    """Whether a mask costs more to draw than to move here: data, from the estimate in docs/lora.md."""
    return launch_options("lora_shrink", "dropout", arch_of(device))["keep_bits"]


def launch_shrink(bank, x, offsets, perm, tiles, step, dropout, s, bits=None):
    if not s.numel():
        return None if bits is None else bits.zero_()
    options = options_of("lora_shrink", "shrink", x.device, s.dtype)
    row_tiles = cdiv(perm.numel(), options["BLOCK_M"]) + bank.n_adapters + 1
    _lora_shrink_kernel[(row_tiles * bank.n_targets,)](
        x, x.stride(0), perm, offsets, tiles, bank.table, step,
        s, s.stride(0), *bits_args(bits),
        perm.numel(), slots_of(perm, len(x)), x.shape[1], bank.n_adapters, bank.n_targets,
        DROPOUT=dropout, FILL_R=fill_width(bank), TILE_INDEX=tile_index(options["BLOCK_M"]),
        **bank.pick("BUCKETS", "FACTOR", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
    )  # fmt: skip


def launch_grad_a(bank, ds, x, offsets, perm, tiles, step, dropout, partial, bits=None):
    if not bank.largest[0] or not perm.numel():
        return
    options = options_of("lora_shrink", "grad_a", x.device, ds.dtype)
    n_rank_tiles = cdiv(bank.max_rank, 64)
    tiles_xy = (cdiv(perm.numel(), CHUNK) + bank.n_adapters) * cdiv(x.shape[1], options["BLOCK_W"])
    _lora_grad_a_kernel[(tiles_xy * n_rank_tiles * bank.n_targets,)](
        x, x.stride(0), ds, ds.stride(0), perm, offsets, tiles, bank.table, step, *bits_args(bits),
        partial, partial.stride(0),
        slots_of(perm, len(x)), x.shape[1], n_rank_tiles, bank.n_adapters, bank.n_targets,
        DROPOUT=dropout, TILE_INDEX=tile_index(CHUNK), **bank.pick("BUCKETS", "GRAD", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
    )  # fmt: skip


def launch_finish(bank, ds, n_rows, offsets, perm, tiles, step, dropout, dx, partial, bits=None):
    """dx += M o (dS A) unless dx is None, and the sums of the chunks of every gradient in the bank."""
    options = options_of("lora_shrink", "finish", ds.device, ds.dtype)
    d_in = bank.d_in if dx is None else dx.shape[1]
    row_tiles = cdiv(perm.numel(), options["BLOCK_M"]) + bank.n_adapters
    n_dx = row_tiles * cdiv(d_in, options["BLOCK_N"]) if dx is not None and ds.numel() else 0
    n_sums = bank.n_adapters * bank.n_targets * sum(cdiv(n, options["BLOCK_E"]) for n in bank.largest)
    n_slots = slots_of(perm, n_rows)
    out = ds if dx is None else dx
    for slot in range(n_slots if n_dx else 1):
        if not n_dx + n_sums:
            return
        _lora_bwd_finish_kernel[(n_dx + n_sums,)](
            out, out.stride(0), perm, offsets, tiles, bank.table, step, *bits_args(bits),
            ds, ds.stride(0), partial, partial.stride(0),
            n_slots, slot, d_in, *bank.largest, bank.n_adapters, bank.n_targets, n_dx,
            DROPOUT=dropout, TILE_INDEX=tile_index(options["BLOCK_M"]),
            **bank.pick("BUCKETS", "FACTOR", "GRAD", "LAYOUT", "DENSE", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
        )  # fmt: skip
        n_sums = 0


def new_partial(bank, perm):
    """Slots of partial sums: at most two per 1025 positions."""
    n_slots = 2 * perm.numel() // (CHUNK + 1) if bank.slot_size else 0
    return torch.empty(n_slots, bank.slot_size, dtype=torch.float32, device=perm.device)


def new_s(bank, x, perm, factors):
    dtype = torch.promote_types(x.dtype, factors[0].dtype)
    return torch.empty(perm.numel(), sum(bank.widths), dtype=dtype, device=x.device)


def lora_shrink_fwd(x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    with torch.cuda.device_of(x):
        bank = bank_of(len(sites), A=A, threshold=threshold, seeds=seeds, sites=sites)
        s = new_s(bank, x, perm, A)
        launch_shrink(bank, x, offsets, perm, tiles, step, dropout, s, bits)
    return s


def lora_shrink_bwd(ds, x, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dx, dA, bits=None):
    """dx (or None) is added to; dA is written, but for the empty ones."""
    with torch.cuda.device_of(ds):
        bank = bank_of(len(sites), A=A, threshold=threshold, seeds=seeds, sites=sites, dA=dA)
        partial = new_partial(bank, perm)
        launch_grad_a(bank, ds, x, offsets, perm, tiles, step, dropout, partial, bits)
        launch_finish(bank, ds, len(x), offsets, perm, tiles, step, dropout, dx, partial, bits)


def compile_cases(arch):
    kernels = dict(shrink=(_lora_shrink_kernel, True), grad_a=(_lora_grad_a_kernel, True), finish=(_lora_bwd_finish_kernel, True))
    yield from lora_cases("lora_shrink", kernels, arch)
