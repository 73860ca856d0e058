"""Accumulators in Blackwell's tensor memory, and chains of dots that were given two.

Before triton 3.9 two `tl.dot` into one accumulator in a loop iteration get an accumulator each, and the value travels
between them through registers in every iteration (https://github.com/triton-lang/triton/issues/10821).
"""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_MMA = ("ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled")
# The same value in other registers, and another view of the same memory.
_SAME_VALUE = ("ttg.convert_layout", "tt.reshape")
_SAME_MEMORY = ("ttg.memdesc_index", "ttg.memdesc_subslice", "ttg.memdesc_trans", "ttg.memdesc_reinterpret", "ttng.tmem_subslice")
_PARTITIONS = ("ttg.warp_specialize", "ttg.warp_specialize.partitions")


class TensorMemory(NamedTuple):
    # Of the 512 of a multiprocessor.
    columns: int
    accumulators: int
    # Accumulators beyond one for each chain of dots.
    doubled: int


class _Operation(NamedTuple):
    name: str
    operands: list
    results: list
    regions: list
    block: Any


def tensor_memory(ttgir, ptx) -> TensorMemory:
    """What a kernel takes, from its Triton GPU IR and its PTX."""
    columns = sum(int(n) for n in re.findall(r"tcgen05\.alloc[^;]*,\s*(\d+);", ptx))
    if _MMA[0] not in ttgir:
        return TensorMemory(columns, 0, 0)
    operations = _parse(ttgir)
    values, memory = _flow(operations)
    accumulators = {_origin(memory, op.operands[2]) for op in operations if op.name in _MMA}
    # A value read from one accumulator and stored, unchanged, to another makes them one chain.
    stores = {}
    for op in operations:
        if op.name == "ttng.tmem_store":
            stores.setdefault(op.operands[-2], set()).add(_origin(memory, op.operands[0]))
        elif op.name == "ttng.tmem_alloc" and op.operands:
            stores.setdefault(op.operands[0], set()).add(op.results[0])
    chain = {a: {a} for a in accumulators}
    for op in operations:
        if op.name == "ttng.tmem_load" and (source := _origin(memory, op.operands[0])) in accumulators:
            places = set().union(*(stores.get(v, ()) for v in _reached(values, op.results[0]))) & accumulators
            joined = set().union(chain[source], *(chain[place] for place in places))
            chain.update(dict.fromkeys(joined, joined))
    return TensorMemory(columns, len(accumulators), len(accumulators) - len({frozenset(c) for c in chain.values()}))


def _parse(ttgir):
    """Every operation of a module, values and regions by their ids."""
    from triton._C.libtriton import ir, nvidia

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir)
        module = ir.parse_mlir_module(str(path), context)
    module.context = context
    found = []

    def read(op):
        operands = [op.get_operand(i).id() for i in range(op.get_num_operands())]
        results = [op.get_result(i).id() for i in range(op.get_num_results())]
        regions = [op.get_region(i).id() for i in range(op.get_num_regions())]
        block = op.get_block()
        if block is None:
            return
        arguments = [block.get_argument(i).id() for i in range(block.get_num_arguments())]
        found.append(_Operation(op.get_name(), operands, results, regions, (block.get_parent().id(), arguments)))

    module.walk(read)
    return found


def _flow(operations):
    """({value: values it is passed on to}, {view: memory it is a view of})."""
    values, memory = {}, {}
    arguments, yields = {}, {}
    for op in operations:
        region, block_arguments = op.block
        arguments.setdefault(region, block_arguments)
        if op.name in ("scf.yield", "scf.condition"):
            yields[region] = op.operands[op.name == "scf.condition" :]

    def passed(sources, targets):
        for source, target in zip(sources, targets):
            values.setdefault(source, set()).add(target)

    for op in operations:
        inside = [(arguments.get(r, []), yields.get(r, [])) for r in op.regions]
        if op.name in _SAME_VALUE:
            passed(op.operands, op.results)
        elif op.name in _SAME_MEMORY:
            memory[op.results[0]] = op.operands[0]
        elif op.name in _PARTITIONS:
            memory.update((inner, outer) for names, _ in inside for inner, outer in zip(names, op.operands))
        elif op.name == "scf.if":
            for _, given in inside:
                passed(given, op.results)
        elif op.name == "scf.for":
            (names, given), *_ = inside
            for sources in (op.operands[3:], given):
                passed(sources, names[1:])
                passed(sources, op.results)
        elif op.name == "scf.while":
            (before, held), (after, given) = inside
            for sources, targets in ((op.operands, before), (given, before), (held, after), (held, op.results)):
                passed(sources, targets)
    return values, memory


def _origin(memory, view):
    while view in memory:
        view = memory[view]
    return view


def _reached(values, start):
    seen, work = {start}, [start]
    while work:
        new = values.get(work.pop(), set()) - seen
        seen |= new
        work += new
    return seen
