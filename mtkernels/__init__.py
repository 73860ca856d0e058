"""mtkernels: kernels for batched heterogeneous LoRA and per-task losses as PyTorch ops.

One idea carries the package: rows grouped by an id. An adapter and a task are each a group; a GroupPlan says which rows
belong to which group, and every kernel reads the same plan.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent
if not (_root / "triton_kernels").is_dir():  # a checkout: triton_kernels/ and bench/ sit beside mtkernels/
    __path__.append(str(_root.parent))

from ._backends import backend, explain
from .bank import LoraBank
from .integrations import adapters, checkpoint_context, disable, enable
from .merge import lora_merge_, lora_unmerge_
from .nn import TaskLoss
from .ops import (
    dora_dropout,
    dora_linear,
    dora_norm,
    dora_rescale,
    dora_scale,
    group_plan,
    lora_delta,
    lora_delta_group,
    lora_dropout_mask,
    lora_embedding,
    lora_expand,
    lora_fan_out,
    lora_linear,
    lora_linear_group,
    lora_shrink,
    lora_swiglu_mlp,
    moe_lora_linear,
    rmsnorm_lora_shrink,
    swiglu_lora_shrink,
    task_cross_entropy,
    task_reduce,
)
from .plan import GroupPlan, alora_ids, expert_adapter_ids

__version__ = "0.1.0"

__all__ = [
    "GroupPlan",
    "LoraBank",
    "TaskLoss",
    "adapters",
    "alora_ids",
    "backend",
    "checkpoint_context",
    "disable",
    "dora_dropout",
    "dora_linear",
    "dora_norm",
    "dora_rescale",
    "dora_scale",
    "enable",
    "expert_adapter_ids",
    "explain",
    "group_plan",
    "lora_delta",
    "lora_delta_group",
    "lora_dropout_mask",
    "lora_embedding",
    "lora_expand",
    "lora_fan_out",
    "lora_linear",
    "lora_linear_group",
    "lora_merge_",
    "lora_shrink",
    "lora_swiglu_mlp",
    "lora_unmerge_",
    "moe_lora_linear",
    "rmsnorm_lora_shrink",
    "swiglu_lora_shrink",
    "task_cross_entropy",
    "task_reduce",
]
