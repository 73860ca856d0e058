"""Problems of the LoRA ops."""

import torch
import torch.nn.functional as F

from ..bank import LoraBank
from ..ops import group_plan, lora_delta, lora_dropout_mask, lora_expand, lora_linear, lora_linear_group, lora_shrink
from ..reference.philox import keep_mask, unpack_bits
from .problem import Maker, Problem, wide

RANKS = (3, 0, 16, 1, 7, 130)
DROPOUT = (0.0, 0.5, 0.25, 1.0, 0.05, 0.5)
STEP, SITE = 11, 3
# The second adapter of a row in problems with two; it depends on the first only, so a row keeps both in any batch.
PARTNER = {-1: -1, 0: 2, 1: 4, 2: 5, 3: -1, 4: 4, 5: 0}


def plain_lora(x, y, bank, ids, step, site, gates=None):
    """PEFT's loop in eager torch, in the tensors' own dtypes: index, drop, two matmuls, add. ids, gates [T] or [T, K]."""
    ids = ids.reshape(len(x), -1)
    for i, (a, b) in enumerate(zip(bank.A, bank.B)):
        rows, slots = (ids == i).nonzero(as_tuple=True)
        delta = plain_shrink(x[rows], bank, i, step, site) @ b.T
        if bank.bias and bank.bias[i].numel():
            delta = delta + bank.bias[i]
        delta = delta * bank.scale[i]
        if gates is not None:
            delta = delta * gates.reshape(ids.shape)[rows, slots][:, None]
        y = y.index_add(0, rows, delta.to(y.dtype))
    return y


def plain_shrink(rows, bank, i, step, site):
    xd, t = rows.to(bank.A[i].dtype), int(bank.threshold[i])
    if t:
        keep = keep_mask(len(rows), rows.shape[1], t, int(bank.seeds[i]), torch.tensor(step), site, "cpu").to(rows.device)
        xd = xd * keep * (65536 / (65536 - t) if t < 65536 else 0.0)
    return xd @ bank.A[i].T


class Setup:
    """Rows, plan and banks of a problem; `leaves` collects what is differentiated, `by_group` the adapters' own."""

    def __init__(self, ids, dtype, device, backend, exact, factor_dtype, n_in, two=False):
        self.make = make = Maker(ids, dtype, device, exact)
        self.n_in, self.factor_dtype, self.backend = n_in, factor_dtype, backend
        self.x, self.ids = make.rows("x", n_in), make.id_tensor()
        self.leaves, self.by_group = {"x": self.x}, {}
        if two:
            partner = torch.tensor([PARTNER[i] for i in ids], dtype=torch.int64, device=device)
            self.ids = torch.stack([self.ids, partner], 1)

    def plan(self):
        return group_plan(self.ids, len(RANKS), step=STEP, backend=self.backend)

    def bank(self, n_out, name="", ranks=RANKS, dropout=DROPOUT):
        make, n, dtype = self.make, len(ranks), self.factor_dtype or self.make.dtype
        A = {f"{name}A{i}": make.tensor((name, "A", i), r, self.n_in, dtype=dtype) for i, r in enumerate(ranks)}
        B = {f"{name}B{i}": make.tensor((name, "B", i), n_out, r, dtype=dtype) for i, r in enumerate(ranks)}
        beta = {f"{name}beta{i}": make.tensor((name, "beta", i), n_out, dtype=dtype) for i in range(1, n, 2)}
        with torch.no_grad():
            scale = make.tensor((name, "scale"), n, dtype=wide(dtype), grad=False).abs() + 0.5
        scale.requires_grad_()
        bias = [beta.get(f"{name}beta{i}") for i in range(n)]
        self.leaves |= {**A, **B, **beta, f"{name}scale": scale}
        self.by_group |= {key: int(key[-1]) for key in (*A, *B, *beta)} | {f"{name}scale": None}
        return LoraBank.from_factors(list(A.values()), list(B.values()), scale, dropout=list(dropout), seeds=list(range(7, 7 + n)), bias=bias)

    def base(self, n_out, name=""):
        weight, bias = self.make.tensor((name, "weight"), n_out, self.n_in), self.make.tensor((name, "bias"), n_out)
        self.leaves |= {f"{name}weight": weight, f"{name}bias": bias}
        return weight, bias

    def problem(self, fn, plain, *shape, by_row=("out", "x"), by_group=None, dtype=None):
        upstream = self.make.rows("dy", *shape, grad=False, dtype=dtype)
        by_group = self.by_group if by_group is None else by_group
        return Problem(self.make.ids, len(RANKS), self.leaves, fn, plain, upstream, by_row=by_row, by_group=by_group)


def _linear(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40, batch_invariant=False, mode="auto"):
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in)
    bank, (weight, bias), x = on.bank(n_out), on.base(n_out), on.x
    options = dict(site=SITE, batch_invariant=batch_invariant, dropout_mode=mode, backend=backend)
    return on.problem(
        lambda: lora_linear(x, weight, bias, bank, on.plan(), **options),
        lambda: plain_lora(x, F.linear(x, weight, bias), bank, on.ids, STEP, SITE),
        n_out,
        by_row=("out", "x") if batch_invariant else (),
    )


