"""Edges and errors of swiglu_lora_shrink; lora_swiglu_mlp against transformers' MLPs with PEFT's layers."""

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels.testing import plain_lora, plain_rmsnorm
from mtkernels.testing.producers import plain_s

ACTS = {"silu": F.silu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


def bank_of(ranks, n_in, way, n_out=8, dtype=torch.float32, **options):
    A = [torch.randn(r, n_in, device=way.device).to(dtype).requires_grad_() for r in ranks]
    B = [torch.randn(n_out, r, device=way.device).to(dtype).requires_grad_() for r in ranks]
    return mtk.LoraBank.from_factors(A, B, [0.5 + i for i in range(len(ranks))], **{"seeds": list(range(len(ranks))), **options})


def rows(way, *shape):
    return torch.randn(*shape, device=way.device).requires_grad_()


def assert_same_gradients(ours, plain, leaves, rtol=2e-4):
    upstream = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()) if b.numel() else 0)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream, allow_unused=True)):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max([1e-3, *b.abs().flatten().tolist()]))


def compare(gate, up, bank, ids, way, act="silu"):
    plan = mtk.group_plan(ids, len(bank), step=11, backend=way.backend)
    ours = mtk.swiglu_lora_shrink(gate, up, bank, plan, act=act, site=4, backend=way.backend)
    h = ACTS[act](gate) * up
    assert_same_gradients(ours, (h, plain_s(h, [bank], ids, [4])), [gate, up, *(a for a in bank.params_A if a.numel())])


SHAPES = {
    "ranks 0 1 3 7 16 33": ([0, 1, 3, 7, 16, 33], 40, [0, 1, 2, 3, 4, 5, 5, -1, 2, 1]),
    "rank 200, odd width": ([200, 2], 37, [0, 1, 0, -1, 0]),
    "rank 70": ([70], 10, [0, 0, 0]),
    "one column": ([2, 1], 1, [0, 1, 1]),
    "one fat adapter": ([5, 8, 3], 133, [1] * 150 + [0, 2]),
    "adapters without rows": ([4, 4, 4], 24, [1, 1]),
    "rank 0 alone": ([0, 0], 24, [1, 0, -1]),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, act, way):
    ranks, n_in, ids = SHAPES[shape]
    bank = bank_of(ranks, n_in, way, dropout=0.3)
    compare(rows(way, len(ids), n_in), rows(way, len(ids), n_in), bank, torch.tensor(ids, device=way.device), way, act)


def test_several_chunks(way):
    n = 1100 if way.name == "interpret" else 2500
    ids = torch.tensor([1] * n + [0] * 3 + [-1] * 300, device=way.device)[torch.randperm(n + 303)]
    compare(rows(way, len(ids), 12), rows(way, len(ids), 12), bank_of([3, 70], 12, way, dropout=0.5), ids, way)


def test_rows_of_several_adapters(way):
    ids = torch.tensor([[0, 1, -1], [3, 3, 2], [-1, -1, -1], [-1, 2, 0], [1, 0, 3]], device=way.device)
    compare(rows(way, 5, 40), rows(way, 5, 40), bank_of([4, 9, 0, 70], 40, way, dropout=[0.5, 0.0, 0.2, 0.1]), ids, way)


def test_halves_of_one_tensor(way):
    both, bank = rows(way, 6, 80), bank_of([3, 20], 40, way, dropout=0.2)
    ids = torch.tensor([0, 1, 1, -1, 0, 1], device=way.device)
    plan = mtk.group_plan(ids, 2, step=11, backend=way.backend)
    h, s = mtk.swiglu_lora_shrink(both[:, :40], both[:, 40:], bank, plan, site=4, backend=way.backend)
    plain = F.silu(both[:, :40]) * both[:, 40:]
    assert_same_gradients((h, s), (plain, plain_s(plain, [bank], ids, [4])), [both, *bank.A])


