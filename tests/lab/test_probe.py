"""The probe counts exactly and says where; test_mutations.py shows what it catches."""

import pytest
import torch

from mtkernels.lab import interpreter

if not interpreter.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, in its own process", allow_module_level=True)

import broken_kernels as k
from mutation_cases import K, M, N, matmul, split_sum

from mtkernels.lab.probe import Probe
from mtkernels.testing import PROBLEMS

pytestmark = pytest.mark.interpret
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("semantic, findings", [("acquire", []), ("relaxed", ["race"])])
def test_a_flag_orders_what_it_acquires(semantic, findings):
    out = torch.empty(3)
    with Probe() as probe:
        k.flag_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.empty(1), out, semantic)
    assert [f.kind for f in probe.findings] == findings and out.tolist() == [3.0] * 3


def test_a_finding_says_where():
    with Probe() as probe:
        matmul("mask dropped")
    (finding,) = probe.findings
    assert (finding.kernel, finding.program) == ("matmul_kernel", (3, 0, 0))
    assert (finding.argument, finding.element) == ("a_ptr", M * K)
    assert finding.line.startswith("broken_kernels.py:") and str(finding.element) in str(finding)
    # Rows 100..127 of tile 3, all K columns, for each of 3 column tiles.
    assert finding.count == 28 * K * 3


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_counts_of_a_ragged_matmul(dtype, name):
    with Probe(seed=0) as probe:
        a, b, c = matmul(dtype=dtype)
    torch.testing.assert_close(c, a @ b, rtol=2**-7, atol=2**-5)
    item, (launch,) = a.element_size(), probe.launches
    counts = launch.report()
    assert (counts["kernel"], counts["grid"], counts["programs"]) == ("matmul_kernel", (4, 3, 1), 12)
    # Every column tile reads a, every row tile reads b; 5 steps of K in each of 12 programs.
    assert counts["load_requests"] == 2 * 5 * 12 and counts["load_lanes"] == 3 * M * K + 4 * K * N
    assert counts["load_masked"] == 5 * 12 * 2 * 32 * 16 - counts["load_lanes"]
    assert counts["load_bytes"] == item * counts["load_lanes"] and counts["store_bytes"] == item * M * N
    # A row of b is 72 elements, so in fp32 its tiles of 32 columns start and end on sectors.
    if dtype == torch.float32:
        assert counts["load_sectors"] == counts["load_bytes"] // 32 and counts["store_sectors"] == M * N // 8
    assert counts["distinct_sectors_read"] == (M * K + K * N) * item // 32
    assert counts["distinct_sectors_written"] == M * N * item // 32
    assert launch.dram_floor_bytes == (M * K + K * N + M * N) * item
    flops = 12 * 5 * 2 * 32 * 32 * 16
    assert counts["dot_flops"] == {f"{name} x {name} -> fp32": flops} and counts["dot_flops_by_function"] == {"matmul_kernel": flops}


def test_counts_of_atomics():
    with Probe(seed=0) as probe:
        split_sum()
    counts = probe.launches[0].report()
    assert (counts["atomic_requests"], counts["atomic_lanes"], counts["atomic_sectors"]) == (8, 8 * 16, 8 * 2)
    assert counts["distinct_sectors_read"] == 64 * 16 * 4 // 32 + 2 and counts["distinct_sectors_written"] == 2


def test_accumulation_order_shows_in_the_bits():
    x, sums = torch.randn(4096), torch.empty(2)
    with Probe() as probe:
        k.sum_kernel[(1,)](x, sums, 4096, 64)
        k.sum_kernel[(1,)](x, sums[1:], 4096, 256)
    torch.testing.assert_close(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[1]) and not probe.findings


