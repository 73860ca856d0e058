"""Gradient checkpointing: the recompute runs the rows it ran, or raises."""

from functools import partial

import pytest
import torch
from tiny_models import base_model, lora, lora_grads, pair, tokens, wrap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mtkernels.integrations import adapters, checkpoint_context, enable

REENTRANT = {"use_reentrant": True}
PLAIN = {"use_reentrant": False}
RESTORING = {"use_reentrant": False, "context_fn": checkpoint_context}
IDS = torch.tensor([0, 1, -1, 1, 2, 0])


@pytest.fixture
def model():
    _, enabled = pair(configs=[lora(4, lora_dropout=0.3), lora(7), lora(2, lora_dropout=0.1)])
    return enabled.train()


def step(model, checkpointing=None, ids=IDS, backward_inside=True):
    model.gradient_checkpointing_disable()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()  # reentrant checkpoints want an input that requires grad
    x = tokens()
    model.zero_grad()
    torch.manual_seed(5)
    if ids is None:
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss.detach(), lora_grads(model)
    with adapters(ids):
        loss = model(input_ids=x, labels=x).loss
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return loss.detach(), lora_grads(model)


def assert_same(got, want):
    assert torch.equal(got[0], want[0]) and got[1].keys() == want[1].keys()
    assert all(torch.equal(got[1][k], want[1][k]) for k in want[1])


@pytest.mark.parametrize("checkpointing", [REENTRANT, PLAIN, RESTORING])
def test_backward_inside_the_block(model, checkpointing):
    assert_same(step(model, checkpointing), step(model))


def test_context_fn_brings_the_block_back_outside(model):
    assert_same(step(model, RESTORING, backward_inside=False), step(model))


@pytest.mark.parametrize("checkpointing", [REENTRANT, PLAIN])
def test_lost_ids_raise_by_module(model, checkpointing):
    with pytest.raises(RuntimeError, match=r"layers.1.self_attn.q_proj: runs inside backward.*context_fn"):
        step(model, checkpointing, backward_inside=False)
    with pytest.raises(RuntimeError, match="runs inside backward"):
        step(model, checkpointing, ids=None)


@pytest.mark.parametrize("checkpointing", [REENTRANT, PLAIN])
def test_backward_inside_another_block_raises(model, checkpointing):
    x = tokens()
    model.gradient_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    with adapters(IDS):
        loss = model(input_ids=x, labels=x).loss
    with pytest.raises(RuntimeError, match="did not run forward"), adapters(IDS.flip(0)):
        loss.backward()
    with adapters(IDS):
        first = model(input_ids=x, labels=x).loss
    with pytest.raises(RuntimeError, match="did not run forward"), adapters(IDS.flip(0)):
        (first + model(input_ids=x, labels=x).loss).backward()


@pytest.mark.parametrize("checkpointing", [REENTRANT, PLAIN])
@pytest.mark.parametrize("first", [0, 1])
def test_late_backward_in_the_next_block_raises(model, checkpointing, first):
    """Both batches ran forward; only the ids say that the first one's recompute would take the second one's adapters."""
    model.gradient_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    with adapters(IDS):
        losses = [model(input_ids=tokens(seed=1)).logits.square().sum()]
    with adapters(IDS.flip(0)):
        losses.append(model(input_ids=tokens(seed=2)).logits.square().sum())
        if first == 1:
            losses[1].backward()
        with pytest.raises(RuntimeError, match="this loss did not run forward.*context_fn"):
            losses[0].backward()
    want = step(model, checkpointing)  # and nothing of it lingers
    assert_same(step(model, checkpointing), want)


@pytest.mark.parametrize("checkpointing", [None, RESTORING])
def test_late_backward_in_the_next_block_without_recompute_or_with_context(model, checkpointing):
    def grads(late):
        model.zero_grad()
        blocks, losses = (adapters(IDS), adapters(IDS.flip(0))), []
        for seed, block in enumerate(blocks):
            with block:
                losses.append(model(input_ids=tokens(seed=seed)).logits.square().sum())
                if late and seed:
                    sum(losses).backward()
                elif not late:
                    losses[seed].backward()
        return lora_grads(model)

    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    torch.manual_seed(0)
    own = grads(late=False)
    torch.manual_seed(0)
    for key, grad in grads(late=True).items():
        torch.testing.assert_close(grad, own[key], rtol=1e-5, atol=1e-5)


def test_same_block_object_may_be_entered_again_for_backward(model):
    want, x = step(model), tokens()
    model.gradient_checkpointing_enable(REENTRANT)
    model.enable_input_require_grads()
    model.zero_grad()
    torch.manual_seed(5)
    batch = adapters(IDS)
    with batch:
        loss = model(input_ids=x, labels=x).loss
    with batch:
        loss.backward()
    assert_same((loss.detach(), lora_grads(model)), want)


@pytest.mark.parametrize("checkpointing", [REENTRANT, PLAIN, RESTORING])
def test_single_adapter_training_without_blocks(checkpointing):
    model = wrap(base_model(), [lora(4, lora_dropout=0.3)]).train()
    enable(model, verbose=False)
    with torch.no_grad(), adapters([0] * 6):
        model(input_ids=tokens())  # evaluation in a block does not make recomputes strict
    want = step(model, ids=None)
    assert want[1] and all(g.any() for g in want[1].values())
    assert_same(step(model, checkpointing, ids=None), want)


def test_context_fn_lets_a_strict_model_train_without_a_block(model):
    step(model)
    assert_same(step(model, RESTORING, ids=None), step(model, ids=None))


def test_adapter_names_under_checkpointing(model):
    want, x = step(model), tokens()
    model.gradient_checkpointing_enable(RESTORING)
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=x, labels=x, adapter_names=["ad0", "ad1", "__base__", "ad1", "ad2", "ad0"]).loss
    loss.backward()
    assert_same((loss.detach(), lora_grads(model)), want)


def test_several_backwards_through_one_checkpoint(model):
    x = tokens()
    model.gradient_checkpointing_enable(REENTRANT)
    model.enable_input_require_grads()
    with adapters(IDS):
        loss = model(input_ids=x, labels=x).loss
        loss.backward(retain_graph=True)
        once = lora_grads(model)
        loss.backward()
    torch.testing.assert_close(lora_grads(model), {k: 2 * g for k, g in once.items()})


def test_composes_with_selective_checkpointing(model):
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if "lora_linear" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    layer = next(m for m in model.modules() if type(m).__name__ == "MtLoraLinear")
    x = torch.randn(6, 4, 32, requires_grad=True)
    context_fn = partial(checkpoint_context, partial(create_selective_checkpoint_contexts, policy))
    with adapters(IDS):
        y = checkpoint(lambda t: layer(t).sin(), x, use_reentrant=False, context_fn=context_fn)
    y.sum().backward()
    got = x.grad.clone()
    assert torch.ops.mtkernels.lora_linear.default in seen
    with adapters(IDS):
        x.grad = None
        layer(x).sin().sum().backward()
    rows = IDS == 1  # a new block has a new dropout counter: compare the adapter without dropout
    torch.testing.assert_close(got[rows], x.grad[rows])
