"""enable, disable and the report they give."""

import re
from importlib.util import find_spec
from typing import NamedTuple

from .. import _backends


class Row(NamedTuple):
    """module: its name; was: its class before; now: what runs it, or the reason it was declined."""

    module: str
    was: str
    now: str


class Report:
    """What `enable` did. `swapped` and `declined` are lists of Row; prints as a table, numbered layers folded into one line."""

    def __init__(self, swapped, declined, note=""):
        self.swapped, self.declined, self.note = swapped, declined, note

    def __bool__(self):
        return bool(self.swapped)

    def __str__(self):
        lines = [f"mtkernels: {len(self.swapped)} LoRA layers enabled, {len(self.declined)} declined" + (f"; {self.note}" if self.note else "")]
        table = [Row("module", "was", "now"), *_folded(self.swapped), *_folded([r._replace(now=f"declined: {r.now}") for r in self.declined])]
        if len(table) > 1:
            widths = [max(len(row[i]) for row in table) for i in (0, 1)]
            lines += [f"  {r.module:<{widths[0]}}  {r.was:<{widths[1]}}  {r.now}" for r in table]
        return "\n".join(lines)

    __repr__ = __str__


def _folded(rows):
    groups = {}
    for row in rows:
        groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", row.module), row.was, row.now), []).append(row.module)
    for (pattern, was, now), names in groups.items():
        yield Row(names[0] if len(names) == 1 else f"{pattern} (x{len(names)})", was, now)


def enable(model, train=None, *, verbose=True):
    """Run the PEFT LoRA layers of `model` on mtkernels, with many adapters per batch in training and inference.

    model: a PeftModel, a transformers model with adapters, or a module that contains one. Only the class of supported
        layers changes: parameters, names, state_dict and files on disk stay as they are. Calling it again is safe.
    train: names of adapters to unfreeze (PEFT leaves only the active one trainable; `disable` does not freeze them again).
    verbose: print the report.
    Taken: Linear with plain LoRA, DoRA and aLoRA adapters (these start where PEFT's invocation tokens last occur in
    input_ids; ids per token are taken as they are), Embedding with plain LoRA, bitsandbytes' Linear4bit.
    Declined layers keep PEFT's own forward, and raise inside `adapters`, where that would serve rows with the wrong adapter.
    Returns a Report. Raises ValueError for names in `train` that the model does not have.
    """
    rows, note = [], _nothing_here(model)
    if not note:
        rows = _swap_all(model)
        _unfreeze(model, [train] if isinstance(train, str) else train or ())
    elif train:
        raise ValueError(f"enable: train={train!r}, but {note}")
    swapped = [Row(name, was, _runs(module)) for name, was, reason, module in rows if not reason]
    declined = [Row(name, was, reason) for name, was, reason, _ in rows if reason]
    report = Report(swapped, declined, note)
    if verbose:
        print(report)
    return report


def _nothing_here(model):
    hint = "wrap the model first, e.g. peft.get_peft_model(model, peft.LoraConfig(...))"
    if find_spec("peft") is None:
        return f"nothing to enable: peft is not installed (pip install peft); then {hint}"
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        return f"nothing to enable: {type(model).__name__} has no PEFT layers; {hint}"
    return ""


def _swap_all(model):
    from peft import PeftModel

    from . import peft
    from ._hooks import Departure, Planner

    rows = []
    for prefix, owner in _owners(model):
        shared = _shared_of(owner, prefix)
        rows += peft.swap_layers(shared, owner)
        shared._known = tuple(shared.peft_config.items())
        peft.unguard(owner, (Departure, Planner))
        owner.register_forward_hook(Departure(shared))
        owner.register_forward_pre_hook(Planner(shared), with_kwargs=True)
        for module in model.modules():
            if type(module) in (peft.LoraModel, peft.MtLoraModel) and module.model is owner:
                module.__class__ = peft.MtLoraModel
                module.__dict__["_mtkernels"] = shared
            elif isinstance(module, PeftModel) and module.get_base_model() is owner:
                peft.unguard(module, peft.LossForwarder)
                module.register_forward_pre_hook(peft.LossForwarder())
    return rows


def _owners(model):
    """(name, module) of each innermost module that holds a peft_config: the models into which PEFT injected layers."""
    found = {}
    for name, module in model.named_modules():
        config = vars(module).get("peft_config")
        if isinstance(config, dict) and config:
            found[id(config)] = name, module
    if not found:
        raise ValueError(f"enable: {type(model).__name__} has PEFT layers but no peft_config; pass the model into which the adapters were injected")
    return list(found.values())


def _shared_of(owner, prefix):
    from .context import EnabledModel
    from .peft import STOCK

    for module in owner.modules():
        if type(module) in STOCK and module._mtkernels.model.peft_config is owner.peft_config:
            shared = module._mtkernels.model
            if shared.root() is not owner:
                shared._attach(owner)
            return shared
    return EnabledModel(owner.peft_config, owner, prefix)


def _unfreeze(model, names):
    from .peft import LoraLayer, lora_parameters

    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for name in names:
        parameters = [p for layer in layers for p in lora_parameters(layer, name)]
        if not parameters:
            have = sorted({n for layer in layers for n in (*layer.lora_A, *layer.lora_embedding_A)})
            raise ValueError(f"enable: train names {name!r}, but the model has {', '.join(map(repr, have))}")
        for p in parameters:
            p.requires_grad_(True)


def _runs(module):
    from .peft import op_of

    op, like = op_of(module)
    return f"{op} ({_backends.explain('dora' if 'dora' in op else op, like).chosen})"


def disable(model):
    """Undo `enable`: every class and hook as before. Parameters, and what `train` unfroze, stay as they are."""
    if find_spec("peft") is None:
        return
    from . import peft
    from ._hooks import Departure, Planner

    for module in model.modules():
        peft.unguard(module, (peft.Guard, peft.LossForwarder, Departure, Planner))
        if type(module) in peft.STOCK:
            module.__class__ = peft.STOCK[type(module)]
        elif type(module) is peft.MtLoraModel:
            module.__class__ = peft.LoraModel
        else:
            continue
        del module.__dict__["_mtkernels"]
