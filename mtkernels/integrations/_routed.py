"""The forward that every swapped layer shares: whose ids it runs under, which adapters, and what PEFT's own forward still serves."""

from ._factors import refusal, view_of


class Routed:
    """Goes before PEFT's layer class in a swapped class, which says what its adapters are and how a bank of them is applied."""

    def forward(self, x, *args, **kwargs):
        shared, names = self._mtkernels, kwargs.pop("adapter_names", None)
        stock = kwargs if names is None else {**kwargs, "adapter_names": names}
        if self.disable_adapters:
            return super().forward(x, *args, **stock)
        offsets = kwargs.get("alora_offsets")
        view = view_of(shared, x, names, offsets)
        wanted = self.active_adapters if view is None else view.names
        factors = {name: self._factors(name) for name in wanted if name in self._adapters()}
        reason = refusal(self, factors) or self._base_reason()
        if reason and view is not None and names is None:
            raise RuntimeError(f"{shared.name}: cannot serve this `adapters` block: {reason}")
        if reason:
            return super().forward(x, *args, **stock)
        kwargs.pop("alora_offsets", None)
        if not factors:
            return self.base_layer(x, *args, **kwargs)
        lead = self._lead(x)
        if view is not None:
            plan = view.plan(lead, x.device, shared.name, any(f.dropout for f in factors.values()))
            return self._apply_bank(x, None, view.names, factors, plan, args, kwargs)
        y = None
        for name, f in factors.items():
            plan = shared.model.active_plan(lead, x, offsets, f)
            y = self._apply_bank(x, y, (name,), {name: f}, plan, args, kwargs)
        return y
