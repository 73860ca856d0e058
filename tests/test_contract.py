"""The guarantees every op inherits by having a Problem in mtkernels.testing."""

import inspect
import re
from importlib import import_module

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mtkernels import _op, ops
from mtkernels.testing import MIXED, PROBLEMS, assert_accurate, large, op_of, poisoned

NAMES = list(PROBLEMS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(a, b):
    if a.shape != b.shape or a.dtype != b.dtype or not a.numel():
        return a.shape == b.shape and a.dtype == b.dtype
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


class Recorder(TorchDispatchMode):
    """Calls of mtkernels ops with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mtkernels":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def recorded_calls(name):
    with Recorder() as recorder:
        PROBLEMS[name](MIXED, torch.float32).results()
    return recorder.calls


def test_every_op_has_a_problem():
    differentiable = {info.name for info in _op.OPS.values() if info.differentiable}
    assert differentiable == {op_of(name) for name in NAMES}
    reached = {op._schema.name.split("::")[1] for name in NAMES for op in recorded_calls(name)}
    assert reached == set(_op.OPS), "ops that no problem calls are not covered by this file"


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    calls = recorded_calls(name)
    assert op_of(name) in {op._schema.name.split("::")[1] for op in calls}
    for op, args in calls.items():
        if op is not _op.OPS[op_of(name)].op:  # backward ops have no gradient of their own
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    problem = PROBLEMS[name](MIXED, torch.float64)
    leaves = list(problem.leaves.values())
    finite = [t for t in leaves if torch.isfinite(t).all()]
    if len(finite) == len(leaves):
        assert torch.autograd.gradcheck(lambda *_: problem.fn(), leaves, fast_mode=True)
    else:  # masked classes (-inf) have no finite difference: compare with plain torch's gradients instead
        ours, plain = problem.results(), problem.results(problem.plain)
        for key in ours:
            torch.testing.assert_close(ours[key], plain[key], rtol=1e-9, atol=1e-12)


# (way, problem) -> launches of its large form
LAUNCHES = {}


def run_large(name, dtype, way, opened):
    ids, options = large(name)
    with poisoned():
        results = PROBLEMS[name](ids, dtype, way.device, backend=way.backend, **options).results()
    LAUNCHES[way.name, name] = list(getattr(opened, "launches", ()))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(name, dtype, way, way_is_open):
    ids, options = large(name)
    ours = run_large(name, dtype, way, way_is_open)
    plain = PROBLEMS[name](ids, dtype, way.device, **options)
    plain = plain.results(plain.plain)
    exact = PROBLEMS[name](ids, dtype, way.device, exact=True, **options)
    exact = exact.results(exact.plain)
    for key in exact:
        assert ours[key].dtype == plain[key].dtype and ours[key].shape == plain[key].shape
        assert_accurate(ours[key], plain[key], exact[key], dtype, f"{name} {key}")


def test_large_problems_span_the_grid_of_every_kernel(emulated_triton_way, way_is_open):
    """Several programs on every axis that a kernel reads, for test_accuracy; where not, see mtkernels.testing.large."""
    way, grids = emulated_triton_way, {}
    for name in NAMES:
        if (way.name, name) not in LAUNCHES:
            run_large(name, way.dtypes[0], way, way_is_open)
        for launch in LAUNCHES[way.name, name]:
            grids.setdefault(launch.kernel, []).append(launch.grid)
    alone = []
    for stem in ops.STEMS:
        for kernel, function in vars(import_module(f"mtkernels.triton_kernels.{stem}")).items():
            for axis in re.findall(r"program_id\((\d)\)", inspect.getsource(function.fn)) if kernel.endswith("_kernel") else ():
                if max((grid[int(axis)] for grid in grids.get(kernel, ())), default=0) < 2:
                    alone.append(f"{kernel} has one program on axis {axis}")
    assert not alone


@pytest.mark.parametrize("name", NAMES)
def test_run_twice_same_bits(name, dtype, fast_way):
    first, second = (PROBLEMS[name](MIXED, dtype, fast_way.device, backend=fast_way.backend).results() for _ in range(2))
    assert all(same(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tenant_isolation(name, dtype, kernel_way):
    """A group's bits are the same alone, in another order, and beside other groups."""

    def slices(ids):
        problem = PROBLEMS[name](ids, dtype, kernel_way.device, backend=kernel_way.backend)
        return problem.group_slices(problem.results())

    mixed = slices(MIXED)
    alone = (2, 5) if kernel_way.slow else set(MIXED)
    others = [MIXED[::-1], MIXED + [1] * 9 + [-1] * 4, *([g] * MIXED.count(g) for g in alone)]
    others += [] if kernel_way.slow else [sorted(MIXED)]
    for ids in others:
        got = slices(ids)
        assert got
        for key, bits in got.items():
            if key[1] in MIXED and ids.count(key[1]) == MIXED.count(key[1]):
                assert same(bits, mixed[key]), f"{name} {key} changes in batch {ids}"


@pytest.mark.parametrize("name", NAMES)
def test_isolation_from_nan_rows(name, dtype, way):
    ids = [*MIXED, 0]  # 17 rows: no factor has that many

    def slices(poison):
        problem = PROBLEMS[name](ids, dtype, way.device, backend=way.backend)
        with torch.no_grad():
            for leaf in poison and problem.leaves.values() or ():
                if leaf.shape[:1] == (len(ids),):
                    leaf[[t for t, g in enumerate(ids) if g == 5]] = torch.nan
        return problem.group_slices(problem.results())

    clean, poisoned_slices = slices(False), slices(True)
    for key in clean:
        if key[1] not in (5, -1):
            assert same(clean[key], poisoned_slices[key]), f"{name} {key} sees another group's NaN"


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_row_offsets_past_2_31_elements(name, dtype, kernel_way):
    """Rows so far apart that the last begins past 2^31 elements; only the pages that are touched exist."""
    ids = [*MIXED, 0]  # 17 rows: no factor has that many

    def results(stride):
        problem = PROBLEMS[name](ids, dtype, kernel_way.device, backend=kernel_way.backend)
        for leaf in problem.leaves.values():
            if leaf.dim() > 1 and len(leaf) == len(ids):
                storage = torch.empty(16 * stride + leaf[0].numel(), dtype=leaf.dtype, device=leaf.device)
                leaf.data = storage.as_strided(leaf.shape, (stride, *leaf.stride()[1:])).copy_(leaf.data)
        return problem.results()

    # Both strides are multiples of 64, so that both run the same specialisation.
    near, far = results(2**13 + 64), results(2**27 + 64)
    assert all(same(near[key], far[key]) for key in near)


@pytest.mark.parametrize("name", NAMES)
def test_thread_count_changes_no_bit(name, dtype, fast_kernel_way):
    ids, before = MIXED * 40, torch.get_num_threads()

    def slices(n_threads):
        torch.set_num_threads(n_threads)
        problem = PROBLEMS[name](ids, dtype, fast_kernel_way.device, backend=fast_kernel_way.backend)
        return problem.group_slices(problem.results())

    try:
        one, many = slices(1), slices(max(2, before))
    finally:
        torch.set_num_threads(before)
    assert all(same(one[key], many[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name, dtype, way):
    results = PROBLEMS[name]([], dtype, way.device, backend=way.backend).results()
    for key, value in results.items():
        assert torch.equal(value, torch.zeros_like(value)), f"{name} {key}"


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_without_group(name, dtype, way):
    """What belongs to a group is exact zeros; a shared base is as if there were no groups."""
    problem = PROBLEMS[name]([-1] * 5, dtype, way.device, backend=way.backend)
    plain = problem.results(problem.plain)
    for key, value in problem.results().items():
        if key in (*problem.by_row, *(problem.by_group or ())):
            tolerance = 0 if not plain[key].any() else 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(value, plain[key], rtol=tolerance, atol=tolerance, msg=f"{name} {key}")


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph_dynamic_rows(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda fn: fn(), fullgraph=True, dynamic=True, backend=counter)
    for ids in (MIXED, MIXED[:7], MIXED * 2):
        problem = PROBLEMS[name](ids, torch.float32)
        ours, eager = problem.results(lambda p=problem: call(p.fn)), problem.results()
        assert all(same(ours[key], eager[key]) for key in eager)


@pytest.mark.parametrize("name", NAMES)
def test_fake_and_meta(name):
    real = recorded_calls(name)
    for op, args in real.items():
        out = op(*args)
        for make in (lambda t: t.detach().to("meta"), None):
            mode = FakeTensorMode()
            convert = make or mode.from_tensor
            fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, convert, args)
            if make:
                fake = op(*fake_args)
            else:
                with mode:
                    fake = op(*fake_args)
            for a, b in zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(fake)):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"{op}"


@pytest.mark.parametrize("name", NAMES)
def test_autocast_as_torch(name):
    """Under autocast the output has the dtype that nn.Linear (LoRA, experts), the plain path (embedding, DoRA) or cross entropy (losses) would give."""
    problem = PROBLEMS[name](MIXED, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = problem.fn(), problem.plain()
    as_plain = op_of(name) in ("lora_linear", "lora_embedding") or name.startswith("dora_")
    assert out.dtype == (plain.dtype if as_plain else torch.bfloat16 if name.startswith(("lora_", "moe_")) else torch.float32)
    grads = torch.autograd.grad(out, list(problem.leaves.values()), problem.upstream.to(out.dtype))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_selective_checkpointing_sees_the_op(name):
    seen = set()

    def policy(ctx, func, *args, **kwargs):
        seen.add(func)
        return CheckpointPolicy.MUST_SAVE if func.namespace == "mtkernels" else CheckpointPolicy.PREFER_RECOMPUTE

    problem = PROBLEMS[name](MIXED, torch.float32)
    eager = problem.results()
    ours = problem.results(lambda: checkpoint(problem.fn, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)))
    assert _op.OPS[op_of(name)].op in seen
    assert all(same(ours[key], eager[key]) for key in eager)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_and_save_on_cpu_change_nothing(name, dtype, fast_way):
    problem = PROBLEMS[name](MIXED, dtype, fast_way.device, backend=fast_way.backend)
    eager = problem.results()
    recomputed = problem.results(lambda: checkpoint(problem.fn, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        offloaded = problem.results()
    for other in (recomputed, offloaded):
        assert all(same(other[key], eager[key]) for key in eager)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_raises_by_name(name):
    problem = PROBLEMS[name](MIXED, torch.float32)
    leaves = list(problem.leaves.values())
    grads = torch.autograd.grad(problem.fn(), leaves, problem.upstream.clone().requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mtkernels::\w+_bwd: double backward is not supported"):
        sum(g.nan_to_num().square().sum() for g in grads).backward()


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_over_one_graph(name, dtype, fast_way):
    problem = PROBLEMS[name](MIXED, dtype, fast_way.device, backend=fast_way.backend)
    leaves, out = list(problem.leaves.values()), problem.fn()
    first = torch.autograd.grad(out, leaves, problem.upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, problem.upstream)
    assert all(same(a, b) for a, b in zip(first, second))


def test_every_public_op_is_registered():
    assert {*_op.OPS, *ops.COMPOSED} >= {f for fs in ops.STEMS.values() for f in fs}
    assert set(_op.OPS) >= set(ops.COMPOSED.values())
