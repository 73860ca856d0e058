"""What the kernels that make a LoRA layer's rows share: the tile of positions, one target's shrink, its compile cases.

Each makes rows in registers and shrinks them there. Positions, buckets, `mask` and `bits` as in lora_kernels.py.
"""

import triton
import triton.language as tl

from . import _common
from ._common import dropout_scale, group_of_tile
from ._lora import CHUNK, PTR_A, RANK, S_BEGIN, S_WIDTH, STRIDE_A, dropout_of, factor_pointer, field, size_field
from .lora_kernels import bits_of_target, fill_zeros, keep_tile

# Targets of ranks up to 32 whose sums one pass over the rows keeps in registers; wider and further ones take another pass.
PASS = tl.constexpr(3)


@triton.jit
def position_tile(
    tile, perm_ptr, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(adapter, positions, whether there is one, ordinals in the adapter); tiles after the last adapter's hold those of none."""
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    begin = tl.load(offsets_ptr + adapter)
    end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_positions)
    o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_j < end
    return adapter, tl.load(perm_ptr + o_j, mask=m_row, other=0), m_row, o_j - begin


@triton.jit
def position_chunk(tile, offsets_ptr, tiles_ptr, n_positions, n_adapters, TILE_INDEX: tl.constexpr):
    """(adapter, its chunk, its first position, the end of its positions); chunks after the last adapter's as in position_tile."""
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_positions)
    return adapter, tile - tl.load(p_tiles + adapter), tl.load(offsets_ptr + adapter), end


@triton.jit
def largest_rank(table_ptr, n_adapters, adapter, TARGETS: tl.constexpr, ALIGN: tl.constexpr):
    """Over the targets; 0 for no adapter."""
    rank = tl.zeros((), tl.int32)
    if adapter < n_adapters:
        for g in tl.static_range(TARGETS):
            rank = tl.maximum(rank, size_field(table_ptr, n_adapters * TARGETS, g * n_adapters + adapter, RANK, ALIGN))
    return rank


@triton.jit
def fill_s(p_s, m_row, table_ptr, n_adapters, adapter, TARGETS: tl.constexpr, FILL_R: tl.constexpr, ALIGN: tl.constexpr):
    """Zeros right of each target's rank, everywhere for no adapter."""
    n_columns = n_adapters * TARGETS
    for g in tl.static_range(TARGETS):
        entry = g * n_adapters + tl.minimum(adapter, n_adapters - 1)
        rank = tl.where(adapter < n_adapters, field(table_ptr, n_columns, entry, RANK).to(tl.int32), 0)
        p_target = p_s + size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN)
        fill_zeros(p_target, m_row, rank, field(table_ptr, n_columns, entry, S_WIDTH).to(tl.int32), FILL_R)


@triton.jit
def shrink_target(
    table_ptr, n_columns, entry, step_ptr, rank0, bits, target,
    DROPOUT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_A: tl.constexpr,
):  # fmt: skip
    """(A from rank0 on, its row stride, ranks left, mask, bits) of one target's adapter."""
    stride = size_field(table_ptr, n_columns, entry, STRIDE_A, ALIGN_A)
    p_A = factor_pointer(table_ptr, n_columns, entry, PTR_A, FACTOR, ALIGNED) + tl.cast(rank0, tl.int64) * stride
    left = size_field(table_ptr, n_columns, entry, RANK, ALIGN) - rank0
    target_bits = bits_of_target(bits[0], bits[1], bits[2], target)
    return p_A, stride, left, dropout_of(table_ptr, n_columns, entry, step_ptr, DROPOUT), target_bits


@triton.jit
def shrink_step(acc, b_row, b_p, m_row, k, n_cols, uid, target, COMPUTE: tl.constexpr, DROPOUT: tl.constexpr):
    """acc [M, R] + columns [k, k + K) of the rows b_row [M, K] of positions b_p, dropped, times those of A."""
    p_A, stride, left, mask, bits = target
    BLOCK_K: tl.constexpr = b_row.shape[1]
    o_r, o_k = tl.arange(0, acc.shape[1]), k + tl.arange(0, BLOCK_K)
    # [K, R]
    b_A = tl.load(p_A + (o_r[None, :] * stride + o_k[:, None]), mask=(o_k < n_cols)[:, None] & (o_r < left)[None, :], other=0.0)
    if DROPOUT:
        b_row = tl.where(keep_tile(mask, bits, b_p, m_row, uid, k, BLOCK_K), b_row, 0.0)
    return tl.dot(b_row.to(COMPUTE), b_A.to(COMPUTE), acc, input_precision="ieee")


