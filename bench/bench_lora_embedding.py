"""lora_embedding: tokens of many adapters through one embedding table."""

import torch
import torch.nn.functional as F

import mtkernels as mtk

from . import peers
from .registry import DTYPES, Case, Draw, Problem, Provider, Unavailable, Work, ours

SCALE = 2.0
MIXED = dict(T=4096, V=32000, O=1024, ranks=(4, 8, 8, 16, 16, 32))
EVEN = dict(T=512, V=1000, O=512, ranks=(4, 8, 8, 16, 16, 32))


def cases():
    return [
        Case("lora_embedding", "mixed", MIXED, "loop", ("quick", "full")),
        Case("lora_embedding", "even", EVEN, "loop", ("cost",), dtypes=("bf16",)),
    ]


def inputs(case, device):
    draw, s = Draw(case, device), case.shape
    leaves = {}
    for i, r in enumerate(s["ranks"]):
        leaves[f"A{i}"], leaves[f"B{i}"] = draw.leaf(r, s["V"]), draw.leaf(s["O"], r, std=r**-0.5)
    fixed = {"weight": draw.normal(s["V"], s["O"]), "tokens": draw.ints(s["V"], s["T"]), "ids": draw.ints(len(s["ranks"]), s["T"])}
    return Problem(case, leaves, fixed, draw.normal(s["T"], s["O"]))


def cost(case):
    """The gradient of A is dense: writing its zeros is most of the backward."""
    s, width = case.shape, DTYPES[case.dtype].itemsize
    rank = s["T"] * sum(s["ranks"]) / len(s["ranks"])
    forward = 2 * s["T"] * s["O"] + 2 * rank + s["O"] * sum(s["ranks"])
    backward = s["T"] * s["O"] + 3 * rank + (2 * s["O"] + s["V"]) * sum(s["ranks"])
    flops = 2 * rank * s["O"]
    return {"fwd": Work(forward * width, flops, flops), "bwd": Work(backward * width, 2 * flops, 2 * flops)}


def saved_limit(case):
    return case.shape["T"] * (max(case.shape["ranks"]) * DTYPES[case.dtype].itemsize + 8)


def _factors(problem):
    n = len(problem.case.shape["ranks"])
    return [problem.leaves[f"A{i}"] for i in range(n)], [problem.leaves[f"B{i}"] for i in range(n)]


def run(problem, backend):
    bank, fixed = mtk.LoraBank.from_factors(*_factors(problem), SCALE), problem.fixed
    plan = mtk.group_plan(fixed["ids"], len(bank), step=0)
    given = *plan.tensors(), *bank.tensors()
    return problem.call(lambda: mtk.lora_embedding(fixed["tokens"], fixed["weight"], bank, plan, backend=backend), given=given)


def plain(problem):
    """PEFT's loop over the adapters, on each one's own rows."""
    (A, B), tokens, ids = _factors(problem), problem.fixed["tokens"], problem.fixed["ids"]

    def fn():
        y = F.embedding(tokens, problem.fixed["weight"])
        for i, (a, b) in enumerate(zip(A, B)):
            rows = (ids == i).nonzero()[:, 0]
            y = y.index_add(0, rows, F.embedding(tokens[rows], a.T) @ b.T * SCALE)
        return y

    return problem.call(fn)


def peft(problem):
    """A real PEFT model of one embedding, the adapter named per token."""
    library, (A, B), fixed, model, leaves = peers.require("peft"), _factors(problem), problem.fixed, None, {}
    for i, (a, b) in enumerate(zip(A, B)):
        config, options = library.LoraConfig(r=a.shape[0], lora_alpha=SCALE * a.shape[0], target_modules=["0"]), dict(adapter_name=f"a{i}", autocast_adapter_dtype=False)
        if model is None:
            base = torch.nn.Embedding.from_pretrained(fixed["weight"])
            model = library.get_peft_model(torch.nn.Sequential(base), config, **options)
        else:
            model.add_adapter(peft_config=config, **options)
        layer = model.base_model.model[0]
        leaves[f"A{i}"] = layer.lora_embedding_A[f"a{i}"] = torch.nn.Parameter(a.detach())
        leaves[f"B{i}"] = layer.lora_embedding_B[f"a{i}"] = torch.nn.Parameter(b.detach())
    names, layer = [f"a{i}" for i in fixed["ids"].tolist()], model.base_model.model[0]
    model.eval()
    try:
        layer(fixed["tokens"], adapter_names=names)
    except ValueError as error:
        raise Unavailable(f"peft {library.__version__}: {error}") from error
    return problem.call(lambda: layer(fixed["tokens"], adapter_names=names), leaves)


PROVIDERS = (
    Provider("base", lambda p: p.call(lambda: F.embedding(p.fixed["tokens"], p.fixed["weight"]), {}), "part"),
    *ours(run),
    Provider("plan", lambda p: p.call(lambda: mtk.group_plan(p.fixed["ids"], len(p.case.shape["ranks"]), step=0), {}), "part"),
    Provider("loop", plain),
    Provider("peft", peft),
)
