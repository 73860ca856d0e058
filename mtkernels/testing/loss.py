"""Problems of the per-task losses."""

import torch

from ..ops import task_cross_entropy, task_reduce
from .problem import Maker, Problem, wide


def _task_reduce(ids, dtype, device="cpu", *, backend=None, exact=False, n_groups=6):
    make = Maker(ids, dtype, device, exact)
    values, coef, id_tensor = make.rows("values"), make.rows("coef", dtype=wide(dtype)), make.id_tensor()
    index = torch.where(id_tensor < 0, n_groups, id_tensor)
    return Problem(
        ids,
        n_groups,
        {"values": values, "coef": coef},
        lambda: task_reduce(values, id_tensor, n_groups, coef, backend=backend),
        lambda: coef.new_zeros(n_groups + 1).index_add(0, index, values.to(coef.dtype) * coef)[:-1],
        make.tensor("dsums", n_groups, dtype=wide(dtype), grad=False),
        by_row=("values", "coef"),
        by_group={"out": None},
    )


def _task_cross_entropy(ids, dtype, device="cpu", *, backend=None, exact=False, n_groups=6, n_classes=53):
    make = Maker(ids, dtype, device, exact)
    logits, weight, id_tensor = make.rows("logits", n_classes), make.rows("weight", dtype=wide(dtype)), make.id_tensor()
    with torch.no_grad():  # some classes that do not exist, some rows that are sure of their target
        logits[:, 5] = -torch.inf
        target = (make.rows("target", grad=False, dtype=torch.float32).abs() * 1000).long() % n_classes
        target = torch.where(target == 5, -100, target)
        logits[target == 7, 7] += 20

    def plain():
        nll = torch.nn.functional.cross_entropy(logits, torch.where(id_tensor < 0, -100, target), reduction="none")
        index = torch.where(id_tensor < 0, n_groups, id_tensor)
        valid = ((target != -100) & (id_tensor >= 0)).to(weight.dtype)
        bins = weight.new_zeros(n_groups + 1)
        return (bins.index_add(0, index, nll.to(weight.dtype) * weight) / bins.index_add(0, index, valid).clamp(min=1))[:-1]

    return Problem(
        ids,
        n_groups,
        {"logits": logits, "weight": weight},
        lambda: task_cross_entropy(logits, target, id_tensor, n_groups, token_weight=weight, backend=backend).losses,
        plain,
        make.tensor("dlosses", n_groups, dtype=wide(dtype), grad=False),
        by_row=("logits", "weight"),
        by_group={"out": None},
    )



LOSS_PROBLEMS = {"task_reduce": _task_reduce, "task_cross_entropy": _task_cross_entropy}
