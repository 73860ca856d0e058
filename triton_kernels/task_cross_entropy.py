"""Per-row cross entropy of logits [T, V] with rows skipped by id or target; gradients are recomputed from lse."""

import torch
import triton
import triton.language as tl

from ._common import arch_of, cdiv, compile_case, launch_options


@triton.jit
def _task_cross_entropy_fwd_kernel(
    logits_ptr, stride_t, target_ptr, ids_ptr,  # inputs [T, V], [T], [T]
    nll_ptr, lse_ptr,  # outputs [T]
    n_rows, n_classes, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, BLOCK_V)
    m_t = o_t < n_rows
    b_target = tl.load(target_ptr + o_t, mask=m_t, other=0)
    m_used = m_t & (tl.load(ids_ptr + o_t, mask=m_t, other=-1) >= 0) & (b_target != ignore_index)
    p_row = logits_ptr + o_t * stride_t

    # A NaN logit reaches the sum through exp whatever max makes of it, so the running maximum needs no NaN rule.
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    for v in range(0, n_classes, BLOCK_V):
        m_tv = m_used[:, None] & (v + o_v[None, :] < n_classes)
        # [T, V]
        b_logit = tl.load(p_row[:, None] + (v + o_v[None, :]), mask=m_tv, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_max, tl.max(b_logit, axis=1))
        # A row that is still all -inf keeps the sum 0 instead of exp(-inf + inf).
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_logit - b_shift[:, None]), axis=1)
        b_max = b_new

    m_class = m_used & (b_target >= 0) & (b_target < n_classes)
    b_hit = tl.load(p_row + b_target, mask=m_class, other=0.0).to(tl.float32)
    b_log = tl.log(b_sum)
    # log(sum) + (max - hit) keeps the digits that (log(sum) + max) - hit loses when the target is the maximum.
    b_nll = tl.where(m_class, b_log + (b_max - b_hit), float("nan"))
    tl.store(nll_ptr + o_t, tl.where(m_used, b_nll, 0.0), mask=m_t)
    tl.store(lse_ptr + o_t, tl.where(m_used, b_log + b_max, 0.0), mask=m_t)


@triton.jit
def _task_cross_entropy_bwd_kernel(
    dnll_ptr, logits_ptr, stride_t, target_ptr, ids_ptr, lse_ptr,  # inputs [T], [T, V], [T], [T], [T]
    dlogits_ptr,  # output [T, V]
    n_rows, n_classes, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = o_t < n_rows
    b_target = tl.load(target_ptr + o_t, mask=m_t, other=0)
    m_used = m_t & (tl.load(ids_ptr + o_t, mask=m_t, other=-1) >= 0) & (b_target != ignore_index)
    b_dnll = tl.load(dnll_ptr + o_t, mask=m_used, other=0.0)
    b_lse = tl.load(lse_ptr + o_t, mask=m_used, other=0.0)
    m_v = o_v[None, :] < n_classes
    # [T, V]
    b_logit = tl.load(logits_ptr + o_t[:, None] * stride_t + o_v[None, :], mask=m_used[:, None] & m_v, other=0.0)
    b_prob = tl.exp(b_logit.to(tl.float32) - b_lse[:, None])
    b_prob -= (o_v[None, :] == b_target[:, None]).to(tl.float32)
    # A target outside [0, V) has a NaN loss, so its row gets a NaN gradient.
    m_known = (b_target >= 0) & (b_target < n_classes)
    b_dnll = tl.where(m_known, b_dnll, float("nan"))
    b_dlogit = tl.where(m_used[:, None], b_dnll[:, None] * b_prob, 0.0)
    p_out = dlogits_ptr + o_t[:, None] * n_classes + o_v[None, :]
    tl.store(p_out, b_dlogit.to(dlogits_ptr.dtype.element_ty), mask=m_t[:, None] & m_v)


def _tile(kernel, n_classes, arch):
    """Launch options with the tile split so that narrow heads share one program; depends on V alone."""
    options = dict(launch_options("task_cross_entropy", kernel, arch))
    tile = options.pop("TILE")
    block_v = min(tile, triton.next_power_of_2(max(n_classes, 1)))
    return {**options, "BLOCK_V": block_v, "BLOCK_T": max(1, min(32, tile // 4 // block_v))}


def task_cross_entropy_fwd(logits, target, ids32, ignore_index):
    n_rows, n_classes = logits.shape
    nll, lse = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    options = _tile("fwd", n_classes, arch_of(logits.device))
    if n_rows:
        with torch.cuda.device_of(logits):
            _task_cross_entropy_fwd_kernel[(cdiv(n_rows, options["BLOCK_T"]),)](
                logits, logits.stride(0), target, ids32, nll, lse, n_rows, n_classes, ignore_index, **options
            )
    return nll, lse


def task_cross_entropy_bwd(dnll, logits, target, ids32, lse, ignore_index):
    n_rows, n_classes = logits.shape
    dlogits = torch.empty(n_rows, n_classes, dtype=logits.dtype, device=logits.device)
    options = _tile("bwd", n_classes, arch_of(logits.device))
    if dlogits.numel():
        with torch.cuda.device_of(logits):
            _task_cross_entropy_bwd_kernel[(cdiv(n_rows, options["BLOCK_T"]), cdiv(n_classes, options["BLOCK_V"]))](
                dnll, logits, logits.stride(0), target, ids32, lse, dlogits, n_rows, n_classes, ignore_index, **options
            )
    return dlogits


def compile_cases(arch):
    types = dict(logits_ptr="*bf16", dlogits_ptr="*bf16", target_ptr="*i64", ids_ptr="*i32")
    types |= dict.fromkeys(("nll_ptr", "lse_ptr", "dnll_ptr"), "*fp32")
    kernels = dict(fwd=_task_cross_entropy_fwd_kernel, bwd=_task_cross_entropy_bwd_kernel)
    for name, kernel in kernels.items():
        for n_classes in (16, 32000):
            yield compile_case(f"task_cross_entropy.{name}.V{n_classes}", kernel, types, _tile(name, n_classes, arch))
