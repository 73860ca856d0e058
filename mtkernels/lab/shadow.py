"""Who read and wrote each element during a launch, and which programs are ordered by acquire and release.

An epoch is a stretch of one program between two releases; epochs are numbered in the order in which they run, and the
interpreter runs one program after another. Two accesses of different programs to one element, one of them a plain
store, race unless the later program has acquired what the earlier one released after its access.
"""

import numpy as np

from .storages import lazy_zeros


class Clocks:
    """Vector clocks over epochs. Programs are numbered from 1."""

    def __init__(self):
        self.n_programs = 0
        # owner[epoch] = program
        self.owner = np.zeros(2, np.int32)
        self.program = self.epoch = self.first_epoch = 0
        # last epoch of each program that the current one knows to be over; None before it acquires anything
        self.seen = None
        self.released, self.holders = {}, {}
        self.n_tokens = 0

    def start(self, program):
        self.program, self.seen = program, None
        self._next_epoch()
        self.first_epoch = self.epoch

    def unordered(self, epochs):
        """Which epochs belong to other programs and may still run (0 = none)."""
        other = (epochs != 0) & (epochs < self.first_epoch)
        return other if self.seen is None else other & (epochs > self.seen[self.owner[epochs]])

    def acquire(self, tokens):
        """Learn what was released; `tokens` as left by `release`."""
        known = [self.released[t] for t in np.unique(tokens) if t]
        if known:
            self.seen = np.maximum.reduce(known if self.seen is None else [self.seen, *known])

    def release(self, tokens, index):
        """Publish what the program did and knows at elements `index` of the array `tokens`."""
        mine = np.zeros(self.n_programs + 1, np.int32) if self.seen is None else self.seen.copy()
        mine[self.program] = self.epoch
        index = np.unique(index)
        held = tokens[index]
        for token in np.unique(held):
            places = index[held == token]
            self.n_tokens += 1
            self.released[self.n_tokens] = np.maximum(self.released[token], mine) if token else mine
            self.holders[self.n_tokens] = len(places)
            tokens[places] = self.n_tokens
            if token:
                self.holders[token] -= len(places)
                if not self.holders[token]:
                    del self.holders[token], self.released[token]
        self._next_epoch()

    def split(self, tokens, factor):
        """Every element of `tokens` has become `factor` elements."""
        for token in np.unique(tokens):
            if token:
                self.holders[token] *= factor

    def _next_epoch(self):
        self.epoch += 1
        if self.epoch == len(self.owner):
            self.owner = np.concatenate([self.owner, np.zeros_like(self.owner)])
        self.owner[self.epoch] = self.program


class Shadow:
    """Accesses to one storage in one launch, per granule (the smallest element size used on it).

    The first and the last reader since a plain store stand for all readers: a race with another one is missed only if
    both of them are ordered before the store.
    """

    _PER_GRANULE = ("writer", "first_reader", "last_reader", "tokens")

    def __init__(self, storage, granule, clocks):
        self.storage, self.granule, self.clocks = storage, granule, clocks
        # epoch of the last writer, negative after an atomic
        self.writer = self.first_reader = self.last_reader = self.tokens = None
        self.lane = None

    def index(self, offsets, item):
        """Granules of elements of `item` bytes at byte `offsets`."""
        if item < self.granule:
            self._refine(item)
        if item == self.granule:
            return offsets // item
        return (offsets[:, None] // self.granule + np.arange(item // self.granule)).ravel()

    def load(self, index, relaxed):
        """Race found by a load, as (what, granule, other program, granules), or None; `relaxed`: atomic or volatile."""
        race = None
        if self.writer is not None:
            writer = self.writer[index]
            race = self._race("read after write", index, writer if relaxed else np.abs(writer))
        if not relaxed:
            self._record_reader(index)
        return race

    def store(self, index, atomic):
        """Race found by a store or an atomic. Atomics do not race with each other."""
        clocks, race = self.clocks, None
        if self.writer is None:
            self.writer = self._zeros()
        else:
            writer = self.writer[index]
            race = self._race("write after write", index, writer if atomic else np.abs(writer))
        if self.last_reader is not None:
            for reader in (self.last_reader, self.first_reader):
                race = race or self._race("write after read", index, reader[index])
            if not atomic:
                self.first_reader[index] = self.last_reader[index] = 0
        self.writer[index] = -clocks.epoch if atomic else clocks.epoch
        return race

    def acquire(self, index):
        if self.tokens is not None:
            self.clocks.acquire(self.tokens[index])

    def release(self, index):
        if self.tokens is None:
            self.tokens = self._zeros()
        self.clocks.release(self.tokens, index)

    def differing_lanes(self, index, values):
        """Lanes of one store whose address another lane writes with another value."""
        if self.lane is None:
            self.lane = self._zeros()
        lanes = np.arange(index.size, dtype=np.int32)
        self.lane[index] = lanes
        winner = self.lane[index]
        if np.array_equal(winner, lanes):
            return lanes[:0]
        bits = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, -1)
        return np.nonzero((bits != bits[winner]).any(1))[0]

    def unwritten(self, offsets, item):
        """Lanes that read memory nothing has written."""
        flags = self.storage.written
        if flags is None:
            return offsets[:0]
        kind = np.dtype(f"u{item}")
        return np.nonzero(flags.view(kind)[offsets // item] != _all_ones(kind))[0]

    def mark_written(self, offsets, item):
        if self.storage.written is not None:
            kind = np.dtype(f"u{item}")
            self.storage.written.view(kind)[offsets // item] = _all_ones(kind)

    def _record_reader(self, index):
        if self.last_reader is None:
            self.first_reader, self.last_reader = self._zeros(), self._zeros()
        fresh = self.first_reader[index] == 0
        if fresh.any():
            self.first_reader[index[fresh]] = self.clocks.epoch
        self.last_reader[index] = self.clocks.epoch

    def _race(self, what, index, epochs):
        bad = self.clocks.unordered(np.maximum(epochs, 0))
        if not bad.any():
            return None
        lane = int(np.argmax(bad))
        return what, int(index[lane]), int(self.clocks.owner[epochs[lane]]), int(np.count_nonzero(bad))

    def _zeros(self):
        return lazy_zeros(self.storage.nbytes // self.granule + 1, np.int32)

    def _refine(self, item):
        factor, self.granule = self.granule // item, item
        for name in self._PER_GRANULE:
            coarse = getattr(self, name)
            if coarse is not None:
                setattr(self, name, np.repeat(coarse, factor))
        self.lane = None
        if self.tokens is not None:
            self.clocks.split(self.tokens, factor)


def _all_ones(kind):
    """Flags of one element whose bytes are all written."""
    return kind.type(int.from_bytes(b"\x01" * kind.itemsize, "little"))
