"""Which of PEFT's layers `enable` swaps and guards, and PEFT's models beside them."""

from contextlib import contextmanager

from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ._embedding import MtLoraEmbedding, embedding_factors, table_reason
from ._factors import PLAIN, Shared, factors_of, is_plain_linear, refusal, small_tensors
from ._linear import MtLoraLinear
from .context import AdapterBatch, current_view


def _swappable():
    """{PEFT's class: ours}."""
    found = {Linear: MtLoraLinear, Embedding: MtLoraEmbedding}
    if is_bnb_4bit_available():
        from ._linear4bit import Linear4bit, MtLoraLinear4bit

        found[Linear4bit] = MtLoraLinear4bit
    return found


SWAPS = _swappable()
STOCK = {ours: stock for stock, ours in SWAPS.items()}


class MtLoraModel(LoraModel):
    """LoraModel whose adapter_names= also works in training."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names, model = kwargs.get("adapter_names"), self.__dict__["_mtkernels"]
        if names is None or not self.training:
            batch = super()._enable_peft_forward_hooks(*args, **kwargs)
        else:
            batch = AdapterBatch(list(names), models=[model], offsets=kwargs.get("alora_offsets"))
        with batch:
            yield


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
    "LoraParallelLinear": "tensor-parallel LoRA is not supported; shard by decoder layer, or run one adapter per batch",
}


def decline_reason(module):
    """Why `enable` leaves this PEFT module alone; "" when it swaps it."""
    if type(module) not in SWAPS:
        cls = type(module).__name__
        if isinstance(module, LoraLayer) and module.__module__.rsplit(".", 1)[-1] not in ("layer", "tp_layer"):
            return f"quantised LoRA layer {cls} is not proven with mtkernels yet; use an unquantised base or bitsandbytes' 4 bits, or run one adapter per batch"
        return _REASONS.get(cls, _UNSUPPORTED.format(cls=cls))
    base = module.get_base_layer()
    if type(module) is Embedding:
        return table_reason(base) or refusal(module, {name: embedding_factors(module, name) for name in module.lora_embedding_A})
    if type(module) is Linear and any(type(w) not in PLAIN for w in base._parameters.values() if w is not None):
        return "its base weight is a tensor subclass (sharded or quantised); call enable before sharding, or shard by decoder layer"
    return refusal(module, {name: factors_of(module, name) for name in module.lora_A})


def op_of(module):
    """(name of the op that runs a swapped layer, a tensor whose device and dtype choose its backend)."""
    base = module.base_layer
    if type(module) is MtLoraEmbedding:
        return "lora_embedding", module.get_base_layer().weight
    if len(module.lora_magnitude_vector):
        return "dora_linear" if is_plain_linear(base) else "lora_delta and dora_rescale", next(iter(module.lora_A.values())).weight
    if is_plain_linear(base):
        return "lora_linear", base.weight
    return "lora_delta", next(iter(module.lora_A.values())).weight if len(module.lora_A) else base.weight


def swap_layers(model, root):
    """Swap and guard the PEFT layers below root that are not yet; returns [(name, old class, "" or the reason)]."""
    rows, inside_mha = [], ()
    for name, module in root.named_modules():
        full = ".".join(filter(None, (model.prefix, name)))
        if isinstance(module, MultiheadAttention):
            inside_mha += (name + ".",)
        if type(module) in STOCK:
            rows.append((full, type(module).__name__, "", module))
        elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            reason = _REASONS["MultiheadAttention"] if inside_mha and name.startswith(inside_mha) else decline_reason(module)
            rows.append((full, _class_name(module), reason, module))
            (_guard if reason else _swap)(model, full, module, reason)
    return rows


def _swap(model, name, module, _):
    unguard(module)
    module.__class__ = SWAPS[type(module)]
    module._mtkernels = Shared(model, name, model.n_sites)
    model.n_sites += 1
    _warm(model, module)


def _warm(model, module):
    """Make the small tensors before a compiled forward asks: a graph that made its own would recompile once they exist."""
    embeds = type(module) is MtLoraEmbedding
    held = {**module.lora_embedding_A} if embeds else {name: A.weight for name, A in module.lora_A.items()}
    if not held:
        return
    device = next(iter(held.values())).device
    for names in (model.names(), *((name,) for name in held)):
        scales = tuple(float(module.scaling[name]) if name in held else 0.0 for name in names)
        dropouts = tuple(getattr(module.lora_dropout[name], "p", 0.0) if name in held and not embeds else 0.0 for name in names)
        for p in (dropouts, (0.0,) * len(names)):
            small_tensors(model, names, scales, p, device)


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
