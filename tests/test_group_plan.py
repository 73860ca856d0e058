import pytest
import torch

import mtkernels as mtk
from mtkernels.plan import TILE_ROWS


def plan_of(ids, n_groups, way, **kw):
    ids = torch.as_tensor(ids, device=way.device)
    return mtk.group_plan(ids if ids.dtype.is_signed and ids.numel() else ids.long(), n_groups, backend=way.backend, **kw)


CASES = {
    "mixed": ([2, 0, -1, 2, 1, 0, 2], 3),
    "one group": ([0] * 9, 1),
    "empty groups": ([4, 4, 0], 7),
    "all without group": ([-1, -1, -1], 2),
    "no rows": ([], 3),
    "no groups": ([-1, -1], 0),
    "fat group over several tiles": ([1] * 1500 + [0, 2] * 300, 4),
    "many groups": (torch.randint(-1, 300, (700,), generator=torch.Generator().manual_seed(1)), 300),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_plan(case, dtype, way):
    ids, n_groups = torch.as_tensor(CASES[case][0]).to(dtype), CASES[case][1]
    plan = plan_of(ids, n_groups, way)
    ids = ids.long()
    counts = torch.bincount(ids[ids >= 0], minlength=n_groups)
    order = torch.tensor(sorted(range(len(ids)), key=lambda t: (ids[t] < 0, ids[t])), dtype=torch.int64)
    assert plan.ids.tolist() == ids.tolist()
    assert plan.counts.tolist() == counts.tolist()
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert plan.perm.tolist() == order.tolist()
    assert plan.inv_perm.tolist() == order.argsort().tolist()
    for rows, tiles in zip(TILE_ROWS, plan.tiles.tolist()):
        assert tiles == [0, *((counts + rows - 1) // rows).cumsum(0).tolist()]
    assert all(t.dtype == torch.int32 for t in plan.tensors()[:-1])


def test_topk_ids_are_flattened(way):
    plan = plan_of([[1, 0], [0, -1], [1, 1]], 2, way)
    assert plan.shape == (3, 2) and plan.perm.tolist() == [1, 2, 0, 4, 5, 3]


def test_packed_sequences(way):
    cu_seqlens = torch.tensor([0, 2, 2, 5], device=way.device)
    plan = plan_of([3, 1, -1], 4, way, cu_seqlens=cu_seqlens, n_rows=7)
    assert plan.ids.tolist() == [3, 3, -1, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="one id per sequence"):
        plan_of([3, 1], 4, way, cu_seqlens=cu_seqlens, n_rows=7)


@pytest.mark.parametrize("bad", [5, 4, -2, -(2**31) + 1])
def test_out_of_range(bad, way):
    if way.device == "cpu":
        with pytest.raises(IndexError, match=rf"ids\[2\] is {bad}; ids are -1 .* or 0..3"):
            plan_of([0, 3, bad, 1], 4, way)
    assert plan_of([0, 3, bad, 1], 4, way, out_of_range="drop").ids.tolist() == [0, 3, -1, 1]


def test_far_out_of_range_int64_is_not_wrapped(way):
    ids = torch.tensor([0, 2**32, 2**32 + 1, 1 - 2**40], device=way.device)
    assert mtk.group_plan(ids, 2, out_of_range="drop", backend=way.backend).ids.tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("ids", [torch.tensor([0.0]), torch.tensor([True]), torch.tensor([1], dtype=torch.int16), [0, 1]], ids=str)
def test_id_types(ids):
    with pytest.raises(TypeError, match="give an int32 or int64 tensor"):
        mtk.group_plan(ids, 2)


def test_bad_arguments():
    ids = torch.zeros(2, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"give \[T\] or \[T, K\]"):
        mtk.group_plan(ids, 2)
    with pytest.raises(ValueError, match="give an int >= 0"):
        mtk.group_plan(ids[0, 0], -1)
    with pytest.raises(ValueError, match="'error' or 'drop'"):
        mtk.group_plan(ids[0, 0], 2, out_of_range="ignore")


def test_step():
    ids = torch.tensor([0, 1])
    assert mtk.group_plan(ids, 2, step=5).step.item() == 5
    first, second = mtk.group_plan(ids, 2), mtk.group_plan(ids, 2)
    assert first.step != second.step
    torch.manual_seed(3)
    third = mtk.group_plan(ids, 2)
    torch.manual_seed(3)
    assert torch.equal(mtk.group_plan(ids, 2).step, third.step)
    assert third.with_step(9).step.item() == 9 and third.with_step(9).perm is third.perm
    with pytest.raises(ValueError, match="give one int64 value"):
        mtk.group_plan(ids, 2, step=torch.tensor([1.0]))


def test_plan_does_not_alias_ids(way):
    ids = torch.tensor([0, 1, 0], dtype=torch.int32, device=way.device)
    plan = mtk.group_plan(ids, 2, backend=way.backend)
    ids.fill_(1)
    assert plan.ids.tolist() == [0, 1, 0]