@triton.jit
def store_s(
    acc, p_s, m_row, rank0, target, table_ptr, n_columns, entry, DROPOUT: tl.constexpr, ALIGN: tl.constexpr
):
    left, mask = target[2], target[3]
    o_r = tl.arange(0, acc.shape[1])
    p_s += size_field(table_ptr, n_columns, entry, S_BEGIN, ALIGN) + rank0 + o_r[None, :]
    tl.store(p_s, (acc * dropout_scale(mask[0], DROPOUT)).to(p_s.dtype.element_ty), mask=m_row[:, None] & (o_r < left)[None, :])


def n_position_tiles(perm, bank, rows):
    """At most this many tiles of `rows` positions, those of no adapter too."""
    return _common.cdiv(perm.numel(), rows) + bank.n_adapters + 1


def options_for(options, keeps_bits):
    """Launch options with or without kept bits: tiles are the same, so results are too, and only num_stages may differ."""
    options = dict(options)
    stages = options.pop("bits_stages", options["num_stages"])
    return {**options, "num_stages": stages} if keeps_bits else options


def producer_cases(stem, kernels, arch, pointers, fixed=()):
    """Compile cases of {name: kernel}: bf16, float32, float32 factors over bf16 rows.

    Each for one target of ranks and widths that are all multiples of 8, and for several of any (`.ragged`); with the
    narrowest and the widest rank bucket, for the branches between need less. `.bits` keep the masks of one target.
    pointers: the arguments that hold rows.
    """
    for dtype, rows, factor in (("bf16", "bf16", "bfloat16"), ("fp32", "fp32", "float32"), ("mixed", "bf16", "float32")):
        bits = 16 if factor == "bfloat16" else 32
        types = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr"), "*i32") | dict.fromkeys(("table_ptr", "step_ptr"), "*i64")
        types |= dict.fromkeys(pointers, f"*{rows}") | dict.fromkeys(("partial_ptr", "gamma_partial_ptr", "rstd_ptr"), "*fp32")
        types |= dict.fromkeys(("s_ptr", "ds_ptr"), f"*{'bf16' if bits == 16 else 'fp32'}") | dict.fromkeys(("eps", "offset"), "fp32")
        types |= dict(bits_ptr="*u8")
        for name, kernel in kernels.items():
            launch = _common.launch_options(stem, name, arch, bits)
            rows_index = _common.tile_index(launch.get("BLOCK_M", CHUNK))
            constexprs = dict(
                DROPOUT=True, BUCKETS=0b1001, FILL_R=128, LAYOUT=0, DENSE=True, ALIGNED=True, ALIGN_A=8, TILE_INDEX=rows_index, FIRST=True,
                FACTOR=getattr(tl, factor), GRAD=getattr(tl, factor), **dict(fixed),
            )  # fmt: skip
            plain, replayed = dict(n_slots=1, TARGETS=1, ALIGN=8), dict(bits_ptr=None)
            variants = [("", plain | replayed), (".ragged", dict(TARGETS=PASS.value, ALIGN=1) | replayed), (".bits", plain)]
            for suffix, chosen in variants[: 3 if "bits_ptr" in kernel.arg_names else 2]:
                options = options_for(launch, suffix == ".bits")
                chosen = {k: v for k, v in {**constexprs, **chosen}.items() if k in kernel.arg_names and k not in options}
                dots = bits == 16 and name != "finish"
                yield _common.compile_case(
                    f"{stem}.{name}.{dtype}{suffix}", kernel, types, options,
                    tensor_cores=dots, unaligned=("slot_size",) * (suffix == ".ragged"), **chosen,
                )  # fmt: skip
