"""What the cost table is made of: counts of torch operations, bounds, the work of a case, single files of peers, tables."""

import sys
from dataclasses import replace

import pytest
import torch

from mtkernels.bench import isolated, registry, verify
from mtkernels.lab import tables
from mtkernels.lab.roofline import CARDS, bound_us
from mtkernels.lab.torch_ops import GEMM, TORCH, TRITON, Launch, TorchOps, held_bytes


def suite_case(op, **shape):
    suite, case = registry.select([op], "cost", ("bf16",))[0]
    return suite, replace(case, shape={**case.shape, **shape})


# Torch operations


def counted(call):
    with TorchOps() as seen:
        call()
    return [(launch.name.removeprefix("aten::"), launch.kind, launch.distinct_bytes, launch.flops) for launch in seen.launches]


def test_a_matrix_product_counts_each_operand_once():
    x, w, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
    n_bytes = 4 * (6 * 8 + 5 * 8 + 6 * 5)
    with torch.no_grad():
        assert counted(lambda: torch.nn.functional.linear(x, w)) == [("mm", GEMM, n_bytes, {"float32": 2 * 6 * 8 * 5})]
        assert counted(lambda: torch.nn.functional.linear(x, w, bias)) == [("addmm", GEMM, n_bytes + 4 * 5, {"float32": 2 * 6 * 8 * 5})]


def test_views_and_allocations_are_no_launches():
    x = torch.randn(6, 8)
    assert counted(lambda: (x.t()[1:].reshape(-1, 3).view(-1), torch.empty(9), x.detach(), x[0, 0].item())) == [("clone", TORCH, 2 * 4 * 42, {})]


def test_gathers_move_rows_and_scatters_reach_them():
    table, rows = torch.randn(100, 4), torch.tensor([3, 3, 7])
    index = 8 * 3
    assert counted(lambda: table[rows]) == [("index", TORCH, index + 2 * 4 * 12, {})]
    assert counted(lambda: table.index_add_(0, rows, torch.ones(3, 4))[0])[1:] == [("index_add_", TORCH, index + 3 * 4 * 12, {})]
    copied = counted(lambda: table.index_add(0, rows, torch.ones(3, 4)))[1:]
    assert copied == [("index_add (copy)", TORCH, 2 * 4 * 400, {}), ("index_add", TORCH, index + 3 * 4 * 12, {})]


def test_an_index_backward_adds_in_place():
    x, rows = torch.randn(9, 4, requires_grad=True), torch.tensor([3, 3, 7])
    y = x[rows]
    names = [name for name, *_ in counted(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))]
    assert [n for n in names if "index_put" in n] == ["index_put"] or [n for n in names if "index_put" in n] == ["_index_put_impl_"]


def test_dropout_is_one_launch():
    names = [name for name, *_ in counted(lambda: torch.nn.functional.dropout(torch.ones(64), 0.5))]
    assert names == ["ones", "native_dropout"]


@pytest.mark.parametrize("a, b, flops", [((12, 8), (2, 8, 16), 2 * 12 * 8 * 16), ((8, 16), (16, 24), 2 * 8 * 16 * 24), ((2, 6, 8), (2, 8, 16), 2 * 12 * 8 * 16)])
def test_grouped_products(a, b, flops):
    ends = torch.tensor([8, a[0] if len(b) == 3 else a[1]], dtype=torch.int32) if len(a) == 2 else None
    (launch,) = counted(lambda: torch.nn.functional.grouped_mm(torch.randn(a).bfloat16(), torch.randn(b).bfloat16(), offs=ends))[-1:]
    assert launch[1] == GEMM and launch[3] == {"bfloat16": flops}


def test_an_expanded_tensor_holds_one_copy():
    assert held_bytes(torch.randn(1, 5).expand(100, 5)) == 20
    assert held_bytes(torch.empty(0, 5)) == 0


# Bounds


def test_bound_is_the_slower_of_memory_and_arithmetic_of_each_launch():
    card = CARDS["A100"]
    memory, arithmetic = Launch("m", TRITON, 2039, 0, {"bf16": 1}), Launch("a", TRITON, 1, 0, {"bf16": 312_000_000, "fp32": 156_000_000})
    assert bound_us([memory], "A100") == pytest.approx(1e-3)
    assert bound_us([arithmetic], "A100") == pytest.approx(2.0)
    assert bound_us([memory, arithmetic], "A100") == pytest.approx(2.001)
    assert CARDS["H100"].bandwidth > card.bandwidth


