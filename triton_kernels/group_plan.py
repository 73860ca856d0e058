"""Stable counting sort of row ids, on device: P positions, G groups, C blocks of BLOCK_P positions.

Column G of the [C, G+1] block counts holds the positions without a group, so that they sort last.
"""

import torch
import triton
import triton.language as tl

from ._common import TILE_ROWS, arch_of, cdiv, compile_case, launch_options


@triton.jit
def _group_plan_count_kernel(
    ids_ptr,  # input [P]
    ids32_ptr, blocks_ptr,  # outputs [P], [C, G+1]
    n_rows, n_groups,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):
    block, column = tl.program_id(0), tl.program_id(1)
    o_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    o_g = column * BLOCK_G + tl.arange(0, BLOCK_G)
    m_p = o_p < n_rows
    b_id = tl.load(ids_ptr + o_p, mask=m_p, other=-1)
    b_id = tl.where((b_id >= 0) & (b_id < n_groups), b_id, -1).to(tl.int32)
    if column == 0:
        tl.store(ids32_ptr + o_p, b_id, mask=m_p)
    b_group = tl.where(b_id < 0, n_groups, b_id)
    # [P, G]
    b_hit = (b_group[:, None] == o_g[None, :]) & m_p[:, None]
    p_count = blocks_ptr + block.to(tl.int64) * (n_groups + 1) + o_g
    tl.store(p_count, tl.sum(b_hit.to(tl.int32), axis=0), mask=o_g <= n_groups)


@triton.jit
def _group_plan_scan_kernel(
    blocks_ptr, totals_ptr,  # in place [C, G+1], output [G+1]
    n_blocks, n_groups,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    b_total = tl.zeros([BLOCK_G], tl.int32)
    for c in range(0, n_blocks, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_cg = (o_c[:, None] < n_blocks) & (o_g[None, :] <= n_groups)
        p_count = blocks_ptr + o_c[:, None].to(tl.int64) * (n_groups + 1) + o_g[None, :]
        # [C, G]
        b_count = tl.load(p_count, mask=m_cg, other=0)
        tl.store(p_count, b_total[None, :] + tl.cumsum(b_count, axis=0) - b_count, mask=m_cg)
        b_total += tl.sum(b_count, axis=0)
    tl.store(totals_ptr + o_g, b_total, mask=o_g <= n_groups)


@triton.jit
def _group_plan_offsets_kernel(
    totals_ptr,  # input [G+1]
    counts_ptr, offsets_ptr, tiles_ptr,  # outputs [G], [G+1], [5, G+1]
    n_groups,
    BLOCK_G: tl.constexpr,
):
    """Program 0 scans rows into offsets; program b+1 scans tiles of TILE_ROWS[b] rows into tiles[b]."""
    program = tl.program_id(0)
    log2_rows = tl.where(program == 0, 0, tl.where(program == 5, 10, program + 3))
    p_out = tiles_ptr + (program - 1).to(tl.int64) * (n_groups + 1)
    if program == 0:
        p_out = offsets_ptr
    carry = tl.zeros((), tl.int32)
    for g in range(0, n_groups + 1, BLOCK_G):
        o_g = g + tl.arange(0, BLOCK_G)
        # [G]
        b_count = tl.load(totals_ptr + o_g, mask=o_g < n_groups, other=0)
        if program == 0:
            tl.store(counts_ptr + o_g, b_count, mask=o_g < n_groups)
        b_tiles = (b_count + (1 << log2_rows) - 1) >> log2_rows
        tl.store(p_out + o_g, carry + tl.cumsum(b_tiles, axis=0) - b_tiles, mask=o_g <= n_groups)
        carry += tl.sum(b_tiles)


@triton.jit
def _group_plan_place_kernel(
    ids32_ptr, blocks_ptr, offsets_ptr,  # inputs [P], [C, G+1], [G+1]
    perm_ptr, inv_perm_ptr,  # outputs [P]
    n_rows, n_groups,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    block = tl.program_id(0)
    o_p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < n_rows
    b_id = tl.load(ids32_ptr + o_p, mask=m_p, other=-1)
    b_rank = tl.zeros([BLOCK_P], tl.int32)
    for q in range(0, BLOCK_P, BLOCK_Q):
        o_q = block * BLOCK_P + q + tl.arange(0, BLOCK_Q)
        b_other = tl.load(ids32_ptr + o_q, mask=o_q < n_rows, other=-1)
        # [P, Q]
        b_before = (b_other[None, :] == b_id[:, None]) & (o_q[None, :] < o_p[:, None])
        b_rank += tl.sum(b_before.to(tl.int32), axis=1)
    b_group = tl.where(b_id < 0, n_groups, b_id)
    b_place = tl.load(offsets_ptr + b_group, mask=m_p, other=0) + b_rank
    b_place += tl.load(blocks_ptr + block.to(tl.int64) * (n_groups + 1) + b_group, mask=m_p, other=0)
    tl.store(perm_ptr + b_place, o_p, mask=m_p)
    tl.store(inv_perm_ptr + o_p, b_place, mask=m_p)


def group_plan(ids, n_groups):
    """ids32[P], counts[G], offsets[G+1], perm[P], inv_perm[P], tiles[5, G+1], all int32."""
    n_rows, n_columns = ids.numel(), n_groups + 1
    count, scan, offsets_, place = (
        launch_options("group_plan", k, arch_of(ids.device)) for k in ("count", "scan", "offsets", "place")
    )
    n_blocks = cdiv(n_rows, count["BLOCK_P"])

    def empty(*shape):
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    ids32, perm, inv_perm = empty(n_rows), empty(n_rows), empty(n_rows)
    counts, offsets, tiles = empty(n_groups), empty(n_columns), empty(len(TILE_ROWS), n_columns)
    blocks, totals = empty(n_blocks, n_columns), empty(n_columns)
    with torch.cuda.device_of(ids):
        if n_rows:
            _group_plan_count_kernel[(n_blocks, cdiv(n_columns, count["BLOCK_G"]))](
                ids, ids32, blocks, n_rows, n_groups, **count
            )
        _group_plan_scan_kernel[(cdiv(n_columns, scan["BLOCK_G"]),)](blocks, totals, n_blocks, n_groups, **scan)
        _group_plan_offsets_kernel[(1 + len(TILE_ROWS),)](totals, counts, offsets, tiles, n_groups, **offsets_)
        if n_rows:
            _group_plan_place_kernel[(n_blocks,)](
                ids32, blocks, offsets, perm, inv_perm, n_rows, n_groups, **place
            )
    return ids32, counts, offsets, perm, inv_perm, tiles


def compile_cases(arch):
    kernels = dict(
        count=_group_plan_count_kernel,
        scan=_group_plan_scan_kernel,
        offsets=_group_plan_offsets_kernel,
        place=_group_plan_place_kernel,
    )
    for name, kernel in kernels.items():
        types = {a: "*i64" if a == "ids_ptr" else "*i32" for a in kernel.arg_names if a.endswith("_ptr")}
        yield compile_case(f"group_plan.{name}", kernel, types, launch_options("group_plan", name, arch))
