"""Mistakes made in the package's own kernels, by substitution in their source, and the checks of the op suite that must see them."""

import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

from mtkernels import _backends, lab
from mtkernels.lab import emulated
from mtkernels.lab.cuda_emulator import KernelMistake, csrc
from mtkernels.lab.ptx import Finding
from mtkernels.testing import MIXED, PROBLEMS, assert_accurate, poisoned

# check -> what it is, in the order of the table
CHECKS = {
    "probe": "a finding of `Probe`",
    "accuracy": "error against float64, in the interpreter",
    "orders": "other bits in another order of programs",
    "virtual": "a finding of, or an error in, `VirtualGPU`",
    "emulated": "a finding of, or an error in, `EmulatedCuda`",
}
TRITON = Path(import_module("mtkernels.triton_kernels._common").__file__).parent
CUDA = csrc() / "cuda"


@dataclass(frozen=True)
class OwnMutation:
    """changes: (what the source says, what it says instead), each found exactly once; caught: checks that must fail."""

    file: str
    changes: list
    caught: tuple
    problem: str
    ids: list = field(default_factory=lambda: MIXED)
    options: dict = field(default_factory=dict)

    def problem_with(self, **how):
        narrow = NARROW if self.problem.startswith("lora_delta") else {}
        return PROBLEMS[self.problem](self.ids, torch.float32, **narrow, **self.options, **how)

    def results(self):
        return self.problem_with(backend="cuda" if self.file.endswith(".cu") else "triton").results()


LORA, SHRINK, EXPAND = "lora_kernels.py", "lora_shrink.py", "lora_expand.py"
BASE, EMBEDDING, DORA = "lora_base.py", "lora_embedding.py", "dora.py"
NORM, SWIGLU = "rmsnorm_kernels.py", "swiglu_lora_shrink.py"
EXPERTS, ROWS_OF_NONE = "moe_lora_linear.py", "    if not has_rows:\n        return\n    column = column_tile * BLOCK_N\n    o_n = column + tl.arange(0, BLOCK_N)\n    m_n = o_n < d_out"
REDUCE, ENTROPY, PLAN = "task_reduce.py", "task_cross_entropy.py", "group_plan.py"
FAT = MIXED + [2] * 1030  # two chunks of one group
FATTEST = MIXED + [2] * 12000  # twelve
NARROW = dict(n_in=40, n_out=24)  # of one target
INVARIANT = "lora_linear:batch_invariant"
MASKED_BASE = """\
    if DROPOUT:
        if adapter < n_adapters:
            mask = dropout_of(table_ptr, n_adapters * len(dys), adapter, step_ptr, DROPOUT)
            acc = tl.where(keep_tile(mask, (None, 0, 0), b_t, m_row, o_i, column, BLOCK_N), acc, 0.0)
    o_n = column + tl.arange(0, BLOCK_N)
    p_dx"""
FIRST_CHUNK = "tl.atomic_add(partial_ptr + tl.load(p_tiles + task), tl.sum(b_value, axis=0))"

