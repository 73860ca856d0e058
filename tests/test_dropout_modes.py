"""dropout_mode="bitmask" gives the bits that "replay" gives, in every result, and keeps the masks; "replay" keeps none."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mtkernels as mtk
from mtkernels import _backends
from mtkernels.lab import driver
from mtkernels.lab.cli_cost import configured_for
from mtkernels.reference.lora_dropout_mask import lora_dropout_mask
from mtkernels.testing import poisoned

RANKS, DROPOUT = (3, 0, 16, 1, 130, 4), (0.25, 0.5, 0.5, 1.0, 0.05, 0.0)
STEP, SITES = 7, (4, 2**31 - 1)
# Adapter 5 has no dropout, 1 has rank 0; rows of none.
IDS = [0, 2, -1, 4, 4, 0, 2, 3, -1, 5, 1, 2, 5, 0, 4]
SLOTS = [[0, 2], [2, 0], [-1, 4], [4, 4], [1, -1], [3, 0], [2, 5]]
MODES = ("replay", "bitmask")


class Layer:
    """Two targets over one x of D columns, and the leaves that want gradients."""

    def __init__(self, way, D, dtype=torch.float32, ids=IDS, seeds=(7, 7), dropout=DROPOUT):
        self.way, self.dropout, draw = way, list(dropout), lambda *shape: torch.randn(*shape).to(way.device, dtype).requires_grad_()
        self.ids = torch.as_tensor(ids, device=way.device)
        self.x, self.outs = draw(len(ids), D), (24, 9)
        self.weights, self.biases = [draw(O, D) for O in self.outs], [draw(self.outs[0]), None]
        self.A, self.B = [[draw(r, D) for r in ranks] for ranks in (RANKS, RANKS[::-1])], [[draw(O, r) for r in ranks] for O, ranks in zip(self.outs, (RANKS, RANKS[::-1]))]
        scales = [draw(len(RANKS)) for _ in self.outs]
        parts = zip(self.A, self.B, scales, seeds)
        self.banks = [mtk.LoraBank.from_factors(A, B, s.float(), dropout=list(dropout), seeds=list(range(seed, seed + 6))) for A, B, s, seed in parts]
        self.gates = torch.randn(self.ids.shape, device=way.device)
        self.up, self.gamma = draw(len(ids), D), draw(D)
        self.leaves = [self.x, self.up, self.gamma, *self.weights, *(t for ts in (*self.A, *self.B) for t in ts)]

    def plan(self):
        return mtk.group_plan(self.ids, len(RANKS), step=STEP, backend=self.way.backend)

    def fan(self, **kw):
        """Two adapters on every row but the last."""
        ids = torch.zeros(len(self.x), dtype=torch.int32, device=self.way.device)
        ids[-1] = -1
        bank = mtk.LoraBank.from_factors(self.A[0][:3:2], self.B[0][:3:2], 1.5, dropout=self.dropout[:3:2], seeds=[1, 2])
        return mtk.lora_fan_out(self.x, self.weights[0], None, bank, plan=mtk.group_plan(ids, 1, step=STEP, backend=self.way.backend), **kw)

    def experts(self, **kw):
        """The six adapters as three on each of two experts; the last position has an expert alone."""
        places = torch.where(self.ids < 0, -1, self.ids + self.ids // 3)
        places.view(-1)[-1] = 3
        plan = mtk.group_plan(places, 8, step=STEP, backend=self.way.backend)
        return mtk.moe_lora_linear(self.x, self.weights[0].detach().expand(2, -1, -1), None, self.banks[0], plan, **kw)

    def mlp(self, plan, **kw):
        """D to 24 and back; the transposed factors of the gate's bank serve the layer back."""
        A, B, w = self.A[0], self.B[0], self.weights[0] / 8
        back = [b.T.contiguous() for b in B], [a.T for a in A]
        factors = (A, B), (self.A[1], B[::-1]), back
        banks = [mtk.LoraBank.from_factors(*f, 0.02, dropout=self.dropout, seeds=list(range(g, g + 6))) for g, f in enumerate(factors)]
        return mtk.lora_swiglu_mlp(self.x, w, w.roll(1, 0), w.T, banks, plan, **kw)


