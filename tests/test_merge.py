"""lora_merge_ and lora_unmerge_ against PEFT's merges and float64 products."""

import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk
from mtkernels import merge
from mtkernels.testing import FLOOR, assert_accurate, relative_error

RANKS = (3, 0, 8, 1)


def bank_of(n_in=20, n_out=12, dtype=torch.float32, bias=False, ranks=RANKS):
    A, B = [torch.randn(r, n_in).to(dtype) for r in ranks], [torch.randn(n_out, r).to(dtype) for r in ranks]
    beta = [torch.randn(n_out).to(dtype) if i % 2 == 0 else None for i in range(len(ranks))] if bias else None
    return mtk.LoraBank.from_factors(A, B, [0.5 + i for i in range(len(ranks))], bias=beta)


def exact_delta(bank, i):
    return (bank.scale[i].double() * (bank.B[i].double() @ bank.A[i].double())).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=["", "float32 factors"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 1 << 20])
def test_one_rounding_in_every_dtype(rows, transposed, factor_dtype, dtype, monkeypatch):
    """Any cut into row blocks, any order of the weight's dimensions; ids by index, list and coefficients."""
    monkeypatch.setattr(merge, "CHUNK_ELEMENTS", rows * 20)
    bank = bank_of(dtype=dtype if dtype == torch.float64 else factor_dtype or dtype)
    base = torch.randn(12, 20).to(dtype)
    for adapters, coefficients in ((2, {2: 1.0}), ([0, 1, 3], {0: 1.0, 1: 1.0, 3: 1.0}), ({3: -0.5, 2: 2.0}, {3: -0.5, 2: 2.0}), ([], {})):
        for sign, apply in ((1, mtk.lora_merge_), (-1, mtk.lora_unmerge_)):
            weight = base.T.clone() if transposed else base.clone()
            assert apply(weight, bank, adapters, transposed=transposed) is None
            merged = weight.T if transposed else weight
            exact = base.double() + sign * sum(c * exact_delta(bank, i) for i, c in coefficients.items())
            if dtype == torch.float64:
                torch.testing.assert_close(merged, exact)
            else:
                once = exact.to(dtype)
                assert_accurate(merged, once, exact, dtype)
                assert (merged.float() - once.float()).abs().max() <= 2 * torch.finfo(dtype).eps * once.float().abs().max()


def test_a_chunk_of_a_column_slice_is_written_in_place():
    """Any strides; what lies beside the weight stays."""
    bank, full = bank_of(), torch.randn(12, 50)
    before = full.clone()
    mtk.lora_merge_(full[:, 7:27], bank, 0)
    assert relative_error(full[:, 7:27], before[:, 7:27].double() + exact_delta(bank, 0)) < 1e-6
    assert torch.equal(full[:, :7], before[:, :7]) and torch.equal(full[:, 27:], before[:, 27:])


def peft_model(peft, module, bias=False, **config):
    names = ["a0", "a1", "a2"]

    def made(r):
        return peft.LoraConfig(r=r, lora_alpha=6, target_modules=["0"], init_lora_weights=False, lora_bias=bias, **config)

    model = peft.get_peft_model(torch.nn.Sequential(module), made(4), names[0])
    for name, r in zip(names[1:], (7, 2)):
        model.add_adapter(name, made(r))
    return model, model.base_model.model[0], names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear with lora_bias", "conv1d", "embedding"])
def test_merge_and_unload_of_peft(kind, dtype):
    """Two of three adapters, then out again; the merged layer gives what the adapted one gave."""
    peft = pytest.importorskip("peft")
    module = torch.nn.Linear(20, 12)
    config = {}
    if kind == "conv1d":
        module, config = pytest.importorskip("transformers").pytorch_utils.Conv1D(12, 20), dict(fan_in_fan_out=True)
    elif kind == "embedding":
        module = torch.nn.Embedding(20, 12)
    model, layer, names = peft_model(peft, module.to(dtype), bias="bias" in kind, **config)
    if kind == "embedding":
        A, B = [layer.lora_embedding_A[n] for n in names], [layer.lora_embedding_B[n] for n in names]
    else:
        A, B = [layer.lora_A[n].weight for n in names], [layer.lora_B[n].weight for n in names]
    beta = [layer.lora_B[n].bias for n in names] if "bias" in kind else None
    bank = mtk.LoraBank.from_factors(A, B, [layer.scaling[n] for n in names], bias=beta)
    base = layer.base_layer
    weight, original = base.weight.detach().clone(), base.weight.detach().double()
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().clone()
    original_bias = None if bias is None else bias.double()
    options = dict(bias=bias, transposed=kind in ("conv1d", "embedding"))
    mtk.lora_merge_(weight, bank, [0, 2], **options)
    deltas = sum(exact_delta(bank, i) for i in (0, 2))
    exact = original + (deltas.T if options["transposed"] else deltas)
    merged = model.merge_and_unload(adapter_names=["a0", "a2"])[0]
    assert_accurate(weight, merged.weight.detach(), exact, dtype)
    if bias is not None:
        exact_bias = original_bias + (sum(bank.scale[i] * bank.bias[i].detach().double() for i in (0, 2)) if beta else 0)
        assert_accurate(bias, merged.bias.detach(), exact_bias, dtype)
    mtk.lora_unmerge_(weight, bank, [0, 2], **options)
    assert relative_error(weight, original) < 4 * FLOOR[dtype] * float(exact.norm() / original.norm())


