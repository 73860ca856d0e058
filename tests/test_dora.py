from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels import _backends
from mtkernels.testing import FLOOR, assert_accurate, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = SimpleNamespace(device="cpu", backend="reference")
RANKS = (3, 0, 16, 1, 70)
IDS = torch.tensor([4, 0, 2, -1, 2, 4, 3, 0, 0, 4, 2, 2, 2, -1, 3, 0, 2])


def launchers(way):
    return _backends.launchers("dora", torch.empty(0, device=way.device), way.backend)


def plan_of(ids, way, n=len(RANKS)):
    return mtk.group_plan(ids.to(way.device), n, step=5, backend=way.backend)


def bank_of(ranks, n_in, n_out, way, dtype=torch.float32, layout="separate", **kw):
    scale = torch.rand(len(ranks), device=way.device) + 0.5
    if layout == "separate":
        A, B = [torch.randn(r, n_in) for r in ranks], [torch.randn(n_out, r) for r in ranks]
        return mtk.LoraBank.from_factors([a.to(way.device, dtype) for a in A], [b.to(way.device, dtype) for b in B], scale, **kw)
    if layout == "packed":
        return mtk.LoraBank.from_packed(*(torch.randn(sum(ranks), n).to(way.device, dtype) for n in (n_in, n_out)), ranks, scale, **kw)
    if layout == "experts":
        n, r = len(ranks), ranks[0]
        return mtk.LoraBank.from_experts(torch.randn(n * r, n_in).to(way.device, dtype), torch.randn(n_out, n * r).to(way.device, dtype), n, scale, **kw)
    n, r = len(ranks), max(ranks)
    A, B = torch.randn(n, r, n_in).to(way.device, dtype), torch.randn(n, n_out, r).to(way.device, dtype)
    return mtk.LoraBank.from_stacked(A, B, scale, ranks=ranks, **kw)


