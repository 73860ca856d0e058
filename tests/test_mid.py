"""Rank-space maps against the formulas of the systems they express, in float64 on the reference and in float32 on every way."""

import pytest
import torch

import mtkernels as mtk
from mtkernels import mid

T, D, O, R, E, J = 11, 24, 16, 4, 3, 2


class Draw:
    def __init__(self, way, dtype):
        self.generator, self.device, self.dtype, self.leaves = torch.Generator().manual_seed(0), way.device, dtype, []

    def __call__(self, *shape):
        t = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype).requires_grad_()
        self.leaves.append(t)
        return t

    def ids(self, n, *shape):
        return torch.randint(-1, n, shape, generator=self.generator).to(self.device)


def bank_of(A, B, scale=0.5, **options):
    return mtk.LoraBank.from_factors(A, B, scale, seeds=[0] * len(A), **options)


def shared_bank(A):
    """One A that several up-projections share; its own B is never read."""
    return bank_of([A], [A.new_zeros(O, len(A))])


def check(case, way):
    """ours and plain agree in value and in every gradient."""
    for dtype in (torch.float64, torch.float32) if way.backend == "reference" else (torch.float32,):
        draw = Draw(way, dtype)
        with mtk.backend(way.backend):
            ours, plain = case(draw)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
            upstream = torch.randn(plain.shape, generator=draw.generator, dtype=torch.float64).to(plain)
            grads = [torch.autograd.grad(y, draw.leaves, upstream, allow_unused=True, retain_graph=True) for y in (ours, plain)]
        for mine, theirs in zip(*grads):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def everyone(n_slots=None):
    ids = torch.zeros(T, dtype=torch.int64) if n_slots is None else torch.arange(n_slots).expand(T, n_slots)
    return ids, n_slots or 1


def plan_of(ids, n, device):
    return mtk.group_plan(ids.to(device), n, step=0)


def mtl_lora(draw):
    x, W, A, Lam, B, w = draw(T, D), draw(O, D), draw(R, D), [draw(R, R) for _ in range(J)], [draw(O, R) for _ in range(E)], draw(J, E)
    tasks = draw.ids(J, T).clamp(min=0)
    mix = torch.softmax(w, 1)[tasks]
    maps = mid.chain(mid.matrix(Lam, plan_of(tasks, J, draw.device)), mid.bcast(bank_of([A] * E, B), mix))
    ours = mtk.lora_linear(x, W, None, shared_bank(A), plan_of(*everyone(), draw.device), mid=maps)
    z = torch.einsum("tij,tj->ti", torch.stack(Lam)[tasks], x @ A.T)
    return ours, x @ W.T + 0.5 * torch.einsum("te,eor,tr->to", mix, torch.stack(B), z)


def mosld_top_k(draw):
    x, W, A, B, router = draw(T, D), draw(O, D), draw(R, D), [draw(O, R) for _ in range(E)], draw(T, E)
    weights, ids = torch.softmax(router, 1).topk(2)
    ours = mtk.lora_linear(x, W, None, shared_bank(A), plan_of(*everyone(), draw.device), mid=mid.bcast(bank_of([A] * E, B), weights, ids=ids))
    return ours, x @ W.T + 0.5 * torch.einsum("tk,tkor,tr->to", weights, torch.stack(B)[ids], x @ A.T)


def poly(draw):
    """Mixing parameters: (sum w A), (sum w B), which is not the sum of w B A."""
    x, W, A, B, w = draw(T, D), draw(O, D), [draw(R, D) for _ in range(E)], [draw(O, R) for _ in range(E)], draw(T, E)
    ours = mtk.lora_linear(x, W, None, bank_of(A, B), plan_of(*everyone(E), draw.device), mid=mid.pool_bcast(w))
    mixed_A, mixed_B = (torch.einsum("te,eij->tij", w, torch.stack(f)) for f in (A, B))
    return ours, x @ W.T + 0.5 * torch.einsum("tor,trd,td->to", mixed_B, mixed_A, x)


def multi_lora(draw):
    """All adapters on every row, added up."""
    x, W, A, B, g = draw(T, D), draw(O, D), [draw(r, D) for r in (1, 4, 2)], [draw(O, r) for r in (1, 4, 2)], draw(T, E)
    ours = mtk.lora_linear(x, W, None, bank_of(A, B), plan_of(*everyone(E), draw.device), gates=g)
    return ours, x @ W.T + 0.5 * sum(g[:, e, None] * (x @ A[e].T @ B[e].T) for e in range(E))


