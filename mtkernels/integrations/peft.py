"""PEFT's LoRA Linear on lora_linear and lora_delta: the same parameters and names, another forward.

Everything about an adapter (factors, scaling, dropout, dtype, merged, variants) is read from PEFT's containers at each
call, so whatever PEFT changes is seen; only small tensors derived from plain numbers are kept.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..bank import LoraBank
from ..ops import lora_delta, lora_linear
from .context import AdapterBatch, EnabledModel, current_view

_PLAIN = (torch.Tensor, nn.Parameter)
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


class MtLoraLinear(Linear):
    """peft.tuners.lora.layer.Linear that serves several adapters in one call. Made by `enable`, never constructed."""

    def forward(self, x, *args, **kwargs):
        shared, names = self._mtkernels, kwargs.pop("adapter_names", None)
        stock = kwargs if names is None else {**kwargs, "adapter_names": names}
        self._check_forward_args(x, *args, **stock)
        if self.disable_adapters:
            return super().forward(x, *args, **stock)
        if names is None:
            view = current_view(shared.model, shared.site, shared.name)
        else:
            view = shared.model.named_view(names)
        wanted = self.active_adapters if view is None else view.names
        factors = {name: factors_of(self, name) for name in wanted if name in self.lora_A}
        reason = refusal(self, factors)
        if reason and view is not None and names is None:
            raise RuntimeError(f"{shared.name}: cannot serve this `adapters` block: {reason}")
        if reason:
            return super().forward(x, *args, **stock)
        kwargs.pop("alora_offsets", None)
        if not factors:
            return self.base_layer(x, *args, **kwargs)
        if view is not None:
            plan = view.plan(x.shape[:-1], x.device, shared.name, any(f.dropout for f in factors.values()))
            return self._apply_bank(x, None, _bank(self, view.names, factors), plan, args, kwargs)
        y, n_rows = None, math.prod(x.shape[:-1])
        for name, f in factors.items():
            plan = shared.model.uniform_plan(n_rows, x, f.dropout > 0)
            y = self._apply_bank(x, y, _bank(self, (name,), {name: f}), plan, args, kwargs)
        return y

    def _apply_bank(self, x, y, bank, plan, args, kwargs):
        base, site = self.base_layer, self._mtkernels.site
        if y is None and not args and not kwargs and _is_plain_linear(base):
            return lora_linear(x, base.weight, base.bias, bank, plan, site=site)
        if y is None:
            y = base(x, *args, **kwargs)
        if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_delta(x, bank, plan, out=y, site=site)
        return y + lora_delta(x, bank, plan, site=site).to(y.dtype)


class MtLoraModel(LoraModel):
    """LoraModel whose adapter_names= also works in training."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is None or not self.training or kwargs.get("alora_offsets") is not None:
            batch = super()._enable_peft_forward_hooks(*args, **kwargs)
        else:
            batch = AdapterBatch(list(names), models=[self.__dict__["_mtkernels"]])
        with batch:
            yield


def factors_of(layer, name):
    """The adapter's Factors, or the reason (str) why the op cannot take it."""
    if name in layer.lora_variant:
        return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}; plain LoRA is supported, train this adapter without mtkernels"
    lora_A, lora_B, dropout, scale = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    for key, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear or _is_hooked(module):
            return f"{key}[{name!r}] is a {_described(module)}; a plain nn.Linear is supported (shard by decoder layer, not by factor)"
        weight = module._parameters.get("weight")
        if type(weight) not in _PLAIN or weight.dim() != 2:
            return f"{key}[{name!r}].weight is a {_described_tensor(weight)}; plain 2-d parameters are supported (shard by decoder layer, not by factor)"
        if weight.dtype not in _DTYPES:
            return f"{key}[{name!r}].weight is {weight.dtype}; float32, bfloat16 and float16 are supported"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout[{name!r}] is a {type(dropout).__name__}; nn.Dropout is supported"
    if isinstance(scale, torch.Tensor):
        return f"scaling[{name!r}] is a tensor; a number is supported"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Factors(lora_A.weight, lora_B.weight, lora_B.bias, scale, p)


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


def _is_hooked(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks) or "forward" in module.__dict__


def _is_plain_linear(module):
    return type(module) is nn.Linear and not _is_hooked(module) and type(module._parameters.get("weight")) in _PLAIN


def _described(module):
    return type(module).__name__ + (" with hooks or its own forward" if type(module) is nn.Linear else "")


def _described_tensor(t):
    return "missing parameter" if t is None else f"{t.dim()}-d {type(t).__name__}"


def _bank(layer, names, factors):
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
    return LoraBank(A, B, [a.shape[0] for a in A], "separate", bias, *_small_tensors(layer._mtkernels.model, names, scales, dropouts, first.A.device))


