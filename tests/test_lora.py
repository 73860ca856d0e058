import pytest
import torch

import mtkernels as mtk
from mtkernels.reference.philox import keep_mask, philox4x32
from mtkernels.testing import PROBLEMS, assert_accurate, plain_lora


def bank_and_leaves(ranks, n_in, n_out, way, dtype=torch.float32, **kw):
    A = [torch.randn(r, n_in, device=way.device).to(dtype).requires_grad_() for r in ranks]
    B = [torch.randn(n_out, r, device=way.device).to(dtype).requires_grad_() for r in ranks]
    scale = [0.5 + i for i in range(len(ranks))]
    return mtk.LoraBank.from_factors(A, B, scale, seeds=list(range(len(ranks))), **kw), A, B


def compare(x, ids, bank, leaves, way, rtol=2e-4, **kw):
    plan = mtk.group_plan(ids, len(bank), step=5, backend=way.backend)
    ours = mtk.lora_delta(x, bank, plan, site=2, backend=way.backend, **kw)
    plain = plain_lora(x, x.new_zeros(len(x), bank.out_features), bank, ids, 5, 2)
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol * float(plain.detach().abs().max()))
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(plain, leaves, upstream, allow_unused=True)):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max([1e-3, *b.abs().flatten().tolist()]))


