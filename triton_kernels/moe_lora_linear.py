"""Experts' frozen weights with their adapters in the accumulator: a row tile belongs to one (expert, adapter), which picks both.

    z_p = x W_e^T + b_e + s (S B^T + beta)      y_t = sum_k c_tk z_tk      dx_t = sum_k (c_tk dy W_e + M o (dS A))
    dc_p = (dy W_e) . x + dy . b_e + s e_p

Groups are e (A + 1) + a, so the tiles of an expert are neighbours and share its weight in L2. Sums run over D (or O) in blocks of
BLOCK_K, and dc_p over the column tiles, in tiles of one size whatever the batch: a position's bits do not depend on the others.
Where K positions share a row of y or dx, each writes its part in float32 and one more launch adds them, k ascending.
"""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, dropout_scale, launch_options, tile_index
from ._lora import (
    DTYPES,
    PTR_A,
    PTR_B,
    PTR_BIAS,
    RANK,
    S_BEGIN,
    STRIDE_A,
    STRIDE_B_O,
    STRIDE_B_R,
    bank_of,
    dropout_of,
    factor_pointer,
    scale_of,
    size_field,
    slots_of,
    strides_of_B,
)
from .lora_base import MAX_STRIDE, base_dot, grouped_tiles, rank_dot, tile_rows
from .lora_expand import launch_ds_and_grad_b, row_dot
from .lora_kernels import bits_of_target, keep_tile
from .lora_shrink import bits_args, launch_finish, launch_grad_a, launch_shrink, new_partial, new_s


