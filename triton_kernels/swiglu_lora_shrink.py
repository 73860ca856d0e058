"""The gated product of an MLP with the shrink of the LoRA layer that reads it: one launch forward, two backward (K slots: K - 1 more).

Both passes touch a column of a row once: backward has dh' and the dA of a tile of columns in one program, beside its A.
"""

import torch
import triton
import triton.language as tl

from ._common import cdiv, dropout_scale, tile_index
from ._lora import (
    CHUNK,
    CHUNK_ROWS,
    PART_A,
    PTR_A,
    PTR_DA,
    RANK,
    STRIDE_A,
    STRIDE_DA,
    bank_of,
    bucket_of,
    dropout_of,
    factor_pointer,
    field,
    fill_width,
    options_of,
    size_field,
    slots_of,
)
from ._producers import (
    fill_s,
    largest_rank,
    n_position_tiles,
    options_for,
    position_chunk,
    position_tile,
    producer_cases,
    shrink_step,
    shrink_target,
    store_s,
)
from .lora_kernels import _store_sum, draw_bits, fill_zeros, first_slot, keep_tile
from .lora_shrink import bits_args, launch_finish, new_partial, new_s

_STEM = "swiglu_lora_shrink"


@triton.jit
def _gate(b_z, GELU: tl.constexpr):
    """(act(z) rounded to the dtype of z, act'(z)): act = z p, p = sigmoid(q(z)), act' = p + z p (1 - p) q'(z)."""
    z = b_z.to(tl.float32)
    q, dq = z, 1.0
    if GELU:  # the tanh form: q = 2 sqrt(2 / pi) (z + 0.044715 z^3)
        q = 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)
        dq = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    p = 1.0 / (1.0 + tl.exp(-q))
    return (z * p).to(b_z.dtype).to(tl.float32), p + z * p * (1.0 - p) * dq


