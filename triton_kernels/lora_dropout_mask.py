"""Keep bits of the adapters' dropout, uint8 [P, ceil(columns / 8)]: zeros in positions of no adapter and right of the last column."""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, dropout_bits, group_of_tile, launch_options, tile_index


@triton.jit(do_not_specialize=["site"])
def _lora_dropout_mask_kernel(
    threshold_ptr, seeds_ptr, perm_ptr, offsets_ptr, tiles_ptr, step_ptr, site,  # inputs
    bits_ptr,  # output [P, bytes]
    n_positions, n_cols, n_bytes, n_adapters,
    TILE_INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    tile, byte = tl.program_id(0), tl.program_id(1) * BLOCK_B
    p_tiles = tiles_ptr + TILE_INDEX * (n_adapters + 1)
    adapter = group_of_tile(p_tiles, n_adapters, tile)
    begin = tl.load(offsets_ptr + adapter)
    end = tl.load(offsets_ptr + adapter + 1, mask=adapter < n_adapters, other=n_positions)
    o_j = begin + (tile - tl.load(p_tiles + adapter)) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_p = tl.load(perm_ptr + o_j, mask=o_j < end, other=0)
    b_bits = tl.zeros([BLOCK_M, BLOCK_B], tl.uint8)
    if adapter < n_adapters:
        seed, step, threshold = tl.load(seeds_ptr + adapter), tl.load(step_ptr), tl.load(threshold_ptr + adapter)
        b_bits = dropout_bits(seed, o_j - begin, byte * 8, n_cols, site.to(tl.uint32), step, threshold, BLOCK_B * 8)
    o_b = byte + tl.arange(0, BLOCK_B)
    p_bits = bits_ptr + b_p[:, None].to(tl.int64) * n_bytes + o_b[None, :]
    tl.store(p_bits, b_bits, mask=(o_j < end)[:, None] & (o_b < n_bytes)[None, :])


def lora_dropout_mask(threshold, seeds, offsets, perm, tiles, step, site, n_cols):
    n, n_bytes = threshold.numel(), cdiv(n_cols, 8)
    bits = torch.empty(perm.numel(), n_bytes, dtype=torch.uint8, device=perm.device)
    if bits.numel():
        options = launch_options("lora_dropout_mask", "mask", arch_of(perm.device))
        grid = cdiv(perm.numel(), options["BLOCK_M"]) + n + 1, cdiv(n_bytes, options["BLOCK_B"])
        with torch.cuda.device_of(perm):
            _lora_dropout_mask_kernel[grid](
                threshold, seeds, perm, offsets, tiles, step, site, bits,
                perm.numel(), n_cols, n_bytes, n, TILE_INDEX=tile_index(options["BLOCK_M"]), **options,
            )  # fmt: skip
    return bits


def compile_cases(arch):
    options = launch_options("lora_dropout_mask", "mask", arch)
    types = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr", "threshold_ptr"), "*i32")
    types |= dict(seeds_ptr="*i64", step_ptr="*i64", bits_ptr="*u8")
    yield compile_case("lora_dropout_mask.mask", _lora_dropout_mask_kernel, types, options, TILE_INDEX=tile_index(options["BLOCK_M"]))
