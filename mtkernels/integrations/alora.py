"""Where activated LoRA begins: PEFT's invocation tokens, found in a micro-batch without a device sync."""

import torch

from ..plan import alora_ids


def invocation_tokens(peft_config):
    """{number of the adapter: its invocation tokens}, for the aLoRA adapters of a model."""
    found = ((i, getattr(config, "alora_invocation_tokens", None)) for i, config in enumerate(peft_config.values()))
    return {i: tuple(tokens) for i, tokens in found if tokens}


class Invocations:
    """The aLoRA adapters of one micro-batch; cuts per-sequence ids so that rows before an invocation have no adapter.

    tokens: as invocation_tokens gives them. offsets: PEFT's alora_offsets, one per sequence; None = look in input_ids.
    """

    def __init__(self, tokens, offsets=None):
        self.tokens, self.offsets, self.given = tokens, offsets, offsets is not None
        self.continued = False

    def __bool__(self):
        return bool(self.tokens)

    def find(self, input_ids, ids, cache):
        """Set the offsets from the last invocation in each sequence; False where those of before stay."""
        if self.given or input_ids.dim() != 2 or input_ids.is_floating_point() or ids.shape not in ((), input_ids.shape[:1]):
            return False
        if self.offsets is not None and cache is not None and cache.get_seq_length():
            if not self.continued:  # generation goes on from a prompt that was looked at: an adapter invoked there stays
                self.offsets, self.continued = self.offsets.sign() * torch.iinfo(torch.int64).max, True
                return True
            return False
        length, before, self.continued = input_ids.shape[1], self.offsets, False
        ids = ids.to(input_ids.device).expand(len(input_ids))
        self.offsets = torch.zeros(ids.shape, dtype=torch.int64, device=ids.device)
        for adapter, tokens in self.tokens.items():
            n = len(tokens)
            if n > length:
                continue
            wanted = torch.tensor(tokens, device=input_ids.device)
            match = (input_ids.unfold(1, n, 1) == wanted).all(-1)
            offset = (length - torch.arange(length - n + 1, device=input_ids.device)).where(match, length + 1).amin(1)
            self.offsets = torch.where((ids == adapter) & match.any(1), offset, self.offsets)
        if before is not None and torch.is_grad_enabled() and not torch.equal(before, self.offsets):
            raise RuntimeError("adapters: a second batch in this block has other aLoRA invocations; open a new block for each micro-batch")
        return True

    def cut(self, ids, lead, module):
        """Ids per token for rows of shape `lead`; ids given per token stay as they are."""
        if not self.tokens or ids.dim() > 1 or self.offsets is None and ids.shape == lead:
            return ids
        if self.offsets is None:
            raise ValueError(f"{module}: aLoRA adapters begin at their invocation, and no input_ids were seen; pass input_ids, or ids per token (mtkernels.alora_ids)")
        if len(lead) > 2 or len(self.offsets) != lead[0]:
            raise ValueError(f"{module}: rows {tuple(lead)} of {len(self.offsets)} sequences; aLoRA takes [sequences, tokens], give ids per token (mtkernels.alora_ids)")
        ids = ids.expand(lead[0])
        mine = torch.isin(ids, torch.tensor([*self.tokens], device=ids.device))
        offsets = self.offsets
        if not isinstance(offsets, torch.Tensor):
            offsets = torch.tensor([0 if o is None else int(o) for o in offsets], dtype=torch.int64)
        length = lead[1] if len(lead) == 2 else 1
        cut = torch.where(mine[:, None], alora_ids(ids, offsets.to(ids.device), length), ids[:, None])
        return cut if len(lead) == 2 else cut[:, 0]
