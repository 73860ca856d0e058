"""The frozen layer beside the adapters, with their part in its accumulator: y and dx are written once, in one order.

    y_g = x W_g^T + b_g + c_p s_gi (S_g B_gi^T + beta_gi)        dx = sum_g (dy_g W_g + M_g o (dS_g A_gi))

Rows are tiled in the plan's order, so a tile has one adapter; the rows of none come last. Sums run over D (or O) in blocks
of BLOCK_K whatever the batch: a row's bits do not depend on the others. One adapter a row; with `plan=None` (no adapters)
rows are tiled as they lie. The adapters' part is computed first, scaled in float32, and the base is added to it in the same
accumulator, which is rounded once.
"""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, dropout_keep, dropout_scale, group_of_tile, launch_options, tile_index
from ._lora import (
    PTR_A,
    PTR_B,
    PTR_BIAS,
    RANK,
    S_BEGIN,
    STRIDE_A,
    STRIDE_B_O,
    STRIDE_B_R,
    bank_of,
    bucket_of,
    dropout_of,
    factor_pointer,
    lora_cases,
    pick,
    scale_of,
    size_field,
    strides_of_B,
)
from .lora_expand import launch_ds_and_grad_b, target_of
from .lora_kernels import expand_dot
from .lora_shrink import launch_finish, launch_grad_a, launch_shrink, new_partial, new_s

_NO_LORA = dict(BUCKETS=0, FACTOR=tl.float32, LAYOUT=0, ALIGNED=False, ALIGN=1)
_GROUP_M = tl.constexpr(8)


