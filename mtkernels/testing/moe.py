"""Problems of moe_lora_linear."""

import torch
import torch.nn.functional as F

from ..bank import LoraBank
from ..ops import group_plan, moe_lora_linear
from .lora import SITE, STEP, plain_shrink
from .problem import Maker, Problem, wide

EXPERTS, ADAPTERS = 2, 2
RANKS, DROPOUT = (3, 0, 16, 130), (0.25, 0.5, 0.5, 0.05)
# The group of a row's first id, and of its second: of (expert, adapter) at 3 expert + adapter, where adapter 2 is none.
FIRST = {-1: -1, 0: 0, 1: 1, 2: 3, 3: 2, 4: 4, 5: 5}
SECOND = {-1: -1, 0: 4, 1: 2, 2: 0, 3: -1, 4: 1, 5: 3}
# The adapter that the rows of a group have.
ADAPTER_OF = {0: 0, 1: 1, 2: 2, 4: 3}


def plain_moe_lora(x, weight, bias, bank, ids, step, site, gates=None):
    """A loop over (expert, adapter) in eager torch, in the tensors' own dtypes: index, linear, drop, two matmuls, add; then the weighted sum."""
    n, places_of = len(bank) // len(weight), ids.reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    z = x.new_zeros(len(places_of), weight.shape[1])
    for g in range(len(weight) * (n + 1)):
        e, a = divmod(g, n + 1)
        places = (places_of == g).nonzero()[:, 0]
        rows = x[places // max(1, len(places_of) // max(1, len(x)))]
        y = F.linear(rows, weight[e], None if bias is None else bias[e])
        if a < n:
            i = e * n + a
            delta = plain_shrink(rows, bank, i, step, site) @ bank.B[i].T
            delta = delta + bank.bias[i] if bank.bias and bank.bias[i].numel() else delta
            y = y + (delta * bank.scale[i]).to(y.dtype)
        z = z.index_add(0, places, y.to(z.dtype))
    z = z.view(*ids.shape, z.shape[1])
    return z if gates is None else (z * gates[..., None]).sum(1).to(z.dtype)


def _bank(make, n_in, n_out, dtype, dropout):
    """(bank, {leaf: tensor}, {leaf: its group}); odd adapters have a bias."""
    leaves, by_group = {}, {}
    for group, i in ADAPTER_OF.items():
        own = {f"A{i}": make.tensor(("A", i), RANKS[i], n_in, dtype=dtype), f"B{i}": make.tensor(("B", i), n_out, RANKS[i], dtype=dtype)}
        if i % 2:
            own[f"beta{i}"] = make.tensor(("beta", i), n_out, dtype=dtype)
        leaves |= own
        by_group |= dict.fromkeys(own, group)
    scale = leaves["scale"] = make.tensor("scale", len(RANKS), dtype=wide(dtype))
    A, B, beta = ([leaves.get(f"{name}{i}") for i in range(len(RANKS))] for name in ("A", "B", "beta"))
    return LoraBank.from_factors(A, B, scale, dropout=list(dropout), seeds=list(range(7, 7 + len(RANKS))), bias=beta), leaves, by_group


def _problem(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40, slots=1, own_rows=False, gated=False, mode="auto"):
    """With two ids a row the batch decides the order of a group's positions, so there is no dropout, and no group has a gradient to itself."""
    make, shape = Maker(ids, dtype, device, exact), (slots,) if slots > 1 else ()
    table = torch.tensor([[FIRST[i], SECOND[i]][:slots] for i in ids], dtype=torch.int64, device=device).view(-1, *shape)
    bank, factors, by_group = _bank(make, n_in, n_out, factor_dtype or dtype, DROPOUT if slots == 1 else [0.0] * len(RANKS))
    x = make.rows("x", *(shape if own_rows else ()), n_in)
    gates = make.rows("gates", *shape, dtype=wide(factor_dtype or dtype)) if gated else None
    weight, bias = make.tensor("weight", EXPERTS, n_out, n_in, grad=False), make.tensor("bias", EXPERTS, n_out, grad=False)
    by_row = ("out", "x", "gates") if gated else ("out", "x")
    return Problem(
        ids,
        len(FIRST) - 1,
        {"x": x, **({"gates": gates} if gated else {}), **factors},
        lambda: moe_lora_linear(x, weight, bias, bank, group_plan(table, EXPERTS * (ADAPTERS + 1), step=STEP, backend=backend), gates=gates, site=SITE, dropout_mode=mode, backend=backend),
        lambda: plain_moe_lora(x, weight, bias, bank, table, STEP, SITE, gates),
        make.rows("dy", *(() if gated else shape), n_out, grad=False),
        by_row=by_row,
        by_group=by_group if slots == 1 else {},
    )


MOE_PROBLEMS = {
    "moe_lora_linear": _problem,
    "moe_lora_linear:bitmask": lambda *args, **kw: _problem(*args, mode="bitmask", **kw),
    "moe_lora_linear:slots": lambda *args, **kw: _problem(*args, slots=2, **kw),
    "moe_lora_linear:gates": lambda *args, **kw: _problem(*args, slots=2, own_rows=True, gated=True, **kw),
    "moe_lora_linear:shared_rows": lambda *args, **kw: _problem(*args, slots=2, gated=True, **kw),
}
