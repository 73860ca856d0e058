"""Device tables of addresses and sizes, for kernels over tensors that are owned separately."""

import functools

import torch
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def address(t):
    """Where t begins; 0 for an empty tensor."""
    return t.data_ptr() if t.numel() else 0


def device_table(rows, device):
    """int64 [fields, n] of the tuples `rows`, uploaded without waiting; cached by its values, which are no contents of tensors."""
    if device.type == "cpu":
        return _table(rows, device, None)
    if torch.cuda.is_current_stream_capturing():
        return _table.__wrapped__(rows, device, None)
    # One table per stream: the copy that fills it, its uses and its release are then ordered without waiting.
    return _table(rows, device, torch.cuda.current_stream(device).cuda_stream)


# A captured copy reads its host memory at every replay of the graph.
_captured = []


@functools.lru_cache(maxsize=1024)
def _table(rows, device, stream):
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64)
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)
