"""PEFT's LoRA Linear, plain, DoRA and aLoRA, on lora_linear, lora_delta and the ops of DoRA: the same parameters, another forward."""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose

from ..ops import dora_dropout, dora_linear, dora_rescale, dora_scale, lora_delta, lora_linear
from ._factors import bank_of, factors_of, is_plain_linear
from ._routed import Routed


class RoutedLinear(Routed):
    """A linear layer over any base that computes x W^T: plain LoRA, DoRA and aLoRA adapters."""

    def _adapters(self):
        return self.lora_A

    def _factors(self, name):
        return factors_of(self, name)

    def _base_reason(self):
        return ""

    def _lead(self, x):
        return x.shape[:-1]

    def _apply_bank(self, x, y, names, factors, plan, args, kwargs):
        base, site, bank = self.base_layer, self._mtkernels.site, bank_of(self, names, factors)
        magnitudes = [factors[name].magnitude if name in factors else None for name in names]
        dora = any(m is not None for m in magnitudes)
        if y is None and not args and not kwargs and is_plain_linear(base):
            if dora:
                return dora_linear(x, base.weight, base.bias, bank, magnitudes, plan, site=site)
            return lora_linear(x, base.weight, base.bias, bank, plan, site=site)
        if y is None:
            y = base(x, *args, **kwargs)
        return self._dora(x, y, bank, magnitudes, plan) if dora else self._delta(x, y, bank, plan)

    def _delta(self, x, y, bank, plan):
        site = self._mtkernels.site
        if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_delta(x, bank, plan, out=y, site=site)
        return y + lora_delta(x, bank, plan, site=site).to(y.dtype)

    def _dora(self, x, y, bank, magnitudes, plan):
        """PEFT's order: without dropout a DoRA adapter rescales all that came before it, with dropout only x W^T."""
        base = self.get_base_layer()
        weight = transpose(dequantize_module_weight(base).detach(), self.fan_in_fan_out)
        scale = dora_scale(weight, bank, magnitudes).to(torch.promote_types(y.dtype, torch.float32))
        if not bank.has_dropout:
            z = y if base.bias is None else y - base.bias.to(y.dtype)
            return dora_rescale(self._delta(x, z, bank, plan), scale, plan, base.bias)
        product = F.linear(dora_dropout(x, bank, plan, site=self._mtkernels.site), weight.to(x.dtype)).to(y.dtype)
        return dora_rescale(self._delta(x, product, bank, plan), scale, plan, y - product)


class MtLoraLinear(RoutedLinear, Linear):
    """peft.tuners.lora.layer.Linear that serves several adapters in one call. Made by `enable`, never constructed."""