def exact_norm(weight, bank):
    return torch.stack([(weight.double() + s.double() * (b.double() @ a.double())).norm(dim=1) for a, b, s in zip(bank.A, bank.B, bank.scale)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["separate", "packed", "stacked", "experts"])
def test_norm_against_float64(layout, dtype, way):
    """Sizes that fill no block; a weight that is transposed, and one that is a column slice; factors wider than the weight."""
    ranks = (6, 6, 6) if layout == "experts" else RANKS
    for n_in, n_out, factor_dtype in ((37, 53, dtype), (300, 70, dtype), (1, 1, dtype), (130, 50, torch.float32)):
        bank = bank_of(ranks, n_in, n_out, way, factor_dtype, layout)
        full = torch.randn(n_out, n_in + 5).to(way.device, dtype)
        weights = full[:, :n_in], full[:, :n_in].T.contiguous().T
        for weight in weights:
            ours = mtk.dora_norm(weight, bank, backend=way.backend)
            plain = torch.stack([torch.linalg.norm(weight + (s * (b @ a)).to(dtype), dim=1) for a, b, s in zip(bank.A, bank.B, bank.scale)])
            assert ours.dtype == torch.float32 and ours.shape == (len(ranks), n_out)
            assert_accurate(ours, plain, exact_norm(weight, bank), dtype, f"{layout} {n_in} {n_out}")
            assert relative_error(ours, exact_norm(weight, bank)) < 1e-6


def test_norm_keeps_its_digits_when_the_adapter_cancels_the_weight(way):
    """||W||^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T in float32 has lost every digit here; the norm of the adapted weight has not."""
    bank = bank_of((8,), 256, 40, way)
    a, b, s = bank.A[0], bank.B[0], bank.scale[0]
    delta = s.double() * (b.double() @ a.double())
    weight = (-delta * (1 + 1e-5 * torch.randn(40, 256, device=way.device, dtype=torch.float64))).float()
    exact = exact_norm(weight, bank)
    squares = weight.square().sum(1) + 2 * s * (b * (weight @ a.T)).sum(1) + s * s * (b * (b @ (a @ a.T))).sum(1)
    expanded = squares.clamp(min=0).sqrt()
    assert relative_error(expanded, exact[0]) > 0.3
    ours = mtk.dora_norm(weight, bank, backend=way.backend)
    # What is left is the rounding of products as large as W: about 1e-7 of W, which is 1e5 times the norm.
    assert relative_error(ours, exact) < 0.03
    zero = mtk.dora_norm(torch.zeros(40, 256, device=way.device), mtk.LoraBank.from_factors([a[:0]], [b[:, :0]], 1.0), backend=way.backend)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_norm_of_an_adapter_does_not_depend_on_its_neighbours(kernel_way):
    bank = bank_of(RANKS, 150, 60, kernel_way)
    weight = torch.randn(60, 150, device=kernel_way.device)
    together = mtk.dora_norm(weight, bank, backend=kernel_way.backend)
    for i in range(len(RANKS)):
        alone = mtk.LoraBank.from_factors(bank.A[i : i + 1], bank.B[i : i + 1], bank.scale[i : i + 1])
        assert torch.equal(mtk.dora_norm(weight, alone, backend=kernel_way.backend)[0], together[i])


def test_norm_sees_factors_changed_in_place(way):
    bank, weight = bank_of((4, 2), 30, 20, way), torch.randn(20, 30, device=way.device)
    before = mtk.dora_norm(weight, bank, backend=way.backend)
    bank.A[0].mul_(2)
    after = mtk.dora_norm(weight, bank, backend=way.backend)
    assert torch.equal(before[1], after[1]) and relative_error(after, exact_norm(weight, bank)) < 1e-6 and not torch.equal(before[0], after[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 17, 300])
def test_rescale_launchers(T, dtype, way):
    """Rows in any order, wide row strides, one adapter with several chunks, columns that fill no block."""
    ids = IDS.repeat(20)[:T]
    ids[100:] = 2
    plan, O = plan_of(ids, way), 45
    groups = plan.offsets, plan.perm, plan.tiles
    z, base, dy = (torch.randn(T, O + 3).to(way.device, dtype)[:, :O] for _ in range(3))
    scale = torch.randn(len(RANKS), O, device=way.device)
    rows = torch.cat([scale, torch.ones_like(scale[:1])])[plan.ids.long()].double()
    shared = base[:1].expand(T, O) if T else base
    for extra in (None, base, shared):
        y = launchers(way).dora_fwd(z, extra, scale, plan.ids)
        assert_close(y, rows * z.double() + (0 if extra is None else extra.double()), dtype)
    dz, dscale = launchers(way).dora_bwd(dy, z, scale, plan.ids, *groups)
    only_dz, nothing = launchers(way).dora_bwd(dy, None, scale, plan.ids, *groups)
    assert_close(dz, rows * dy.double(), dtype)
    assert torch.equal(dz, only_dz) and not nothing.numel()
    exact = torch.stack([(dy.double() * z.double())[plan.ids == i].sum(0) for i in range(len(RANKS))])
    torch.testing.assert_close(dscale.double(), exact, rtol=1e-4, atol=1e-4)


def assert_close(ours, exact, dtype):
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert not exact.numel() or relative_error(ours, exact) < 2 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_mask_of_lora_linear(dtype, way):
    p = [0.0, 0.5, 0.25, 1.0, 0.05]
    bank = bank_of(RANKS, 70, 8, way, dropout=p, seeds=[3, -1, 2**62, 5, 6])
    x, plan = torch.randn(34, 78).to(way.device, dtype)[:, :70], plan_of(IDS.repeat(2), way)
    y = mtk.dora_dropout(x, bank, plan, site=9, backend=way.backend)
    with mtk.backend("reference"):
        expected = mtk.dora_dropout(x, bank, plan, site=9)
        eye = [torch.eye(70, device=way.device)] * len(RANKS)
        identity = mtk.LoraBank.from_factors(eye, eye, 1.0, dropout=p, seeds=[3, -1, 2**62, 5, 6])
        through = mtk.lora_delta(x.float(), identity, plan, site=9)
    assert torch.equal(y == 0, expected == 0)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    grouped = (plan.ids >= 0)[:, None]
    assert torch.equal((y == 0) | ~grouped, (through == 0) | ~grouped)
    assert torch.equal(y[plan.ids < 0], x[plan.ids < 0]) and torch.equal(y[plan.ids == 0], x[plan.ids == 0]) and not y[plan.ids == 3].any()
    assert mtk.dora_dropout(x, bank, plan, training=False) is x


def peft_layer(peft, dropout, ranks=(4, 8, 2), n_in=24, n_out=16, bias=True):
    names = [f"a{i}" for i in range(len(ranks))]

    def config(r):
        return peft.LoraConfig(r=r, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, use_dora=True)

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=bias)), config(ranks[0]), names[0])
    for name, r in zip(names[1:], ranks[1:]):
        model.add_adapter(name, config(r))
    layer = model.base_model.model[0]
    A, B = [layer.lora_A[n].weight for n in names], [layer.lora_B[n].weight for n in names]
    magnitudes = [layer.lora_magnitude_vector[n].weight for n in names]
    with torch.no_grad():
        for t in (*A, *B, *magnitudes):
            t.normal_()
    bank = mtk.LoraBank.from_factors(A, B, [layer.scaling[n] for n in names], dropout=dropout, seeds=[4, 5, 6])
    return model, layer, names, bank, magnitudes


