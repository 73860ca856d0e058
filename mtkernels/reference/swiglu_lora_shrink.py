"""The gated product of an MLP, and its result in rank space:

    a = act(gate)      h = a o up      S[p] = (M o h[row]) A_i^T

    dh' = dh + sum over the row's positions of M o (dS A_i)
    dgate = dh' o up o act'(gate)      dup = dh' o a      dA_i = dS^T (M o h)

act is ACTIVATIONS[index]. a and h are rounded to their dtype, as in transformers' LlamaMLP; S and dA see h as rounded.
Positions, bits and empty gradients as in lora_shrink.
"""

import torch
import torch.nn.functional as F

from .lora_shrink import lora_shrink_bwd, lora_shrink_fwd, wide

ACTIVATIONS = ("silu", "gelu_tanh")


def swiglu_lora_shrink_fwd(gate, up, act, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits=None):
    h = _activate(gate, act).to(gate.dtype) * up
    return h, lora_shrink_fwd(h, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, bits)


def swiglu_lora_shrink_bwd(dh, ds, gate, up, act, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, dgate, dup, dA, bits=None):
    """Writes dgate and dup, unless both are None, and dA."""
    total, a = wide(dh).clone(), _activate(gate, act).to(gate.dtype)
    lora_shrink_bwd(ds, a * up, A, threshold, seeds, offsets, perm, tiles, step, sites, dropout, total, dA, bits)
    if dgate is not None:
        dgate.copy_(total * wide(up) * _slope(wide(gate), act))
        dup.copy_(total * wide(a))


def _activate(gate, act):
    return F.silu(wide(gate)) if act == 0 else F.gelu(wide(gate), approximate="tanh")


def _slope(z, act):
    if act == 0:
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    c = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * c * (1 + 3 * 0.044715 * z.square())