# What depends on the masks comes first.
CALLS = {
    "lora_linear": lambda n, plan, **kw: mtk.lora_linear(n.x, n.weights[0], n.biases[0], n.banks[0], plan, site=SITES[0], **kw),
    "lora_linear, own base": lambda n, plan, **kw: mtk.lora_linear(n.x, n.weights[0], None, n.banks[0], plan, site=SITES[1], batch_invariant=True, **kw),
    "lora_linear_group": lambda n, plan, **kw: mtk.lora_linear_group(n.x, n.weights, n.biases, n.banks, plan, sites=SITES, **kw),
    "lora_linear_group, own base": lambda n, plan, **kw: mtk.lora_linear_group(n.x, n.weights, None, n.banks, plan, sites=SITES, batch_invariant=True, **kw),
    "lora_linear_group, one mask": lambda n, plan, **kw: mtk.lora_linear_group(n.x, n.weights, None, n.banks, plan, sites=(3, 3), **kw),
    "lora_delta": lambda n, plan, **kw: mtk.lora_delta(n.x, n.banks[0], plan, site=SITES[0], **kw),
    "lora_delta, through a mid": lambda n, plan, **kw: mtk.lora_delta(n.x, n.banks[0], plan, mid=lambda s, bank, plan: (s.relu(), bank, plan, None), **kw),
    "lora_delta_group": lambda n, plan, **kw: mtk.lora_delta_group(n.x, n.banks, plan, sites=SITES, **kw),
    "lora_fan_out": lambda n, plan, **kw: n.fan(site=2, **kw),
    "lora_shrink": lambda n, plan, **kw: mtk.lora_shrink(n.x, n.banks[0], plan, site=SITES[0], **kw),
    "moe_lora_linear": lambda n, plan, **kw: n.experts(site=2, **kw),
    "rmsnorm_lora_shrink": lambda n, plan, **kw: mtk.rmsnorm_lora_shrink(n.x, n.gamma, 1e-5, n.banks[0], plan, sites=SITES[:1], **kw)[::-1],
    "rmsnorm_lora_shrink, two banks": lambda n, plan, **kw: mtk.rmsnorm_lora_shrink(n.x, n.gamma, 1e-5, n.banks, plan, sites=SITES, **kw)[::-1],
    "swiglu_lora_shrink": lambda n, plan, **kw: mtk.swiglu_lora_shrink(n.x, n.up, n.banks[0], plan, site=SITES[0], **kw)[::-1],
    "lora_swiglu_mlp": lambda n, plan, **kw: n.mlp(plan, **kw),
    "lora_swiglu_mlp, norm": lambda n, plan, **kw: n.mlp(plan, norm=(n.gamma, 1e-5), sites=(*SITES, 9), **kw),
}
PRODUCERS = ("rmsnorm_lora_shrink, two banks", "swiglu_lora_shrink")
# Calls of other ops here, so tested where they are fast.
COMPOSED = ("lora_swiglu_mlp", "lora_swiglu_mlp, norm")
SLOT_CALLS = {
    "lora_linear": lambda n, plan, **kw: mtk.lora_linear(n.x, n.weights[0], None, n.banks[0], plan, gates=n.gates, **kw),
    "lora_delta_group": lambda n, plan, **kw: mtk.lora_delta_group(n.x, n.banks, plan, **kw),
    "lora_shrink": lambda n, plan, **kw: mtk.lora_shrink(n.x, n.banks[0], plan, **kw),
    "moe_lora_linear": lambda n, plan, **kw: n.experts(gates=n.gates, **kw),
    **{name: CALLS[name] for name in ("rmsnorm_lora_shrink", *PRODUCERS)},
}