@pytest.mark.parametrize("act", ACTS)
def test_extreme_gates(act, way):
    gate = torch.tensor([[-1e4, -90.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 90.0, 1e4, float("nan")]], device=way.device).requires_grad_()
    up, bank = torch.full_like(gate, 1.5).requires_grad_(), bank_of([2], 10, way)
    plan = mtk.group_plan(torch.tensor([-1], device=way.device), 1, backend=way.backend)
    h, _ = mtk.swiglu_lora_shrink(gate, up, bank, plan, act=act, backend=way.backend)
    plain = ACTS[act](gate) * up
    torch.testing.assert_close(h, plain, rtol=1e-5, atol=1e-30, equal_nan=True)
    for a, b in zip(torch.autograd.grad(h.sum(), (gate, up)), torch.autograd.grad(plain.sum(), (gate, up))):
        torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-5, atol=1e-6)
        assert a[0, -1].isnan() or act == "gelu_tanh" and not b[0, -1].isnan()


@pytest.mark.parametrize("wanted", ["gate", "up", "A"])
def test_frozen_parts(wanted, way):
    gate, up, bank = rows(way, 9, 40), rows(way, 9, 40), bank_of([3, 20], 40, way, dropout=0.25)
    plan = mtk.group_plan(torch.tensor([0, 1, 1, -1, 0, 1, 0, 0, 1], device=way.device), 2, step=3, backend=way.backend)
    leaf = dict(gate=gate, up=up, A=bank.A[1])[wanted]

    def gradient(frozen):
        for t in (gate, up, *bank.A):
            t.requires_grad_(not frozen or t is leaf)
        h, s = mtk.swiglu_lora_shrink(gate, up, bank, plan, backend=way.backend)
        return torch.autograd.grad(h.sin().sum() + s.square().sum(), [leaf])[0]

    assert torch.equal(gradient(False), gradient(True))


