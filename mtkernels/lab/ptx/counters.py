"""What a launch asked of memory and of the issue slots, per instruction and per source line.

A request is one memory instruction of one warp. Global requests cost one sector per distinct 32 bytes; shared requests
cost one pass per distinct 4-byte word in the busiest of 32 banks.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

_CLASSES = {
    "ld": "memory",
    "st": "memory",
    "atom": "memory",
    "red": "memory",
    "cp": "memory",
    "ldmatrix": "memory",
    "stmatrix": "memory",
    "mma": "tensor core",
    "wgmma": "tensor core",
    "bar": "barrier",
    "barrier": "barrier",
    "mbarrier": "barrier",
    "fence": "barrier",
    "membar": "barrier",
    "bra": "branch",
    "ret": "branch",
    "shfl": "warp",
    "vote": "warp",
    "redux": "warp",
    "match": "warp",
    "ex2": "special function",
    "lg2": "special function",
    "rcp": "special function",
    "sqrt": "special function",
    "rsqrt": "special function",
    "tanh": "special function",
    "cvt": "conversion",
    "mov": "move",
    "selp": "move",
}


@dataclass
class Access:
    """Requests of one memory instruction."""

    space: str
    requests: int = 0
    lanes: int = 0
    bytes: int = 0
    # 32-byte sectors for global memory, passes over the banks for shared memory
    cost: int = 0

    @property
    def per_request(self):
        return self.cost / max(1, self.requests)

    @property
    def ideal(self):
        """Cost per request if the same bytes lay side by side."""
        unit = 32 if self.space == "global" else 128
        return max(1.0, self.bytes / max(1, self.requests) / unit)


@dataclass
class Counters:
    accesses: dict = field(default_factory=dict)  # instruction index -> Access

    def access(self, s, i, space, address, mask, size):
        address = np.broadcast_to(address, s.shape).reshape(-1, 32)
        lanes = np.ones(address.shape, bool) if mask is None else np.broadcast_to(mask, s.shape).reshape(-1, 32)
        busy = lanes.any(1)
        address, lanes = address[busy], lanes[busy]
        entry = self.accesses.setdefault((i.index, space), Access(space))
        entry.requests += len(address)
        entry.lanes += int(lanes.sum())
        entry.bytes += int(lanes.sum()) * size
        if len(address):
            entry.cost += _sectors(address, lanes, size) if space == "global" else _passes(address, lanes, size)


def _distinct(values, used):
    """[requests, n] sorted along the last axis, and which entries are the first of their value."""
    values = np.sort(np.where(used, values, -1), axis=1)
    first = np.ones(values.shape, bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    return values, first & (values >= 0)


def _sectors(address, lanes, size):
    pieces = [address + k for k in range(0, size, 32)]
    sectors = np.concatenate(pieces, 1) >> 5
    return int(_distinct(sectors, np.tile(lanes, (1, len(pieces))))[1].sum())


def _passes(address, lanes, size):
    """Wide accesses go in groups of lanes that move at most 128 bytes."""
    words, group = max(1, size // 4), min(32, 128 // max(4, size))
    total = 0
    for start in range(0, 32, group):
        part, used = address[:, start : start + group] >> 2, lanes[:, start : start + group]
        word = np.concatenate([part + k for k in range(words)], 1)
        word, first = _distinct(word, np.tile(used, (1, words)))
        banks = np.zeros((len(word), 32), np.int64)
        rows = np.broadcast_to(np.arange(len(word))[:, None], word.shape)
        np.add.at(banks, (rows[first], word[first] % 32), 1)
        total += int(banks.max(1).sum())
    return total


def instruction_mix(program, executed):
    """{class: warp instructions issued}, from how often each basic block ran."""
    mix = defaultdict(int)
    for block in program.translation.blocks:
        for i in program.kernel.instructions[block.start : block.end]:
            mix[classify(i)] += executed.get(block.index, 0)
    return {k: v for k, v in sorted(mix.items(), key=lambda item: -item[1]) if v}


def classify(i):
    kind = _CLASSES.get(i.name)
    if kind == "memory":
        space = next((p for p in ("param", "shared", "local") if p in i.parts), "global")
        return "copy to shared" if i.name == "cp" else "parameter" if space == "param" else f"{space} memory"
    if kind:
        return kind
    return "float" if any(t[0] == "f" or t.startswith("bf") for t in i.types) else "integer"


def lines(program, executed, counters):
    """Rows of statistics per (file, line): dicts, ready for a table."""
    rows = {}
    for block in program.translation.blocks:
        for i in program.kernel.instructions[block.start : block.end]:
            row = rows.setdefault(i.source, dict(file=i.source[0], line=i.source[1], instructions=0, accesses=[]))
            row["instructions"] += executed.get(block.index, 0)
    for (index, _), access in sorted(counters.accesses.items()) if counters else ():
        i = program.kernel.instructions[index]
        rows[i.source]["accesses"].append((i.op, access))
    return [rows[k] for k in sorted(rows) if rows[k]["instructions"]]


def report(program, executed, counters):
    """Aligned text: memory requests per source line with what they cost and could have cost."""
    table = [("line", "instruction", "requests", "bytes", "per request", "ideal")]
    for row in lines(program, executed, counters):
        for op, access in row["accesses"]:
            unit = "sectors" if access.space == "global" else "passes"
            where = f"{row['file'].rsplit('/', 1)[-1]}:{row['line']}"
            cost = f"{access.per_request:.2f} {unit}"
            table.append((where, op, str(access.requests), str(access.bytes), cost, f"{access.ideal:.2f}"))
    widths = [max(len(r[c]) for r in table) for c in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(r, widths)).rstrip() for r in table)
