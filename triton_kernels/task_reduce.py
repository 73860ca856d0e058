"""Per-task sums of coef[t] * values[t]: T rows, J tasks, chunks of 1024 rows counted from a task's own first row."""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, group_of_tile, launch_options, tile_index

CHUNK_ROWS = 1024


@triton.jit
def _task_reduce_chunks_kernel(
    values_ptr, coef_ptr, offsets_ptr, perm_ptr, tiles_ptr,  # inputs [T], [T], [J+1], [T], [5, J+1]
    partial_ptr,  # output [chunks]
    n_tasks,
    HAS_COEF: tl.constexpr, TILE_INDEX: tl.constexpr, CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    p_tiles = tiles_ptr + TILE_INDEX * (n_tasks + 1)
    task = group_of_tile(p_tiles, n_tasks, chunk)
    if task >= n_tasks:
        return
    o_j = tl.load(offsets_ptr + task) + (chunk - tl.load(p_tiles + task)) * CHUNK + tl.arange(0, CHUNK)
    m_j = o_j < tl.load(offsets_ptr + task + 1)
    b_t = tl.load(perm_ptr + o_j, mask=m_j, other=0)
    # [CHUNK]
    b_value = tl.load(values_ptr + b_t, mask=m_j, other=0.0).to(tl.float32)
    if HAS_COEF:
        b_value *= tl.load(coef_ptr + b_t, mask=m_j, other=0.0)
    tl.store(partial_ptr + chunk, tl.sum(b_value, axis=0))


@triton.jit
def _task_reduce_finish_kernel(
    partial_ptr, tiles_ptr,  # inputs [chunks], [5, J+1]
    sums_ptr,  # output [J]
    n_tasks,
    TILE_INDEX: tl.constexpr, BLOCK_C: tl.constexpr,
):
    task = tl.program_id(0)
    p_tiles = tiles_ptr + TILE_INDEX * (n_tasks + 1) + task
    begin, end = tl.load(p_tiles), tl.load(p_tiles + 1)
    acc = tl.zeros([BLOCK_C], tl.float64)
    for c in range(0, end - begin, BLOCK_C):
        o_c = begin + c + tl.arange(0, BLOCK_C)
        acc += tl.load(partial_ptr + o_c, mask=o_c < end, other=0.0).to(tl.float64)
    tl.store(sums_ptr + task, tl.sum(acc, axis=0).to(tl.float32))


@triton.jit
def _task_reduce_bwd_kernel(
    dsums_ptr, values_ptr, coef_ptr, ids_ptr,  # inputs [J], [T], [T], [T]
    dvalues_ptr, dcoef_ptr,  # outputs [T]
    n_rows,
    HAS_COEF: tl.constexpr, BLOCK_T: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < n_rows
    b_id = tl.load(ids_ptr + o_t, mask=m_t, other=-1)
    m_task = m_t & (b_id >= 0)
    # [T]
    b_dvalue = tl.load(dsums_ptr + b_id, mask=m_task, other=0.0)
    if HAS_COEF:
        # Rows of no task give zeros even where their value or coefficient is NaN.
        b_value = tl.load(values_ptr + o_t, mask=m_task, other=0.0).to(tl.float32)
        tl.store(dcoef_ptr + o_t, b_dvalue * b_value, mask=m_t)
        b_dvalue *= tl.load(coef_ptr + o_t, mask=m_task, other=0.0)
    tl.store(dvalues_ptr + o_t, b_dvalue.to(dvalues_ptr.dtype.element_ty), mask=m_t)


def task_reduce_fwd(values, coef, offsets, perm, tiles):
    n_tasks = offsets.numel() - 1
    sums = torch.empty(n_tasks, dtype=torch.float32, device=values.device)
    n_chunks = cdiv(values.numel(), CHUNK_ROWS) + n_tasks
    partial = torch.empty(n_chunks, dtype=torch.float32, device=values.device)
    chunks, finish = (launch_options("task_reduce", k, arch_of(values.device)) for k in ("chunks", "finish"))
    index = tile_index(CHUNK_ROWS)
    if n_tasks == 0:
        return sums
    with torch.cuda.device_of(values):
        _task_reduce_chunks_kernel[(n_chunks,)](
            values, coef, offsets, perm, tiles, partial, n_tasks,
            HAS_COEF=coef is not None, TILE_INDEX=index, CHUNK=CHUNK_ROWS, **chunks,
        )
        _task_reduce_finish_kernel[(n_tasks,)](partial, tiles, sums, n_tasks, TILE_INDEX=index, **finish)
    return sums


def task_reduce_bwd(dsums, values, coef, ids32):
    dvalues = torch.empty_like(values)
    dcoef = torch.empty(0 if coef is None else values.numel(), dtype=torch.float32, device=values.device)
    options = launch_options("task_reduce", "bwd", arch_of(values.device))
    if values.numel():
        with torch.cuda.device_of(values):
            _task_reduce_bwd_kernel[(cdiv(values.numel(), options["BLOCK_T"]),)](
                dsums, values, coef, ids32, dvalues, dcoef, values.numel(), HAS_COEF=coef is not None, **options
            )
    return dvalues, dcoef


def compile_cases(arch):
    floats = dict.fromkeys(("dsums_ptr", "coef_ptr", "partial_ptr", "sums_ptr", "dcoef_ptr"), "*fp32")
    ints = dict.fromkeys(("offsets_ptr", "perm_ptr", "tiles_ptr", "ids_ptr"), "*i32")
    types = {**floats, **ints, "values_ptr": "*bf16", "dvalues_ptr": "*bf16"}
    index = tile_index(CHUNK_ROWS)
    kernels = dict(
        chunks=(_task_reduce_chunks_kernel, dict(HAS_COEF=True, TILE_INDEX=index, CHUNK=CHUNK_ROWS)),
        finish=(_task_reduce_finish_kernel, dict(TILE_INDEX=index)),
        bwd=(_task_reduce_bwd_kernel, dict(HAS_COEF=True)),
    )
    for name, (kernel, constexprs) in kernels.items():
        yield compile_case(f"task_reduce.{name}", kernel, types, launch_options("task_reduce", name, arch), **constexprs)
