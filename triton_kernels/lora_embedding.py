"""Rank-space rows of an embedding and their gradient: P positions, V tokens, A adapters of ranks R_i, S [P, R].

table [3, A] int64: pointer to A_i [R_i, V] (or to its gradient; 0 = not wanted), R_i, stride between its rows.

Gradient: positions are sorted by (adapter, token). A run of equal keys is cut into chunks counted from its own head, so
its sum has one order whatever lies around it. Full chunks are disjoint and CHUNK long, so no two begin in the same
aligned window of CHUNK sorted positions: the window's number is the chunk's slot, and a run's slots are consecutive.
"""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, launch_options
from ._lora import DTYPES, address, device_table


@triton.jit
def _lora_embedding_gather_kernel(
    token_ptr, ids_ptr, table_ptr,  # inputs [T], [P], [3, A]
    s_ptr, stride_s,  # output [P, R]
    n_positions, n_slots, n_tokens, n_adapters, width,
    FACTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_p = o_p < n_positions
    b_id = tl.load(ids_ptr + o_p, mask=m_p, other=-1)
    b_token = tl.load(token_ptr + o_p // n_slots, mask=m_p, other=0).to(tl.int64)
    m_known = (b_id >= 0) & (b_token >= 0) & (b_token < n_tokens)
    b_rank = tl.load(table_ptr + n_adapters + b_id, mask=m_known, other=0)
    b_stride = tl.load(table_ptr + 2 * n_adapters + b_id, mask=m_known, other=0)
    p_factor = tl.load(table_ptr + b_id, mask=m_known, other=0).to(tl.pointer_type(FACTOR))
    # [P, R]
    p_column = (p_factor + b_token)[:, None] + o_r[None, :] * b_stride[:, None]
    b_s = tl.load(p_column, mask=m_known[:, None] & (o_r[None, :] < b_rank[:, None]), other=0.0)
    p_s = s_ptr + o_p[:, None].to(tl.int64) * stride_s + o_r[None, :]
    tl.store(p_s, b_s.to(s_ptr.dtype.element_ty), mask=m_p[:, None] & (o_r[None, :] < width))


@triton.jit
def _sum_rows(ds_ptr, stride_ds, order_ptr, begin, end, o_r, m_r, BLOCK_J: tl.constexpr):
    """Sum of the rows ds[order[begin:end]], in steps of BLOCK_J."""
    acc = tl.zeros([o_r.shape[0]], tl.float32)
    for j in range(begin, end, BLOCK_J):
        o_j = j + tl.arange(0, BLOCK_J)
        b_p = tl.load(order_ptr + o_j, mask=o_j < end, other=0)
        # [J, R]
        b_ds = tl.load(ds_ptr + b_p[:, None] * stride_ds + o_r[None, :], mask=(o_j < end)[:, None] & m_r[None, :], other=0.0)
        acc += tl.sum(b_ds.to(tl.float32), axis=0)
    return acc


@triton.jit
def _lora_embedding_chunks_kernel(
    ds_ptr, stride_ds, order_ptr, first_ptr, last_ptr,  # inputs [P, R], [P], and where each sorted position's run begins and ends
    partial_ptr,  # output [P / CHUNK, R]
    n_sorted, width,
    CHUNK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    o_j = slot * CHUNK + tl.arange(0, CHUNK)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_first = tl.load(first_ptr + o_j, mask=o_j < n_sorted, other=0)
    b_last = tl.load(last_ptr + o_j, mask=o_j < n_sorted, other=0)
    # At most one full chunk begins here.
    begin = tl.max(tl.where(((o_j - b_first) % CHUNK == 0) & (o_j + CHUNK <= b_last), o_j, -1))
    if begin < 0:
        return
    m_r = o_r < width
    acc = _sum_rows(ds_ptr, stride_ds, order_ptr, begin, begin + CHUNK, o_r, m_r, BLOCK_J)
    tl.store(partial_ptr + slot.to(tl.int64) * width + o_r, acc, mask=m_r)


@triton.jit
def _lora_embedding_runs_kernel(
    ds_ptr, stride_ds, order_ptr, keys_ptr, last_ptr, partial_ptr, table_ptr,  # inputs
    n_tokens, n_adapters, width,
    GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The program of a run's first sorted position writes column `token` of the run's dA."""
    j = tl.program_id(0)
    key = tl.load(keys_ptr + j).to(tl.int64)
    before = tl.load(keys_ptr + j - 1, mask=j > 0, other=-1).to(tl.int64)
    adapter = key // n_tokens
    if (key == before) | (adapter >= n_adapters):
        return
    address = tl.load(table_ptr + adapter)
    if address == 0:
        return
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < tl.load(table_ptr + n_adapters + adapter)
    end = tl.load(last_ptr + j)
    n_chunks = (end - j) // CHUNK
    acc = tl.zeros([BLOCK_R], tl.float32)
    for c in range(0, n_chunks):
        acc += tl.load(partial_ptr + (j // CHUNK + c).to(tl.int64) * width + o_r, mask=m_r, other=0.0)
    acc += _sum_rows(ds_ptr, stride_ds, order_ptr, j + n_chunks * CHUNK, end, o_r, m_r, BLOCK_J)
    p_column = address.to(tl.pointer_type(GRAD)) + key % n_tokens
    tl.store(p_column + o_r * tl.load(table_ptr + 2 * n_adapters + adapter), acc.to(GRAD), mask=m_r)


def _table(factors):
    rows = [(address(f), f.shape[0], f.stride(0)) if f.numel() else (0, 0, 0) for f in factors]
    return device_table(tuple(zip(*rows)), factors[0].device)


def _options(kernel, device, width):
    """Launch options; a block of ranks as wide as S, so that narrow ones share a program."""
    options = dict(launch_options("lora_embedding", kernel, arch_of(device)))
    return {**options, "BLOCK_R": min(options["BLOCK_R"], max(16, triton.next_power_of_2(width)))}


def lora_embedding_fwd(token, A, ids32, offsets, perm, tiles, s):
    n_positions, width = s.shape
    if not s.numel():
        return
    options = _options("gather", s.device, width)
    n_tokens = A[0].shape[1]
    grid = (cdiv(n_positions, options["BLOCK_P"]), cdiv(width, options["BLOCK_R"]))
    with torch.cuda.device_of(s):
        _lora_embedding_gather_kernel[grid](
            token, ids32, _table(A), s, s.stride(0),
            n_positions, n_positions // token.numel(), n_tokens, len(A), width,
            FACTOR=DTYPES[A[0].dtype], **options,
        )  # fmt: skip


def _sorted_runs(token, padding, ids32, n_tokens, n_adapters):
    """Sorted keys adapter * V + token, the positions behind them, and where each key's run begins and ends; n * V = no gradient."""
    dtype = torch.int32 if n_adapters * n_tokens < 2**31 else torch.int64
    slots = token.repeat_interleave(ids32.numel() // token.numel()) if ids32.numel() != token.numel() else token
    known = (ids32 >= 0) & (slots >= 0) & (slots < n_tokens) & (slots != padding)
    keys, order = torch.where(known, ids32.to(dtype) * n_tokens + slots.to(dtype), n_adapters * n_tokens).sort(stable=True)
    first, last = (torch.searchsorted(keys, keys, right=right, out_int32=True) for right in (False, True))
    return keys, order, first, last


def lora_embedding_bwd(ds, token, padding, ids32, offsets, perm, tiles, dA):
    wanted = [g for g in dA if g.numel()]
    if not wanted:
        return
    torch._foreach_zero_(wanted)
    n_positions, width = ds.shape
    if not ds.numel():
        return
    n_tokens = wanted[0].shape[1]
    options = _options("grad", ds.device, width)
    chunk, rank_tiles = options["CHUNK"], cdiv(width, options["BLOCK_R"])
    with torch.cuda.device_of(ds):
        keys, order, first, last = _sorted_runs(token, padding, ids32, n_tokens, len(dA))
        partial = torch.empty(n_positions // chunk, width, dtype=torch.float32, device=ds.device)
        if len(partial):
            _lora_embedding_chunks_kernel[(cdiv(n_positions, chunk), rank_tiles)](
                ds, ds.stride(0), order, first, last, partial, n_positions, width, **options
            )
        _lora_embedding_runs_kernel[(n_positions, rank_tiles)](
            ds, ds.stride(0), order, keys, last, partial, _table(dA),
            n_tokens, len(dA), width, GRAD=DTYPES[wanted[0].dtype], **options,
        )  # fmt: skip


def compile_cases(arch):
    ints = dict.fromkeys(("ids_ptr", "keys_ptr", "first_ptr", "last_ptr"), "*i32")
    ints |= dict.fromkeys(("token_ptr", "table_ptr", "order_ptr"), "*i64")
    for dtype, factor in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        types = {**ints, "partial_ptr": "*fp32", **dict.fromkeys(("s_ptr", "ds_ptr"), f"*{dtype}")}
        gather, grad = (launch_options("lora_embedding", k, arch) for k in ("gather", "grad"))
        yield compile_case(f"lora_embedding.gather.{dtype}", _lora_embedding_gather_kernel, types, gather, FACTOR=factor)
        yield compile_case(f"lora_embedding.chunks.{dtype}", _lora_embedding_chunks_kernel, types, grad)
        yield compile_case(f"lora_embedding.runs.{dtype}", _lora_embedding_runs_kernel, types, grad, GRAD=factor)
