"""The masks of every backend, bit for bit, against a Philox in Python's integers."""

import pytest
import torch

import mtkernels as mtk
from mtkernels import _native
from mtkernels.testing import poisoned

# An adapter without rows (5), p = 0 and p = 1, rows of none, seeds at the ends of 64 bits.
DROPOUT = (0.25, 0.0, 1.0, 0.5, 0.05, 0.5)
SEEDS = (0, -1, 5, -(2**63), 2**63 - 1, 2**32 + 1)
IDS = {
    "one a row": [0, 1, 2, 3, 4, -1, 0, 4, 3, -1, 2, 1, 0, 0],
    "two a row": [[0, 3], [4, 4], [-1, 2], [3, -1], [-1, -1], [1, 0], [3, 3]],
    "three a row": [[0, 0, 0], [2, -1, 4], [4, 3, 0]],
    "a fat one": [4] * 100 + [0, -1],
    "none": [-1, -1, -1],
}


def philox(counter, key):
    """Salmon et al., SC 2011: 7 rounds of Philox4x32."""
    c, k = list(counter), list(key)
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def expected(ids, n_cols, step, site):
    """One position, one byte, one bit after the other."""
    seen, rows, low = [0] * len(SEEDS), [], 0xFFFFFFFF
    for i in torch.as_tensor(ids).flatten().tolist():
        row = [0] * -(-n_cols // 8)
        for c in range(n_cols if i >= 0 else 0):
            words = philox((c // 8, seen[i], site & low, step & low), (SEEDS[i] & low, SEEDS[i] >> 32 & low))
            lane = words[c % 8 // 2] >> 16 * (c % 2) & 0xFFFF
            row[c // 8] |= (lane >= round(65536 * DROPOUT[i])) << c % 8
        if i >= 0:
            seen[i] += 1
        rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8)


def bank_of(device, dropout=DROPOUT, seeds=SEEDS, n_cols=8):
    factors = [torch.zeros(1, n_cols, device=device) for _ in seeds]
    return mtk.LoraBank.from_factors(factors, [f.new_zeros(4, 1) for f in factors], 1.0, dropout=list(dropout), seeds=list(seeds))


def mask(way, ids, n_cols, step=3, site=0):
    ids = torch.as_tensor(ids, dtype=torch.int64, device=way.device)
    plan = mtk.group_plan(ids, len(SEEDS), step=step, backend="reference" if way.backend == "cuda" else way.backend)
    with poisoned():
        return mtk.lora_dropout_mask(bank_of(way.device), plan, n_cols, site=site, backend=way.backend).cpu()


def test_the_oracle_is_philox():
    assert [f"{w:08x}" for w in philox((0,) * 4, (0, 0))] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_golden_byte(way):
    """Seed, site and step 0, first row: the lanes b709 5f6f 3f64 0d89 1f81 4f12 0a48 4f73 of the known answer, against 0x4000."""
    assert mask(way, [0], 8, step=0).tolist() == [[0b10100011]]


def test_golden_mask(way):
    found = mask(way, [3, 4, 3], 37, step=2**32 - 1, site=2**31 - 1)
    assert [bytes(row).hex() for row in found.tolist()] == ["e6c4613f0c", "ffffdfbf1f", "ac1802080c"]


@pytest.mark.parametrize("n_cols", [1, 7, 8, 37, 130])
@pytest.mark.parametrize("name", IDS)
def test_every_bit(name, n_cols, way):
    found = mask(way, IDS[name], n_cols)
    assert found.dtype == torch.uint8 and torch.equal(found, expected(IDS[name], n_cols, 3, 0))


@pytest.mark.parametrize("step, site", [(2**32 - 1, 0), (2**32, 2**31 - 1), (2**40 + 5, 2**31), (-1, 2**32 - 1), (2**63 - 1, -1)], ids=str)
def test_counters_at_the_limits_of_32_bits(step, site, way):
    ids = IDS["one a row"]
    assert torch.equal(mask(way, ids, 24, step, site), expected(ids, 24, step, site))


def test_more_columns_than_a_tile(way):
    """Second block of columns of every kernel, and its ragged end."""
    n_cols = 8 * 256 + 8 * 32 + 3
    assert torch.equal(mask(way, [3, -1, 4], n_cols), expected([3, -1, 4], n_cols, 3, 0))


def test_no_rows_and_no_columns(way):
    assert mask(way, [], 9).shape == (0, 2) and mask(way, [0, 1], 0).shape == (2, 0)


def test_the_columns_of_the_bank_by_default(way):
    bank = bank_of(way.device, n_cols=21)
    plan = mtk.group_plan(torch.tensor([0, 3], device=way.device), 6, step=1, backend="reference" if way.backend == "cuda" else way.backend)
    assert torch.equal(mtk.lora_dropout_mask(bank, plan, backend=way.backend), mtk.lora_dropout_mask(bank, plan, 21, backend=way.backend))


def test_bad_input_is_named():
    bank, plan = bank_of("cpu"), mtk.group_plan(torch.tensor([0, 1]), 6)
    cases = [
        (TypeError, "lora_dropout_mask: bank is a list", lambda: mtk.lora_dropout_mask([1], plan)),
        (TypeError, "plan is a Tensor; build one with group_plan", lambda: mtk.lora_dropout_mask(bank, plan.ids)),
        (ValueError, "the plan has 7 groups, but there are 6 adapters", lambda: mtk.lora_dropout_mask(bank, mtk.group_plan(plan.ids, 7))),
        (ValueError, "n_cols is -1; give a number of columns, or None for the bank's 8", lambda: mtk.lora_dropout_mask(bank, plan, -1)),
        (ValueError, "the plan is on cpu, the input on meta", lambda: mtk.lora_dropout_mask(bank_of("meta", seeds=torch.zeros(6, device="meta")), plan)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not _native.available(), reason=_native.reason())
def test_the_kernel_refuses_what_would_read_or_write_elsewhere():
    bank, plan = bank_of("cpu"), mtk.group_plan(torch.tensor([0, 1]), 6)

    def call(threshold=bank.threshold, seeds=bank.seeds, offsets=plan.offsets, perm=plan.perm, step=plan.step, n_cols=8):
        return _native.ops().lora_dropout_mask(threshold, seeds, offsets, perm, plan.tiles, step, 0, n_cols)

    call()
    cases = [
        ("give a contiguous int32", lambda: call(threshold=bank.threshold.long())),
        ("seeds is int64 .5.", lambda: call(seeds=bank.seeds[1:])),
        ("offsets must rise", lambda: call(offsets=plan.offsets.flip(0))),
        ("perm must hold", lambda: call(perm=plan.perm + 1)),
        ("step is int32", lambda: call(step=plan.step.int())),
        ("n_cols is -3", lambda: call(n_cols=-3)),
    ]
    for message, wrong in cases:
        with pytest.raises(RuntimeError, match=message):
            wrong()
