"""Memory of the emulated GPU: global memory is the process's own, in checked extents; shared memory is one pool per launch."""

import ctypes
import gc

import numpy as np

_FIRST_BYTE = 4096
_SPAN = (1 << 47) - _FIRST_BYTE
_SIZES = (1, 2, 4, 8)
_ADOPTED = "a tensor reached through a loaded pointer"


def _process_memory():
    raw = np.frombuffer((ctypes.c_uint8 * _SPAN).from_address(_FIRST_BYTE), np.uint8)
    return {size: raw.view(f"u{size}") for size in _SIZES}


class LiveStorages:
    """The memory of CPU tensors alive in this process, for pointers that kernels load from memory.

    Walking all objects of a large process takes long, so what was found before and young objects come first.
    """

    def __init__(self):
        self._known = {}  # address -> (bytes, weak reference)

    def searches(self):
        """{address: bytes} from searches that cost more and more."""
        yield self._alive()
        for generations in ((0, 1), (2,)):
            for generation in generations:
                self._look(gc.get_objects(generation))
            yield self._alive()

    def _alive(self):
        self._known = {p: (n, ref) for p, (n, ref) in self._known.items() if not ref.expired()}
        return {p: n for p, (n, _) in self._known.items()}

    def _look(self, objects):
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        kinds = (torch.Tensor, torch.nn.Parameter)
        for item in objects:
            if type(item) in kinds and item.device.type == "cpu" and item.layout == torch.strided:
                storage = item.untyped_storage()
                if storage.nbytes():
                    self._known[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)


class GlobalMemory:
    """Extents that a kernel may touch.

    An argument gets an address range of its own, far from all others, so running off its end never lands in another
    tensor. Pointers that the kernel loads from memory are real addresses; those are looked up among the live tensors.
    """

    words = _process_memory()

    def __init__(self, live=None):
        self.extents = []  # (first address, end, real address - address, label)
        self._known, self._owners = {}, []
        self._searches = (live or LiveStorages()).searches()
        self._index()

    def add(self, label, address, size, owner=None):
        """Make `size` bytes at a real address reachable; returns the address the kernel sees."""
        if not size:
            return address
        if (address, size) not in self._known:
            # Same address modulo 4096: alignment and sector counts stay true.
            start = ((len(self._known) + 1) << 40) + address % 4096
            self._known[address, size] = start
            self._owners.append(owner)
            self.extents.append((start, start + size, address - start, label))
            self._index()
        return self._known[address, size]

    def place(self, label, address, data):
        """Put bytes at an address chosen by the kernel's translation."""
        owner = np.frombuffer(bytearray(data), np.uint8)
        self._owners.append(owner)
        self.extents.append((address, address + len(data), owner.ctypes.data - address, label))
        self._index()

    def _index(self):
        self.extents.sort()
        self.starts = np.array([e[0] for e in self.extents], np.int64)
        self.ends = np.array([e[1] for e in self.extents], np.int64)
        self.shifts = np.array([e[2] for e in self.extents], np.int64)

    def _adopt(self, storages):
        """Make storages reachable at their real addresses."""
        ours = [e for e in self.extents if e[3] != _ADOPTED]
        self.extents = ours + [(p, p + n, 0, _ADOPTED) for p, n in storages.items()]
        self._index()

    def locate(self, s, i, address, size, alignment=None):
        """Offsets into the process's memory of `size` bytes at each address (signed 64-bit array)."""
        alignment = alignment or size
        if int(np.bitwise_or.reduce(address, axis=None)) & (alignment - 1):
            bad = address[(address & (alignment - 1)) != 0].flat[0]
            raise s.finding("misaligned access", i, f"{size} bytes at {self.describe(int(bad))}", address == bad)
        low, high = int(address.min()), int(address.max()) + size
        k = int(self.starts.searchsorted(low, "right")) - 1
        if k >= 0 and high <= self.ends[k]:
            return address + (self.shifts[k] - _FIRST_BYTE)
        if len(self.starts):
            k = np.maximum(self.starts.searchsorted(address, "right") - 1, 0)
            inside = (address >= self.starts[k]) & (address + size <= self.ends[k])
            if inside.all():
                return address + (self.shifts[k] - _FIRST_BYTE)
        else:
            inside = np.zeros(address.shape, bool)
        for storages in self._searches:
            self._adopt(storages)
            return self.locate(s, i, address, size, alignment)
        bad = address[~inside].flat[0]
        raise s.finding("global memory out of bounds", i, f"{size} bytes at {self.describe(int(bad))}", address == bad)

    def describe(self, address):
        """An address in terms of the nearest extent."""
        def distance(e):
            return max(e[0] - address, address - e[1] + 1, 0)

        nearest = min(self.extents, key=distance, default=None)
        if nearest is None or distance(nearest) > 1 << 36:
            return f"{address:#x}, which is near no argument"
        start, end, _, label = nearest
        return f"byte {address - start} of {label} ({end - start} bytes)"


class BlockMemory:
    """Shared (or thread-local) memory of the blocks in flight, filled with 0xFF so that unwritten values show."""

    def __init__(self, blocks, size, async_proxy=False):
        self.size = size
        self.pitch = -(-size // 128) * 128
        raw = np.full(blocks * self.pitch, 255, np.uint8)
        self.words = {size: raw.view(f"u{size}") for size in _SIZES}
        # 1 + instruction index of the asynchronous copy that owns each 4-byte word until it is waited for
        self.pending = np.zeros(blocks * self.pitch // 4, np.uint32)
        # words written by threads since the last proxy fence, where something reads through the async proxy
        self.dirty = np.zeros(blocks * self.pitch // 4, np.uint8) if async_proxy else None
        self.barriers = None

    def locate(self, s, i, address, size, base, kind="shared memory"):
        if int(np.bitwise_or.reduce(address, axis=None)) & (size - 1):
            bad = address[(address & (size - 1)) != 0].flat[0]
            raise s.finding(f"misaligned access of {kind}", i, f"{size} bytes at {int(bad):#x}", address == bad)
        if int(address.min()) < 0 or int(address.max()) + size > self.size:
            bad = address[(address < 0) | (address + size > self.size)].flat[0]
            raise s.finding(f"{kind} out of bounds", i, f"{size} bytes at {int(bad)} of {self.size}", address == bad)
        return address + base

    def check_fenced(self, s, i, offset):
        if self.dirty is not None and self.dirty.take(offset >> 2).any():
            raise s.finding("read through the async proxy of data that no fence.proxy.async has made visible", i)

    def check_landed(self, s, i, offset, size):
        """Reading what an asynchronous copy has not been waited for is undefined."""
        for word in {0, size // 4 - 1 if size >= 4 else 0}:
            owner = self.pending.take((offset >> 2) + word)
            if owner.any():
                copy = s.program.kernel.instructions[int(owner.max()) - 1]
                raise s.finding("read of data whose asynchronous copy was not waited for", i, f"copied at {copy.where}", owner != 0)


