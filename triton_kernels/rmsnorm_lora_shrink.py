"""RMSNorm with the shrink of every LoRA layer that reads it: one launch forward, three backward (K slots: K - 1 more)."""

import torch

from ._common import cdiv, tile_index
from ._lora import CHUNK, bank_of, fill_width, options_of, slots_of
from ._producers import n_position_tiles, options_for, producer_cases
from .lora_shrink import bits_args, new_partial, new_s
from .rmsnorm_kernels import _rmsnorm_dx_kernel, _rmsnorm_finish_kernel, _rmsnorm_grad_a_kernel, _rmsnorm_shrink_kernel

_STEM = "rmsnorm_lora_shrink"


def rmsnorm_lora_shrink_fwd(x, gamma, eps, offset, round_first, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    with torch.cuda.device_of(x):
        bank = bank_of(len(sites), A=A, threshold=threshold, seeds=seeds, sites=sites)
        xn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        s, rstd = new_s(bank, x, perm, A), torch.empty(len(x), dtype=torch.float32, device=x.device)
        if not x.numel():
            return xn, s, rstd
        options = options_for(options_of(_STEM, "shrink", x.device, s.dtype), bits is not None)
        _rmsnorm_shrink_kernel[(n_position_tiles(perm, bank, options["BLOCK_M"]),)](
            x, x.stride(0), gamma, eps, offset, perm, offsets, tiles, bank.table, step,
            xn, s, s.stride(0), rstd, *bits_args(bits),
            perm.numel(), slots_of(perm, len(x)), x.shape[1], bank.n_adapters,
            TARGETS=bank.n_targets, ROUND_FIRST=round_first, DROPOUT=dropout, FILL_R=fill_width(bank),
            TILE_INDEX=tile_index(options["BLOCK_M"]), **bank.pick("BUCKETS", "FACTOR", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
        )  # fmt: skip
    return xn, s, rstd


def rmsnorm_lora_shrink_bwd(
    dxn, ds, x, gamma, rstd, s, offset, round_first, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dx, dgamma, dA, bits=None
):
    """dx and dgamma (or None) and dA, but for the empty ones, are written."""
    with torch.cuda.device_of(x):
        bank = bank_of(len(sites), A=A, threshold=threshold, seeds=seeds, sites=sites, dA=dA)
        plan, common = (perm, offsets, tiles, bank.table, step), dict(ROUND_FIRST=round_first, DROPOUT=dropout, TARGETS=bank.n_targets)
        partial = new_partial(bank, perm)
        _launch_grad_a(bank, ds, x, gamma, rstd, offset, plan, bits, partial, common)
        options = options_for(options_of(_STEM, "dx", x.device, ds.dtype), bits is not None)
        n_tiles, n_slots = n_position_tiles(perm, bank, options["BLOCK_M"]), slots_of(perm, len(x))
        gamma_partial = torch.empty(0 if dgamma is None else n_slots * n_tiles, x.shape[1], dtype=torch.float32, device=x.device)
        out = ds if dx is None else dx
        for slot in range(n_slots if x.numel() and not dx is dgamma is None else 0):
            _rmsnorm_dx_kernel[(n_tiles,)](
                dxn, dxn.stride(0), ds, ds.stride(0), x, x.stride(0), gamma, offset, rstd, s, s.stride(0), *plan, *bits_args(bits),
                out, out.stride(0), gamma_partial,
                perm.numel(), n_slots, slot, x.shape[1], bank.n_adapters, s.shape[1],
                FIRST=slot == 0, HAS_DX=dx is not None, HAS_DGAMMA=dgamma is not None, TILE_INDEX=tile_index(options["BLOCK_M"]),
                **common, **bank.pick("BUCKETS", "FACTOR", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
            )  # fmt: skip
        _launch_finish(bank, perm, offsets, tiles, partial, gamma_partial, n_slots, n_tiles, options["BLOCK_M"], x, ds, dgamma)


def _launch_grad_a(bank, ds, x, gamma, rstd, offset, plan, bits, partial, common):
    perm = plan[0]
    if not bank.largest[0] or not perm.numel():
        return
    options = options_for(options_of(_STEM, "grad_a", x.device, ds.dtype), bits is not None)
    n_rank_tiles = cdiv(bank.max_rank, 64)
    tiles_xy = (cdiv(perm.numel(), CHUNK) + bank.n_adapters) * cdiv(x.shape[1], options["BLOCK_W"])
    _rmsnorm_grad_a_kernel[(tiles_xy * n_rank_tiles * bank.n_targets,)](
        x, x.stride(0), gamma, offset, rstd, ds, ds.stride(0), *plan, *bits_args(bits),
        partial, partial.stride(0),
        slots_of(perm, len(x)), x.shape[1], n_rank_tiles, bank.n_adapters,
        TILE_INDEX=tile_index(CHUNK), **common, **bank.pick("BUCKETS", "GRAD", "ALIGNED", "ALIGN", "ALIGN_A"), **options,
    )  # fmt: skip


def _launch_finish(bank, perm, offsets, tiles, partial, gamma_partial, n_slots, n_tiles, block_m, x, ds, dgamma):
    options = options_of(_STEM, "finish", ds.device, ds.dtype)
    n_sums = bank.n_adapters * bank.n_targets * cdiv(bank.largest[0], options["BLOCK_E"])
    programs = n_sums + (0 if dgamma is None else cdiv(dgamma.numel(), options["BLOCK_E"]))
    if programs:
        _rmsnorm_finish_kernel[(programs,)](
            partial, partial.stride(0), gamma_partial, offsets, tiles, bank.table,
            gamma_partial if dgamma is None else dgamma,
            perm.numel(), n_slots, n_tiles, x.shape[1], bank.largest[0], bank.n_adapters, n_sums,
            TARGETS=bank.n_targets, TILE_INDEX=tile_index(block_m), BLOCK_M=block_m,
            **bank.pick("GRAD", "LAYOUT", "DENSE", "ALIGNED"), **options,
        )  # fmt: skip


def compile_cases(arch):
    kernels = dict(shrink=_rmsnorm_shrink_kernel, dx=_rmsnorm_dx_kernel, grad_a=_rmsnorm_grad_a_kernel, finish=_rmsnorm_finish_kernel)
    fixed = dict(ROUND_FIRST=True, HAS_DX=True, HAS_DGAMMA=True, BLOCK_M=32)
    pointers = ("x_ptr", "xn_ptr", "gamma_ptr", "dgamma_ptr", "dxn_ptr", "dx_ptr")
    yield from producer_cases(_STEM, kernels, arch, pointers, fixed)
