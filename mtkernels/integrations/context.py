"""`with adapters(ids)`: which adapter each row of a micro-batch uses, for the layers that `enable` swapped."""

import itertools
import math
import threading
import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing dynamo for seconds
from torch._guards import TracingContext
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..ops import group_plan
from ..plan import alora_ids, as_step
from .alora import Invocations, invocation_tokens
from .ids import resolve

_MODELS = weakref.WeakSet()
_keys = itertools.count()
_STASH = "mtkernels.adapters"  # torch carries this to the threads that run backward


class _Local(threading.local):
    views = None  # {model key: View, or the error to raise there}; {} = a recompute of a forward without `adapters`
    trusted = False  # views were put back by checkpoint_context
    stray = None  # (graph task, model key) of a backward whose forward had other ids than the block it runs in

    def __init__(self):
        self.outer = []


_local = _Local()


class View:
    """The ids of one micro-batch as one model reads them, with the plans made from them."""

    def __init__(self, names, ids, step=None, keep_step=True, invocations=None, offsets=None):
        self.names, self.ids, self.step, self.keep_step = names, ids, step, keep_step
        self.invocations = Invocations(invocations or (), offsets)
        self.plans = []
        self.forwards, self.recomputes = {}, {}

    def plan(self, lead, device, module, dropout=False):
        """The plan for rows of shape `lead`, made once; `dropout` asks for the micro-batch's counter in it."""
        if dropout and not self.keep_step:
            return self._plan(lead, device, module).with_step(None)
        if dropout and self.step is None:
            self.step = as_step(None, device)
            self.plans = [(s, d, plan.with_step(self.step.to(d))) for s, d, plan in self.plans]
        return self._plan(lead, device, module)

    def _plan(self, lead, device, module):
        for shape, where, plan in self.plans:
            if shape == lead and where == device:
                return plan
        rows = _expand(self.invocations.cut(self.ids, lead, module), lead, module).to(device)
        plan = group_plan(rows, len(self.names), step=0 if self.step is None else self.step.to(device))
        self.plans.append((lead, device, plan))
        return plan

    def count(self, site, name):
        """A layer that runs more often in backward than it ran forward under these ids recomputes somebody else's rows."""
        task = torch._C._current_graph_task_id()
        if task < 0:
            self.forwards[site] = self.forwards.get(site, 0) + 1
            return
        last, n = self.recomputes.get(site, (task, 0))
        n = n + 1 if last == task else 1
        self.recomputes[site] = task, n
        if not _local.trusted and n > self.forwards.get(site, 0):
            raise RuntimeError(
                f"{name}: recomputed in backward under an `adapters` block in which it did not run forward, so the ids may "
                "belong to another batch. " + _REMEDY
            )


_REMEDY = (
    'Pass gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": mtkernels.checkpoint_context}, '
    "or call backward inside the `with adapters(...)` block of the same batch"
)


def _expand(ids, lead, module):
    """Ids of every row: as given, or one id per leading index repeated over the rest of the shape."""
    if ids.shape == lead:
        return ids.reshape(-1)
    if ids.dim() <= len(lead) and lead[: ids.dim()] == ids.shape:
        return ids.reshape(*ids.shape, *(1,) * (len(lead) - ids.dim())).expand(lead).reshape(-1)
    if ids.dim() > 1 and len(lead) == 1 and lead[0] == ids.numel():
        return ids.reshape(-1)
    want = f"one id per sequence {tuple(lead[:1])}" + (f" or per token {tuple(lead)}" if len(lead) > 1 else "")
    raise ValueError(f"{module}: adapter ids are {tuple(ids.shape)}, but this layer's input has rows {tuple(lead)}; give {want}")


