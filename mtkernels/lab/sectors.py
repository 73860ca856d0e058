"""Memory traffic of one launch: requests, lanes, bytes and 32-byte sectors of loads, stores and atomics."""

from dataclasses import dataclass

import numpy as np

from .storages import lazy_zeros

SECTOR_BYTES = 32
_READ, _WRITTEN = 1, 2
_EFFECT = {"load": _READ, "store": _WRITTEN, "atomic": _READ | _WRITTEN}


@dataclass
class Traffic:
    """requests: tl operations, one per program and executed line; lanes: elements they access; masked: lanes off;
    sectors: different sectors of a request, summed over requests."""

    requests: int = 0
    lanes: int = 0
    masked: int = 0
    bytes: int = 0
    sectors: int = 0

    @property
    def sectors_per_request(self):
        return self.sectors / self.requests if self.requests else 0.0


class SectorMap:
    """Sectors of one storage that a launch has read and written."""

    def __init__(self, storage):
        self.begin = storage.begin % SECTOR_BYTES
        n = (self.begin + storage.nbytes) // SECTOR_BYTES + 1
        self.touched = lazy_zeros(n, np.uint8)
        self.winner = lazy_zeros(n, np.int32)
        self.read = self.written = 0

    def add(self, kind, offsets):
        """Number of different sectors in one request of elements at byte `offsets`."""
        sectors = (offsets + self.begin) >> 5
        # Of the lanes of one sector the last to write its number here stands for all.
        lanes = np.arange(sectors.size, dtype=np.int32)
        self.winner[sectors] = lanes
        distinct = sectors[self.winner[sectors] == lanes]
        effect, before = _EFFECT[kind], self.touched[distinct]
        if effect & _READ:
            self.read += distinct.size - int(np.count_nonzero(before & _READ))
        if effect & _WRITTEN:
            self.written += distinct.size - int(np.count_nonzero(before & _WRITTEN))
        self.touched[distinct] = before | effect
        return distinct.size
