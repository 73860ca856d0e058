"""Addresses as a probed kernel sees them: every tensor far from all others, so that no stray access hits a neighbour.

Nothing is copied: a kernel computes with virtual addresses, and the probe translates those it may access. Addresses
modulo 4096 are the real ones, so alignment is what it was.
"""

import numpy as np

from .sectors import SectorMap
from .shadow import Shadow

_SPAN_BITS = 44
_SPAN = 1 << _SPAN_BITS
# User space addresses stay below 2^47.
_FIRST_SPAN = 8


def spans_of(addresses):
    """Number of the span of each virtual address."""
    return addresses >> np.uint64(_SPAN_BITS)


class Region:
    """The bytes of one tensor, [begin, end) in virtual addresses, in the middle of a span of its own."""

    def __init__(self, name, number, real, nbytes, memory):
        self.name, self.memory, self.nbytes = name, memory, nbytes
        self.begin = (number + _FIRST_SPAN) * _SPAN + _SPAN // 2 + real % 4096
        self.end = self.begin + nbytes
        self.to_real = np.uint64(self.begin - real)
        self.to_offset = np.uint64(self.begin - (real - memory.storage.begin))

    def holds(self, first, last, item):
        return self.begin <= first and last + item <= self.end


class Memory:
    """One storage in one launch."""

    def __init__(self, storage, granule, clocks):
        self.storage = storage
        self.shadow = Shadow(storage, granule, clocks)
        self.sectors = SectorMap(storage)


class AddressSpace:
    def __init__(self, tracker, clocks):
        self.tracker, self.clocks = tracker, clocks
        self.regions, self.memories, self.loaded = [], {}, {}
        self.collected = False

    def map_tensor(self, name, tensor):
        """Region of an argument: exactly the elements that its shape and strides reach."""
        storage = self.tracker.note(tensor)
        item = tensor.element_size()
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
        return self._map(name, storage, tensor.data_ptr(), reach * item, item)

    def map_address(self, address, item, watched):
        """Virtual address of a pointer that a kernel took from memory; itself when no live tensor is there."""
        if address not in self.loaded:
            self.loaded[address] = self._find(address, item, watched)
        region, shift = self.loaded[address]
        return address if region is None else address + shift

    def region(self, address):
        number = (address >> _SPAN_BITS) - _FIRST_SPAN
        return self.regions[number] if 0 <= number < len(self.regions) else None

    def to_real(self, address):
        region = self.region(address)
        return address if region is None else address - int(region.to_real)

    def _find(self, address, item, watched):
        for name, tensor in watched:
            size = tensor.numel() * tensor.element_size()
            if tensor.data_ptr() <= address < tensor.data_ptr() + size and tensor.is_contiguous():
                region = self.map_tensor(name, tensor)
                return region, int(region.to_real)
        storage = self.tracker.find(address)
        if storage is None and 4096 < address < _FIRST_SPAN * _SPAN and not self.collected:
            self.tracker.collect()
            self.collected = True
            storage = self.tracker.find(address)
        if storage is None:
            return None, 0
        region = self._map(f"pointer from memory ({storage.label})", storage, storage.begin, storage.nbytes, item)
        return region, int(region.to_real)

    def _map(self, name, storage, real, nbytes, item):
        memory = self.memories.get(storage.begin)
        if memory is None:
            memory = self.memories[storage.begin] = Memory(storage, item, self.clocks)
        region = Region(name, len(self.regions), real, nbytes, memory)
        self.regions.append(region)
        return region
