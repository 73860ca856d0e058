"""Problems of the ops that make a LoRA layer's input and its rank-space rows in one pass."""

import torch
import torch.nn.functional as F

from ..ops import rmsnorm_lora_shrink, swiglu_lora_shrink
from .lora import RANKS, SITE, STEP, Setup, plain_shrink
from .problem import wide

OTHER_RANKS = (8, 4, 0, 20, 2, 5)  # of a second target over the same adapters
EPS = 1e-5
# Both ids of a row in problems with two; no adapter serves two groups, so none draws other masks in another batch.
SLOTS = {-1: (-1, -1), 0: (0, 0), 1: (1, 1), 2: (-1, 2), 3: (3, -1), 4: (4, 4), 5: (5, 5)}


def plain_rmsnorm(x, gamma, eps, offset=0.0, casting="llama"):
    """LlamaRMSNorm's forward, or GemmaRMSNorm's, in eager torch."""
    xhat = x.to(wide(x.dtype))
    xhat = xhat * torch.rsqrt(xhat.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return ((offset + gamma) * xhat.to(x.dtype)).to(x.dtype)
    return (xhat * (offset + gamma.to(xhat.dtype))).to(x.dtype)


def plain_s(x, banks, ids, sites, step=STEP):
    """Rank-space rows of every bank, side by side; [T, R] or [T, K, R] as ids."""
    dtype, slots, parts = torch.promote_types(x.dtype, banks[0].dtype), ids.reshape(len(x), -1), []
    for bank, site in zip(banks, sites):
        s = torch.zeros(slots.numel(), max(bank.ranks), dtype=dtype, device=x.device)
        for i, r in enumerate(bank.ranks):
            at = (slots.reshape(-1) == i).nonzero()[:, 0]
            s = s.index_add(0, at, F.pad(plain_shrink(x[at // slots.shape[1]], bank, i, step, site), (0, s.shape[1] - r)).to(dtype))
        parts.append(s)
    return torch.cat(parts, 1).view(*ids.shape, -1)


def _joined(rows, s):
    """Both results as one, so that one gradient reaches both."""
    return torch.cat([rows.to(s.dtype), s.flatten(1)], 1)


class _Setup(Setup):
    def __init__(self, ids, dtype, device, *rest, two):
        super().__init__(ids, dtype, device, *rest)
        if two:
            self.ids = torch.tensor([SLOTS[i] for i in ids], dtype=torch.int64, device=device).view(-1, 2)

    def banks(self, *ranks):
        banks = [self.bank(8, f"t{g}", ranks=r) for g, r in enumerate(ranks)]
        self.leaves = {key: t for key, t in self.leaves.items() if key[2:3] in ("", "A")}
        self.by_group = {key: g for key, g in self.by_group.items() if key in self.leaves}
        return banks

    def joined(self, fn, plain, banks, width, by_row):
        n_slots = 1 if self.ids.dim() == 1 else self.ids.shape[1]
        dtype = torch.promote_types(self.make.dtype, self.factor_dtype or self.make.dtype)
        width += n_slots * sum(max(bank.ranks) for bank in banks)
        return self.problem(lambda: _joined(*fn()), lambda: _joined(*plain()), width, by_row=("out", *by_row), dtype=dtype)


def _rmsnorm(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, two=False, ranks=(RANKS, OTHER_RANKS), mode="auto", **casting):
    on = _Setup(ids, dtype, device, backend, exact, factor_dtype, n_in, two=two)
    banks, x = on.banks(*ranks), on.x
    gamma = on.leaves["gamma"] = on.make.tensor("gamma", n_in)
    sites = tuple(range(SITE, SITE + len(banks)))

    def plain():
        xn = plain_rmsnorm(x, gamma, EPS, **casting)
        return xn, plain_s(xn, banks, on.ids, sites)

    def ours():
        return rmsnorm_lora_shrink(x, gamma, EPS, banks, on.plan(), sites=sites, dropout_mode=mode, backend=backend, **casting)

    return on.joined(ours, plain, banks, n_in, ("x",))


def _swiglu(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, two=False, act="silu", mode="auto"):
    on = _Setup(ids, dtype, device, backend, exact, factor_dtype, n_in, two=two)
    banks = on.banks(RANKS)
    del on.leaves["x"]
    gate, up = on.leaves["gate"], on.leaves["up"] = on.make.rows("gate", n_in), on.make.rows("up", n_in)

    def plain():
        h = (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up
        return h, plain_s(h, banks, on.ids, [SITE])

    options = dict(act=act, site=SITE, dropout_mode=mode, backend=backend)
    return on.joined(lambda: swiglu_lora_shrink(gate, up, banks[0], on.plan(), **options), plain, banks, n_in, ("gate", "up"))


PRODUCER_PROBLEMS = {
    "rmsnorm_lora_shrink": _rmsnorm,
    "rmsnorm_lora_shrink:gemma": lambda *args, **kw: _rmsnorm(*args, offset=1.0, casting="gemma", ranks=(RANKS,), **kw),
    "rmsnorm_lora_shrink:bitmask": lambda *args, **kw: _rmsnorm(*args, mode="bitmask", **kw),
    "rmsnorm_lora_shrink:slots": lambda *args, **kw: _rmsnorm(*args, two=True, **kw),
    "swiglu_lora_shrink": _swiglu,
    "swiglu_lora_shrink:gelu": lambda *args, **kw: _swiglu(*args, act="gelu_tanh", **kw),
    "swiglu_lora_shrink:bitmask": lambda *args, **kw: _swiglu(*args, mode="bitmask", **kw),
    "swiglu_lora_shrink:slots": lambda *args, **kw: _swiglu(*args, two=True, **kw),
}