class Masked(torch.nn.Module):
    """Our mask in PEFT's place for its dropout."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("case", ["eval", "train", "train with dropout", "train without a base bias"])
def test_peft_layers_one_adapter_at_a_time(case):
    """Outputs and the gradients of x, A, B, the magnitudes and the base of a mixed batch, against PEFT on each adapter's rows."""
    dropout = 0.5 if "dropout" in case else 0.0
    model, layer, names, bank, magnitudes = peft_layer(pytest.importorskip("peft"), dropout, bias="without" not in case)
    model.train(case != "eval")
    base = layer.base_layer
    x, ids = torch.randn(21, 24, requires_grad=True), torch.randint(0, 3, (21,))
    leaves = [x, base.weight, *([] if base.bias is None else [base.bias]), *bank.params_A, *bank.params_B, *magnitudes]
    with mtk.backend("reference"):
        plan = mtk.group_plan(ids, 3, step=5)
        masks = mtk.dora_dropout(torch.ones(21, 24), bank, plan)
        for t in leaves:
            t.requires_grad_()
        ours = mtk.dora_linear(x, base.weight, base.bias, bank, magnitudes, plan, training=model.training)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, leaves, upstream)
    expected, totals = torch.empty_like(ours), [torch.zeros_like(t) for t in leaves]
    for i, name in enumerate(names):
        model.set_adapter(name)
        if dropout:
            layer.lora_dropout[name] = Masked(masks[ids == i])
        for t in leaves:
            t.requires_grad_()
        out = model(x[ids == i])
        expected[ids == i] = out.detach()
        for total, g in zip(totals, torch.autograd.grad(out, leaves, upstream[ids == i], allow_unused=True)):
            total += 0 if g is None else g
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, totals):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_peft_initial_magnitudes_and_embeddings():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Embedding(30, 12)), peft.LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    magnitude, weight = layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight
    bank = mtk.LoraBank.from_factors([A], [B], layer.scaling["default"])
    with mtk.backend("reference"):
        norm = mtk.dora_norm(weight.T, bank)
        torch.testing.assert_close(norm[0], magnitude.detach())
        with torch.no_grad():
            magnitude.normal_()
        tokens = torch.randint(0, 30, (7,))
        plan = mtk.group_plan(torch.zeros(7, dtype=torch.int64), 1)
        ours = mtk.dora_rescale(mtk.lora_embedding(tokens, weight, bank, plan), mtk.dora_scale(weight.T, bank, [magnitude]), plan)
    torch.testing.assert_close(ours, model(tokens))


