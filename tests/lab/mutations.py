"""Deliberate mistakes, and the tools of the lab that must catch each; `python tests/lab/mutations.py` writes the table of
docs/verification.md.

A mutation is a Triton kernel (of broken_kernels.py or feature_kernels.py, or PTX that is edited) or a CUDA kernel of
broken.cu, or both; each exists right as well, and must then give no finding.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import mutation_cases as c
import torch
from mutation_cases import bins, f32, floats, wide_floats, zeros

# tool -> what it is, in the order of the table
TOOLS = {
    "probe": "`Probe`",
    "orders": "`Probe` with other program orders: other bits",
    "poison": "`Probe`, outputs poisoned: NaN in the result",
    "virtual": "`VirtualGPU`",
    "asan": "`CudaEmulator` under ASan and UBSan",
    "tsan": "`CudaEmulator` under TSan",
    "plain": "`CudaEmulator` itself",
    "trace": "`CudaEmulator`, every access recorded",
    "schedules": "`CudaEmulator` with other thread and block orders: other bits",
}
CUDA_TOOLS = ("asan", "tsan", "plain", "trace", "schedules")


@dataclass(frozen=True)
class Mutation:
    """caught: tool -> "kind of the finding", or "kind: pattern of the rest".

    triton(BUG) launches the kernel with the defect `bug`, or right with ""; edit changes its PTX instead. cuda() gives the
    arguments after `broken` of broken.cu's run_<entry>.
    """

    caught: dict
    triton: Callable = None
    bug: str = "broken"
    edit: tuple = None
    arch: int = 80
    entry: str = ""
    cuda: Callable = None
    # tools that see the mistake only in what it left behind, so that they cannot say at which line
    afterwards: tuple = field(default=())


MUTATIONS = {
    "mask dropped": Mutation(
        {"probe": "out of bounds: a_ptr.*load outside a_ptr", "virtual": "global memory out of bounds: .* of a_ptr", "asan": "out-of-bounds", "plain": "out-of-bounds"},
        c.matmul, "mask dropped", entry="mask_dropped", cuda=lambda: (floats(100), 100, f32(100)), afterwards=("plain",),
    ),
    "wrong row offset": Mutation(
        {"probe": "out of bounds: a_ptr.*has 8000 elements", "virtual": "global memory out of bounds: .* of a_ptr", "trace": "unwritten-output", "tsan": "data-race"},
        c.matmul, "wrong row offset", entry="wrong_row_offset", cuda=lambda: (floats(3, 40), 3, 40, f32(3, 40)),
    ),
    "int32 overflow of an offset": Mutation(
        {"probe": "out of bounds: load outside x_ptr", "virtual": "global memory out of bounds", "asan": "integer-overflow", "plain": "out-of-bounds"},
        c.copy_rows, "int32 overflow", entry="index_overflow", cuda=lambda: (floats(2, 65536), 40000, 65536, f32(128)),
    ),
    "misaligned vector load": Mutation(
        {"probe": "misaligned: no multiple of 8 bytes", "virtual": "misaligned access: 8 bytes", "asan": "misaligned-access"},
        c.wide_load, entry="misaligned_vector", cuda=lambda: (floats(132), f32(32)),
    ),
    "divisibility hint that does not hold": Mutation({"virtual": "misaligned access: 16 bytes at byte 12 of x_ptr"}, c.lying_hint),
    "store of other lanes' elements": Mutation({"asan": "out-of-bounds", "plain": "out-of-bounds"}, entry="shared_overrun", cuda=lambda: (floats(32), f32(32)), afterwards=("plain",)),
    "wild store": Mutation({"plain": "out-of-bounds", "asan": "out-of-bounds"}, entry="wild_store", cuda=lambda: (f32(32),)),
    "beyond a pointer from memory": Mutation({"probe": "out of bounds: float32 tensor.*load outside", "virtual": "global memory out of bounds"}, c.table, "beyond"),
    "pointer from memory one element too far": Mutation({"probe": "out of bounds: has 5 elements", "virtual": "global memory out of bounds"}, c.table, "advanced"),
    "pointer to a freed tensor": Mutation({"probe": "out of bounds: no live tensor"}, c.table, "freed"),
    "failed device assertion": Mutation({"virtual": "device assertion failed: x must be positive.*thread 40"}, c.assertion),
    "output not written": Mutation({"poison": "NaN", "trace": "unwritten-output"}, c.update, "output not written", entry="output_unwritten", cuda=lambda: (floats(128), f32(128))),
    "output read before it is written": Mutation({"probe": "never written: y_ptr.*load of memory", "poison": "NaN"}, c.update, "output read"),
    "sum onto unwritten memory": Mutation({"probe": "never written: out_ptr.*atomic of memory", "poison": "NaN"}, c.split_sum, "onto empty"),
    "mask without a value for the other lanes": Mutation({"poison": "NaN"}, c.softmax, "no other"),
    "shared memory not written": Mutation({"trace": "uninitialised-read"}, entry="shared_unwritten", cuda=lambda: (floats(32), f32(32))),
    "accumulation order changed": Mutation(
        {"orders": "bits", "schedules": "order-dependent"},
        c.sum_in_order, entry="order_of_addition", cuda=lambda: (wide_floats(512), zeros(16).astype("f4"), zeros(1).astype("f4")),
    ),
    "+= for an atomic": Mutation(
        {"probe": "race: out_ptr.*read after write", "tsan": "data-race"}, c.split_sum, "no atomic", entry="plain_add_for_atomic", cuda=lambda: (bins(128), zeros(4))
    ),
    "atomic of one program's scope": Mutation({"probe": "race: out_ptr.*write after write"}, c.split_sum, "atomic within a program"),
    "relaxed counter": Mutation(
        {"probe": "race: part_ptr.*read after write", "tsan": "data-race"},
        c.last_block, "relaxed", entry="relaxed_counter", cuda=lambda: (floats(128), f32(4), zeros(1), f32(1)),
    ),
    "counter without acquire": Mutation({"probe": "race: part_ptr.*read after write"}, c.last_block, "release"),
    "relaxed lock": Mutation({"probe": "race: count_ptr.*read after write"}, c.lock, "relaxed"),
    "fence removed": Mutation({"tsan": "data-race"}, entry="fence_removed", cuda=lambda: (floats(128), f32(4), zeros(1), f32(1))),
    "tiles that overlap": Mutation({"probe": "race: c_ptr.*write after write"}, c.matmul, "overlapping tiles"),
    "neighbour's element read in place": Mutation({"probe": "race: x_ptr.*program"}, c.shift, "neighbour"),
    "bytes written under another program's words": Mutation({"probe": "race: _ptr.*program"}, c.two_widths),
    "two lanes store to one address": Mutation({"probe": "differing lanes: y_ptr.*different values"}, c.scatter),
    "barrier removed": Mutation({"tsan": "data-race", "trace": "uninitialised-read"}, entry="barrier_removed", cuda=lambda: (floats(128), f32(128))),
    "barrier in divergent code": Mutation({"plain": "divergence"}, entry="divergent_barrier", cuda=lambda: (floats(64), f32(64))),
    "two barriers for one": Mutation({"plain": "divergence"}, entry="two_barriers", cuda=lambda: (floats(64), f32(64))),
    "shuffle with a lane that has returned": Mutation({"plain": "warp-mask"}, entry="exited_lane", cuda=lambda: (floats(20), 20, f32(1))),
    "lanes of a warp at different operations": Mutation({"plain": "divergence"}, entry="warp_divergence", cuda=lambda: (floats(32), f32(32))),
    "lane that never comes": Mutation({"plain": "deadlock"}, entry="lane_never_comes", cuda=lambda: (f32(64),)),
    "flag that nobody raises": Mutation({"plain": "livelock"}, entry="flag_never_raised", cuda=lambda: (zeros(1), f32(1))),
    "too weak a cp.async wait": Mutation(
        {"virtual": "read of data whose asynchronous copy was not waited for", "trace": "uninitialised-read"},
        c.pipelined_matmul, edit=c.weaker_wait, entry="weak_wait", cuda=lambda: (floats(256), f32(32)),
    ),
    "cp.async never waited for": Mutation(
        {"virtual": "read of data whose asynchronous copy was not waited for: copied at feature_kernels.py", "plain": "async-copy", "trace": "uninitialised-read"},
        c.pipelined_matmul, edit=c.no_wait, entry="never_waited", cuda=lambda: (floats(128), f32(32)),
    ),
    "buffer refilled too early": Mutation({"tsan": "data-race"}, entry="refilled_too_early", cuda=lambda: (floats(512), f32(128))),
    "TMA copy not waited for": Mutation({"virtual": "read of data whose asynchronous copy was not waited for"}, c.descriptor_matmul, edit=c.no_barrier_wait, arch=90),
    "proxy fence removed": Mutation({"virtual": "read through the async proxy of data that no fence.proxy.async"}, c.descriptor_matmul, edit=c.no_proxy_fence, arch=90),
    "mbarrier that nobody completes": Mutation({"virtual": "deadlock: no thread is left"}, c.descriptor_matmul, edit=c.no_arrival, arch=90),
    "mbarrier not initialised": Mutation({"virtual": "use of a barrier that was not initialised"}, c.descriptor_matmul, edit=c.no_barrier_init, arch=90),
}  # fmt: skip

# Right kernels beside the right twin of each mutation.
RIGHT = {
    "matmul": c.right_matmul,
    "matmul bf16": partial(c.right_matmul, torch.bfloat16),
    "matmul fp16": partial(c.right_matmul, torch.float16),
    "softmax fp16": partial(c.softmax, dtype=torch.float16),
    "tuple of tensors, pointers chosen by lane": c.pair,
    "device descriptors": partial(c.descriptors, host=False),
    "host descriptors": partial(c.descriptors, host=True),
}


def table():
    """The Markdown table: a mutation a line, a tool a column."""
    lines = ["| mistake | " + " | ".join(TOOLS) + " |", "| --- |" + " :-: |" * len(TOOLS)]
    for name, mutation in MUTATIONS.items():
        lines.append(f"| {name} | " + " | ".join("x" if tool in mutation.caught else "" for tool in TOOLS) + " |")
    return "\n".join(lines)


def document(text):
    """docs/verification.md with the tables of today."""
    from own_mutations import table as own_table

    for name, made in (("mutations", table()), ("own mutations", own_table())):
        begin, end = f"<!-- {name}: python tests/lab/mutations.py -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + made + "\n" + end + rest.split(end, 1)[1]
    return text


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "verification.md"

if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