@triton.jit
def _gate_and_shrink(
    p_gate, p_up, p_h, b_p, m_row, m_write, d_in, uid, table_ptr, step_ptr, n_adapters, adapter, rank0, bits, p_s,
    GELU: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h of a tile of rows and its S, ranks from rank0 on; BLOCK_R = 0: h alone."""
    COMPUTE: tl.constexpr = p_s.dtype.element_ty
    if BLOCK_R:
        target = shrink_target(table_ptr, n_adapters, adapter, step_ptr, rank0, bits, 0, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A)
        acc = tl.zeros([m_row.shape[0], BLOCK_R], tl.float32)
    for k in range(0, d_in, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = m_row[:, None] & (o_k < d_in)[None, :]
        # [M, K]
        b_gate = tl.load(p_gate + o_k[None, :], mask=m_k, other=0.0)
        b_up = tl.load(p_up + o_k[None, :], mask=m_k, other=0.0)
        a, _ = _gate(b_gate, GELU)
        b_h = (a * b_up.to(tl.float32)).to(b_gate.dtype)
        tl.store(p_h + o_k[None, :], b_h, mask=m_k & m_write[:, None])
        if BLOCK_R:
            acc = shrink_step(acc, b_h, b_p, m_row, k, d_in, uid, target, COMPUTE, DROPOUT)
    if BLOCK_R:
        store_s(acc, p_s, m_row, rank0, target, table_ptr, n_adapters, adapter, DROPOUT, ALIGN)


@triton.jit
def _swiglu_shrink_kernel(
    gate_ptr, stride_gate, up_ptr, stride_up, perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr,
    h_ptr, s_ptr, stride_s, bits_ptr, stride_bits, n_bytes,  # outputs [T, D], [P, R], uint8 [P, 1, ceil(D / 8)] or None
    n_positions, n_slots, d_in, n_adapters,
    GELU: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FILL_R: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row is written from its first position, whoever owns that; S of every position."""
    adapter, b_p, m_row, uid = position_tile(
        tl.program_id(0), perm_ptr, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX, BLOCK_M
    )
    b_t, m_write = (b_p // n_slots).to(tl.int64), m_row & (b_p % n_slots == 0)
    p_gate, p_up = gate_ptr + b_t[:, None] * stride_gate, up_ptr + b_t[:, None] * stride_up
    p_h, p_s = h_ptr + b_t[:, None] * d_in, s_ptr + b_p[:, None].to(tl.int64) * stride_s
    fill_s(p_s, m_row, table_ptr, n_adapters, adapter, 1, FILL_R, ALIGN)
    bits = (bits_ptr, stride_bits, n_bytes)
    rank = largest_rank(table_ptr, n_adapters, adapter, 1, ALIGN)
    if rank == 0:
        _gate_and_shrink(
            p_gate, p_up, p_h, b_p, m_row, m_write, d_in, uid, table_ptr, step_ptr, n_adapters, adapter, 0, bits, p_s,
            GELU, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A, 0, BLOCK_K,
        )  # fmt: skip
        if bits_ptr is not None:
            fill_zeros(bits_ptr + b_p[:, None].to(tl.int64) * stride_bits, m_row, 0, n_bytes, 64)
        return
    if bits_ptr is not None:
        draw_bits(dropout_of(table_ptr, n_adapters, adapter, step_ptr, DROPOUT), bits, b_p, m_row, uid, d_in, 128)
    for b in tl.static_range(4):
        if BUCKETS & (1 << b):
            if bucket_of(rank) == b:
                for rank0 in tl.range(0, rank, 16 << b, num_stages=1):
                    _gate_and_shrink(
                        p_gate, p_up, p_h, b_p, m_row, m_write & (rank0 == 0), d_in, uid, table_ptr, step_ptr, n_adapters, adapter,
                        rank0, bits, p_s, GELU, DROPOUT, FACTOR, ALIGNED, ALIGN, ALIGN_A, 16 << b, BLOCK_K if b < 3 else BLOCK_K // 2,
                    )  # fmt: skip


@triton.jit
def _lora_dh(b_ds, p_ds, m_j, p_A, stride_A, rank, o_c, m_c, BLOCK_R: tl.constexpr):
    """dS A [J, W]; b_ds [J, R] are the first BLOCK_R ranks, p_ds [J, 1] the rows of dS, p_A [W] a row of A."""
    o_r = tl.arange(0, BLOCK_R)
    # [R, W]
    b_A = tl.load(p_A[None, :] + o_r[:, None] * stride_A, mask=(o_r < rank)[:, None] & m_c[None, :], other=0.0)
    acc = tl.dot(b_ds, b_A.to(b_ds.dtype), tl.zeros([b_ds.shape[0], p_A.shape[0]], tl.float32), input_precision="ieee")
    if BLOCK_R == 64:
        for r in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
            m_r = o_r < rank - r
            b_more = tl.load(p_ds + (r + o_r)[None, :], mask=m_j[:, None] & m_r[None, :], other=0.0)
            b_A = tl.load(p_A[None, :] + (r + o_r).to(tl.int64)[:, None] * stride_A, mask=m_r[:, None] & m_c[None, :], other=0.0)
            acc = tl.dot(b_more, b_A.to(b_more.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _swiglu_chunk(
    rows, m_c, column, ds_ptr, stride_ds, perm_ptr, n_rows, n_slots, slot, uid0, p_A, stride_A, rank0, rank, mask, bits,
    GELU: tl.constexpr, FIRST: tl.constexpr, WRITES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dgate and dup (if WRITES) of a chunk of positions and a tile of columns; returns h^T dS there, [W, R].

    rows: pointers to the columns of row 0 and row strides of gate, up, dh, dgate and dup.
    """
    p_gate, stride_gate, p_up, stride_up, p_dh, stride_dh, p_dgate, stride_dgate, p_dup, stride_dup = rows
    BLOCK_W: tl.constexpr = m_c.shape[0]
    o_r = rank0 + tl.arange(0, BLOCK_R if BLOCK_R else 16)
    o_c = column + tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_W, BLOCK_R if BLOCK_R else 16], tl.float32)
    for j in range(0, n_rows, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        m_j = o_j < n_rows
        b_p = tl.load(perm_ptr + o_j, mask=m_j, other=0)
        b_t = (b_p // n_slots)[:, None].to(tl.int64)
        p_ds = ds_ptr + b_p[:, None].to(tl.int64) * stride_ds
        m_row = m_j[:, None] & m_c[None, :]
        # [J, W]
        b_gate = tl.load(p_gate[None, :] + b_t * stride_gate, mask=m_row, other=0.0)
        b_up = tl.load(p_up[None, :] + b_t * stride_up, mask=m_row, other=0.0).to(tl.float32)
        a, slope = _gate(b_gate, GELU)
        if BLOCK_R:
            # [J, R]
            b_ds = tl.load(p_ds + o_r[None, :], mask=m_j[:, None] & (o_r < rank)[None, :], other=0.0)
            if DROPOUT:
                keep = keep_tile(mask, bits, b_p, m_j, uid0 + o_j, column, BLOCK_W)
        if WRITES:
            m_row = m_row & (b_p % n_slots == slot)[:, None]
            total = tl.zeros([BLOCK_J, BLOCK_W], tl.float32)
            if FIRST:
                total = tl.load(p_dh[None, :] + b_t * stride_dh, mask=m_row, other=0.0).to(tl.float32)
            if BLOCK_R:
                lora = _lora_dh(b_ds, p_ds, m_j, p_A, stride_A, rank, o_c, m_c, BLOCK_R)
                if DROPOUT:
                    lora = tl.where(keep, lora, 0.0)
                total = tl.fma(lora, dropout_scale(mask[0], DROPOUT), total)
            b_dgate, b_dup = total * b_up * slope, total * a
            if not FIRST:
                b_dgate += tl.load(p_dgate[None, :] + b_t * stride_dgate, mask=m_row, other=0.0).to(tl.float32)
                b_dup += tl.load(p_dup[None, :] + b_t * stride_dup, mask=m_row, other=0.0).to(tl.float32)
            tl.store(p_dgate[None, :] + b_t * stride_dgate, b_dgate.to(p_dgate.dtype.element_ty), mask=m_row)
            tl.store(p_dup[None, :] + b_t * stride_dup, b_dup.to(p_dup.dtype.element_ty), mask=m_row)
        if BLOCK_R and FIRST:
            b_h = (a * b_up).to(b_gate.dtype).to(b_ds.dtype)
            if DROPOUT:
                b_h = tl.where(keep, b_h, 0.0)
            acc = tl.dot(tl.trans(b_h), b_ds, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["slot"])
def _swiglu_bwd_kernel(
    dh_ptr, stride_dh, ds_ptr, stride_ds, gate_ptr, stride_gate, up_ptr, stride_up,  # [T, D], [P, R], [T, D], [T, D]
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes,
    dgate_ptr, stride_dgate, dup_ptr, stride_dup, partial_ptr, slot_size,  # outputs [T, D], [T, D], [slots, slot_size]
    n_positions, n_slots, slot, d_in, n_rank_tiles, n_adapters,
    GELU: tl.constexpr, FIRST: tl.constexpr, HAS_DX: tl.constexpr, DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    FACTOR: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One chunk of an adapter's positions (or of those of none) and one tile of columns.

    dgate and dup are those of rows whose position `slot` is in the chunk; slots after the first add to them. Programs
    of ranks above 64 have only a dA.
    """
    n_column_tiles, program, rank0 = tl.cdiv(d_in, BLOCK_W), tl.program_id(0) // n_rank_tiles, tl.program_id(0) % n_rank_tiles * 64
    tile, column = program // n_column_tiles, program % n_column_tiles * BLOCK_W
    adapter, chunk, first, end = position_chunk(tile, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX)
    begin = first + chunk * CHUNK_ROWS
    rank = largest_rank(table_ptr, n_adapters, adapter, 1, ALIGN)
    if (begin >= end) | ((rank0 > 0) & (rank <= rank0)):
        return

    o_c = column + tl.arange(0, BLOCK_W)
    m_c, n_rows, bits = o_c < d_in, tl.minimum(end - begin, CHUNK_ROWS), (bits_ptr, stride_bits, n_bytes)
    rows = (gate_ptr + o_c, stride_gate, up_ptr + o_c, stride_up, dh_ptr + o_c, stride_dh)
    rows += (dgate_ptr + o_c, stride_dgate, dup_ptr + o_c, stride_dup)
    if rank == 0:
        if HAS_DX:
            _swiglu_chunk(
                rows, m_c, column, ds_ptr, stride_ds, perm_ptr + begin, n_rows, n_slots, slot, chunk * CHUNK_ROWS, None, 0, 0, 0,
                (0, 0, 0, 0), bits, GELU, FIRST, True, False, 0, BLOCK_J,
            )  # fmt: skip
        return
    p_slot = partial_ptr
    if end - first > CHUNK_ROWS:
        p_slot += (first_slot(offsets_ptr, adapter) + chunk).to(tl.int64) * slot_size
    mask = dropout_of(table_ptr, n_adapters, adapter, step_ptr, DROPOUT)
    p_A = factor_pointer(table_ptr, n_adapters, adapter, PTR_A, FACTOR, ALIGNED)
    stride_A = size_field(table_ptr, n_adapters, adapter, STRIDE_A, ALIGN_A)
    p_grad = factor_pointer(table_ptr, n_adapters, adapter, PTR_DA, GRAD, ALIGNED)
    for b in tl.static_range(3):
        if BUCKETS & (12 if b == 2 else 1 << b):
            if bucket_of(tl.minimum(rank, 64)) == b:
                for writes in tl.static_range(2):
                    if (writes == 0 and b == 2) or writes == 1:
                        if (rank0 == 0) == (writes == 1):
                            acc = _swiglu_chunk(
                                rows, m_c, column, ds_ptr, stride_ds, perm_ptr + begin, n_rows, n_slots, slot, chunk * CHUNK_ROWS,
                                p_A + o_c, stride_A, rank0, rank, mask, bits,
                                GELU, FIRST, HAS_DX and writes == 1, DROPOUT, 16 << b, BLOCK_J,
                            )  # fmt: skip
                            o_r = rank0 + tl.arange(0, 16 << b)
                            m_grad = m_c[:, None] & (o_r < rank)[None, :] & (p_grad.to(tl.int64) != 0)
                            c, r = o_c[:, None].to(tl.int64), o_r[None, :].to(tl.int64)
                            if FIRST:
                                _store_sum(
                                    acc * dropout_scale(mask[0], DROPOUT), m_grad,
                                    p_grad, c + r * size_field(table_ptr, n_adapters, adapter, STRIDE_DA, ALIGN_A),
                                    p_slot, field(table_ptr, n_adapters, adapter, PART_A) + c + r * d_in, end - first <= CHUNK_ROWS,
                                )  # fmt: skip


def swiglu_lora_shrink_fwd(gate, up, act, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    with torch.cuda.device_of(gate):
        bank = bank_of(1, A=A, threshold=threshold, seeds=seeds, sites=sites)
        h, s = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), new_s(bank, gate, perm, A)
        if not gate.numel():
            return h, s
        options = options_for(options_of(_STEM, "shrink", gate.device, s.dtype), bits is not None)
        _swiglu_shrink_kernel[(n_position_tiles(perm, bank, options["BLOCK_M"]),)](
            gate, gate.stride(0), up, up.stride(0), perm, offsets, tiles, bank.table, step,
            h, s, s.stride(0), *bits_args(bits),
            perm.numel(), slots_of(perm, len(gate)), gate.shape[1], bank.n_adapters,
            GELU=act == 1, DROPOUT=dropout, FILL_R=fill_width(bank), TILE_INDEX=tile_index(options["BLOCK_M"]),
            **bank.pick("BUCKETS", "FACTOR", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
        )  # fmt: skip
    return h, s


def swiglu_lora_shrink_bwd(dh, ds, gate, up, act, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dgate, dup, dA, bits=None):
    """dgate and dup (or both None) and dA, but for the empty ones, are written."""
    with torch.cuda.device_of(gate):
        bank = bank_of(1, A=A, threshold=threshold, seeds=seeds, sites=sites, dA=dA)
        partial, out = new_partial(bank, perm), (ds, ds) if dgate is None else (dgate, dup)
        if gate.numel() and (dgate is not None or bank.largest[0]):
            options = options_for(options_of(_STEM, "bwd", gate.device, ds.dtype), bits is not None)
            n_rank_tiles, n_slots = cdiv(bank.max_rank, 64) or 1, slots_of(perm, len(gate))
            programs = n_position_tiles(perm, bank, CHUNK) * cdiv(gate.shape[1], options["BLOCK_W"]) * n_rank_tiles
            for slot in range(1 if dgate is None else n_slots):
                _swiglu_bwd_kernel[(programs,)](
                    dh, dh.stride(0), ds, ds.stride(0), gate, gate.stride(0), up, up.stride(0),
                    perm, offsets, tiles, bank.table, step, *bits_args(bits),
                    out[0], out[0].stride(0), out[1], out[1].stride(0), partial, partial.stride(0),
                    perm.numel(), n_slots, slot, gate.shape[1], n_rank_tiles, bank.n_adapters,
                    GELU=act == 1, FIRST=slot == 0, HAS_DX=dgate is not None, DROPOUT=dropout, TILE_INDEX=tile_index(CHUNK),
                    **bank.pick("BUCKETS", "FACTOR", "GRAD", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
                )  # fmt: skip
        launch_finish(bank, ds, len(gate), offsets, perm, tiles, step, dropout, None, partial)


def compile_cases(arch):
    pointers = ("gate_ptr", "up_ptr", "h_ptr", "dh_ptr", "dgate_ptr", "dup_ptr")
    kernels = dict(shrink=_swiglu_shrink_kernel, bwd=_swiglu_bwd_kernel)
    yield from producer_cases(_STEM, kernels, arch, pointers, dict(GELU=True, HAS_DX=True))
