"""lora_dropout_mask: the dropout of every adapter's rows as bits."""

import torch

import mtkernels as mtk
from mtkernels.reference.philox import pack_bits, philox4x32

from .registry import Case, Draw, Problem, Provider, Work, ours

STEP = 11
BATCH, SMALL = dict(T=2048, D=1024, A=8, p=0.05), dict(T=512, D=512, A=8, p=0.05)
# Integer operations of a byte: per round two wide products and four xors, at the end a compare and an insert for each bit.
PER_BYTE = 7 * 6 + 8 * 2


def cases():
    options = dict(dtypes=("int64",), modes=("fwd",), training=False)
    return [
        Case("lora_dropout_mask", "batch", BATCH, "torch", ("quick", "full"), **options),
        Case("lora_dropout_mask", "small", SMALL, "torch", ("cost",), **options),
    ]


def inputs(case, device):
    return Problem(case, {}, {"ids": Draw(case, device).ints(case.shape["A"], case.shape["T"])})


def cost(case):
    n_bytes = case.shape["T"] * -(-case.shape["D"] // 8)
    # reads the permutation, and of each adapter its seed, threshold and bounds
    return {"fwd": Work(n_bytes + 4 * case.shape["T"] + 20 * case.shape["A"], PER_BYTE * n_bytes)}


def _bank(problem):
    s, device = problem.case.shape, problem.fixed["ids"].device
    A = [torch.zeros(1, s["D"], device=device) for _ in range(s["A"])]
    return mtk.LoraBank.from_factors(A, [a.new_zeros(1, 1) for a in A], 1.0, dropout=s["p"], seeds=list(range(s["A"])))


def run(problem, backend):
    bank, plan = _bank(problem), mtk.group_plan(problem.fixed["ids"], problem.case.shape["A"], step=STEP)
    return problem.call(lambda: mtk.lora_dropout_mask(bank, plan, backend=backend))


def plain(problem):
    """The same Philox in torch's integers, all rows of all adapters at once."""
    ids, s, bank = problem.fixed["ids"], problem.case.shape, _bank(problem)
    plan = mtk.group_plan(ids, s["A"], step=STEP)

    def fn():
        uid = plan.inv_perm.long() - plan.offsets.long()[ids]
        block = torch.arange(-(-s["D"] // 8), device=ids.device).expand(len(ids), -1)
        counter = block, uid[:, None].expand_as(block), torch.zeros_like(block), torch.full_like(block, STEP)
        words = philox4x32(counter, (bank.seeds[ids, None], 0))
        lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1).flatten(1)
        return pack_bits(lanes[:, : s["D"]] >= bank.threshold[ids, None])

    return problem.call(fn)


def _generator(problem):
    s, device = problem.case.shape, problem.fixed["ids"].device
    return problem.call(lambda: pack_bits(torch.rand(s["T"], s["D"], device=device) >= s["p"]), {})


PROVIDERS = (*ours(run), Provider("torch", plain), Provider("generator", _generator, "part"))