class EnabledModel:
    """What the swapped layers of one model share: the order of its adapters, their dropout seeds, and plans."""

    def __init__(self, peft_config, root, prefix):
        self.peft_config, self.prefix = peft_config, prefix
        self.strict = False  # ran under `adapters` in grad mode: a recompute without ids is an error from now on
        self.seeds = {}
        self.n_sites = 0
        self._attach(root)

    def _attach(self, root):
        self.order = next(_keys)
        self.key = f"model{self.order}"
        self.root = (lambda: None) if root is None else weakref.ref(root)
        self._known = self._named = None
        self._active = {}  # whether of aLoRA: what its plan was made of, the plan
        self.numbers = {}
        _MODELS.add(self)

    def __getstate__(self):
        kept = ("peft_config", "prefix", "strict", "seeds", "n_sites")
        return {k: self.__dict__[k] for k in kept}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._attach(None)

    def __deepcopy__(self, memo):
        from copy import deepcopy

        root = self.root()
        if root is not None and id(root) not in memo:
            return self  # a part of the model is copied: it still belongs to the model
        new = object.__new__(EnabledModel)
        memo[id(self)] = new
        new.__setstate__(deepcopy(self.__getstate__(), memo))
        new.root = (lambda: None) if root is None else weakref.ref(memo[id(root)])
        return new

    def names(self):
        return tuple(self.peft_config)

    def refresh(self):
        """Swap and guard the layers that came with adapters added since the last look."""
        now = tuple(self.peft_config.items())
        if self._known is not None and len(now) == len(self._known) and all(a == b and c is d for (a, c), (b, d) in zip(now, self._known)):
            return
        root = self.root()
        if root is None:
            raise RuntimeError("adapters: this model was copied or loaded after mtkernels.enable(model); call mtkernels.enable(model) again")
        from .peft import swap_layers

        swap_layers(self, root)
        self._known = now

    def draw_step(self):
        """A dropout counter if the adapters' configs and the mode ask for one; drawing costs the generator a number."""
        root = self.root()
        if not root.training or not any(getattr(config, "lora_dropout", 0) for config in self.peft_config.values()):
            return None
        return as_step(None, next(root.parameters()).device)

    def seed(self, name):
        seed = self.seeds.get(name)
        return self.draw_seed(name) if seed is None else seed

    @_disable_dynamo
    def draw_seed(self, name):
        self.seeds[name] = int(torch.randint(-(2**63), 2**63 - 1, ()))
        return self.seeds[name]

    def named_view(self, adapter_names, offsets=None):
        """The view of PEFT's own adapter_names=, which reaches every layer as a list."""
        wanted, names = tuple(adapter_names), self.names()
        if torch.is_grad_enabled():
            self.strict = True
        key = wanted, names, None if offsets is None else tuple(offsets)
        if self._named is None or self._named[0] != key:
            ids, offsets = resolve(list(wanted), names)[0], offsets or [None] * len(wanted)  # no offsets: PEFT runs the base alone
            self._named = key, View(names, ids, keep_step=False, invocations=invocation_tokens(self.peft_config), offsets=offsets)
        return self._named[1]

    def active_plan(self, lead, x, offsets, factors):
        """The plan of an active adapter outside `adapters`: every row in group 0, of aLoRA those that PEFT's offsets invoke."""
        key = math.prod(lead), x.device, None
        if factors.invoked:  # without offsets PEFT runs the base alone
            key = tuple(lead), x.device, (None,) * lead[0] if offsets is None else tuple(offsets)
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
            plan = _one_group(*key)
        elif self._active.get(factors.invoked, (None,))[0] == key:
            plan = self._active[factors.invoked][1]
        else:
            with torch.inference_mode(False):  # kept across calls, so training must be able to save it
                plan = _one_group(*key)
            self._active[factors.invoked] = key, plan
        # drawn from torch's generator, whose state checkpointing restores: the recompute replays the mask
        return plan.with_step(None) if factors.dropout else plan


def _one_group(lead, device, offsets):
    """lead: number of rows; with offsets, sequences (and tokens)."""
    if offsets is None:
        return group_plan(torch.zeros(lead, dtype=torch.int32, device=device), 1, step=0)
    sequences = torch.zeros(lead[0], dtype=torch.int32, device=device)
    return group_plan(alora_ids(sequences, list(offsets), lead[1] if len(lead) > 1 else 1).reshape(-1), 1, step=0)


class AdapterBatch:
    """The context manager behind `adapters`: one micro-batch, whose plan and dropout counter live as long as it does."""

    def __init__(self, ids, models=None, offsets=None):
        self.ids, self._models, self._offsets = ids, models, offsets
        self._views = None

    def __enter__(self):
        if self._views is None:
            self._views = self._resolve()
        outer, _local.stray = _local.views, None
        _local.outer.append(outer)
        _set(self._views if self._models is None else {**(outer or {}), **self._views})
        return self

    def __exit__(self, *_):
        _set(_local.outer.pop())

    def _resolve(self):
        models = self._models or sorted(_MODELS, key=lambda model: -model.order)
        # held, so that none is collected before we are done; a model that already was concerns nobody
        alive = [(model, root) for model in models if (root := model.root()) is not None or not isinstance(model.root, weakref.ref)]
        if not alive:
            raise RuntimeError("adapters: no model is enabled; call mtkernels.enable(model) first")
        views, good = {}, []
        for model, _ in alive:
            try:
                model.refresh()
                ids, used = resolve(self.ids, model.names())
                self._require_trainable(model, used)
                views[model.key] = View(model.names(), ids, model.draw_step(), invocations=invocation_tokens(model.peft_config), offsets=self._offsets)
                good.append(model)
            except (ValueError, IndexError, RuntimeError) as error:
                views[model.key] = error.with_traceback(None)
        if not good:
            raise next(iter(views.values()))
        for model in good if torch.is_grad_enabled() else ():
            model.strict = True
        return views

    def _require_trainable(self, model, used):
        if not torch.is_grad_enabled():
            return
        from .peft import trains

        root, names = model.root(), model.names()
        frozen = [n for n in used if not trains(root, n)]
        if frozen and any(trains(root, n) for n in names if n not in frozen):
            raise RuntimeError(
                f"adapters: {', '.join(map(repr, frozen))} would not train: all LoRA parameters are frozen while another adapter trains "
                f"(PEFT leaves only the active one trainable). Call mtkernels.enable(model, train={frozen}), or use torch.no_grad() to evaluate"
            )