class Mlp:
    """transformers' MLP behind its norm, and the same weights as arguments of lora_swiglu_mlp."""

    def __init__(self, family, way, D=24, H=40, ranks=(3, 5)):
        modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        configuration = pytest.importorskip(f"transformers.models.{family}.configuration_{family}")
        peft = pytest.importorskip("peft")
        name, self.offset, self.act = {"llama": ("Llama", 0.0, "silu"), "gemma": ("Gemma", 1.0, "gelu_tanh")}[family]
        config = getattr(configuration, f"{name}Config")(hidden_size=D, intermediate_size=H, num_attention_heads=4, num_key_value_heads=4)
        self.norm = getattr(modeling, f"{name}RMSNorm")(D, eps=1e-6).to(way.device)
        torch.nn.init.normal_(self.norm.weight)
        model, names = torch.nn.Sequential(getattr(modeling, f"{name}MLP")(config)), ["gate_proj", "up_proj", "down_proj"]
        for i, r in enumerate(ranks):
            options = dict(r=r, lora_alpha=2 * r + i, target_modules=names, init_lora_weights=False)
            if i == 0:
                self.model = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name="a0")
            else:
                self.model.add_adapter(f"a{i}", peft.LoraConfig(**options))
        self.model.to(way.device)
        self.layers = [getattr(self.model.base_model.model[0], n) for n in names]
        self.weights = [layer.base_layer.weight for layer in self.layers]
        self.factors = [[getattr(layer, side)[f"a{i}"].weight for i in range(len(ranks))] for layer in self.layers for side in ("lora_A", "lora_B")]
        scale = [2 + i / r for i, r in enumerate(ranks)]
        self.banks = [mtk.LoraBank.from_factors(self.factors[2 * g], self.factors[2 * g + 1], scale) for g in range(3)]
        self.leaves = [t.requires_grad_() for factors in self.factors for t in factors]

    def solo(self, x, ids, norm):
        """Every adapter on its own rows, as PEFT trains them."""
        x, y = self.norm(x) if norm else x, torch.zeros_like(x)
        for i in set(ids.tolist()):
            at = (ids == i).nonzero()[:, 0]
            if i < 0:
                with self.model.disable_adapter():
                    y = y.index_add(0, at, self.model(x[at]))
            else:
                self.model.set_adapter(f"a{i}")
                y = y.index_add(0, at, self.model(x[at]))
        for t in self.leaves:
            t.requires_grad_()
        return y


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_mlp_as_transformers_with_peft(family, norm, way):
    mlp, x = Mlp(family, way), rows(way, 9, 24)
    ids = torch.tensor([0, 1, 1, -1, 0, 1, 0, -1, 1], device=way.device)
    plan = mtk.group_plan(ids, 2, backend=way.backend)
    plain = mlp.solo(x, ids, norm)
    options = dict(norm=(mlp.norm.weight, 1e-6), offset=mlp.offset) if norm else {}
    ours = mtk.lora_swiglu_mlp(x, *mlp.weights, mlp.banks, plan, act=mlp.act, backend=way.backend, **options)
    assert_same_gradients([ours], [plain], [x, *([mlp.norm.weight] if norm else []), *mlp.leaves])


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
def test_mlp_as_its_parts_with_dropout_and_biases(norm, way):
    D, H, ids = 24, 40, torch.tensor([0, 1, 1, -1, 2, 1, 0, -1], device=way.device)
    x, gamma = rows(way, 2, 4, D), rows(way, D)
    shapes = ((H, D), (H, D), (D, H))
    weights, biases = [rows(way, *s) for s in shapes], [rows(way, H), None, rows(way, D)]
    banks = [bank_of(r, s[1], way, n_out=s[0], dropout=[0.5, 0.1, 0.0]) for r, s in zip(([3, 7, 0], [2, 1, 4], [5, 20, 1]), shapes)]
    plan = mtk.group_plan(ids, 3, step=5, backend=way.backend)
    ours = mtk.lora_swiglu_mlp(
        x, *weights, banks, plan, biases=biases, norm=(gamma, 1e-5) if norm else None, sites=(7, 8, 9), backend=way.backend
    )
    xn = plain_rmsnorm(x, gamma, 1e-5).view(-1, D) if norm else x.view(-1, D)
    gate, up = (plain_lora(xn, F.linear(xn, w, b), bank, ids, 5, site) for w, b, bank, site in zip(weights, biases, banks, (7, 8)))
    h = F.silu(gate) * up
    plain = plain_lora(h, F.linear(h, weights[2], biases[2]), banks[2], ids, 5, 9).view(x.shape)
    leaves = [x, *([gamma] if norm else []), *weights, biases[0], biases[2], *(t for b in banks for t in (*b.A, *b.B) if t.numel())]
    assert_same_gradients([ours], [plain], leaves)


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
def test_mlp_saves_no_h_and_no_mask(norm, way):
    D, H, T = 24, 40, 9
    x, gamma, shapes = rows(way, T, D), torch.ones(D, device=way.device), ((H, D), (H, D), (D, H))
    weights = [torch.randn(*s, device=way.device) for s in shapes]
    banks = [bank_of([3, 5], s[1], way, n_out=s[0], dropout=0.5) for s in shapes]
    plan, kept = mtk.group_plan(torch.tensor([0, 1, 1, -1, 0, 1, 0, -1, 1], device=way.device), 2, backend=way.backend), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mtk.lora_swiglu_mlp(x, *weights, banks, plan, norm=(gamma, 1e-5) if norm else None, backend=way.backend).sum().backward()
    given = (x, gamma, *weights, *plan.tensors(), *(t for bank in banks for t in bank.tensors()))
    known = {t.untyped_storage().data_ptr() for t in given}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept if t.untyped_storage().data_ptr() not in known}
    small = [T * 10, T * 5] + [T] * norm  # s of gate and up, s of down, 1 / rms
    assert sorted(new.values()) == sorted([T * H, T * H, *small]), "more than gate, up and rank space is kept"


def test_errors(way):
    gate, bank = torch.randn(3, 8, device=way.device), bank_of([2], 8, way)
    plan = mtk.group_plan(torch.tensor([0, 0, -1], device=way.device), 1, backend=way.backend)
    with pytest.raises(ValueError, match=r"up is \(3, 7\), gate is \(3, 8\)"):
        mtk.swiglu_lora_shrink(gate, gate[:, :7], bank, plan)
    with pytest.raises(TypeError, match="up is torch.float64"):
        mtk.swiglu_lora_shrink(gate, gate.double(), bank, plan)
    with pytest.raises(ValueError, match="act is 'relu'; give 'silu' or 'gelu_tanh'"):
        mtk.swiglu_lora_shrink(gate, gate, bank, plan, act="relu")
    with pytest.raises(ValueError, match="1 banks, 3 biases and 3 sites"):
        mtk.lora_swiglu_mlp(gate, gate, gate, gate, [bank], plan)
