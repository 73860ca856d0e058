"""PEFT's LoRA on expert parameters (ParamWrapper: W + s B A of every expert is made, one adapter a batch) against moe_lora_linear."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

import mtkernels as mtk

T, K, E, D, O = 23, 2, 4, 24, 40
RANKS = {"first": 3, "second": 5}


class Experts(nn.Module):
    """As transformers stores them: [E, O, D]; routed rows are multiplied one expert after the other and weighted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, O, D) * D**-0.5)

    def forward(self, x, experts, gates):
        y, weight = x.new_zeros(len(x), O), self.weight
        for e in range(E):
            t, k = (experts == e).nonzero(as_tuple=True)
            y = y.index_add(0, t, (x[t] @ weight[e].T) * gates[t, k][:, None])
        return y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x, experts, gates):
        return self.experts(x, experts, gates)


@pytest.fixture
def model():
    configs = [LoraConfig(r=r, lora_alpha=2 * r + i, target_parameters=["experts.weight"], init_lora_weights=False) for i, r in enumerate(RANKS.values())]
    model = get_peft_model(Block(), configs[0], adapter_name="first")
    model.add_adapter("second", configs[1])
    return model


def wrapper_of(model):
    (found,) = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    return found


def by_peft(model, name, x, experts, gates, upstream):
    """The rows' results with one adapter, and the gradients of x, gates and its two factors."""
    model.set_adapter(name)
    wrapper, x, gates = wrapper_of(model), x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = model(x, experts, gates)
    factors = [wrapper.lora_A[name].weight, wrapper.lora_B[name].weight]
    return [y.detach(), *torch.autograd.grad(y, [x, gates, *factors], upstream)]


def by_ours(bank, params, model, x, experts, gates, upstream, adapters, n, backend):
    x, gates, weight = x.clone().requires_grad_(), gates.clone().requires_grad_(), wrapper_of(model).get_param().detach()
    plan = mtk.group_plan(mtk.expert_adapter_ids(experts, adapters, n), E * (n + 1))
    y = mtk.moe_lora_linear(x, weight, None, bank, plan, gates=gates, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [x, gates, *params], upstream)]


def draw():
    experts = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # the last expert has no rows
    return torch.randn(T, D), experts, torch.rand(T, K) + 0.1, torch.randn(T, O)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_adapter_in_pefts_own_storage(model, backend):
    """A is expert-slowest, B expert-fastest; nothing is copied."""
    x, experts, gates, upstream = draw()
    wrapper = wrapper_of(model)
    A, B = wrapper.lora_A["first"].weight, wrapper.lora_B["first"].weight
    assert A.shape == (E * 3, D) and B.shape == (O, 3 * E)
    bank = mtk.LoraBank.from_experts(A, B, E, wrapper.scaling["first"])
    ours = by_ours(bank, [A, B], model, x, experts, gates, upstream, torch.zeros(T, dtype=torch.int64), 1, backend)
    for a, b in zip(ours, by_peft(model, "first", x, experts, gates, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mixed_batch_is_each_adapter_on_its_rows(model, backend):
    """PEFT refuses a batch of several adapters; ours gives the rows, and the sums of gradients, that its batches of one give."""
    x, experts, gates, upstream = draw()
    wrapper, adapters = wrapper_of(model), torch.arange(T) % 3 - 1
    params = [p.requires_grad_() for name in RANKS for p in (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)]
    A = [wrapper.lora_A[name].weight[e * r : (e + 1) * r] for e in range(E) for name, r in RANKS.items()]
    B = [wrapper.lora_B[name].weight.view(O, r, E)[:, :, e] for e in range(E) for name, r in RANKS.items()]
    bank = mtk.LoraBank.from_factors(A, B, [wrapper.scaling[name] for name in RANKS] * E)
    y, dx, dgates, *grads = by_ours(bank, params, model, x, experts, gates, upstream, adapters, 2, backend)
    for i, name in enumerate(RANKS):
        own = adapters == i
        expected = by_peft(model, name, x[own], experts[own], gates[own], upstream[own])
        for a, b in zip([y[own], dx[own], dgates[own], *grads[2 * i : 2 * i + 2]], expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    with model.disable_adapter():
        torch.testing.assert_close(y[adapters == -1], model(x, experts, gates)[adapters == -1])