def _set(views):
    _local.views = views
    torch._C._stash_obj_in_tls(_STASH, views)


def adapters(ids):
    """Give each row of one micro-batch its own adapter, in training or inference, on models passed to `enable`.

    ids: one per sequence [B] or per token [B, S] (a packed [1, total] batch takes [1, total]; flat inputs [T, D] take
        [T]): an int32/int64 tensor or a (nested) list of ints, of names, or both. Ints follow the order of
        `model.peft_config`; -1 or "__base__" is no adapter. A single int or name serves all rows.
    The plan and the dropout counter are made once and reused by all layers and both passes: open a new block for each
    micro-batch. Blocks nest. Adapters absent from the batch get zero gradients (weight decay still acts on them).
    In grad mode it raises RuntimeError if a named adapter is wholly frozen while another trains (ids on a GPU are not
    read for this, unless MTKERNELS_DEBUG=1). From then on, a layer of the model that runs inside backward without its
    ids raises; `checkpoint_context` brings them back.
    Raises TypeError for other id types, ValueError for unknown names and shapes, IndexError for ids out of range.
    """
    return AdapterBatch(ids)


def checkpoint_context(context_fn=None):
    """context_fn for torch.utils.checkpoint(use_reentrant=False): the recompute sees the `adapters` of its forward.

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": mtkernels.checkpoint_context})
    context_fn: another one to run inside, e.g. functools.partial(checkpoint_context, selective_context_fn).
    """
    if TracingContext.try_get() is not None:  # a compiled region: the plan is in the graph, and only dispatch modes may come back
        return (context_fn or _recompute_all)()
    views = _local.views or {}
    forward, recompute = (nullcontext(), nullcontext()) if context_fn is None else context_fn()
    return forward, _restored(views, recompute)


def _recompute_all():
    return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE)


@contextmanager
def _restored(views, inner):
    before, trusted = _local.views, _local.trusted
    _set(views)
    _local.trusted = True
    try:
        with inner:
            yield
    finally:
        _set(before)
        _local.trusted = trusted


def current_view(model, site, name):
    """The view that layer `name` runs under, or None; raises in a recompute that lost its own."""
    compiling = torch.compiler.is_compiling()
    views = _local.views if compiling else _views()
    if _local.stray is not None and not _local.trusted:
        (_refuse_stray_compiled if compiling else _refuse_stray)(model.key, name)
    view = None if views is None else views.get(model.key)
    if view is None:
        if model.strict and views is None and torch.is_grad_enabled():
            (_refuse_compiled if compiling else _refuse_recompute)(name)
        return None
    if isinstance(view, Exception):
        raise view
    if not compiling:
        view.count(site, name)
    return view


def _views():
    if _local.views is None and in_backward() and torch._C._is_key_in_tls(_STASH):
        return torch._C._get_obj_in_tls(_STASH)  # reentrant checkpointing on a GPU: backward runs in another thread
    return _local.views


def open_view(model):
    """The View of a model in the `adapters` block that is open, or None."""
    view = None if _local.views is None else _local.views.get(model.key)
    return view if isinstance(view, View) else None


def mark_stray(model, view):
    """Called where backward reaches an output of `view`: in another block, a recompute of the model must raise from here on."""
    views = _views()
    if views is not None and views.get(model.key) is not view:
        _local.stray = torch._C._current_graph_task_id(), model.key


def in_backward():
    return torch._C._current_graph_task_id() >= 0


def _refuse_recompute(name):
    if in_backward():
        raise RuntimeError(f"{name}: runs inside backward (a checkpoint's recompute) without the `adapters` of its forward. " + _REMEDY)


def _refuse_stray(key, name):
    if _local.stray == (torch._C._current_graph_task_id(), key):
        _local.stray = None  # this backward ends here
        raise RuntimeError(f"{name}: recomputed in backward under an `adapters` block in which this loss did not run forward, so with another batch's ids. " + _REMEDY)


_refuse_compiled = _disable_dynamo(_refuse_recompute)
_refuse_stray_compiled = _disable_dynamo(_refuse_stray)