def test_a_parameter_that_trains_and_autocast():
    bank, layer = bank_of(n_in=64, n_out=48), torch.nn.Linear(64, 48)
    x = torch.randn(5, 64, requires_grad=True)
    exact = layer.weight.detach().double() + exact_delta(bank, 2)
    kept, out = layer.weight, layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        mtk.lora_merge_(layer.weight, bank, 2)
    assert layer.weight is kept and kept.requires_grad and kept.is_leaf and relative_error(kept.detach(), exact) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_merged_weight_gives_the_adapted_layer():
    bank, weight, x = bank_of(bias=True), torch.randn(12, 20), torch.randn(6, 20)
    bias = torch.randn(12)
    plan = mtk.group_plan(torch.full((6,), 2), 4)
    with mtk.backend("reference"):
        adapted = mtk.lora_linear(x, weight, bias, bank, plan, training=False)
    mtk.lora_merge_(weight, bank, 2, bias=bias)
    torch.testing.assert_close(F.linear(x, weight, bias), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", ["inf factor", "overflow", "nan bias"])
def test_a_result_that_is_not_finite_is_refused_before_anything_is_written(broken, monkeypatch):
    monkeypatch.setattr(merge, "CHUNK_ELEMENTS", 40)
    bank = bank_of(dtype=torch.float16, bias=True)
    weight, bias = torch.randn(12, 20).half(), torch.randn(12).half()
    if broken == "overflow":
        bank.params_A[0].fill_(300)
        bank.params_B[0][11].fill_(300)
    elif broken == "inf factor":
        bank.params_A[0][0, 0] = torch.inf
    else:
        bank.bias[0][3] = torch.nan
    before = weight.clone(), bias.clone()
    with pytest.raises(ValueError, match=r"lora_merge_: adapters \[0\] give weights that are not finite, so nothing was written"):
        mtk.lora_merge_(weight, bank, 0, bias=bias)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])
    mtk.lora_merge_(weight, bank, 0, bias=bias, allow_nonfinite=True)
    assert not (torch.isfinite(weight).all() and torch.isfinite(bias).all()) and not torch.equal(weight, before[0])


def test_errors():
    bank, weight = bank_of(bias=True), torch.randn(12, 20)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"weight is \(20, 12\), the bank maps 20 -> 12 with transposed=False; pass transposed=True"):
        mtk.lora_merge_(weight.T, bank, 1)
    with pytest.raises(ValueError, match=r"pass transposed=False"):
        mtk.lora_merge_(weight, bank, 1, transposed=True)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"weight is {dtype}, which is quantised or no float; dequantise it"):
            mtk.lora_merge_(torch.zeros(12, 20).to(dtype), bank, 1)
    packed = torch.randn(12, 20).as_subclass(type("Params4bit", (torch.Tensor,), {}))
    with pytest.raises(TypeError, match="weight is a Params4bit; dequantise or gather it"):
        mtk.lora_merge_(packed, bank, 1)
    with pytest.raises(ValueError, match=r"adapters are \[4\]; the bank has 0\.\.3"):
        mtk.lora_unmerge_(weight, bank, 4)
    with pytest.raises(ValueError, match=r"lora_unmerge_: adapters \[1, 1\] repeat one; give a dict"):
        mtk.lora_unmerge_(weight, bank, [1, 1])
    with pytest.raises(ValueError, match=r"adapters \[0\] have a bias; pass the layer's bias"):
        mtk.lora_merge_(weight, bank, [0, 1])
    with pytest.raises(ValueError, match=r"bias is \(11,\); give \[12\]"):
        mtk.lora_merge_(weight, bank, 0, bias=torch.zeros(11))
    with pytest.raises(TypeError, match="bank is a list"):
        mtk.lora_merge_(weight, [], 0)
    assert torch.equal(weight, before)