MUTATIONS = {
    "LoRA: row mask of s dropped": OwnMutation(SHRINK, [("(acc * alpha).to(compute), mask=m_row[:, None] & (o_r", "(acc * alpha).to(compute), mask=(o_r")], ("probe",), "lora_delta"),
    "LoRA: rank mask of s dropped": OwnMutation(SHRINK, [("(acc * alpha).to(compute), mask=m_row[:, None] & (o_r < rank)[None, :])", "(acc * alpha).to(compute), mask=m_row[:, None])")], ("probe",), "lora_delta"),
    "LoRA: rank mask of a factor dropped": OwnMutation(LORA, [("mask=m_k[:, None] & m_r, other=0.0)", "mask=m_k[:, None], other=0.0)")], ("probe", "virtual"), "lora_delta"),
    "LoRA: column mask of y dropped": OwnMutation(EXPAND, [("y.to(b_y.dtype), mask=m_row[:, None] & m_n[None, :])", "y.to(b_y.dtype), mask=m_row[:, None])")], ("probe",), "lora_delta"),
    "LoRA: scale on the wrong side": OwnMutation(EXPAND, [("c = scale_of(table_ptr, n_columns, entry) + tl.zeros([o_j.shape[0], 1]", "c = 1.0 + tl.zeros([o_j.shape[0], 1]")], ("accuracy",), "lora_delta"),
    "LoRA: bias not scaled": OwnMutation(EXPAND, [("other=0.0).to(tl.float32)[None, :]\n    c = ", "other=0.0).to(tl.float32)[None, :] / scale_of(table_ptr, n_columns, entry)\n    c = ")], ("accuracy",), "lora_delta"),
    "LoRA: rows not permuted in the forward": OwnMutation(SHRINK, [("b_p = tl.load(perm_ptr + o_j, mask=m_row, other=0)\n    n_columns, entry", "b_p = tl.where(m_row, o_j, 0)\n    n_columns, entry")], ("accuracy",), "lora_delta"),
    "LoRA: rows not permuted in the factor gradient": OwnMutation(LORA, [("b_p = tl.load(perm_ptr + o_j, mask=m_j, other=0)", "b_p = tl.where(m_j, begin + o_j, 0)")], ("accuracy",), "lora_delta"),
    "LoRA: dropout not replayed in dx": OwnMutation(SHRINK, [("acc = tl.where(keep_tile(mask, bits, b_p, m_row, o_j - begin, column, BLOCK_N), acc, 0.0)", "acc = acc")], ("accuracy",), "lora_delta"),
    "LoRA: mask of another step in dA": OwnMutation(LORA, [("keep_tile(mask, bits, b_p, m_j, uid0 + o_j, ", "keep_tile((mask[0], mask[1], mask[2], mask[3] + 1), bits, b_p, m_j, uid0 + o_j, ")], ("accuracy",), "lora_delta"),
    "LoRA: seed of the first adapter for all": OwnMutation("_lora.py", [("field(table_ptr, n_columns, column, SEED)", "field(table_ptr, n_columns, 0, SEED)")], ("accuracy",), "lora_delta"),
    "LoRA: kept elements not scaled up": OwnMutation(SHRINK, [("alpha = dropout_scale(mask[0], DROPOUT)", "alpha = 1.0")], ("accuracy",), "lora_delta"),
    "LoRA: wrong adapter of a tile": OwnMutation("_common.py", [("(b_end <= tile)", "(b_end < tile)")], ("accuracy", "virtual"), "lora_delta"),
    "LoRA: id -1 as the last adapter": OwnMutation("_common.py", [("    return group\n\n\n@triton.jit\ndef dropout_keep", "    return tl.minimum(group, n_groups - 1)\n\n\n@triton.jit\ndef dropout_keep")], ("accuracy",), "lora_delta"),
    "LoRA: chunk one row short": OwnMutation(LORA, [("tl.minimum(end - begin, CHUNK_ROWS), n_slots", "tl.minimum(end - begin, CHUNK_ROWS - 1), n_slots")], ("virtual",), "lora_delta", FAT),
    "LoRA: slot of another chunk": OwnMutation(LORA, [("(first_slot(offsets_ptr, adapter) + chunk).to", "(first_slot(offsets_ptr, adapter)).to")], ("virtual",), "lora_delta", FAT),
    "LoRA: dropout position counted from the chunk": OwnMutation(LORA, [("n_slots, chunk * CHUNK_ROWS, mask", "n_slots, 0, mask")], ("virtual",), "lora_delta", FAT),
    "LoRA: gradient by atomic add": OwnMutation(LORA, [("tl.store(p_grad + o_grad, value.to(p_grad.dtype.element_ty), mask=mask)", "tl.atomic_add(p_grad + o_grad, value.to(p_grad.dtype.element_ty), mask=mask)")], ("probe",), "lora_delta"),
    "LoRA: gradient of an empty group not written": OwnMutation(SHRINK, [("if n_chunks != 1:", "if n_chunks > 1:")], ("accuracy",), "lora_delta", [0, 2, 0]),
    "LoRA: other slots of a row expanded too": OwnMutation(EXPAND, [("m_row &= b_p % n_slots == slot", "m_row &= slot >= 0")], ("probe", "virtual"), "lora_delta:gates"),
    "LoRA: gate of another position": OwnMutation(EXPAND, [("if gates_ptr is not None:\n        c *= tl.load(gates_ptr + b_p,", "if gates_ptr is not None:\n        c *= tl.load(gates_ptr + o_j,")], ("accuracy",), "lora_delta:gates"),
    "LoRA: columns of another target": OwnMutation("_lora.py", [("begins = _repeat([sum(widths[:g]) for", "begins = _repeat([0 for")], ("probe",), "lora_linear:group"),
    "bits: halves of a word swapped": OwnMutation("_common.py", [("tl.join(tl.join(b_bits, b_bits >> 4), tl.join(b_bits >> 2, b_bits >> 6))", "tl.join(tl.join(b_bits >> 4, b_bits), tl.join(b_bits >> 6, b_bits >> 2))")], ("accuracy",), "lora_shrink:bitmask"),
    "bits: byte of the first columns": OwnMutation(LORA, [("o_b = column // 8 + tl.arange(0, BLOCK_C // 8)", "o_b = tl.arange(0, BLOCK_C // 8)")], ("accuracy",), "lora_shrink:bitmask"),
    "bits: of the row in the adapter's order": OwnMutation(LORA, [("p_bits = bits[0] + b_p[:, None].to(tl.int64) * bits[1] + o_b[None, :]\n        return", "p_bits = bits[0] + uid[:, None].to(tl.int64) * bits[1] + o_b[None, :]\n        return")], ("accuracy",), "lora_shrink:bitmask"),
    "base: mask on the frozen layer too": OwnMutation(BASE, [("    o_n = column + tl.arange(0, BLOCK_N)\n    p_dx", MASKED_BASE)], ("accuracy",), INVARIANT),
    "base: columns past the last one read": OwnMutation(BASE, [("b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)", "b_x = tl.load(p_x)")], ("probe",), INVARIANT, options=dict(n_in=70)),
    "base: adapters' part not scaled": OwnMutation(BASE, [("            acc *= c\n", "")], ("accuracy",), INVARIANT),
    "base: rows of no adapter left out": OwnMutation(BASE, [("mask=adapter < n_adapters, other=n_rows)", "mask=adapter < n_adapters, other=0)")], ("accuracy",), INVARIANT),
    "embedding: id -1 as an adapter": OwnMutation(EMBEDDING, [("m_known = (b_id >= 0) & (b_token", "m_known = (b_id >= -1) & (b_token")], ("probe",), "lora_embedding"),
    "embedding: gradient of another token": OwnMutation(EMBEDDING, [("+ key % n_tokens", "+ (key + 1) % n_tokens")], ("accuracy",), "lora_embedding"),
    "DoRA: rows of no adapter scaled": OwnMutation(DORA, [("mask=m_to & (b_id >= 0)[:, None], other=1.0)", "mask=m_to & (b_id >= 0)[:, None], other=0.0)")], ("accuracy",), "dora_rescale"),
    "DoRA: last chunk not summed": OwnMutation(DORA, [("range(tl.load(p_tiles), tl.load(p_tiles + 1))", "range(tl.load(p_tiles), tl.load(p_tiles + 1) - 1)")], ("accuracy",), "dora_rescale"),
    "RMSNorm: mean over the tile's columns": OwnMutation(NORM, [("tl.sum(square, axis=1) / d_in + eps", "tl.sum(square, axis=1) / BLOCK_K + eps")], ("accuracy",), "rmsnorm_lora_shrink"),
    "RMSNorm: row written from every position": OwnMutation(NORM, [("m_row & (b_p % n_slots == 0)", "m_row")], ("probe",), "rmsnorm_lora_shrink:slots"),
    "RMSNorm: bits of the first target in dx": OwnMutation(NORM, [("bits_of_target(bits[0], bits[1], bits[2], g)\n                acc", "bits_of_target(bits[0], bits[1], bits[2], 0)\n                acc")], ("accuracy",), "rmsnorm_lora_shrink:bitmask"),
    "SwiGLU: gate without its slope": OwnMutation(SWIGLU, [("b_dgate, b_dup = total * b_up * slope,", "b_dgate, b_dup = total * b_up,")], ("accuracy",), "swiglu_lora_shrink"),
    "SwiGLU: bits of the row in the adapter's order": OwnMutation(SWIGLU, [("keep = keep_tile(mask, bits, b_p, m_j,", "keep = keep_tile(mask, bits, uid0 + o_j, m_j,")], ("accuracy",), "swiglu_lora_shrink:bitmask"),
    "experts: weight of the group, not of its expert": OwnMutation(EXPERTS, [("expert = (group // (n_groups // n_experts)).to(tl.int64)\n        if HAS_LORA", "expert = tl.minimum(group, n_experts - 1).to(tl.int64)\n        if HAS_LORA")], ("accuracy", "virtual"), "moe_lora_linear"),
    "experts: positions of no expert not written": OwnMutation(EXPERTS, [(ROWS_OF_NONE, ROWS_OF_NONE.replace("not has_rows", "(group >= n_groups) | (not has_rows)"))], ("accuracy", "virtual"), "moe_lora_linear:slots"),
    "experts: row mask of the result dropped": OwnMutation(EXPERTS, [("acc.to(z_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])", "acc.to(z_ptr.dtype.element_ty), mask=m_n[None, :])")], ("probe",), "moe_lora_linear:slots"),
    "experts: gate's gradient from the gated product": OwnMutation(EXPERTS, [("acc * b_x, 0.0)", "acc * b_x * tl.load(gates_ptr + b_p, mask=m_row, other=0.0)[:, None], 0.0)")], ("accuracy", "virtual"), "moe_lora_linear:gates"),
    "experts: dropout of another column in dx": OwnMutation(EXPERTS, [("m_row, o_i, column, BLOCK_N)", "m_row, o_i, column + 8, BLOCK_N)")], ("accuracy", "virtual"), "moe_lora_linear"),
    "plan: sort not stable": OwnMutation(PLAN, [("(o_q[None, :] < o_p[:, None])", "(o_q[None, :] > o_p[:, None])")], ("accuracy",), "lora_delta"),
    "plan: two rows at one place": OwnMutation(PLAN, [("(o_q[None, :] < o_p[:, None])", "(o_q[None, :] + 1 < o_p[:, None])")], ("probe", "virtual"), "task_reduce"),
    "reduce: rows not permuted": OwnMutation(REDUCE, [("b_t = tl.load(perm_ptr + o_j, mask=m_j, other=0)", "b_t = tl.where(m_j, o_j, 0)")], ("accuracy", "virtual"), "task_reduce"),
    "reduce: chunk one row short": OwnMutation(REDUCE, [("(chunk - tl.load(p_tiles + task)) * CHUNK + tl.arange(0, CHUNK)", "(chunk - tl.load(p_tiles + task)) * (CHUNK + 1) + tl.arange(0, CHUNK)")], ("accuracy", "virtual"), "task_reduce", FAT),
    "reduce: partial sums by atomic add": OwnMutation(REDUCE, [("tl.store(partial_ptr + chunk, tl.sum(b_value, axis=0))", FIRST_CHUNK), ("partial = torch.empty(", "partial = torch.zeros(")], ("orders",), "task_reduce", FATTEST),
    "reduce: row mask of the gradient dropped": OwnMutation(REDUCE, [("b_dvalue.to(dvalues_ptr.dtype.element_ty), mask=m_t)", "b_dvalue.to(dvalues_ptr.dtype.element_ty))")], ("probe", "virtual"), "task_reduce"),
    "entropy: class mask dropped": OwnMutation(ENTROPY, [("m_used[:, None] & (v + o_v[None, :] < n_classes)", "m_used[:, None] & (v + o_v[None, :] < BLOCK_V)")], ("probe", "virtual"), "task_cross_entropy"),
    "entropy: ignored targets counted": OwnMutation(ENTROPY, [("other=-1) >= 0) & (b_target != ignore_index)\n    b_dnll", "other=-1) >= 0)\n    b_dnll")], ("accuracy", "virtual"), "task_cross_entropy"),
    "entropy: running sum not rescaled": OwnMutation(ENTROPY, [("b_sum = b_sum * tl.exp(b_max - b_shift) + ", "b_sum = b_sum + ")], ("accuracy",), "task_cross_entropy", MIXED, dict(n_classes=8000)),
    "CUDA reduce: barrier removed": OwnMutation("task_reduce.cu", [("  __syncthreads();\n", "")], ("emulated",), "task_reduce"),
    "CUDA reduce: rows not permuted": OwnMutation("task_reduce.cu", [("const int t = i < 0 ? -1 : perm[i];", "const int t = static_cast<int>(i);")], ("emulated",), "task_reduce"),
    "CUDA reduce: chunk one row too long": OwnMutation("task_reduce.cu", [("i < end; i += kThreads", "i <= end; i += kThreads")], ("emulated",), "task_reduce"),
    "CUDA reduce: partial sums by atomic add": OwnMutation("task_reduce.cu", [("if (lane == 0) partial[tile] = sum;", "if (lane == 0) atomicAdd(&partial[tile], sum);")], ("emulated",), "task_reduce"),
    "CUDA reduce: row mask of the gradient dropped": OwnMutation("task_reduce.cu", [("  if (t >= n_rows) return;\n", "")], ("emulated",), "task_reduce"),
}  # fmt: skip