@triton.jit
def _moe_fwd_kernel(
    x_ptr, stride_x, weight_ptr, stride_e, stride_o, stride_d, bias_ptr,  # rows [T or P, D], W [E, O, D], b [E, O] or None
    z_ptr, stride_z, perm_ptr, offsets_ptr, tiles_ptr,  # output [P, O] and the plan
    table_ptr, s_ptr, stride_s, gates_ptr,  # S [P, R], gates [P] or None
    n_positions, n_slots, d_in, d_out, n_row_tiles, n_column_tiles, n_groups, n_experts,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = gate (x W_e^T + b_e + scale (s B^T + beta)), zeros in positions of no expert."""
    tile, column_tile = grouped_tiles(tl.program_id(0), n_row_tiles, n_column_tiles)
    group, _, b_p, m_row, has_rows = tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_groups, n_positions, TILE_INDEX, BLOCK_M)
    if not has_rows:
        return
    column = column_tile * BLOCK_N
    o_n = column + tl.arange(0, BLOCK_N)
    m_n = o_n < d_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if group < n_groups:
        expert = (group // (n_groups // n_experts)).to(tl.int64)
        if HAS_LORA:
            if HAS_BIAS:
                p_beta = factor_pointer(table_ptr, n_groups, group, PTR_BIAS, FACTOR, ALIGNED)
                acc += tl.load(p_beta + o_n, mask=m_n & (p_beta.to(tl.int64) != 0), other=0.0).to(tl.float32)[None, :]
            factor_o, factor_r = strides_of_B(table_ptr, n_groups, group, STRIDE_B_O, STRIDE_B_R, LAYOUT, ALIGN)
            acc = rank_dot(
                acc, s_ptr + b_p[:, None] * stride_s + size_field(table_ptr, n_groups, group, S_BEGIN, ALIGN),
                factor_pointer(table_ptr, n_groups, group, PTR_B, FACTOR, ALIGNED),
                factor_r, factor_o, size_field(table_ptr, n_groups, group, RANK, ALIGN), column, d_out, BLOCK_N,
            )  # fmt: skip
            acc *= scale_of(table_ptr, n_groups, group)
        acc = base_dot(
            acc, x_ptr + (b_p // n_slots)[:, None] * stride_x, weight_ptr + expert * stride_e, stride_d, stride_o,
            column, d_in, d_out, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert * d_out + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if gates_ptr is not None:
            acc *= tl.load(gates_ptr + b_p, mask=m_row, other=0.0)[:, None]
    p_z = z_ptr + b_p[:, None] * stride_z + o_n[None, :]
    tl.store(p_z, acc.to(z_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def _moe_dx_kernel(
    dy_ptr, stride_dy, weight_ptr, stride_e, stride_o, stride_d, x_ptr, stride_x,  # dy [T or P, O], W [E, O, D], x [T or P, D]
    dx_ptr, stride_dx, parts_ptr, perm_ptr, offsets_ptr, tiles_ptr,  # outputs [P, D] or None, [column tiles, P] or None; and the plan
    table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes, ds_ptr, stride_ds, gates_ptr,
    n_positions, slots_y, slots_x, d_in, d_out, n_row_tiles, n_column_tiles, n_groups, n_experts,
    DROPOUT: tl.constexpr, HAS_LORA: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = gate dy W_e + M o (dS A), zeros in positions of no expert; parts = (dy W_e) . x over the columns of one tile."""
    tile, column_tile = grouped_tiles(tl.program_id(0), n_row_tiles, n_column_tiles)
    group, o_i, b_p, m_row, has_rows = tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_groups, n_positions, TILE_INDEX, BLOCK_M)
    if not has_rows:
        return
    column = column_tile * BLOCK_N
    o_n = column + tl.arange(0, BLOCK_N)
    m_n = o_n < d_in
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if group < n_groups:
        expert = (group // (n_groups // n_experts)).to(tl.int64)
        acc = base_dot(
            acc, dy_ptr + (b_p // slots_y)[:, None] * stride_dy, weight_ptr + expert * stride_e, stride_o, stride_d,
            column, d_out, d_in, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if parts_ptr is not None:
            # [M, N]
            p_x = x_ptr + (b_p // slots_x)[:, None] * stride_x + o_n[None, :]
            b_x = tl.load(p_x, mask=m_row[:, None] & m_n[None, :], other=0.0).to(tl.float32)
            b_part = tl.sum(tl.where(m_n[None, :], acc * b_x, 0.0), axis=1)
            tl.store(parts_ptr + column_tile.to(tl.int64) * n_positions + b_p, b_part, mask=m_row)
        if gates_ptr is not None:
            acc *= tl.load(gates_ptr + b_p, mask=m_row, other=0.0)[:, None]
        if HAS_LORA and dx_ptr is not None:
            mask = dropout_of(table_ptr, n_groups, group, step_ptr, DROPOUT)
            part = rank_dot(
                tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                ds_ptr + b_p[:, None] * stride_ds + size_field(table_ptr, n_groups, group, S_BEGIN, ALIGN),
                factor_pointer(table_ptr, n_groups, group, PTR_A, FACTOR, ALIGNED),
                size_field(table_ptr, n_groups, group, STRIDE_A, ALIGN_A), 1,
                size_field(table_ptr, n_groups, group, RANK, ALIGN), column, d_in, BLOCK_N,
            )  # fmt: skip
            if DROPOUT:
                bits = bits_of_target(bits_ptr, stride_bits, n_bytes, 0)
                part = tl.where(keep_tile(mask, bits, b_p, m_row, o_i, column, BLOCK_N), part, 0.0)
            acc = tl.fma(part, dropout_scale(mask[0], DROPOUT), acc)
    if dx_ptr is not None:
        p_dx = dx_ptr + b_p[:, None] * stride_dx + o_n[None, :]
        tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def _moe_sum_kernel(
    z_ptr, y_ptr, stride_y, n_rows, n_slots, width, n_column_tiles,  # z [T, K, width], output y [T, width]
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y_t = sum_k z_tk, in ascending order."""
    o_t = tl.program_id(0) // n_column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) % n_column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (o_t < n_rows)[:, None] & (o_n < width)[None, :]
    p_z = z_ptr + o_t[:, None].to(tl.int64) * n_slots * width + o_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, n_slots):
        acc += tl.load(p_z + tl.cast(k, tl.int64) * width, mask=mask, other=0.0)
    tl.store(y_ptr + o_t[:, None].to(tl.int64) * stride_y + o_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_gate_grad_kernel(
    dy_ptr, stride_dy, bias_ptr, parts_ptr, e_ptr, table_ptr, perm_ptr, offsets_ptr, tiles_ptr,  # b [E, O] or None, parts [column tiles, P], e [P]
    dgates_ptr,  # output [P]
    n_positions, n_slots, d_out, n_parts, n_groups, n_experts,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate = sum of its parts + dy . b_e + scale e, zeros for positions of no expert."""
    group, _, b_p, m_row, has_rows = tile_rows(tl.program_id(0), perm_ptr, offsets_ptr, tiles_ptr, n_groups, n_positions, TILE_INDEX, BLOCK_M)
    if not has_rows:
        return
    acc = tl.zeros([BLOCK_M], tl.float32)
    if group < n_groups:
        for c in range(0, n_parts):
            acc += tl.load(parts_ptr + tl.cast(c, tl.int64) * n_positions + b_p, mask=m_row, other=0.0)
        if bias_ptr is not None:
            expert = (group // (n_groups // n_experts)).to(tl.int64)
            acc += row_dot(dy_ptr + (b_p // n_slots)[:, None] * stride_dy, m_row, bias_ptr + expert * d_out, d_out, BLOCK_K)
        acc = tl.fma(tl.load(e_ptr + b_p, mask=m_row, other=0.0), scale_of(table_ptr, n_groups, group), acc)
    tl.store(dgates_ptr + b_p, acc, mask=m_row)


def _options(kernel, device, rows, compute):
    """Dots of float32 ranks beside 16-bit rows have a configuration of their own."""
    mixed = rows != torch.float32 and compute == torch.float32
    return launch_options("moe_lora_linear", kernel + "_mixed" * mixed, arch_of(device), 32 if rows == torch.float32 else 16)


def _bank(weight, A, B, bias, scale, threshold, seeds, site, *grads):
    """Of every (expert, adapter) and, behind each expert's, one of rank 0, whose scale, threshold and seed nothing depends on."""
    n = len(scale) // len(weight)
    places = tuple(e * n + min(a, n - 1) for e in range(len(weight)) for a in range(n + 1))
    return bank_of(1, A, B, bias, [scale], [threshold], [seeds], [site], *grads, places=places)


def _weight_args(weight):
    if max(weight.stride()[1:]) >= MAX_STRIDE:
        weight = weight.contiguous()
    return weight, *weight.stride()


def _tiles(bank, perm, width, options):
    """(row tiles, column tiles): every group and the positions of none may end in a partial tile."""
    return cdiv(perm.numel(), options["BLOCK_M"]) + bank.n_adapters, cdiv(width, options["BLOCK_N"])


def _launch_fwd(bank, x, weight, bias, s, gates, offsets, perm, tiles, z):
    (n_experts, d_out, d_in), options = weight.shape, _options("fwd", x.device, x.dtype, s.dtype)
    grid = _tiles(bank, perm, d_out, options)
    if z.numel():
        _moe_fwd_kernel[(grid[0] * grid[1],)](
            x, x.stride(0), *_weight_args(weight), bias, z, z.stride(0), perm, offsets, tiles,
            bank.table, s, s.stride(0), gates,
            perm.numel(), slots_of(perm, len(x)), d_in, d_out, *grid, bank.n_adapters, n_experts,
            HAS_LORA=bool(bank.constexprs["BUCKETS"]), EVEN_K=d_in % options["BLOCK_K"] == 0, TILE_INDEX=tile_index(options["BLOCK_M"]),
            **bank.pick("HAS_BIAS", "FACTOR", "LAYOUT", "ALIGNED", "ALIGN"), **options,
        )  # fmt: skip


def _launch_dx(bank, dy, weight, x, ds, gates, offsets, perm, tiles, step, dropout, bits, dx, wants_parts):
    """Parts [column tiles, P] of the gates' gradients, or None; writes dx [P, D] unless it is None."""
    (n_experts, d_out, d_in), options = weight.shape, _options("dx", dy.device, dy.dtype, ds.dtype)
    grid = _tiles(bank, perm, d_in, options)
    parts = torch.empty(grid[1], perm.numel(), dtype=torch.float32, device=dy.device) if wants_parts else None
    if perm.numel() and grid[1]:
        _moe_dx_kernel[(grid[0] * grid[1],)](
            dy, dy.stride(0), *_weight_args(weight), x, x.stride(0),
            dx, 0 if dx is None else dx.stride(0), parts, perm, offsets, tiles, bank.table, step, *bits_args(bits),
            ds, ds.stride(0), gates,
            perm.numel(), slots_of(perm, len(dy)), slots_of(perm, len(x)), d_in, d_out, *grid, bank.n_adapters, n_experts,
            DROPOUT=dropout, HAS_LORA=bool(bank.constexprs["BUCKETS"]), EVEN_K=d_out % options["BLOCK_K"] == 0,
            TILE_INDEX=tile_index(options["BLOCK_M"]), **bank.pick("FACTOR", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
        )  # fmt: skip
    return parts


def _launch_sum(z, y):
    """y [T, N] = the sums over slots of z [T K, N]."""
    options = launch_options("moe_lora_linear", "sum", arch_of(y.device))
    n_column_tiles = cdiv(y.shape[1], options["BLOCK_N"])
    if y.numel():
        _moe_sum_kernel[(cdiv(len(y), options["BLOCK_M"]) * n_column_tiles,)](
            z, y, y.stride(0), len(y), len(z) // len(y), y.shape[1], n_column_tiles, **options
        )  # fmt: skip


def _launch_gate_grad(bank, dy, bias, parts, e, offsets, perm, tiles, n_experts, dgates):
    options = launch_options("moe_lora_linear", "gate_grad", arch_of(dy.device))
    if perm.numel():
        _moe_gate_grad_kernel[(cdiv(perm.numel(), options["BLOCK_M"]) + bank.n_adapters,)](
            dy, dy.stride(0), bias, parts, e, bank.table, perm, offsets, tiles, dgates,
            perm.numel(), slots_of(perm, len(dy)), dy.shape[1], len(parts), bank.n_adapters, n_experts,
            TILE_INDEX=tile_index(options["BLOCK_M"]), **options,
        )  # fmt: skip


def moe_lora_linear_fwd(x, weight, bias, A, B, lora_bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, site, dropout, bits=None):
    """(y, S) in two launches, or three where the K results of a row are added; fills the keep bits, if given."""
    plan, summed = (offsets, perm, tiles), gates is not None and gates.shape[1] > 1
    with torch.cuda.device_of(x):
        bank = _bank(weight, A, B, lora_bias, scale, threshold, seeds, site)
        s = new_s(bank, x, perm, A)
        launch_shrink(bank, x, *plan, step, dropout, s, bits)
        z = x.new_empty(perm.numel(), weight.shape[1], dtype=torch.float32 if summed else x.dtype)
        _launch_fwd(bank, x, weight, bias if bias is None else bias.contiguous(), s, gates, *plan, z)
        if not summed:
            return z, s
        y = x.new_empty(len(gates), weight.shape[1])
        _launch_sum(z, y)
        return y, s


def moe_lora_linear_bwd(
    dy, x, weight, bias, s, A, B, lora_bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, site, dropout, dx, dgates, e, dA, dB, dbias, bits=None
):
    """Writes dx, dgates and e (or None) and the gradients; bits: keep bits of the forward.

    Four launches, one more to add K parts of dx, one for dgates.
    """
    plan, summed = (offsets, perm, tiles), dx is not None and perm.numel() > len(x)
    with torch.cuda.device_of(s):
        bank = _bank(weight, A, B, lora_bias, scale, threshold, seeds, site, dA, dB, dbias)
        partial, ds = new_partial(bank, perm), torch.empty_like(s)
        launch_ds_and_grad_b(bank, [dy], s, gates, *plan, ds, e, partial)
        launch_grad_a(bank, ds, x, *plan, step, dropout, partial, bits)
        launch_finish(bank, ds, len(x), *plan, step, dropout, None, partial, bits)
        if dx is None and dgates is None:
            return
        rows = x.new_empty(perm.numel(), x.shape[1], dtype=torch.float32) if summed else dx
        parts = _launch_dx(bank, dy, weight, x, ds, gates, *plan, step, dropout, bits, rows, dgates is not None)
        if summed:
            _launch_sum(rows, dx)
        if dgates is not None:
            _launch_gate_grad(bank, dy, bias if bias is None else bias.contiguous(), parts, e, *plan, len(weight), dgates)


def compile_cases(arch):
    """bf16, float32, float32 factors over bf16 rows.

    `.ragged`: sizes that are no multiples of the tiles, K slots, gates and their gradient; `.bits`: kept masks.
    """
    for variant, rows, s in (("bf16", torch.bfloat16, torch.bfloat16), ("fp32", torch.float32, torch.float32), ("mixed", torch.bfloat16, torch.float32)):
        for name, kernel in (("fwd", _moe_fwd_kernel), ("dx", _moe_dx_kernel)):
            for suffix in ("", ".ragged", ".bits")[: 3 if name == "dx" else 2]:
                options = launch_options("moe_lora_linear", name + "_mixed" * (variant == "mixed"), arch, 32 if rows == torch.float32 else 16)
                yield _case(f"moe_lora_linear.{name}.{variant}{suffix}", kernel, options, rows, s, suffix)
    for variant, pointer in (("bf16", "*bf16"), ("fp32", "*fp32")):
        types = dict(y_ptr=pointer, dy_ptr=pointer, bias_ptr=pointer, table_ptr="*i64")
        types |= dict.fromkeys(("z_ptr", "parts_ptr", "e_ptr", "dgates_ptr"), "*fp32") | dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr"), "*i32")
        for name, kernel in (("sum", _moe_sum_kernel), ("gate_grad", _moe_gate_grad_kernel)):
            options = launch_options("moe_lora_linear", name, arch)
            fixed = dict(TILE_INDEX=tile_index(options["BLOCK_M"])) if name == "gate_grad" else {}
            yield compile_case(f"moe_lora_linear.{name}.{variant}", kernel, types, options, **fixed)


def _case(name, kernel, options, rows, s, suffix):
    even = suffix != ".ragged"
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    types = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr"), "*i32") | dict.fromkeys(("table_ptr", "step_ptr"), "*i64")
    types |= dict.fromkeys(("x_ptr", "dy_ptr", "weight_ptr", "bias_ptr"), pointer[rows]) | dict.fromkeys(("s_ptr", "ds_ptr"), pointer[s])
    types |= dict.fromkeys(("z_ptr", "dx_ptr"), pointer[rows] if even else "*fp32") | dict.fromkeys(("gates_ptr", "parts_ptr"), "*fp32") | dict(bits_ptr="*u8")
    fixed = dict(
        HAS_LORA=True, HAS_BIAS=True, DROPOUT=True, LAYOUT=0, ALIGNED=True, ALIGN=8 if even else 1, ALIGN_A=8, FACTOR=DTYPES[s],
        EVEN_K=even, TILE_INDEX=tile_index(options["BLOCK_M"]), stride_d=1, **(dict(gates_ptr=None, parts_ptr=None, n_slots=1, slots_x=1, slots_y=1) if even else {}),
        **({} if suffix == ".bits" else dict(bits_ptr=None)),
    )  # fmt: skip
    fixed = {k: v for k, v in fixed.items() if k in kernel.arg_names}
    return compile_case(name, kernel, types, options, tensor_cores=rows != torch.float32, **fixed)
