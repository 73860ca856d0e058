"""Problems of lora_embedding and of the DoRA ops."""

import torch
import torch.nn.functional as F

from ..bank import LoraBank
from ..ops import dora_dropout, dora_linear, dora_norm, dora_rescale, lora_embedding
from ..reference.philox import keep_mask
from .lora import RANKS, SITE, STEP, Setup, plain_lora
from .problem import wide

def _embedding(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_tokens=23, n_out=40, gated=False):
    """Few tokens, so that several rows of an adapter share one."""
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_tokens, two=gated)
    bank, weight, make = on.bank(n_out), on.make.tensor("table", n_tokens, n_out), on.make
    token = (make.rows("token", grad=False, dtype=torch.float32).abs() * 1000).long() % n_tokens
    gates = make.rows("gates", 2, dtype=wide(factor_dtype or dtype)) if gated else None
    on.leaves = {"weight": weight, **({"gates": gates} if gated else {}), **{key: t for key, t in on.leaves.items() if key != "x"}}

    def plain():
        y, table = F.embedding(token, weight), on.ids.reshape(len(token), -1)
        for i, (a, b) in enumerate(zip(bank.A, bank.B)):
            rows, slots = (table == i).nonzero(as_tuple=True)
            delta = F.embedding(token[rows], a.T) @ b.T
            delta = (delta + bank.bias[i] if bank.bias[i].numel() else delta) * bank.scale[i]
            delta = delta if gates is None else delta * gates[rows, slots][:, None]
            y = y.index_add(0, rows, delta.to(y.dtype))
        return y

    return on.problem(
        lambda: lora_embedding(token, weight, bank, on.plan(), gates=gates, backend=backend),
        plain,
        n_out,
        by_row=("out", "gates") if gated else ("out",),
        by_group={} if gated else None,
    )


def _dropped(x, ids, bank):
    """x with each adapter's dropout, in eager torch."""
    found = x
    for i in range(len(bank)):
        rows, t = (ids == i).nonzero()[:, 0], int(bank.threshold[i])
        keep = keep_mask(len(rows), x.shape[1], t, int(bank.seeds[i]), torch.tensor(STEP), SITE, "cpu").to(x.device)
        found = found.index_copy(0, rows, x[rows] * keep * (65536 / (65536 - t) if t < 65536 else 0.0))
    return found


def _dropout(ids, dtype, device="cpu", *, backend=None, exact=False, n_in=72):
    on = Setup(ids, dtype, device, backend, exact, None, n_in)
    bank, x = on.bank(8), on.x
    on.leaves = {"x": x}
    return on.problem(lambda: dora_dropout(x, bank, on.plan(), site=SITE, backend=backend), lambda: _dropped(x, on.ids, bank), n_in, by_group={})


def _rows_of(scale, ids):
    return torch.cat([scale, scale.new_ones(1, scale.shape[1])])[ids]


def _rescale(ids, dtype, device="cpu", *, backend=None, exact=False, n_out=40):
    on = Setup(ids, dtype, device, backend, exact, None, 4)
    z, base, scale = on.make.rows("z", n_out), on.make.rows("base", n_out), on.make.tensor("row scale", len(RANKS), n_out, dtype=wide(dtype))
    on.leaves = {"z": z, "base": base, "scale": scale}
    return on.problem(
        lambda: dora_rescale(z, scale, on.plan(), base, backend=backend),
        lambda: (_rows_of(scale, on.ids) * z + base).to(z.dtype),
        n_out,
        by_row=("out", "z", "base"),
        by_group={"scale": None},
    )


def _linear(ids, dtype, device="cpu", *, backend=None, exact=False, factor_dtype=None, n_in=72, n_out=40, training=True):
    """The norm is taken of copies: it is a constant, which finite differences of the factors must not move."""
    on = Setup(ids, dtype, device, backend, exact, factor_dtype, n_in)
    bank, (weight, bias), x = on.bank(n_out), on.base(n_out), on.x
    magnitudes = [on.make.tensor(("m", i), n_out, dtype=factor_dtype or dtype) if i != 2 else None for i in range(len(RANKS))]
    on.leaves |= {f"m{i}": m for i, m in enumerate(magnitudes) if m is not None}
    copies = [t.detach().clone() for t in bank.A], [t.detach().clone() for t in bank.B], bank.scale.detach().clone()
    fixed, fixed_weight = LoraBank.from_factors(*copies), weight.detach().clone()
    del on.leaves["scale"], on.by_group["scale"]  # six sums of cancelling terms: lora_linear's problem judges them

    def plain():
        one = torch.ones_like(bias)
        norm = [(fixed_weight + s * (b @ a)).norm(dim=1) for a, b, s in zip(*copies)]
        scale = torch.stack([one if m is None else m / d for m, d in zip(magnitudes, norm)])
        x_d = _dropped(x, on.ids, bank) if training else x
        delta = plain_lora(x_d, F.linear(x_d, weight), without_dropout, on.ids, STEP, SITE)
        return (F.linear(x - x_d, weight, bias) + _rows_of(scale, on.ids) * delta).to(delta.dtype)

    without_dropout = LoraBank.from_factors(bank.A, bank.B, bank.scale, bias=[b if b.numel() else None for b in bank.bias])
    return on.problem(
        lambda: dora_linear(
            x, weight, bias, bank, magnitudes, on.plan(), training=training, site=SITE, norm=dora_norm(fixed_weight, fixed, backend=backend), backend=backend
        ),
        plain,
        n_out,
        by_row=(),
    )


DORA_PROBLEMS = {
    "lora_embedding": _embedding,
    "lora_embedding:gates": lambda *args, **kw: _embedding(*args, gated=True, **kw),
    "dora_dropout": _dropout,
    "dora_rescale": _rescale,
    "dora_rescale:linear": _linear,
    "dora_rescale:linear_eval": lambda *args, **kw: _linear(*args, training=False, **kw),
}
