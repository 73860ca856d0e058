"""DoRA: row norms of adapted weights, dropped rows, rows scaled by adapter. T rows, widths D in and O out, A adapters.

table [6, A] int64: pointers to A_i [R_i, D] and B_i [O, R_i], R_i, stride between the rows of A_i, both strides of B_i.
"""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, dropout_keep, dropout_scale, group_of_tile, launch_options, tile_index
from ._lora import DTYPES, address, device_table

_CHUNK, _TILE = 128, 16  # rows of a partial sum, rows of a dropout tile


@triton.jit
def _dora_norm_kernel(
    weight_ptr, stride_wo, stride_wd, table_ptr, scale_ptr,  # inputs [O, D], [6, A], [A]
    norm_ptr,  # output [A, O]
    d_in, d_out, n_adapters,
    FACTOR: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs take the same rows of W for different adapters, so that W comes from memory once."""
    adapter = tl.program_id(0) % n_adapters
    o_o = (tl.program_id(0) // n_adapters) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_d, o_r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    m_o = o_o < d_out
    p_table = table_ptr + adapter
    p_a = tl.load(p_table).to(tl.pointer_type(FACTOR))
    p_b = tl.load(p_table + n_adapters).to(tl.pointer_type(FACTOR))
    rank = tl.load(p_table + 2 * n_adapters).to(tl.int32)
    stride_a = tl.load(p_table + 3 * n_adapters)
    p_b += o_o[:, None] * tl.load(p_table + 4 * n_adapters)
    stride_b = tl.load(p_table + 5 * n_adapters)
    scale = tl.load(scale_ptr + adapter)
    p_w = weight_ptr + o_o[:, None].to(tl.int64) * stride_wo
    acc = tl.zeros([BLOCK_O], tl.float32)
    for d in range(0, d_in, BLOCK_D):
        m_d = d + o_d < d_in
        # [O, D]
        b_w = tl.load(p_w + (d + o_d)[None, :].to(tl.int64) * stride_wd, mask=m_o[:, None] & m_d[None, :], other=0.0)
        b_delta = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
        for r in range(0, rank, BLOCK_R):
            m_r = r + o_r < rank
            # [O, R]
            b_b = tl.load(p_b + (r + o_r)[None, :] * stride_b, mask=m_o[:, None] & m_r[None, :], other=0.0)
            # [R, D]
            b_a = tl.load(p_a + (r + o_r)[:, None] * stride_a + (d + o_d)[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
            b_delta = tl.dot(b_b.to(COMPUTE), b_a.to(COMPUTE), b_delta, input_precision="ieee")
        b_row = b_w.to(tl.float32) + scale * b_delta
        acc += tl.sum(b_row * b_row, axis=1)
    tl.store(norm_ptr + adapter.to(tl.int64) * d_out + o_o, tl.sqrt_rn(acc), mask=m_o)


@triton.jit
def _tile_rows(offsets_ptr, tiles_ptr, n_groups, n_rows, TILE_INDEX: tl.constexpr, ROWS: tl.constexpr):
    """(group, begin of the group, first and end of the sorted positions of this program's tile); the last group has no adapter."""
    tile = tl.program_id(0)
    p_tiles = tiles_ptr + TILE_INDEX * (n_groups + 1)
    group = group_of_tile(p_tiles, n_groups, tile)
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1, mask=group < n_groups, other=n_rows)
    first = begin + (tile - tl.load(p_tiles + group)) * ROWS
    return group, begin, first, tl.minimum(end, first + ROWS)


@triton.jit(do_not_specialize=["site"])
def _dora_dropout_kernel(
    x_ptr, stride_x, perm_ptr, offsets_ptr, tiles_ptr, threshold_ptr, seeds_ptr, step_ptr, site,  # inputs
    y_ptr,  # output [T, D]
    n_rows, width, n_adapters,
    TILE_INDEX: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    adapter, begin, first, end = _tile_rows(offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, TILE)
    column = tl.program_id(1) * BLOCK_D
    o_j, o_d = first + tl.arange(0, TILE), column + tl.arange(0, BLOCK_D)
    m_jd = (o_j < end)[:, None] & (o_d < width)[None, :]
    b_t = tl.load(perm_ptr + o_j, mask=o_j < end, other=0).to(tl.int64)
    # [J, D]
    b_x = tl.load(x_ptr + b_t[:, None] * stride_x + o_d[None, :], mask=m_jd, other=0.0)
    threshold = tl.zeros((), tl.int32)
    if adapter < n_adapters:
        threshold = tl.load(threshold_ptr + adapter)
    if threshold > 0:
        keep = dropout_keep(tl.load(seeds_ptr + adapter), o_j - begin, column, site, tl.load(step_ptr), threshold, BLOCK_D)
        b_x = tl.where(keep, b_x.to(tl.float32) * dropout_scale(threshold, True), 0.0).to(b_x.dtype)
    tl.store(y_ptr + b_t[:, None] * width + o_d[None, :], b_x, mask=m_jd)


@triton.jit
def _dora_fwd_kernel(
    z_ptr, stride_z, base_ptr, stride_base, scale_ptr, ids_ptr,  # inputs [T, O], [T, O], [A, O], [T]
    y_ptr,  # output [T, O]
    n_rows, width,
    HAS_BASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < n_rows, o_o < width
    b_id = tl.load(ids_ptr + o_t, mask=m_t, other=-1)
    m_to = m_t[:, None] & m_o[None, :]
    p_scale = scale_ptr + b_id[:, None].to(tl.int64) * width + o_o[None, :]
    b_scale = tl.load(p_scale, mask=m_to & (b_id >= 0)[:, None], other=1.0)
    # [T, O]
    b_y = b_scale * tl.load(z_ptr + o_t[:, None] * stride_z + o_o[None, :], mask=m_to, other=0.0).to(tl.float32)
    if HAS_BASE:
        b_y += tl.load(base_ptr + o_t[:, None] * stride_base + o_o[None, :], mask=m_to, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_t[:, None] * width + o_o[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_to)


@triton.jit
def _dora_bwd_kernel(
    dy_ptr, stride_dy, z_ptr, stride_z, scale_ptr, perm_ptr, offsets_ptr, tiles_ptr,  # inputs
    dz_ptr, partial_ptr,  # outputs [T, O], [chunks, O]
    n_rows, width, n_adapters,
    HAS_Z: tl.constexpr, TILE_INDEX: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    adapter, begin, first, end = _tile_rows(offsets_ptr, tiles_ptr, n_adapters, n_rows, TILE_INDEX, CHUNK)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < width
    m_scaled = m_o & (adapter < n_adapters)
    b_scale = tl.load(scale_ptr + adapter.to(tl.int64) * width + o_o, mask=m_scaled, other=1.0)
    acc = tl.zeros([BLOCK_O], tl.float32)
    for j in range(first, end, BLOCK_T):
        o_j = j + tl.arange(0, BLOCK_T)
        b_t = tl.load(perm_ptr + o_j, mask=o_j < end, other=0).to(tl.int64)
        m_to = (o_j < end)[:, None] & m_o[None, :]
        # [T, O]
        b_dy = tl.load(dy_ptr + b_t[:, None] * stride_dy + o_o[None, :], mask=m_to, other=0.0).to(tl.float32)
        if HAS_Z:
            m_z = (o_j < end)[:, None] & m_scaled[None, :]
            b_z = tl.load(z_ptr + b_t[:, None] * stride_z + o_o[None, :], mask=m_z, other=0.0).to(tl.float32)
            acc += tl.sum(b_dy * b_z, axis=0)
        tl.store(dz_ptr + b_t[:, None] * width + o_o[None, :], (b_scale[None, :] * b_dy).to(dz_ptr.dtype.element_ty), mask=m_to)
    if HAS_Z:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + o_o, acc, mask=m_scaled)


@triton.jit
def _dora_finish_kernel(
    partial_ptr, tiles_ptr,  # inputs [chunks, O], [5, A+1]
    dscale_ptr,  # output [A, O]
    width, n_adapters,
    TILE_INDEX: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(0)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1) + adapter
    acc = tl.zeros([BLOCK_O], tl.float32)
    for c in range(tl.load(p_tiles), tl.load(p_tiles + 1)):
        acc += tl.load(partial_ptr + tl.cast(c, tl.int64) * width + o_o, mask=o_o < width, other=0.0)
    tl.store(dscale_ptr + adapter.to(tl.int64) * width + o_o, acc, mask=o_o < width)


def _options(kernel, device, *bits):
    return launch_options("dora", kernel, arch_of(device), *bits)


def dora_norm(weight, A, B, scale):
    d_out, d_in = weight.shape
    norm = torch.empty(len(A), d_out, dtype=torch.float32, device=weight.device)
    compute = torch.promote_types(weight.dtype, A[0].dtype)
    options = _options("norm", weight.device, 32 if compute == torch.float32 else 16)
    rows = tuple((address(a), address(b), a.shape[0], a.stride(0), *b.stride()) for a, b in zip(A, B))
    if norm.numel():
        with torch.cuda.device_of(weight):
            _dora_norm_kernel[(len(A) * cdiv(d_out, options["BLOCK_O"]),)](
                weight, *weight.stride(), device_table(tuple(zip(*rows)), weight.device), scale, norm, d_in, d_out, len(A),
                FACTOR=DTYPES[A[0].dtype], COMPUTE=DTYPES[compute], **options,
            )  # fmt: skip
    return norm


def dora_dropout(x, threshold, seeds, offsets, perm, tiles, step, site):
    n_rows, width = x.shape
    y = torch.empty(n_rows, width, dtype=x.dtype, device=x.device)
    n, options = offsets.numel() - 1, _options("dropout", x.device)
    if y.numel():
        with torch.cuda.device_of(x):
            _dora_dropout_kernel[(cdiv(n_rows, _TILE) + n + 1, cdiv(width, options["BLOCK_D"]))](
                x, x.stride(0), perm, offsets, tiles, threshold, seeds, step, (site + 2**31) % 2**32 - 2**31,
                y, n_rows, width, n, TILE_INDEX=tile_index(_TILE), TILE=_TILE, **options,
            )  # fmt: skip
    return y


def dora_fwd(z, base, scale, ids32):
    n_rows, width = z.shape
    y = torch.empty(n_rows, width, dtype=z.dtype, device=z.device)
    options = _options("fwd", z.device)
    if y.numel():
        with torch.cuda.device_of(z):
            _dora_fwd_kernel[(cdiv(n_rows, options["BLOCK_T"]), cdiv(width, options["BLOCK_O"]))](
                z, z.stride(0), base, 0 if base is None else base.stride(0), scale, ids32, y,
                n_rows, width, HAS_BASE=base is not None, **options,
            )  # fmt: skip
    return y


def dora_bwd(dy, z, scale, ids32, offsets, perm, tiles):
    (n_rows, width), n = dy.shape, scale.shape[0]
    dz = torch.empty(n_rows, width, dtype=dy.dtype, device=dy.device)
    dscale = torch.empty(0 if z is None else scale.shape, dtype=torch.float32, device=dy.device)
    n_chunks, index = cdiv(n_rows, _CHUNK) + n, tile_index(_CHUNK)
    partial = torch.empty(0 if z is None else (n_chunks, width), dtype=torch.float32, device=dy.device)
    bwd, finish = _options("bwd", dy.device), _options("finish", dy.device)
    with torch.cuda.device_of(dy):
        if dz.numel():
            _dora_bwd_kernel[(n_chunks + 1, cdiv(width, bwd["BLOCK_O"]))](
                dy, dy.stride(0), z, 0 if z is None else z.stride(0), scale, perm, offsets, tiles,
                dz, partial, n_rows, width, n, HAS_Z=z is not None, TILE_INDEX=index, CHUNK=_CHUNK, **bwd,
            )  # fmt: skip
        if dscale.numel():
            _dora_finish_kernel[(n, cdiv(width, finish["BLOCK_O"]))](partial, tiles, dscale, width, n, TILE_INDEX=index, **finish)
    return dz, dscale


def compile_cases(arch):
    ints = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr", "threshold_ptr", "ids_ptr"), "*i32")
    ints |= dict.fromkeys(("table_ptr", "seeds_ptr", "step_ptr"), "*i64")
    floats = dict.fromkeys(("scale_ptr", "norm_ptr", "partial_ptr", "dscale_ptr"), "*fp32")
    rows = dict.fromkeys(("weight_ptr", "x_ptr", "y_ptr", "z_ptr", "base_ptr", "dy_ptr", "dz_ptr"), "*bf16")
    types = {**ints, **floats, **rows}
    for name, weight, factor in (("bf16", "*bf16", tl.bfloat16), ("fp32", "*fp32", tl.float32), ("mixed", "*bf16", tl.float32)):
        options = launch_options("dora", "norm", arch, 16 if name == "bf16" else 32)
        constexprs = dict(FACTOR=factor, COMPUTE=factor)
        # Unit strides are constants of the compiled kernel.
        yield compile_case(
            f"dora.norm.{name}", _dora_norm_kernel, {**types, "weight_ptr": weight}, options, tensor_cores=name == "bf16", stride_wd=1, **constexprs
        )
    kernels = dict(
        dropout=(_dora_dropout_kernel, dict(TILE_INDEX=tile_index(_TILE), TILE=_TILE)),
        fwd=(_dora_fwd_kernel, dict(HAS_BASE=True)),
        bwd=(_dora_bwd_kernel, dict(HAS_Z=True, TILE_INDEX=tile_index(_CHUNK), CHUNK=_CHUNK)),
        finish=(_dora_finish_kernel, dict(TILE_INDEX=tile_index(_CHUNK))),
    )
    for name, (kernel, constexprs) in kernels.items():
        yield compile_case(f"dora.{name}", kernel, types, launch_options("dora", name, arch), **constexprs)
