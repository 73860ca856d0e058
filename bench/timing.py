"""Interleaved timing: every provider of a case runs once per round, so that ratios compare the same seconds."""

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

SHORTEST_SAMPLE_NS = 300_000  # shorter calls are repeated inside a sample
FLUSH_BYTES = 256 << 20  # beyond any GPU's L2


@dataclass(frozen=True)
class Effort:
    """min_rounds always run; then until budget_s is spent. A provider slower than its share stops after slow_rounds."""

    budget_s: float
    min_rounds: int
    slow_rounds: int = 3


EFFORT = {"quick": Effort(1.2, 5), "bars": Effort(12.0, 15, 8), "full": Effort(4.0, 10), "cost": Effort(4.0, 10)}


class CpuClock:
    def sample(self, run, repeats):
        """Nanoseconds per call; the last output is freed outside the timed region."""
        start = time.perf_counter_ns()
        for _ in range(repeats):
            out = run()
        stop = time.perf_counter_ns()
        del out
        return (stop - start) / repeats


class CudaClock:
    """CUDA events around each call, L2 flushed before it."""

    def __init__(self):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(self, run, repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for _ in range(repeats):
            self.flush.zero_()
            start.record()
            out = run()
            stop.record()
            stop.synchronize()
            del out
            total += start.elapsed_time(stop)
        return total * 1e6 / repeats


def clock(device):
    return CudaClock() if device == "cuda" else CpuClock()


@contextmanager
def _no_gc():
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def torch_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(runs, effort, device="cpu", always=()):
    """{name: samples in ns, one per round, None where it sat out}.

    runs: {name: function}. `always` names run in every round (the denominators); another one whose single call takes
    the whole budget is timed by that call.
    """
    timer, repeats, samples = clock(device), {}, {name: [] for name in runs}
    for name, run in runs.items():
        first = timer.sample(run, 1)
        if first > effort.budget_s * 1e9 and name not in always:
            samples[name].append(first)
        else:
            repeats[name] = max(1, int(SHORTEST_SAMPLE_NS / max(timer.sample(run, 1), 1)))
    spent, share_ns = dict.fromkeys(repeats, 0.0), effort.budget_s * 1e9 / max(len(repeats), 1)
    deadline = time.perf_counter() + effort.budget_s
    done = 0
    with _no_gc():
        while done < effort.min_rounds or time.perf_counter() < deadline:
            # alternate directions, so that nobody always follows the same neighbour
            for name in list(repeats) if done % 2 == 0 else reversed(repeats):
                if name not in always and done >= effort.slow_rounds and spent[name] > share_ns:
                    samples[name].append(None)
                    continue
                ns = timer.sample(runs[name], repeats[name])
                samples[name].append(ns)
                spent[name] += ns * repeats[name]
            done += 1
    return samples


def summarize(samples):
    """Median, 20th and 80th percentile and minimum in ms."""
    taken = [s / 1e6 for s in samples if s is not None]
    cuts = quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else taken * 4
    return {"median": median(taken), "p20": cuts[0], "p80": cuts[3], "min": min(taken), "rounds": len(taken)}


def ratio(samples, base, minima=False, floor=None):
    """Median over shared rounds of samples / base, or the ratio of the fastest ones; `floor` is taken off both first."""
    triples = [(s, b, f) for s, b, f in zip(samples, base, floor or [0.0] * len(samples)) if None not in (s, b, f)]
    if minima:
        s, b, f = map(min, zip(*triples))
        return (s - f) / (b - f)
    return median((s - f) / (b - f) for s, b, f in triples)
