"""lora_linear whose base runs in our kernel: bits, traffic, layouts, and when it is taken unasked."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.lab import driver
from mtkernels.lab.interpreter import interpreting
from mtkernels.testing import assert_accurate, plain_lora, poisoned

RANKS = (3, 0, 16, 1, 33)
STEP, SITE, D, O = 5, 2, 72, 104
# An adapter of rank 0, one without rows (3), rows of none; more rows than a tile of any GPU.
IDS = ([0, 2, 4, -1, 2, 1, 4, 2, -1, 4, 0] * 14)[:150]


class Layer:
    """Targets over the same x: weights, biases and banks, and the leaves that want gradients. Odd adapters have a bias."""

    def __init__(self, way, dtype, widths=(O,), biases=True, factor_dtype=None, dropout=0.25, ranks=RANKS, scale=None):
        self.way, self.leaves = way, {}
        self.weights = [self._leaf(f"W{g}", dtype, w, D, std=D**-0.5) for g, w in enumerate(widths)]
        self.biases = [self._leaf(f"b{g}", dtype, w) if biases and g == 0 else None for g, w in enumerate(widths)]
        self.banks = [self._bank(g, w, factor_dtype or dtype, dropout, ranks, scale) for g, w in enumerate(widths)]

    def _leaf(self, name, dtype, *shape, std=1.0):
        self.leaves[name] = (std * torch.randn(*shape, device=self.way.device)).to(dtype).requires_grad_()
        return self.leaves[name]

    def _bank(self, g, width, dtype, dropout, ranks, scale):
        A = [self._leaf(f"A{g}.{i}", dtype, r, D, std=D**-0.5) for i, r in enumerate(ranks)]
        B = [self._leaf(f"B{g}.{i}", dtype, width, r) for i, r in enumerate(ranks)]
        beta = [self._leaf(f"beta{g}.{i}", dtype, width) if i % 2 else None for i in range(len(ranks))]
        scale = scale or [0.5 + i for i in range(len(ranks))]
        return mtk.LoraBank.from_factors(A, B, scale, dropout=dropout, seeds=[7 * g + i for i in range(len(ranks))], bias=beta)

    def plan(self, ids):
        return mtk.group_plan(torch.as_tensor(ids, device=self.way.device), len(RANKS), step=STEP, backend=self.way.backend)

    def __call__(self, x, ids, gates=None, batch_invariant=True):
        options = dict(sites=range(SITE, SITE + len(self.banks)), gates=gates, batch_invariant=batch_invariant, backend=self.way.backend)
        return torch.cat(mtk.lora_linear_group(x, self.weights, self.biases, self.banks, self.plan(ids), **options), 1)

    def plain(self, x, ids, gates, cast):
        """In the dtype that `cast` gives every tensor."""
        ids, ys = torch.as_tensor(ids, device=x.device), []
        for g, (w, b, bank) in enumerate(zip(self.weights, self.biases, self.banks)):
            y = F.linear(cast(x), cast(w), None if b is None else cast(b))
            wide = mtk.LoraBank.from_factors(
                [cast(a) for a in bank.A], [cast(b) for b in bank.B], bank.scale.tolist(), seeds=bank.seeds, bias=[cast(b) if b.numel() else None for b in bank.bias]
            )
            wide.threshold = bank.threshold
            ys.append(plain_lora(cast(x), y, wide, ids, STEP, SITE + g, gates))
        return torch.cat(ys, 1)


def check(layer, x, ids, gates=None):
    """Values and every gradient against float64, no worse than plain torch in the dtype of x."""
    leaves = {"x": x, **layer.leaves, **({} if gates is None else {"gates": gates})}
    with poisoned():
        y = layer(x, ids, gates)
        upstream = torch.randn_like(y)
        ours = torch.autograd.grad(y, list(leaves.values()), upstream)
    plain, exact = layer.plain(x, ids, gates, lambda t: t.to(x.dtype)), layer.plain(x, ids, gates, torch.Tensor.double)
    theirs, right = (torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype), allow_unused=True) for out in (plain, exact))
    assert_accurate(y.detach(), plain.detach(), exact.detach(), x.dtype, "y")
    for name, a, b, c in zip(leaves, ours, theirs, right):
        assert a.dtype == leaves[name].dtype
        assert_accurate(a, a if b is None else b, torch.zeros_like(a) if c is None else c, x.dtype, name)


def rows(way, dtype, n, width=D):
    return torch.randn(n, width, device=way.device).to(dtype).requires_grad_()


@pytest.mark.parametrize("widths", [(O,), (40, 104)], ids=["one target", "two targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, widths, way):
    check(Layer(way, dtype, widths), rows(way, dtype, len(IDS)), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates(dtype, way):
    ids = IDS[:40]
    check(Layer(way, dtype), rows(way, dtype, len(ids)), ids, torch.randn(len(ids), device=way.device, requires_grad=True))


def test_two_adapters_a_row(way):
    """The base without adapters in its accumulator."""
    ids = [[i, (i + 2) % 5 if i % 2 else -1] for i in IDS[:70]]
    check(Layer(way, torch.float32, (40, 104)), rows(way, torch.float32, len(ids)), ids)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32)], ids=["float32 factors over bfloat16 rows"])
def test_factors_in_another_dtype(dtypes, way):
    check(Layer(way, dtypes[0], factor_dtype=dtypes[1]), rows(way, dtypes[0], len(IDS)), IDS)


def test_base_alone(way):
    """No ranks, no biases of adapters, no rows of adapters, no bias."""
    layer = Layer(way, torch.float32, biases=False, ranks=(0,) * len(RANKS))
    layer.banks[0].bias, x = [], rows(way, torch.float32, 70)
    for ids in ([2] * 70, [-1] * 70):
        y, upstream = layer(x, ids), torch.randn(70, O, device=way.device)
        torch.testing.assert_close(y, F.linear(x, layer.weights[0]))
        torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], upstream @ layer.weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed weight", "rows and weight with strides"])
def test_layouts(layout, way):
    layer, x, ids = Layer(way, torch.float32, dropout=0.0), rows(way, torch.float32, 70), IDS[:70]
    weight, values = layer.weights[0].detach(), x.detach()
    expected = layer(x, ids)
    if layout == "transposed weight":
        weight = weight.T.contiguous().T
    else:
        weight, values = F.pad(weight, (3, 5))[:, 3:-5], F.pad(values, (1, 6))[:, 1:-6]
    layer.weights, other = [weight], values.requires_grad_()
    y, upstream = layer(other, ids), torch.randn(70, O, device=way.device)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dx, expected_dx = torch.autograd.grad(y, other, upstream)[0], torch.autograd.grad(expected, x, upstream)[0]
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5)


def test_bits_of_a_row_do_not_depend_on_the_batch(kernel_way, dtype):
    """Alone, in a batch of low tiles and in one of high tiles; dx too."""
    layer, x, upstream = Layer(kernel_way, dtype), rows(kernel_way, dtype, len(IDS)), torch.randn(len(IDS), O, device=kernel_way.device).to(dtype)

    def run(chosen):
        x_c = x.detach()[chosen].requires_grad_()
        y = layer(x_c, [IDS[t] for t in chosen])
        return y.detach(), torch.autograd.grad(y, x_c, upstream[chosen])[0]

    full = run(list(range(len(IDS))))
    for group in (2, -1):
        own = [t for t, i in enumerate(IDS) if i == group]
        for chosen in (own, own + [t for t, i in enumerate(IDS) if i not in (group, 4)]):
            alone = run(chosen)
            picked = [chosen.index(t) for t in own]
            assert all(torch.equal(a[picked], f[own]) for a, f in zip(alone, full)), (group, len(chosen))


def test_nobody_sees_another_adapters_nan(way, dtype):
    ids = IDS[:70]
    layer, x, upstream = Layer(way, dtype), rows(way, dtype, len(ids)), torch.randn(len(ids), O, device=way.device).to(dtype)

    def run():
        y = layer(x, ids)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    clean = run()
    with torch.no_grad():
        for t in (layer.banks[0].A[4], layer.banks[0].B[4], layer.banks[0].scale[4:]):
            t.fill_(torch.nan)
    others = [t for t, i in enumerate(ids) if i != 4]
    for a, b in zip(run(), clean):
        assert torch.equal(a[others], b[others]) and a[[t for t, i in enumerate(ids) if i == 4]].isnan().any(1).all()


def test_offsets_past_two_to_the_31(kernel_way):
    stride = 2**30 + 64
    x = torch.empty(2 * stride + D, dtype=torch.bfloat16, device=kernel_way.device).as_strided((3, D), (stride, 1))
    x.copy_(torch.randn(3, D))
    layer = Layer(kernel_way, torch.bfloat16)
    far, near = (layer(t, [2, 0, 2]) for t in (x, x.contiguous()))
    assert torch.equal(far, near)


def test_no_rows(way):
    layer, x = Layer(way, torch.float32, (40, 104)), rows(way, torch.float32, 0)
    y = layer(x, torch.empty(0, dtype=torch.int64))
    assert y.shape == (0, 144)
    dx, *grads = torch.autograd.grad(y, [x, *layer.leaves.values()], torch.empty_like(y))
    assert dx.shape == x.shape and not any(g.any() for g in grads)


interpreted = pytest.mark.skipif(not interpreting(), reason="counted by the probe, in Triton's interpreter")


def configured_for(target):
    """Our launchers take the configuration of this GPU."""
    return mock.patch.object(driver, "arch", lambda: target)


@interpreted
def test_traffic_of_the_fused_layer(way, way_is_open):
    """Every operand is read and every result written once; with several targets too. Launches: 2 forward, 4 backward."""
    T, width, adapters = 256, 128, (4, 8, 64)
    layer = Layer(way, torch.bfloat16, (width, 64), biases=False, ranks=(*adapters, 0, 0))
    for bank in layer.banks:
        bank.bias = []
    x = rows(way, torch.bfloat16, T)
    probe, ids = way_is_open, [t * 3 // T for t in range(T)]
    y = layer(x, ids)
    shrink, base = (launch for launch in probe.launches if "lora" in launch.kernel)
    outs, per_row = width + 64, sum(adapters) / 3
    factors_A, factors_B = 2 * sum(adapters) * D, sum(adapters) * outs
    assert shrink.kernel == "_lora_shrink_kernel" and base.kernel == "_lora_base_fwd_kernel"
    assert base.traffic["store"].bytes == 2 * T * outs
    least = 2 * (T * D + D * outs + T * outs + factors_B + 2 * T * per_row)
    assert base.dram_floor_bytes <= 1.05 * least
    assert shrink.dram_floor_bytes <= 1.05 * 2 * (T * D + factors_A + 2 * T * 64)
    before = len(probe.launches)
    torch.autograd.grad(y, [x, *(t for n, t in layer.leaves.items() if n[0] in "AB")], torch.randn_like(y))
    kernels = [launch.kernel for launch in probe.launches[before:]]
    assert kernels == ["_lora_expand_bwd_kernel", "_lora_grad_a_kernel", "_lora_bwd_finish_kernel", "_lora_base_dx_kernel"]
    dx = probe.launches[-1]
    assert dx.traffic["store"].bytes == 2 * T * D
    assert dx.dram_floor_bytes <= 1.05 * 2 * (2 * T * D + D * outs + T * outs - T * D + factors_A + 2 * T * per_row)


def test_when_the_base_is_fused_unasked():
    from mtkernels.triton_kernels import _common
    from mtkernels.triton_kernels.lora_base import fuses

    def asked(T=4096, dtype=torch.bfloat16, factor=torch.bfloat16, inner=4096, n=1):
        return fuses(torch.empty(T, 8, dtype=dtype), torch.empty(4, 8, dtype=factor), inner, n)

    assert not asked()  # nothing is known of this GPU
    with configured_for(90):
        assert _common.arch_of(torch.device("cpu")) == "sm_90"
        assert asked() and asked(T=256, inner=512)
        assert not asked(T=255, inner=512) and not asked(inner=16384)
        assert not asked(dtype=torch.float32) and not asked(factor=torch.float32)
        assert not asked(n=64)  # half a tile of 128 rows lost to each of 64 adapters
        assert asked(T=262144, n=64)


@interpreted
def test_the_layer_takes_it_unasked(way, way_is_open):
    layer, x, ids = Layer(way, torch.bfloat16), rows(way, torch.bfloat16, 256), [2] * 256
    with configured_for(90):
        y = layer(x, ids, batch_invariant=False)
        asked = layer(x, ids)
    assert torch.equal(y, asked) and [n.kernel for n in way_is_open.launches].count("_lora_base_fwd_kernel") == 2
    layer(x, ids, batch_invariant=False)
    assert [n.kernel for n in way_is_open.launches].count("_lora_base_fwd_kernel") == 2
