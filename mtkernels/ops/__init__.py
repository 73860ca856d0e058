"""The ops, one stem each: `ops/X.py`, `reference/X.py`, `triton_kernels/X.py`, `csrc/cpu/X.cpp`, `tests/test_X.py`, `bench/bench_X.py`."""

from .dora import dora_dropout, dora_linear, dora_norm, dora_rescale, dora_scale
from .group_plan import group_plan
from .lora import lora_delta, lora_delta_group, lora_fan_out, lora_linear, lora_linear_group
from .lora_dropout_mask import lora_dropout_mask
from .lora_embedding import lora_embedding
from .lora_expand import lora_expand
from .lora_shrink import lora_shrink
from .moe_lora_linear import moe_lora_linear
from .rmsnorm_lora_shrink import rmsnorm_lora_shrink
from .swiglu_lora_shrink import lora_swiglu_mlp, swiglu_lora_shrink
from .task_cross_entropy import task_cross_entropy
from .task_reduce import task_reduce

STEMS = {
    "group_plan": ("group_plan",),
    "lora": ("lora_linear", "lora_linear_group", "lora_delta", "lora_delta_group", "lora_fan_out"),
    "lora_shrink": ("lora_shrink",),
    "lora_expand": ("lora_expand",),
    "lora_dropout_mask": ("lora_dropout_mask",),
    "lora_embedding": ("lora_embedding",),
    "dora": ("dora_linear", "dora_scale", "dora_norm", "dora_dropout", "dora_rescale"),
    "rmsnorm_lora_shrink": ("rmsnorm_lora_shrink",),
    "swiglu_lora_shrink": ("swiglu_lora_shrink", "lora_swiglu_mlp"),
    "moe_lora_linear": ("moe_lora_linear",),
    "task_reduce": ("task_reduce",),
    "task_cross_entropy": ("task_cross_entropy",),
}
# Public functions that are no op of their own, and the op they call.
COMPOSED = {
    "lora_linear_group": "lora_linear",
    "lora_delta_group": "lora_delta",
    "lora_fan_out": "lora_delta",
    "dora_linear": "dora_rescale",
    "dora_scale": "dora_norm",
    "lora_swiglu_mlp": "swiglu_lora_shrink",
}


def stem_of(name):
    """The stem of a public function or of a stem itself."""
    for stem, functions in STEMS.items():
        if name == stem or name in functions:
            return stem
    raise ValueError(f"no op {name!r}; there are {', '.join(f for fs in STEMS.values() for f in fs)}")
