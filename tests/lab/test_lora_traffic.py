"""What the LoRA launches read, write and multiply, counted by the probe: every operand once a launch, few padded products."""

from dataclasses import dataclass

import pytest
import torch

from mtkernels.lab import interpreter

if not interpreter.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, in its own process", allow_module_level=True)

from mtkernels.lab.probe import Probe
from mtkernels.reference.group_plan import group_plan
from mtkernels.triton_kernels import lora

pytestmark = pytest.mark.interpret

D, DTYPE = 128, torch.float16
BACKWARD = ["_lora_expand_bwd_kernel", "_lora_grad_a_kernel", "_lora_bwd_finish_kernel"]


@dataclass
class Case:
    """Rows, adapters and gradients of one layer; widths: output features of each target."""

    rows: list
    ranks: list
    widths: tuple
    n_slots: int = 1

    def __post_init__(self):
        n, G = len(self.ranks), len(self.widths)
        ids = torch.arange(n).repeat_interleave(torch.tensor(self.rows))
        self.ids = ids[torch.randperm(len(ids))]
        _, _, offsets, self.perm, _, tiles = group_plan(self.ids, n)
        T = len(ids) // self.n_slots
        self.x, self.dx = torch.randn(T, D).to(DTYPE), torch.randn(T, D).to(DTYPE)
        self.ys = [torch.randn(T, O).to(DTYPE) for O in self.widths]
        self.A = [(torch.randn(r, D) / 16).to(DTYPE) for _ in self.widths for r in self.ranks]
        self.B = [(torch.randn(O, r) / 16).to(DTYPE) for O in self.widths for r in self.ranks]
        none = torch.zeros(n, dtype=torch.int32)
        vectors = [torch.ones(n)] * G, [none] * G, [none.long()] * G
        self.plan = offsets, self.perm, tiles
        self.bank = self.A, self.B, [], *vectors, None, *self.plan, torch.tensor(0), list(range(G)), False

    def run(self):
        """(launches of forward, launches of backward)."""
        with Probe(seed=0) as probe:
            self.s = lora.lora_fwd(self.x, *self.bank, self.ys)
            n_forward = len(probe.launches)
            self.dA, self.dB = [torch.empty_like(a) for a in self.A], [torch.empty_like(b) for b in self.B]
            lora.lora_bwd(self.ys, self.x, self.s, *self.bank, self.dx, None, self.dA, self.dB, [])
        assert not probe.findings
        return probe.launches[:n_forward], probe.launches[n_forward:]

    def useful_flops(self, width):
        """Of one product over rows, ranks and `width` for every target."""
        return 2 * sum(n * r for n, r in zip(self.rows, self.ranks)) * width


def sectors(*tensors):
    """32-byte sectors of contiguous tensors whose ends fall on sector ends."""
    assert all(t.nbytes % 32 == 0 for t in tensors)
    return sum(t.nbytes for t in tensors) // 32


def assert_reads_once(case, launch, *tensors):
    """The operands, each sector of them once, and of the plan and the table no more than they have."""
    fields, n_columns = 23, len(case.A)
    plan = sum(t.nbytes // 32 + 2 for t in case.plan) + fields * n_columns * 8 // 32 + 2
    per_adapter = 3 * n_columns + 1  # scale, threshold, seed, and the step
    assert sectors(*tensors) <= launch.distinct_sectors_read <= sectors(*tensors) + plan + per_adapter


@pytest.mark.parametrize("widths", [(64,), (64, 96), (32, 32, 64)], ids=str)
def test_every_operand_is_read_once_whatever_the_number_of_targets(widths):
    case = Case([64, 128, 32], [16, 32, 64], widths)
    (shrink, expand), backward = case.run()
    assert [shrink.kernel, expand.kernel] == ["_lora_shrink_kernel", "_lora_expand_kernel"]
    assert [launch.kernel for launch in backward] == BACKWARD
    ds_and_dB, grad_a, finish = backward
    assert_reads_once(case, shrink, case.x, *case.A)
    assert shrink.distinct_sectors_written == sectors(case.s)
    # S has zeros right of an adapter's rank, which nobody reads.
    s = torch.empty(sum(n * r for n, r in zip(case.rows, case.ranks)) * len(widths), dtype=DTYPE)
    assert_reads_once(case, expand, s, *case.B, *case.ys)
    assert expand.distinct_sectors_written == sectors(*case.ys)
    assert_reads_once(case, ds_and_dB, *case.ys, s, *case.B)
    assert ds_and_dB.distinct_sectors_written == sectors(case.s, *case.dB)
    assert_reads_once(case, grad_a, case.x, s)
    assert grad_a.distinct_sectors_written == sectors(*case.dA)
    assert_reads_once(case, finish, case.dx, s, *case.A)
    assert finish.distinct_sectors_written == sectors(case.dx)


def test_several_slots_a_row_take_a_launch_each_on_y_and_dx():
    forward, backward = Case([40, 20], [16, 8], (64,), n_slots=3).run()
    assert [launch.kernel for launch in forward] == ["_lora_shrink_kernel"] + ["_lora_expand_kernel"] * 3
    assert [launch.kernel for launch in backward] == BACKWARD + BACKWARD[-1:] * 2


@pytest.mark.parametrize(
    "shares, least",
    [((256,) * 8, 0.9), ((683, 512, 307, 205, 143, 102, 80, 16), 0.7), ((16, 143, 512, 80, 683, 102, 307, 205), 0.7)],
    ids=["even", "a third, small rank", "a third, middle rank"],
)
def test_products_are_little_padded(shares, least):
    """2048 rows of eight adapters: as many each, or one with a third and the others with 0.8 to 25%."""
    case = Case(list(shares), [16, 32, 64, 16, 32, 64, 16, 32], (128,))
    forward, backward = case.run()
    for launches, useful in ((forward, 2 * case.useful_flops(D)), (backward, 4 * case.useful_flops(D))):
        issued = sum(n for launch in launches for n in launch.dot_flops.values())
        assert useful <= issued and useful / issued >= least, useful / issued


def test_row_tiles_without_rows_multiply_nothing():
    """Every adapter may end in a partial row tile, so the grid has tiles for that; here each adapter fills its own."""
    case = Case([256, 128, 0, 384], [16, 8, 4, 32], (128,))
    weight, none = torch.randn(128, D).to(DTYPE), [torch.empty(0)]
    with Probe(seed=0) as probe:
        _, s = lora.lora_linear_fwd(case.x, [weight], [None], *case.bank)
        n_forward = len(probe.launches)
        lora.lora_linear_bwd(case.ys, [weight], case.x, s, *case.bank, None, none * 4, none * 4, [])
    for launches in (probe.launches[:n_forward], probe.launches[n_forward:]):
        issued = sum(launch.dot_flops_by_function["base_dot"] for launch in launches)
        assert issued == 2 * len(case.x) * D * 128
