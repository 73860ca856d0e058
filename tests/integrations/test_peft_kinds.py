"""DoRA, aLoRA, embeddings and 4-bit bases under `enable`, against PEFT's own run of one adapter at a time."""

import copy

import pytest
import torch
from tiny_models import TARGETS, base_model, lora, lora_grads, mixed_step, names, tokens, wrap
from torch import nn

from mtkernels import checkpoint_context
from mtkernels.integrations import adapters, context, disable, enable

TABLE = [*TARGETS["llama"], "embed_tokens"]
CAUSAL = {"task_type": "CAUSAL_LM"}  # PEFT looks for invocations in such a model only
KINDS = {
    "dora": [lora(4, use_dora=True), lora(3), lora(2, ["q_proj"], use_dora=True)],
    "embedding": [lora(4, TABLE), lora(3), lora(2, ["embed_tokens"])],
    "alora": [lora(4, alora_invocation_tokens=[5, 6], **CAUSAL), lora(3), lora(2, alora_invocation_tokens=[7])],
    "together": [lora(4, use_dora=True, **CAUSAL), lora(3, TABLE), lora(2, alora_invocation_tokens=[7])],
}
IDS = torch.tensor([1, 0, -1, 2, 2, 0])


def prompts():
    x = tokens()
    x[x == 7] = 8
    x[1, 3:5], x[5, 1:3], x[5, 6:8] = (torch.tensor([5, 6]) for _ in range(3))
    x[3, 4] = 7  # row 4, of the same adapter, is not invoked
    return x


def kind_pair(kind, base=None):
    stock = wrap(base_model() if base is None else base, KINDS[kind])
    for n, p in stock.named_parameters():  # magnitudes that are not the norm
        if "magnitude" in n:
            p.data.mul_(torch.linspace(0.5, 1.5, p.numel()))
    enabled = copy.deepcopy(stock)
    return stock, enabled, enable(enabled, train=names(enabled), verbose=False)


def solo(stock, x):
    """(logits by adapter, gradients): stock PEFT, one adapter and its rows at a time."""
    logits, grads = {}, {}
    for i, name in enumerate(names(stock)):
        stock.zero_grad()
        stock.set_adapter(name)
        logits[i] = stock(input_ids=x[IDS == i]).logits
        weight = torch.linspace(-1, 1, logits[i][0].numel()).view_as(logits[i][0])
        (logits[i] * weight).sum().backward()
        grads.update({k: g for k, g in lora_grads(stock).items() if f".{name}" in k})
    return logits, grads


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_training_matches_solo_stock_peft(kind):
    stock, enabled, report = kind_pair(kind)
    assert not report.declined and list(stock.state_dict()) == list(enabled.state_dict())
    x = prompts()
    got, grads = mixed_step(enabled, IDS, x)
    logits, want = solo(stock, x)
    for i in logits:
        torch.testing.assert_close(got[IDS == i], logits[i], rtol=1e-4, atol=1e-5)
    assert grads.keys() == want.keys() and len(grads) > 10
    for key in want:
        torch.testing.assert_close(grads[key], want[key], rtol=1e-4, atol=2e-5, msg=key)
    if kind == "dora":
        assert any("dora_linear" in row.now for row in report.swapped) and any("magnitude" in key and g.any() for key, g in grads.items())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_is_bitwise_solo(kind):
    _, enabled, _ = kind_pair(kind)
    x = prompts()
    mixed_logits, mixed = mixed_step(enabled, IDS, x)
    for i, name in enumerate(names(enabled)):
        logits, alone = mixed_step(enabled, torch.where(IDS == i, IDS, -1), x)
        assert torch.equal(logits[IDS == i], mixed_logits[IDS == i])
        assert all(torch.equal(g, mixed[k]) for k, g in alone.items() if f".{name}" in k)


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapter_and_adapter_names_and_round_trip(kind):
    stock, enabled, _ = kind_pair(kind)
    x = prompts()
    for name in names(stock):
        for model in (stock, enabled):
            model.set_adapter(name)
        torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)
    wanted = ["__base__" if i < 0 else names(enabled)[i] for i in IDS.tolist()]
    with torch.no_grad():
        with adapters(IDS):
            want = enabled(input_ids=x).logits
        for mode in (True, False):
            torch.testing.assert_close(enabled.train(mode)(input_ids=x, adapter_names=wanted).logits, want, rtol=1e-5, atol=1e-5)
    disable(enabled)
    assert [type(m) for m in stock.modules()] == [type(m) for m in enabled.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind):
    _, enabled, _ = kind_pair(kind)
    x = prompts()
    _, want = mixed_step(enabled.train(), IDS, x)
    enabled.base_model.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
    _, got = mixed_step(enabled, IDS, x)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_several_active_dora_adapters_add_up_like_stock():
    stock, enabled, _ = kind_pair("dora")
    for model in (stock, enabled):
        model.base_model.set_adapter(names(stock))
    x = tokens()
    torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [["ad0"], ["ad1", "ad0"]])
