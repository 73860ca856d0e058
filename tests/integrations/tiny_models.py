"""Tiny random transformers models under real PEFT."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from mtkernels.integrations import adapters, enable

VOCAB = 64
IDS = torch.tensor([1, 0, -1, 3, 2, 1])
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "dense"]}


def base_model(kind="llama", **options):
    torch.manual_seed(0)
    common = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2) | options
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, use_cache=False))
    return BertForSequenceClassification(BertConfig(**common, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def lora(rank, targets=TARGETS["llama"], **options):
    return LoraConfig(**{"r": rank, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **options})


def wrap(model, configs, dtype=None):
    """A PeftModel with adapters ad0, ad1, ... of these configs."""
    peft_model = get_peft_model(model, configs[0], adapter_name="ad0")
    for i, config in enumerate(configs[1:], 1):
        peft_model.add_adapter(f"ad{i}", config)
    return peft_model if dtype is None else peft_model.to(dtype)


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def names(model):
    return list(model.peft_config)


def pair(kind="llama", configs=None, **options):
    """(stock, enabled): the same model twice; four adapters of different rank, the third on fewer layers."""
    targets = TARGETS[kind]
    configs = configs or [lora(4, targets), lora(7, targets), lora(2, targets[:1]), lora(1, targets, use_rslora=True)]
    stock = wrap(base_model(kind, **options), configs)
    enabled = copy.deepcopy(stock)
    enable(enabled, train=names(enabled), verbose=False)
    return stock, enabled


def tokens(n_rows=6, length=9, seed=1):
    return torch.randint(0, VOCAB, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def lora_grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mixed_step(model, ids, x, labels=None):
    """Loss and LoRA gradients of one mixed batch; the loss is a sum over rows, so that rows are independent."""
    model.zero_grad()
    with adapters(ids):
        logits = model(input_ids=x).logits
    weight = torch.linspace(-1, 1, logits[0].numel()).view_as(logits[0])
    (logits.float() * weight).sum().backward()
    return logits.detach(), lora_grads(model)

