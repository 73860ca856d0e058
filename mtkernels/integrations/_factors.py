"""What the swapped layers share: adapters as PEFT holds them now, and the banks made from them.

Everything about an adapter (factors, scaling, dropout, dtype, merged, variants) is read from PEFT's containers at each
call, so whatever PEFT changes is seen; only small tensors derived from plain numbers are kept.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import nn

from ..bank import LoraBank
from .context import EnabledModel, current_view

PLAIN = (torch.Tensor, nn.Parameter)
MAX_NUMBERS = 256  # kept small tensors: a scale schedule must not grow them for ever
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Shared:
    """What a swapped layer knows: its model, its name and its dropout site."""

    model: EnabledModel
    name: str
    site: int


class Factors(NamedTuple):
    """One adapter of one layer as PEFT holds it now."""

    A: torch.Tensor
    B: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    dropout: float
    magnitude: torch.Tensor | None = None  # of a DoRA adapter
    invoked: bool = False  # an aLoRA adapter


def view_of(shared, x, names, offsets):
    """The ids this layer runs under: of PEFT's adapter_names= (with its alora_offsets), else of `adapters`, else None."""
    if names is None:
        return current_view(shared.model, shared.site, shared.name)
    if len(names) != len(x):
        # PEFT's own words: callers may match them.
        raise ValueError(f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} respectively.")
    return shared.model.named_view(names, offsets)


def factors_of(layer, name):
    """The adapter's Factors, or the reason (str) why the op cannot take it."""
    variant = type(layer.lora_variant[name]) if name in layer.lora_variant else None
    if variant not in (None, DoraLinearVariant, ALoraLinearVariant):
        return f"adapter {name!r} uses {variant.__name__}; plain LoRA, DoRA and aLoRA are supported, train this adapter without mtkernels"
    lora_A, lora_B, dropout, scale = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    for key, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear or is_hooked(module):
            return f"{key}[{name!r}] is a {described(module)}; a plain nn.Linear is supported (shard by decoder layer, not by factor)"
        weight = module._parameters.get("weight")
        if type(weight) not in PLAIN or weight.dim() != 2:
            return f"{key}[{name!r}].weight is a {described_tensor(weight)}; plain 2-d parameters are supported (shard by decoder layer, not by factor)"
        if weight.dtype not in _DTYPES:
            return f"{key}[{name!r}].weight is {weight.dtype}; float32, bfloat16 and float16 are supported"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout[{name!r}] is a {type(dropout).__name__}; nn.Dropout is supported"
    if isinstance(scale, torch.Tensor):
        return f"scaling[{name!r}] is a tensor; a number is supported"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    magnitude = None
    if variant is DoraLinearVariant:
        magnitude = layer.lora_magnitude_vector[name].weight
        if type(magnitude) not in PLAIN or magnitude.dim() != 1:
            return f"lora_magnitude_vector[{name!r}].weight is a {described_tensor(magnitude)}; plain 1-d parameters are supported (shard by decoder layer)"
        if magnitude.device != lora_A.weight.device:
            return f"lora_magnitude_vector[{name!r}] is on {magnitude.device}, its factors on {lora_A.weight.device}; turn ephemeral_gpu_offload off"
        if lora_B.bias is not None:
            return f"adapter {name!r} has a bias beside DoRA; use lora_bias=False"
    return Factors(lora_A.weight, lora_B.weight, lora_B.bias, scale, p, magnitude, variant is ALoraLinearVariant)


def refusal(layer, factors):
    """Why the op cannot serve these adapters of this layer now, and what to do; "" when it can."""
    if layer.merged:
        return f"adapters {', '.join(map(repr, layer.merged_adapters))} are merged into the base weight; call unmerge_adapter() and enable again"
    kinds = set()
    for f in factors.values():
        if isinstance(f, str):
            return f
        for t in f[:2] if f.bias is None else f[:3]:
            kinds.add((t.dtype, t.device))
    if len(kinds) > 1:
        return f"its factors are {' and '.join(sorted(f'{d} on {v}' for d, v in kinds))}; bring all adapters to one dtype and device"
    return ""


def is_hooked(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks) or "forward" in module.__dict__


def is_plain_linear(module):
    return type(module) is nn.Linear and not is_hooked(module) and type(module._parameters.get("weight")) in PLAIN


def described(module):
    return type(module).__name__ + (" with hooks or its own forward" if type(module) is nn.Linear else "")


def described_tensor(t):
    return "missing parameter" if t is None else f"{t.dim()}-d {type(t).__name__}"


def bank_of(layer, names, factors):
    """A LoraBank over `names`; rank 0 for the adapters that this layer lacks."""
    first = next(iter(factors.values()))
    present = [factors.get(name) for name in names]
    empty_A, empty_B = first.A.new_empty(0, first.A.shape[1]), first.B.new_empty(first.B.shape[0], 0)
    bias = []
    if any(f.bias is not None for f in factors.values()):
        none = first.A.new_empty(0)
        bias = [none if f is None or f.bias is None else f.bias for f in present]
    A = [empty_A if f is None else f.A for f in present]
    B = [empty_B if f is None else f.B for f in present]
    scales = tuple(0.0 if f is None else float(f.scale) for f in present)
    dropouts = tuple(0.0 if f is None else f.dropout for f in present)
    bank = LoraBank(A, B, [a.shape[0] for a in A], "separate", bias, *small_tensors(layer._mtkernels.model, names, scales, dropouts, first.A.device))
    bank.has_dropout = any(dropouts)
    return bank


def small_tensors(model, names, scales, dropouts, device):
    """scale, threshold, seeds on the device, shared by the layers that have the same numbers."""
    key = (names, scales, dropouts, device)
    small = model.numbers.get(key)
    if small is not None:
        return small
    seeds = tuple(model.seed(name) if p else 0 for name, p in zip(names, dropouts))
    if torch.compiler.is_compiling():
        return _numbers(scales, dropouts, seeds, device)
    with torch.inference_mode(False):  # kept across calls, so training must be able to save them
        small = _numbers(scales, dropouts, seeds, device)
    if type(small[0]) is torch.Tensor:
        if len(model.numbers) == MAX_NUMBERS:
            model.numbers.clear()
        model.numbers[key] = small
    return small


def _numbers(scales, dropouts, seeds, device):
    scale = torch.tensor(scales, dtype=torch.float32, device=device)
    threshold = torch.tensor([round(65536 * p) for p in dropouts], dtype=torch.int32, device=device)
    return scale, threshold, torch.tensor(seeds, dtype=torch.int64, device=device)
