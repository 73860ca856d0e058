"""One probed kernel launch: checks every access of every program and counts it."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .address_space import AddressSpace, spans_of
from .sectors import SECTOR_BYTES, Traffic
from .shadow import Clocks

_NOT_USER_CODE = (str(Path(__file__).parent), "triton/runtime", "triton/language", "triton/_utils")


@dataclass
class Finding:
    """One defect; later occurrences at the same line and argument only add to `count` (lanes).

    kind: "out of bounds", "race", "differing lanes", "never written" or "misaligned"; element: index in the argument,
    counted in elements from its first one; program: grid coordinates of the program that met it.
    """

    kind: str
    kernel: str
    program: tuple
    argument: str
    element: int
    detail: str
    line: str
    count: int = 1

    def __str__(self):
        where = f"{self.kernel}{self.program} {self.argument}[{self.element}]"
        return f"{self.kind}: {where} at {self.line}: {self.detail} ({self.count} lanes)"


class Ordering(NamedTuple):
    """How an access orders programs; plain accesses order nothing and may race."""

    atomic: bool = False
    acquire: bool = False
    release: bool = False


PLAIN = Ordering()


class Launch:
    """Counts of one launch; `report()` gives them as a dict."""

    def __init__(self, kernel, probe):
        self.kernel, self.probe = kernel, probe
        self.grid = self.program = (0, 0, 0)
        self.programs = 0
        self.order = None
        self.traffic = {kind: Traffic() for kind in ("load", "store", "atomic")}
        self.dot_flops, self.dot_flops_by_function = Counter(), Counter()
        self.distinct_sectors_read = self.distinct_sectors_written = 0
        self.clocks = Clocks()
        self.space = AddressSpace(probe.tracker, self.clocks)
        self._findings = {}

    @property
    def dram_floor_bytes(self):
        """Bytes of the different sectors read and written: what a perfect cache leaves of the traffic."""
        return SECTOR_BYTES * (self.distinct_sectors_read + self.distinct_sectors_written)

    def report(self):
        rows = {"kernel": self.kernel, "grid": self.grid, "programs": self.programs}
        for kind, traffic in self.traffic.items():
            for field in ("requests", "lanes", "masked", "bytes", "sectors", "sectors_per_request"):
                rows[f"{kind}_{field}"] = getattr(traffic, field)
        rows["distinct_sectors_read"] = self.distinct_sectors_read
        rows["distinct_sectors_written"] = self.distinct_sectors_written
        rows["dram_floor_bytes"] = self.dram_floor_bytes
        rows["dot_flops"], rows["dot_flops_by_function"] = dict(self.dot_flops), dict(self.dot_flops_by_function)
        return rows

    def set_grid(self, grid, seed):
        self.grid = tuple(grid)
        n_programs = int(np.prod(grid))
        self.clocks.n_programs = n_programs
        self.order = np.arange(n_programs) if seed is None else np.random.default_rng(seed).permutation(n_programs)

    def start_program(self, x, y, z):
        """Coordinates of the program to run in the turn of program (x, y, z)."""
        turn = (x * self.grid[1] + y) * self.grid[2] + z
        number = int(self.order[turn])
        self.programs += 1
        self.clocks.start(number + 1)
        self.program = self._coordinates(number)
        return self.program

    def finish(self):
        for memory in self.space.memories.values():
            self.distinct_sectors_read += memory.sectors.read
            self.distinct_sectors_written += memory.sectors.written
        self.space = self.clocks = None

    def access(self, kind, addresses, item, mask, values=None, ordering=PLAIN):
        """Real addresses of the lanes and which of them may be accessed; reports the others."""
        active = np.broadcast_to(np.asarray(True if mask is None else mask, bool), addresses.shape)
        n_active = int(np.count_nonzero(active))
        full = n_active == addresses.size
        lanes = addresses.ravel() if full else addresses[active]
        if values is not None:
            values = values.ravel() if full else values[active]
        traffic = self.traffic[kind]
        traffic.requests += 1
        traffic.lanes += n_active
        traffic.masked += addresses.size - n_active
        traffic.bytes += n_active * item
        if not n_active:
            return addresses, active
        first, last = int(lanes.min()), int(lanes.max())
        region = self.space.region(first)
        if region is not None and region.holds(first, last, item):
            self._touch(region, kind, lanes, item, values, ordering)
            return addresses - region.to_real, active
        real, allowed = self._access_by_region(kind, lanes, item, values, ordering)
        all_real, all_allowed = addresses.copy(), active.copy()
        all_real[active], all_allowed[active] = real, allowed
        return all_real, all_allowed

    def _access_by_region(self, kind, lanes, item, values, ordering):
        """The same for lanes of several tensors, or out of bounds."""
        real, allowed = lanes.copy(), np.zeros(lanes.size, bool)
        spans = spans_of(lanes)
        for span in np.unique(spans):
            mine = np.nonzero(spans == span)[0]
            region = self.space.region(int(lanes[mine[0]]))
            if region is None:
                self._report_stray(kind, lanes[mine])
                continue
            inside = (lanes[mine] >= region.begin) & (lanes[mine] + np.uint64(item) <= region.end)
            if not inside.all():
                n, wild = region.nbytes // item, lanes[mine[~inside]]
                detail = f"{kind} outside {region.name}, which has {n} elements of {item} bytes"
                self._report("out of bounds", region, (int(wild[0]) - region.begin) // item, detail, wild.size)
                mine = mine[inside]
            if mine.size:
                allowed[mine] = True
                real[mine] = lanes[mine] - region.to_real
                self._touch(region, kind, lanes[mine], item, None if values is None else values[mine], ordering)
        return real, allowed

    def _touch(self, region, kind, lanes, item, values, ordering):
        """Count and check accesses inside one tensor."""
        offsets = (lanes - region.to_offset).astype(np.int64)
        start = region.begin - int(region.to_offset)
        memory, shadow = region.memory, region.memory.shadow
        self.traffic[kind].sectors += memory.sectors.add(kind, offsets)

        def report(what, offset, detail, count=1):
            self._report(what, region, (int(offset) - start) // item, detail, count)

        if item > 1 and int(np.bitwise_or.reduce(offsets)) & (item - 1):
            bad = offsets[offsets % item != 0]
            report("misaligned", bad[0], f"{kind} at no multiple of {item} bytes", bad.size)
            return
        index = shadow.index(offsets, item)
        if kind != "store":
            unwritten = shadow.unwritten(offsets, item)
            if unwritten.size:
                detail = f"{kind} of memory that nothing has written"
                report("never written", offsets[unwritten[0]], detail, unwritten.size)
        if ordering.acquire:
            shadow.acquire(index)
        race = shadow.load(index, ordering.atomic) if kind == "load" else shadow.store(index, ordering.atomic)
        if race is not None:
            what, granule, other, n_granules = race
            detail = f"{what} of program {self._coordinates(other - 1)}, unordered"
            report("race", granule * shadow.granule, detail, max(1, n_granules * shadow.granule // item))
        if kind == "store":
            differing = shadow.differing_lanes(offsets // item, values)
            if differing.size:
                detail = "lanes of one store write different values to one address"
                report("differing lanes", offsets[differing[0]], detail, differing.size)
        if kind != "load":
            shadow.mark_written(offsets, item)
        if ordering.release:
            shadow.release(index)

    def _coordinates(self, number):
        x, rest = divmod(number, self.grid[1] * self.grid[2])
        return (x, *divmod(rest, self.grid[2]))

    def _report_stray(self, kind, lanes):
        detail = f"{kind} at address {int(lanes[0]):#x}, where no live tensor is"
        self._report("out of bounds", None, 0, detail, lanes.size)

    def _report(self, kind, region, element, detail, count):
        argument, line = region.name if region else "address from no tensor", _kernel_line()
        key = kind, argument, line
        if key in self._findings:
            self._findings[key].count += count
            return
        finding = Finding(kind, self.kernel, self.program, argument, element, detail, line, count)
        self._findings[key] = finding
        self.probe.findings.append(finding)


def _kernel_line():
    """file:line of the kernel statement being interpreted."""
    frame = sys._getframe(1)
    while frame and any(part in frame.f_code.co_filename for part in _NOT_USER_CODE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
