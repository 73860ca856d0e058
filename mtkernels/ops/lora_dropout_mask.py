"""lora_dropout_mask: the dropout masks of a bank as bits, the very ones that every LoRA op draws.

Formula    bit l of byte b of position p = column 8 b + l is kept: the 16-bit lane (8 b + l) mod 8 of Philox4x32-7 with key seed_i and
           counter (b, p's ordinal in adapter i, site, step) reaches round(65536 p_i); the op divides what is kept by 1 - p_i
Shapes     ids of the plan [T] or [T, K] -> uint8 [P, ceil(D / 8)], P = T K, in position order; zeros where no adapter is and in the
           bits right of column D
Gradients  none: a constant
Backends   reference, cpu, triton, cuda
Cost       writes P D / 8 bytes and reads the plan

    bits = lora_dropout_mask(bank, plan, site=3)
    keep = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, :D].bool()
"""

from .. import _backends
from .._op import register
from ..plan import check_plan
from . import _lora


def _kernel(threshold, seeds, offsets, perm, tiles, step, site, n_cols, backend):
    return _backends.launchers("lora_dropout_mask", threshold, backend).lora_dropout_mask(threshold, seeds, offsets, perm, tiles, step, site, n_cols)


def _fake(threshold, seeds, offsets, perm, tiles, step, site, n_cols, backend):
    return _lora.fake_bits(perm, 1, n_cols).flatten(1)


_op = register(
    "lora_dropout_mask",
    "lora_dropout_mask(Tensor threshold, Tensor seeds, Tensor offsets, Tensor perm, Tensor tiles, Tensor step, int site, int n_cols, str backend)"
    " -> Tensor",
    kernel=_kernel,
    fake=_fake,
)


def lora_dropout_mask(bank, plan, n_cols=None, *, site=0, backend=None):
    """uint8 [P, ceil(n_cols / 8)]: the masks that lora_linear and the others draw for this bank, plan and site.

    bank: LoraBank, of which dropout and seeds are read. plan: GroupPlan over len(bank) adapters. n_cols: columns, None for
    those of the bank. An adapter with p = 0 keeps every column, one with p = 1 none; a position of no adapter has zeros.
    Raises TypeError/ValueError naming what does not fit.
    """
    _lora.check_bank("lora_dropout_mask", bank)
    check_plan("lora_dropout_mask", plan, len(bank), getattr(plan, "n_rows", None), bank.device, "adapters in the bank", slots=True)
    n_cols = bank.in_features if n_cols is None else n_cols
    if n_cols < 0:
        raise ValueError(f"lora_dropout_mask: n_cols is {n_cols}; give a number of columns, or None for the bank's {bank.in_features}")
    return _op(bank.threshold, bank.seeds, plan.offsets, plan.perm, plan.tiles, plan.step, site, n_cols, _backends.requested(backend))
