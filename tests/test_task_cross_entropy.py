import pytest
import torch
import torch.nn.functional as F

import mtkernels as mtk


def batch(n_rows, n_classes, way, dtype=torch.float32, n_tasks=4):
    logits = torch.randn(n_rows, n_classes).to(dtype).to(way.device).requires_grad_()
    target = torch.randint(0, n_classes, (n_rows,), device=way.device)
    target[::7] = -100
    return logits, target, torch.randint(-1, n_tasks, (n_rows,), device=way.device)


def per_task(values, ids, n_tasks):
    return torch.stack([values[ids == j].sum() for j in range(n_tasks)])


@pytest.mark.parametrize("reduction", ["token_mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (23, 17), (40, 1000), (9, 5003)], ids=str)
def test_losses_counts_total_and_gradient(shape, reduction, way):
    logits, target, ids = batch(*shape, way)
    out = mtk.task_cross_entropy(logits, target, ids, 4, reduction, task_weights=torch.tensor([1.0, 2, 0, 0.5], device=way.device), backend=way.backend)
    nll = F.cross_entropy(logits, target, reduction="none")
    counts = per_task((target != -100).long(), ids, 4)
    losses = per_task(nll, ids, 4) / (counts.clamp(min=1) if reduction == "token_mean" else 1)
    assert torch.equal(out.counts, counts) and out.counts.dtype == torch.int64
    torch.testing.assert_close(out.losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.total, (losses * torch.tensor([1.0, 2, 0, 0.5], device=way.device)).sum(), rtol=1e-5, atol=1e-6)
    upstream = torch.randn(4, device=way.device)
    (ours,), (theirs,) = (torch.autograd.grad(t, logits, upstream) for t in (out.losses, losses))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_absent_tasks_and_fully_ignored_tasks_are_zero(way):
    logits, target, ids = batch(8, 5, way)
    ids[:] = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2], device=way.device)
    target[4:] = -100
    out = mtk.task_cross_entropy(logits, target, ids, 4, backend=way.backend)
    assert out.counts.tolist()[1:] == [0, 0, 0] and out.losses.tolist()[1:] == [0, 0, 0]
    (grad,) = torch.autograd.grad(out.total, logits)
    assert torch.isfinite(grad).all() and not grad[4:].any()


def test_sure_rows_keep_precision(way):
    """p -> 1: the loss and the gradient of a target that has nearly all the mass keep their relative accuracy."""
    margins = torch.tensor([5.0, 10.0, 14.0], device=way.device)
    logits = torch.zeros(3, 9, device=way.device)
    logits[:, 3] = margins
    logits.requires_grad_()
    out = mtk.task_cross_entropy(logits, torch.full((3,), 3, device=way.device), torch.arange(3, device=way.device), 3, backend=way.backend)
    (grad,) = torch.autograd.grad(out.losses.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    nll = F.cross_entropy(exact, torch.full((3,), 3, device=way.device), reduction="none")
    (exact_grad,) = torch.autograd.grad(nll.sum(), exact)
    plain = logits.detach().requires_grad_()
    plain_nll = F.cross_entropy(plain, torch.full((3,), 3, device=way.device), reduction="none")
    (plain_grad,) = torch.autograd.grad(plain_nll.sum(), plain)
    assert ((out.losses - nll).abs() <= 1.5 * (plain_nll - nll).abs() + 1e-6).all()
    assert ((grad[:, 3] - exact_grad[:, 3]).abs() <= 1.5 * (plain_grad[:, 3] - exact_grad[:, 3]).abs() + 2e-7).all()


def test_masked_classes_and_extreme_logits(way):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf], [1e4, -1e4, 0.0, -torch.inf], [-torch.inf, 3.0, -torch.inf, -torch.inf]], device=way.device, requires_grad=True)
    target = torch.tensor([1, 2, 1], device=way.device)
    out = mtk.task_cross_entropy(logits, target, torch.arange(3, device=way.device), 3, backend=way.backend)
    torch.testing.assert_close(out.losses, F.cross_entropy(logits, target, reduction="none"))
    (grad,) = torch.autograd.grad(out.total, logits)
    assert torch.isfinite(grad).all() and not grad[logits == -torch.inf].any()


