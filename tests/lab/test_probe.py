"""The probe counts exactly, sees every defect of a table of broken kernels, and nothing in kernels that are right."""

import pytest
import torch

from mtkernels.lab import interpreter

if not interpreter.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, in its own process", allow_module_level=True)

import feature_kernels as features
import probe_kernels as k
from triton.tools.tensor_descriptor import TensorDescriptor

from mtkernels.lab.probe import Probe
from mtkernels.testing import PROBLEMS

pytestmark = pytest.mark.interpret
M, N, K = 100, 72, 80
BLOCKS = dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=16)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def matmul(dtype=torch.float32, **kw):
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N, dtype=dtype)
    k.matmul_kernel[(4, 3)](a, b, c, M, N, K, **BLOCKS, **kw)
    return a, b, c


def split_sum(**kw):
    x, out = torch.randn(64, 16), torch.zeros(16)
    k.split_sum_kernel[(8,)](x, out, 8, 16, **kw)
    torch.testing.assert_close(out, x.sum(0), rtol=1e-4, atol=1e-4)


def split_sum_onto_empty():
    k.split_sum_kernel[(8,)](torch.randn(64, 16), torch.empty(16), 8, 16)


def last_block(sem="acq_rel"):
    x, out, count = torch.randn(5 * 16), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        k.last_block_kernel[(5,)](x, torch.empty(5), count, out, 16, 8, sem)
        torch.testing.assert_close(out[0], x.sum(), rtol=1e-4, atol=1e-4)


def lock(sem="acq_rel"):
    count = torch.zeros(1, dtype=torch.int32)
    k.lock_kernel[(6,)](torch.zeros(1, dtype=torch.int32), count, sem)
    assert count.item() == 6


def softmax(dtype=torch.float32):
    x = torch.randn(5, 99).to(dtype)
    y = torch.empty_like(x)
    k.softmax_kernel[(5,)](x, y, 99, 128)
    torch.testing.assert_close(y, x.softmax(-1))


def copy_rows(**kw):
    """The second row starts past 2^31 elements; only the touched pages exist."""
    x = torch.empty(3 * 2**30, dtype=torch.uint8).as_strided((3, 16), (2**30 + 2**29 - 8, 1))
    x.random_(100)
    y = torch.empty(3, 16, dtype=torch.uint8)
    k.copy_rows_kernel[(3,)](x, y, x.stride(0), 16, **kw)
    assert kw or torch.equal(x, y)


def update(**kw):
    k.update_kernel[(4,)](torch.randn(64), torch.empty(64), 16, **kw)


def scatter(index):
    k.scatter_kernel[(1,)](torch.randn(16), torch.tensor(index), torch.empty(16), 16)


def shift(**kw):
    k.shift_kernel[(4,)](torch.randn(60), 60, 16, **kw)


def wide_load(first):
    k.wide_load_kernel[(1,)](torch.arange(32, dtype=torch.int32), torch.empty(8, dtype=torch.int64), first, 8)


def two_widths(overlap):
    words = torch.zeros(64, dtype=torch.int32)
    k.two_widths_kernel[(2,)](words, words.view(torch.uint8), 16, overlap)


def pair():
    x, y, out = torch.randn(32), torch.randn(32), torch.empty(32)
    k.pair_kernel[(1,)]((x, y), out, 32)
    assert torch.equal(out, torch.where(y < 0, x, y))


def descriptors(host):
    a, b, c = torch.randn(80, 48).bfloat16(), torch.randn(48, 64).bfloat16(), torch.empty(80, 64, dtype=torch.bfloat16)
    if host:
        blocks = zip((a, b, c), ([64, 32], [32, 32], [64, 32]))
        features.host_descriptor_matmul_kernel[(2, 2)](*(TensorDescriptor.from_tensor(*t) for t in blocks), 48, 64, 32, 32)
    else:
        features.descriptor_matmul_kernel[(2, 2)](a, b, c, 80, 64, 48, 64, 32, 32)
    torch.testing.assert_close(c, a @ b, rtol=2**-7, atol=2**-6)


def table(extra=0, spoil=lambda table, tensors: None):
    buffer = torch.randn(64)
    tensors = [torch.randn(5), torch.randn(16), buffer[32:40], torch.randn(9)]
    sizes = torch.tensor([len(t) for t in tensors])
    pointers, y = torch.tensor([t.data_ptr() for t in tensors]), torch.empty(4)
    spoil(pointers, tensors)
    k.table_kernel[(4,)](pointers, sizes, y, extra, 32)
    if tensors and not extra:
        torch.testing.assert_close(y, torch.stack([t.sum() for t in tensors]))


def free(pointers, tensors):
    tensors.clear()


def advance(pointers, tensors):
    pointers[0] += 4


RIGHT = {
    "matmul": matmul,
    "matmul bf16": lambda: matmul(torch.bfloat16),
    "split sum with atomics": split_sum,
    "last block, acquire and release": last_block,
    "lock, acquire and release": lock,
    "softmax": softmax,
    "softmax fp16": lambda: softmax(torch.float16),
    "rows past 2^31 elements": copy_rows,
    "output of torch.empty, written": update,
    "permutation": lambda: scatter(list(range(15, -1, -1))),
    "in place within a block": shift,
    "aligned wide load": lambda: wide_load(4),
    "pointers from memory": table,
    "one buffer as words and as bytes": lambda: two_widths(0),
    "tuple of tensors, pointers chosen by lane": pair,
    "device descriptors": lambda: descriptors(host=False),
    "host descriptors": lambda: descriptors(host=True),
}

