"""Other people's implementations, imported only when asked for; each that cannot run says why."""

import os
import shutil
from importlib import import_module

import torch
import torch.nn.functional as F

from mtkernels import _backends

from .registry import Unavailable


def require(module, package=None):
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package or module} does not import: {error}; pip install {package or module}") from error


def takes_triton(device):
    """Refuse tensors that Triton kernels cannot take here."""
    if device != "cuda" and not _backends.emulating():
        raise Unavailable("its Triton kernels take CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1")


def _first_line(error):
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__


def compiled(fn, device):
    """torch.compile(fn), or the reason it cannot work here."""
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise Unavailable(f"torch.compile needs a C++ compiler and there is no {compiler}; set CXX")
    torch._dynamo.reset()
    graph = torch.compile(fn)

    def run(*args):
        # a backward that is timed alone runs many times on one graph
        with torch._functorch.config.patch(donated_buffer=False):
            return graph(*args)

    return run


def lora_loop(problem, base, A, B, scale):
    """PEFT's training loop, one adapter after the other: index, drop, two matmuls, add."""
    x, ids, p = problem.leaves["x"], problem.fixed["ids"], problem.case.shape["p"]

    def fn():
        y = base()
        for i, (a, b) in enumerate(zip(A, B)):
            rows = (ids == i).nonzero()[:, 0]
            y = y.index_add(0, rows, F.dropout(x[rows], p, problem.training) @ a.T @ b.T * scale)
        return y

    return problem.call(fn)


def lora_padded(problem, base, A, B, scale, plan):
    """Adapters padded to the largest rank, rows sorted, two grouped GEMMs, no dropout."""
    widest = max(a.shape[0] for a in A)
    A_ARD = torch.stack([F.pad(a.detach(), (0, 0, 0, widest - a.shape[0])) for a in A]).requires_grad_(problem.case.training)
    B_AOR = torch.stack([F.pad(b.detach(), (0, widest - b.shape[1])) for b in B]).requires_grad_(problem.case.training)
    x, perm, offsets = problem.leaves["x"], plan.perm.long(), plan.offsets[1:]

    def fn():
        s = F.grouped_mm(x[perm], A_ARD.transpose(1, 2), offs=offsets)
        return base().index_add(0, perm, F.grouped_mm(s * scale, B_AOR.transpose(1, 2), offs=offsets))

    return problem.call(fn, {"x": x, "A padded": A_ARD, "B padded": B_AOR}, (perm, offsets))


class _OneLinear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device=weight.device, dtype=weight.dtype)
        self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return self.linear(x)


def lora_peft(problem, A, B, scale):
    """A real PEFT model of one linear layer, the adapter named per row."""
    peft = require("peft")
    x, model, leaves = problem.leaves["x"], None, {"x": problem.leaves["x"]}
    for i, (a, b) in enumerate(zip(A, B)):
        rank, options = a.shape[0], dict(adapter_name=f"a{i}", autocast_adapter_dtype=False)
        config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=problem.case.shape["p"], target_modules=["linear"])
        if model is None:
            model = peft.get_peft_model(_OneLinear(problem.fixed["weight 0"]), config, **options)
        else:
            model.add_adapter(peft_config=config, **options)
        layer = model.base_model.model.linear
        leaves[f"A0.{i}"] = layer.lora_A[f"a{i}"].weight = torch.nn.Parameter(a.detach())
        leaves[f"B0.{i}"] = layer.lora_B[f"a{i}"].weight = torch.nn.Parameter(b.detach())
    model.train(problem.training)
    names = [f"a{i}" for i in problem.fixed["ids"].tolist()]
    try:
        model(x, adapter_names=names)
    except ValueError as error:
        raise Unavailable(f"peft {peft.__version__}: {_first_line(error)}") from error
    return problem.call(lambda: model(x, adapter_names=names), leaves)


def liger_cross_entropy(device):
    """Liger's per-token cross entropy."""
    takes_triton(device)
    loss = require("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss(reduction="none")
    return lambda logits, target: loss(logits, target)


def liger_linear_cross_entropy(problem):
    """Liger's fused linear cross entropy: one sum over all tasks, shared out evenly, as it takes no upstream gradient per row."""
    takes_triton(problem.upstream.device.type)
    loss = require("liger_kernel.transformers", "liger-kernel").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    hidden, weight, n_tasks = *problem.leaves.values(), problem.case.shape["J"]
    return problem.call(lambda: (loss(weight, hidden, problem.fixed["target"]) / n_tasks).expand(n_tasks))


def liger_rmsnorm(device, eps):
    """Liger's RMSNorm with Llama's rounding."""
    takes_triton(device)
    function = require("liger_kernel.ops.rms_norm", "liger-kernel").LigerRMSNormFunction
    return lambda x, gamma: function.apply(x, gamma, eps, 0.0, "llama", False)


def liger_swiglu(device):
    """Liger's silu(gate) * up."""
    takes_triton(device)
    return require("liger_kernel.ops.swiglu", "liger-kernel").LigerSiLUMulFunction.apply