def test_dora_dropout_reads_dropped_rows_on_both_paths(active):
    """The mask is ours, so the stock layer is given it: x dropped once, for the base product and the factors."""
    from mtkernels.integrations import _linear

    stock = wrap(nn.Sequential(nn.Linear(6, 5)), [lora(3, ["0"], use_dora=True, lora_dropout=0.5), lora(2, ["0"])])
    enabled = copy.deepcopy(stock)
    enable(enabled, train=names(enabled), verbose=False)
    for model in (stock.train(), enabled.train()):
        model.base_model.set_adapter(active)
    x, seen = torch.randn(7, 6), []
    drop = _linear.dora_dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtkernels.ops.dora.dora_dropout", lambda *a, **k: seen.append(drop(*a, **k)) or seen[-1])
        patch.setattr(_linear, "dora_dropout", lambda *a, **k: seen.append(drop(*a, **k)) or seen[-1])
        got = enabled(x)
    assert len(seen) == 1 and not torch.equal(seen[0], x)
    layer = stock.base_model.model[0]
    layer.lora_dropout["ad0"].forward = lambda _: seen[0].detach()
    torch.testing.assert_close(got, stock(x), rtol=1e-5, atol=1e-6)


def test_scaled_embedding_of_gemma():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    stock, enabled, report = kind_pair("embedding", Gemma3ForCausalLM(Gemma3TextConfig(**sizes, use_cache=False)).eval())
    assert not report.declined
    x = prompts()
    got, grads = mixed_step(enabled, IDS, x)
    logits, want = solo(stock, x)
    for i in logits:
        torch.testing.assert_close(got[IDS == i], logits[i], rtol=1e-4, atol=1e-5)
    for key in want:
        torch.testing.assert_close(grads[key], want[key], rtol=1e-3, atol=1e-4, msg=key)


def test_alora_without_tokens_says_what_to_pass():
    _, enabled, _ = kind_pair("alora")
    embeds = torch.randn(6, 9, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="no input_ids were seen.*alora_ids"), adapters(IDS):
        enabled(inputs_embeds=embeds)


def test_nf4_base_runs_lora_delta():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"))
    model[0].weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    model = model.to("cpu")
    model.is_loaded_in_4bit = True  # as transformers marks it
    stock = wrap(model, [lora(4, ["0"]), lora(3, ["0"], use_dora=True)])
    enabled = copy.deepcopy(stock)
    report = enable(enabled, train=names(enabled), verbose=False)
    assert report.swapped and not report.declined and "lora_delta" in report.swapped[0].now
    x, ids, upstream = torch.randn(6, 64), torch.tensor([0, 1, -1, 1, 0, 1]), torch.randn(6, 32)
    with adapters(ids):
        y = enabled(x)
    y.backward(upstream)
    got = lora_grads(enabled)
    for i, name in enumerate(names(stock)):
        stock.zero_grad()
        stock.set_adapter(name)
        want = stock(x[ids == i])
        torch.testing.assert_close(y[ids == i], want, rtol=1e-4, atol=1e-5)
        want.backward(upstream[ids == i])
        for key, g in lora_grads(stock).items():
            torch.testing.assert_close(got[key], g, rtol=1e-4, atol=1e-4, msg=key)


def test_an_active_alora_adapter_is_planned_once_a_batch(monkeypatch):
    stock, enabled, _ = kind_pair("alora")
    planned, plan = [], context.group_plan
    monkeypatch.setattr(context, "group_plan", lambda *args, **kwargs: planned.append(args) or plan(*args, **kwargs))
    for n_batches, x in enumerate((prompts(), prompts(), prompts().flip(0)), 1):
        torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)
        assert len(planned) == (1 if n_batches < 3 else 2)  # the second batch has the invocations of the first


@pytest.mark.parametrize("kind", ["alora", "together"])
def test_generation_with_a_cache_is_stock_pefts(kind):
    stock, enabled, _ = kind_pair(kind)
    x, options = prompts(), dict(max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=True)
    with adapters(IDS):
        mixed = enabled.generate(input_ids=x, **options)
    for i, name in enumerate(names(stock)):
        for model in (stock, enabled):
            model.set_adapter(name)
        want = stock.generate(input_ids=x[IDS == i], **options)
        assert torch.equal(enabled.generate(input_ids=x[IDS == i], **options), want)
        assert torch.equal(mixed[IDS == i], want)
