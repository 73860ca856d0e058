"""Random calls of the C++ launchers, everything combined, against the reference: targets, slots, layouts, gates, e, frozen factors, strides."""

from random import Random

import pytest
import torch

import mtkernels as mtk
from mtkernels import _native
from mtkernels.reference import lora as reference

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Call:
    """The arguments of lora_fwd and lora_bwd."""

    def __init__(self, seed):
        self.pick = pick = Random(seed).choice
        self.T, slots, self.n, self.D = pick([0, 1, 17, 75, 300, 1100]), pick([1, 1, 2, 3]), pick([1, 2, 5]), pick([1, 7, 64, 257, 1030])
        self.dtype = pick([torch.float32, torch.bfloat16, torch.float16])
        self.factor_dtype = pick([self.dtype, self.dtype, torch.float32])
        self.grad_dtype = pick([self.factor_dtype, torch.float32])
        self.widths = [pick([1, 5, 33, 300, 1100]) for _ in range(pick([1, 2, 3]))]
        self.ranks = [pick([0, 1, 3, 4, 8, 16, 17, 40]) for _ in range(self.n * len(self.widths))]
        self.outs = [O for O in self.widths for _ in range(self.n)]
        ids = torch.randint(-1, self.n, (self.T, slots) if slots > 1 else (self.T,))
        plan = mtk.group_plan(ids, self.n, step=pick([0, 2**33 + 5]), backend="reference")
        groups, G = (plan.offsets, plan.perm, plan.tiles), len(self.widths)
        A = [self.columns(r, self.D, self.factor_dtype, self.D**-0.5) for r in self.ranks]
        B = [self.factor_B(O, r) for O, r in zip(self.outs, self.ranks)]
        bias = pick([[], [torch.randn(pick([O, 0])).to(self.factor_dtype) for O in self.outs]])
        threshold = torch.tensor([[pick([0, 3277, 65536]) for _ in range(self.n)] for _ in range(G)], dtype=torch.int32)
        self.factors = A, B, bias
        self.dropout = list(threshold), [torch.arange(self.n)] * G
        self.rest = pick([None, torch.randn(self.T * slots)]), *groups, plan.step, [pick([0, 2**31 + 5]) for _ in range(G)], pick([True, False])
        self.scale, self.x = [torch.rand(self.n) + 0.5 for _ in range(G)], self.columns(self.T, self.D, self.dtype)
        self.n_positions = self.T * slots

    def columns(self, rows, cols, dtype, std=1.0):
        pad = self.pick([0, 3])
        return (torch.randn(rows, cols + pad) * std).to(dtype)[:, :cols]

    def factor_B(self, O, rank):
        stored = {"rows": lambda: torch.randn(O, rank), "packed": lambda: torch.randn(rank, O).T, "experts": lambda: torch.randn(O, 2 * rank)}[self.pick(["rows", "packed", "experts"])]()
        return (0.3 * stored).to(self.factor_dtype)[:, :: max(1, stored.shape[1] // max(rank, 1))]

    def rows(self):
        return [self.columns(self.T, O, self.dtype) for O in self.widths]

    def gradients(self, like, layouts):
        """NaN to be overwritten, now and then an empty tensor for a gradient nobody wants."""
        new = lambda *shape: torch.full(shape, torch.nan, dtype=self.grad_dtype)  # noqa: E731
        make = {
            "dense": lambda t: new(*t.shape),
            "rows": lambda t: new(t.shape[0], t.shape[1] + 2)[:, 1:-1],
            "packed": lambda t: new(*t.shape[::-1]).T,
            "experts": lambda t: new(t.shape[0], 3 * t.shape[1])[:, ::3],
        }
        return [new(0) if t.numel() == 0 or self.pick([0, 0, 0, 1]) else make[self.pick(layouts)](t) for t in like]

    def close(self, ours, theirs, what, times=1.0):
        for a, b in zip(ours, theirs):
            assert a.shape == b.shape and not a.isnan().any(), what
            if a.numel():
                allowed = times * TOLERANCE[self.dtype] * max(1.0, b.abs().max().item())
                assert (a.double() - b.double()).abs().max() <= allowed, what


@pytest.mark.parametrize("seed", range(24))
def test_a_random_call(seed):
    torch.manual_seed(seed)
    call, run = Call(seed), _native.ops()
    ys, factors = call.rows(), (*call.factors, call.scale, *call.dropout)
    expected_ys = [y.clone() for y in ys]
    bits = call.pick([None, torch.full((call.n_positions, len(ys), -(-call.D // 8)), 90, dtype=torch.uint8)])
    expected_bits = bits if bits is None else bits.clone()
    s, expected_s = run.lora_fwd(call.x, *factors, *call.rest, ys, bits), reference.lora_fwd(call.x, *factors, *call.rest, expected_ys, expected_bits)
    call.close([s, *ys], [expected_s, *expected_ys], "forward")
    assert bits is None or not call.rest[-1] or torch.equal(bits, expected_bits)
    A, B, bias = call.factors
    dA, dB, dbias = call.gradients(A, ["dense", "rows"]), call.gradients(B, ["dense", "packed", "experts"]), call.gradients(bias, ["dense"])
    dx = call.pick([None, call.columns(call.T, call.D, call.dtype)])
    e = call.pick([None, torch.full((len(ys), call.n_positions), torch.nan)])
    copies = [t if t is None else t.clone() for t in (dx, e)] + [[t.clone() for t in ts] for ts in (dA, dB, dbias)]
    for launcher, written in ((run.lora_bwd, (dx, e, dA, dB, dbias)), (reference.lora_bwd, copies)):
        launcher(expected_ys, call.x, expected_s, *factors, *call.rest, *written, bits)
    for what, ours, theirs in zip(("dx", "e"), (dx, e), copies):
        if ours is not None:
            call.close([ours], [theirs], what, 3)
    for what, ours, theirs in zip(("dA", "dB", "dbias"), (dA, dB, dbias), copies[2:]):
        call.close(ours, theirs, what, 3)


def test_several_adapters_of_a_row_add_to_it_in_turn_on_any_number_of_threads():
    """One adapter outweighs a thread's share, so its columns are cut; the others' must be cut alike, or two threads add to one element."""
    T, D, O, ranks, before = 75, 1030, 40, (40, 3, 1), torch.get_num_threads()
    plan = mtk.group_plan(torch.tensor([0, 0, 1, 0, 2])[torch.arange(3 * T) % 5].view(T, 3), len(ranks), step=0)
    A, B = [torch.randn(r, D) for r in ranks], [torch.randn(O, r) for r in ranks]
    bank = mtk.LoraBank.from_factors(A, B, 1.0, seeds=[1, 2, 3])
    x, upstream = torch.randn(T, D, requires_grad=True), torch.randn(T, O)

    def dx(threads):
        torch.set_num_threads(threads)
        return torch.autograd.grad(mtk.lora_delta(x, bank, plan, backend="cpu"), x, upstream)[0]

    try:
        alone = dx(1)
        assert all(torch.equal(dx(threads), alone) for threads in (2, 3, 5, 8) for _ in range(8))
    finally:
        torch.set_num_threads(before)