def test_nan_logits_stay_in_their_task(way):
    logits, target, ids = batch(6, 5, way)
    target[0], ids[:] = 1, torch.tensor([0, 1, 2, 0, 1, -1], device=way.device)
    with torch.no_grad():
        logits[1, 2], logits[5] = torch.nan, torch.nan
    out = mtk.task_cross_entropy(logits, target, ids, 3, backend=way.backend)
    assert out.losses.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(out.losses.sum(), logits)
    assert torch.isfinite(grad[[0, 2, 3, 4, 5]]).all() and not grad[5].any()


@pytest.mark.parametrize("view", ["row stride", "transposed", "expanded"])
def test_strided_logits(view, way):
    logits, target, ids = batch(12, 40, way)
    strided = {"row stride": lambda: torch.randn(12, 64, device=way.device)[:, 8:48], "transposed": lambda: torch.randn(40, 12, device=way.device).T, "expanded": lambda: torch.randn(1, 40, device=way.device).expand(12, 40)}[view]().requires_grad_()
    ours, dense = (mtk.task_cross_entropy(t, target, ids, 4, backend=way.backend) for t in (strided, strided.detach().contiguous()))
    assert torch.equal(ours.losses, dense.losses)
    assert torch.autograd.grad(ours.total, strided)[0].shape == strided.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_target_dtypes_and_denominators(dtype, way):
    logits, target, ids = batch(10, 6, way)
    denominators = torch.tensor([3.0, 5, 7, 11], device=way.device)
    out = mtk.task_cross_entropy(logits, target.to(dtype), ids.to(dtype), 4, denominators=denominators, backend=way.backend)
    torch.testing.assert_close(out.losses, out.sums / denominators)


def test_token_weight_and_its_gradient(way):
    logits, target, ids = batch(14, 6, way)
    weight = torch.rand(14, device=way.device, requires_grad=True)
    out = mtk.task_cross_entropy(logits, target, ids, 4, "sum", token_weight=weight, backend=way.backend)
    nll = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(out.losses, per_task(nll * weight, ids, 4))
    torch.testing.assert_close(torch.autograd.grad(out.total, weight)[0], torch.where(ids < 0, 0, nll.detach()))


def test_saved_for_backward_is_logits_and_lse():
    logits = torch.randn(64, 512, requires_grad=True)
    target, ids = torch.randint(0, 512, (64,)), torch.randint(0, 4, (64,))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        mtk.task_cross_entropy(logits, target, ids, 4)
    large = [t for t in saved.values() if t.numel() > 64]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]


def test_bad_input_is_named():
    logits, target, ids = torch.randn(4, 5), torch.tensor([0, 1, 2, 9]), torch.tensor([0, 1, 0, 1])
    with pytest.raises(IndexError, match=r"target\[3\] is 9; give 0..4 or ignore_index=-100"):
        mtk.task_cross_entropy(logits, target, ids, 2)
    with pytest.raises(TypeError, match="logits are torch.int64"):
        mtk.task_cross_entropy(target[:, None], target, ids, 2)
    with pytest.raises(TypeError, match="target is torch.float32; give int32 or int64"):
        mtk.task_cross_entropy(logits, target.float(), ids, 2)
    with pytest.raises(ValueError, match=r"logits are \(4,\); give \[T, V\]"):
        mtk.task_cross_entropy(logits[:, 0], target, ids, 2)
    with pytest.raises(ValueError, match="at least one class"):
        mtk.task_cross_entropy(logits[:, :0], target, ids, 2)
    with pytest.raises(ValueError, match=r"target is \(3,\)"):
        mtk.task_cross_entropy(logits, target[:3], ids, 2)
    with pytest.raises(ValueError, match="reduction is 'mean'; give one of token_mean, sum"):
        mtk.task_cross_entropy(logits, target, ids, 2, "mean")
    with pytest.raises(ValueError, match=r"task_weights are \(3,\)"):
        mtk.task_cross_entropy(logits, target, ids, 2, task_weights=torch.ones(3))
    with pytest.raises(ValueError, match="task_ids are list"):
        mtk.task_cross_entropy(logits, target, [0, 1, 0, 1], 2)


def test_targets_of_rows_without_task_may_be_anything(way):
    logits = torch.randn(2, 3, device=way.device)
    out = mtk.task_cross_entropy(logits, torch.tensor([99, 1], device=way.device), torch.tensor([-1, 0], device=way.device), 1, backend=way.backend)
    assert torch.isfinite(out.total) and out.counts.tolist() == [1]
