"""Each op in several orders of programs (Triton, in the interpreter) or threads (CUDA, in the emulator): the same bits, no findings.

Triton kernels run under the probe, which reports accesses of two programs that nothing orders. CUDA kernels run under
AddressSanitizer, ThreadSanitizer and random schedules. Exit status 1 for a finding or for other bits.
"""

import argparse
from dataclasses import dataclass, field

from . import tables


def add_arguments(parser):
    from .problems import DTYPES

    parser.add_argument("names", nargs="*", metavar="stem-or-op", help="what to run (default: everything)")
    parser.add_argument("--orders", type=_several, default=3, metavar="N", help="orders to try, at least 2 (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--json", metavar="FILE", help="write the findings")


def _several(text):
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} orders; give a whole number, at least 2")
    return int(text)


def needs_interpreter(args):
    return True


@dataclass
class Outcome:
    """One op on one backend: findings as (order, text), tensors whose bits depend on the order, why it did not run."""

    op: str
    backend: str
    orders: int = 0
    findings: list = field(default_factory=list)
    different: list = field(default_factory=list)
    reason: str = ""

    @property
    def bad(self):
        return bool(self.findings or self.different)


def run(args):
    from ..ops import stem_of
    from ._cuda_build import csrc
    from .problems import DTYPES, chosen

    outcomes = []
    for op in chosen(args.names):
        outcomes.append(in_orders(op, "triton", DTYPES[args.dtype], range(args.orders)))
        if (csrc() / "cuda" / f"{stem_of(op)}.cu").is_file():
            from . import emulated

            why = emulated.refusal()
            outcomes.append(Outcome(op, "cuda", reason=why) if why else in_orders(op, "cuda", DTYPES[args.dtype], range(args.orders)))
    _print(outcomes, args.dtype)
    if args.json:
        tables.write_json(args.json, "races", dtype=args.dtype, results=[{**vars(o), "bad": o.bad} for o in outcomes])
    return 1 if any(o.bad for o in outcomes) else 0


def in_orders(op, backend, dtype, seeds):
    """Outcome of an op in the orders drawn by `seeds`."""
    from .problems import different_bits, results

    outcome, first = Outcome(op, backend), None
    for seed in seeds:
        tool = _Probed(seed) if backend == "triton" else _Emulated(seed)
        found = tool.run(lambda: results(op, dtype, backend))
        outcome.orders += 1
        outcome.findings += [(seed, text) for text in tool.findings]
        if found is not None:
            first = first or found
            outcome.different += [name for name in different_bits(first, found) if name not in outcome.different]
    return outcome


class _Probed:
    def __init__(self, seed):
        from .probe import Probe

        self.probe = Probe(seed)

    def run(self, call):
        with self.probe:
            return call()

    @property
    def findings(self):
        return [str(f) for f in self.probe.findings]


class _Emulated:
    def __init__(self, seed):
        self.seed, self.findings = seed, []

    def run(self, call):
        """The results, or None when a kernel's mistake stopped the op."""
        from .cuda_emulator import KernelMistake
        from .emulated import EmulatedCuda

        with EmulatedCuda(1000 * self.seed, tools=("asan", "tsan", "schedules")):
            try:
                return call()
            except KernelMistake as mistake:
                self.findings = [str(f) for f in mistake.findings]
        return None


def _print(outcomes, dtype):
    rows = []
    for o in outcomes:
        bits = "" if o.reason else "differ: " + ", ".join(o.different) if o.different else "the same"
        rows.append([o.op, o.backend, o.orders, len(o.findings), bits, o.reason])
    columns = ["op", "backend", "orders", "findings", "bits", ""]
    print(f"{dtype}\n" + tables.table(columns, rows, left=2))
    found = [[o.op, o.backend, order, text] for o in outcomes for order, text in o.findings]
    if found:
        print("\n" + tables.table(["op", "backend", "order", "finding"], [r[:3] + [r[3].strip()] for r in found], left=2))
