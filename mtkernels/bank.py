"""LoraBank: the adapters of one linear layer, each with its own rank, scale, dropout, seed and bias."""

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("separate", "packed", "stacked", "experts")


class LoraBank:
    """Adapters of one linear layer, ranks as they are: nothing is padded, stacked or copied.

    params_A, params_B: the caller's tensors, which receive the gradients; A and B view them as one [R_i, D] and one
    [O, R_i] per adapter. bias: list of [O] (empty: none), or []. scale [n] float32 (float64 beside float64 factors)
    multiplies B A x and the bias (PEFT's convention) and may require grad. threshold [n] int32 is
    round(65536 * dropout): an input element is kept when its 16 random bits reach it. seeds [n] int64 key the dropout
    of each adapter. has_dropout is False when every probability is known to be 0. Build it with `from_factors`,
    `from_packed`, `from_stacked` or `from_experts`.

    With `main_grad = True`, every LoRA op (dora_linear's norm aside, which is a constant) computes the gradients of the parameters in
    float32 and adds them to each one's `.main_grad` (float32, the parameter's shape, as Megatron keeps it) instead of returning them.
    """

    main_grad = False

    def __init__(self, params_A, params_B, ranks, layout, bias, scale, threshold, seeds):
        self.params_A, self.params_B, self.ranks, self.layout = params_A, params_B, ranks, layout
        self.bias, self.scale, self.threshold, self.seeds = bias, scale, threshold, seeds
        self.has_dropout = True

    @classmethod
    def from_factors(cls, A, B, scale, *, dropout=0.0, seeds=None, bias=None):
        """Describe adapters by their own tensors.

        A, B: lists of [R_i, D] and [O, R_i], one dtype, one device, any rank >= 0. scale, dropout: a float or one per
        adapter (dropout in [0, 1]). seeds: int64 tensor or list of ints; None draws from torch's generator.
        bias: None, or a list of [O] tensors and Nones. Raises ValueError naming the adapter that does not fit.
        """
        A, B = list(A), list(B)
        if not A or len(A) != len(B):
            raise ValueError(f"LoraBank: got {len(A)} A and {len(B)} B factors; give one pair per adapter, at least one")
        _check_tensors(A=A, B=B)
        for i, (a, b) in enumerate(zip(A, B)):
            if a.dim() == b.dim() == 2 and a.shape[0] != b.shape[1]:
                raise ValueError(f"LoraBank: adapter {i} has rank {a.shape[0]} in A {tuple(a.shape)} but {b.shape[1]} in B {tuple(b.shape)}")
        return cls._build(A, B, [a.shape[0] for a in A], "separate", scale, dropout, seeds, bias)

    @classmethod
    def from_packed(cls, A, B, ranks, scale, *, dropout=0.0, seeds=None, bias=None):
        """Rank-packed storage: A [sum of ranks, D] and B [sum of ranks, O], the rows of adapter i after those of i - 1.

        B holds B_i^T. Other arguments as in from_factors. Gradients have the packed shapes.
        """
        _check_tensors(A=[A], B=[B])
        ranks = [int(r) for r in ranks]
        if not ranks or min(ranks) < 0 or A.dim() != 2 or B.dim() != 2 or A.shape[0] != sum(ranks) or B.shape[0] != sum(ranks):
            raise ValueError(f"LoraBank: packed A {tuple(A.shape)} and B {tuple(B.shape)} for ranks {ranks}; give [{sum(ranks)}, D] and [{sum(ranks)}, O]")
        return cls._build([A], [B], ranks, "packed", scale, dropout, seeds, bias)

    @classmethod
    def from_stacked(cls, A, B, scale, *, ranks=None, dropout=0.0, seeds=None, bias=None):
        """One tensor over slots, as Megatron-Bridge keeps them: A [n, R, D], B [n, O, R].

        ranks: how much of R each slot uses, None for all; the rest is never read and its gradient is exact zeros.
        Other arguments as in from_factors.
        """
        _check_tensors(A=[A], B=[B])
        if A.dim() != 3 or B.dim() != 3 or A.shape[0] != B.shape[0] or A.shape[1] != B.shape[2] or not A.shape[0]:
            raise ValueError(f"LoraBank: stacked A {tuple(A.shape)} and B {tuple(B.shape)}; give [n, R, D] and [n, O, R]")
        n, R = A.shape[:2]
        ranks = [R] * n if ranks is None else [int(r) for r in ranks]
        if len(ranks) != n or not all(0 <= r <= R for r in ranks):
            raise ValueError(f"LoraBank: ranks {ranks} for {n} slots of {R}; give one in [0, {R}] per slot")
        return cls._build([A], [B], ranks, "stacked", scale, dropout, seeds, bias)

    @classmethod
    def from_experts(cls, A, B, n_experts, scale, *, dropout=0.0, seeds=None, bias=None):
        """PEFT's LoRA on expert parameters: A [n_experts * R, D] with the expert slowest, B [O, R * n_experts] with it fastest.

        Other arguments as in from_factors.
        """
        _check_tensors(A=[A], B=[B])
        if A.dim() != 2 or B.dim() != 2 or n_experts < 1 or A.shape[0] % n_experts or B.shape[1] != A.shape[0]:
            raise ValueError(f"LoraBank: expert A {tuple(A.shape)} and B {tuple(B.shape)} for {n_experts} experts; give [{n_experts} R, D] and [O, R {n_experts}]")
        return cls._build([A], [B], [A.shape[0] // n_experts] * n_experts, "experts", scale, dropout, seeds, bias)

    @classmethod
    def _build(cls, params_A, params_B, ranks, layout, scale, dropout, seeds, bias):
        A, B = views_A(params_A, layout, ranks), views_B(params_B, layout, ranks)
        _check_factors(A, B)
        n, device = len(A), A[0].device
        scale = _per_adapter("scale", scale, n, device, torch.promote_types(torch.float32, A[0].dtype))
        dropout = _per_adapter("dropout", dropout, n, "cpu", torch.float32)
        if not bool(((dropout >= 0) & (dropout <= 1)).all()):
            raise ValueError(f"LoraBank: dropout is {dropout.tolist()}; probabilities are in [0, 1]")
        if seeds is None:
            seeds = torch.randint(-(2**63), 2**63 - 1, (n,), device=device)
        seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
        if seeds.shape != (n,):
            raise ValueError(f"LoraBank: {tuple(seeds.shape)} seeds for {n} adapters")
        threshold = (dropout.double() * 65536).round().int().to(device)
        bank = cls(params_A, params_B, ranks, layout, _check_bias(bias, A, B), scale, threshold, seeds)
        bank.has_dropout = bool((dropout > 0).any())
        return bank

    def __len__(self):
        return len(self.ranks)

    @property
    def A(self):
        return views_A(self.params_A, self.layout, self.ranks)

    @property
    def B(self):
        return views_B(self.params_B, self.layout, self.ranks)

    @property
    def in_features(self):
        return self.params_A[0].shape[-1]

    @property
    def out_features(self):
        return self.params_B[0].shape[{"packed": 1, "stacked": 1}.get(self.layout, 0)]

    @property
    def dtype(self):
        return self.params_A[0].dtype

    @property
    def device(self):
        return self.params_A[0].device

    def split(self):
        """One bank per adapter, on the same tensors."""
        bias = self.bias or [None] * len(self)
        parts = zip(self.A, self.B, self.ranks, bias, self.scale.split(1), self.threshold.split(1), self.seeds.split(1))
        banks = [LoraBank([a], [b], [r], "separate", [] if beta is None else [beta], *small) for a, b, r, beta, *small in parts]
        for bank in banks:
            bank.has_dropout = self.has_dropout
        return banks

    def main_grads(self, kind):
        """The `.main_grad` of the parameters of a kind, "A", "B" or "bias"; empty tensors where there is nothing to add to."""
        params = {"A": self.params_A, "B": self.params_B, "bias": self.bias}[kind]
        found = [getattr(p, "main_grad", None) if p.numel() and p.requires_grad else p.new_empty(0) for p in params]
        for p, grad in zip(params, found):
            if not isinstance(grad, torch.Tensor) or grad.numel() and (grad.dtype != torch.float32 or grad.shape != p.shape):
                got = f"{grad.dtype} {tuple(grad.shape)}" if isinstance(grad, torch.Tensor) else type(grad).__name__
                raise ValueError(f"LoraBank: main_grad of a parameter {tuple(p.shape)} is {got}; give it a float32 tensor of that shape")
        return found

    def tensors(self):
        return (*self.params_A, *self.params_B, *self.bias, self.scale, self.threshold, self.seeds)

    def __repr__(self):
        return f"LoraBank({len(self)} adapters, {self.in_features} -> {self.out_features}, ranks {self.ranks})"


def views_A(params, layout, ranks):
    """One [R_i, D] per adapter, with unit stride along D."""
    if layout == "packed":
        return list(params[0].split(ranks))
    if layout == "stacked":
        return [a[:r] for a, r in zip(params[0].unbind(), ranks)]
    if layout == "experts":
        return list(params[0].split(ranks))
    return list(params)


def views_B(params, layout, ranks):
    """One [O, R_i] per adapter, with any strides."""
    if layout == "packed":
        return [b.T for b in params[0].split(ranks)]
    if layout == "stacked":
        return [b[:, :r] for b, r in zip(params[0].unbind(), ranks)]
    if layout == "experts":
        return list(params[0].view(params[0].shape[0], ranks[0], len(ranks)).unbind(2))
    return list(params)


def _check_tensors(**lists):
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if type(t).__name__ == "DTensor":
                raise TypeError(f"LoraBank: {name}[{i}] is a DTensor; shard by decoder layer so that factors are plain tensors in forward")
            if not isinstance(t, torch.Tensor) or t.dtype not in KERNEL_DTYPES:
                got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
                raise ValueError(f"LoraBank: {name}[{i}] is {got}; give a 2-d floating-point tensor")


def _check_factors(A, B):
    for i, (a, b) in enumerate(zip(A, B)):
        for name, t in (("A", a), ("B", b)):
            if t.dim() != 2:
                raise ValueError(f"LoraBank: {name}[{i}] is {t.dtype} {tuple(t.shape)}; give a 2-d floating-point tensor")
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


def _per_adapter(name, value, n, device, dtype):
    value = torch.as_tensor(value, dtype=dtype, device=device)
    if value.dim() == 0:
        return value.expand(n).contiguous()
    if value.shape != (n,):
        raise ValueError(f"LoraBank: {name} has shape {tuple(value.shape)}; give a number or one per adapter [{n}]")
    return value