def smora_rank_gates(draw):
    x, W, A, B, g = draw(T, D), draw(O, D), draw(R, D), draw(O, R), draw(T, R)
    ours = mtk.lora_linear(x, W, None, bank_of([A], [B]), plan_of(*everyone(), draw.device), mid=mid.diag(g))
    return ours, x @ W.T + 0.5 * (g * (x @ A.T)) @ B.T


def diag_per_adapter(draw):
    ranks = (2, 0, 5)
    x, A, B, d = draw(T, D), [draw(r, D) for r in ranks], [draw(O, r) for r in ranks], [draw(r) for r in ranks]
    ids = draw.ids(E, T)
    ours = mtk.lora_delta(x, bank_of(A, B), plan_of(ids, E, draw.device), mid=mid.diag(d))
    return ours, sum((ids == i)[:, None] * 0.5 * (d[i] * (x @ A[i].T)) @ B[i].T for i in range(E))


def bottleneck_adapters(draw):
    """h + U act(D h + d) + u, ragged widths; sigmoid(0) != 0 must not leak from the columns of wider adapters."""
    ranks = (2, 6, 3)
    h, A, B = draw(T, D), [draw(r, D) for r in ranks], [draw(D, r) for r in ranks]
    down, up, ids = [draw(r) for r in ranks], [draw(D) for _ in ranks], draw.ids(E, T)
    ours = mtk.lora_delta(h, bank_of(A, B, 1.0, bias=up), plan_of(ids, E, draw.device), out=h, mid=mid.act("sigmoid", down))
    return ours, h + sum((ids == i)[:, None] * (torch.sigmoid(h @ A[i].T + down[i]) @ B[i].T + up[i]) for i in range(E))


def rectangular_matrix(draw):
    """Four columns in, two out, with a bank of its own to expand."""
    x, A, M, B = draw(T, D), draw(R, D), [draw(2, R) for _ in range(J)], draw(O, 2)
    tasks = draw.ids(J, T)
    maps = mid.matrix(M, plan_of(tasks, J, draw.device), bank=bank_of([draw(2, D)], [B]))
    ours = mtk.lora_delta(x, shared_bank(A), plan_of(*everyone(), draw.device), mid=maps)
    return ours, 0.5 * sum((tasks == j)[:, None] * (x @ A.T @ M[j].T @ B.T) for j in range(J))


CASES = [mtl_lora, mosld_top_k, poly, multi_lora, smora_rank_gates, diag_per_adapter, bottleneck_adapters, rectangular_matrix]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_systems(case, way):
    check(case, way)


def test_identity_is_lora_linear(way):
    draw = Draw(way, torch.float32)
    x, W, A, B = draw(T, D), draw(O, D), [draw(r, D) for r in (3, 0)], [draw(O, r) for r in (3, 0)]
    bank, plan = bank_of(A, B, dropout=0.5), plan_of(draw.ids(2, T), 2, draw.device)
    with mtk.backend(way.backend):
        direct, through = (mtk.lora_linear(x, W, None, bank, plan, site=4, mid=m) for m in (None, mid.identity()))
    torch.testing.assert_close(direct, through, rtol=1e-6, atol=1e-6)


def test_refusals():
    draw = Draw(type("W", (), {"device": "cpu"}), torch.float32)
    x, bank, plan = draw(T, D), bank_of([draw(R, D)], [draw(O, R)]), plan_of(*everyone(), "cpu")
    with pytest.raises(ValueError, match="gates= does not go with mid="):
        mtk.lora_delta(x, bank, plan, gates=draw(T), mid=mid.identity())
    with pytest.raises(ValueError, match=r"ranks \[4\]; give one \[R_i\]"):
        mtk.lora_delta(x, bank, plan, mid=mid.diag([draw(3)]))
    with pytest.raises(ValueError, match="'elu' is not one of relu"):
        mid.act("elu")
    with pytest.raises(ValueError, match="shared s"):
        mtk.lora_delta(x, bank, plan, mid=mid.bcast(bank, draw(T + 1, 1)))
    with pytest.raises(ValueError, match="only the last map"):
        mtk.lora_delta(x, bank, plan, mid=mid.chain(mid.bcast(bank, draw(T, 1)), mid.identity()))
    with pytest.raises(ValueError, match=r"plan needs ids \[T, E\]"):
        mtk.lora_delta(x, bank, plan, mid=mid.pool_bcast(draw(T, 1)))