def _small_tensors(model, names, scales, dropouts, device):
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


class Guard:
    """Forward pre-hook of a declined module: inside `adapters` it would serve every row with the active adapter."""

    def __init__(self, model, name, reason):
        self.model, self.name, self.reason = model, name, reason

    def __call__(self, module, args):
        if getattr(module, "disable_adapters", False) and not getattr(module, "merged", False):
            return
        if current_view(self.model, self.name, self.name) is not None:
            raise RuntimeError(f"{self.name}: cannot serve this `adapters` block: {self.reason}")


class LossForwarder:
    """Forward pre-hook of a PeftModel: `peft_model.loss_function = f` reaches the wrapped model, which computes the loss."""

    def __call__(self, module, args):
        loss, model = module.__dict__.get("loss_function"), module.get_base_model()
        if loss is not None and model.loss_function is not loss:
            model.loss_function = loss


_UNSUPPORTED = "{cls} is not supported yet; leave it out of target_modules, or run its adapters one batch at a time"
_REASONS = {
    "ModulesToSaveWrapper": "each adapter keeps its own copy (modules_to_save); train such a module outside PEFT (e.g. one shared head), or run one adapter per batch",
    "ParamWrapper": "target_parameters (expert) LoRA is not supported yet; use target_modules, or run one adapter per batch",
    "MultiheadAttention": "nn.MultiheadAttention merges its LoRA weights at each call; use separate q, k, v projections, or run one adapter per batch",
    "Embedding": "LoRA on an embedding is not supported yet; leave it out of target_modules, or run one adapter per batch",
    "LoraParallelLinear": "tensor-parallel LoRA is not supported; shard by decoder layer, or run one adapter per batch",
}


def decline_reason(module):
    """Why `enable` leaves this PEFT module alone; "" when it swaps it."""
    if type(module) is not Linear:
        cls = type(module).__name__
        if isinstance(module, LoraLayer) and module.__module__.rsplit(".", 1)[-1] not in ("layer", "tp_layer"):
            return f"quantised LoRA layer {cls} is not proven with mtkernels yet; use an unquantised base, or run one adapter per batch"
        return _REASONS.get(cls, _UNSUPPORTED.format(cls=cls))
    if any(type(w) not in _PLAIN for w in module.get_base_layer()._parameters.values() if w is not None):
        return "its base weight is a tensor subclass (sharded or quantised); call enable before sharding, or shard by decoder layer"
    return refusal(module, {name: factors_of(module, name) for name in module.lora_A})


def swap_layers(model, root):
    """Swap and guard the PEFT layers below root that are not yet; returns [(name, old class, "" or the reason)]."""
    rows, inside_mha = [], ()
    for name, module in root.named_modules():
        full = ".".join(filter(None, (model.prefix, name)))
        if isinstance(module, MultiheadAttention):
            inside_mha += (name + ".",)
        if type(module) is MtLoraLinear:
            rows.append((full, "MtLoraLinear", "", module))
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            reason = _REASONS["MultiheadAttention"] if inside_mha and name.startswith(inside_mha) else decline_reason(module)
            rows.append((full, _class_name(module), reason, module))
            (_guard if reason else _swap)(model, full, module, reason)
    return rows


def _swap(model, name, module, _):
    unguard(module)
    module.__class__ = MtLoraLinear
    module._mtkernels = Shared(model, name, model.n_sites)
    model.n_sites += 1
    if len(module.lora_A):
        _warm(model, module)


def _warm(model, module):
    """Make the small tensors before a compiled forward asks: a graph that made its own would recompile once they exist."""
    device = next(iter(module.lora_A.values())).weight.device
    for names in (model.names(), *((name,) for name in module.lora_A)):
        held = [name in module.lora_A for name in names]
        scales = tuple(float(module.scaling[name]) if h else 0.0 for name, h in zip(names, held))
        dropouts = tuple(getattr(module.lora_dropout[name], "p", 0.0) if h else 0.0 for name, h in zip(names, held))
        for p in (dropouts, (0.0,) * len(names)):
            _small_tensors(model, names, scales, p, device)


def _guard(model, name, module, reason):
    unguard(module)
    module.register_forward_pre_hook(Guard(model, name, reason))


def unguard(module, kinds=(Guard,)):
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kinds):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, kinds):
            del module._forward_hooks[key]


def _class_name(module):
    where = "lora." if isinstance(module, LoraLayer) else ""
    return where + type(module).__name__


def trains(root, name):
    """Whether adapter `name` has a trainable LoRA parameter."""
    return any(p.requires_grad for layer in root.modules() if isinstance(layer, LoraLayer) for p in lora_parameters(layer, name))


def lora_parameters(layer, name):
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind)
        if name in held:
            yield from held[name].parameters() if isinstance(held[name], nn.Module) else (held[name],)
