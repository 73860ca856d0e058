"""TaskLoss against torch's cross entropy, and on real transformers models."""

import pytest
import torch
import torch.nn.functional as F

from mtkernels.nn import TaskLoss

J = 3


def batch(shape=(4, 7), n_classes=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, shape, generator=g)
    labels.view(-1)[::5] = -100
    return torch.randn(*shape, n_classes, generator=g, requires_grad=True), labels


def by_task(logits, labels, task_ids, reduction):
    """[J] losses by torch, one task at a time."""
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    keep, task_ids = labels.flatten() != -100, task_ids.flatten()
    rows = [nll[keep & (task_ids == j)] for j in range(J)]
    return torch.stack([r.sum() / max(len(r), 1) if reduction == "token_mean" else r.sum() for r in rows])


@pytest.mark.parametrize("reduction", ["token_mean", "sum"])
@pytest.mark.parametrize("per_token", [False, True])
def test_causal_shift_and_gradients(reduction, per_token):
    logits, labels = batch()
    task_ids = torch.tensor([0, 2, -1, 0])
    rows = task_ids[:, None].expand(4, 7)
    if per_token:
        task_ids = rows = torch.arange(28).view(4, 7) % J
    weights = [0.5, 2.0, 3.0]
    loss_fn = TaskLoss(J, weights=weights, reduction=reduction)
    loss = loss_fn(logits, labels, vocab_size=11, task_ids=task_ids)
    want = by_task(logits[:, :-1], labels[:, 1:], rows[:, 1:], reduction)
    torch.testing.assert_close(loss, (want * torch.tensor(weights)).sum())
    torch.testing.assert_close(loss_fn.last.losses, want.detach())
    assert not loss_fn.last.losses.requires_grad
    (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad((want * torch.tensor(weights)).sum(), logits)[0])


def test_one_task_is_transformers_causal_loss():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels = batch()
    ids = torch.zeros(4, dtype=torch.int64)
    for n_items in (None, 13, torch.tensor(13)):
        want = loss_utils.ForCausalLMLoss(logits, labels, 11, num_items_in_batch=n_items)
        torch.testing.assert_close(TaskLoss(1)(logits, labels, 11, num_items_in_batch=n_items, task_ids=ids), want)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(TaskLoss(1)(logits, None, 11, shift_labels=shifted, task_ids=ids), loss_utils.ForCausalLMLoss(logits, labels, 11))


def test_num_items_divides_weighted_sums():
    logits, labels = batch()
    ids, weights = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 0.0, 4.0])
    loss = TaskLoss(J, weights)(logits, labels, num_items_in_batch=20, task_ids=ids)
    sums = by_task(logits[:, :-1], labels[:, 1:], ids[:, None].expand(4, 6), "sum")
    torch.testing.assert_close(loss, (sums * weights).sum() / 20)


def test_classification_is_not_shifted():
    ids = torch.tensor([0, 1, 1, 0])
    logits, labels = batch((4,))
    torch.testing.assert_close(TaskLoss(J)(logits, labels, task_ids=ids), by_task(logits, labels, ids, "token_mean").sum())
    logits, labels = batch()
    want = by_task(logits, labels, ids[:, None].expand(4, 7), "token_mean").sum()
    torch.testing.assert_close(TaskLoss(J, shift=False)(logits, labels, task_ids=ids), want)
    pooled, labels = batch((4,), seed=1)
    got = TaskLoss(J)(logits, labels, pooled_logits=pooled, config=None, task_ids=ids)
    torch.testing.assert_close(got, by_task(pooled, labels, ids, "token_mean").sum())


def test_last_counts_and_accuracy():
    logits = torch.eye(4)[None].repeat(2, 1, 1)[..., :4]
    labels = torch.tensor([[0, 1, 0, -100], [0, 1, 2, 3]])
    loss_fn = TaskLoss(J, shift=False)
    loss_fn(logits, labels, task_ids=torch.tensor([0, 2]))
    assert loss_fn.last.counts.tolist() == [3, 0, 4]
    torch.testing.assert_close(loss_fn.last.accuracy, torch.tensor([2 / 3, 0.0, 1.0]))
    assert loss_fn.last.losses[1] == 0
    bare = TaskLoss(J, shift=False, accuracy=False)
    bare(logits, labels, task_ids=torch.tensor([0, 2]))
    assert bare.last.accuracy is None


def test_trained_weights_get_a_gradient():
    logits, labels = batch()
    weights = torch.ones(J, requires_grad=True)
    loss_fn = TaskLoss(J, weights)
    loss_fn(logits, labels, task_ids=torch.tensor([0, 1, 1, 0])).backward()
    torch.testing.assert_close(weights.grad, loss_fn.last.losses)


def test_errors_say_what_to_do():
    logits, labels = batch()
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        TaskLoss(J)(logits, labels)
    with pytest.raises(ValueError, match=r"task_ids are \(5,\).*give \(4,\) or \(4, 7\)"):
        TaskLoss(J)(logits, labels, task_ids=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels are \(4, 6\)"):
        TaskLoss(J)(logits, labels[:, 1:], task_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids are torch.float32"):
        TaskLoss(J)(logits, labels, task_ids=torch.zeros(4))
    with pytest.raises(IndexError, match="ids"):
        TaskLoss(J)(logits, labels, task_ids=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"weights are \(2,\)"):
        TaskLoss(J, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="token_mean, sum"):
        TaskLoss(J, reduction="mean")
    with pytest.raises(ValueError, match="n_tasks is 0"):
        TaskLoss(0)


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


@pytest.mark.parametrize("through_peft", [False, True])
def test_as_loss_function_of_a_real_model(through_peft):
    model, loss_fn = tiny_llama(), TaskLoss(J)
    if through_peft:
        peft = pytest.importorskip("peft")
        from mtkernels.integrations import disable, enable

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        enable(model, verbose=False)
    model.loss_function = loss_fn
    x, ids = torch.randint(0, 64, (4, 7)), torch.tensor([0, 2, 1, 0])
    out = model(input_ids=x, labels=x, task_ids=ids)
    torch.testing.assert_close(out.loss, by_task(out.logits[:, :-1], x[:, 1:], ids[:, None].expand(4, 6), "token_mean").sum())
    assert loss_fn.last.counts.tolist() == [12, 6, 6]
    with pytest.raises(ValueError, match="task_ids did not arrive"):
        model(input_ids=x, labels=x)
    if through_peft:
        disable(model)
        assert not model._forward_pre_hooks
