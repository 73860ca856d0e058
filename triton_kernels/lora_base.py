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

from ._common import arch_of, cdiv, compile_case, dropout_scale, group_of_tile, launch_options, tile_index
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
    pick,
    scale_of,
    size_field,
    strides_of_B,
)
from .lora_expand import launch_ds_and_grad_b, target_of
from .lora_kernels import bits_of_target, keep_tile
from .lora_shrink import bits_args, launch_finish, launch_grad_a, launch_shrink, new_partial, new_s

_NO_LORA = dict(FACTOR=tl.float32, ALIGNED=False, ALIGN=1)
# A batch of fewer rows takes lower tiles: of the same BLOCK_K and the same tensor-core instruction, so of the same bits.
_SMALL_ROWS = 64
# 256 of them fit an int32.
MAX_STRIDE = 2**22
# What our GEMM is taken to lose against the vendor's: LoRAFusion measured 0.293 ms against 0.278 on an H100.
_SLOWER = 0.05
_GROUP_M = tl.constexpr(8)


@triton.jit
def grouped_tiles(program, n_row_tiles, n_column_tiles):
    """(row tile, column tile) with 8 row tiles side by side, so that a wave of programs shares rows and weights in L2."""
    per_group = _GROUP_M * n_column_tiles
    first = program // per_group * _GROUP_M
    height = tl.minimum(n_row_tiles - first, _GROUP_M)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr):
    """(adapter, ordinals, rows, mask, whether it has any) of a row tile; without a plan, rows as they lie, of no adapter.

    Rows that the mask switches off are row 0: whatever is loaded for them stays in their own lines of the accumulator.
    """
    adapter, begin, end, first = n_adapters, 0, n_rows, 0
    if perm_ptr is not None:
        p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
        adapter = group_of_tile(p_tiles, n_adapters, tile)
        begin, first = tl.load(offsets_ptr + adapter), tl.load(p_tiles + adapter)
        end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_rows)
    o_i = (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = begin + o_i < end
    rows = tl.where(m_row, begin + o_i, 0)
    if perm_ptr is not None:
        rows = tl.load(perm_ptr + rows, mask=m_row, other=0)
    return adapter, o_i, rows.to(tl.int64), m_row, begin + (tile - first) * BLOCK_M < end


@triton.jit
def rank_dot(acc, p_s, p_factor, stride_r, stride_c, rank, column, n_cols, BLOCK_N: tl.constexpr):
    """acc[m, n] += sum_r s[m, r] factor[r, column + n], in steps of 16: wider ones would take registers from the base."""
    o_r, o_n = tl.arange(0, 16), tl.arange(0, BLOCK_N)
    m_n = o_n[None, :] < n_cols - column
    p_factor += tl.cast(column, tl.int64) * stride_c
    o_w = o_r[:, None] * stride_r + o_n[None, :] * stride_c
    for r in tl.range(0, rank, 16, num_stages=1):
        m_r = o_r < rank - r
        # [M, R], [R, N]
        b_s = tl.load(p_s + (r + o_r[None, :]), mask=m_r[None, :], other=0.0)
        b_w = tl.load(p_factor + tl.cast(r, tl.int64) * stride_r + o_w, mask=m_r[:, None] & m_n, other=0.0)
        acc = tl.dot(b_s, b_w.to(b_s.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def base_dot(
    acc, p_row, p_w, stride_k, stride_n, column, n_inner, n_cols,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m, n] += sum_k rows[m, k] w[k, column + n]; p_row [M, 1] points at rows."""
    o_k, o_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    m_n = o_n[None, :] < n_cols - column
    p_w += tl.cast(column, tl.int64) * stride_n
    o_w = o_k[:, None] * stride_k + o_n[None, :] * stride_n
    for k in range(0, n_inner, BLOCK_K):
        # [M, K], [K, N]
        p_x, p_wk = p_row + (k + o_k[None, :]), p_w + tl.cast(k, tl.int64) * stride_k + o_w
        if EVEN_K:
            b_x = tl.load(p_x)
            b_w = tl.load(p_wk, mask=m_n, other=0.0)
        else:
            m_k = o_k < n_inner - k
            b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_wk, mask=m_k[:, None] & m_n, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
    return acc


@triton.jit
def _lora_base_fwd_kernel(
    x_ptr, stride_x, weights, strides_o, strides_d, biases, bias_widths, ys, strides, widths,  # x [T, D]; W [O, D], b [O], y [T, O] of each target
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, s_ptr, stride_s, gates_ptr,
    n_rows, d_in, n_row_tiles, n_column_tiles, n_adapters,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, FACTOR: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b + gate scale (s B^T + beta)."""
    tile, column_tile = grouped_tiles(tl.program_id(0), n_row_tiles, n_column_tiles)
    target, column_tile = target_of(column_tile, widths, BLOCK_N, 0, 1)
    adapter, _, b_t, m_row, has_rows = tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, BLOCK_M)
    if not has_rows:
        return
    width, column = pick(widths, target), column_tile * BLOCK_N
    o_n = column + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_LORA:
        if adapter < n_adapters:
            n_columns, entry = n_adapters * len(ys), target * n_adapters + adapter
            if HAS_BIAS:
                p_beta = factor_pointer(table_ptr, n_columns, entry, PTR_BIAS, FACTOR, ALIGNED)
                acc += tl.load(p_beta + o_n, mask=m_n & (p_beta.to(tl.int64) != 0), other=0.0).to(tl.float32)[None, :]
            stride_o, stride_r = strides_of_B(table_ptr, n_columns, entry, STRIDE_B_O, STRIDE_B_R, LAYOUT, ALIGN)
            acc = rank_dot(
                acc, s_ptr + b_t[:, None] * stride_s + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN),
                factor_pointer(table_ptr, n_columns, entry, PTR_B, FACTOR, ALIGNED),
                stride_r, stride_o, size_field(table_ptr, n_columns, entry, RANK, ALIGN), column, width, BLOCK_N,
            )  # fmt: skip
            c = scale_of(table_ptr, n_columns, entry) + tl.zeros([BLOCK_M, 1], tl.float32)
            if gates_ptr is not None:
                c *= tl.load(gates_ptr + b_t, mask=m_row, other=0.0)[:, None]
            acc *= c
    acc = base_dot(
        acc, x_ptr + b_t[:, None] * stride_x, pick(weights, target), pick(strides_d, target), pick(strides_o, target),
        column, d_in, width, EVEN_K, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if biases is not None:
        acc += tl.load(pick(biases, target) + o_n, mask=o_n < pick(bias_widths, target), other=0.0).to(tl.float32)[None, :]
    p_y = pick(ys, target) + b_t[:, None] * pick(strides, target) + o_n[None, :]
    tl.store(p_y, acc.to(x_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def _lora_base_dx_kernel(
    dys, strides, weights, strides_o, strides_d, widths, dx_ptr, stride_dx,  # dy [T, O], W [O, D] of each target; output dx [T, D]
    perm_ptr, offsets_ptr, tiles_ptr, table_ptr, step_ptr, bits_ptr, stride_bits, n_bytes, ds_ptr, stride_ds,
    n_rows, d_in, n_row_tiles, n_column_tiles, n_adapters,
    DROPOUT: tl.constexpr, HAS_LORA: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
    EVEN_K: tl.constexpr, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = sum over targets of dy W + M o (dS A)."""
    tile, column_tile = grouped_tiles(tl.program_id(0), n_row_tiles, n_column_tiles)
    adapter, o_i, b_t, m_row, has_rows = tile_rows(tile, perm_ptr, offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, BLOCK_M)
    if not has_rows:
        return
    column = column_tile * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_LORA:
        if adapter < n_adapters:
            n_columns = n_adapters * len(dys)
            # Without hoisting: whatever is computed ahead of the loop lives beside two accumulators.
            for g in tl.range(0, len(dys), num_stages=1, disable_licm=True):
                entry = g * n_adapters + adapter
                mask = dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT)
                part = rank_dot(
                    tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                    ds_ptr + b_t[:, None] * stride_ds + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN),
                    factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED),
                    size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN_A), 1,
                    size_field(table_ptr, n_columns, entry, RANK, ALIGN), column, d_in, BLOCK_N,
                )  # fmt: skip
                if DROPOUT:
                    bits = bits_of_target(bits_ptr, stride_bits, n_bytes, g)
                    part = tl.where(keep_tile(mask, bits, b_t, m_row, o_i, column, BLOCK_N), part, 0.0)
                acc = tl.fma(part, dropout_scale(mask[0], DROPOUT), acc)
    for g in tl.static_range(len(dys)):
        acc = base_dot(
            acc, dys[g] + b_t[:, None] * strides[g], weights[g], strides_o[g], strides_d[g],
            column, widths[g], d_in, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    o_n = column + tl.arange(0, BLOCK_N)
    p_dx = dx_ptr + b_t[:, None] * stride_dx + o_n[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), mask=m_row[:, None] & (o_n < d_in)[None, :])


def _config(kernel, n_rows, rows_dtype, compute):
    """(config, bits): float32 dots of the ranks over 16-bit rows take registers of their own; few rows, low tiles."""
    if rows_dtype == torch.float32:
        return kernel, 32
    return kernel + ("_mixed" if compute == torch.float32 else "_small" if n_rows < _SMALL_ROWS else ""), 16


def _options(kernel, x, s):
    config, bits = _config(kernel, len(x), x.dtype, x.dtype if s is None else s.dtype)
    return launch_options("lora_base", config, arch_of(x.device), bits)


def _grid(n_rows, widths, n_adapters, options):
    """(row tiles, column tiles): every adapter and the rows of none may end in a partial tile."""
    return cdiv(n_rows, options["BLOCK_M"]) + n_adapters, sum(cdiv(w, options["BLOCK_N"]) for w in widths)


def _weight_args(weights):
    weights = [w if max(w.stride()) < MAX_STRIDE else w.contiguous() for w in weights]
    return tuple(weights), tuple(w.stride(0) for w in weights), tuple(w.stride(1) for w in weights)


def _bias_args(biases):
    """(biases, their widths): one that is None has no columns and borrows the address of another."""
    given = [b.contiguous() for b in biases if b is not None]
    if not given:
        return None, None
    return tuple(given[0] if b is None else b.contiguous() for b in biases), tuple(0 if b is None else len(b) for b in biases)


def _plan_args(plan, bank, s):
    """(perm, offsets, tiles, table, S and its stride), the constexprs that go with them."""
    if bank is None:
        return (None,) * 5 + (0,), dict(HAS_LORA=False, **_NO_LORA)
    offsets, perm, tiles = plan
    lora = bank.pick("FACTOR", "ALIGNED", "ALIGN")
    return (perm, offsets, tiles, bank.table, s, s.stride(0)), dict(HAS_LORA=bool(bank.constexprs["BUCKETS"]), **lora)


def launch_fwd(x, weights, biases, plan=None, bank=None, s=None, gates=None):
    """[y]; plan: (offsets, perm, tiles) with the bank of its adapters, or nothing."""
    options, widths, n_adapters = _options("fwd", x, s), tuple(w.shape[0] for w in weights), bank.n_adapters if bank else 0
    ys = tuple(x.new_empty(len(x), w) for w in widths)
    n_row_tiles, n_column_tiles = _grid(len(x), widths, n_adapters, options)
    rows, lora = _plan_args(plan, bank, s)
    lora |= bank.pick("HAS_BIAS", "LAYOUT") if bank else dict(HAS_BIAS=False, LAYOUT=0)
    if len(x) and n_column_tiles:
        _lora_base_fwd_kernel[(n_row_tiles * n_column_tiles,)](
            x, x.stride(0), *_weight_args(weights), *_bias_args(biases), ys, tuple(y.stride(0) for y in ys), widths,
            *rows, gates,
            len(x), x.shape[1], n_row_tiles, n_column_tiles, n_adapters,
            EVEN_K=x.shape[1] % options["BLOCK_K"] == 0, TILE_INDEX=tile_index(options["BLOCK_M"]), **lora, **options,
        )  # fmt: skip
    return list(ys)


def launch_dx(dys, weights, plan=None, bank=None, ds=None, step=None, dropout=False, bits=None):
    """dx of all targets; arguments as of launch_fwd."""
    options, n_adapters = _options("dx", dys[0], ds), bank.n_adapters if bank else 0
    n_rows, n_cols, widths = len(dys[0]), weights[0].shape[1], tuple(w.shape[0] for w in weights)
    dx = dys[0].new_empty(n_rows, n_cols)
    n_row_tiles, n_column_tiles = _grid(n_rows, [n_cols], n_adapters, options)
    (perm, offsets, tiles, table, *ds), lora = _plan_args(plan, bank, ds)
    lora |= bank.pick("ALIGN_A") if bank else dict(ALIGN_A=1)
    if dx.numel():
        _lora_base_dx_kernel[(n_row_tiles * n_column_tiles,)](
            tuple(dys), tuple(dy.stride(0) for dy in dys), *_weight_args(weights), widths, dx, dx.stride(0),
            perm, offsets, tiles, table, step, *bits_args(bits), *ds,
            n_rows, n_cols, n_row_tiles, n_column_tiles, n_adapters,
            DROPOUT=dropout, EVEN_K=all(w % options["BLOCK_K"] == 0 for w in widths),
            TILE_INDEX=tile_index(options["BLOCK_M"]), **lora, **options,
        )  # fmt: skip
    return dx


def lora_base_linear(x, weight, bias):
    """x W^T + bias in the fixed order."""
    with torch.cuda.device_of(x):
        return launch_fwd(x, [weight], [bias])[0]


def lora_base_dx(dys, weights):
    """The sum of dy W over the layers, in the fixed order."""
    with torch.cuda.device_of(dys[0]):
        return launch_dx(dys, weights)


def lora_linear_fwd(
    x, weights, biases, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, bits=None
):
    """(ys, S): the layer and the adapters' part of every target in two launches; fills the keep bits, if given."""
    with torch.cuda.device_of(x):
        bank = bank_of(len(weights), A, B, bias, scale, threshold, seeds, sites)
        s = new_s(bank, x, perm, A)
        launch_shrink(bank, x, offsets, perm, tiles, step, dropout, s, bits)
        return launch_fwd(x, weights, biases, (offsets, perm, tiles), bank, s, gates), s


def lora_linear_bwd(
    dys, weights, x, s, A, B, bias, scale, threshold, seeds, gates, offsets, perm, tiles, step, sites, dropout, e, dA, dB, dbias, bits=None
):
    """dx; e (or None) and the gradients are written; bits: keep bits of the forward. Four launches at most."""
    plan = offsets, perm, tiles
    with torch.cuda.device_of(s):
        bank = bank_of(len(dys), A, B, bias, scale, threshold, seeds, sites, dA, dB, dbias)
        partial, ds = new_partial(bank, perm), torch.empty_like(s)
        launch_ds_and_grad_b(bank, dys, s, gates, *plan, ds, e, partial)
        launch_grad_a(bank, ds, x, *plan, step, dropout, partial, bits)
        launch_finish(bank, ds, len(x), *plan, step, dropout, None, partial)
        return launch_dx(dys, weights, plan, bank, ds, step, dropout, bits)


def fuses(rows, factor, inner, n_adapters):
    """Whether a GEMM that reduces over `inner` may be expected to pay here for the vendor's and a pass over its output.

    The limit in configs/lora_base.json is where one slower by _SLOWER breaks even; each adapter's partial row tile adds half a
    tile of work to it. See docs/lora.md.
    """
    arch, n_rows = arch_of(rows.device), len(rows)
    if n_rows < 256 or torch.promote_types(rows.dtype, factor.dtype) != rows.dtype or rows.dtype == torch.float32:
        return False
    lost = n_adapters * launch_options("lora_base", "fwd", arch)["BLOCK_M"] / (2 * n_rows)
    return inner * (_SLOWER + lost) <= _SLOWER * launch_options("lora_base", "fused_base", arch)["max_inner"]


def compile_cases(arch):
    """Every config: bf16, few rows of it, float32, float32 factors over bf16 rows; `.ragged`: two targets of any widths; `.bits`: kept masks."""
    for name, kernel in (("fwd", _lora_base_fwd_kernel), ("dx", _lora_base_dx_kernel)):
        for variant, rows, s, n_rows in (("bf16", torch.bfloat16, torch.bfloat16, 4096), ("small", torch.bfloat16, torch.bfloat16, 16),
                                         ("fp32", torch.float32, torch.float32, 4096), ("mixed", torch.bfloat16, torch.float32, 4096)):  # fmt: skip
            config, bits = _config(name, n_rows, rows, s)
            options = launch_options("lora_base", config, arch, bits)
            for suffix, n in (("", 1), (".ragged", 2), *([(".bits", 1)] if name == "dx" else [])):
                yield _case(f"lora_base.{name}.{variant}{suffix}", kernel, options, rows, s, n, kept=suffix == ".bits")


def _case(name, kernel, options, rows, s, n, kept):
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    types = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr"), "*i32") | dict.fromkeys(("table_ptr", "step_ptr"), "*i64")
    types |= dict.fromkeys(("x_ptr", "dx_ptr"), pointer[rows]) | dict.fromkeys(("s_ptr", "ds_ptr"), pointer[s]) | dict(gates_ptr="*fp32", bits_ptr="*u8")
    types |= dict.fromkeys(("weights", "biases", "ys", "dys"), (pointer[rows],) * n)
    types |= dict.fromkeys(("strides_o", "bias_widths", "strides", "widths"), ("i32",) * n)
    fixed = dict(
        HAS_LORA=True, HAS_BIAS=True, DROPOUT=True, LAYOUT=0, ALIGNED=True, ALIGN=8 if n == 1 else 1, ALIGN_A=8, FACTOR=DTYPES[s],
        EVEN_K=n == 1, TILE_INDEX=tile_index(options["BLOCK_M"]), strides_d=(1,) * n, **(dict(gates_ptr=None) if n == 1 else {}), **({} if kept else dict(bits_ptr=None)),
    )  # fmt: skip
    fixed = {k: v for k, v in fixed.items() if k in kernel.arg_names}
    return compile_case(name, kernel, types, options, tensor_cores=rows != torch.float32, **fixed)
