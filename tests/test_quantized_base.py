"""lora_delta beside quantised layers: as lora_linear on their dequantised weight, and examples/quantized_base.py learns."""

import sys
from pathlib import Path

import pytest
import torch

import mtkernels as mtk

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quantized_base as example

RANKS, IDS = (4, 0, 7), [0, 2, -1, 2, 0, 2, 0, 1]


def base_of(kind, weight):
    """(layer, the weight it multiplies by)."""
    if kind == "fp8":
        layer = example.Fp8Linear(weight)
        return layer, layer.dequantized(weight.dtype)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = example.nf4_linear(weight)
    return layer, bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", example.BASES)
def test_as_lora_linear_on_the_dequantised_weight(kind, dtype):
    weight = torch.randn(48, 64).to(dtype)
    layer, dequantized = base_of(kind, weight)
    assert (dequantized - weight).norm() < 0.2 * weight.norm() and not torch.equal(dequantized, weight)
    A, B = [torch.randn(r, 64).to(dtype).requires_grad_() for r in RANKS], [torch.randn(48, r).to(dtype).requires_grad_() for r in RANKS]
    bank, plan = mtk.LoraBank.from_factors(A, B, 0.5, dropout=0.25, seeds=[1, 2, 3]), mtk.group_plan(torch.tensor(IDS), 3, step=5)
    x, upstream = torch.randn(len(IDS), 64).to(dtype).requires_grad_(), torch.randn(len(IDS), 48).to(dtype)
    results = [mtk.lora_delta(x, bank, plan, out=layer(x)), mtk.lora_linear(x, dequantized, None, bank, plan)]
    grads = [torch.autograd.grad(y, [x, *A, *B], upstream) for y in results]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, wanted in zip((results[0], *grads[0]), (results[1], *grads[1])):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max() if wanted.numel() else 0))


@pytest.mark.parametrize("kind", example.BASES)
def test_example_learns(kind):
    layer, _ = base_of(kind, torch.randn(example.O, example.D) / 16)
    changes = torch.stack([torch.randn(example.O, r) @ torch.randn(r, example.D) / (r * example.D) ** 0.5 for r in example.RANKS])
    first, last = example.train(layer, changes)
    assert (last < first / 3).all()
