"""PEFT's LoRA Embedding on lora_embedding: the same parameters and names, another forward."""

from peft.tuners.lora.layer import Embedding
from torch import nn

from ..ops import lora_embedding
from ._factors import PLAIN, Factors, bank_of, described_tensor, is_hooked
from ._routed import Routed


class MtLoraEmbedding(Routed, Embedding):
    """peft.tuners.lora.layer.Embedding that serves several adapters in one call. Made by `enable`, never constructed."""

    def _adapters(self):
        return self.lora_embedding_A

    def _factors(self, name):
        return embedding_factors(self, name)

    def _base_reason(self):
        return table_reason(self.get_base_layer())

    def _lead(self, x):
        return x.shape

    def _apply_bank(self, x, y, names, factors, plan, args, kwargs):
        bank = bank_of(self, names, factors)
        base = self.base_layer
        if y is None and not args and not kwargs and is_plain_embedding(base):
            return lora_embedding(x, base.weight, bank, plan, padding_idx=base.padding_idx)
        if y is None:
            y = base(x, *args, **kwargs)
        table = self.get_base_layer()
        zeros = y.new_zeros(()).expand(table.weight.shape)  # the adapters alone, beside a base that scales its output
        delta, embed_scale = lora_embedding(x, zeros, bank, plan, padding_idx=table.padding_idx), self._get_embed_scale()
        return y + (delta if embed_scale is None else delta * embed_scale.to(delta.dtype))


def is_plain_embedding(module):
    return type(module) is nn.Embedding and not is_hooked(module) and type(module._parameters.get("weight")) in PLAIN


def table_reason(table):
    """Why lora_embedding cannot stand for this base table; "" when it can."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(table, option, None):
            return f"its base embedding has {option}={getattr(table, option)!r}, which PEFT also applies to lora_embedding_A; build the embedding without it"
    if not hasattr(table, "padding_idx") or type(table._parameters.get("weight")) not in PLAIN:
        return f"its base embedding is a {type(table).__name__}; an nn.Embedding with a plain weight is supported"
    return ""


def embedding_factors(layer, name):
    """The adapter's Factors, or the reason (str) why the op cannot take it."""
    if name in layer.lora_variant:
        return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}; plain LoRA is supported on embeddings, leave this one out of target_modules"
    if layer.input_fns.get(name) or layer.output_fns.get(name):
        return f"adapter {name!r} is tensor-parallel; shard by decoder layer instead"
    A, B, scale = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]
    for key, t in (("lora_embedding_A", A), ("lora_embedding_B", B)):
        if type(t) not in PLAIN or t.dim() != 2:
            return f"{key}[{name!r}] is a {described_tensor(t)}; plain 2-d parameters are supported (shard by decoder layer, not by factor)"
    return Factors(A, B, None, scale, 0.0)