def _group(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72):
    """Two targets of other widths and ranks; the base of the second has no bias."""
    on, outs = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in), (40, 24)
    banks = [on.bank(outs[0], "q"), on.bank(outs[1], "k", ranks=(8, 4, 0, 20, 2, 5))]
    bases, x = [on.base(outs[0], "q"), (on.make.tensor("weight", outs[1], n_in), None)], on.x
    on.leaves["kweight"] = bases[1][0]
    return on.problem(
        lambda: torch.cat(lora_linear_group(x, *zip(*bases), banks, on.plan(), sites=(SITE, 5), backend=backend), 1),
        lambda: torch.cat([plain_lora(x, F.linear(x, *base), bank, on.ids, STEP, site) for base, bank, site in zip(bases, banks, (SITE, 5))], 1),
        sum(outs),
        by_row=(),
    )


def _delta(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40):
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in)
    bank, x = on.bank(n_out), on.x
    return on.problem(
        lambda: lora_delta(x, bank, on.plan(), site=SITE, backend=backend),
        lambda: plain_lora(x, x.new_zeros(len(x), n_out), bank, on.ids, STEP, SITE),
        n_out,
    )


def _dropped(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40):
    """The op without dropout on rows that lora_dropout_mask dropped is the op with it."""
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in)
    bank, x = on.bank(n_out), on.x

    def fn():
        plan = on.plan()
        keep = unpack_bits(lora_dropout_mask(bank, plan, site=SITE, backend=backend), n_in)
        kept = (65536 - bank.threshold[on.ids.clamp(min=0)]).to(wide(dtype))
        multiplier = torch.where(kept > 0, 65536 / kept, 0)[:, None].to(x.dtype)
        return lora_delta(x * keep * multiplier, bank, plan, training=False, site=SITE, backend=backend)

    return on.problem(fn, lambda: plain_lora(x, x.new_zeros(len(x), n_out), bank, on.ids, STEP, SITE), n_out)


def _gated(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40):
    """Two adapters a row, sometimes the same one twice, with gates; no dropout, as the batch decides the order of an adapter's positions."""
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in, two=True)
    bank, x = on.bank(n_out, dropout=[0.0] * len(RANKS)), on.x
    gates = on.leaves["gates"] = on.make.rows("gates", 2, dtype=wide(factor_dtype or dtype))
    return on.problem(
        lambda: lora_delta(x, bank, on.plan(), site=SITE, gates=gates, backend=backend),
        lambda: plain_lora(x, x.new_zeros(len(x), n_out), bank, on.ids, STEP, SITE, gates),
        n_out,
        by_row=("out", "x", "gates"),
        by_group={},  # an adapter's rows come from several groups
    )


def _shrink(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, mode="auto"):
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in)
    bank, x, R = on.bank(8), on.x, max(RANKS)
    on.leaves = {key: t for key, t in on.leaves.items() if key[0] in "xA"}

    def plain():
        s = torch.zeros(len(x), R, dtype=torch.promote_types(x.dtype, bank.dtype), device=x.device)
        for i, r in enumerate(RANKS):
            rows = (on.ids == i).nonzero()[:, 0]
            s = s.index_add(0, rows, F.pad(plain_shrink(x[rows], bank, i, STEP, SITE), (0, R - r)).to(s.dtype))
        return s

    by_group = {key: g for key, g in on.by_group.items() if key[0] == "A"}
    kept = torch.promote_types(dtype, factor_dtype or dtype)
    options = dict(site=SITE, dropout_mode=mode, backend=backend)
    return on.problem(lambda: lora_shrink(x, bank, on.plan(), **options), plain, R, by_group=by_group, dtype=kept)


def _expand(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_out=40):
    on, R = Setup(ids, dtype, device, backend, exact, factor_dtype, 4), max(RANKS)
    bank = on.bank(n_out)
    s, out, gates = on.make.rows("s", R), on.make.rows("out", n_out), on.make.rows("gates", dtype=wide(factor_dtype or dtype))
    on.leaves = {"s": s, "base": out, "gates": gates, **{key: t for key, t in on.leaves.items() if key[0] not in "xA"}}

    def plain():
        y = out
        for i, r in enumerate(RANKS):
            rows = (on.ids == i).nonzero()[:, 0]
            delta = s[rows, :r].to(bank.dtype) @ bank.B[i].T + (bank.bias[i] if bank.bias[i].numel() else 0)
            y = y.index_add(0, rows, (delta * (gates[rows] * bank.scale[i])[:, None]).to(y.dtype))
        return y

    by_group = {key: g for key, g in on.by_group.items() if key[0] != "A"}
    return on.problem(
        lambda: lora_expand(s, bank, on.plan(), out, gates=gates, backend=backend), plain, n_out, by_row=("out", "s", "base", "gates"), by_group=by_group
    )


LORA_PROBLEMS = {
    "lora_linear": _linear,
    "lora_linear:group": _group,
    "lora_linear:batch_invariant": lambda *args, **kw: _linear(*args, batch_invariant=True, **kw),
    "lora_linear:bitmask": lambda *args, **kw: _linear(*args, batch_invariant=True, mode="bitmask", **kw),
    "lora_delta": _delta,
    "lora_delta:gates": _gated,
    "lora_delta:dropped": _dropped,
    "lora_shrink": _shrink,
    "lora_shrink:bitmask": lambda *args, **kw: _shrink(*args, mode="bitmask", **kw),
    "lora_expand": _expand,
}
