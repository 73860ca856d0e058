"""torch.compile on whole enabled models: one graph, no recompile for other ids, the same results."""

import pytest
import torch
from tiny_models import lora, lora_grads, pair, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from mtkernels.integrations import adapters, checkpoint_context
from mtkernels.nn import TaskLoss


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SMALL = [lora(4, ["q_proj"]), lora(7, ["q_proj", "up_proj"]), lora(2, ["up_proj"])]  # few layers: compiling is slow


def small_pair(configs=SMALL):
    return pair(configs=configs, num_hidden_layers=1)


@pytest.fixture
def model():
    return small_pair()[1]


def run(model, ids, x):
    model.zero_grad()
    with adapters(ids):
        loss = model(input_ids=x, labels=x).loss
    loss.backward()
    return loss.detach(), lora_grads(model)


BATCHES = ([0, 1, 2, -1], [1, 1, 1, 1], ["ad1", "__base__", "ad0", "ad2"], torch.tensor([1, 0, 0, 2]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_ids_do_not_recompile(model, backend):
    counter = CompileCounterWithBackend(backend)
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), tokens(4)
    for ids in BATCHES[: 2 if backend == "inductor" else 4]:
        want, got = run(model, ids, x), run(compiled, ids, x)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        for key, grad in want[1].items():
            torch.testing.assert_close(got[1]["_orig_mod." + key], grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_per_token_ids_and_new_shapes(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(model, backend=counter, fullgraph=True, dynamic=True), []
    for seed, (rows, length) in enumerate(((4, 9), (3, 7))):
        x = tokens(rows, length, seed)
        ids = torch.randint(-1, 3, (rows, length), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), adapters(ids):
            torch.testing.assert_close(compiled(input_ids=x).logits, model(input_ids=x).logits, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_without_a_block(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), tokens(4)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=x).logits, model(input_ids=x).logits, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_a_strict_model_compiled_without_a_block_still_trains(model):
    x = tokens(4)
    run(model, [0, 1, 2, -1], x)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=x, labels=x).loss.backward()


def test_compiled_checkpointing():
    model = small_pair([lora(4, ["q_proj", "up_proj"], lora_dropout=0.3), lora(7, ["q_proj"])])[1].train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
    model.get_base_model().disable_input_require_grads()  # torch.compile takes no requires_grad_() on an intermediate
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), tokens(4)
    for ids in ([0, 1, -1, 0], [1, 1, 0, 0]):
        torch.manual_seed(3)
        want = run(model, ids, x)
        torch.manual_seed(3)
        got = run(compiled, ids, x)
        torch.testing.assert_close(got[0], want[0])
        for key, grad in want[1].items():
            torch.testing.assert_close(got[1]["_orig_mod." + key], grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_compiled_blocks_recomputed_without_ids_raise(model, checkpointing):
    for layer in model.base_model.model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="aot_eager")
    x = tokens(4)
    model.gradient_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    with adapters([0, 1, 2, -1]):
        loss = model(input_ids=x, labels=x).loss
    with pytest.raises(RuntimeError, match="runs inside backward"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_compiled_blocks_recomputed_in_another_block_raise(model, checkpointing):
    for layer in model.base_model.model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="aot_eager")
    x = tokens(4)
    model.gradient_checkpointing_enable(checkpointing)
    model.enable_input_require_grads()
    losses = []
    for ids in ([0, 1, 2, -1], [2, 0, 1, 1]):
        with adapters(ids):
            losses.append(model(input_ids=x, labels=x).loss)
            if ids[0] == 2:
                losses[1].backward()
    with pytest.raises(RuntimeError, match="this loss did not run forward"), adapters([2, 0, 1, 1]):
        model(input_ids=x, labels=x)
        losses[0].backward()


def test_task_loss_in_the_graph(model):
    loss_fn = TaskLoss(3)
    model.loss_function = loss_fn
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), tokens(4)
    for ids in ([0, 1, 2, -1], [2, 0, 1, 1]):
        task_ids = torch.tensor(ids).clamp(min=0)
        with torch.no_grad(), adapters(ids):
            want, last = model(input_ids=x, labels=x, task_ids=task_ids).loss, loss_fn.last
            torch.testing.assert_close(compiled(input_ids=x, labels=x, task_ids=task_ids).loss, want, rtol=1e-5, atol=1e-6)
        for a, b in zip(loss_fn.last, last):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2
