"""What sm_90 does behind the threads' backs: barriers in shared memory and tensor copies through descriptors.

Copies are performed when issued. Their destination stays owned by the copy until a wait on its barrier succeeds, and
data that threads wrote must have passed a proxy fence before a copy or a warpgroup product reads it.
"""

import numpy as np

from .instructions_memory import combine, settle

# Our own layout of the opaque 128 bytes of a tensor map: field -> (first byte, bytes per entry).
DESCRIPTOR_FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 4),
    "elemtype": (12, 4),
    "swizzle_mode": (16, 4),
    "fill_mode": (20, 4),
    "box_dim": (24, 4),
    "global_dim": (44, 4),
    "global_stride": (64, 8),
    "element_stride": (96, 4),
    "interleave_layout": (116, 4),
    "swizzle_atomicity": (120, 4),
}
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
_HOST_TYPE = 100


def encode_descriptor(address, element_bytes, box, shape, strides, swizzle, fill):
    """Tensor map of a host descriptor; box, shape and strides (in elements) come outermost first."""
    raw = np.zeros(128, np.uint8)

    def put(field, values):
        first, size = DESCRIPTOR_FIELDS[field]
        data = np.array(values, f"u{size}").reshape(-1).view(np.uint8)
        raw[first : first + data.size] = data

    put("global_address", address)
    put("rank", len(shape) - 1)
    put("elemtype", _HOST_TYPE + element_bytes)
    put("swizzle_mode", swizzle)
    put("fill_mode", fill)
    put("box_dim", list(reversed(box)))
    put("global_dim", list(reversed(shape)))
    put("global_stride", [step * element_bytes for step in reversed(strides[:-1])])
    return raw.tobytes()


class Barriers:
    """State of the mbarrier objects, indexed like the 8-byte words of shared memory."""

    def __init__(self, words):
        self.expected, self.pending, self.tx, self.phase = (np.zeros(words, np.int64) for _ in range(4))
        self.valid = np.zeros(words, bool)
        # (barrier word, phase, shared words) of copies nobody has waited for
        self.copies = []
        # grows with every change, so that waiting threads know when to look again
        self.version = 0

    def settle(self, words):
        """Start the next phase of every barrier that has all its arrivals and bytes."""
        words = np.unique(words)
        done = words[self.valid[words] & (self.pending[words] == 0) & (self.tx[words] == 0)]
        self.phase[done] += 1
        self.pending[done] = self.expected[done]
        self.version += 1


def _barriers(s):
    if s.shared.barriers is None:
        s.shared.barriers = Barriers(len(s.shared.words[8]))
    return s.shared.barriers


def _lanes(s, mask):
    return np.ones(s.shape, bool) if mask is None else np.broadcast_to(mask, s.shape)


def _barrier_words(s, i, address, mask):
    """8-byte word of the barrier per active lane, in block and thread order."""
    lanes = _lanes(s, mask)
    settled, _ = settle(np.broadcast_to(address, s.shape), lanes)
    return s.shared.locate(s, i, settled, 8, s.shared_base)[lanes] >> 3, lanes


def barrier_init(s, i, address, count, mask):
    if mask is not None and not mask.any():
        return
    barriers = _barriers(s)
    words, lanes = _barrier_words(s, i, address, mask)
    barriers.expected[words] = barriers.pending[words] = np.broadcast_to(count, s.shape)[lanes]
    barriers.tx[words] = barriers.phase[words] = 0
    barriers.valid[words] = True


def barrier_arrive(s, i, address, arrivals, tx, mask):
    if mask is not None and not mask.any():
        return
    barriers = _barriers(s)
    words, lanes = _barrier_words(s, i, address, mask)
    _check_initialised(s, i, barriers, words)
    np.add.at(barriers.tx, words, np.broadcast_to(tx, s.shape)[lanes].astype(np.int64))
    np.subtract.at(barriers.pending, words, np.broadcast_to(arrivals, s.shape)[lanes].astype(np.int64))
    if (barriers.pending[words] < 0).any():
        raise s.finding("more arrivals than the barrier expects", i)
    barriers.settle(words)


def barrier_test(s, i, address, parity, mask):
    """Lanes whose phase of that parity is over; the copies it covered have landed."""
    result = np.zeros(s.shape, bool)
    if mask is not None and not mask.any():
        return result
    barriers = _barriers(s)
    words, lanes = _barrier_words(s, i, address, mask)
    _check_initialised(s, i, barriers, words)
    waited = np.broadcast_to(parity, s.shape)[lanes].astype(np.int64) & 1
    over = (barriers.phase[words] & 1) != waited
    result[lanes] = over
    landed = set(zip(words[over].tolist(), waited[over].tolist())) if barriers.copies else ()
    remaining = []
    for copy in barriers.copies:
        word, phase, shared_words = copy
        if (word, phase & 1) in landed and phase < barriers.phase[word]:
            s.shared.pending[shared_words] = 0
        else:
            remaining.append(copy)
    barriers.copies = remaining
    return result


def _check_initialised(s, i, barriers, words):
    if not barriers.valid[words].all():
        raise s.finding("use of a barrier that was not initialised", i)


