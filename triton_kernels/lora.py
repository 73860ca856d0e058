"""Batched heterogeneous LoRA over separately owned factors: the launchers of lora_kernels.py.

Forward is two launches and backward three, whatever the number of adapters and the mix of ranks.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, launch_options, tile_index
from .lora_kernels import (
    CHUNK_ROWS,
    PARTIAL_ALIGN,
    _lora_bwd_finish_kernel,
    _lora_expand_kernel,
    _lora_factor_grad_kernel,
    _lora_shrink_kernel,
)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHUNK, _ALIGN = CHUNK_ROWS.value, PARTIAL_ALIGN.value
_MAX_BLOCK_R = 128


class FactorTable(NamedTuple):
    """What the kernels know about a set of adapters, from addresses and shapes alone."""

    table: torch.Tensor
    n_adapters: int
    max_rank: int
    partial_stride: int
    has_bias: bool
    constexprs: dict


def factor_table(A, B, bias, grads=()):
    """Device table of the factors and of the gradients to write, in the order dA, dB, dbias.

    It is cached by every address and shape in it, and holds no contents: a factor changed in place is seen.
    """
    n, device = len(A), A[0].device
    tensors = (A, B, bias, grads[:n], grads[n : 2 * n], grads[2 * n :])
    pointers = tuple(tuple(t.data_ptr() if t.numel() else 0 for t in ts) or (0,) * n for ts in tensors)
    key = (pointers, tuple(a.shape[0] for a in A), A[0].shape[1], B[0].shape[0], A[0].dtype, device)
    if device.type == "cpu":
        return _factor_table(*key, None)
    if torch.cuda.is_current_stream_capturing():
        return _factor_table.__wrapped__(*key, None)
    # One table per stream: the copy that fills it, its uses and its release are then ordered without waiting.
    return _factor_table(*key, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=4096)
def _factor_table(pointers, ranks, d_in, d_out, dtype, device, stream):
    a, b, bias, *grads = pointers
    parts = [(r * d_in, r * d_out, d_out * bool(p)) for r, p in zip(ranks, bias)]
    buckets = {(r > 16) + (r > 32) + (r > 64) for r, p in zip(ranks, bias) if r or p}
    constexprs = dict(
        BUCKETS=sum(1 << k for k in buckets),
        FACTOR=_TRITON_DTYPES[dtype],
        ALIGNED=all(p % 16 == 0 for row in pointers for p in row),
        RANK_ALIGN=8 if all(r % 8 == 0 for r in ranks) else 1,
    )
    stride = max(sum(cdiv(n, _ALIGN) * _ALIGN for n in part) for part in parts)
    table = _upload((a, b, bias, ranks, *grads), device)
    return FactorTable(table, len(ranks), max(ranks), stride, any(bias), constexprs)


# A captured copy reads its host memory at every replay of the graph.
_captured = []


def _upload(rows, device):
    """int64 tensor on the device, without waiting for it."""
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64)
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


def _site(site):
    """The site's low 32 bits as an int32."""
    return (site + 2**31) % 2**32 - 2**31


def _options(kernel, device, compute):
    return launch_options("lora", kernel, arch_of(device), 32 if compute == torch.float32 else 16)


def _rank_tiles(factors, block_r=_MAX_BLOCK_R):
    return max(1, cdiv(factors.max_rank, block_r))


def lora_fwd(x, A, B, bias, scale, threshold, seeds, offsets, perm, tiles, step, site, dropout, y):
    n_rows, d_in = x.shape
    max_rank = max((a.shape[0] for a in A), default=0)
    compute = torch.promote_types(x.dtype, A[0].dtype) if A else x.dtype
    s = torch.empty(n_rows, max_rank, dtype=compute, device=x.device)
    if not n_rows or not A:
        return s
    plan, d_out = (perm, offsets, tiles), y.shape[1]
    with torch.cuda.device_of(x):
        factors = factor_table(A, B, bias)
        adapters = (factors.table, scale, threshold, seeds, step)
        if max_rank:
            options = _options("shrink", x.device, compute)
            grid = (cdiv(n_rows, options["BLOCK_M"]) + len(A) + 1, _rank_tiles(factors))
            _lora_shrink_kernel[grid](
                x, x.stride(0), *plan, *adapters, _site(site),
                s,
                n_rows, d_in, len(A), max_rank,
                BACKWARD=False, DROPOUT=dropout, FILL_R=min(_MAX_BLOCK_R, triton.next_power_of_2(max_rank)),
                TILE_INDEX=tile_index(options["BLOCK_M"]), **factors.constexprs, **options,
            )  # fmt: skip
        if factors.constexprs["BUCKETS"] and d_out:
            options = _options("expand", x.device, compute)
            row_tiles = cdiv(n_rows, options["BLOCK_M"]) + len(A)
            _lora_expand_kernel[(row_tiles * cdiv(d_out, options["BLOCK_N"]),)](
                y, y.stride(0), *plan, *adapters,
                s,
                d_out, len(A), max_rank,
                HAS_BIAS=factors.has_bias, TILE_INDEX=tile_index(options["BLOCK_M"]), **factors.constexprs, **options,
            )  # fmt: skip
    return s