def test_philox_known_answers():
    zero = torch.zeros((), dtype=torch.int64)
    assert [f"{int(w):08x}" for w in philox4x32((zero,) * 4, (0, 0), rounds=10)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{int(w):08x}" for w in philox4x32((zero,) * 4, (0, 0))] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


@pytest.mark.parametrize("n_cols", [8, 37, 200])
@pytest.mark.parametrize("seed", [1, -3, 2**62 + 12345])
def test_mask_bits_are_the_contract(seed, n_cols, way):
    """An identity adapter on all-ones rows returns the mask itself, which must equal the reference bit for bit."""
    step = torch.tensor(2**32 + 77, device=way.device)
    eye = torch.eye(n_cols, device=way.device)
    other = torch.zeros(1, n_cols, device=way.device)
    bank = mtk.LoraBank.from_factors([other, eye], [other.T.clone(), eye], 1.0, dropout=[0.5, 0.3], seeds=[0, seed])
    ids = torch.tensor([1, 0, 1, -1, 1, 1], device=way.device)
    plan = mtk.group_plan(ids, 2, step=step, backend=way.backend)
    y = mtk.lora_delta(torch.ones(6, n_cols, device=way.device), bank, plan, site=9, backend=way.backend)
    threshold = round(0.3 * 65536)
    keep = keep_mask(4, n_cols, threshold, seed, torch.tensor(2**32 + 77), 9, "cpu")
    torch.testing.assert_close(y[ids == 1].cpu(), keep * (65536 / (65536 - threshold)))
    assert not y[3].any()
    step.add_(1)
    assert not torch.equal(mtk.lora_delta(torch.ones(6, n_cols, device=way.device), bank, plan, site=9, backend=way.backend), y)


@pytest.mark.parametrize("p, kept", [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_extremes(p, kept, way):
    bank, _, _ = bank_and_leaves([4], 16, 8, way, dropout=p)
    x, ids = torch.randn(5, 16, device=way.device), torch.zeros(5, dtype=torch.int64, device=way.device)
    plan = mtk.group_plan(ids, 1, backend=way.backend)
    y = mtk.lora_delta(x, bank, plan, backend=way.backend)
    evaluated = mtk.lora_delta(x, bank, plan, training=False, backend=way.backend)
    assert torch.equal(y, evaluated) if kept else not y.any()


def test_dropout_rate_and_sites_differ(way):
    n = 32 if way.name == "interpret" else 256
    eye = torch.eye(64, device=way.device)
    bank = mtk.LoraBank.from_factors([eye], [eye], 1.0, dropout=0.25, seeds=[3])
    plan = mtk.group_plan(torch.zeros(n, dtype=torch.int64, device=way.device), 1, step=0, backend=way.backend)
    masks = [mtk.lora_delta(torch.ones(n, 64, device=way.device), bank, plan, site=s, backend=way.backend) > 0 for s in (0, 1)]
    assert abs(masks[0].float().mean().item() - 0.75) < 0.03
    assert 0.5 < (masks[0] == masks[1]).float().mean().item() < 0.75


SHAPES = {
    "ranks 0 1 3 7 16 33": ([0, 1, 3, 7, 16, 33], 40, 24, [0, 1, 2, 3, 4, 5, 5, -1, 2, 1]),
    "rank 200, odd widths": ([200, 2], 37, 53, [0, 1, 0, -1, 0]),
    "rank wider than both sides": ([70], 10, 6, [0, 0, 0]),
    "one column, one output": ([2, 1], 1, 1, [0, 1, 1]),
    "one fat adapter": ([5, 8, 3], 33, 20, [1] * 150 + [0, 2]),
    "single row": ([4], 24, 16, [0]),
    "adapters without rows": ([4, 4, 4], 24, 16, [1, 1]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_shapes(shape, way):
    ranks, n_in, n_out, ids = SHAPES[shape]
    bank, A, B = bank_and_leaves(ranks, n_in, n_out, way, dropout=0.25)
    x = torch.randn(len(ids), n_in, device=way.device, requires_grad=True)
    compare(x, torch.tensor(ids, device=way.device), bank, [x, *A, *B], way)


def test_a_fat_adapter_over_several_chunks(way):
    n_rows = 2300 if way.name != "interpret" else 1100
    bank, A, B = bank_and_leaves([8, 3], 24, 16, way, dropout=0.1)
    x = torch.randn(n_rows, 24, device=way.device, requires_grad=True)
    compare(x, (torch.rand(n_rows, device=way.device) < 0.05).long(), bank, [x, *A, *B], way)


@pytest.mark.parametrize("layout", ["row stride", "transposed", "expanded"])
def test_strides_of_x_and_dy(layout, way):
    bank, A, B = bank_and_leaves([4, 2], 24, 16, way)
    x = {"row stride": torch.randn(6, 40, device=way.device)[:, 3:27], "transposed": torch.randn(24, 6, device=way.device).T, "expanded": torch.randn(24, device=way.device).expand(6, 24)}[layout]
    x = x.detach().requires_grad_()
    ids = torch.tensor([0, 1, -1, 1, 0, 0], device=way.device)
    plan = mtk.group_plan(ids, 2, backend=way.backend)
    dense = x.detach().contiguous().requires_grad_()
    upstream = torch.randn(16, 6, device=way.device).T
    results = [torch.autograd.grad(mtk.lora_delta(t, bank, plan, backend=way.backend), [t, *A, *B], upstream) for t in (x, dense)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    weight = torch.randn(16, 24, device=way.device)
    grads = torch.autograd.grad(mtk.lora_linear(x, weight, None, bank, plan, backend=way.backend), [x, *A, *B], upstream)
    torch.testing.assert_close(grads[0], results[1][0] + upstream @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_factors_in_another_dtype(dtypes, way):
    x_dtype, factor_dtype = dtypes
    ids = [0, 2, 4, -1, 2, 5, 5]
    kw = dict(factor_dtype=factor_dtype)
    ours = PROBLEMS["lora_delta"](ids, x_dtype, way.device, backend=way.backend, **kw).results()
    plain, exact = PROBLEMS["lora_delta"](ids, x_dtype, way.device, **kw), PROBLEMS["lora_delta"](ids, x_dtype, way.device, exact=True, **kw)
    plain, exact = plain.results(plain.plain), exact.results(exact.plain)
    for key in exact:
        assert ours[key].dtype == {"out": x_dtype, "x": x_dtype, "scale": torch.float32}.get(key, factor_dtype)
        assert_accurate(ours[key], plain[key], exact[key], ours[key].dtype, key)


def test_leading_dimensions_and_bias(way):
    bank, _, _ = bank_and_leaves([4, 2], 24, 16, way)
    x, weight, bias = (torch.randn(*s, device=way.device) for s in ((2, 3, 24), (16, 24), (16,)))
    ids = torch.tensor([0, 1, -1, 1, 0, 0], device=way.device)
    plan = mtk.group_plan(ids, 2, backend=way.backend)
    y = mtk.lora_linear(x, weight, bias, bank, plan, backend=way.backend)
    base = torch.nn.functional.linear(x, weight, bias)
    assert y.shape == (2, 3, 16)
    torch.testing.assert_close(mtk.lora_delta(x, bank, plan, base, backend=way.backend), y)
    torch.testing.assert_close(y[0, 2], base[0, 2])


def test_out_is_never_written(way):
    bank, _, _ = bank_and_leaves([4], 8, 6, way)
    x, out = torch.randn(3, 8, device=way.device), torch.randn(3, 6, device=way.device)
    before = out.clone()
    mtk.lora_delta(x, bank, mtk.group_plan(torch.zeros(3, dtype=torch.int64, device=way.device), 1, backend=way.backend), out, backend=way.backend)
    assert torch.equal(out, before)


def test_factors_and_weight_changed_in_place_are_seen(way):
    bank, A, B = bank_and_leaves([4], 8, 6, way)
    x, weight = torch.randn(3, 8, device=way.device), torch.randn(6, 8, device=way.device)
    plan = mtk.group_plan(torch.zeros(3, dtype=torch.int64, device=way.device), 1, backend=way.backend)
    for t in (weight, A[0], B[0]):
        with torch.no_grad():
            t.mul_(2)
        y = mtk.lora_linear(x, weight, None, bank, plan, backend=way.backend)
        torch.testing.assert_close(y, x @ weight.T + 0.5 * (x @ A[0].T @ B[0].T), rtol=1e-4, atol=1e-4)


def test_gradients_reach_generated_factors(way):
    """A and B that are not leaves: a hypernetwork's output."""
    code = torch.randn(5, device=way.device, requires_grad=True)
    maps = torch.randn(4 * 8 + 6 * 4, 5, device=way.device)

    def loss(backend):
        flat = maps @ code
        bank = mtk.LoraBank.from_factors([flat[:32].view(4, 8)], [flat[32:].view(6, 4)], 1.0, seeds=[0])
        x = torch.arange(24.0, device=way.device).view(3, 8) / 24
        return mtk.lora_delta(x, bank, mtk.group_plan(torch.zeros(3, dtype=torch.int64, device=way.device), 1), backend=backend).square().sum()

    torch.testing.assert_close(*(torch.autograd.grad(loss(b), code)[0] for b in (way.backend, "reference")), rtol=1e-4, atol=1e-4)


def test_frozen_adapters_still_pass_the_gradient_to_x(way):
    bank, A, B = bank_and_leaves([4, 2], 8, 6, way, dropout=0.5)
    x, weight = torch.randn(3, 8, device=way.device, requires_grad=True), torch.randn(6, 8, device=way.device)
    plan = mtk.group_plan(torch.tensor([1, -1, 0], device=way.device), 2, backend=way.backend)
    upstream, grads = torch.randn(3, 6, device=way.device), []
    for trainable in (True, False):
        for t in (*A, *B):
            t.requires_grad_(trainable)
        grads.append(torch.autograd.grad(mtk.lora_linear(x, weight, None, bank, plan, backend=way.backend), x, upstream)[0])
    assert torch.equal(*grads)


def test_saved_for_backward_is_x_and_s():
    bank, A, B = bank_and_leaves([4, 16], 256, 256, type("W", (), {"device": "cpu"}), dropout=0.1)
    x, weight = torch.randn(512, 256, requires_grad=True), torch.randn(256, 256)
    plan = mtk.group_plan(torch.randint(0, 2, (512,)), 2)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        mtk.lora_linear(x, weight, None, bank, plan)
    row_sized = [t for t in saved.values() if t.dim() == 2 and t.shape[0] == 512]
    assert sorted(t.shape[1] for t in row_sized) == [16, 256]
    assert any(t.data_ptr() == x.data_ptr() for t in row_sized)


def test_offsets_past_two_to_the_31(kernel_way):
    """Rows whose element offset in x exceeds 2^31, through a row stride; only the touched pages exist."""
    stride = 2**30 + 64
    storage = torch.empty(2 * stride + 64, dtype=torch.float16, device=kernel_way.device)
    x = storage.as_strided((3, 32), (stride, 1))
    x.copy_(torch.randn(3, 32))
    bank, A, B = bank_and_leaves([4], 32, 16, kernel_way, torch.float16)
    plan = mtk.group_plan(torch.zeros(3, dtype=torch.int64, device=kernel_way.device), 1, backend=kernel_way.backend)
    upstream = torch.randn(3, 16, device=kernel_way.device).half()
    far, near = (mtk.lora_delta(t, bank, plan, backend=kernel_way.backend) for t in (x, x.contiguous()))
    assert torch.equal(far, near)
    assert torch.equal(*(torch.autograd.grad(y, A[0], upstream)[0] for y in (far, near)))


def test_bad_input_is_named():
    way = type("W", (), {"device": "cpu"})
    bank, A, B = bank_and_leaves([4, 2], 8, 6, way)
    x, weight, plan = torch.randn(3, 8), torch.randn(6, 8), mtk.group_plan(torch.tensor([0, 1, -1]), 2)
    cases = [
        (TypeError, "x is torch.int64; give float32", lambda: mtk.lora_linear(x.long(), weight, None, bank, plan)),
        (ValueError, r"x is \(3, 7\), the bank takes 8 features", lambda: mtk.lora_linear(x[:, :7], weight, None, bank, plan)),
        (ValueError, r"weight is \(8, 6\)", lambda: mtk.lora_linear(x, weight.T, None, bank, plan)),
        (ValueError, r"bias is \(5,\)", lambda: mtk.lora_linear(x, weight, torch.zeros(5), bank, plan)),
        (TypeError, "weight is torch.float16, x is torch.float32", lambda: mtk.lora_linear(x, weight.half(), None, bank, plan)),
        (ValueError, "the plan has 3 groups, but there are 2 adapters", lambda: mtk.lora_linear(x, weight, None, bank, mtk.group_plan(plan.ids, 3))),
        (ValueError, "the plan covers 3 rows, but the input has 2", lambda: mtk.lora_delta(x[:2], bank, plan)),
        (ValueError, "x is on meta, the bank on cpu", lambda: mtk.lora_delta(x.to("meta"), bank, plan)),
        (TypeError, "bank is a list; build one with LoraBank.from_factors", lambda: mtk.lora_delta(x, A, plan)),
        (TypeError, "plan is a Tensor; build one with group_plan", lambda: mtk.lora_delta(x, bank, plan.ids)),
        (ValueError, r"out is \(3, 5\)", lambda: mtk.lora_delta(x, bank, plan, torch.zeros(3, 5))),
        (ValueError, r"gates is \(3, 8\); give one per id of the plan, \(3,\)", lambda: mtk.lora_delta(x, bank, plan, gates=x)),
        (ValueError, "adapter 1 has rank 2 in A .* but 4 in B", lambda: mtk.LoraBank.from_factors(A, [B[0], B[0]], 1.0)),
        (ValueError, "adapter 1 maps 9 -> 6 features, adapter 0 maps 8 -> 6", lambda: mtk.LoraBank.from_factors([A[0], torch.randn(2, 9)], B, 1.0)),
        (ValueError, "use one dtype and device", lambda: mtk.LoraBank.from_factors([A[0], A[1].half()], B, 1.0)),
        (ValueError, r"A\[0\] is torch.int64", lambda: mtk.LoraBank.from_factors([A[0].long()], B[:1], 1.0)),
        (ValueError, "2 A and 1 B factors", lambda: mtk.LoraBank.from_factors(A, B[:1], 1.0)),
        (ValueError, "at least one", lambda: mtk.LoraBank.from_factors([], [], 1.0)),
        (ValueError, "probabilities are in", lambda: mtk.LoraBank.from_factors(A, B, 1.0, dropout=1.5)),
        (ValueError, r"scale has shape \(3,\)", lambda: mtk.LoraBank.from_factors(A, B, [1.0, 2, 3])),
        (ValueError, r"bias\[0\] is torch.float32 \(5,\)", lambda: mtk.LoraBank.from_factors(A, B, 1.0, bias=[torch.zeros(5), None])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
