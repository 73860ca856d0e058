"""Hooks of an enabled model: the plan is made before its layers ask, and its outputs remember whose ids they have."""

import torch
from torch.utils._pytree import tree_leaves

from .context import in_backward, mark_stray, open_view


class Planner:
    """Forward pre-hook: makes the plan before the layers ask, where a compiled checkpoint may not."""

    def __init__(self, model):
        self.model = model

    def __call__(self, module, args, kwargs):
        view = open_view(self.model)
        if view is None:
            return
        tokens, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 and not tokens.is_floating_point():
            lead = tokens.shape
        elif isinstance(embeds, torch.Tensor) and embeds.dim() == 3:
            lead, tokens = embeds.shape[:2], embeds
        else:
            return
        if view.invocations and view.invocations.find(tokens, view.ids, _cache(kwargs)):
            view.plans = []
        if view.ids.shape == lead[: view.ids.dim()]:
            view.plan(lead, tokens.device, self.model.prefix)


class Departure:
    """Forward hook: outputs remember the ids they were computed with until their backward."""

    def __init__(self, model):
        self.model = model

    def __call__(self, module, args, output):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward():
            return
        view = open_view(self.model)
        if view is None:
            return
        for node in {t.grad_fn for t in tree_leaves(output) if isinstance(t, torch.Tensor)} - {None}:
            node.register_prehook(lambda grads: mark_stray(self.model, view))


def _cache(kwargs):
    """The model's cache of keys and values, whose name differs between versions of transformers."""
    return next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)