def lora_bwd(
    dy, x, s, A, B, bias, scale, threshold, seeds, offsets, perm, tiles, step, site, dropout, dx, need_factors
):
    """x is read only when need_factors."""
    grads = [torch.empty_like(t) for t in (*A, *B, *bias)] if need_factors else []
    if not A:
        return grads
    n_rows, d_out = dy.shape
    d_in = A[0].shape[1]
    plan = (perm, offsets, tiles)
    with torch.cuda.device_of(dy):
        factors = factor_table(A, B, bias, grads)
        adapters = (factors.table, scale, threshold, seeds, step)
        # At most two slots per 1025 rows: only adapters of more than one chunk take them.
        n_slots = 2 * n_rows // (_CHUNK + 1) if need_factors else 0
        partial = torch.empty(n_slots, factors.partial_stride, dtype=torch.float32, device=dy.device)
        ds = torch.empty_like(s)
        if s.numel():
            _launch_ds(dy, ds, plan, adapters, factors)
        if need_factors and n_rows and factors.constexprs["BUCKETS"]:
            _launch_factor_grads(dy, x, s, ds, plan, adapters, site, dropout, partial, factors)
        _launch_finish(dx, d_in, d_out, ds, plan, adapters, site, dropout, partial, factors, need_factors)
    return grads


def _launch_ds(dy, ds, plan, adapters, factors):
    options = _options("ds", dy.device, ds.dtype)
    grid = (cdiv(dy.shape[0], options["BLOCK_M"]) + factors.n_adapters, _rank_tiles(factors))
    _lora_shrink_kernel[grid](
        dy, dy.stride(0), *plan, *adapters, 0,
        ds,
        *dy.shape, factors.n_adapters, factors.max_rank,
        BACKWARD=True, DROPOUT=False, FILL_R=16,
        TILE_INDEX=tile_index(options["BLOCK_M"]), **factors.constexprs, **options,
    )  # fmt: skip


def _launch_factor_grads(dy, x, s, ds, plan, adapters, site, dropout, partial, factors):
    options = _options("factor_grad", dy.device, s.dtype)
    (n_rows, d_in), d_out = x.shape, dy.shape[1]
    column_tiles = cdiv(d_in, options["BLOCK_W"]) + cdiv(d_out, options["BLOCK_W"])
    grid = (cdiv(n_rows, _CHUNK) + factors.n_adapters, column_tiles, _rank_tiles(factors, 64))
    _lora_factor_grad_kernel[grid](
        x, x.stride(0), dy, dy.stride(0), s, ds, *plan, *adapters, _site(site),
        partial, factors.partial_stride,
        d_in, d_out, factors.n_adapters, factors.max_rank,
        HAS_BIAS=factors.has_bias, DROPOUT=dropout, TILE_INDEX=tile_index(_CHUNK), **factors.constexprs, **options,
    )  # fmt: skip


def _launch_finish(dx, d_in, d_out, ds, plan, adapters, site, dropout, partial, factors, need_factors):
    options = _options("expand", ds.device, ds.dtype)
    block_e = launch_options("lora", "sum_chunks", arch_of(ds.device))["BLOCK_E"]
    row_tiles = cdiv(ds.shape[0], options["BLOCK_M"]) + factors.n_adapters
    n_dx = row_tiles * cdiv(d_in, options["BLOCK_N"]) if dx is not None and ds.numel() else 0
    n_sums = factors.n_adapters * cdiv(factors.partial_stride, block_e) if need_factors else 0
    if not n_dx + n_sums:
        return
    _lora_bwd_finish_kernel[(n_dx + n_sums,)](
        ds if dx is None else dx, 0 if dx is None else dx.stride(0), *plan, *adapters, _site(site),
        ds, partial, factors.partial_stride,
        d_in, d_out, factors.n_adapters, factors.max_rank, n_dx,
        DROPOUT=dropout, TILE_INDEX=tile_index(options["BLOCK_M"]), BLOCK_E=block_e, **factors.constexprs, **options,
    )  # fmt: skip


def compile_cases(arch):
    """bf16, float32, and float32 factors over bf16 rows; ranks that are all multiples of 8, and any ranks (`.ragged`).

    Each with the narrowest and the widest rank bucket: the branches between need less.
    """
    kernels = dict(shrink=_lora_shrink_kernel, ds=_lora_shrink_kernel, expand=_lora_expand_kernel)
    kernels |= dict(factor_grad=_lora_factor_grad_kernel, finish=_lora_bwd_finish_kernel)
    for dtype, rows, factor in (("bf16", "bf16", "bfloat16"), ("fp32", "fp32", "float32"), ("mixed", "bf16", "float32")):
        bits = 16 if factor == "bfloat16" else 32
        types = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), f"*{rows}")
        types |= dict.fromkeys(("s_ptr", "ds_ptr"), f"*{'bf16' if bits == 16 else 'fp32'}")
        types |= dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr", "threshold_ptr"), "*i32")
        types |= dict.fromkeys(("table_ptr", "seeds_ptr", "step_ptr"), "*i64")
        types |= dict.fromkeys(("scale_ptr", "partial_ptr"), "*fp32")
        for name, kernel in kernels.items():
            config = "expand" if name == "finish" else name
            options = launch_options("lora", config, arch, bits)
            constexprs = dict(
                BACKWARD=name == "ds", DROPOUT=name != "ds", HAS_BIAS=True, BUCKETS=0b1001, FILL_R=_MAX_BLOCK_R,
                FACTOR=getattr(tl, factor), ALIGNED=True, RANK_ALIGN=8, TILE_INDEX=tile_index(options.get("BLOCK_M", _CHUNK)),
                BLOCK_E=launch_options("lora", "sum_chunks", arch)["BLOCK_E"],
            )  # fmt: skip
            constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
            case = functools.partial(compile_case, kernel=kernel, types=types, options=options, tensor_cores=bits == 16)
            yield case(f"lora.{name}.{dtype}", **constexprs)
            ragged = {**constexprs, "RANK_ALIGN": 1}
            yield case(f"lora.{name}.{dtype}.ragged", unaligned=("max_rank", "partial_stride"), **ragged)