WRONG = {
    "mask dropped": (lambda: matmul(BUG="mask dropped"), "out of bounds", "a_ptr", "load outside a_ptr"),
    "wrong row offset": (lambda: matmul(BUG="wrong row offset"), "out of bounds", "a_ptr", "which has 8000 elements"),
    "double store": (lambda: matmul(BUG="overlapping tiles"), "race", "c_ptr", "write after write"),
    "+= without atomic": (lambda: split_sum(BUG="no atomic"), "race", "out_ptr", "read after write"),
    "atomic of program scope": (lambda: split_sum(BUG="atomic within a program"), "race", "out_ptr", "write after write"),
    "sum onto torch.empty": (split_sum_onto_empty, "never written", "out_ptr", "atomic of memory"),
    "relaxed counter": (lambda: last_block("relaxed"), "race", "part_ptr", "read after write"),
    "counter without acquire": (lambda: last_block("release"), "race", "part_ptr", "read after write"),
    "relaxed lock": (lambda: lock("relaxed"), "race", "count_ptr", "read after write"),
    "int32 overflow": (lambda: copy_rows(BUG="int32 overflow"), "out of bounds", "x_ptr", "load outside x_ptr"),
    "output read": (lambda: update(BUG="output read"), "never written", "y_ptr", "load of memory"),
    "two lanes, one address": (lambda: scatter([0, 0, *range(2, 16)]), "differing lanes", "y_ptr", "different values"),
    "neighbour overwritten": (lambda: shift(BUG="neighbour"), "race", "x_ptr", "program"),
    "bytes written under words": (lambda: two_widths(1), "race", "_ptr", "program"),
    "misaligned wide load": (lambda: wide_load(3), "misaligned", "x_ptr", "no multiple of 8 bytes"),
    "beyond a pointer from memory": (lambda: table(extra=3), "out of bounds", "float32 tensor", "load outside"),
    "pointer to a freed tensor": (lambda: table(spoil=free), "out of bounds", "", "no live tensor"),
    "pointer one element too far": (lambda: table(spoil=advance), "out of bounds", "float32 tensor", "has 5 elements"),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_right_kernels_give_no_finding(name, seed):
    with Probe(seed) as probe:
        RIGHT[name]()
    assert probe.launches and not probe.findings


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", [None, 3])
def test_broken_kernels_are_found(name, seed):
    run, kind, argument, detail = WRONG[name]
    with Probe(seed) as probe:
        try:
            run()
        except AssertionError:  # some defects also spoil the result
            pass
    assert [f for f in probe.findings if f.kind == kind and argument in f.argument and detail in f.detail], probe.findings
    assert {f.kind for f in probe.findings} == {kind}


@pytest.mark.parametrize("semantic, findings", [("acquire", []), ("relaxed", ["race"])])
def test_a_flag_orders_what_it_acquires(semantic, findings):
    out = torch.empty(3)
    with Probe() as probe:
        k.flag_kernel[(4,)](torch.zeros(1, dtype=torch.int32), torch.empty(1), out, semantic)
    assert [f.kind for f in probe.findings] == findings and out.tolist() == [3.0] * 3


def test_a_finding_says_where():
    with Probe() as probe:
        matmul(BUG="mask dropped")
    (finding,) = probe.findings
    assert (finding.kernel, finding.program) == ("matmul_kernel", (3, 0, 0))
    assert (finding.argument, finding.element) == ("a_ptr", M * K)
    assert finding.line.startswith("probe_kernels.py:") and str(finding.element) in str(finding)
    # Rows 100..127 of tile 3, all K columns, for each of 3 column tiles.
    assert finding.count == 28 * K * 3


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_counts_of_a_ragged_matmul(dtype, name):
    with Probe(seed=0) as probe:
        a, b, c = matmul(dtype)
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
    assert counts["dot_flops"] == {f"{name} x {name} -> fp32": 12 * 5 * 2 * 32 * 32 * 16}


def test_counts_of_atomics():
    with Probe(seed=0) as probe:
        split_sum()
    counts = probe.launches[0].report()
    assert (counts["atomic_requests"], counts["atomic_lanes"], counts["atomic_sectors"]) == (8, 8 * 16, 8 * 2)
    assert counts["distinct_sectors_read"] == 64 * 16 * 4 // 32 + 2 and counts["distinct_sectors_written"] == 2


def test_lanes_without_a_value_are_poisoned():
    """The stock interpreter gives 0 there and hides the mistake."""
    x, y = torch.randn(5, 99) - 200, torch.empty(5, 99)
    with Probe():
        k.softmax_kernel[(5,)](x, y, 99, 128, BUG="no other")
    assert y.isnan().all()


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
        options = (per_adapter, per_adapter.int(), per_adapter.long(), offsets, perm, tiles, torch.tensor(0), 0, False)
        s = lora.lora_fwd(x, A, B, [], *options, y)
        dx = torch.zeros_like(x)
        grads = lora.lora_bwd(y, x, s, A, B, [], *options, dx, True)
    assert len(probe.launches) == 4 + 2 + 3 and len(grads) == 4 and not probe.findings
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
