"""What a call keeps for its backward, and the most memory it holds beyond what it was given."""

import os
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks


def _storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def saved_bytes(call, problem):
    """Bytes of distinct storages that the forward saved.

    "activations": the problem's own per-token tensors; "made": what the forward allocated. Parameters, the plan and
    other things it was given are not counted.
    """
    saved = {}

    def pack(t):
        saved.update(_storages([t]))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = call.forward()  # noqa: F841  keeps the graph, hence the storages, alive until they are counted
    tensors = {**problem.leaves, **problem.fixed, **call.leaves}
    activations = _storages(tensors[name] for name in problem.activations)
    given = _storages((*tensors.values(), *call.given))
    return {
        "activations": sum(n for ptr, n in saved.items() if ptr in activations),
        "made": sum(n for ptr, n in saved.items() if ptr not in given),
    }


def peak_extra_bytes(call, device):
    """The most bytes of tensors alive at once during one forward and backward, beyond those alive before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_profiler() as profile:
        call.step()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, nbytes in events:
        now += nbytes
        peak = max(peak, now)
    return peak


@contextmanager
def _quiet_profiler():
    """The profiler sees every allocation of torch's CPU allocator; it also writes notices straight to descriptor 2."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            yield profile
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
