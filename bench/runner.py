"""One case: build, verify, time interleaved, measure memory; the result is a list of plain records."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

from mtkernels._backends import ORDER
from mtkernels.ops import STEMS

from . import environment, memory, timing
from .registry import Unavailable, work
from .verify import Verifier


@dataclass(frozen=True)
class Options:
    """What the command line asked for. backends, peers: None = the default ones."""

    preset: str
    modes: tuple
    device: str
    threads: int
    backends: tuple | None = None
    peers: tuple | None = None
    metrics: tuple = ("time",)
    check: bool = True


def chosen_providers(suite, case, options):
    """(providers to run, {provider: why it is left out}); the baseline always runs."""
    backends = options.backends
    if backends is None:
        backends = [b for b in ORDER[options.device] if b != "reference" or options.preset != "bars"]
    run, left_out = [], {}
    for p in suite.PROVIDERS:
        if not p.applies(case):
            continue
        wanted = {"ours": p.name in backends, "peer": options.peers is None or p.name in options.peers, "part": True}[p.kind]
        named = options.peers is not None and p.name in options.peers
        if p.name != case.baseline and (not wanted or (p.slow and options.preset == "quick" and not named)):
            if wanted and p.kind == "peer":
                left_out[p] = f"slow to start; --peer {p.name} or --preset full runs it"
            continue
        run.append(p)
    return run, left_out


class CaseRun:
    """Runs one case; `records` and `bars` hold the results."""

    def __init__(self, suite, case, options, progress):
        self.suite, self.case, self.options, self.progress = suite, case, options, progress
        self.threads = case.threads or options.threads
        self.modes = [m for m in options.modes if m in case.modes]
        self.stem = next(s for s, ops in STEMS.items() if case.op in ops)
        self.calls, self.checks, self.records, self.bars = {}, {}, [], []

    def run(self):
        with timing.torch_threads(self.threads) if self.options.device == "cpu" else nullcontext():
            problem = self.suite.inputs(self.case, self.options.device)
            self._prepare(problem)
            kept = self._memory(problem) if "memory" in self.options.metrics else {}
            for mode in self.modes:
                self._time(mode, kept)
        return self

    def _prepare(self, problem):
        providers, left_out = chosen_providers(self.suite, self.case, self.options)
        for provider, why in left_out.items():
            self._left_out(provider, why)
        verifier = Verifier(self.suite, problem)
        for provider in providers:
            self.progress.step(f"{self.case}: {'verifying' if self.options.check else 'starting'} {provider.name}")
            try:
                call = provider.make(problem)
                self.checks[provider.name] = verifier.check(provider, call) if self.options.check else None
                self.calls[provider.name] = (provider, call)
            except Unavailable as reason:
                self._left_out(provider, str(reason))
            except Exception as error:  # one provider's failure is its result; the others still run
                lines = str(error).strip().splitlines() or [""]
                self._left_out(provider, f"{type(error).__name__}: {lines[0]}", failed=provider.kind == "ours")

    def _record(self, provider, mode, **values):
        return {
            "op": self.case.op,
            "stem": self.stem,
            "case": self.case.name,
            "shape": self.case.shape,
            "dtype": self.case.dtype,
            "mode": mode,
            "provider": provider.name,
            "kind": provider.kind,
            "device": self.options.device,
            "threads": self.threads,
            "baseline": self.case.baseline,
            **values,
        }

    def _left_out(self, provider, why, failed=False):
        self.records.append(self._record(provider, "", reason=why, failed=failed))

    def _memory(self, problem):
        """{provider: saved and peak bytes}, and the verdict on what our backends save."""
        kept = {}
        for name, (provider, call) in self.calls.items():
            if not call.leaves or (provider.kind == "part" and name != self.case.baseline):
                continue
            saved = memory.saved_bytes(call, problem)
            kept[name] = {"saved_bytes": saved, "peak_extra_bytes": memory.peak_extra_bytes(call, self.options.device)}
            if self.options.preset == "bars" and provider.kind == "ours":
                limit, total = self.suite.saved_limit(self.case), saved["activations"] + saved["made"]
                self._verdict(f"{name} saves <= {limit / 2**20:.2f} MiB for backward", total / 2**20, total <= limit)
                limit = getattr(self.suite, "peak_limit", lambda case: None)(self.case)
                if limit:
                    peak = kept[name]["peak_extra_bytes"]
                    self._verdict(f"{name} holds <= {limit / 2**20:.2f} MiB at a time", peak / 2**20, peak <= limit)
        return kept

    def _time(self, mode, kept):
        self.progress.step(f"{self.case}: timing {mode}")
        judged = self.case.bars.get(self.case.dtype, ()) if self.options.preset == "bars" and mode == "full" else ()
        runs = {name: call.runner(mode) for name, (_, call) in self.calls.items()}
        always = {self.case.baseline, *(name for bar in judged for name in bar.providers())}
        samples = timing.interleave(runs, timing.EFFORT[self.options.preset], self.options.device, always)
        base = samples.get(self.case.baseline)
        least = work(self.suite, self.case, mode)
        for name, (provider, _) in self.calls.items():
            check = self.checks[name]
            self.records.append(
                self._record(
                    provider,
                    mode,
                    time_ms=timing.summarize(samples[name]),
                    ratio=timing.ratio(samples[name], base) if base else None,
                    ratio_min=timing.ratio(samples[name], base, minima=True) if base else None,
                    # a part moves and computes less than the case
                    bytes=least.bytes if provider.kind != "part" else None,
                    flops=least.flops if provider.kind != "part" else None,
                    check=asdict(check) if check else None,
                    **kept.get(name, {}),
                )
            )
        for bar in judged:
            self._judge(bar, samples)

    def _judge(self, bar, samples):
        missing = [name for name in bar.providers() if name not in samples]
        if missing:
            return self._verdict(str(bar), None, None, reason=f"{missing[0]} did not run")
        typical, fastest = (timing.ratio(samples[bar.row], samples[bar.base], minima, samples.get(bar.above)) for minima in (False, True))
        value = fastest if bar.minima else typical
        met, reason = (value >= bar.limit if bar.at_least else value <= bar.limit), ""
        if bar.emulated and environment.native_bf16():
            met, reason = None, "set for CPUs without bf16 instructions; --isa avx512 imitates one"
        self._verdict(str(bar), value, met, reason=reason, median_ratio=typical, fastest_ratio=fastest)

    def _verdict(self, text, value, met, **more):
        self.bars.append({"case": str(self.case), "threads": self.threads, "bar": text, "value": value, "met": met, **more})


def torch_device(name):
    """"cuda" where there is one, unless asked otherwise."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' asked for, and torch sees no CUDA device; leave --device out or give cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
