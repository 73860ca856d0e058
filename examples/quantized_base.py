"""Train adapters of several ranks in one batch over a quantised layer: the base computes itself, lora_delta adds to it.

    python examples/quantized_base.py --base fp8        # float8 weight, a scale per output feature
    python examples/quantized_base.py --base nf4        # bitsandbytes, 4 bits a weight (pip install bitsandbytes)

Each adapter learns a change of the layer of its own rank. Prints what the base takes and each adapter's loss before and after.
Exits with 1 if one did not learn.
"""

import argparse

import torch
from torch import nn

import mtkernels as mtk

D, O, ROWS, RANKS = 256, 192, 64, (2, 4, 8, 16)


class Fp8Linear(nn.Module):
    """x W^T of a frozen weight kept in float8_e4m3fn, each row of W divided by its own scale."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        self.register_buffer("weight", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)

    def dequantized(self, dtype):
        return (self.weight.float() * self.scale).to(dtype)

    def forward(self, x):
        return nn.functional.linear(x, self.dequantized(x.dtype))


def nf4_linear(weight):
    """bitsandbytes' Linear4bit of `weight`; raises SystemExit with the pip command where it is missing."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise SystemExit("the base nf4 needs bitsandbytes: pip install bitsandbytes") from None
    layer = bnb.nn.Linear4bit(*reversed(weight.shape), bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


BASES = {"fp8": Fp8Linear, "nf4": nf4_linear}


def train(base, changes, steps=200):
    """(losses of the first step, of the last), one per adapter; changes: what each adapter is to learn, [O, D]."""
    A = [torch.randn(r, D).div(D**0.5).requires_grad_() for r in RANKS]
    B = [torch.zeros(O, r, requires_grad=True) for r in RANKS]
    bank = mtk.LoraBank.from_factors(A, B, 2.0)
    optimizer, first = torch.optim.AdamW([*A, *B], lr=3e-3, weight_decay=0.0), None
    for _ in range(steps):
        ids = torch.randint(len(RANKS), (ROWS,))
        x, plan = torch.randn(ROWS, D), mtk.group_plan(ids, len(RANKS))
        wanted = base(x) + torch.einsum("td,tod->to", x, changes[ids])
        y = mtk.lora_delta(x, bank, plan, out=base(x))
        losses = mtk.task_reduce((y - wanted).square().mean(1), ids, len(RANKS)) / plan.counts.clamp(min=1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        first = losses.detach() if first is None else first
    return first, losses.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=BASES, default="fp8")
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(O, D) / D**0.5
    base = BASES[args.base](weight.clone())
    changes = torch.stack([torch.randn(O, r) @ torch.randn(r, D) / (r * D) ** 0.5 for r in RANKS])
    held = sum(t.nbytes for t in base.state_dict().values())
    print(f"{args.base} base: {held / 1024:.0f} KiB; in bfloat16 {weight.numel() * 2 / 1024:.0f} KiB")
    first, last = train(base, changes)
    for rank, before, after in zip(RANKS, first.tolist(), last.tolist()):
        print(f"adapter of rank {rank:2}: loss {before:.4f} -> {after:.4f}")
    if not bool((last < first / 4).all()):
        raise SystemExit("an adapter did not learn")


if __name__ == "__main__":
    main()
