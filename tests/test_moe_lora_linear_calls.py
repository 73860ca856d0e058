"""Random calls of the C++ launchers of moe_lora_linear, everything combined, against the reference: slots, layouts, gates, unwanted gradients, threads."""

from random import Random

import pytest
import torch

import mtkernels as mtk
from mtkernels import _native
from mtkernels.reference import moe_lora_linear as reference

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Call:
    """The arguments of moe_lora_linear_fwd and moe_lora_linear_bwd."""

    def __init__(self, seed):
        self.pick = pick = Random(seed).choice
        self.E, N, self.T, self.K = pick([1, 2, 5]), pick([1, 2, 3]), pick([0, 1, 17, 75, 300, 900]), pick([1, 2, 3])
        D, O = pick([1, 7, 64, 257, 300, 1030]), pick([1, 5, 33, 300, 520])
        self.dtype = pick([torch.float32, torch.bfloat16, torch.float16])
        self.factor_dtype = factor = pick([self.dtype, torch.float32])
        ids = torch.randint(-1, self.E * (N + 1), (self.T, self.K))
        ids[ids % pick([2, 3, 50]) == 0] = pick([0, -1])
        plan = mtk.group_plan(ids, self.E * (N + 1), step=3, backend="reference")
        ranks = [pick([0, 1, 3, 16, 17, 40]) for _ in range(self.E * N)]
        self.x = torch.randn(self.T * pick([1, self.K]), D + 3).to(self.dtype)[:, :D]
        weight = torch.randn(self.E, O, D) if pick([0, 1]) else torch.randn(self.E, D, O).transpose(1, 2)
        self.layer = (weight * D**-0.5).to(self.dtype), pick([None, torch.randn(self.E, O).to(self.dtype)])
        A = [(torch.randn(r, D) * D**-0.5).to(factor) for r in ranks]
        B = [torch.randn(O, r).to(factor) for r in ranks]
        bias = pick([[], [torch.randn(pick([O, 0])).to(factor) for _ in ranks]])
        none = torch.empty(0, D), torch.empty(O, 0), torch.empty(0)
        self.factors = [self.with_none(tensors, t.to(factor)) for tensors, t in zip((A, B, bias), none)]
        threshold = torch.tensor([pick([0, 3277, 65536]) for _ in ranks], dtype=torch.int32)
        self.gates = pick([None, torch.randn(self.T, self.K)])
        groups = plan.offsets, plan.perm, plan.tiles, plan.step
        self.rest = torch.rand(len(ranks)) + 0.5, threshold, torch.arange(len(ranks)), self.gates, *groups, 2, pick([True, False])

    def with_none(self, tensors, none):
        n = len(tensors) // self.E
        return [t for e in range(self.E if n else 0) for t in (*tensors[e * n : (e + 1) * n], none)]

    def outputs(self, wanted):
        """NaN to be overwritten, now and then None or an empty tensor for what nobody wants; the same for equal `wanted`."""
        some = Random(wanted).choice
        new = lambda t: torch.full(t.shape if some([1, 1, 1, 0]) else (0,), torch.nan, dtype=self.factor_dtype)  # noqa: E731
        dx = some([None, *[torch.full(self.x.shape, torch.nan, dtype=self.dtype)] * 3])
        dgates = None if self.gates is None else some([None, *[torch.full((self.T, self.K), torch.nan)] * 3])
        return dx, dgates, torch.full((1, self.T * self.K), torch.nan), *([new(t) for t in tensors] for tensors in self.factors)


def close(ours, theirs, dtype, what, times=1.0):
    assert ours.shape == theirs.shape and not ours.isnan().any(), what
    if ours.numel():
        assert (ours.double() - theirs.double()).abs().max() <= times * TOLERANCE[dtype] * max(1.0, theirs.abs().max().item()), what


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(40))
def test_a_random_call(seed, threads):
    torch.manual_seed(seed)
    call, run = Call(seed), _native.ops()
    threads(1 + seed % 3)
    args = *call.factors, *call.rest
    (y, s), expected = run.moe_lora_linear_fwd(call.x, *call.layer, *args), reference.moe_lora_linear_fwd(call.x, *call.layer, *args)
    for ours, theirs in zip((y, s), expected):
        close(ours, theirs, call.dtype, "forward")
    dy, ours, theirs = torch.randn(y.shape).to(call.dtype), call.outputs(seed), call.outputs(seed)
    for launcher, written in ((run.moe_lora_linear_bwd, ours), (reference.moe_lora_linear_bwd, theirs)):
        launcher(dy, call.x, *call.layer, expected[1], *args, *written)
    for what, a, b in zip(("dx", "dgates", "e"), ours, theirs):
        if a is not None:
            close(a, b, call.dtype, what, 4)
    for what, found, right in zip(("dA", "dB", "dbias"), ours[3:], theirs[3:]):
        for a, b in zip(found, right):
            close(a, b, call.dtype, what, 4)


def test_bad_input_is_named():
    torch.manual_seed(0)
    call, run = Call(11), _native.ops()
    weight, bias = call.layer
    args = [call.x, weight, None, *call.factors, *call.rest]

    def with_(i, t):
        return [*args[:i], t, *args[i + 1 :]]

    cases = [
        ("weight is", with_(1, weight[0])),
        ("unit stride in one of the last two dimensions", with_(1, torch.stack([weight, weight], 3)[..., 0])),
        ("give each as many adapters", with_(3, call.factors[0][:-1])),
        ("give x \\[rows, D\\]", with_(0, call.x[:, 1:])),
        ("bias is", with_(2, torch.randn(call.E, 3).to(call.dtype))),
        ("scale is", with_(6, torch.ones(100))),
        ("gates is", with_(9, torch.ones(2, 3))),
    ]
    for message, bad in cases:
        with pytest.raises(RuntimeError, match=message):
            run.moe_lora_linear_fwd(*bad)