@triton.jit
def _grouped(program, n_row_tiles, n_column_tiles):
    """(row tile, column tile) with 8 row tiles side by side, so that a wave of programs shares rows and weights in L2."""
    per_group = _GROUP_M * n_column_tiles
    first = program // per_group * _GROUP_M
    height = tl.minimum(n_row_tiles - first, _GROUP_M)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def _tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr):
    """(adapter, ordinals, rows, mask) of a row tile; without a plan, rows as they lie, of no adapter."""
    adapter, begin, end, first = n_adapters, 0, n_rows, 0
    if perm_ptr is not None:
        p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
        adapter = group_of_tile(p_tiles, n_adapters, tile)
        begin, first = tl.load(offsets_ptr + adapter), tl.load(p_tiles + adapter)
        end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_rows)
    o_i = (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = begin + o_i < end
    rows = begin + o_i
    if perm_ptr is not None:
        rows = tl.load(perm_ptr + rows, mask=m_row, other=0)
    return adapter, o_i, rows.to(tl.int64), m_row


@triton.jit
def _base_dot(acc, p_row, m_row, p_w, stride_k, stride_n, column, n_inner, n_cols, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc[m, n] += sum_k rows[m, k] w[k, column + n]; p_row [M, 1] points at rows."""
    o_k, o_n = tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
    m_n = o_n[None, :] < n_cols
    p_w += o_n[None, :].to(tl.int64) * stride_n
    for k in range(0, n_inner, BLOCK_K):
        m_k = o_k < n_inner - k
        # [M, K]
        b_x = tl.load(p_row + (k + o_k[None, :]), mask=m_row[:, None] & m_k[None, :], other=0.0)
        # [K, N]
        b_w = tl.load(p_w + (k + o_k[:, None]).to(tl.int64) * stride_k, mask=m_k[:, None] & m_n, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
    return acc


@triton.jit
def _lora_base_fwd_kernel(
    x_ptr, stride_x, weights, weight_strides, biases, ys, strides, widths,  # x [T, D]; W [O, D], b [O] or None, y [T, O] of each target
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, s_ptr, stride_s, gates_ptr,
    n_rows, d_in, n_row_tiles, n_column_tiles, n_adapters,
    HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGN: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b + gate scale (s B^T + beta)."""
    tile, column_tile = _grouped(tl.program_id(0), n_row_tiles, n_column_tiles)
    target, column_tile = target_of(column_tile, widths, BLOCK_N, 0, 1)
    adapter, o_i, b_t, m_row = _tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, BLOCK_M)
    width, column = pick(widths, target), column_tile * BLOCK_N
    o_n = column + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BUCKETS:
        if adapter < n_adapters:
            n_columns, entry = n_adapters * len(ys), target * n_adapters + adapter
            rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
            stride_o, stride_r = strides_of_B(table_ptr, n_columns, entry, STRIDE_B_O, STRIDE_B_R, LAYOUT, ALIGN)
            acc = expand_dot(
                s_ptr + b_t[:, None] * stride_s + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), m_row,
                factor_pointer(table_ptr, n_columns, entry, PTR_B, FACTOR, ALIGNED),
                stride_r, stride_o, rank, bucket_of(rank), column, width,
                BUCKETS, BLOCK_N,
            )  # fmt: skip
            if HAS_BIAS:
                p_beta = factor_pointer(table_ptr, n_columns, entry, PTR_BIAS, FACTOR, ALIGNED)
                acc += tl.load(p_beta + o_n, mask=m_n & (p_beta.to(tl.int64) != 0), other=0.0).to(tl.float32)[None, :]
            acc *= scale_of(table_ptr, n_columns, entry)
            if gates_ptr is not None:
                acc *= tl.load(gates_ptr + b_t, mask=m_row, other=0.0)[:, None]
    p_row = x_ptr + b_t[:, None] * stride_x
    acc = _base_dot(acc, p_row, m_row, pick(weights, target), 1, pick(weight_strides, target), column, d_in, width, BLOCK_N, BLOCK_K)
    if biases is not None:
        acc += tl.load(pick(biases, target) + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = pick(ys, target) + b_t[:, None] * pick(strides, target) + o_n[None, :]
    tl.store(p_y, acc.to(x_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def _lora_base_dx_kernel(
    dys, strides, weights, weight_strides, widths, dx_ptr, stride_dx,  # dy [T, O], W [O, D] of each target; output dx [T, D]
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, ds_ptr, stride_ds,
    n_rows, d_in, n_row_tiles, n_column_tiles, n_adapters,
    DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = sum over targets of dy W + M o (dS A)."""
    tile, column_tile = _grouped(tl.program_id(0), n_row_tiles, n_column_tiles)
    adapter, o_i, b_t, m_row = _tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, BLOCK_M)
    column = column_tile * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BUCKETS:
        if adapter < n_adapters:
            n_columns = n_adapters * len(dys)
            for g in tl.range(0, len(dys), num_stages=1):
                entry = g * n_adapters + adapter
                rank = size_field(table_ptr, n_columns, entry, RANK, ALIGN)
                threshold, seed, site, step = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
                part = expand_dot(
                    ds_ptr + b_t[:, None] * stride_ds + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN), m_row,
                    factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED),
                    size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN), 1, rank, bucket_of(rank), column, d_in,
                    BUCKETS, BLOCK_N,
                )  # fmt: skip
                if DROPOUT:
                    part = tl.where(dropout_keep(seed, o_i, column, site, step, threshold, BLOCK_N), part, 0.0)
                acc = tl.fma(part, dropout_scale(threshold, DROPOUT), acc)
    for g in tl.static_range(len(dys)):
        p_row = dys[g] + b_t[:, None] * strides[g]
        acc = _base_dot(acc, p_row, m_row, weights[g], weight_strides[g], 1, column, widths[g], d_in, BLOCK_N, BLOCK_K)
    o_n = column + tl.arange(0, BLOCK_N)
    p_dx = dx_ptr + b_t[:, None] * stride_dx + o_n[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), mask=m_row[:, None] & (o_n < d_in)[None, :])


def _options(kernel, x):
    return launch_options("lora_base", kernel, arch_of(x.device), 32 if x.dtype == torch.float32 else 16)


def _row_tiles(n_rows, n_adapters, options, plan):
    return cdiv(n_rows, options["BLOCK_M"]) + (n_adapters + 1 if plan is not None else 0)


def _unit(weights):
    return tuple(w if w.stride(-1) == 1 else w.contiguous() for w in weights)


def _launch_fwd(x, weights, biases, plan, bank, s, gates):
    """plan: (offsets, perm, tiles), or None; bank: of the adapters, or None."""
    options, weights, n_adapters = _options("fwd", x), _unit(weights), bank.n_adapters if bank else 0
    ys = tuple(x.new_empty(len(x), w.shape[0]) for w in weights)
    widths = tuple(w.shape[0] for w in weights)
    offsets, perm, tiles = plan or (None, None, None)
    n_row_tiles, n_column_tiles = _row_tiles(len(x), n_adapters, options, plan), sum(cdiv(w, options["BLOCK_N"]) for w in widths)
    lora = bank.pick("BUCKETS", "FACTOR", "LAYOUT", "ALIGNED", "ALIGN", "HAS_BIAS") if bank else {**_NO_LORA, "HAS_BIAS": False}
    given = any(b is not None for b in biases)
    if len(x) and n_column_tiles:
        _lora_base_fwd_kernel[(n_row_tiles * n_column_tiles,)](
            x, x.stride(0), weights, tuple(w.stride(0) for w in weights),
            tuple(x.new_zeros(n) if b is None else b for b, n in zip(biases, widths)) if given else None, ys, tuple(y.stride(0) for y in ys), widths,
            perm, offsets, tiles, bank.table if bank else None, s, s.stride(0) if bank else 0, gates,
            len(x), x.shape[1], n_row_tiles, n_column_tiles, n_adapters,
            TILE_INDEX=tile_index(options["BLOCK_M"]), **lora, **options,
        )  # fmt: skip
    return list(ys)


def _launch_dx(dys, weights, plan, bank, ds, step, dropout, n_cols):
    options, weights, n_adapters = _options("dx", dys[0]), _unit(weights), bank.n_adapters if bank else 0
    n_rows = len(dys[0])
    dx = dys[0].new_empty(n_rows, n_cols)
    offsets, perm, tiles = plan or (None, None, None)
    n_row_tiles, n_column_tiles = _row_tiles(n_rows, n_adapters, options, plan), cdiv(n_cols, options["BLOCK_N"])
    lora = bank.pick("BUCKETS", "FACTOR", "ALIGNED", "ALIGN") if bank else {k: v for k, v in _NO_LORA.items() if k != "LAYOUT"}
    if dx.numel():
        _lora_base_dx_kernel[(n_row_tiles * n_column_tiles,)](
            tuple(dys), tuple(dy.stride(0) for dy in dys), weights, tuple(w.stride(0) for w in weights),
            tuple(w.shape[0] for w in weights), dx, dx.stride(0),
            perm, offsets, tiles, bank.table if bank else None, step, ds, ds.stride(0) if bank else 0,
            n_rows, n_cols, n_row_tiles, n_column_tiles, n_adapters,
            DROPOUT=dropout, TILE_INDEX=tile_index(options["BLOCK_M"]), **lora, **options,
        )  # fmt: skip
    return dx


def lora_base_linear(x, weight, bias):
    """x W^T + bias in the fixed order."""
    with torch.cuda.device_of(x):
        return _launch_fwd(x, [weight], [bias], None, None, None, None)[0]


def lora_base_dx(dys, weights):
    """The sum of dy W over the layers, in the fixed order."""
    with torch.cuda.device_of(dys[0]):
        return _launch_dx(dys, weights, None, None, None, None, False, weights[0].shape[1])


def lora_linear_fwd(
    x, weights, biases, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout
):
    """(ys, S): the layer and the adapters' part of every target in two launches."""
    with torch.cuda.device_of(x):
        bank = bank_of(len(weights), A, B, bias, scale, threshold, seeds, sites)
        s = new_s(bank, x, perm, A)
        launch_shrink(bank, x, offsets, perm, tiles, step, dropout, s)
        return _launch_fwd(x, weights, biases, (offsets, perm, tiles), bank, s, gates), s


def lora_linear_bwd(
    dys, weights, x, s, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, e, dA, dB, dbias
):
    """dx; e (or None) and the gradients are written. Four launches at most."""
    plan = offsets, perm, tiles
    with torch.cuda.device_of(s):
        bank = bank_of(len(dys), A, B, bias, scale, threshold, seeds, sites, dA, dB, dbias)
        partial, ds = new_partial(bank, perm), torch.empty_like(s)
        launch_ds_and_grad_b(bank, dys, s, gates, *plan, ds, e, partial)
        launch_grad_a(bank, ds, x, *plan, step, dropout, partial)
        launch_finish(bank, ds, len(x), *plan, step, dropout, None, partial)
        return _launch_dx(dys, weights, plan, bank, ds, step, dropout, bank.d_in)


def fuses(x, weights):
    """Whether the layer takes these kernels unasked: see `fused_base` in configs/lora_base.json."""
    limit = launch_options("lora_base", "fused_base", arch_of(x.device))["max_inner"]
    return x.dtype != torch.float32 and len(x) >= 256 and max(x.shape[1], *(len(w) for w in weights)) <= limit


def compile_cases(arch):
    kernels = dict(fwd=(_lora_base_fwd_kernel, False), dx=(_lora_base_dx_kernel, True))
    yield from lora_cases("lora_base", kernels, arch)