def changed(mutation, folder):
    text = (folder / mutation.file).read_text()
    for old, new in mutation.changes:
        assert text.count(old) == 1, f"{mutation.file} says {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


@contextmanager
def mutated(mutation, folder):
    """The package with the mistake in it; `folder` is an empty one for the changed sources."""
    if mutation.file.endswith(".cu"):
        source = folder / mutation.file
        source.write_text(changed(mutation, CUDA))
        right = emulated._emulator
        entries = right(source.stem).entries
        emulated._emulator = lambda stem: lab.CudaEmulator(source, entries)
        try:
            yield
        finally:
            emulated._emulator = right
        return
    shutil.copytree(TRITON, folder, dirs_exist_ok=True)
    (folder / mutation.file).write_text(changed(mutation, TRITON))
    package = import_module("mtkernels.triton_kernels")
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("mtkernels.triton_kernels.")}
    names, path = dict(vars(package)), package.__path__
    _backends._namespace.cache_clear()
    for name in loaded:
        del sys.modules[name]
    package.__path__ = [str(folder)]
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.startswith("mtkernels.triton_kernels.")]:
            del sys.modules[name]
        sys.modules.update(loaded)
        vars(package).update(names)
        package.__path__ = path
        _backends._namespace.cache_clear()


def accurate(mutation, ours):
    plain, exact = mutation.problem_with(), mutation.problem_with(exact=True)
    plain, exact = plain.results(plain.plain), exact.results(exact.plain)
    for key in exact:
        assert_accurate(ours[key], plain[key], exact[key], torch.float32, key)


