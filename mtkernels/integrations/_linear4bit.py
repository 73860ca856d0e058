"""PEFT's LoRA over a bitsandbytes Linear4bit (NF4, FP4): the base as it is, the adapters by lora_delta. Needs bitsandbytes."""

from peft.tuners.lora.bnb import Linear4bit

from ._linear import RoutedLinear


class MtLoraLinear4bit(RoutedLinear, Linear4bit):
    """peft.tuners.lora.bnb.Linear4bit that serves several adapters in one call. Made by `enable`, never constructed."""
