"""LoraBank: the adapters of one linear layer, each with its own rank, scale, dropout, seed and bias."""

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LoraBank:
    """Adapters of one linear layer, ranks as they are: nothing is padded, stacked or copied.

    A: list of [R_i, D]; B: list of [O, R_i]; bias: list of [O] or None, or None. scale [n] float32 multiplies B A x
    and the bias (PEFT's convention). threshold [n] int32 is round(65536 * dropout): an input element is kept when its
    16 random bits reach it. seeds [n] int64 key the dropout of each adapter. Build it with `from_factors`.
    """

    def __init__(self, A, B, bias, scale, threshold, seeds):
        self.A, self.B, self.bias = A, B, bias
        self.scale, self.threshold, self.seeds = scale, threshold, seeds

    @classmethod
    def from_factors(cls, A, B, scale, *, dropout=0.0, seeds=None, bias=None):
        """Describe adapters by their own tensors.

        A, B: lists of [R_i, D] and [O, R_i], one dtype, one device, any rank >= 0. scale, dropout: a float or one per
        adapter (dropout in [0, 1]). seeds: int64 tensor or list of ints; None draws from torch's generator.
        bias: None, or a list of [O] tensors and Nones. Raises ValueError naming the adapter that does not fit.
        """
        A, B = list(A), list(B)
        _check_factors(A, B)
        n, device = len(A), A[0].device
        scale = _per_adapter("scale", scale, n, device)
        dropout = _per_adapter("dropout", dropout, n, "cpu")
        if not bool(((dropout >= 0) & (dropout <= 1)).all()):
            raise ValueError(f"LoraBank: dropout is {dropout.tolist()}; probabilities are in [0, 1]")
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (n,), device=device)
        seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
        if seeds.shape != (n,):
            raise ValueError(f"LoraBank: {tuple(seeds.shape)} seeds for {n} adapters")
        threshold = (dropout.double() * 65536).round().int().to(device)
        return cls(A, B, _check_bias(bias, A, B), scale, threshold, seeds)

    def __len__(self):
        return len(self.A)

    @property
    def in_features(self):
        return self.A[0].shape[1]

    @property
    def out_features(self):
        return self.B[0].shape[0]

    @property
    def ranks(self):
        return [a.shape[0] for a in self.A]

    def tensors(self):
        return (*self.A, *self.B, *self.bias, self.scale, self.threshold, self.seeds)

    def __repr__(self):
        return f"LoraBank({len(self)} adapters, {self.in_features} -> {self.out_features}, ranks {self.ranks})"


def _check_factors(A, B):
    if not A or len(A) != len(B):
        raise ValueError(f"LoraBank: got {len(A)} A and {len(B)} B factors; give one pair per adapter, at least one")
    for i, (a, b) in enumerate(zip(A, B)):
        for name, t in (("A", a), ("B", b)):
            if type(t).__name__ == "DTensor":
                raise TypeError(f"LoraBank: {name}[{i}] is a DTensor; shard by decoder layer so that factors are plain tensors in forward")
            if not isinstance(t, torch.Tensor) or t.dim() != 2 or t.dtype not in KERNEL_DTYPES:
                got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
                raise ValueError(f"LoraBank: {name}[{i}] is {got}; give a 2-d floating-point tensor")
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"LoraBank: adapter {i} has rank {a.shape[0]} in A {tuple(a.shape)} but {b.shape[1]} in B {tuple(b.shape)}")
        if a.shape[1] != A[0].shape[1] or b.shape[0] != B[0].shape[0]:
            raise ValueError(
                f"LoraBank: adapter {i} maps {a.shape[1]} -> {b.shape[0]} features, adapter 0 maps {A[0].shape[1]} -> {B[0].shape[0]}; one bank serves one layer"
            )
        if {a.dtype, b.dtype, A[0].dtype} != {A[0].dtype} or {a.device, b.device, A[0].device} != {A[0].device}:
            raise ValueError(
                f"LoraBank: adapter {i} is {a.dtype}/{b.dtype} on {a.device}/{b.device}, adapter 0 is {A[0].dtype} on {A[0].device}; use one dtype and device"
            )


def _check_bias(bias, A, B):
    if bias is None or all(t is None for t in bias):
        return []
    if len(bias) != len(A):
        raise ValueError(f"LoraBank: {len(bias)} biases for {len(A)} adapters; give one (or None) per adapter")
    for i, t in enumerate(bias):
        if t is not None and (t.shape != B[i].shape[:1] or t.dtype != A[0].dtype or t.device != A[0].device):
            raise ValueError(f"LoraBank: bias[{i}] is {t.dtype} {tuple(t.shape)} on {t.device}; adapter {i} needs {A[0].dtype} {tuple(B[i].shape[:1])} on {A[0].device}")
    return [A[0].new_empty(0) if t is None else t for t in bias]


def _per_adapter(name, value, n, device):
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    if value.dim() == 0:
        return value.expand(n).contiguous()
    if value.shape != (n,):
        raise ValueError(f"LoraBank: {name} has shape {tuple(value.shape)}; give a number or one per adapter [{n}]")
    return value
