"""enable(model): PEFT's LoRA layers on mtkernels' ops, in place and reversible."""

from ._enable import Report, disable, enable
from .context import adapters, checkpoint_context

__all__ = ["Report", "adapters", "checkpoint_context", "disable", "enable"]
