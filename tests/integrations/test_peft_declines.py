"""What `enable` declines, by name, and the models and bases it takes besides a PeftModel on plain Linears."""

import copy

import pytest
import torch
from tiny_models import base_model, layers, lora, pair, tokens, wrap
from peft import inject_adapter_in_model
from torch import nn

from mtkernels.integrations import adapters, enable


def test_dora_added_later_runs_as_dora():
    stock, enabled = pair()
    for model in (stock.eval(), enabled.eval()):
        torch.manual_seed(7)
        model.add_adapter("dora", lora(3, use_dora=True))
        model.set_adapter("dora")
    x = tokens()
    torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), adapters("dora"):
        torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def declined(configs, kind="llama", prepare=None, model=None):
    model = wrap(model or base_model(kind), configs)
    if prepare:
        prepare(model)
    report = enable(model, verbose=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot serve this `adapters` block"), adapters([0] * 6):
        model(input_ids=tokens())
    model(input_ids=tokens())
    return {row.module.removeprefix("base_model.model.").removeprefix("model."): row.now for row in report.declined}, report


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 1)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        return self.conv(self.attn(h, h, h)[0].mT)


def test_declined_variants_are_named():
    rows, _ = declined([lora(4, init_lora_weights="mica")])
    assert len(rows) == 6 and all("adapter 'ad0' uses MiCALinearVariant" in why for why in rows.values())
    rows, _ = declined([lora(4)], prepare=lambda m: m.merge_adapter())
    assert all("'ad0' are merged into the base weight; call unmerge_adapter()" in why for why in rows.values())
    rows, report = declined([lora(4, modules_to_save=["lm_head"])])
    assert list(rows) == ["lm_head"] and "modules_to_save" in rows["lm_head"] and len(report.swapped) == 6
    rows, _ = declined([lora(4, ["embed_tokens"], use_dora=True)])
    assert "DoraEmbeddingVariant; plain LoRA is supported on embeddings" in rows["embed_tokens"]
    sparse = base_model()
    sparse.model.embed_tokens.sparse = True
    rows, _ = declined([lora(4, ["embed_tokens"])], model=sparse)
    assert "sparse=True, which PEFT also applies" in rows["embed_tokens"]
    rows, _ = declined([lora(4)], prepare=lambda m: layers(m)[0].lora_A["ad0"].to(torch.bfloat16) and layers(m)[0].lora_A["ad0"].register_forward_hook(lambda *_: _[-1].float()))
    assert "a Linear with hooks" in rows["layers.0.self_attn.q_proj"] and len(rows) == 1
    rows, _ = declined([lora(4, ["attn", "conv"])], model=Attention())
    assert "q, k, v projections" in rows["attn"] and "Conv1d is not supported yet" in rows["conv"]


def test_mixed_factor_dtypes_are_declined_by_name():
    model = wrap(base_model(), [lora(4), lora(2)])
    layers(model)[1].lora_A["ad1"].double(), layers(model)[1].lora_B["ad1"].double()
    report = enable(model, verbose=False)
    assert len(report.declined) == 1 and "torch.float32 on cpu and torch.float64 on cpu" in report.declined[0].now
    enable(copy.deepcopy(model), verbose=False)
    layers(model)[0].lora_A["ad1"].double(), layers(model)[0].lora_B["ad1"].double()
    with torch.no_grad(), pytest.raises(RuntimeError, match="q_proj: cannot serve.*one dtype"), adapters([0, 1]):
        model(input_ids=tokens(2))


def test_parameter_lora_on_experts_is_declined():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, use_cache=False))
    rows, report = declined([lora(2, ["q_proj"], target_parameters=["experts.gate_up_proj"])], model=model)
    assert len(report.swapped) == 1 and all("target_parameters (expert) LoRA" in why for why in rows.values())


def test_nothing_to_enable_is_said(capsys):
    report = enable(base_model())
    assert not report and "nothing to enable: LlamaForCausalLM has no PEFT layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to enable"):
        enable(base_model(), train=["a"])


def test_report_is_an_aligned_table(capsys):
    model = wrap(base_model(), [lora(4, modules_to_save=["lm_head"])])
    report = enable(model)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == str(report).splitlines() and "6 LoRA layers enabled, 1 declined" in lines[0]
    assert "model.layers.*.self_attn.q_proj (x2)" in lines[2] and "lora_linear (" in lines[2]
    assert len({line.index(word) for line, word in zip(lines[1:3], ("was", "lora.Linear"))}) == 1


@pytest.mark.parametrize("how", ["inject", "add_adapter"])
def test_injected_adapters_without_peft_model(how):
    model = base_model()
    for i, rank in enumerate((4, 2)):
        if how == "inject":
            inject_adapter_in_model(lora(rank), model, adapter_name=f"ad{i}")
            continue
        try:
            model.add_adapter(lora(rank), adapter_name=f"ad{i}")
        except ValueError as refusal:  # transformers' own floor may be above the newest peft
            if "version of PEFT you are using is not compatible" not in str(refusal):
                raise
            pytest.skip(f"transformers refuses this peft: {refusal}")
    stock = copy.deepcopy(model).eval()
    assert len(enable(model, train=["ad0", "ad1"], verbose=False).swapped) == 6
    x = tokens(2)
    with adapters(["ad1", "ad0"]):
        out = model(input_ids=x, labels=x)
    out.loss.backward()
    for row, name in enumerate(("ad1", "ad0")):
        for layer in layers(stock):
            layer.set_adapter(name)
        torch.testing.assert_close(out.logits[row], stock(input_ids=x[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)