def results(layer, fn, leaves=None):
    """Output and gradients, every torch.empty in between poisoned; the upstream gradient is the same in every call."""
    leaves = layer.leaves if leaves is None else leaves
    with poisoned():
        out = fn()
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outs]
        return [*outs, *torch.autograd.grad(outs, leaves, upstream, allow_unused=True)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def check(layer, call, **kw):
    replay, bitmask = (results(layer, lambda m=m: call(layer, layer.plan(), dropout_mode=m, backend=layer.way.backend, **kw)) for m in MODES)
    assert_same(bitmask, replay)
    off = call(layer, layer.plan(), training=False, backend=layer.way.backend, **kw)
    assert not torch.equal(replay[0], off if isinstance(off, torch.Tensor) else off[0])  # a mask was drawn


@pytest.mark.parametrize("name", [name for name in CALLS if name not in COMPOSED])
def test_the_same_bits(name, way):
    check(Layer(way, 37), CALLS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [IDS, SLOTS], ids=["one", "several"])
@pytest.mark.parametrize("name", COMPOSED)
def test_the_same_bits_of_a_composition(name, ids, dtype, fast_way):
    check(Layer(fast_way, 37, dtype, ids=ids), CALLS[name])


@pytest.mark.parametrize("D", [5, 72, 136])
def test_the_same_bits_of_other_widths(D, way):
    check(Layer(way, D), CALLS["lora_delta"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lora_linear, own base", "lora_linear_group", "lora_shrink", *PRODUCERS])
def test_the_same_bits_in_16_bits(name, dtype, way):
    check(Layer(way, 72, dtype), CALLS[name])


@pytest.mark.parametrize("name", SLOT_CALLS)
def test_the_same_bits_with_several_adapters_a_row(name, way):
    check(Layer(way, 44, ids=SLOTS), SLOT_CALLS[name])


@pytest.mark.parametrize("name", ["lora_linear_group", *PRODUCERS])
def test_the_same_bits_of_a_fat_adapter_and_many_columns(name, way):
    """Several chunks of rows, blocks of columns and, in C++, items; every thread of its own."""
    ids = IDS + [0] * (1030 if way.slow else 3000) + [2] * 40
    check(Layer(way, 24 if way.slow else 700, ids=ids), CALLS["lora_shrink" if way.slow and name == "lora_linear_group" else name])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["lora_linear", "lora_linear_group", "lora_shrink", "moe_lora_linear", *PRODUCERS, *COMPOSED])
def test_a_recompute_gives_the_same_bits(name, use_reentrant, fast_way):
    layer = Layer(fast_way, 37)
    plan, kw = layer.plan(), dict(backend=fast_way.backend)

    def run(x, mode):
        layer.x = x
        return CALLS[name](layer, plan, dropout_mode=mode, **kw)

    x = layer.x
    direct = results(layer, lambda: run(x, "replay"), [x])
    for mode in MODES:
        leaf = x.detach().requires_grad_()
        out = checkpoint(run, leaf, mode, use_reentrant=use_reentrant)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        assert_same(outs, direct[:-1])
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(outs, [torch.randn(y.shape, generator=generator).to(y) for y in outs])
        assert torch.equal(leaf.grad, direct[-1])


@pytest.mark.parametrize("name", ["lora_linear_group", *PRODUCERS])
def test_frozen_adapters_still_pass_the_gradient_to_x(name, way):
    layer = Layer(way, 37)
    for t in layer.leaves[1:]:
        t.requires_grad_(False)
    layer.leaves = layer.leaves[:1]
    check(layer, CALLS[name])


def kept(fn):
    """uint8 tensors saved for backward, and what fn returns."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        out = fn()
    return [t for t in found if t.dtype == torch.uint8], out


@pytest.mark.parametrize("name", CALLS)
def test_what_is_saved(name):
    way = type("Way", (), {"device": "cpu", "backend": "reference"})
    layer, kw = Layer(way, 37), dict(backend="reference")
    n = 2 if any(word in name for word in ("group", "fan", "two", "mlp")) else 1
    shapes = [(len(IDS), n, 5), (len(IDS), 1, 3)] if "mlp" in name else [(len(IDS), n, 5)]
    assert [t.shape for t in kept(lambda: CALLS[name](layer, layer.plan(), dropout_mode="bitmask", **kw))[0]] == shapes
    without = Layer(way, 37, dropout=(0.0,) * 6)
    for nothing in (
        lambda: CALLS[name](layer, layer.plan(), dropout_mode="replay", **kw),
        lambda: CALLS[name](layer, layer.plan(), **kw),  # a CPU's choice
        lambda: CALLS[name](layer, layer.plan(), dropout_mode="bitmask", training=False, **kw),
        lambda: CALLS[name](without, without.plan(), dropout_mode="bitmask", **kw),
    ):
        assert not kept(nothing)[0]


@pytest.mark.parametrize("stem", ["lora_shrink", "rmsnorm_lora_shrink", "swiglu_lora_shrink"])
def test_the_bits_of_the_forward_are_those_of_lora_dropout_mask(stem, way):
    """But zeros for an adapter of rank 0, whose mask nobody draws."""
    for ids in (IDS, SLOTS):
        layer = Layer(way, 37, ids=ids)
        banks, plan, x = layer.banks[: 1 if stem == "swiglu_lora_shrink" else 2], layer.plan(), layer.x.detach()
        run = _backends.launchers(stem, layer.x, way.backend)
        bits = torch.full((plan.ids.numel(), len(banks), 5), 255, dtype=torch.uint8, device=way.device)
        groups = plan.offsets, plan.perm, plan.tiles, plan.step
        rows = {"lora_shrink": (), "rmsnorm_lora_shrink": (layer.gamma.detach(), 1e-5, 0.0, True), "swiglu_lora_shrink": (layer.up.detach(), 0)}[stem]
        masks = [bank.threshold for bank in banks], [bank.seeds for bank in banks], *groups, list(SITES[: len(banks)]), True
        getattr(run, f"{stem}_fwd")(x, *rows, [a.detach() for bank in banks for a in bank.A], *masks, bits)
        for g, (bank, site) in enumerate(zip(banks, SITES)):
            drawn = mtk.lora_dropout_mask(bank, plan, site=site, backend=way.backend)
            has_rank = torch.tensor([*(r > 0 for r in bank.ranks), False], device=way.device)[plan.ids.long()]
            assert torch.equal(bits[:, g], torch.where(has_rank[:, None], drawn, 0)) and drawn.any()
            assert torch.equal(drawn.cpu(), lora_dropout_mask(*(t.cpu() for t in (bank.threshold, bank.seeds, *groups)), site, 37))


def test_what_auto_takes():
    from mtkernels.triton_kernels.lora_shrink import prefers_bits

    assert not prefers_bits(torch.device("cpu"))  # nothing is known of this GPU
    for target, bits in (("sm_80", False), ("sm_86", False), ("sm_90", False), ("sm_100", True), ("sm_103", True), ("sm_120", False)):
        with configured_for(target):
            assert driver.arch() == int(target[3:]) and prefers_bits(torch.device("cpu")) == bits


def test_auto_keeps_bits_where_the_kernels_prefer_them(emulated_triton_way):
    layer = Layer(emulated_triton_way, 16)
    fn = lambda: CALLS["lora_linear"](layer, layer.plan(), backend="triton")  # noqa: E731
    assert not kept(fn)[0]
    if emulated_triton_way.name == "interpret":
        with configured_for("sm_100"):
            bits, out = kept(fn)
        assert len(bits) == 1 and torch.equal(out, CALLS["lora_linear"](layer, layer.plan(), dropout_mode="replay", backend="triton"))


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_mode_is_named(name):
    layer = Layer(type("Way", (), {"device": "cpu", "backend": "reference"}), 8)
    inner = {"lora_delta, through a mid": "lora_shrink", "lora_swiglu_mlp": "lora_linear_group", "lora_swiglu_mlp, norm": "rmsnorm_lora_shrink"}
    op = inner.get(name, name.split(",")[0])
    for training in (True, False):
        with pytest.raises(ValueError, match=f"{op}: dropout_mode is 'bits'; give 'replay' .* 'bitmask' .* or 'auto'"):
            CALLS[name](layer, layer.plan(), dropout_mode="bits", training=training, backend="reference")