def fence_proxy(s, mask):
    """What these threads wrote to shared memory is visible to copies and warpgroup products from here on."""
    if s.shared.dirty is not None:
        rows = s.shared.dirty.reshape(-1, s.shared.pitch // 4)
        rows[s.shared_base[:, 0] // s.shared.pitch] = 0


def set_descriptor(s, i, address, field, ordinal, value, mask):
    first, size = DESCRIPTOR_FIELDS[field]
    lanes = _lanes(s, mask)
    if lanes.any():
        settled, _ = settle(np.broadcast_to(address, s.shape), lanes)
        where = s.shared.locate(s, i, settled + first + ordinal * size, 4, s.shared_base)[lanes]
        data = np.ascontiguousarray(np.broadcast_to(value, s.shape)[lanes]).view("u4").reshape(len(where), -1)
        s.shared.words[4][(where >> 2)[:, None] + np.arange(data.shape[1])] = data


def copy_descriptor(s, i, target, source, mask):
    """128 bytes from shared to global memory, by one warp."""
    for block, thread in _issuers(s, mask):
        start = int(_at(source, block, thread)) + int(s.shared_base[block, 0])
        words = s.shared.words[4][start >> 2 : (start >> 2) + 32]
        where = s.memory.locate(s, i, np.array([[_at(target, block, thread)]]) + 4 * np.arange(32), 4)
        s.memory.words[4][where >> 2] = words


def _at(value, block, thread):
    return np.broadcast_to(value, (max(value.shape[0], block + 1), max(value.shape[1], thread + 1)))[block, thread]


def _issuers(s, mask):
    """(block, thread): the first active lane of each warp."""
    lanes = _lanes(s, mask).reshape(s.shape[0], -1, 32)
    for block, warp in np.argwhere(lanes.any(2)):
        yield int(block), int(warp) * 32 + int(lanes[block, warp].argmax())


class _Tile:
    """One box of a tensor: where it is in global memory, and where in shared memory."""

    def __init__(self, s, i, map_address, coordinates, shared_address):
        raw = s.memory.words[4].take(s.memory.locate(s, i, np.array([[map_address]]) + 4 * np.arange(32), 4) >> 2)
        self.raw = np.ascontiguousarray(raw.reshape(-1)).view(np.uint8)
        rank = self._field("rank", 1)[0] + 1
        kind = self._field("elemtype", 1)[0]
        self.size = size = kind - _HOST_TYPE if kind >= _HOST_TYPE else _ELEMENT_BYTES[kind]
        box, shape = self._field("box_dim", rank), self._field("global_dim", rank)
        strides = [size, *self._field("global_stride", rank - 1)]
        self.address = np.full((1,) * rank, self._field("global_address", 1)[0], np.int64)
        self.valid = np.ones((1,) * rank, bool)
        for d in range(rank):
            index = (coordinates[d] + np.arange(box[d])).reshape(-1, *(1,) * d)
            self.address = self.address + index * strides[d]
            self.valid = self.valid & (index >= 0) & (index < shape[d])
        self.fill = -1 if self._field("fill_mode", 1)[0] else 0
        self.bytes = int(np.prod(box)) * size
        shared = shared_address + np.arange(self.bytes // size).reshape(self.address.shape) * size
        swizzle = (1 << self._field("swizzle_mode", 1)[0]) - 1
        self.shared = shared ^ (((shared >> 7) & swizzle) << 4)
        if shared_address % 128:
            raise s.finding("misaligned tensor copy", i, f"shared address {shared_address:#x} is no multiple of 128")

    def _field(self, name, count):
        first, size = DESCRIPTOR_FIELDS[name]
        return [int(v) for v in self.raw[first : first + count * size].view(f"u{size}")]

    def locate(self, s, i):
        """(offsets in the process's memory, offsets in shared memory, valid elements)"""
        flat = self.address.reshape(1, -1)
        settled, _ = settle(flat, self.valid.reshape(1, -1))
        return None if settled is None else s.memory.locate(s, i, settled, self.size).reshape(self.address.shape)


def tensor_load(s, i, shared, map_address, coordinates, barrier, mask):
    for block, thread in _issuers(s, mask):
        place = [int(_at(c, block, thread)) for c in coordinates]
        tile = _Tile(s, i, int(_at(map_address, block, thread)), place, int(_at(shared, block, thread)))
        base, shift = int(s.shared_base[block, 0]), tile.size.bit_length() - 1
        target = s.shared.locate(s, i, tile.shared.reshape(1, -1), tile.size, base).reshape(-1) >> shift
        data = np.full(tile.shared.shape, tile.fill).astype(f"u{tile.size}")
        where = tile.locate(s, i)
        if where is not None:
            data = np.where(tile.valid, s.memory.words[tile.size].take(where >> shift), data)
        s.shared.words[tile.size][target] = data.reshape(-1)
        words = np.unique((target << shift) >> 2)
        s.shared.pending[words] = i.index + 1
        barriers, word = _barriers(s), (int(_at(barrier, block, thread)) + base) >> 3
        _check_initialised(s, i, barriers, np.array([word]))
        barriers.copies.append((word, int(barriers.phase[word]), words))
        barriers.tx[word] -= tile.bytes
        barriers.settle(np.array([word]))


def tensor_store(s, i, shared, map_address, coordinates, reduction, mask):
    for block, thread in _issuers(s, mask):
        place = [int(_at(c, block, thread)) for c in coordinates]
        tile = _Tile(s, i, int(_at(map_address, block, thread)), place, int(_at(shared, block, thread)))
        where, shift = tile.locate(s, i), tile.size.bit_length() - 1
        if where is None:
            continue
        source = s.shared.locate(s, i, tile.shared.reshape(1, -1), tile.size, int(s.shared_base[block, 0]))
        s.shared.check_fenced(s, i, source)
        data = s.shared.words[tile.size].take(source >> shift).reshape(tile.shared.shape)[tile.valid]
        where, words = where[tile.valid] >> shift, s.memory.words[tile.size]
        words[where] = data if reduction is None else combine(reduction, i.types[-1] if i.types else "u32", words[where], [data])