# Work of a case


def test_lora_work_by_hand():
    suite, case = suite_case("lora_linear", T=10, D=4, O=6, ranks=(1, 3), shares=(0.2, 0.8))
    assert suite.rows_of(case.shape) == [2, 8]
    forward, backward = (registry.work(suite, case, mode) for mode in ("fwd", "bwd"))
    lora = 2 * (4 + 6) * (2 * 1 + 8 * 3)
    assert (forward.tensor_flops, forward.base_flops, backward.tensor_flops) == (lora, 2 * 10 * 4 * 6, 2 * lora)
    assert forward.split_bytes == 2 * (2 * 10 * 4 + 10 * 6 + 4 * 6)
    assert backward.split_bytes == 2 * (2 * 10 * 4 + 2 * 10 * 6 + 4 * 6)
    assert forward.bytes == 2 * (10 * 4 + 10 * 6 + 4 * 6 + 4 * (4 + 6))
    assert registry.work(suite, case, "full") == forward + backward


def test_shares_must_fit():
    suite, case = suite_case("lora_linear", ranks=(1, 3), shares=(0.5, 0.6))
    with pytest.raises(ValueError, match="adding up to 1"):
        suite.rows_of(case.shape)


@pytest.mark.parametrize("stem", list(registry.suites()))
def test_every_suite_has_a_case_to_count(stem):
    suite = registry.suites()[stem]
    cases = [case for case in suite.cases() if "cost" in case.presets]
    assert cases
    for case in (replace(case, dtype=case.dtypes[0]) for case in cases):
        passes = suite.cost(case)
        assert set(passes) == ({"fwd", "bwd"} if case.training else {"fwd"})
        assert all(w.bytes > 0 and w.flops >= w.tensor_flops + w.base_flops for w in passes.values())


def test_cross_entropy_from_hidden_states_is_the_same_loss():
    suite, case = next((s, c) for s, c in registry.select(["task_cross_entropy"], "cost", None) if "H" in c.shape)
    problem = suite.inputs(replace(case, shape=dict(T=20, V=11, J=3, H=8)), "cpu")
    provider = next(p for p in suite.PROVIDERS if p.name == "reference")
    assert verify.Verifier(suite, problem).check(provider, provider.make(problem)).ok


# Files of other packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, with one good file in it."""
    (tmp_path / "heavyweight" / "ops").mkdir(parents=True)
    (tmp_path / "heavyweight" / "__init__.py").write_text("raise RuntimeError('needs a GPU')")
    (tmp_path / "heavyweight" / "ops" / "good.py").write_text(
        "from absent_logger import log\nfrom heavyweight.config import TILE, other\n\ndef double(x):\n    log(other.deep(x))\n    return TILE * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_one_file_of_a_package(package):
    (good,) = isolated.load("heavyweight", ["ops.good"], {"heavyweight.config": {"TILE": 2}}, others=("absent_logger",))
    assert good.double(21) == 42
    assert not {"heavyweight", "heavyweight.config", "absent_logger"} & set(sys.modules), "nothing is left behind"


def test_a_package_or_file_that_is_not_there(package):
    with pytest.raises(registry.Unavailable, match="^not installed$"):
        isolated.load("no_such_package", ["x"])
    with pytest.raises(registry.Unavailable, match="heavyweight of unknown version has no ops/bad.py"):
        isolated.load("heavyweight", ["ops.good", "ops.bad"])


# Tables


def test_tables_align():
    text = tables.table(["op", "bytes\nMB"], [["a", 1.5], ["long", 22]])
    assert text == "      bytes\nop       MB\na       1.5\nlong     22"


@pytest.mark.parametrize("value, text", [(None, ""), (0, "0"), (1234.5, "1234"), (12.345, "12.3"), (1.0, "1.00"), (0.1234, "0.123"), (0.00012, "1.2e-04")])
def test_three_digits(value, text):
    assert tables.significant(value) == text
