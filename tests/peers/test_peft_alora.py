"""Activated LoRA by per-token ids against PEFT's own layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mtkernels as mtk


@pytest.mark.parametrize("offsets", [[3, None, 9, 5], [5, 5, 5, 5], [None] * 4], ids=str)
def test_alora_offsets(offsets, way):
    B, S, D, O = 4, 5, 12, 8
    model = get_peft_model(nn.Sequential(nn.Linear(D, O)), LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, alora_invocation_tokens=[1]))
    layer = model.base_model.model[0]
    x = torch.randn(B, S, D)
    theirs = layer(x, alora_offsets=offsets)
    A, B_factor = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plan = mtk.group_plan(mtk.alora_ids(torch.zeros(B, dtype=torch.int64), offsets, S).flatten(), 1, backend=way.backend)
    bank = mtk.LoraBank.from_factors([A], [B_factor], layer.scaling["default"])
    base = layer.base_layer
    ours = mtk.lora_linear(x, base.weight, base.bias, bank, plan, backend=way.backend)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, their in zip(torch.autograd.grad(ours, [A, B_factor], upstream), torch.autograd.grad(theirs, [A, B_factor], upstream)):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"ids are \(3,\), offsets \(2,\)"):
        mtk.alora_ids(torch.zeros(3, dtype=torch.int64), [1, 2], 4)
