"""register(): schema, kernel, fake, autograd and autocast of one op on the library `mtkernels`."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

LIB = torch.library.Library("mtkernels", "DEF")
below_autograd = torch._C._AutoDispatchBelowAutograd


@dataclass(frozen=True)
class OpInfo:
    """A registered op: `stem` names its files, `differentiable` whether it has a gradient."""

    name: str
    stem: str
    op: object
    differentiable: bool


OPS: dict[str, OpInfo] = {}


def register(stem, schema, *, kernel, fake, autograd=None, autocast=()):
    """Define `mtkernels::<schema>` and return the overload.

    kernel: runs on CPU and CUDA tensors (it picks the backend); fake: shapes and dtypes, also serves meta;
    autograd: a function with the op's signature that applies an autograd.Function, or None for an op without gradient
    (backward ops: differentiating through them raises by name); autocast: names of the arguments that follow
    torch.autocast as nn.Linear's do.
    """
    name = schema.split("(")[0]
    LIB.define(schema)
    for key in ("CPU", "CUDA"):
        LIB.impl(name, kernel, key)
    torch.library.register_fake(f"mtkernels::{name}", fake, lib=LIB)
    op = getattr(torch.ops.mtkernels, name).default
    LIB.impl(name, autograd or _refuse_gradient(name, op), "Autograd")
    if autocast:
        _register_autocast(name, op, autocast)
    OPS[name] = OpInfo(name, stem, op, autograd is not None)
    return op


def pack(args):
    """Flat arguments for an autograd.Function, which wants tensors, not lists; and the lengths to rebuild the lists."""
    flat, spec = [], []
    for a in args:
        is_list = isinstance(a, (list, tuple)) and len(a) > 0 and isinstance(a[0], torch.Tensor)
        spec.append(len(a) if is_list else None)
        flat.extend(a) if is_list else flat.append(a)
    return flat, tuple(spec)


def unpack(spec, flat):
    args, begin = [], 0
    for n in spec:
        args.append(flat[begin] if n is None else list(flat[begin : begin + n]))
        begin += n or 1
    return args


def save(ctx, *args):
    """Keep the op arguments `args` (tensors, lists of tensors, anything else) for `load` in backward."""
    flat, ctx.saved_spec = pack(args)
    ctx.save_for_backward(*(a for a in flat if isinstance(a, torch.Tensor)))
    ctx.saved_rest = [None if isinstance(a, torch.Tensor) else (a,) for a in flat]


def load(ctx):
    tensors = iter(ctx.saved_tensors)
    return unpack(ctx.saved_spec, [next(tensors) if a is None else a[0] for a in ctx.saved_rest])


def _register_autocast(name, op, which):
    positions = {i for i, arg in enumerate(op._schema.arguments) if arg.name in which}

    def rule(device, key):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(value, dtype):
            if isinstance(value, (list, tuple)):
                return [cast(v, dtype) for v in value]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return value.to(dtype)
            return value

        def run(*args):
            dtype = torch.get_autocast_dtype(device)
            args = [cast(a, dtype) if i in positions else a for i, a in enumerate(args)]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*args)

        LIB.impl(name, run, key)

    rule("cpu", "AutocastCPU")
    rule("cuda", "AutocastCUDA")


def _refuse_gradient(name, op):
    """The Autograd kernel of an op without gradient: its outputs raise by name if anyone differentiates them."""

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, spec, box, *flat):
            with below_autograd():
                out = op(*tree_unflatten(list(flat), spec))
            leaves, box[0] = tree_flatten(out)
            ctx.mark_non_differentiable(*(t for t in leaves if not t.is_floating_point()))
            return tuple(leaves)

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(
                f"mtkernels::{name}: double backward is not supported; detach what feeds it, or keep this op out of the second derivative"
            )

    def run(*args):
        if torch.is_grad_enabled():
            flat, spec = tree_flatten(args)
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in flat):
                box = [None]
                leaves = Refuse.apply(spec, box, *flat)
                return tree_unflatten(list(leaves), box[0])
        with below_autograd():
            return op(*args)

    return run
