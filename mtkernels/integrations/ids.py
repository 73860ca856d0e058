"""Adapter ids as users write them -> an integer tensor."""

import operator
import os

import torch

BASE = "__base__"


def resolve(ids, names):
    """(id tensor, names in use) of `ids` against the model's adapters in order.

    The names in use come without a device sync: () for a tensor on a GPU unless MTKERNELS_DEBUG=1.
    """
    if hasattr(ids, "__array__"):
        ids = torch.as_tensor(ids)
    if not isinstance(ids, torch.Tensor):
        ids = torch.tensor(_to_ints(ids, {name: i for i, name in enumerate(names)}), dtype=torch.int64)
    elif ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapters: ids are {ids.dtype}; give int32 or int64 ids, or names")
    if ids.device.type != "cpu" and os.environ.get("MTKERNELS_DEBUG") != "1":
        return ids, ()
    used = ids.unique().tolist()
    if used and not -1 <= used[0] <= used[-1] < len(names):
        bad = used[0] if used[0] < -1 else used[-1]
        raise IndexError(f"adapters: id {bad} is out of range; -1 is no adapter and the model has {_listed(names)}")
    return ids, tuple(names[i] for i in used if i >= 0)


def _to_ints(ids, index):
    if isinstance(ids, (list, tuple)):
        rows = [_to_ints(i, index) for i in ids]
        if len({len(r) if isinstance(r, list) else -1 for r in rows}) > 1:
            raise ValueError("adapters: nested ids differ in length; pad them with -1 to [B, S]")
        return rows
    if isinstance(ids, str):
        if ids != BASE and ids not in index:
            raise ValueError(f"adapters: no adapter {ids!r}; the model has {_listed(index)}, and {BASE!r} is none")
        return index.get(ids, -1)
    try:
        if isinstance(ids, bool):
            raise TypeError
        return operator.index(ids)
    except TypeError:
        got = f"a {type(ids).__name__}" if not isinstance(ids, float) else f"{ids!r}, a float"
        raise TypeError(f"adapters: got {got}; give ints, adapter names, or an int32/int64 tensor") from None


def _listed(names):
    return ", ".join(f"{i} {name!r}" for i, name in enumerate(names)) or "no adapter"