def test_tf32_rounds_the_operands():
    a, b, exact, rounded = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32), torch.empty(32, 32)
    with Probe():
        k.dot_kernel[(1,)](a, b, exact, 32, "ieee")
        k.dot_kernel[(1,)](a, b, rounded, 32, "tf32")

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    torch.testing.assert_close(exact, a @ b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded, tf32(a) @ tf32(b), rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-4


def test_the_seed_is_the_program_order():
    def order(seed):
        turns = torch.empty(16, dtype=torch.int32)
        with Probe(seed) as probe:
            k.turn_kernel[(16,)](torch.zeros(1, dtype=torch.int32), turns)
        assert not probe.findings
        return turns.tolist()

    assert order(None) == list(range(16)) and sorted(order(1)) == list(range(16))
    assert order(1) == order(1) != order(2)


def test_bf16_atomics_round_each_sum():
    x, out = torch.randn(8, 16).bfloat16(), torch.zeros(16, dtype=torch.bfloat16)
    with Probe() as probe:
        k.split_sum_kernel[(8,)](x, out, 1, 16)
    expected = torch.zeros(16, dtype=torch.bfloat16)
    for row in x:
        expected += row
    assert torch.equal(out, expected) and not probe.findings


def test_watched_tensors_bound_pointers_by_themselves():
    """A view of a buffer: its storage is longer than it is."""
    view, y = torch.randn(64)[8:16], torch.empty(1)
    pointers, sizes = torch.tensor([view.data_ptr()]), torch.tensor([8])
    for extra, watched, findings in [(0, True, 0), (3, False, 0), (3, True, 1)]:
        with Probe() as probe:
            if watched:
                probe.watch({"factor": view})
            k.table_kernel[(1,)](pointers, sizes, y, extra, 32)
        assert len(probe.findings) == findings
    assert (probe.findings[0].argument, probe.findings[0].element) == ("factor", 8)


def test_tensors_made_before_the_block_are_known():
    tensors = [torch.randn(5), torch.randn(16)]
    y = torch.empty(2)
    with Probe() as probe:
        k.table_kernel[(2,)](torch.tensor([t.data_ptr() for t in tensors]), torch.tensor([5, 16]), y, 0, 32)
    torch.testing.assert_close(y, torch.stack([t.sum() for t in tensors]))
    assert not probe.findings


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "lora_linear"])  # lora_delta runs the same kernels
def test_own_kernels_give_no_finding(name, dtype):
    problem = PROBLEMS[name]([0, 2, -1, 4, 0, 5, 2], dtype, backend="triton")
    with Probe(seed=1) as probe:
        problem.results()
    assert len(probe.launches) >= 3 and not probe.findings


def test_own_launchers_give_no_finding():
    """Called directly: the factors are seen only through the table of their addresses."""
    from mtkernels.triton_kernels import group_plan, lora

    A, B = [torch.randn(r, 24) for r in (3, 8)], [torch.randn(20, r) for r in (3, 8)]
    x, y, per_adapter = torch.randn(7, 24), torch.randn(7, 20), torch.ones(2)
    expected = y.clone()
    with Probe(seed=1) as probe:
        _, _, offsets, perm, _, tiles = group_plan.group_plan(torch.tensor([0, 1, 1, -1, 0, 1, 1]), 2)
        options = ([per_adapter], [per_adapter.int()], [per_adapter.long()], None, offsets, perm, tiles, torch.tensor(0), [0], False)
        s = lora.lora_fwd(x, A, B, [], *options, [y])
        dx, dA, dB = torch.zeros_like(x), [torch.empty_like(a) for a in A], [torch.empty_like(b) for b in B]
        lora.lora_bwd([y], x, s, A, B, [], *options, dx, None, dA, dB, [])
    assert len(probe.launches) == 4 + 2 + 3 and not probe.findings
    for row, adapter in enumerate([0, 1, 1, -1, 0, 1, 1]):
        if adapter >= 0:
            expected[row] += B[adapter] @ (A[adapter] @ x[row])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_memory_of_custom_operations():
    """What an operation allocates in Python and leaves unwritten is seen through the dispatcher."""
    with torch.library._scoped_library("probe_test", "DEF") as library:
        library.define("update(Tensor x, bool read) -> Tensor")

        def implementation(x, read):
            y = torch.empty_like(x)
            k.update_kernel[(4,)](x, y, 16, BUG="output read" if read else "")
            return y

        library.impl("update", implementation, "CPU")
        for read in (False, True):
            with Probe() as probe:
                torch.ops.probe_test.update(torch.randn(64), read)
            assert [f.kind for f in probe.findings] == ["never written"] * read


def test_refusals_name_the_reason(monkeypatch):
    with Probe(), pytest.raises(RuntimeError, match="a Probe is open already"):
        Probe().__enter__()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Triton is imported"):
        Probe()


def test_the_interpreter_is_put_back():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))
    with Probe():
        assert dict(vars(InterpreterBuilder)) != before[0]
    assert (dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))) == before
