import pytest
import torch

import mtkernels as mtk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 1023, 1024, 1025, 2500])
def test_values(n_rows, dtype, way):
    if way.name == "interpret" and n_rows > 2048:
        n_rows = 2049
    values, ids = torch.randn(n_rows).to(dtype), torch.randint(-1, 5, (n_rows,))
    sums = mtk.task_reduce(values.to(way.device), ids.to(way.device), 5, backend=way.backend)
    exact = torch.zeros(6, dtype=torch.float64).index_add(0, ids + 1, values.double())[1:]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.cpu().double(), exact, rtol=1e-5, atol=1e-4)


def test_one_fat_task_is_as_accurate_as_fp64_rounding(way):
    values = torch.rand(20000 if way.name != "interpret" else 3000) + 100
    sums = mtk.task_reduce(values.to(way.device), torch.zeros(len(values), dtype=torch.int64, device=way.device), 1, backend=way.backend)
    assert abs(sums.item() / values.double().sum().item() - 1) < 2e-7 * 4


def test_gradients_of_values_and_coef(way):
    values = torch.randn(40, device=way.device, requires_grad=True)
    coef = torch.randn(40, device=way.device, requires_grad=True)
    ids = torch.randint(-1, 3, (40,), device=way.device)
    upstream = torch.randn(3, device=way.device)
    dvalues, dcoef = torch.autograd.grad(mtk.task_reduce(values, ids, 3, coef, backend=way.backend), (values, coef), upstream)
    row = torch.where(ids < 0, 0, upstream[ids.clamp(min=0)])
    torch.testing.assert_close(dvalues, row * coef.detach())
    torch.testing.assert_close(dcoef, row * values.detach())


def test_noncontiguous_values_and_a_given_plan(way):
    values, ids = torch.randn(30, 2, device=way.device)[:, 1], torch.randint(0, 4, (30,), device=way.device)
    plan = mtk.group_plan(ids, 4)
    expected = mtk.task_reduce(values.contiguous(), ids, 4, backend=way.backend)
    assert torch.equal(mtk.task_reduce(values, None, 4, plan=plan, backend=way.backend), expected)


def test_nan_stays_in_its_task(way):
    values, ids = torch.ones(6, device=way.device), torch.tensor([0, 1, 2, 0, 1, -1], device=way.device)
    values[1], values[5] = torch.nan, torch.nan
    sums = mtk.task_reduce(values, ids, 3, backend=way.backend).cpu()
    assert sums[0] == 2 and sums[1].isnan() and sums[2] == 1


def test_bad_input_is_named():
    values, ids = torch.randn(4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(TypeError, match="values is torch.int64; give a floating-point tensor"):
        mtk.task_reduce(ids, ids, 2)
    with pytest.raises(ValueError, match=r"values is \(2, 2\); give one value per row"):
        mtk.task_reduce(values.view(2, 2), ids, 2)
    with pytest.raises(ValueError, match=r"task_ids are \(3,\) on cpu; give one id per row \(4,\)"):
        mtk.task_reduce(values, ids[:3], 2)
    with pytest.raises(ValueError, match=r"task_ids are \(4,\) on meta"):
        mtk.task_reduce(values, ids.to("meta"), 2)
    with pytest.raises(ValueError, match=r"coef is \(3,\)"):
        mtk.task_reduce(values, ids, 2, torch.randn(3))
    with pytest.raises(IndexError, match=r"ids\[1\] is 1"):
        mtk.task_reduce(values, ids, 1)
    with pytest.raises(ValueError, match="the plan has 3 groups, but there are 2 tasks"):
        mtk.task_reduce(values, ids, 2, plan=mtk.group_plan(ids, 3))
    with pytest.raises(ValueError, match="the plan covers 3 rows, but the input has 4"):
        mtk.task_reduce(values, ids, 2, plan=mtk.group_plan(ids[:3], 2))
    with pytest.raises(TypeError, match=r"build one with group_plan"):
        mtk.task_reduce(values, ids, 2, plan=ids)
