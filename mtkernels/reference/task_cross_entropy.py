"""nll[t] = lse[t] - logits[t, target[t]], lse = log sum exp; rows with id < 0 or target == ignore_index give zeros."""

import torch


def task_cross_entropy_fwd(logits, target, ids, ignore_index):
    z, live, known, y = _rows(logits, target, ids, ignore_index)
    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(1, y[:, None])[:, 0]
    return torch.where(live, torch.where(known, nll, torch.nan), 0), torch.where(live, lse, 0)


def task_cross_entropy_bwd(dnll, logits, target, ids, lse, ignore_index):
    z, live, known, y = _rows(logits, target, ids, ignore_index)
    d = dnll[:, None] * ((z - lse[:, None]).exp() - torch.nn.functional.one_hot(y, z.shape[1]))
    d = torch.where(known[:, None], d, torch.nan)
    return torch.where(live[:, None], d, 0).to(logits.dtype)


def _rows(logits, target, ids, ignore_index):
    z = logits if logits.dtype == torch.float64 else logits.float()
    live = (ids >= 0) & (target != ignore_index)
    known = (target >= 0) & (target < z.shape[1])
    return z, live, known, torch.where(live & known, target, 0).long()