def failure(mutation, check):
    """What a check of the suite says about the package as it is now; "" when it passes."""
    tool = {"virtual": lambda: lab.VirtualGPU(80), "emulated": lambda: lab.EmulatedCuda(tools=("asan", "tsan", "trace"))}.get(check, lambda: lab.Probe(seed=0))
    try:
        with poisoned(), tool() as opened:
            ours = mutation.results()
        if check == "probe":
            return "\n".join(map(str, opened.findings))
        if check == "orders":
            different = set()
            for seed in (1, 2, 3):
                with lab.Probe(seed):
                    other = mutation.results()
                different |= {key for key in ours if not torch.equal(ours[key].view(torch.uint8), other[key].view(torch.uint8))}
            return ", ".join(different)
        accurate(mutation, ours)
    except (AssertionError, Finding, KernelMistake) as failed:
        return str(failed) or type(failed).__name__
    return ""


def table():
    """The Markdown table: a mistake a line, a check of the suite a column."""
    lines = ["| mistake | file | " + " | ".join(CHECKS) + " |", "| --- | --- |" + " :-: |" * len(CHECKS)]
    for name, mutation in MUTATIONS.items():
        lines.append(f"| {name} | `{mutation.file}` | " + " | ".join("x" if check in mutation.caught else "" for check in CHECKS) + " |")
    return "\n".join(lines)