def test_scale_of_magnitudes():
    bank = bank_of((4, 2, 3), 20, 10, CPU)
    weight, given = torch.randn(10, 20, requires_grad=True), [torch.randn(10, requires_grad=True) for _ in range(3)]
    norm = exact_norm(weight.detach(), bank).float()
    scale = mtk.dora_scale(weight, bank, given)
    torch.testing.assert_close(scale, torch.stack(given) / norm)
    upstream = torch.randn(3, 10)
    assert torch.autograd.grad(scale, [weight, *given], upstream, allow_unused=True)[0] is None
    torch.testing.assert_close(torch.autograd.grad(mtk.dora_scale(weight, bank, given), given, upstream), (upstream / norm).unbind())
    torch.testing.assert_close(mtk.dora_scale(weight, bank, torch.stack(given)), scale)
    mixed = mtk.dora_scale(weight, bank, [given[0], None, given[2]])
    assert torch.equal(mixed[1], torch.ones(10))
    torch.testing.assert_close(mixed[::2], scale[::2])
    torch.testing.assert_close(mtk.dora_scale(weight, bank, given, eps=100.0), torch.stack(given) / 100)
    assert torch.equal(mtk.dora_scale(weight, bank, given, norm=torch.full((3, 10), 2.0)), torch.stack(given) / 2)


def test_rows_without_dora_and_a_quantised_base():
    """None marks a plain adapter; a base of another kind goes through lora_delta and dora_rescale."""
    bank = bank_of((4, 2, 3), 20, 10, CPU)
    weight, bias, x = torch.randn(10, 20), torch.randn(10), torch.randn(8, 20)
    magnitudes = [torch.randn(10), None, torch.randn(10)]
    ids = torch.tensor([1, 0, -1, 2, 1, 1, -1, 0])
    with mtk.backend("reference"):
        plan = mtk.group_plan(ids, 3)
        y = mtk.dora_linear(x, weight, bias, bank, magnitudes, plan)
        plain = mtk.lora_linear(x, weight, bias, bank, plan)
        external = mtk.dora_rescale(mtk.lora_delta(x, bank, plan, out=x @ weight.T), mtk.dora_scale(weight, bank, magnitudes), plan, bias)
    torch.testing.assert_close(y[ids == 1], plain[ids == 1])
    torch.testing.assert_close(y[ids == -1], F.linear(x, weight, bias)[ids == -1])
    torch.testing.assert_close(external, y)


def test_errors():
    bank = bank_of((4, 2), 20, 10, CPU, dropout=0.5)
    weight, x = torch.randn(10, 20), torch.randn(2, 20)
    magnitudes, plan = [torch.randn(10)] * 2, mtk.group_plan(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"dora_norm: weight is \(20, 10\), the bank maps 20 -> 10; weight is \[O, D\]"):
        mtk.dora_norm(weight.T, bank)
    with pytest.raises(TypeError, match="dora_norm: weight is torch.int8; dequantise it"):
        mtk.dora_norm(weight.to(torch.int8), bank)
    with pytest.raises(ValueError, match=r"dora_scale: magnitudes are \[\(10,\), \(9,\)\]; give one \[10\] or None for each of the 2 adapters"):
        mtk.dora_scale(weight, bank, [magnitudes[0], torch.randn(9)])
    with pytest.raises(ValueError, match=r"dora_scale: norm is \(1, 10\); dora_norm\(weight, bank\) gives \(2, 10\)"):
        mtk.dora_scale(weight, bank, magnitudes, norm=torch.ones(1, 10))
    with pytest.raises(ValueError, match=r"the plan's ids are \(2, 1\); one id per row"):
        mtk.dora_linear(x, weight, None, bank, magnitudes, mtk.group_plan(torch.tensor([[0], [1]]), 2))
    with pytest.raises(ValueError, match="batch_invariant takes layers without dropout"):
        mtk.dora_linear(x, weight, None, bank, magnitudes, plan, batch_invariant=True)
    with pytest.raises(ValueError, match=r"dora_rescale: scale is torch.bfloat16 \(2, 10\) on cpu; z takes torch.float32 \[adapters, 10\] on cpu"):
        mtk.dora_rescale(torch.randn(2, 10), torch.ones(2, 10).bfloat16(), plan)
    with pytest.raises(ValueError, match="the plan has 2 groups, but there are 3 rows of scale"):
        mtk.dora_rescale(torch.randn(2, 10), torch.ones(3, 10), plan)
    with pytest.raises(TypeError, match="base is torch.float64"):
        mtk.dora_rescale(torch.randn(2, 10), torch.ones(2, 10), plan, torch.ones(10).double())
